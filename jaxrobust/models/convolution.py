"""Convolution that is fast on CPU and TPU in both directions, inside loops too.

XLA on CPU has a fast convolution for the ordinary layout (NHWC, HWIO, not dilated)
and a naive one for the rest, which is what its own gradient rule asks for; inside the
body of a loop, as in PGD, that costs the gradient of the images 10 times the forward
pass. So on CPU, and there only, gradients are written as ordinary convolutions and
matrix products. Milliseconds measured on one core of an AMD EPYC with AVX-512,
float32, all inside a loop:

  batch, map, channels      forward  image gradient  kernel gradient
                            XLA ours       XLA ours         XLA ours
  32, 32x32, 64 → 64         13    9       121    9       3,163   30
  32, 16x16, 128 → 128       12    6       124    7       2,612   17
  64, 8x8, 256 → 256         27    8       261   15       7,127   27

and on two cores of an Intel Xeon with AVX-512:

  32, 32x32, 64 → 128 by 2   11   12        27   12      2,467   12
  32, 32x32, 64 → 128 1x1,2   3    2         4    1        202    2

A product of matrices takes all cores where XLA keeps a 1x1 convolution to one: 64 maps
of 32x32, 16 → 64 channels, take 0.6 ms in place of 1.7.

What was tried and lost: patches and one product (forward 0.3 to 0.6 times XLA's
speed); stride 2 as a stride-1 convolution of the cotangent with zeros between its
pixels (57 ms in place of 17) or with the zero taps of all phases (30 ms); the kernel
gradient as a convolution with the cotangent for a kernel (as XLA's), or through
Winograd (23 and 39 ms with 128 and 256 channels, but 74 with 64); half of the batch, or
of the outputs, beside the other half, which XLA computes one after the other. Eigen,
which XLA has too, would use all cores where XLA's choice keeps to one; see
docs/benchmarks.md.

XLA on TPU chooses the layout of a kernel by its channels: where it has no more outputs
than inputs, the inputs lie side by side in the lanes of a vector. Products of 160
channels are then padded to 256; with the outputs in the lanes, they are not. So on TPU,
and there only, kernels are laid out with the outputs in the lanes, and for the gradient
of the images, where inputs and outputs change places, with the inputs there; see
`hold`. By the compiler's schedule for v5e, 128 images, bfloat16, forward, inside a
loop, in thousands of cycles:

  map, channels     inputs in lanes  outputs in lanes
  32x32, 160 → 160              753               507
  32x32, 160 →  16              153               105
  32x32,  64 →  64              158                94
  16x16, 320 → 320              564               482
    8x8, 640 → 640              469               469
"""

import functools
import itertools
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jaxrobust.models import winograd
from jaxrobust.models.block import parameter_dtype

_LANES = 128  # Of a TPU's vectors.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(
  images: jax.Array, kernel: jax.Array, stride: int = 1, in_loops: bool = True
) -> jax.Array:
  """Convolves with 'SAME' padding, as TensorFlow and Haiku pad.

  Differentiable in reverse mode only.

  Args:
    images: [B, H, W, C].
    kernel: [kh, kw, C, O].
    stride: at least 1, of both axes.
    in_loops: whether it is called inside a loop, where all that is below pays on CPU.
      Outside, XLA's own convolution, but of 1x1, and gradient of the kernel suit small
      U-Nets better: a step of experiments/digits_ddpm.py takes 99 ms of processor time
      so, 105 with Winograd's products and 136 with the kernel's gradient below (medians
      of 7 interleaved rounds).

  Returns:
    [B, ceil(H / stride), ceil(W / stride), O].
  """
  convolve = lambda x, k: _convolve(x, k, stride, 'SAME')
  return jax.lax.platform_dependent(
    images,
    kernel,
    cpu=lambda x, k: _convolve_on_cpu(x, k, stride, in_loops),
    tpu=lambda x, k: convolve(x, _in_lanes(k)),
    default=convolve,
  )


def _forward(images, kernel, stride, in_loops):
  return conv2d(images, kernel, stride, in_loops), (images, kernel)


def _backward(stride, in_loops, residuals, cotangent):
  images, kernel = residuals
  gradient = lambda fn, *primals: jax.vjp(fn, *primals)[1](cotangent)
  convolve = lambda x, k: _convolve(x, k, stride, 'SAME')
  ordinary = lambda: gradient(convolve, images, kernel)
  turned = lambda k: k.swapaxes(2, 3)
  on_tpu = lambda: (
    *gradient(lambda x: convolve(x, turned(_in_lanes(turned(kernel)))), images),
    *gradient(lambda k: convolve(images, k), kernel),
  )
  on_cpu = lambda: (
    _images_gradient(cotangent, kernel, stride, images.shape, in_loops),
    _kernel_gradient(images, cotangent, kernel.shape, stride)
    if in_loops
    else ordinary()[1],
  )
  return jax.lax.platform_dependent(cpu=on_cpu, tpu=on_tpu, default=ordinary)


conv2d.defvjp(_forward, _backward)


@jax.custom_jvp
def hold(params: Any, images: jax.Array) -> tuple[Any, jax.Array]:
  """Parameters and images as they are, but on TPU kernels depend on the images.

  What depends on parameters alone leaves a loop, such as PGD's, before the compiler
  chooses layouts, and the layout that `conv2d` asks for is lost then. Kernels for which
  it asks for none may leave the loop as before.

  Args:
    params: tree of arrays.
    images: what changes from one turn of the loop to the next. They are in memory by
      then, so that holding them costs no copy.

  Returns:
    Both. Their gradients are not held.
  """
  return jax.lax.platform_dependent(
    params,
    images,
    tpu=_hold_on_tpu,
    default=lambda *both: both,
  )


@functools.partial(hold.defjvp, symbolic_zeros=True)
def _tangents_are_not_held(both, tangents):
  return hold(*both), tangents


def _hold_on_tpu(params, images):
  leaves, structure = jax.tree.flatten(params)
  held = [i for i, leaf in enumerate(leaves) if _pads_lanes(leaf)]
  if not held:
    return params, images
  kernels, images = jax.lax.optimization_barrier(([leaves[i] for i in held], images))
  for i, kernel in zip(held, kernels, strict=True):
    leaves[i] = kernel
  return jax.tree.unflatten(structure, leaves), images


def _pads_lanes(kernel):
  return kernel.ndim == 4 and any(n % _LANES for n in kernel.shape[2:])


def _in_lanes(kernel):
  """A kernel on TPU, with its last axis side by side in the lanes of a vector."""
  if not _pads_lanes(kernel):
    return kernel  # The convolution is no faster then, and a copy takes time.
  kernel = with_layout_constraint(
    jnp.asarray(kernel), Layout(tuple(range(kernel.ndim)))
  )
  # Or the compiler drops the copy again, since its convolutions take any layout.
  return jax.lax.optimization_barrier(kernel)


def _convolve(images, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    images,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def _convolve_on_cpu(images, kernel, stride, in_loops):
  """With 'SAME' padding."""
  if kernel.shape[:2] == (1, 1):
    return jnp.tensordot(images[:, ::stride, ::stride], kernel[0, 0], 1)
  # Sums of taps and of pixels would lose what half precision has.
  single = images.dtype.itemsize >= 4
  suits = stride == 1 and winograd.suits(images.shape, kernel.shape)
  if in_loops and single and suits:
    return winograd.convolve(images, kernel)
  return _convolve(images, kernel, stride, 'SAME')


def _low_padding(size, taps, stride):
  """Zeros before the first of `size` pixels in 'SAME' padding."""
  outputs = -(-size // stride)
  return max((outputs - 1) * stride + taps - size, 0) // 2


def _images_gradient(cotangent, kernel, stride, shape, in_loops):
  """Gradient with respect to images, as ordinary convolutions of the cotangent.

  Along an axis, pixel `stride * m + p` gets from output `m + d` the tap
  `p + low - stride * d`: each phase p is a convolution of the cotangent with every
  stride-th tap, in reverse order.
  """
  if stride == 1 and all(n % 2 for n in kernel.shape[:2]):
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return _convolve_on_cpu(cotangent, turned, 1, in_loops)
  batch, outputs, channels = len(cotangent), cotangent.shape[1:3], shape[-1]
  lows = [_low_padding(shape[1 + i], kernel.shape[i], stride) for i in (0, 1)]
  phases = []
  for phase in itertools.product(range(stride), repeat=2):
    shifts = [(p + low) // stride for p, low in zip(phase, lows, strict=True)]
    first = [(p + low) % stride for p, low in zip(phase, lows, strict=True)]
    taps = kernel[first[0] :: stride, first[1] :: stride][::-1, ::-1]
    if 0 in taps.shape:
      phases.append(jnp.zeros((batch, *outputs, channels), cotangent.dtype))
      continue
    padding = [(n - 1 - d, d) for n, d in zip(taps.shape, shifts, strict=False)]
    taps = taps.swapaxes(2, 3)
    phases.append(  # Without padding it is one tap, a product of matrices.
      _convolve(cotangent, taps, 1, padding)
      if any(map(any, padding))
      else _convolve_on_cpu(cotangent, taps, 1, in_loops)
    )
  gradient = jnp.stack(phases, 3).reshape(batch, *outputs, stride, stride, channels)
  gradient = gradient.swapaxes(2, 3).reshape(
    batch, outputs[0] * stride, outputs[1] * stride, channels
  )
  return gradient[:, : shape[1], : shape[2]]


def _kernel_gradient(images, cotangent, shape, stride):
  """Gradient with respect to the kernel, as matrix products.

  At stride 1 there is one for a row of the kernel, otherwise one for a tap.
  """
  rows, columns, channels, features = shape
  if rows == columns == 1:
    images, stride = images[:, ::stride, ::stride], 1
  if stride > 1:
    return _strided_kernel_gradient(images, cotangent, shape, stride)
  # A row of the kernel shifts the images. A column shifts the cotangent the other way
  # instead, so that one set of shifted copies serves all rows.
  height, width = images.shape[1:3]
  images = jnp.pad(images, ((0, 0), ((rows - 1) // 2, rows // 2), (0, 0), (0, 0)))
  cotangent = jnp.pad(
    cotangent, ((0, 0), (0, 0), (columns // 2, (columns - 1) // 2), (0, 0))
  )
  shifted = jnp.stack(
    [cotangent[:, :, j : j + width] for j in reversed(range(columns))], 3
  )
  shifted = shifted.reshape(-1, columns * features)
  gradient = jnp.stack(
    [
      jnp.tensordot(images[:, i : i + height].reshape(-1, channels), shifted, (0, 0))
      for i in range(rows)
    ]
  )
  return gradient.reshape(rows, channels, columns, features).swapaxes(1, 2)


def _strided_kernel_gradient(images, cotangent, shape, stride):
  rows, columns, channels, features = shape
  padding = []
  for taps, size, outputs in zip(
    shape[:2], images.shape[1:3], cotangent.shape[1:3], strict=True
  ):
    low = _low_padding(size, taps, stride)
    padding.append((low, max(outputs * stride + taps - 1 - size - low, 0)))
  images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
  height, width = (stride * n for n in cotangent.shape[1:3])
  cotangent = cotangent.reshape(-1, features)
  return jnp.stack(
    [
      jnp.tensordot(
        images[:, i : i + height : stride, j : j + width : stride].reshape(
          -1, channels
        ),
        cotangent,
        (0, 0),
      )
      for i in range(rows)
      for j in range(columns)
    ]
  ).reshape(shape)


class Conv2D(hk.Module):
  """`conv2d` without bias; parameter `w` and initialisation are hk.Conv2D's."""

  def __init__(
    self,
    output_channels: int,
    kernel_size: int,
    stride: int = 1,
    name: str | None = None,
  ):
    super().__init__(name=name)
    self._output_channels = output_channels
    self._kernel_size = kernel_size
    self._stride = stride

  def __call__(self, images: jax.Array) -> jax.Array:
    """Convolves images [B, H, W, C] to [B, H / stride, W / stride, O] of their type."""
    size, channels = self._kernel_size, images.shape[-1]
    stddev = (size * size * channels) ** -0.5
    kernel = hk.get_parameter(
      'w',
      (size, size, channels, self._output_channels),
      parameter_dtype(images),
      init=hk.initializers.TruncatedNormal(stddev),
    )
    return conv2d(images, kernel.astype(images.dtype), self._stride)
