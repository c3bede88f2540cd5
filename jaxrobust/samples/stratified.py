"""Which images of a set stand for all of it, where not all are looked at."""

import numpy as np


def one_of_each_part(total: int, count: int, seed: int) -> np.ndarray:
  """Draws a position from each of `count` parts of range(total), as equal as can be.

  Sets may be sorted by class, or have classes that take turns: neither equal steps nor
  the first ones would do.

  Args:
    total: images in the set.
    count: positions to draw; all of them where there are no more.
    seed: the same one draws the same positions.

  Returns:
    int [min(count, total)], all different, in ascending order.
  """
  count = min(count, total)
  edges = np.arange(count + 1) * total // count
  drawn = np.random.RandomState(seed).random_sample(count)
  return edges[:-1] + (drawn * np.diff(edges)).astype(int)
