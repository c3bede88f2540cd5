"""Norm balls round images: where an attack starts, steps and must stay.

Every method works on each image of a batch by itself, so that no result depends on
the rest of the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrobust.config import attack
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
    # Deviation: the published APGD divides by the length of what is left of them, and
    # stands still. Of 150 images on a network with logits times 20 it leaves 141, this
    # 110: the attack is the stronger for it.
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


@dataclasses.dataclass(frozen=True)
class L1:
  """Images whose absolute differences sum to at most epsilon.

  Attributes:
    epsilon: in pixel values of [0, 1], such as 12; above 0.
  """

  epsilon: float

  def initialize(self, rngs: jax.Array, images: jax.Array) -> jax.Array:
    """A uniform point of each ball, projected to [0, 1] within the ball.

    Args:
      rngs: keys [B], one an image.
      images: [B, H, W, C] in [0, 1], the centres.

    Returns:
      [B, H, W, C] in [0, 1].
    """
    shape, dtype = images.shape[1:], images.dtype

    def draw(rng):
      sizes, signs, rest = jax.random.split(rng, 3)
      # Exponential lengths over their sum are uniform on the simplex; one more than
      # there are values makes them uniform inside it.
      lengths = jax.random.exponential(sizes, shape, dtype)
      total = jnp.sum(lengths) + jax.random.exponential(rest, (), dtype)
      return jax.random.rademacher(signs, shape, dtype) * lengths / total

    return self.project(images + self.epsilon * jax.vmap(draw)(rngs), images)

  def project(self, images: jax.Array, origin: jax.Array) -> jax.Array:
    """The nearest images in the intersection of ball and [0, 1].

    Clipping after a projection to the ball alone would leave most of the budget
    unused (Croce and Hein 2021, "Mind the box"). Each offset u becomes
    clip(sign(u) max(|u| - t, 0)) with one threshold t an image, found by bisection.

    Args:
      images: [B, H, W, C].
      origin: [B, H, W, C] in [0, 1], the centres.

    Returns:
      [B, H, W, C] in [0, 1].
    """
    offset = images - origin
    size = jnp.abs(offset)
    room = jnp.where(offset > 0, 1 - origin, origin)
    kept = lambda t: jnp.clip(size - t, 0, room)
    length = lambda x: jnp.sum(x, axis=(1, 2, 3), keepdims=True)

    def halve(_, bounds):
      low, high = bounds
      middle = (low + high) / 2
      fits = length(kept(middle)) <= self.epsilon
      return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    low = jnp.zeros_like(length(size))
    high = jnp.max(size, axis=(1, 2, 3), keepdims=True)
    # 30 halvings reach the float's resolution; the upper end is inside the ball.
    _, threshold = jax.lax.fori_loop(0, 30, halve, (low, high))
    threshold = jnp.where(length(kept(low)) <= self.epsilon, low, threshold)
    return jnp.clip(origin + jnp.sign(offset) * kept(threshold), 0, 1)

  @staticmethod
  def steepest(gradient: jax.Array, share: float = 0.05) -> jax.Array:
    """A step of size 1 in this norm, along the signs of the largest gradients.

    The steepest step would change one value only, which takes too many steps; this
    one changes a share of them (as the SLIDE attack of Tramer and Boneh 2019).

    Args:
      gradient: [B, H, W, C].
      share: of the values of an image that move.

    Returns:
      [B, H, W, C] whose absolute values sum to 1, or 0 where the gradient is 0.
    """
    size = jnp.abs(gradient)
    count = max(int(share * size[0].size), 1)
    moved = (size >= kth_largest(size, jnp.full(len(size), count))) & (size > 0)
    total = jnp.sum(moved, axis=(1, 2, 3), keepdims=True)
    return jnp.where(moved, jnp.sign(gradient), 0) / jnp.maximum(total, 1)

  @staticmethod
  def distance(images: jax.Array, origin: jax.Array) -> jax.Array:
    """Distance of each image from its origin.

    Args:
      images, origin: [B, H, W, C].

    Returns:
      [B], in pixel values.
    """
    return jnp.sum(jnp.abs(images - origin), axis=(1, 2, 3))


Ball = Linf | L2 | L1

_BALLS: dict[str, type[Ball]] = {'linf': Linf, 'l2': L2, 'l1': L1}


def get(name: str, epsilon: float) -> Ball:
  """The ball of a config.

  Args:
    name: 'linf', 'l2' or 'l1'.
    epsilon: in pixel values of [0, 1], above 0.

  Raises:
    UserError: for another name, or an epsilon that cannot be meant.
  """
  if name not in _BALLS:
    raise UserError(f'norm {name!r} is unknown: use one of {", ".join(_BALLS)}')
  attack.check_epsilon(name, epsilon, 'epsilon')
  return _BALLS[name](float(epsilon))


def kth_largest(x: jax.Array, k: jax.Array) -> jax.Array:
  """The k-th largest value of each image, without a sort, which is slow on CPU.

  Args:
    x: [B, H, W, C], float of any precision, at least 0.
    k: int [B], from 1 to H W C.

  Returns:
    [B, 1, 1, 1], values of `x`.
  """
  # Floats that are not negative are ordered as their bits: fix these from the top.
  width = jnp.finfo(x.dtype).bits
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'int{width}'))
  k = k[:, None, None, None]

  def fix(i, found):
    candidate = found | jnp.left_shift(jnp.ones_like(found), width - 2 - i)
    enough = jnp.sum(bits >= candidate, axis=(1, 2, 3), keepdims=True) >= k
    return jnp.where(enough, candidate, found)

  start = jnp.zeros((len(x), 1, 1, 1), bits.dtype)
  found = jax.lax.fori_loop(0, width - 1, fix, start)
  return jax.lax.bitcast_convert_type(found, x.dtype)


def _length(x: jax.Array) -> jax.Array:
  """Euclidean length of each image, [B, 1, 1, 1]."""
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3), keepdims=True))
