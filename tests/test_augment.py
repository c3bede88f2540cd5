"""Augmentation against plain numpy, and the properties of Cutout, CutMix and mixup."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.data import augment

RNG = np.random.default_rng(0)

augmented = jax.jit(augment.augment, static_argnames=('pad', 'flip'))
mixed_by = jax.jit(augment.cutmix, static_argnums=3)
averaged_by = jax.jit(augment.mixup, static_argnums=3)
smoothed = jax.jit(augment.one_hot_targets, static_argnums=(2, 3, 4))
erased = jax.jit(augment.cutout, static_argnums=(2, 3))


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def all_crops(image, pad):
  """Every crop of a padded image by its shift, and the mirror image of each."""
  height, width, _ = image.shape
  padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
  for top in range(2 * pad + 1):
    for left in range(2 * pad + 1):
      crop = padded[top : top + height, left : left + width]
      yield (top, left, False), crop
      yield (top, left, True), crop[:, ::-1]


@pytest.mark.parametrize('shape', [(5, 5, 3), (4, 7, 1)])
def test_every_crop_is_a_numpy_crop_and_every_offset_occurs(shape):
  pad, count = 2, 2000
  image = RNG.integers(1, 256, shape, np.uint8)  # No zeros but those of padding.
  known = {crop.tobytes(): shift for shift, crop in all_crops(image, pad)}
  assert len(known) == 2 * 25
  found = np.asarray(
    augmented(np.repeat(image[None], count, 0), keys(count), pad=pad, flip=True)
  )
  assert found.dtype == np.float32 and found.max() <= 1
  shifts = [known[x.tobytes()] for x in np.rint(found * 255).astype(np.uint8)]
  # A compiler may multiply by 1 / 255: one rounding more.
  np.testing.assert_allclose(found * 255, np.rint(found * 255), atol=5e-5)
  # 50 equally likely outcomes, 40 expected of each: 6 standard deviations.
  _, counts = np.unique(shifts, axis=0, return_counts=True)
  assert len(counts) == 50
  assert abs(counts - 40).max() < 6 * np.sqrt(40)


def test_flips_half_the_images_when_asked():
  image = np.arange(6, dtype=np.uint8).reshape(1, 6, 1)
  batch = np.repeat(image[None], 1000, 0)
  flipped = lambda flip: (
    np.asarray(augmented(batch, keys(1000), pad=0, flip=flip))[:, 0, 0, 0] > 0
  )
  assert flipped(False).sum() == 0
  # 5 standard deviations of a fair coin.
  assert abs(flipped(True).mean() - 0.5) < 5 * 0.5 / np.sqrt(1000)


def test_without_pad_and_flip_only_the_scale_changes():
  images = RNG.integers(0, 256, (3, 4, 4, 3), np.uint8)
  images[0, 0, 0] = (0, 1, 255)
  found = augmented(images, keys(3), pad=0, flip=False)
  np.testing.assert_allclose(found, images / 255, atol=1e-7)
  assert found.min() == 0 and found.max() == 1


def test_an_image_is_augmented_alike_in_any_batch():
  images = RNG.integers(0, 256, (8, 6, 6, 3), np.uint8)
  whole = augmented(images, keys(8), pad=3, flip=True)
  part = augmented(images[5:6], keys(8)[5:6], pad=3, flip=True)
  np.testing.assert_array_equal(part, whole[5:6])


def test_one_hot_targets_smooth_generated_labels_only():
  labels, generated = jnp.array([2, 0, 1]), jnp.array([True, False, True])
  targets = smoothed(labels, generated, 4, 0.1)
  np.testing.assert_allclose(
    targets,
    [[0.025, 0.025, 0.925, 0.025], [1, 0, 0, 0], [0.025, 0.925, 0.025, 0.025]],
    atol=1e-7,
  )
  np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
  np.testing.assert_array_equal(targets[1], [1, 0, 0, 0])


def test_smoothed_labels_of_all_images_give_the_smoothed_cross_entropy():
  """Of any logits: (1 - s) times that of the label, s times the mean over classes."""
  labels, generated = jnp.array([2, 0, 1]), jnp.array([True, False, False])
  targets = smoothed(labels, generated, 4, 0.1, True)
  np.testing.assert_allclose(targets[1], [0.925, 0.025, 0.025, 0.025], atol=1e-7)
  logits = np.random.default_rng(1).normal(size=(3, 4))
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  wanted = -0.9 * log_probs[np.arange(3), labels] - 0.1 * log_probs.mean(-1)
  # Targets in single precision.
  np.testing.assert_allclose(-(targets * log_probs).sum(-1), wanted, rtol=1e-6)


class TestCutmix:
  """Images filled with their own number show what came from where."""

  size, workers, share = 16, 3, 8

  def mixed(self, seed, size=None):
    size = size or self.size
    count = self.workers * self.share
    images = np.broadcast_to(
      np.arange(count, dtype=np.float32)[:, None, None, None], (count, size, size, 2)
    )
    images, targets = mixed_by(
      images, np.eye(count, dtype=np.float32), jax.random.key(seed), self.workers
    )
    return np.asarray(images), np.asarray(targets)

  def test_targets_are_the_visible_areas(self):
    for seed in range(10):
      images, targets = self.mixed(seed)
      count = len(images)
      areas = (
        np.array(
          [np.bincount(x[..., 0].astype(int).ravel(), minlength=count) for x in images]
        )
        / self.size**2
      )
      # Areas are multiples of 1/256, exact in single precision.
      np.testing.assert_allclose(targets, areas, atol=1e-6)
      np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
      np.testing.assert_array_equal(images[..., 0], images[..., 1])

  def test_a_worker_has_one_box_and_its_own_permutation(self):
    boxes = set()
    for seed in range(10):
      images, _ = self.mixed(seed)
      for worker in range(self.workers):
        slots = np.arange(worker * self.share, (worker + 1) * self.share)
        part = images[slots, :, :, 0]
        pasted = part != slots[:, None, None]
        box = pasted.any(0)
        boxes.add(box.tobytes())
        if not box.any():
          continue
        rows, columns = np.nonzero(box)
        filled = box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert filled.all(), 'a rectangle'
        partners = part[:, rows[0], columns[0]]
        assert (part[:, box] == partners[:, None]).all()
        assert sorted(partners) == sorted(slots), 'each of its images once'
    assert len(boxes) > 20, 'each worker and batch draws anew'

  def test_area_follows_beta(self):
    """The mean visible area against a float64 sum over ratios and centres."""
    workers, size = 2000, 16
    own = np.tile([1.0, 0.0], workers).reshape(-1, 1, 1, 1).astype(np.float32)
    images = np.broadcast_to(own, (2 * workers, size, size, 1))
    mixed, _ = mixed_by(images, own[:, 0, 0], jax.random.key(0), workers)
    box = (np.asarray(mixed) != images)[::2, :, :, 0]
    area = box[box.any((1, 2))].mean((1, 2))  # Of the pairs that were swapped.
    # lambda is uniform; the box has sides of sqrt(1 - lambda) of the image's, in even
    # numbers of pixels, round a uniform pixel, and is cut at the edge.
    half = np.floor(size * np.sqrt(1 - np.linspace(0, 1, 10_001)[:-1])).astype(int) // 2
    half, centre = half[half > 0][:, None], np.arange(size)[None, :]
    visible = np.minimum(centre + half, size) - np.maximum(centre - half, 0)
    expected = np.mean((visible.mean(1) / size) ** 2)
    assert 800 < len(area) < 1100
    assert abs(area.mean() - expected) < 5 * area.std() / np.sqrt(len(area))

  def test_depends_on_the_key_and_the_worker_only(self):
    count = self.workers * self.share
    images = RNG.random((count, 8, 8, 1), np.float32)
    targets = np.eye(count, dtype=np.float32)
    whole, _ = mixed_by(images, targets, jax.random.key(0), self.workers)
    other = images.copy()
    other[: self.share] = 0
    found, _ = mixed_by(other, targets, jax.random.key(0), self.workers)
    np.testing.assert_array_equal(found[self.share :], whole[self.share :])
    again, _ = mixed_by(images, targets, jax.random.key(1), self.workers)
    assert not np.array_equal(again, whole)


class TestMixup:
  """Images filled with their own number show which of them were averaged."""

  def test_images_and_targets_have_the_same_two_weights(self):
    workers, share = 3, 8
    count = workers * share
    own = np.eye(count, dtype=np.float32)
    images = np.broadcast_to(own[:, None, None, :], (count, 2, 3, count))
    for seed in range(5):
      mixed, targets = averaged_by(images, own, jax.random.key(seed), workers, 1.0)
      mixed, targets = np.asarray(mixed), np.asarray(targets)
      seen = np.broadcast_to(targets[:, None, None], images.shape)
      np.testing.assert_allclose(mixed, seen, atol=1e-7)
      np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
      for worker in range(workers):
        slots = np.arange(worker * share, (worker + 1) * share)
        inside = targets[np.ix_(slots, slots)]  # Partners are of the same worker.
        np.testing.assert_allclose(inside.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(inside.sum(0), 1, atol=1e-6)  # A permutation.
        others = inside.sum(1) - inside.diagonal()
        assert np.ptp(others[others > 1e-3]) < 1e-6  # One ratio.

  def test_the_ratio_follows_beta(self):
    """Its mean and variance are 1 / 2 and 1 / (4 (2 alpha + 1))."""
    workers = 4000
    own = np.tile(np.eye(2, dtype=np.float32), (workers, 1))
    for alpha in (0.2, 1.0):
      _, targets = averaged_by(
        own[:, None, None], own, jax.random.key(0), workers, alpha
      )
      pairs = np.asarray(targets)[::2]
      ratios = pairs[pairs[:, 1] > 0, 0]  # Of workers that swap their two: half.
      assert 1800 < len(ratios) < 2200
      variance = 1 / (4 * (2 * alpha + 1))
      assert abs(ratios.mean() - 0.5) < 5 * np.sqrt(variance / len(ratios))
      # (x - 1/2)^2 is at most 1/4, so its own variance at most a quarter of its mean.
      assert abs(ratios.var() - variance) < 5 * np.sqrt(variance / 4 / len(ratios))


class TestCutout:
  @pytest.mark.parametrize('side', [3, 4])
  def test_every_square_round_a_pixel_occurs(self, side):
    size, count = 6, 2000
    images = np.ones((count, size, size, 2), np.float32)
    found = np.asarray(erased(images, keys(count), side, (0.25, 0.5)))
    box = found[..., 0] != 1
    assert (found[box] == np.array([[0.25, 0.5]])).all()
    np.testing.assert_array_equal(found[~box], 1)
    seen = {}
    for image in box:
      seen[image.tobytes()] = seen.get(image.tobytes(), 0) + 1
    expected = {}
    for row in range(size):
      for column in range(size):
        image = np.zeros((size, size), bool)
        top, left = row - side // 2, column - side // 2
        image[max(top, 0) : top + side, max(left, 0) : left + side] = True
        expected[image.tobytes()] = expected.get(image.tobytes(), 0) + 1
    assert set(seen) == set(expected)
    for image, pixels in expected.items():
      mean = count * pixels / size**2
      assert abs(seen[image] - mean) < 6 * np.sqrt(mean)

  def test_an_image_is_erased_alike_in_any_batch(self):
    images = RNG.random((8, 6, 6, 1), np.float32)
    part = erased(images[5:6], keys(8)[5:6], 3, (0.5,))
    np.testing.assert_array_equal(part, erased(images, keys(8), 3, (0.5,))[5:6])
