"""Layers of the U-Nets of diffusion."""

import math
from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from jaxrobust.models.convolution import conv2d

# Of GroupNorm; 128 channels, the fewest of the published networks, make 32 groups of 4.
MOST_GROUPS, LEAST_CHANNELS = 32, 4
_EPSILON = 1e-6


def sinusoids(times: jax.Array, size: int) -> jax.Array:
  """Sines and cosines of the times, at wavelengths from 2 pi to 20,000 pi.

  Args:
    times: float [B].
    size: even, at least 4.

  Returns:
    [B, size], the sines first.
  """
  half = size // 2
  frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half) / (half - 1))
  angles = times[:, None] * frequencies[None, :]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def dropout(x: jax.Array, share: float, rngs: jax.Array) -> jax.Array:
  """Drops a share of each image's values, by its own key.

  The share is rounded to a multiple of 2**-16: random bits are what dropout costs on
  CPU, and a word of 32 is enough for two values.
  """
  shape = x.shape[1:]
  words = jax.vmap(lambda rng: jax.random.bits(rng, (math.prod(shape) // 2,)))(rngs)
  values = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(x.shape)
  dropped = min(round(share * 2**16), 2**16 - 1)
  return jnp.where(values >= dropped, x / (1 - dropped / 2**16), 0)


class Conv(hk.Module):
  """3x3 convolution with bias, by the package's own gradient rule."""

  def __init__(
    self,
    features: int,
    stride: int = 1,
    scale: float = 1.0,
    in_loops: bool = True,
    name: str | None = None,
  ):
    super().__init__(name=name)
    self._features, self._stride, self._scale = features, stride, scale
    self._in_loops = in_loops

  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (3, 3, x.shape[-1], self._features)
    kernel = hk.get_parameter('w', shape, x.dtype, init=initializer(self._scale))
    bias = hk.get_parameter('b', shape[-1:], x.dtype, init=jnp.zeros)
    x = conv2d(x, kernel, self._stride, self._in_loops)
    return x + bias.reshape(1, 1, 1, -1)


def linear(features: int, name: str, scale: float = 1.0) -> Callable:
  """A matrix product over channels.

  Of a matrix: XLA on CPU is slow with the gradient of a product over more axes.
  """
  linear = hk.Linear(features, w_init=initializer(scale), name=name)
  return lambda x: linear(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


def initializer(scale: float = 1.0) -> hk.initializers.Initializer:
  """The uniform distribution of Glorot and Bengio (2010), its variance times `scale`.

  Deviation: 0 is 0, with which the last layer of each residual part of the U-Net of Ho
  et al. starts; theirs starts at 1e-10 times the usual scale, to keep one formula.
  """
  if not scale:
    return jnp.zeros
  return hk.initializers.VarianceScaling(scale, 'fan_avg', 'uniform')


class GroupNorm(hk.Module):
  """GroupNorm with 32 groups, or fewer so that each has at least 4 channels.

  A group of a single channel would take out what the embedding adds to it: such a
  network does not know the time. Parameters and values are hk.GroupNorm's, which takes
  2 to 3.5 times as long on CPU with its gradient: it sums over axes that are apart.
  """

  def __init__(self, name: str, groups: int | None = None):
    super().__init__(name=name)
    self._groups = groups

  def __call__(self, inputs: jax.Array) -> jax.Array:
    batch, height, width, channels = inputs.shape
    scale = hk.get_parameter('scale', (channels,), inputs.dtype, init=jnp.ones)
    offset = hk.get_parameter('offset', (channels,), inputs.dtype, init=jnp.zeros)
    groups = self._groups or math.gcd(MOST_GROUPS, channels // LEAST_CHANNELS)

    def mean(x):
      """Of the pixels [B, H * W, C] of each group, for each of its channels [B, C]."""
      means = jnp.mean(jnp.mean(x, 1).reshape(batch, groups, -1), -1)
      return jnp.repeat(means, channels // groups, 1)

    x = inputs.reshape(batch, height * width, channels)
    x -= mean(x)[:, None]
    factor = jax.lax.rsqrt(mean(x * x) + _EPSILON) * scale[None]
    return (x * factor[:, None] + offset[None, None]).reshape(inputs.shape)
