"""Weight perturbation, companions and losses of the step, on a linear classifier.

The derivation is numpy in float64: logits are x w + b, the gradient of the whole loss
is taken by central differences in every parameter.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import digits
from jaxrobust import config as configs
from jaxrobust import models
from jaxrobust.attacks import norms, pgd
from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.models import companions
from jaxrobust.training import optimizer, update, weight_perturbation
from tests.helpers import loss_formulas as formulas

BATCH, CLASSES, DECAY = 16, 10, 0.01


def linear(seed):
  """x → x w + b, with the parameters and the empty state of a network."""

  def init(rng):
    draw = np.random.RandomState(seed)
    w, b = 0.2 * draw.normal(size=(64, CLASSES)), 0.1 * draw.normal(size=CLASSES)
    return {'linear': {'w': jnp.float32(w), 'b': jnp.float32(b)}}, {}

  def apply(params, net_state, images, batch_stats):
    flat = images.reshape(len(images), -1)
    return flat @ params['linear']['w'] + params['linear']['b'][None], net_state

  return models.Model(init, apply, features=None)


@pytest.fixture(scope='module')
def batch():
  real = datasets.load('digits', 'train')
  return update.Batch(
    real.images[:BATCH],
    real.labels[:BATCH],
    np.arange(BATCH) % 3 == 0,
    np.arange(BATCH, dtype=np.int32),
  )


def take_step(batch, overrides, model=None, net_state=None):
  """(gradient of the step, parameters before, state after, metrics, images …)."""
  config = digits.get_config('wrn-10-1').unlock()
  config.update_from_flattened_dict(
    {
      'data.batch_size': BATCH,
      'model.batch_norm_group': 2,
      'augment.pad': 0,
      'loss.weight_decay': DECAY,
      'optimizer.learning_rate': 1.0,
      'optimizer.momentum': 0.0,
      'optimizer.nesterov': False,
      'optimizer.warmup_epochs': 0.0,
      'optimizer.schedule': 'constant',
      'loss.awp_warmup_epochs': 0.0,
      **overrides,
    }
  )
  model = model or linear(0)
  sgd = optimizer.make(config.optimizer, configs.resolve(config))
  before = update.init_state(config, model, sgd)
  if net_state is not None:
    before = before._replace(net_state=net_state, ema_net_state=net_state)
  step = parallel.pmap(update.make_step(config, model, sgd, CLASSES))
  after, metrics = step(parallel.replicate(before), parallel.shard(batch))
  after, metrics = parallel.unreplicate(after), parallel.unreplicate(metrics)
  attack = pgd.from_config(
    config.attack, norms.get(config.threat.norm, config.threat.epsilon)
  )

  @jax.jit
  def inputs(batch):
    images, targets, _, rngs, _ = update._augmented(config, CLASSES, 0, batch)
    logits_fn = lambda x: model.apply(before.params, {}, x, batch_stats=True)[0]
    reference = jax.nn.softmax(logits_fn(images))
    return images, attack(logits_fn, rngs, images, reference), targets

  flat = [np.float64(x).reshape(BATCH, -1) for x in inputs(batch)]
  old, new = (
    {m: {k: np.float64(v) for k, v in p.items()} for m, p in state.params.items()}
    for state in (before, after)
  )
  return jax.tree.map(np.subtract, old, new), old, after, metrics, flat


def logits(p, x, module='linear'):
  return x @ p[module]['w'] + p[module]['b']


def weight_decay(p):
  return DECAY / 2 * sum((leaf**2).sum() for m in p.values() for leaf in m.values())


def numeric_gradient(loss, params):
  """Central differences in every parameter, in float64."""

  def of(module, name):
    moved = lambda x: {**params, module: {**params[module], name: x}}
    return formulas.finite_differences(
      lambda x: loss(moved(x)), params[module][name], 1e-5
    )

  return {m: {k: of(m, k) for k in p} for m, p in params.items()}


def assert_close(found, expected, scale=1e-5):
  # The gradient is the difference of float32 parameters of about 0.5.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=scale),
    found,
    expected,
  )


def trades(p, data, beta=6.0):
  images, adv_images, targets = data
  clean, adv = logits(p, images), logits(p, adv_images)
  return formulas.numpy_trades(clean, adv, targets, beta)


GAMMA = {'loss.awp_gamma': 0.3}


@pytest.fixture(scope='module')
def perturbed(batch):
  return take_step(batch, GAMMA)


def test_the_gradient_is_taken_at_perturbed_weights(perturbed):
  gradient, p, _, metrics, data = perturbed
  # Up the loss without weight decay; biases stay.
  up = numeric_gradient(lambda q: trades(q, data), p)['linear']['w']
  w = p['linear']['w']
  moved = {'linear': {**p['linear']}}
  moved['linear']['w'] = w + 0.3 * np.linalg.norm(w) / np.linalg.norm(up) * up
  whole = lambda q: trades(q, data) + weight_decay(q)
  assert_close(gradient, numeric_gradient(whole, moved), 3e-5)
  np.testing.assert_allclose(metrics['train/loss'], whole(moved), rtol=1e-4)
  assert whole(moved) > whole(p)


def test_parts_of_a_batch_share_one_perturbation(batch, perturbed):
  parts = take_step(batch, {**GAMMA, 'training.accumulation': 2})
  assert_close(parts[0], perturbed[0])


def test_before_its_first_epoch_nothing_is_perturbed(batch):
  gradient, p, _, _, data = take_step(batch, {**GAMMA, 'loss.awp_warmup_epochs': 1.0})
  whole = lambda q: trades(q, data) + weight_decay(q)
  assert_close(gradient, numeric_gradient(whole, p))


def test_only_weights_move_and_by_their_own_size():
  tree = lambda x: {'bn': {'scale': x}, 'a': {'w': x, 'b': x}, 'zero': {'w': 0 * x}}
  ones = jnp.ones((2, 2))
  found = weight_perturbation.perturb(tree(2 * ones), tree(-3 * ones), 0.5)
  # |w| = 4, |g| = 6: the move is 0.5 * 4 / 6 * -3 = -1.
  expected = tree(2 * ones)
  expected['a']['w'] = expected['a']['w'] - 1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected
  )


def test_the_natural_network_learns_beside(batch):
  model = companions._with_natural(linear(0), linear(1))
  gradient, p, after, metrics, data = take_step(batch, {'loss.name': 'lbgat'}, model)
  images, adv_images, targets = data

  def whole(p):
    natural = logits(p, images, 'beside/natural/linear')
    robust = [logits(p, x) for x in (images, adv_images)]
    return formulas.numpy_lbgat(*robust, natural, targets, 6.0) + weight_decay(p)

  assert_close(gradient, numeric_gradient(whole, p))
  natural = logits(p, images, 'beside/natural/linear')
  accuracy = (np.argmax(natural, -1) == targets.argmax(-1)).mean()
  np.testing.assert_allclose(metrics['train/natural_accuracy'], accuracy, atol=1e-6)
  assert set(companions.without(after.ema_params)) == {'linear'}


def test_class_means_weigh_the_differences_of_logits(batch):
  sums = np.random.RandomState(3).dirichlet(np.ones(100)).reshape(10, 10)
  state = {'beside/classes': {'sums': jnp.float32(sums)}}
  model = companions._with_classes(linear(0), CLASSES)
  np.testing.assert_array_equal(
    model.init(None)[1]['beside/classes']['sums'], np.full((10, 10), np.float32(0.01))
  )
  gradient, p, after, _, data = take_step(
    batch, {'loss.divergence': 'improved_kl', 'loss.beta': 3.0}, model, state
  )
  images, adv_images, targets = data
  labels = targets.argmax(-1)
  weights = sums[labels] / sums[labels].sum(-1, keepdims=True)
  fixed = logits(p, images)

  def whole(p):
    clean, adv = logits(p, images), logits(p, adv_images)
    return weight_decay(p) + formulas.numpy_improved_kl(
      clean, adv, targets, weights, 3.0, 10.0, fixed
    )

  assert_close(gradient, numeric_gradient(whole, p))
  predictions = formulas.softmax(fixed / 4)
  expected = 0.99 * sums + 0.01 * np.eye(10)[labels].T @ predictions / BATCH
  found = after.net_state['beside/classes']['sums']
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert companions.without(after.net_state) == {}


def test_fixed_and_online_targets(batch):
  gradient, p, _, _, data = take_step(batch, {'loss.name': 'uat', 'loss.beta': 2.0})
  images, adv_images, targets = data
  fixed = logits(p, images)
  whole = lambda p: (
    weight_decay(p)
    + formulas.numpy_uat(
      None, logits(p, adv_images), targets, batch.is_generated, 2.0, fixed
    )
  )
  assert_close(gradient, numeric_gradient(whole, p))


def test_companions_pass_through_a_network_untouched():
  """Haiku hands on what it does not know: running statistics move, companions stay."""

  def network():
    hk.set_state('mean', hk.get_state('mean', (), init=jnp.zeros) + 1)

  state = {'~': {'mean': jnp.ones(())}, 'beside/classes': {'sums': jnp.ones(2)}}
  _, moved = hk.transform_with_state(network).apply({}, state, None)
  assert moved['~']['mean'] == 2
  assert moved['beside/classes']['sums'] is state['beside/classes']['sums']


def test_a_network_for_training_has_the_companions_of_its_loss():
  shapes = lambda config: jax.eval_shape(
    companions.for_training(config, dataset_info.INFO['digits']).init, jax.random.key(0)
  )
  config = digits.get_config('wrn-10-1').unlock()
  plain = shapes(config)
  config.loss.divergence = 'improved_kl'
  assert shapes(config)[1]['beside/classes']['sums'].shape == (10, 10)
  config.loss.divergence = 'kl'
  config.loss.name = 'lbgat'
  config.loss.natural_model = 'wrn-10-2'
  both = shapes(config)
  assert tuple(map(companions.without, both)) == plain
  name = 'beside/natural/wide_res_net/~/logits'
  assert (
    both[0][name]['w'].shape[0] == 2 * plain[0]['wide_res_net/~/logits']['w'].shape[0]
  )
