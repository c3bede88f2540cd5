"""Layers of BigGAN: spectral normalisation, and BatchNorm that a class scales.

Sources: Miyato et al. 2018, "Spectral normalization for generative adversarial
networks"; Brock et al. 2019, "Large scale GAN training for high fidelity natural image
synthesis", with the state that their PyTorch code keeps: weights as they are before
normalisation, and for each of them a vector `u` of its power iteration.
"""

from collections.abc import Callable
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from jaxrobust.distributed import parallel
from jaxrobust.models import batch_norm
from jaxrobust.models.convolution import conv2d

_EPSILON = 1e-5  # of BatchNorm


def _orthogonal(shape, dtype):
  return jax.nn.initializers.orthogonal()(hk.next_rng_key(), shape, dtype)


INITIALIZERS = {
  'normal': hk.initializers.RandomNormal(0.02),
  'orthogonal': _orthogonal,
}


class Mode(NamedTuple):
  """What the layers of a call have in common.

  Attributes:
    init: of weights and embeddings.
    epsilon: least norm by which the power iteration divides.
    moves: whether the call moves the state.
    momentum: with which statistics of the batch enter the running ones of BatchNorm,
      of a call that moves the state; any other normalises by the running ones.
    group: consecutive images of the global batch that share such statistics.
  """

  init: Callable
  epsilon: float
  moves: bool
  momentum: float = 0.0
  group: int = 1


def spectral_norm(
  matrix: jax.Array, u: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
  """One power iteration.

  Args:
    matrix: [n, O].
    u: [O], near the right singular vector of the largest singular value, by up to a
      factor.
    epsilon: least norm by which is divided.

  Returns:
    (singular value, of which the gradient flows to the matrix only; u of norm 1).
  """
  product = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x), epsilon)
  fixed = jax.lax.stop_gradient(matrix)
  v = unit(product(fixed, u))
  u = unit(product(v, fixed))
  return product(product(v, matrix), u), u


def _normalised(weights, mode, transposed=False):
  """Weights [..., O] ([O, n] if transposed) by their spectral norm."""
  matrix = weights.T if transposed else weights.reshape(-1, weights.shape[-1])
  normal = hk.initializers.RandomNormal()
  u = hk.get_state('u', matrix.shape[1:], weights.dtype, init=normal)
  value, u = spectral_norm(matrix, u, mode.epsilon)
  if mode.moves:
    hk.set_state('u', u)
  return weights / value


def _bias(features, fan_in, dtype):
  """As PyTorch begins; the initialisation of a network leaves it."""
  uniform = hk.initializers.RandomUniform(-(fan_in**-0.5), fan_in**-0.5)
  return hk.get_parameter('b', (features,), dtype, init=uniform)


class Linear(hk.Module):
  """Linear layer with spectral normalisation."""

  def __init__(
    self, features: int, mode: Mode, bias: bool = True, name: str | None = None
  ):
    super().__init__(name=name)
    self._features, self._mode, self._bias = features, mode, bias

  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1], self._features)
    weights = hk.get_parameter('w', shape, x.dtype, init=self._mode.init)
    x = x @ _normalised(weights, self._mode)
    return x + _bias(*shape[::-1], x.dtype)[None] if self._bias else x


class Conv(hk.Module):
  """Convolution with spectral normalisation, stride 1; 1x1 is a matrix product."""

  def __init__(
    self,
    features: int,
    size: int,
    mode: Mode,
    bias: bool = True,
    name: str | None = None,
  ):
    super().__init__(name=name)
    self._features, self._size, self._mode = features, size, mode
    self._bias = bias

  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self._size, self._size, x.shape[-1], self._features)
    kernel = hk.get_parameter('w', shape, x.dtype, init=self._mode.init)
    fan_in = self._size**2 * x.shape[-1]
    kernel = _normalised(kernel, self._mode)
    if self._size == 1:
      # Of a matrix: XLA on CPU is slow with the gradient of a product over more axes.
      rows = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
      x = rows.reshape(*x.shape[:-1], self._features)
    else:
      x = conv2d(x, kernel, in_loops=False)  # Steps do not loop.
    if not self._bias:
      return x
    return x + _bias(self._features, fan_in, x.dtype)[None, None, None]


class Embedding(hk.Module):
  """A row of a table for each class, perhaps with spectral normalisation."""

  def __init__(
    self,
    num_classes: int,
    size: int,
    mode: Mode,
    normalised: bool = False,
    name: str | None = None,
  ):
    super().__init__(name=name)
    self._shape, self._mode, self._normalised = (num_classes, size), mode, normalised

  def __call__(self, classes: jax.Array, dtype: jnp.dtype) -> jax.Array:
    table = hk.get_parameter('table', self._shape, dtype, init=self._mode.init)
    if self._normalised:
      table = _normalised(table, self._mode, transposed=True)
    return table[classes]


class BatchNorm(hk.Module):
  """BatchNorm, whose gain and bias may be made of something else.

  Deviation: the running statistics move by the mean over all groups; by PyTorch's
  parallel module they move by those of the first device.
  """

  def __init__(self, mode: Mode, name: str | None = None):
    super().__init__(name=name)
    self._mode = mode

  def __call__(
    self, x: jax.Array, gain: jax.Array | None = None, bias: jax.Array | None = None
  ) -> jax.Array:
    """Normalises x [b, H, W, C]; gain and bias are each image's [b, C], or learned."""
    shape = x.shape[-1:]
    if gain is None:
      gain = hk.get_parameter('gain', shape, x.dtype, init=jnp.ones)[None]
      bias = hk.get_parameter('bias', shape, x.dtype, init=jnp.zeros)[None]
    mean = hk.get_state('mean', shape, x.dtype, init=jnp.zeros)
    var = hk.get_state('var', shape, x.dtype, init=jnp.ones)
    if self._mode.moves:
      mean, var = self._statistics(x, mean, var)
    else:
      mean, var = mean[None], var[None]
    slope = gain * jax.lax.rsqrt(var + _EPSILON)
    return x * slope[:, None, None] + (bias - mean * slope)[:, None, None]

  def _statistics(self, x, running_mean, running_var):
    """Those of each image's group [b, C]; moves the running ones."""
    # One image initialises a network of any group.
    groups, devices = (
      (1, 1) if hk.running_init() else batch_norm.layout(len(x), self._mode.group)
    )
    grouped = x.reshape(groups, -1, x.shape[-1])
    average = lambda x: jnp.mean(x, 1)
    if devices > 1:
      average = lambda x: parallel.mean_in_group(jnp.mean(x, 1), devices)
    mean = average(grouped)
    var = average((grouped - mean[:, None]) ** 2)
    count = grouped.shape[1] * devices
    unbiased = var * (count / max(count - 1, 1))
    for name, old, new in (
      ('mean', running_mean, mean),
      ('var', running_var, unbiased),
    ):
      hk.set_state(name, old + self._mode.momentum * (jnp.mean(new, 0) - old))
    return tuple(jnp.repeat(each, len(x) // groups, 0) for each in (mean, var))


class Attention(hk.Module):
  """Self-attention of maps (Zhang et al. 2019), which at first changes nothing."""

  def __init__(self, mode: Mode, name: str | None = None):
    super().__init__(name=name)
    self._mode = mode

  def __call__(self, x: jax.Array) -> jax.Array:
    batch, _, _, channels = x.shape
    conv = lambda features, name: Conv(features, 1, self._mode, bias=False, name=name)
    rows = lambda x: x.reshape(batch, -1, x.shape[-1])
    queries = rows(conv(channels // 8, 'theta')(x))
    keys = rows(_greatest(conv(channels // 8, 'phi')(x)))
    values = rows(_greatest(conv(channels // 2, 'g')(x)))
    weights = jax.nn.softmax(jnp.einsum('bqc,bkc->bqk', queries, keys), -1)
    found = jnp.einsum('bqk,bkc->bqc', weights, values)
    found = conv(channels, 'o')(found.reshape(*x.shape[:-1], -1))
    return x + hk.get_parameter('gamma', (), x.dtype, init=jnp.zeros) * found


def _blocks(x):
  """Of 2x2 pixels: [b, H / 2, 2, W / 2, 2, C]."""
  batch, height, width, channels = x.shape
  return x.reshape(batch, height // 2, 2, width // 2, 2, channels)


def _greatest(x):
  return jnp.max(_blocks(x), (2, 4))


def downsample(x: jax.Array) -> jax.Array:
  """Means of 2x2 pixels."""
  return jnp.mean(_blocks(x), (2, 4))


def upsample(x: jax.Array) -> jax.Array:
  """Each pixel as 2x2."""
  batch, height, width, channels = x.shape
  shape = (batch, height, 2, width, 2, channels)
  return jnp.broadcast_to(x[:, :, None, :, None], shape).reshape(
    batch, 2 * height, 2 * width, channels
  )
