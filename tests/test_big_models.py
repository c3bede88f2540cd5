"""Accumulation, rematerialisation and bfloat16: what they may change, and what not."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import digits
from jaxrobust import config as configs
from jaxrobust import models
from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.training import optimizer, update

GROUP, BATCH, DEVICES = 4, 16, 2


def make_config(**overrides):
  """A small run with all that a part of the batch could get wrong."""
  config = digits.get_config('wrn-10-1').unlock()
  config.update_from_flattened_dict(
    {
      'data.batch_size': BATCH,
      'model.batch_norm_group': GROUP,
      'augment.pad': 1,
      'augment.cutmix': True,
      'attack.num_steps': 2,
      'ema.batch_norm': 'own',
      'optimizer.warmup_epochs': 0.0,
      # A step small enough that rounding does not grow from one update to the next.
      'optimizer.learning_rate': 0.01,
    }
    | overrides
  )
  return config


@functools.cache
def model_of(**overrides):
  return models.from_config(make_config(**overrides).model, dataset_info.INFO['digits'])


@functools.cache
def variables():
  """Parameters with a last layer that is not zero, and statistics."""
  params, net_state = jax.jit(model_of().init)(jax.random.key(0))
  last = next(k for k in params if k.endswith('logits'))
  rng = np.random.RandomState(1)
  params[last] = {
    k: jnp.float32(0.3 * rng.normal(size=v.shape)) for k, v in params[last].items()
  }
  return params, net_state


@functools.cache
def lowered(**overrides):
  """The step on two devices, with its arguments."""
  config = make_config(**overrides)
  sgd = optimizer.make(config.optimizer, configs.resolve(config))
  params, net_state = variables()
  state = update.TrainState(
    params, net_state, sgd.init(params), params, net_state, jnp.int32(0)
  )
  real = datasets.load('digits', 'train')
  batch = update.Batch(
    real.images[:BATCH],
    real.labels[:BATCH],
    np.arange(BATCH) % 3 == 0,
    np.arange(BATCH, dtype=np.int32),
  )
  copies = lambda x: jnp.broadcast_to(x, (DEVICES, *jnp.shape(x)))
  shards = lambda x: jnp.reshape(x, (DEVICES, -1, *x.shape[1:]))
  arguments = jax.tree.map(copies, state), jax.tree.map(shards, batch)
  step = update.make_step(config, model_of(**overrides), sgd, 10)
  mapped = jax.pmap(step, axis_name=parallel.AXIS, devices=jax.devices()[:DEVICES])
  return mapped.lower(*arguments), arguments


@functools.cache
def compiled(**overrides):
  return lowered(**overrides)[0].compile()


@functools.cache
def two_steps(**overrides):
  """State after two updates, and the metrics of both."""
  state, batch = lowered(**overrides)[1]
  found = []
  for _ in range(2):
    state, metrics = compiled(**overrides)(state, batch)
    found.append(jax.tree.map(lambda x: np.asarray(x[0]), metrics))
  return jax.tree.map(lambda x: np.asarray(x[0]), state), found


def assert_same(found, wanted, rtol, atol):
  for (path, x), y in zip(
    jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True
  ):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(x, y, rtol, atol, err_msg=jax.tree_util.keystr(path))


IN_PARTS = {'training.accumulation': 2}
REMAT = {'model.remat': True}
HALF = {'model.compute_dtype': 'bfloat16'}


@pytest.mark.parametrize('overrides', [IN_PARTS, REMAT], ids=['parts', 'remat'])
def test_the_update_is_that_of_the_whole_batch(overrides):
  """Parameters, momentum, averages, both sets of statistics, metrics; CutMix too."""
  # Sums in another order: some 1e-7 a number, and of gradients that nearly cancel
  # more. A group, key, weight or counter gone wrong changes 1e-3 and more.
  assert_same(two_steps(**overrides), two_steps(), rtol=1e-5, atol=2e-6)


def test_a_part_needs_less_memory_than_the_batch():
  memory = lambda **x: compiled(**x).memory_analysis().temp_size_in_bytes
  # Half of the activations; what is left of a small network is its parameters.
  assert memory(**IN_PARTS) < 0.9 * memory()


def residuals(wrt_params, **overrides):
  """What a gradient of the logits keeps of the forward pass."""
  params, net_state = variables()
  images = jnp.zeros((BATCH, 8, 8, 1))
  logits_of = lambda p, x: model_of(**overrides).apply(
    p, net_state, x, batch_stats=True
  )[0]
  at = (params, images) if wrt_params else (images,)
  fn = logits_of if wrt_params else functools.partial(logits_of, params)
  kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(fn, *a)[1], *at))
  return [x for x in kept if len(x.shape) >= 4 and x.shape[0] in (BATCH, 4)]


@pytest.mark.parametrize('wrt_params', [True, False], ids=['training', 'attack'])
def test_remat_keeps_the_inputs_of_blocks_only(wrt_params):
  numbers = lambda **x: sum(np.prod(r.shape) for r in residuals(wrt_params, **x))
  assert numbers(**REMAT) < 0.5 * numbers()


def test_bfloat16_stays_in_the_convolutions():
  after, metrics = two_steps(**HALF)
  # The same types everywhere, which are float32 and counters.
  for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(two_steps()[0]), strict=True):
    assert x.dtype == y.dtype != jnp.bfloat16
  wanted = two_steps()[1]
  for step in (0, 1):
    loss, exact = metrics[step]['train/loss'], wanted[step]['train/loss']
    assert loss.dtype == np.float32
    # 2^-9 a rounding, in each of seven convolutions of a way through the network.
    np.testing.assert_allclose(loss, exact, rtol=7 * 2**-9)
    assert loss != exact
  params, net_state = variables()
  images = jax.random.uniform(jax.random.key(1), (BATCH, 8, 8, 1))
  apply = lambda model, batch_stats: jax.jit(
    lambda x: model.apply(params, net_state, x, batch_stats=batch_stats)
  )
  program = apply(model_of(**HALF), True).lower(images)
  logits, state = program.out_info
  assert {x.dtype for x in jax.tree.leaves((logits, state))} == {
    jnp.dtype('float32'),
    jnp.dtype('int32'),
  }
  convolutions = [x for x in program.as_text().splitlines() if 'convolution(' in x]
  assert convolutions and all('xbf16>' in x for x in convolutions)
  assert {x.dtype for x in residuals(True, **HALF)} >= {jnp.dtype('bfloat16')}


def test_inference_is_float32_whatever_training_is():
  params, net_state = variables()
  text = lambda model: (
    jax.jit(lambda x: model.apply(params, net_state, x, batch_stats=False)[0])
    .lower(jnp.zeros((2, 8, 8, 1)))
    .as_text()
  )
  assert text(model_of(**HALF)) == text(model_of())


def test_the_published_step_has_nothing_of_all_this():
  default = lowered()[0].as_text()
  assert 'bf16' not in default
  params, net_state = variables()
  traced = lambda **x: str(
    jax.make_jaxpr(
      lambda images: model_of(**x).apply(params, net_state, images, batch_stats=True)
    )(jnp.zeros((BATCH, 8, 8, 1)))
  )
  assert 'remat2[' not in traced() and 'remat2[' in traced(**REMAT)
  # Winograd's convolution has some on CPU, and remat its own.
  barriers = lambda text: text.count('stablehlo.optimization_barrier')
  loops = lambda text: text.count('stablehlo.while')
  assert loops(lowered(**IN_PARTS)[0].as_text()) > loops(default)
  assert barriers(lowered(**REMAT)[0].as_text()) > barriers(default)
  assert 'bf16' in lowered(**HALF)[0].as_text()


@pytest.mark.parametrize(
  'field, value, words',
  [
    ('training.accumulation', 3, 'would cut one of the 4 BatchNorm groups of 4'),
    ('training.accumulation', 0, 'above 0'),
    ('model.compute_dtype', 'float16', 'float32, bfloat16'),
  ],
)
def test_refuses(field, value, words):
  with pytest.raises(UserError, match=words):
    configs.resolve(make_config(**{field: value}))


def test_refuses_parts_that_the_devices_batch_does_not_have():
  update.check_parts(8, 2, GROUP)
  with pytest.raises(UserError, match='device batch of 8: use a divisor of 2'):
    update.check_parts(8, 4, GROUP)
  with pytest.raises(UserError, match='fewer devices'):  # A group spans two devices.
    update.check_parts(8, 2, 16)


def test_memory_is_no_identity_of_a_run_but_number_types_are():
  other = make_config(**IN_PARTS, **REMAT, **HALF)
  assert configs.differences(make_config(), other) == [
    'model.compute_dtype: float32 → bfloat16'
  ]


def test_configs_from_before_these_fields_mean_the_default():
  tree = json.loads(configs.to_json(make_config()))
  for part, field in (
    ('model', 'remat'),
    ('model', 'compute_dtype'),
    ('training', 'accumulation'),
  ):
    del tree[part][field]
  again = configs.from_json(json.dumps(tree))
  configs.resolve(again)
  assert not configs.differences(make_config(), again, ignore=())
