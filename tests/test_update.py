"""One whole step against an independent float64 derivation, and its invariances.

The derivation is written in numpy from the formulas: convolution by shifted sums,
BatchNorm by means over each group, swish, TRADES, and gradients by central
differences along random directions.
"""

import functools

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
from jaxrobust.errors import UserError
from jaxrobust.training import losses, optimizer, step_loss, update

GROUP, BATCH = 4, 16


@pytest.fixture(scope='module')
def batch():
  rng = np.random.RandomState(0)
  real = datasets.load('digits', 'train')
  return update.Batch(
    real.images[:BATCH],
    real.labels[:BATCH],
    rng.rand(BATCH) < 0.5,
    np.arange(BATCH, dtype=np.int32),
  )


def make_config(**overrides):
  config = digits.get_config('wrn-10-1').unlock()
  config.data.batch_size = BATCH
  config.model.batch_norm_group = GROUP
  config.optimizer.warmup_epochs = 0.0
  if 'augment.cutmix_workers' in overrides:  # A number where it is unset, or unset.
    config.augment.cutmix_workers = overrides.pop('augment.cutmix_workers')
  config.update_from_flattened_dict(overrides)
  return config


@functools.cache
def initial_state():
  """Which no override changes, with a last layer that is not zero."""
  config = make_config()
  model = models.from_config(config.model, dataset_info.INFO['digits'])
  sgd = optimizer.make(config.optimizer, configs.resolve(config))
  state = jax.jit(lambda: update.init_state(config, model, sgd))()
  params = dict(state.params)
  last = next(k for k in params if k.endswith('logits'))
  rng = np.random.RandomState(1)
  params[last] = {
    k: jnp.float32(0.3 * rng.normal(size=v.shape)) for k, v in params[last].items()
  }
  return state._replace(params=params, ema_params=params)


class Setup:
  """A network, and its step on all devices."""

  def __init__(self, **overrides):
    self.config = config = make_config(**overrides)
    derived = configs.resolve(config)
    self.model = models.from_config(config.model, dataset_info.INFO['digits'])
    self.sgd = optimizer.make(config.optimizer, derived)
    self.learning_rate = derived.learning_rate
    self.state = initial_state()
    self.step = parallel.pmap(update.make_step(config, self.model, self.sgd, 10))

  def run(self, batch):
    state, metrics = self.step(parallel.replicate(self.state), parallel.shard(batch))
    return parallel.unreplicate(state), parallel.unreplicate(metrics)


# The derivation in float64.


def conv(x, w, stride):
  """'SAME' convolution as TensorFlow pads: the odd pixel at the end."""
  size, taps = x.shape[1], w.shape[0]
  out = -(-size // stride)
  total = max((out - 1) * stride + taps - size, 0)
  low, high = total // 2, total - total // 2
  x = np.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))
  y = np.zeros((len(x), out, out, w.shape[3]))
  for i in range(taps):
    for j in range(taps):
      patch = x[
        :,
        i : i + (out - 1) * stride + 1 : stride,
        j : j + (out - 1) * stride + 1 : stride,
      ]
      y += patch @ w[i, j]
  return y


def batch_norm(x, p, seen, name):
  """Normalises each group of images; appends its mean and variance to `seen`."""
  groups = x.reshape(-1, GROUP, *x.shape[1:])
  mean = groups.mean((1, 2, 3), keepdims=True)
  var = groups.var((1, 2, 3), keepdims=True)
  seen.setdefault(name, []).append((mean.mean(0).ravel(), var.mean(0).ravel()))
  y = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
  return y * p[name]['scale'] + p[name]['offset']


def swish(x):
  return x / (1 + np.exp(-x))


def forward(p, images, seen):
  """WRN-10-1: (10 - 4) / 6 = 1 block in each of three groups."""
  net = 'wide_res_net/~/'
  x = conv((images - 0.5) / 0.5, p[f'{net}init_conv']['w'], 1)
  for layer, stride in enumerate((1, 2, 2)):
    block = f'{net}resnet_lay_{layer}_block_0/~/'
    y = swish(batch_norm(x, p, seen, f'{block}batchnorm_0'))
    shortcut = conv(y, p[f'{block}shortcut']['w'], stride)
    y = conv(y, p[f'{block}conv_0']['w'], stride)
    y = swish(batch_norm(y, p, seen, f'{block}batchnorm_1'))
    x = conv(y, p[f'{block}conv_1']['w'], 1) + shortcut
  x = swish(batch_norm(x, p, seen, f'{net}batchnorm')).mean((1, 2))
  return x @ p[f'{net}logits']['w'] + p[f'{net}logits']['b']


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def trades(p, images, adv_images, targets, beta=6.0, decay=5e-4, seen=None):
  """CE(clean) + beta * KL(clean || adversarial) + decay / 2 * squares of w and b."""
  clean = log_softmax(forward(p, images, {}))
  adv = log_softmax(forward(p, adv_images, {} if seen is None else seen))
  kl = (np.exp(clean) * (clean - adv)).sum(-1).mean()
  squares = sum(
    (leaf**2).sum()
    for module in p.values()
    for name, leaf in module.items()
    if name in ('w', 'b')
  )
  return -(targets * clean).sum(-1).mean() + beta * kl + decay / 2 * squares


def float64(tree):
  return {
    m: {k: np.float64(v) for k, v in leaves.items()} for m, leaves in tree.items()
  }


@pytest.fixture(scope='module')
def plain():
  return Setup()


@pytest.fixture(scope='module')
def cutmix():
  """And own statistics of the averaged parameters: one step less to compile."""
  return Setup(**{'augment.cutmix': True, 'ema.batch_norm': 'own'})


@pytest.fixture(scope='module')
def case(batch, plain):
  """A step, and the images and targets that went into its loss."""
  setup = plain
  config, state = setup.config, setup.state
  after, metrics = setup.run(batch)
  images, targets, _, rngs, _ = jax.jit(lambda b: update._augmented(config, 10, 0, b))(
    batch
  )
  attack = pgd.from_config(
    config.attack, norms.get(config.threat.norm, config.threat.epsilon)
  )
  logits_fn = lambda x: setup.model.apply(
    state.params, state.net_state, x, batch_stats=True
  )[0]
  adv_images = jax.jit(
    lambda rngs, x: attack(logits_fn, rngs, x, jax.nn.softmax(logits_fn(x)))
  )(rngs, images)
  p = float64(state.params)
  inputs = [np.float64(x) for x in (images, adv_images, targets)]
  return setup, after, metrics, p, inputs


def test_inputs_of_the_loss(batch, case):
  images, adv_images, targets = case[-1]
  np.testing.assert_allclose(images, batch.images / 255, atol=1e-7)
  smooth = np.where(batch.is_generated, 0.1, 0.0)[:, None]
  expected = np.eye(10)[batch.labels] * (1 - smooth) + smooth / 10
  np.testing.assert_allclose(targets, expected, atol=1e-7)
  assert np.abs(adv_images - images).max() <= 0.2 + 1e-6
  assert np.abs(adv_images - images).max() > 0.1


def test_labels_of_real_images_are_smoothed_on_request(batch):
  config = make_config(**{'augment.smooth_real_labels': True})
  targets = jax.jit(lambda b: update._augmented(config, 10, 0, b).targets)(batch)
  assert not batch.is_generated.all()
  np.testing.assert_allclose(targets, np.eye(10)[batch.labels] * 0.9 + 0.01, atol=1e-7)


def test_loss_and_accuracies(case):
  _, _, metrics, p, (images, adv_images, targets) = case
  expected = trades(p, images, adv_images, targets)
  # Ten float32 steps of the attack on four devices and on one differ in rounding.
  np.testing.assert_allclose(metrics['train/loss'], expected, rtol=2e-4)
  labels = targets.argmax(-1)
  for name, x in (('clean', images), ('adv', adv_images)):
    accuracy = (forward(p, x, {}).argmax(-1) == labels).mean()
    np.testing.assert_allclose(metrics[f'train/{name}_accuracy'], accuracy, atol=1e-6)


def test_gradient_by_central_differences(case):
  """The update of the first step is -lr * (1 + momentum) * gradient (Nesterov)."""
  setup, after, _, p, inputs = case
  scale = -setup.learning_rate * 1.9
  gradient = jax.tree.map(
    lambda new, old: (np.float64(new) - np.float64(old)) / scale,
    float64(after.params),
    float64(setup.state.params),
  )
  rng = np.random.RandomState(2)
  for name, module in p.items():
    for leaf in module:
      direction = rng.normal(size=module[leaf].shape)
      direction /= np.linalg.norm(direction)
      moved = lambda t, n=name, k=leaf, d=direction: {
        **p,
        n: {**p[n], k: p[n][k] + t * d},
      }
      h = 1e-5
      numeric = (trades(moved(h), *inputs) - trades(moved(-h), *inputs)) / (2 * h)
      # The gradient is read off float32 parameters: 1e-7 of them over the step size.
      np.testing.assert_allclose(
        (gradient[name][leaf] * direction).sum(), numeric, rtol=5e-3, atol=2e-4
      )


def test_batch_norm_statistics_come_from_the_adversarial_pass(case):
  _, after, _, p, (images, adv_images, targets) = case
  seen = {}
  trades(p, images, adv_images, targets, seen=seen)
  for name, [(mean, var)] in seen.items():
    state = after.net_state[f'{name}/~/mean_ema']
    np.testing.assert_allclose(state['average'].ravel(), mean, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(
      state['hidden'].ravel(), 0.01 * mean, rtol=2e-3, atol=2e-6
    )
    assert state['counter'] == 1
    state = after.net_state[f'{name}/~/var_ema']
    np.testing.assert_allclose(state['average'].ravel(), var, rtol=2e-3, atol=2e-4)


def test_averaged_parameters(case):
  setup, after, _, p, _ = case
  new = float64(after.params)
  for name, module in float64(after.ema_params).items():
    for leaf, value in module.items():
      # At step 0 the decay is (1 + 0) / (10 + 0).
      np.testing.assert_allclose(
        value, 0.1 * p[name][leaf] + 0.9 * new[name][leaf], rtol=1e-5, atol=1e-7
      )
  assert after.step == 1


# What must not matter, and what must.


def tree_difference(a, b):
  return max(
    float(np.abs(np.float64(x) - np.float64(y)).max())
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_one_and_four_devices_give_the_same_update(batch, plain):
  """Groups of 4 images on 4 devices, and as ghost groups on one device."""
  setup = plain
  four, _ = setup.run(batch)
  step = update.make_step(setup.config, setup.model, setup.sgd, 10)
  one = jax.pmap(step, axis_name=parallel.AXIS, devices=jax.devices()[:1])
  lead = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[None], tree)
  state, _ = one(lead(setup.state), lead(batch))
  state = jax.tree.map(lambda x: x[0], state)
  assert tree_difference(four.params, state.params) < 1e-4


@pytest.mark.parametrize('name', ['plain', 'cutmix'])
def test_the_order_of_the_slots_does_not_matter(batch, name, request):
  """Whole BatchNorm groups may sit on any device."""
  setup = request.getfixturevalue(name)
  order = np.arange(BATCH).reshape(4, GROUP)[[2, 0, 3, 1]].ravel()
  straight, _ = setup.run(batch)
  moved, metrics = setup.run(update.Batch(*(x[order] for x in batch)))
  assert tree_difference(straight.params, moved.params) < 1e-4
  assert 0 <= metrics['train/adv_accuracy'] <= 1  # CutMix does not stop it.


def test_own_statistics_of_the_averaged_parameters(batch, plain, cutmix):
  raw, _ = plain.run(batch)
  own, _ = cutmix.run(batch)
  np.testing.assert_array_equal(*(jax.tree.leaves(s.net_state)[1] for s in (raw, own)))
  assert tree_difference(raw.ema_net_state, raw.net_state) == 0
  assert tree_difference(own.ema_net_state, own.net_state) > 1e-4


@functools.cache
def inputs_fn(devices=4, **overrides):
  """`(step, batch) → images, targets` on so many devices, in the order of the slots."""
  config = make_config(**overrides)
  mapped = jax.pmap(
    lambda step, b: update._augmented(config, 10, step, b)[:2],
    axis_name=parallel.AXIS,
    in_axes=(None, 0),
    devices=jax.devices()[:devices],
  )

  def inputs(step, batch):
    split = lambda x: np.reshape(x, (devices, len(x) // devices, *x.shape[1:]))
    found = mapped(step, jax.tree.map(split, batch))
    join = lambda x: np.asarray(x).reshape(-1, *x.shape[2:])
    return [join(x)[np.argsort(batch.slots)] for x in found]

  return inputs


ALL = {
  'augment.policy': 'randaugment',
  'augment.pad': 1,
  'augment.flip': True,
  'augment.cutout': 3,
  'augment.mixup': True,
  'augment.cutmix_workers': 2,
}


def test_standard_loss_is_cross_entropy_of_one_pass(batch):
  """With all augmentations, so that the step is seen to train on what they give."""
  setup = Setup(**{'loss.name': 'standard', 'loss.weight_decay': 0.0, **ALL})
  _, metrics = setup.run(batch)
  images, targets = inputs_fn(**ALL)(0, batch)
  state = setup.state
  logits = jax.jit(
    lambda x: setup.model.apply(state.params, state.net_state, x, batch_stats=True)[0]
  )(images)
  np.testing.assert_allclose(
    metrics['train/loss'], losses.cross_entropy(logits, targets).mean(), rtol=1e-5
  )
  assert 'train/adv_accuracy' not in metrics


@pytest.mark.parametrize('option', ['cutmix', 'mixup'])
def test_mixed_targets_are_what_the_attack_moves_away_from(option):
  logits, targets = jnp.zeros((2, 10)), jnp.eye(10)[:2]
  reference = lambda **options: step_loss._make_reference(make_config(**options))
  np.testing.assert_allclose(reference()(logits, targets), 0.1, atol=1e-7)
  mixing = {f'augment.{option}': True}
  np.testing.assert_array_equal(reference(**mixing)(logits, targets), targets)
  with pytest.raises(UserError, match='wants hard labels'):
    reference(**mixing, **{'attack.objective': 'margin'})


def test_augmentation_does_not_depend_on_the_layout(batch):
  images, targets = inputs_fn(**ALL)(5, batch)
  order = np.random.RandomState(0).permutation(BATCH)
  moved = inputs_fn(**ALL)(5, update.Batch(*(x[order] for x in batch)))
  one = inputs_fn(devices=1, **ALL)(5, batch)
  # The blend of two images may be rounded otherwise in another program.
  for other in (moved, one):
    np.testing.assert_allclose(other[0], images, atol=1e-6)
    np.testing.assert_allclose(other[1], targets, atol=1e-6)
  assert images.min() >= 0 and images.max() <= 1
  assert (np.abs(images - batch.images / 255).max((1, 2, 3)) > 0.1).all()
  assert (np.sort(targets)[:, -2] > 0.01).any()


def test_cutmix_draws_once_for_each_batch_norm_group(batch):
  """As published, where a group was a device's batch: none of it leaves the group."""
  options = {'augment.cutmix': True, 'augment.label_smoothing': 0.0}
  own = batch._replace(labels=np.arange(BATCH, dtype=np.int32) % 10)
  groups = inputs_fn(**options, **{'augment.cutmix_workers': None})(2, own)
  for found, wanted in zip(
    groups, inputs_fn(**options, **{'augment.cutmix_workers': 4})(2, own), strict=True
  ):
    np.testing.assert_array_equal(found, wanted)
  weights = groups[1].reshape(BATCH // GROUP, GROUP, 10)
  for group, part in enumerate(weights):
    members = np.arange(group * GROUP, (group + 1) * GROUP) % 10
    np.testing.assert_allclose(part[:, members].sum(-1), 1, atol=1e-6)


def test_draws_of_old_runs_do_not_move():
  """Against values of the code before there were policies, Cutout and mixup."""
  options = {'augment.pad': 2, 'augment.flip': True, 'augment.cutmix_workers': 2}
  slots = np.arange(8, dtype=np.int32)
  numbers = np.broadcast_to(
    np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1), (8, 8, 8, 1)
  )
  batch = update.Batch(numbers, slots, slots < 0, slots)
  sums = lambda images: np.rint(images * 255).sum((1, 2, 3))
  images, _ = inputs_fn(seed=3, **options)(5, batch)
  np.testing.assert_array_equal(
    sums(images), [1722, 1608, 1848, 1722, 1848, 1813, 1722, 1764]
  )
  options['augment.cutmix'] = True
  images, targets = inputs_fn(seed=3, **options)(5, batch)
  np.testing.assert_array_equal(
    sums(images), [2214, 1556, 1500, 1630, 1992, 1609, 1434, 2112]
  )
  np.testing.assert_array_equal(targets.argsort(-1)[:, -2], [2, 3, 1, 0, 5, 7, 4, 6])
  rngs = parallel.key_per_slot(
    jax.random.fold_in(update._stream(3, 'attack'), 5), slots
  )
  np.testing.assert_array_equal(
    jax.random.key_data(rngs)[:2, 0], np.array([164708462, 3350092283], np.uint32)
  )
