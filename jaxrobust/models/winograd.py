"""3x3 convolution with fewer multiplications, as matrix products.

Winograd's minimal filtering F(m x m, 3x3) (Lavin and Gray, 2016): every tile of m + 2
by m + 2 pixels, transformed, is multiplied with the transformed kernel at each of its
positions and gives m by m outputs. The products over all tiles are matrix products of
channels. Outputs of 2x2 take 2.25 times fewer multiplications than the direct sum, and
those of 4x4 take 4 times fewer.

For 2x2 the transforms only add, subtract and halve, so that float32 results are as good
as those of the direct sum. For 4x4 they evaluate polynomials at 0, ±1/√2, ±√2 and
infinity. The root mean square error in float32, relative to the standard deviation of
the outputs of normal values, is 0.9, 1.2 and 1.6e-6 with 64, 128 and 256 channels,
where the direct sum has 0.4e-6; with the usual points, ±1 and ±2, it would be twice
that. (A product of bfloat16, which is what a TPU multiplies, is off by 1e-3.)
"""

import jax
import jax.numpy as jnp

_ROOT = 2**0.5


def suits(images_shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> bool:
  """Whether `convolve` takes these shapes, and is worth it.

  Measured on two cores of an AMD EPYC, batch 64, float32, inside a loop, in GFLOP/s of
  the direct sum; PyTorch 2.13 in its faster layout, channels-last:

    map, channels     XLA   2x2   4x4   PyTorch
    16x16, 32         235   274   480       487
    32x32, 64         193   306   434       428
    16x16, 128        393   412   843       480
    8x8, 256          382   738  1185       542
    4x4, 512          376   851   741

  On maps of 2x2, where XLA is at its worst, 2x2 has 12 times its speed with 64 channels
  and 33 times with 128. On small maps 32 channels are not worth the compilation.
  """
  _, height, width, _ = images_shape
  return (
    kernel_shape[:2] == (3, 3)
    and height % 2 == width % 2 == 0
    and min(kernel_shape[2:]) >= (64 if height * width < 256 else 32)
  )


def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves with stride 1 and 'SAME' padding.

  Args:
    images: [B, H, W, C] with even H and W.
    kernel: [3, 3, C, O].

  Returns:
    [B, H, W, O].
  """
  batch, height, width, channels = images.shape
  # On a map of 4x4 a single tile leaves too few rows to the products.
  size = 4 if height % 4 == width % 4 == 0 and height * width > 16 else 2
  transform_tile, transform_kernel, gather_outputs = _TRANSFORMS[size]

  def transform_tiles(padded, axis):
    first_tiles_to_last = padded.shape[axis] - size - 1
    return transform_tile(
      [
        jax.lax.slice_in_dim(padded, i, first_tiles_to_last + i, size, axis)
        for i in range(size + 2)
      ]
    )

  # A list of rows, each with its columns stacked: all in one array is slower, and all
  # apart take twice as long to compile. The barriers keep XLA from computing the first
  # transform again for each of its uses.
  taps = [jnp.stack(transform_kernel(row)) for row in transform_kernel(kernel)]
  padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  rows = []
  for row, tap in zip(
    jax.lax.optimization_barrier(transform_tiles(padded, 1)), taps, strict=True
  ):
    tiles = jnp.stack(transform_tiles(row, 2)).reshape(size + 2, -1, channels)
    products = jnp.matmul(tiles, tap)
    outputs = jnp.stack(gather_outputs(products), 1)  # [tiles, columns, O]
    rows.append(outputs.reshape(batch, height // size, width, -1))
  rows = jax.lax.optimization_barrier(rows)
  return jnp.stack(gather_outputs(rows), 2).reshape(batch, height, width, -1)


def _transform_tile_of_2(d):
  return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _transform_kernel_of_2(g):
  outer, inner = (g[0] + g[2]) / 2, g[1] / 2
  return g[0], outer + inner, outer - inner, g[2]


def _gather_outputs_of_2(m):
  return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _transform_tile_of_4(d):
  even, odd = d[4] - 2 * d[2], (d[3] - 2 * d[1]) / _ROOT
  other_even, other_odd = d[4] - d[2] / 2, _ROOT * d[3] - d[1] / _ROOT
  return (
    d[0] - 2.5 * d[2] + d[4],
    even + odd,
    even - odd,
    other_even + other_odd,
    other_even - other_odd,
    d[1] - 2.5 * d[3] + d[5],
  )


def _transform_kernel_of_4(g):
  # Divided by the products of the differences of points: 1, -1.5 and 6.
  even, odd = (g[0] + g[2] / 2) / -1.5, g[1] / (-1.5 * _ROOT)
  other_even, other_odd = (g[0] + 2 * g[2]) / 6, g[1] * (_ROOT / 6)
  return (
    g[0],
    even + odd,
    even - odd,
    other_even + other_odd,
    other_even - other_odd,
    g[2],
  )


def _gather_outputs_of_4(m):
  even, odd = m[1] + m[2], m[1] - m[2]
  other_even, other_odd = m[3] + m[4], m[3] - m[4]
  return (
    m[0] + even + other_even,
    odd / _ROOT + _ROOT * other_odd,
    even / 2 + 2 * other_even,
    odd / (2 * _ROOT) + 2 * _ROOT * other_odd + m[5],
  )


# Of outputs of 2x2 and 4x4 in a tile.
_TRANSFORMS = {
  2: (_transform_tile_of_2, _transform_kernel_of_2, _gather_outputs_of_2),
  4: (_transform_tile_of_4, _transform_kernel_of_4, _gather_outputs_of_4),
}
