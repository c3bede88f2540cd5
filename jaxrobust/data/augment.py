"""Augmentation on the device: from uint8 images and labels to what is trained on.

In this order: a policy (`policies`), crop and flip, Cutout, then mixup or CutMix. The
policy comes first since its operations are those of uint8 images; Cutout last of one
image's, so that its square is neither cropped nor moved.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def augment(images: jax.Array, rngs: jax.Array, *, pad: int, flip: bool) -> jax.Array:
  """Pads with zeros, crops at random to the old size, and mirrors half the images.

  Args:
    images: uint8 [B, H, W, C].
    rngs: keys [B], one an image, so that no draw depends on the batch.
    pad: zeros on each side, in pixels; 0 for no crop.
    flip: mirror left and right with probability 1/2.

  Returns:
    float32 [B, H, W, C] in [0, 1].
  """
  batch, height, width, channels = images.shape
  wide = width + 2 * pad

  def draw(rng):
    shift_rng, flip_rng = jax.random.split(rng)
    shift = jax.random.randint(shift_rng, (2,), 0, 2 * pad + 1)
    return shift, jax.random.bernoulli(flip_rng) & flip

  shifts, flips = jax.vmap(draw)(rngs)
  rows = jnp.arange(height)[None, :] + shifts[:, :1]
  columns = jnp.arange(width)[None, :]
  columns = jnp.where(flips[:, None], width - 1 - columns, columns) + shifts[:, 1:]
  # Crop and flip are one gather of flat positions, which costs less than a slice of
  # each image, and no mask, since every position lies in the padded image.
  padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  flat = (rows[:, :, None] * wide + columns[:, None, :]).reshape(batch, -1, 1)
  moved = jnp.take_along_axis(
    padded.reshape(batch, -1, channels), flat, axis=1, mode='promise_in_bounds'
  )
  return moved.reshape(images.shape).astype(jnp.float32) / 255


def cutout(
  images: jax.Array, rngs: jax.Array, side: int, fill: tuple[float, ...]
) -> jax.Array:
  """Erases a square round a uniform pixel of each image; the image's edge cuts it.

  Source: DeVries & Taylor 2017.

  Args:
    images: float [B, H, W, C].
    rngs: keys [B], one an image.
    side: of the square, in pixels.
    fill: what a channel is there; the mean, which normalisation makes 0, as published.

  Returns:
    float [B, H, W, C].
  """
  _, height, width, _ = images.shape

  def erase(image, rng):
    row_rng, column_rng = jax.random.split(rng)
    box = (
      _near_a_pixel(row_rng, height, side)[:, None]
      & _near_a_pixel(column_rng, width, side)[None, :]
    )
    return jnp.where(box[:, :, None], jnp.array(fill, image.dtype)[None, None], image)

  return jax.vmap(erase)(images, rngs)


def one_hot_targets(
  labels: jax.Array,
  is_generated: jax.Array,
  num_classes: int,
  label_smoothing: float,
  smooth_real_labels: bool = False,
) -> jax.Array:
  """Targets: those of generated images are smoothed, those of real ones on request.

  Source: the released recipe, with smoothing 0.1 of generated labels only; the code of
  Wang et al. 2023 smooths all.

  Args:
    labels: int [B] in [0, K).
    is_generated: bool [B].
    num_classes: K.
    label_smoothing: share s of the uniform distribution, in [0, 1].
    smooth_real_labels: whether labels of real images are smoothed too.

  Returns:
    float32 [B, K], (1 - s) one-hot + s / K where smoothed, one-hot elsewhere.
  """
  is_smoothed = is_generated | smooth_real_labels
  smoothing = jnp.where(is_smoothed, label_smoothing, 0.0)[:, None]
  one_hot = jax.nn.one_hot(labels, num_classes)
  return (1 - smoothing) * one_hot + smoothing / num_classes


def cutmix(
  all_images: jax.Array, all_targets: jax.Array, rng: jax.Array, num_parts: int
) -> tuple[jax.Array, jax.Array]:
  """Pastes a box of another image into each image, and mixes the targets alike.

  Each contiguous part of the global batch has one ratio of Beta(1, 1), one box, and a
  permutation that gives each of its images a partner in the same part. The draws
  depend on `rng` and the part only, not on how the batch lies on devices.
  Source: Yun et al. 2019. In the released code a part is the batch of a device, 32
  images of 1,024 in the published runs, so that as many parts as BatchNorm groups are
  its layout on any number of devices.
  Deviation: several workers that it emulates on one device share a draw; here each
  part has its own.

  Args:
    all_images: [G, H, W, C], the global batch.
    all_targets: [G, K].
    rng: key of this batch.
    num_parts: of the batch; must divide G.

  Returns:
    Images [G, H, W, C] and targets [G, K]. The weight of an image in its targets is
    the share of its pixels that is still seen.
  """
  _, height, width, _ = all_images.shape

  def mix(rng, images, targets):
    ratio_rng, row_rng, column_rng, order_rng = jax.random.split(rng, 4)
    side = jnp.sqrt(1 - jax.random.uniform(ratio_rng))  # Beta(1, 1) is uniform.
    length = lambda size: jnp.floor(size * side).astype(int) // 2 * 2
    box = (
      _near_a_pixel(row_rng, height, length(height))[:, None]
      & _near_a_pixel(column_rng, width, length(width))[None, :]
    )
    partner = jax.random.permutation(order_rng, len(images))
    mixed = jnp.where(box[None, :, :, None], images[partner], images)
    # The image's edge cuts the box, so the weight is of what is left of it.
    weight = 1 - jnp.mean(box, dtype=targets.dtype)
    return mixed, weight * targets + (1 - weight) * targets[partner]

  return _by_part(mix, all_images, all_targets, rng, num_parts)


def mixup(
  all_images: jax.Array,
  all_targets: jax.Array,
  rng: jax.Array,
  num_parts: int,
  alpha: float,
) -> tuple[jax.Array, jax.Array]:
  """Averages each image with another one, and the targets with the same weights.

  Source: Zhang et al. 2018, whose code draws one ratio a batch: here, as for `cutmix`,
  one for each part, and a permutation that gives each image its partner.

  Args:
    all_images: [G, H, W, C], the global batch.
    all_targets: [G, K].
    rng: key of this batch.
    num_parts: of the batch; must divide G.
    alpha: the ratio is of Beta(alpha, alpha); above 0.

  Returns:
    Images [G, H, W, C] and targets [G, K].
  """

  def mix(rng, images, targets):
    ratio_rng, order_rng = jax.random.split(rng)
    ratio = jax.random.beta(ratio_rng, alpha, alpha)
    partner = jax.random.permutation(order_rng, len(images))
    blend = lambda x: ratio * x + (1 - ratio) * x[partner]
    return blend(images), blend(targets)

  return _by_part(mix, all_images, all_targets, rng, num_parts)


def _by_part(
  mix: Callable, all_images: jax.Array, all_targets: jax.Array, rng: jax.Array, count
):
  """Images and targets after `mix(rng, images, targets)` of each part."""
  rngs = jax.vmap(lambda part: jax.random.fold_in(rng, part))(jnp.arange(count))
  split = lambda x: x.reshape(count, -1, *x.shape[1:])
  images, targets = jax.vmap(mix)(rngs, split(all_images), split(all_targets))
  return images.reshape(all_images.shape), targets.reshape(all_targets.shape)


def _near_a_pixel(rng: jax.Array, size: int, length: int | jax.Array) -> jax.Array:
  """A span of so many positions round a uniform one, cut at the ends, bool [size]."""
  first = jax.random.randint(rng, (), 0, size) - length // 2
  position = jnp.arange(size)
  return (position >= first) & (position < first + length)
