"""DiffAugment: the same few random changes of real and of generated images.

Source: Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training",
and the code that they published with it. All are made of every image that the
discriminator sees, always, so they must be such as the generator cannot hide in.
"""

import jax
import jax.numpy as jnp


def _brightness(image, rng):
  return image + jax.random.uniform(rng, (), image.dtype, -0.5, 0.5)


def _saturation(image, rng):
  """Of a grey image: nothing."""
  grey = jnp.mean(image, -1, keepdims=True)
  return grey + (image - grey) * jax.random.uniform(rng, (), image.dtype, 0.0, 2.0)


def _contrast(image, rng):
  mean = jnp.mean(image)
  return mean + (image - mean) * jax.random.uniform(rng, (), image.dtype, 0.5, 1.5)


def _translation(image, rng):
  """By whole pixels, up to an eighth of the size; zeros come in."""
  limits = jnp.array([size // 8 for size in image.shape[:2]])
  shift = jax.random.randint(rng, (2,), -limits, limits + 1)
  rows, columns = (
    jnp.arange(size) + step for size, step in zip(image.shape[:2], shift, strict=True)
  )
  inside = lambda places: (places >= 0) & (places < len(places))
  clip = lambda places: jnp.clip(places, 0, len(places) - 1)
  shown = image[clip(rows)][:, clip(columns)]
  known = inside(rows)[:, None] & inside(columns)[None]
  return jnp.where(known[..., None], shown, 0)


def _cutout(image, rng):
  """A rectangle of half the size, anywhere; the edge cuts it."""
  sizes = [size // 2 for size in image.shape[:2]]
  masks = []
  for index, size in enumerate(sizes):
    total = image.shape[index]
    key = jax.random.fold_in(rng, index)
    first = jax.random.randint(key, (), 0, total + 1 - size % 2) - size // 2
    places = jnp.arange(total)
    masks.append((places >= first) & (places < first + size))
  erased = masks[0][:, None] & masks[1][None]
  return jnp.where(erased[..., None], 0, image)


# In the order in which they are made; all work on images of [-1, 1].
_COLOUR = (_brightness, _saturation, _contrast)
_PLACE = (_translation, _cutout)
KINDS = {
  'diff-augment': _PLACE,  # theirs for CIFAR
  'diff-augment-colour': _COLOUR + _PLACE,
}


def augment(images: jax.Array, rngs: jax.Array, kind: str) -> jax.Array:
  """Changes images at random; differentiable in them.

  Args:
    images: float [b, H, W, C] in [-1, 1].
    rngs: keys [b]: an image depends on its own only.
    kind: a key of `KINDS`.

  Returns:
    [b, H, W, C], not clipped.
  """

  def change(image, rng):
    for index, operation in enumerate(KINDS[kind]):
      image = operation(image, jax.random.fold_in(rng, index))
    return image

  return jax.vmap(change)(images, rngs)
