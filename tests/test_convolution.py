"""The convolution's own gradient rule, in float64."""

import itertools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxrobust.models import convolution, winograd

SHAPES = ((8, 4), (7, 4), (2, 2), (1, 1))


def plain(images, kernel, stride):
  return lax.conv_general_dilated(
    images, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


@pytest.mark.parametrize('size', (1, 2, 3, 5))
@pytest.mark.parametrize('stride', (1, 2, 3))
def test_value_and_gradients_are_those_of_lax(float64, size, stride):
  compare_with_lax(size, stride, 3, 4)


def test_many_channels_are_convolved_by_winograd(float64):
  # Of SHAPES, (8, 4) takes tiles of 4x4 outputs and (2, 2) those of 2x2.
  assert winograd.suits((2, 8, 4, 64), (3, 3, 64, 72))
  compare_with_lax(3, 1, 64, 72)


@pytest.mark.parametrize('stride', (1, 2))
def test_outside_loops_too(float64, stride):
  compare_with_lax(3, stride, 3, 4, in_loops=False)


def compare_with_lax(size, stride, channels, features, in_loops=True):
  ours = lambda x, k, s: convolution.conv2d(x, k, s, in_loops)

  def value_and_gradients(convolve, images, kernel, cotangent):
    outputs, vjp = jax.vjp(lambda x, k: convolve(x, k, stride), images, kernel)
    return outputs, *vjp(cotangent)

  rng = np.random.default_rng(0)
  for height, width in SHAPES:
    arguments = [
      rng.normal(size=shape)
      for shape in (
        (2, height, width, channels),
        (size, size, channels, features),
        (2, -(-height // stride), -(-width // stride), features),
      )
    ]
    results = jax.jit(
      lambda *args: [value_and_gradients(f, *args) for f in (ours, plain)]
    )(*arguments)
    for found, expected in zip(*results, strict=True):
      # Sums of at most some hundred products of normals: rounding stays near 1e-14.
      np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize('size, stride', itertools.product((1, 3), (1, 2)))
def test_gradients_are_differences(float64, size, stride):
  rng = np.random.default_rng(1)
  images = rng.normal(size=(1, 5, 4, 2))
  kernel = rng.normal(size=(size, size, 2, 3))
  weights = rng.normal(size=plain(images, kernel, stride).shape)
  f = jax.jit(lambda x, k: jnp.sum(weights * convolution.conv2d(x, k, stride)))
  for argnum, array in enumerate((images, kernel)):
    gradient = jax.grad(f, argnum)(images, kernel)
    for index in np.ndindex(array.shape):
      step = np.zeros_like(array)
      step[index] = 0.5
      arguments = [images, kernel]
      arguments[argnum] = array + step
      above = f(*arguments)
      arguments[argnum] = array - step
      # The function is linear in each argument, so that a long step is exact.
      np.testing.assert_allclose(gradient[index], above - f(*arguments), atol=1e-12)


def test_gradient_is_the_same_inside_a_loop():
  rng = np.random.default_rng(2)
  images = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, 3, 8)).astype(np.float32)
  gradient = jax.grad(lambda x: jnp.sum(convolution.conv2d(x, kernel, 2) ** 2))
  step = lambda x: x - 0.01 * gradient(x)
  looped = jax.jit(lambda x: lax.fori_loop(0, 3, lambda _, x: step(x), x))(images)
  np.testing.assert_allclose(
    looped, step(step(step(images))), rtol=1e-4, atol=1e-5
  )  # float32


@pytest.mark.parametrize(
  'width, bound',
  [
    # Outputs of 2x2: it has fewer terms to sum than the direct sum, and larger ones.
    (6, 6e-7),
    # Of 4x4: its transforms multiply by up to 2.8, twice, before and after the sum.
    (8, 1.2e-6),
  ],
)
def test_winograd_is_as_exact_as_it_says(width, bound):
  rng = np.random.default_rng(3)
  images = rng.normal(size=(4, 8, width, 64))
  kernel = rng.normal(size=(3, 3, 64, 64))
  with jax.enable_x64(True):
    exact = np.asarray(plain(images, kernel, 1))
  images, kernel = images.astype(np.float32), kernel.astype(np.float32)
  error = np.asarray(winograd.convolve(images, kernel)) - exact
  assert np.sqrt(np.mean(error**2)) < bound * np.std(exact)


def test_module_is_compatible_with_haiku():
  images = jnp.ones((2, 8, 8, 5))
  ours, theirs = (
    hk.transform(f)
    for f in (
      lambda x: convolution.Conv2D(7, 3, 2, name='c')(x),
      lambda x: hk.Conv2D(7, 3, 2, with_bias=False, name='c')(x),
    )
  )
  params = theirs.init(jax.random.key(0), images)
  jax.tree.map(
    np.testing.assert_array_equal, params, ours.init(jax.random.key(0), images)
  )
  np.testing.assert_allclose(
    ours.apply(params, None, images), theirs.apply(params, None, images), atol=1e-6
  )


def in_a_loop(images, kernel):
  """Three steps up a sum of the outputs, as an attack takes them."""

  def step(_, x):
    held, x = convolution.hold(kernel, x)
    return x + jax.grad(lambda x: jnp.sum(jnp.sin(convolution.conv2d(x, held))))(x)

  return lax.fori_loop(0, 3, step, images)


@pytest.mark.parametrize('features, constraints', [(160, 2), (96, 2), (256, 0)])
def test_a_tpu_gets_features_in_lanes_inside_loops(features, constraints):
  """Both kernels of a loop's body, unless their features fill the lanes anyway."""
  arguments = [
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((2, 4, 4, features), (3, 3, features, features))
  ]
  traced = jax.jit(in_a_loop).trace(*arguments)
  count = lambda platform, what: (
    traced.lower(lowering_platforms=(platform,)).as_text().count(what)
  )
  assert count('tpu', 'LayoutConstraint') == constraints
  # One for each layout, and one that holds the kernel.
  assert count('tpu', 'optimization_barrier') == constraints + (constraints > 0)
  assert not count('cpu', 'LayoutConstraint')
  assert not count('cuda', 'LayoutConstraint')
  assert not count('cuda', 'optimization_barrier')


@pytest.fixture
def as_on_tpu(monkeypatch):
  """Takes the TPU's way, on this machine."""
  choose = lambda *args, tpu=None, default=None, **_: (tpu or default)(*args)
  monkeypatch.setattr(lax, 'platform_dependent', choose)


@pytest.mark.parametrize('stride', (1, 2))
def test_what_a_tpu_computes_is_the_same(float64, stride, as_on_tpu):
  """Layouts change no value."""
  compare_with_lax(3, stride, 3, 4)


def test_what_a_tpu_holds_is_the_same(as_on_tpu):
  """Of a tree of some kernels that are held and some that are not."""
  rng = np.random.default_rng(4)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {
    'held': {'w': array(3, 3, 2, 128)},
    'free': {'w': array(1, 1, 128, 128)},
    'linear': {'b': array(7)},
  }
  images = array(2, 4, 4, 2)
  jax.tree.map(
    np.testing.assert_array_equal, convolution.hold(params, images), (params, images)
  )
  total = lambda both: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(both))
  for argnum in (0, 1):
    held = jax.grad(lambda *both: total(convolution.hold(*both)), argnum)
    plain = jax.grad(lambda *both: total(both), argnum)
    jax.tree.map(
      np.testing.assert_array_equal, held(params, images), plain(params, images)
    )
