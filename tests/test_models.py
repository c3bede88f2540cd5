"""Networks by name, and BatchNorm groups on one device and over several."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import models
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.models import batch_norm, convolution


def build(name='wrn-10-1', **changes):
  settings = {
    'num_classes': 10,
    'image_shape': (8, 8, 3),
    'activation': 'swish',
    'mean': (0.5, 0.4, 0.3),
    'std': (0.2, 0.3, 0.4),
    'padding': 0,
    'group_size': 8,
  }
  return models.build(name, **(settings | changes))


def wrn_parameters(depth, width, num_classes):
  """Counts by hand: 3x3 kernels, projections, scale and offset of each BatchNorm."""
  blocks, total, before = (depth - 4) // 6, 9 * 3 * 16, 16
  for channels in (16 * width, 32 * width, 64 * width):
    total += before * channels  # projection
    for _ in range(blocks):
      total += 9 * before * channels + 9 * channels * channels
      total += 2 * before + 2 * channels
      before = channels
  return total + 2 * before + before * num_classes + num_classes


@pytest.mark.parametrize('depth, width', [(28, 10), (10, 1), (16, 4)])
def test_wide_resnet_has_its_number_of_parameters(depth, width):
  params, _ = jax.eval_shape(build(f'wrn-{depth}-{width}').init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(params))
  assert count == wrn_parameters(depth, width, 10)
  if (depth, width) == (28, 10):
    assert round(count / 1e6, 2) == 36.48  # as published


def test_preact_resnet_has_its_number_of_parameters():
  params, _ = jax.eval_shape(build('preact-resnet-18').init, jax.random.key(0))
  total, before = 9 * 3 * 64, 64
  for channels in (64, 128, 256, 512):
    if channels != before:
      total += 9 * before * channels  # shortcut
    for _ in range(2):
      total += 9 * before * channels + 9 * channels**2 + 2 * before + 2 * channels
      before = channels
  total += 2 * 512 + 512 * 10 + 10
  assert sum(x.size for x in jax.tree.leaves(params)) == total


def test_names_are_those_of_the_released_files():
  params, net_state = jax.eval_shape(build('wrn-16-1').init, jax.random.key(0))
  shapes = {
    f'{module}/{name}': value.shape
    for module, parameters in params.items()
    for name, value in parameters.items()
  }
  expected = {
    'wide_res_net/~/init_conv/w': (3, 3, 3, 16),
    'wide_res_net/~/batchnorm/scale': (1, 1, 1, 64),
    'wide_res_net/~/batchnorm/offset': (1, 1, 1, 64),
    'wide_res_net/~/logits/w': (64, 10),
    'wide_res_net/~/logits/b': (10,),
  }
  norms, before = ['wide_res_net/~/batchnorm'], 16
  for layer, channels in enumerate((16, 32, 64)):
    for block in (0, 1):
      prefix = f'wide_res_net/~/resnet_lay_{layer}_block_{block}/~/'
      for i in (0, 1):
        norms.append(f'{prefix}batchnorm_{i}')
        shape = (1, 1, 1, before if i == 0 else channels)
        expected[f'{prefix}batchnorm_{i}/scale'] = shape
        expected[f'{prefix}batchnorm_{i}/offset'] = shape
        expected[f'{prefix}conv_{i}/w'] = (
          3,
          3,
          before if i == 0 else channels,
          channels,
        )
      if block == 0:
        expected[f'{prefix}shortcut/w'] = (1, 1, before, channels)
      before = channels
  assert shapes == expected
  assert set(net_state) == {
    f'{norm}/~/{kind}_ema' for norm in norms for kind in ('mean', 'var')
  }
  for statistics in net_state.values():
    assert set(statistics) == {'counter', 'hidden', 'average'}


@pytest.mark.parametrize('name', ('wrn-10-1', 'preact-resnet-18'))
def test_logits_start_at_zero_and_depend_on_images(name):
  model = build(name, activation='relu')
  params, net_state = jax.jit(model.init)(jax.random.key(0))
  images = jax.random.uniform(jax.random.key(1), (8, 8, 8, 3))
  apply = jax.jit(model.apply, static_argnums=3)
  logits, _ = apply(params, net_state, images, True)
  np.testing.assert_array_equal(logits, np.zeros((8, 10)))
  module = next(k for k in params if k.endswith('/logits'))
  params[module]['w'] = jnp.ones_like(params[module]['w'])
  logits, _ = apply(params, net_state, images, True)
  assert np.ptp(logits[:, 0]) > 0


def test_images_are_padded_with_black_then_normalised():
  mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
  model = build(padding=2, image_shape=(4, 4, 3))
  plain = build(mean=(0, 0, 0), std=(1, 1, 1))
  params, net_state = jax.jit(model.init)(jax.random.key(0))
  params['wide_res_net/~/logits']['w'] += 1
  images = np.random.default_rng(0).uniform(size=(8, 4, 4, 3)).astype(np.float32)
  padded = np.zeros((8, 8, 8, 3), np.float32)
  padded[:, 2:6, 2:6] = images
  prepared = (padded - np.array([[[mean]]])) / np.array([[[std]]])
  results = [
    jax.jit(network.apply, static_argnums=3)(params, net_state, x, True)[0]
    for network, x in ((model, images), (plain, prepared.astype(np.float32)))
  ]
  np.testing.assert_allclose(*results, atol=1e-4)


@pytest.mark.parametrize('activation', models.ACTIVATIONS)
def test_activations_exist(activation):
  assert jax.eval_shape(build(activation=activation).init, jax.random.key(0))


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'name': 'wrn-12-1'}, '6 n + 4'),
    ({'name': 'wrn-4-1'}, '6 n + 4'),
    ({'name': 'resnet'}, 'preact-resnet-18'),
    ({'activation': 'swoosh'}, 'swish'),
    ({'mean': (0.5,)}, '3 channels'),
    ({'std': 4 * (1,)}, '3 channels'),
  ],
)
def test_what_does_not_exist_is_refused(changes, words):
  with pytest.raises(UserError, match=words.replace('+', r'\+')):
    build(**changes)


# BatchNorm.


def norm(group_size):
  return hk.without_apply_rng(
    hk.transform_with_state(
      lambda x, batch_stats: batch_norm.BatchNorm(group_size, name='bn')(x, batch_stats)
    )
  )


def batch(size=8, seed=0):
  images = np.random.default_rng(seed).normal(0.5, 2, (size, 4, 4, 3))
  return images.astype(np.float32)


def init_norm():
  _, net_state = norm(None).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), True)
  rng = np.random.default_rng(1)
  params = {
    'bn': {
      name: rng.normal(1, 0.3, (1, 1, 1, 3)).astype(np.float32)
      for name in ('scale', 'offset')
    }
  }
  return params, net_state


@pytest.mark.parametrize('group_size', (1, 2, 4, 8))
def test_each_group_has_its_own_statistics(group_size):
  params, net_state = init_norm()
  steps, means, variances = 3, [], []
  for step in range(steps):
    images = batch(seed=step)
    outputs, net_state = norm(group_size).apply(params, net_state, images, True)
    groups = images.astype(np.float64).reshape(-1, group_size, 4, 4, 3)
    mean, var = groups.mean((1, 2, 3)), groups.var((1, 2, 3))
    means.append(mean.mean(0))
    variances.append(var.mean(0))
    wide = lambda x: x[:, None, None, None]
    expected = (groups - wide(mean)) / np.sqrt(wide(var) + 1e-5)
    expected = expected * params['bn']['scale'] + params['bn']['offset']
    # float32, and E[x²] - E[x]² loses a digit.
    np.testing.assert_allclose(outputs, expected.reshape(images.shape), atol=2e-5)
  weights = 0.99 ** np.arange(steps)[::-1]
  weights /= weights.sum()  # an unbiased moving average
  for name, values in (('mean', means), ('var', variances)):
    statistics = net_state[f'bn/~/{name}_ema']
    assert statistics['counter'] == steps
    np.testing.assert_allclose(
      statistics['average'].ravel(), weights @ np.array(values), rtol=1e-4, atol=1e-5
    )
  images = batch(seed=9)
  outputs, after = norm(None).apply(params, net_state, images, False)
  expected = (images - weights @ np.array(means)) / np.sqrt(
    weights @ np.array(variances) + 1e-5
  )
  expected = expected * params['bn']['scale'] + params['bn']['offset']
  np.testing.assert_allclose(outputs, expected, atol=1e-4)
  jax.tree.map(np.testing.assert_array_equal, after, net_state)


def test_one_group_is_haikus_batch_norm():
  params, net_state = init_norm()
  theirs = hk.without_apply_rng(
    hk.transform_with_state(
      lambda x: hk.BatchNorm(True, True, 0.99, name='bn')(x, is_training=True)
    )
  )
  expected = theirs.apply(params, net_state, batch())
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    norm(8).apply(params, net_state, batch(), True),
    expected,
  )


def test_gradient_is_that_of_float64_differences(float64):
  params, net_state = jax.tree.map(jnp.asarray, init_norm())
  images = batch(4).astype(np.float64)
  params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
  weights = np.random.default_rng(2).normal(size=images.shape)

  @jax.jit
  def f(params, images):
    outputs, _ = norm(2).apply(params, net_state, images, True)
    return jnp.sum(weights * outputs**2)

  gradients = jax.grad(f, (0, 1))(params, images)
  for seed in range(3):
    direction = jax.tree.map(
      lambda x, s=seed: np.random.default_rng(s).normal(size=x.shape), (params, images)
    )
    move = lambda h, d=direction: f(
      *jax.tree.map(lambda x, y: x + h * y, (params, images), d)
    )
    slope = sum(
      jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradients, direction))
    )
    # Central differences of step 1e-4: an error of about 1e-8 of the slope.
    np.testing.assert_allclose(slope, (move(1e-4) - move(-1e-4)) / 2e-4, rtol=1e-5)


@pytest.mark.parametrize('group_size', (1, 2, 4, 8))
def test_groups_do_not_depend_on_devices(float64, group_size):
  """4 devices with 2 images each, against one device with all 8."""
  devices, count = 4, 8
  assert jax.device_count() == devices

  @hk.transform_with_state
  def network(images):
    for i in (0, 1):
      images = convolution.Conv2D(5, 3, name=f'conv_{i}')(images)
      images = batch_norm.BatchNorm(group_size, name=f'bn_{i}')(images, True)
      images = jax.nn.swish(images)
    return hk.Linear(10)(jnp.mean(images, (1, 2)))

  rng = np.random.default_rng(3)
  images, weights = rng.uniform(size=(count, 8, 8, 3)), rng.normal(size=(count, 10))
  params, net_state = jax.jit(network.init)(jax.random.key(0), images)

  def loss(params, images, weights):
    logits, state = network.apply(params, net_state, None, images)
    return jnp.mean(jnp.sum(weights * jax.nn.log_softmax(logits), -1)), (logits, state)

  grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
  (value, (logits, state)), (gradients, image_gradients) = jax.jit(grad)(
    params, images, weights
  )

  def on_a_device(params, images, weights):
    (value, (logits, state)), (gradients, image_gradients) = grad(
      params, images, weights
    )
    # The global loss is the mean over devices, of which images see one.
    return (
      parallel.mean_over_devices((value, gradients, state)),
      logits,
      image_gradients / devices,
    )

  split = lambda x: x.reshape(devices, -1, *x.shape[1:])
  averages, device_logits, device_image_gradients = parallel.pmap(on_a_device)(
    parallel.replicate(params), split(images), split(weights)
  )
  pairs = [
    ((value, gradients, state), jax.tree.map(lambda x: x[0], averages)),
    (logits, device_logits.reshape(logits.shape)),
    (image_gradients, device_image_gradients.reshape(images.shape)),
  ]
  for expected, actual in pairs:
    # Sums in another order, amplified where the variance of a group is small.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(b, a, atol=1e-9 * np.abs(a).max()),
      expected,
      actual,
    )


@pytest.mark.parametrize('group_size', (3, 12, None))
def test_groups_that_do_not_divide_are_refused(group_size):
  params, net_state = init_norm()
  with pytest.raises(UserError, match='group'):
    norm(group_size).apply(params, net_state, batch(), True)


@pytest.mark.parametrize('name', ['wrn-10-1', 'preact-resnet-18'])
def test_features_are_what_the_last_layer_sees(name):
  """The shapes of both networks, and for the small one the logits that follow."""
  model = build(name)
  images = jnp.linspace(0, 1, 4 * 8 * 8 * 3).reshape(4, 8, 8, 3)
  variables = jax.eval_shape(model.init, jax.random.key(0))
  shape = jax.eval_shape(model.features, *variables, images).shape
  assert shape == (4, {'wrn-10-1': 64, 'preact-resnet-18': 512}[name])
  if name == 'wrn-10-1':
    params, state = jax.jit(model.init)(jax.random.key(0))
    layer = next(layer for module, layer in params.items() if 'logits' in module)
    layer['w'] = jnp.arange(640.0).reshape(64, 10) / 640  # They start at zero.
    features = jax.jit(model.features)(params, state, images)
    logits, _ = jax.jit(model.apply, static_argnums=3)(params, state, images, False)
    wanted = np.float64(features) @ np.float64(layer['w']) + np.float64(layer['b'])
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
