"""The U-Net: Ho et al.'s parameter count, shapes, conditions, and dropout by image."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base_generator
from jaxrobust.config import dataset_info
from jaxrobust.generators import ddpm, layers, unet


def count(tree):
  return sum(np.prod(x.shape) for x in jax.tree.leaves(tree))


def inputs_of(info):
  """Shapes of what the network of a data set is given, a batch of 2."""
  return (
    jax.ShapeDtypeStruct((2, *info.image_shape), jnp.float32),
    jax.ShapeDtypeStruct((2,), jnp.float32),
    jax.ShapeDtypeStruct((2,), jnp.int32),
  )


def parameters_of(settings, info):
  """Shapes of a network's parameters, without computing anything."""
  network = ddpm.make_network(settings, info)
  return jax.eval_shape(network.init, jax.random.key(0), *inputs_of(info))


def test_parameters_of_the_cifar10_network():
  settings = base_generator.get_config('ddpm').generator
  params = parameters_of(settings, dataset_info.INFO['cifar10'])
  assert count(params) == 35_746_307  # "35.7M" in their code and table
  settings.network.conditional = True
  params = parameters_of(settings, dataset_info.INFO['cifar10'])
  assert count(params) == 35_746_307 + 11 * 512  # ten classes and none


@pytest.mark.parametrize(
  'name, multipliers, conditional',
  [
    ('digits', (1, 2, 2), False),
    ('mnist', (1, 2, 2), True),
    ('tiny_imagenet', (1, 1, 2, 2, 2), True),
  ],
)
def test_sizes_from_8_to_64(name, multipliers, conditional):
  settings = base_generator.get_config('ddpm').generator
  settings.network.multipliers = multipliers
  settings.network.conditional = conditional
  info = dataset_info.INFO[name]
  params = parameters_of(settings, info)
  apply = ddpm.make_network(settings, info).apply
  output = jax.eval_shape(apply, params, *inputs_of(info))
  assert output.shape == (2, *info.image_shape)
  # Attention where the map has 16 rows, besides the middle: on 64x64 two halvings down.
  attended = {x.split('/')[1] for x in params if 'attention' in x}
  down = {'down_2_attention_0', 'down_2_attention_1'} if name != 'digits' else set()
  assert {x for x in attended if x.startswith('down')} == (
    down if name == 'tiny_imagenet' else set()
  )


def test_sinusoids_by_hand():
  found = layers.sinusoids(jnp.array([0.0, 3.0]), 6)
  angles = 3 * np.array([1, 1e-2, 1e-4])
  expected = [[0, 0, 0, 1, 1, 1], [*np.sin(angles), *np.cos(angles)]]
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_group_norm_is_haikus():
  rng = np.random.RandomState(0)
  images = np.float32(rng.normal(5, 1, (2, 4, 2, 32)))
  params = {'norm': {n: np.float32(rng.normal(size=32)) for n in ('scale', 'offset')}}

  def value_and_gradients(module):
    apply = hk.without_apply_rng(hk.transform(lambda x: module()(x))).apply
    value = lambda *x: jnp.sum(apply(*x) ** 3)
    return jax.jit(jax.value_and_grad(value, (0, 1)))(params, images)

  found = value_and_gradients(lambda: layers.GroupNorm('norm'))
  # 32 channels make gcd(32, 32 / 4) = 8 groups of 4.
  expected = value_and_gradients(lambda: hk.GroupNorm(8, eps=1e-6, name='norm'))
  for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    # Sums of some hundred float32 values up to about 100.
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_dropout_drops_its_share_and_keeps_the_mean():
  keys = jax.random.split(jax.random.key(0), 4)
  found = np.asarray(layers.dropout(jnp.ones((4, 8, 8, 32)), 0.3, keys))
  assert set(np.unique(found)) == {0, np.float32(1 / (1 - 19661 / 2**16))}
  dropped = (found == 0).reshape(-1, 2)  # two values a word of random bits
  # 8,192 values, 4,096 words: within 5 standard deviations.
  np.testing.assert_allclose(dropped.mean(), 0.3, atol=5 * (0.21 / 8192) ** 0.5)
  both = 5 * (0.09 * 0.91 / 4096) ** 0.5
  np.testing.assert_allclose(dropped.all(1).mean(), 0.09, atol=both)


@pytest.fixture(scope='module')
def tiny():
  """A network with attention at its second size, its parameters random, as inputs."""
  network = hk.without_apply_rng(
    hk.transform(lambda *x: unet.UNet(8, (1, 2), 1, (4,), 0.5, num_classes=3)(*x))
  )
  rng = np.random.RandomState(0)
  inputs = (
    np.float32(rng.normal(size=(4, 8, 8, 1))),
    np.float32([0.0, 5.5, 5.5, 900.0]),
    np.array([0, 1, 2, 3]),
    jax.random.split(jax.random.key(1), 4),
  )
  shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
  # Not those of initialisation, whose zeros hide everything before the last layer.
  params = jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), shapes)
  apply = jax.jit(network.apply)
  return lambda *x: np.asarray(apply(params, *x)), inputs


def test_image_time_class_and_dropout_matter_for_their_image_only(tiny):
  apply, inputs = tiny
  plain = apply(*inputs)
  for index, value in enumerate(
    (inputs[0][1] / 2, 6.0, 3, jax.random.key(2)),
  ):
    changed = list(inputs)
    if index == 3:
      changed[3] = changed[3].at[1].set(value)
    else:
      changed[index] = changed[index].copy()
      changed[index][1] = value
    differs = np.abs(apply(*changed) - plain).max((1, 2, 3)) / np.abs(plain).max()
    assert differs[1] > 1e-3, index
    assert differs[[0, 2, 3]].max() == 0


def test_the_place_in_the_batch_does_not_matter(tiny):
  apply, inputs = tiny
  order = np.array([2, 0, 3, 1])
  plain = apply(*inputs)
  # But for the order of sums.
  np.testing.assert_allclose(
    apply(*(x[order] for x in inputs)), plain[order], atol=1e-5 * np.abs(plain).max()
  )
