"""DiffAugment: where pixels may go, and what colours may become."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.generators import diff_augment

COUNT = 400
# Pixels that are all different, and none of them 0.
IMAGE = np.arange(1.0, 16 * 24 * 3 + 1).reshape(16, 24, 3).astype(np.float32)


@pytest.fixture(scope='module')
def rngs():
  return jax.random.split(jax.random.key(0), COUNT)


def images_by(operation, rngs, image=IMAGE):
  return np.asarray(jax.jit(jax.vmap(operation, (None, 0)))(jnp.asarray(image), rngs))


def test_translation_is_by_whole_pixels_up_to_an_eighth(rngs):
  shifts = set()
  for found in images_by(diff_augment._translation, rngs):
    rows, columns = np.nonzero(found[..., 0])
    row, column = rows[0], columns[0]
    source = np.argwhere(IMAGE[..., 0] == found[row, column, 0])[0]
    shift = tuple(source - (row, column))
    shifts.add(shift)
    moved = np.zeros_like(IMAGE)
    for y in range(16):
      for x in range(24):
        if 0 <= y + shift[0] < 16 and 0 <= x + shift[1] < 24:
          moved[y, x] = IMAGE[y + shift[0], x + shift[1]]
    np.testing.assert_array_equal(found, moved)
  # 5 times 7 of them; each is missed by 400 draws with a probability of 1e-5.
  assert shifts == {(y, x) for y in range(-2, 3) for x in range(-3, 4)}


def test_cutout_is_a_rectangle_of_half_the_size_that_the_edge_cuts(rngs):
  heights, widths = set(), set()
  for found in images_by(diff_augment._cutout, rngs):
    erased = (found == 0).all(-1)
    rows, columns = erased.any(1), erased.any(0)
    np.testing.assert_array_equal(erased, rows[:, None] & columns[None])
    np.testing.assert_array_equal(found[~erased], IMAGE[~erased])
    for line, whole, sizes in ((rows, 8, heights), (columns, 12, widths)):
      (places,) = np.nonzero(line)
      sizes.add(len(places))
      assert (np.diff(places) == 1).all()
      # Short of its size only at an edge.
      assert len(places) == whole or places[0] == 0 or places[-1] == len(line) - 1
  assert heights == {4, 5, 6, 7, 8} and widths == {6, 7, 8, 9, 10, 11, 12}


def test_colours(rngs):
  image = np.random.RandomState(0).uniform(-1, 1, (4, 4, 3)).astype(np.float32)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  uniform = lambda x, low, high: (
    x.min() >= low
    and x.max() <= high
    and np.abs(np.quantile(x, [0.25, 0.5, 0.75]) - np.linspace(low, high, 5)[1:4]).max()
    < 0.15 * (high - low)
  )
  added = images_by(diff_augment._brightness, rngs, image) - image
  close(added, np.broadcast_to(added[:, :1, :1, :1], added.shape))
  assert uniform(added[:, 0, 0, 0], -0.5 - 1e-6, 0.5 + 1e-6)
  for operation, axes, low, high in (
    (diff_augment._saturation, -1, 0, 2),
    (diff_augment._contrast, None, 0.5, 1.5),
  ):
    mean = image.mean(axes, keepdims=True)
    found = images_by(operation, rngs, image) - mean
    factors = (found * (image - mean)).sum((1, 2, 3)) / ((image - mean) ** 2).sum()
    close(found, factors[:, None, None, None] * (image - mean))
    assert uniform(factors, low - 1e-5, high + 1e-5)


@pytest.mark.parametrize('kind', diff_augment.KINDS)
def test_an_image_depends_on_its_own_key_and_gradients_pass(rngs, kind):
  images = jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (6, 8, 8, 1)), 'float32')
  augment = jax.jit(lambda x, rngs: diff_augment.augment(x, rngs, kind))
  found = augment(images, rngs[:6])
  some = augment(images[np.array([4, 1])], rngs[np.array([4, 1])])
  np.testing.assert_allclose(some, found[np.array([4, 1])], atol=1e-6)
  # To all pixels that are shown.
  gradient = jax.grad(lambda x: jnp.sum(augment(x, rngs[:6]) * found))(images)
  shares = np.mean(np.abs(np.asarray(gradient)) > 1e-6, (1, 2, 3))
  assert (shares > 0.4).all()
