"""Resampling by separable filters, as a matrix for each axis of an image.

Up by zeros between pixels, then padding, a filter, and every so manyth value: what that
does to a row of pixels is a matrix. Images are small, so that the products cost less
than a convolution with one channel at a time, and their gradients are products too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def matrix(
  size: int,
  taps: np.ndarray,
  *,
  up: int = 1,
  down: int = 1,
  pads: tuple[int, int] = (0, 0),
) -> np.ndarray:
  """What resampling does to a row.

  Args:
    size: of the row.
    taps: of the filter [n], of a convolution (the first meets the last pixel).
    up: distance of pixels with zeros between them, and zeros after the last.
    down: every so manyth value is kept, from the first on.
    pads: zeros before and after, on the finer grid; below 0 for pixels cut off.

  Returns:
    float64 [(up * size + pads - n) // down + 1, size].
  """
  fine = np.zeros((up * size, size))
  fine[::up] = np.eye(size)
  before, after = pads
  fine = fine[max(-before, 0) : len(fine) - max(-after, 0)]
  fine = np.pad(fine, ((max(before, 0), max(after, 0)), (0, 0)))
  rows = len(fine) - len(taps) + 1
  filtered = sum(tap * fine[i : i + rows] for i, tap in enumerate(taps[::-1]))
  return filtered[::down]


def resample(images: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  """Images [b, H, W, C] as [b, H', W', C], by matrices [H', H] and [W', W]."""
  rows, columns = (jnp.asarray(x, images.dtype) for x in (rows, columns))
  # By default a TPU would round the images to bfloat16.
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  return product('vw,bhwc->bhvc', columns, product('uh,bhwc->buwc', rows, images))
