"""Norm balls round images: where an attack starts, steps and must stay.

Every method works on each image of a batch by itself, so that no result depends on
the rest of the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrobust.errors import UserError


@dataclasses.dataclass(frozen=True)
class Linf:
  """Images none of whose values differ by more than epsilon.

  Attributes:
    epsilon: in pixel values of [0, 1], such as 8 / 255; above 0.
  """

  epsilon: float

  def initialize(self, rngs: jax.Array, images: jax.Array) -> jax.Array:
    """A uniform point of each ball, clipped to [0, 1].

    Args:
      rngs: keys [B], one an image.
      images: [B, H, W, C] in [0, 1], the centres.

    Returns:
      [B, H, W, C] in [0, 1].
    """
    draw = lambda rng: jax.random.uniform(
      rng, images.shape[1:], images.dtype, -self.epsilon, self.epsilon
    )
    return self.project(images + jax.vmap(draw)(rngs), images)

  def project(self, images: jax.Array, origin: jax.Array) -> jax.Array:
    """The nearest images in the balls, then clipped to [0, 1].

    Clipping does not leave the ball: the origin lies in [0, 1] itself, so that each
    clipped value moves towards the origin's.

    Args:
      images: [B, H, W, C].
      origin: [B, H, W, C] in [0, 1], the centres.

    Returns:
      [B, H, W, C] in [0, 1].
    """
    near = jnp.clip(images, origin - self.epsilon, origin + self.epsilon)
    return jnp.clip(near, 0, 1)

  @staticmethod
  def steepest(gradient: jax.Array) -> jax.Array:
    """The step of size 1 in this norm that climbs most: the gradient's sign.

    Args:
      gradient: [B, H, W, C].

    Returns:
      [B, H, W, C] in {-1, 0, 1}.
    """
    return jnp.sign(gradient)

  @staticmethod
  def distance(images: jax.Array, origin: jax.Array) -> jax.Array:
    """Distance of each image from its origin.

    Args:
      images, origin: [B, H, W, C].

    Returns:
      [B], in pixel values.
    """
    return jnp.max(jnp.abs(images - origin), axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class L2:
  """Images at a Euclidean distance of at most epsilon.

  Attributes:
    epsilon: in pixel values of [0, 1], such as 128 / 255; above 0.
  """

  epsilon: float

  def initialize(self, rngs: jax.Array, images: jax.Array) -> jax.Array:
    """A uniform point of each ball, clipped to [0, 1].

    Args:
      rngs: keys [B], one an image.
      images: [B, H, W, C] in [0, 1], the centres.

    Returns:
      [B, H, W, C] in [0, 1].
    """
    shape = images.shape[1:]

    def draw(rng):
      direction_rng, radius_rng = jax.random.split(rng)
      direction = jax.random.normal(direction_rng, shape, images.dtype)
      # The share of the ball within a radius r is r^d.
      volume = jax.random.uniform(radius_rng, (1,) * len(shape), images.dtype)
      return direction, volume ** (1 / direction.size)

    direction, radius = jax.vmap(draw)(rngs)
    offset = self.epsilon * radius * self.steepest(direction)
    return self.project(images + offset, images)

  def project(self, images: jax.Array, origin: jax.Array) -> jax.Array:
    """The nearest images in the balls, then clipped to [0, 1].

    Clipping does not leave the ball: the origin lies in [0, 1] itself, so that each
    clipped value moves towards the origin's.

    Args:
      images: [B, H, W, C].
      origin: [B, H, W, C] in [0, 1], the centres.

    Returns:
      [B, H, W, C] in [0, 1].
    """
    offset = images - origin
    shrink = self.epsilon / jnp.maximum(_length(offset), self.epsilon)
    return jnp.clip(origin + offset * shrink, 0, 1)

  @staticmethod
  def steepest(gradient: jax.Array) -> jax.Array:
    """The step of size 1 in this norm that climbs most: the gradient's direction.

    Args:
      gradient: [B, H, W, C].

    Returns:
      [B, H, W, C], each of length 1, or 0 where the gradient is 0.
    """
    # Gradients of a confident network are so small that their squares vanish.
    largest = jnp.max(jnp.abs(gradient), axis=(1, 2, 3), keepdims=True)
    scaled = gradient / jnp.where(largest > 0, largest, 1)
    return scaled / jnp.maximum(_length(scaled), 1)

  @staticmethod
  def distance(images: jax.Array, origin: jax.Array) -> jax.Array:
    """Distance of each image from its origin.

    Args:
      images, origin: [B, H, W, C].

    Returns:
      [B], in pixel values.
    """
    return _length(images - origin)[:, 0, 0, 0]


Ball = Linf | L2

_BALLS = {'linf': Linf, 'l2': L2}


def get(name: str, epsilon: float) -> Ball:
  """The ball of a config.

  Args:
    name: 'linf' or 'l2'.
    epsilon: in pixel values of [0, 1], above 0.

  Raises:
    UserError: for another name, or an epsilon that is not above 0.
  """
  if name not in _BALLS:
    raise UserError(f'norm {name!r} is unknown: use one of {", ".join(_BALLS)}')
  if not epsilon > 0:
    raise UserError(
      f'epsilon = {epsilon}: use a number above 0, in pixel values of [0, 1]'
    )
  return _BALLS[name](epsilon)


def _length(x: jax.Array) -> jax.Array:
  """Euclidean length of each image, [B, 1, 1, 1]."""
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3), keepdims=True))
