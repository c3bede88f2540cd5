"""Layers of StyleGAN2: weights of unit variance that are scaled where they are used.

So a step of Adam moves all layers alike (Karras et al. 2018). 3x3 convolutions that
halve or double the resolution have the filter [1, 3, 3, 1] in them, which with the nine
shifts of the kernel is one matrix an axis: what is left is a product over channels at
the lower of both resolutions.
"""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.generators import resampling
from jaxrobust.models.convolution import conv2d

_FILTER = np.array([1.0, 3.0, 3.0, 1.0]) / 8
_SLOPE = 0.2
_GAIN = 2**0.5
_EPSILON = 1e-8


def normalise(x: jax.Array) -> jax.Array:
  """Rows [b, n] with a mean square of 1."""
  return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + _EPSILON)


def activate(x: jax.Array) -> jax.Array:
  """Leaky ReLU that keeps the variance."""
  return _GAIN * jax.nn.leaky_relu(x, _SLOPE)


def upsample(images: jax.Array) -> jax.Array:
  """Images at twice the resolution."""
  rows, columns = (
    resampling.matrix(size, 2 * _FILTER, up=2, pads=(2, 1))
    for size in images.shape[1:3]
  )
  return resampling.resample(images, rows, columns)


def downsample(images: jax.Array) -> jax.Array:
  """Images at half the resolution."""
  rows, columns = (
    resampling.matrix(size, _FILTER, down=2, pads=(1, 1)) for size in images.shape[1:3]
  )
  return resampling.resample(images, rows, columns)


def convolve(x: jax.Array, kernel: jax.Array, resize: str = '') -> jax.Array:
  """Correlates with a kernel of 1x1 or 3x3.

  Args:
    x: [b, H, W, C].
    kernel: [k, k, C, O].
    resize: 'up' doubles the resolution before, 'down' halves it after; of 3x3 only.

  Returns:
    [b, H', W', O]; zeros are beyond the edges, of the filter's output for `up`.
  """
  if resize == 'up':
    return _convolve_up(x, kernel)
  if resize == 'down':
    return _convolve_down(x, kernel)
  if len(kernel) == 1:
    return _product(x, kernel[0, 0])
  return conv2d(x, kernel)


def _product(x, matrix):
  """Over channels, as a matrix: XLA on CPU is slow with the gradient of more axes."""
  return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


@functools.cache
def _up_matrix(size):
  """[2 size, size, 3]: pixel and tap of the kernel to pixel."""
  fine = resampling.matrix(size, 2 * _FILTER, up=2, pads=(3, 2))
  return np.stack([fine[tap : tap + 2 * size] for tap in range(3)], -1)


@functools.cache
def _down_matrix(size):
  """[size / 2, 3, size]: pixel to pixel and tap of the kernel."""
  fine = resampling.matrix(size, _FILTER, pads=(2, 2))
  return np.stack([fine[tap : tap + size - 1 : 2] for tap in range(3)], 1)


def _convolve_up(x, kernel):
  rows, columns = (jnp.asarray(_up_matrix(size), x.dtype) for size in x.shape[1:3])
  batch, height, width, channels = x.shape
  matrix = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
  taps = _product(x, matrix).reshape(batch, height, width, 3, 3, -1)
  taps = jnp.einsum('uhi,bhwijo->buwjo', rows, taps)
  return jnp.einsum('vwj,buwjo->buvo', columns, taps)


def _convolve_down(x, kernel):
  rows, columns = (jnp.asarray(_down_matrix(size), x.dtype) for size in x.shape[1:3])
  taps = jnp.einsum('uih,bhwc->buwic', rows, x)
  taps = jnp.einsum('vjw,buwic->buvijc', columns, taps)
  taps = taps.reshape(*taps.shape[:3], -1)
  return _product(taps, kernel.reshape(-1, kernel.shape[-1]))


def _bias(x, features, offset=0.0):
  """Of the type of x."""
  constant = hk.initializers.Constant(offset)
  return hk.get_parameter('b', (features,), x.dtype, init=constant)


class Linear(hk.Module):
  """Linear layer; `multiplier` makes it learn so much faster, `offset` is its bias."""

  def __init__(
    self,
    features: int,
    *,
    multiplier: float = 1.0,
    offset: float = 0.0,
    name: str | None = None,
  ):
    super().__init__(name=name)
    self._features, self._multiplier, self._offset = features, multiplier, offset

  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1], self._features)
    normal = hk.initializers.RandomNormal(1 / self._multiplier)
    weights = hk.get_parameter('w', shape, x.dtype, init=normal)
    bias = _bias(x, self._features, self._offset)
    x = x @ (weights * (self._multiplier / shape[0] ** 0.5))
    return x + (bias * self._multiplier)[None]


class Conv(hk.Module):
  """Convolution, with bias and activation."""

  def __init__(
    self, features: int, size: int, resize: str = '', name: str | None = None
  ):
    super().__init__(name=name)
    self._features, self._size, self._resize = features, size, resize

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = _kernel(x, self._size, self._features)
    kernel = kernel / (self._size * x.shape[-1] ** 0.5)
    bias = _bias(x, self._features)
    return activate(convolve(x, kernel, self._resize) + bias[None, None, None])


class Skip(hk.Module):
  """A 1x1 convolution at half the resolution, without bias."""

  def __init__(self, features: int, name: str | None = None):
    super().__init__(name=name)
    self._features = features

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = _kernel(x, 1, self._features) / x.shape[-1] ** 0.5
    return convolve(downsample(x), kernel)


class StyledConv(hk.Module):
  """Modulated convolution (Karras et al. 2020, section 2.2), noise and activation."""

  def __init__(self, features: int, resize: str = '', name: str | None = None):
    super().__init__(name=name)
    self._features, self._resize = features, resize

  def __call__(
    self, x: jax.Array, style: jax.Array, noise: jax.Array | None
  ) -> jax.Array:
    """Of x [b, H, W, C]; style [b, n]; noise [b, H', W', 1] or None."""
    scales = Linear(x.shape[-1], offset=1.0, name='style')(style)
    kernel = _kernel(x, 3, self._features)
    x = modulated(x, kernel, scales, self._resize)
    strength = hk.get_parameter('noise_strength', (), x.dtype, init=jnp.zeros)
    if noise is not None:
      x = x + strength * noise
    return activate(x + _bias(x, self._features)[None, None, None])


class ToImage(hk.Module):
  """Modulated 1x1 convolution to an image, neither demodulated nor activated."""

  def __init__(self, channels: int, name: str | None = None):
    super().__init__(name=name)
    self._channels = channels

  def __call__(self, x: jax.Array, style: jax.Array) -> jax.Array:
    scales = Linear(x.shape[-1], offset=1.0, name='style')(style) / x.shape[-1] ** 0.5
    kernel = _kernel(x, 1, self._channels)
    x = convolve(x * scales[:, None, None], kernel)
    return x + _bias(x, self._channels)[None, None, None]


def _kernel(x, size, features):
  """For x [b, H, W, C]."""
  shape = (size, size, x.shape[-1], features)
  return hk.get_parameter('w', shape, x.dtype, hk.initializers.RandomNormal(1.0))


def modulated(
  x: jax.Array, kernel: jax.Array, scales: jax.Array, resize: str = ''
) -> jax.Array:
  """Convolution whose kernel is scaled and normalised for each image.

  The scales are those of the input channels and of the output channels, so that one
  convolution of scaled inputs, its outputs scaled, serves all images.

  Args:
    x: [b, H, W, C].
    kernel: [k, k, C, O].
    scales: of the input channels, [b, C].
    resize: as of `convolve`.

  Returns:
    [b, H', W', O], of variance 1 if that of x is 1.
  """
  norms = scales**2 @ jnp.sum(kernel**2, (0, 1))
  x = convolve(x * scales[:, None, None], kernel, resize)
  return x * jax.lax.rsqrt(norms + _EPSILON)[:, None, None]
