"""EDM's augmentation: what is done to images, and what the network is shown of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.generators import ada
from jaxrobust.generators.edm import augmentation

pytestmark = pytest.mark.usefixtures('compiled_once')
NAMES = ('mirrored', 'inverted', 'scale', 'cosine', 'sine', 'x', 'y', 'right', 'down')


@pytest.fixture(scope='module')
def augmented():
  """2,000 copies of an image, augmented with probability 0.12, and the labels."""
  image = np.float32(np.random.RandomState(0).uniform(-1, 1, (8, 8, 1)))
  images = np.broadcast_to(image, (2000, 8, 8, 1))
  rngs = jax.random.split(jax.random.key(1), 2000)
  run = jax.jit(
    lambda x, rngs: augmentation.augment(x, rngs, probability=0.12, flip=True)
  )
  return image, *map(np.asarray, run(images, rngs))


def test_each_change_comes_as_often_as_published(augmented):
  _, _, labels = augmented
  assert labels.shape == (2000, 9)
  # A stretch is turned in half of the cases; else it has no sine.
  expected = [0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.06, 0.12, 0.12]
  for name, share, found in zip(NAMES, expected, (labels != 0).mean(0), strict=True):
    # Four deviations of a share.
    assert abs(found - share) < 4 * (share * (1 - share) / 2000) ** 0.5, name
  changed = labels[:, 2][labels[:, 2] != 0]
  assert abs(changed.mean()) < 0.3 and 0.8 < changed.std() < 1.2
  np.testing.assert_allclose(
    (labels[:, 3] + 1) ** 2 + labels[:, 4] ** 2, 1, atol=1e-5
  )  # an angle's
  assert ((labels[:, 7] != 0) == (labels[:, 8] != 0)).all()


def test_labels_say_all_that_was_done(augmented):
  """Images of equal labels are equal, and those of zeros are not changed."""
  image, images, labels = augmented
  # But for the rounding of a filter and its inverse.
  plain = (labels == 0).all(1)
  np.testing.assert_allclose(
    images[plain], np.broadcast_to(image, images[plain].shape), atol=1e-5
  )
  only_flipped = (labels[:, 2:] == 0).all(1)
  for mirrored, inverted in ((1, 0), (0, 1), (1, 1)):
    chosen = only_flipped & (labels[:, :2] == [mirrored, inverted]).all(1)
    assert chosen.any()
    expected = image[:: -1 if inverted else 1, :: -1 if mirrored else 1]
    np.testing.assert_allclose(
      images[chosen], np.broadcast_to(expected, images[chosen].shape), atol=1e-5
    )
  moved = np.abs(images - images[plain][0]).max((1, 2, 3)) > 0.01
  assert moved[~plain].mean() > 0.99


def changes(**given):
  none = {'scale': 0.0, 'angle': 0.0, 'stretch': 0.0, 'direction': 0.0, 'shift': (0, 0)}
  given = {key: jnp.float32(x) for key, x in (none | given).items()}
  return augmentation._Changes(flips=jnp.zeros(2, bool), **given)


def test_the_directions_of_changes():
  """Smooth images, so that filters do not matter."""
  ys, xs = np.meshgrid(np.arange(16.0), np.arange(16.0), indexing='ij')
  blob = lambda x, y, wide=1.6, high=1.6: np.float32(
    np.exp(-(((xs - x) / wide) ** 2) / 2 - ((ys - y) / high) ** 2 / 2)
  )
  images = blob(9, 6)[None, :, :, None]
  centred = blob(7.5, 7.5)[None, :, :, None]

  def moved(images, **given):
    maps = augmentation._map(changes(**given), (16, 16))[None]
    return np.asarray(ada.warp(jnp.asarray(images), maps))[0, :, :, 0]

  # A shift of 1 is an eighth of 16 pixels, right and down.
  np.testing.assert_allclose(moved(images, shift=(1, 0.5)), blob(11, 7), atol=0.03)
  # A quarter turn counter-clockwise: (1.5, -1.5) from the centre to (-1.5, -1.5).
  np.testing.assert_allclose(moved(images, angle=np.pi / 2), blob(6, 6), atol=0.03)
  wide, high = 1.6 * 2**0.2, 1.6 * 2**-0.2
  for given, sizes in (
    ({'scale': 1}, (wide, wide)),
    ({'stretch': 1}, (wide, high)),
    ({'stretch': 1, 'direction': np.pi / 2}, (high, wide)),
  ):
    expected = blob(7.5, 7.5, *sizes)
    np.testing.assert_allclose(moved(centred, **given), expected, atol=0.03)
  labels = augmentation._labels(changes(stretch=2, direction=np.pi / 6))
  np.testing.assert_allclose(labels[5:7], [3**0.5, 1], rtol=1e-5)


def test_without_augmentation_images_are_as_they_are():
  images = np.float32(np.random.RandomState(0).uniform(-1, 1, (4, 8, 8, 3)))
  rngs = jax.random.split(jax.random.key(0), 4)
  found, labels = augmentation.augment(images, rngs, probability=0.0, flip=False)
  np.testing.assert_array_equal(found, images)
  assert not np.asarray(labels).any()
