"""Nearest neighbours and balls by Euclidean distance, exact though found in float32.

The device expands |q - k|^2, in which float32 cancels for rows that are far from the
mean and near to each other. What that leaves in doubt is computed again in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.errors import UserError

_BLOCK = 1_024  # rows of distances computed at a time
_SPARE = 8  # Neighbours by float32 beyond those wanted, ranked anew in float64.
_UNIT = 2.0**-24  # the rounding of float32


def nearest(
  queries: np.ndarray, keys: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest keys of each query, nearest first.

  The device finds candidates by float32; their distances are computed again in float64,
  so that a repeated image is at distance 0. Where float32 could have missed one, as
  among clusters that are far from each other, all keys are compared in float64: the
  neighbours are exact up to the rounding of float64.

  Args:
    queries: [n, F].
    keys: [m, F], m >= k.
    k: how many.

  Returns:
    (distances float64 [n, k], indices int [n, k]), Euclidean.

  Raises:
    UserError: There are fewer than k keys.
  """
  if len(keys) < k:
    raise UserError(f'{len(keys)} images have no {k} nearest: compare more')
  found_distances, found_indices = [], []
  many = min(len(keys), k + _SPARE)
  centre = keys.mean(0, dtype=np.float64)  # Small norms cancel less in float32.
  centred = np.float32(keys - centre)
  greatest = np.square(centred, dtype=np.float64).sum(-1).max()
  device_keys = jnp.asarray(centred)
  for block in _blocks(queries):
    filled = np.float32(_filled(block, _BLOCK) - centre)
    squares, candidates = (
      np.asarray(x)[: len(block)] for x in _candidates(filled, device_keys, many)
    )
    differences = np.float64(block)[:, None] - np.float64(keys[candidates])
    distances = np.sqrt(np.square(differences).sum(-1))
    order = np.lexsort((candidates, distances))[:, :k]
    found_distances.append(np.take_along_axis(distances, order, 1))
    found_indices.append(np.take_along_axis(candidates, order, 1))
    if many == len(keys):
      continue
    # The other keys are no nearer than the last candidate, but for rounding.
    margin = np.float64(squares[:, -1]) - np.square(found_distances[-1][:, -1])
    norms = np.square(filled[: len(block)], dtype=np.float64).sum(-1)
    doubtful = margin <= _rounding(norms, greatest, keys.shape[1])
    doubtful &= found_distances[-1][:, -1] > 0  # Nothing is nearer than a copy.
    for row in np.flatnonzero(doubtful):
      found_distances[-1][row], found_indices[-1][row] = _nearest_of_one(
        block[row], keys, k
      )
  return np.concatenate(found_distances), np.concatenate(found_indices)


def count_in_balls(rows: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> int:
  """How many pairs of a row and a ball there are, of which the row is in the ball.

  Args:
    rows: [n, F].
    centres: of the balls, [m, F].
    radii: of the balls, float64 [m].
  """
  centre = centres.mean(0, dtype=np.float64)
  moved = np.float32(centres - centre)
  norms = np.square(moved, dtype=np.float64).sum(-1)
  device_centres, total = jnp.asarray(moved), 0
  for block in _blocks(rows):
    filled = np.float32(_filled(block, _BLOCK) - centre)
    squares = np.asarray(_distances(filled, device_centres))[: len(block)]
    own = np.square(filled[: len(block)], dtype=np.float64).sum(-1)
    margins = np.square(radii) - squares
    # What float32 cannot tell from its radius is computed again.
    bound = _rounding(own[:, None], norms, centres.shape[1])
    total += int((margins > bound).sum())
    near, balls = np.nonzero(np.abs(margins) <= bound)
    for part in _blocks(np.arange(len(near))):
      differences = np.float64(block[near[part]]) - centres[balls[part]]
      within = np.sqrt(np.square(differences).sum(-1)) <= radii[balls[part]]
      total += int(within.sum())
  return total


def _rounding(norms, greatest, num_features):
  """What rounding can do to squared distances in float32.

  Args:
    norms: squared, of the queries.
    greatest: squared norm of the keys, or the greatest of them.
    num_features: F.

  Returns:
    As the norms. Roundings of a sum of F products add up at random (Higham and Mary,
    2019): to sqrt(F) of them, times a factor that 8 exceeds by far. Sums in order could
    be off by F of them, but no device adds so.
  """
  return 8 * np.sqrt(num_features + 64) * _UNIT * (norms + greatest)


def _nearest_of_one(query, keys, k):
  """(distances, indices) [k] of the nearest keys of one query, in float64."""
  distances = np.sqrt(
    np.concatenate(
      [np.square(np.float64(block) - query).sum(-1) for block in _blocks(keys)]
    )
  )
  indices = np.argsort(distances, kind='stable')[:k]
  return distances[indices], indices


def _blocks(rows):
  """Parts of rows, all but the last of _BLOCK."""
  return (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))


def _filled(block, size):
  """The block with its first row repeated to `size`, so that one program serves."""
  return np.concatenate([block, block[:1].repeat(size - len(block), 0)])


def _squared_distances(queries, keys):
  """Squared distances [n, m] in float32, at full precision on any device."""
  products = jnp.dot(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
  norms = [jnp.square(x).sum(-1) for x in (queries, keys)]
  return norms[0][:, None] + norms[1][None, :] - 2 * products


_distances = jax.jit(_squared_distances)


@functools.partial(jax.jit, static_argnums=2)
def _candidates(queries, keys, k):
  """Squared distances and indices [n, k] of the nearest keys by float32."""
  values, indices = jax.lax.top_k(-_squared_distances(queries, keys), k)
  return -values, indices
