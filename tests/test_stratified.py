"""Positions against the parts that they are drawn from."""

import numpy as np

from jaxrobust.samples.stratified import one_of_each_part


def test_a_position_is_drawn_from_every_part():
  found = one_of_each_part(10_000, 1_000, seed=0)
  np.testing.assert_array_equal(found // 10, np.arange(1_000))
  # Classes that take turns: each is chosen as often, within 4 standard errors.
  np.testing.assert_allclose(np.bincount(found % 10), 100, atol=4 * 100**0.5)
  uneven = one_of_each_part(17, 11, seed=0)
  assert (np.diff(uneven) > 0).all() and 0 <= uneven[0] <= uneven[-1] < 17
  np.testing.assert_array_equal(one_of_each_part(7, 7, 3), np.arange(7))
  np.testing.assert_array_equal(one_of_each_part(7, 9, 3), np.arange(7))
