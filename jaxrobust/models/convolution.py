"""Convolution with a gradient rule that is fast inside loops on CPU."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv2d(images: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Convolves with 'SAME' padding, as TensorFlow and Haiku pad.

  Args:
    images: [B, H, W, C].
    kernel: [kh, kw, C, O].
    stride: at least 1, of both axes.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), O].
  """
  return lax.conv_general_dilated(
      images, kernel, (stride, stride), 'SAME', dimension_numbers=_LAYOUT)


def _forward(images, kernel, stride):
  return conv2d(images, kernel, stride), (images, kernel)


def _backward(stride, residuals, cotangent):
  images, kernel = residuals
  return (_images_gradient(cotangent, kernel, stride, images.shape),
          _kernel_gradient(images, cotangent, stride, kernel.shape))


conv2d.defvjp(_forward, _backward)


def _low_padding(size, taps, stride):
  """Zeros before the first of `size` pixels in 'SAME' padding."""
  outputs = -(-size // stride)
  return max((outputs - 1) * stride + taps - size, 0) // 2


def _images_gradient(cotangent, kernel, stride, shape):
  """Gradient with respect to images, an ordinary convolution of the cotangent.

  Pixel `stride * m + p` of an axis gets from output `m + d` the tap
  `p + low - stride * d`. So the pixels of phase p are a convolution over d, with
  every stride-th tap in reverse order, and all phases together are one convolution
  with stride² times the channels.
  """
  taps, phases = [], []
  for axis in (0, 1):
    size, low = kernel.shape[axis], _low_padding(
        shape[1 + axis], kernel.shape[axis], stride)
    front = -low % stride
    taps.append((front, -(front + size) % stride))
    after = (low + front) // stride
    count = (sum(taps[-1]) + size) // stride
    pixels = -(-shape[1 + axis] // stride)
    phases.append((count, count - 1 - after, after, pixels))
  (rows, *row_padding, height), (columns, *column_padding, width) = phases
  _, _, channels, features = kernel.shape
  kernel = jnp.pad(kernel, (*taps, (0, 0), (0, 0)))
  kernel = kernel.reshape(rows, stride, columns, stride, channels, features)
  kernel = kernel[::-1, :, ::-1].transpose(0, 2, 5, 1, 3, 4)
  kernel = kernel.reshape(rows, columns, features, stride * stride * channels)
  gradient = lax.conv_general_dilated(
      cotangent, kernel, (1, 1), (row_padding, column_padding),
      dimension_numbers=_LAYOUT)
  gradient = gradient.reshape(-1, height, width, stride, stride, channels)
  gradient = gradient.transpose(0, 1, 3, 2, 4, 5)
  gradient = gradient.reshape(-1, height * stride, width * stride, channels)
  return gradient[:, :shape[1], :shape[2]]


def _kernel_gradient(images, cotangent, stride, shape):
  """Gradient with respect to the kernel."""
  _, vjp = jax.vjp(lambda k: lax.conv_general_dilated(
      images, k, (stride, stride), 'SAME', dimension_numbers=_LAYOUT),
      jnp.zeros(shape, images.dtype))
  return vjp(cotangent)[0]


class Conv2D(hk.Module):
  """`conv2d` without bias; parameter `w` and initialisation are hk.Conv2D's."""

  def __init__(self, output_channels: int, kernel_size: int, stride: int = 1,
               name: str | None = None):
    super().__init__(name=name)
    self._output_channels = output_channels
    self._kernel_size = kernel_size
    self._stride = stride

  def __call__(self, images: jax.Array) -> jax.Array:
    """Convolves images [B, H, W, C] to [B, H / stride, W / stride, O]."""
    size, channels = self._kernel_size, images.shape[-1]
    stddev = (size * size * channels) ** -0.5
    kernel = hk.get_parameter(
        'w', (size, size, channels, self._output_channels), images.dtype,
        init=hk.initializers.TruncatedNormal(stddev))
    return conv2d(images, kernel, self._stride)
