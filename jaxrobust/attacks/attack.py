"""What the attacks of a suite have in common: attempts, of which the worst counts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrobust.attacks import objectives

# Images [B, H, W, C] in [0, 1] → logits [B, K]; of a randomised network (images, rng).
LogitsFn = Callable[..., jax.Array]


class Attack:
  """Looks, in one attempt after another, for images that are misclassified.

  An attempt is a random start, a target class, or both. Suites run an attempt on the
  images that still stand after the one before; calling the attack runs all of them.
  A randomised network takes `(images, rng)` in place of `images`. Compiled for balls of
  any size, an attack finds a traced number in `ball.epsilon`.
  """

  @property
  def randomized(self) -> bool:
    """Whether `logits_fn` takes a key beside the images."""
    return False

  @property
  def turns(self) -> int:
    """How often an attempt's loop turns at most, if it may stop before; for plans."""
    return 1

  def num_attempts(self, num_classes: int) -> int:
    """How many attempts there are for a network of so many classes."""
    raise NotImplementedError

  def attempt(
    self,
    logits_fn: LogitsFn,
    rngs: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    index: int | jax.Array,
  ) -> jax.Array:
    """One attempt on every image of a batch; each image by itself.

    Args:
      logits_fn: images [B, H, W, C] in [0, 1] → logits [B, K].
      rngs: keys [B], of this attempt, one an image.
      images: [B, H, W, C] in [0, 1], float.
      labels: int [B] in [0, K).
      index: which attempt, from 0; may be traced.

    Returns:
      Images [B, H, W, C] in the ball and in [0, 1], misclassified if it succeeded.
    """
    raise NotImplementedError

  def remark(self, num_classes: int) -> str:
    """What changes because the network has so few classes; empty if nothing."""
    del num_classes
    return ''

  def __call__(
    self, logits_fn: LogitsFn, rngs: jax.Array, images: jax.Array, labels: jax.Array
  ) -> jax.Array:
    """All attempts on a batch.

    Args:
      logits_fn: images [B, H, W, C] in [0, 1] → logits [B, K].
      rngs: keys [B], one an image.
      images: [B, H, W, C] in [0, 1], float.
      labels: int [B] in [0, K).

    Returns:
      Images [B, H, W, C] in the ball and in [0, 1]: of each the attempt with the
      highest margin of another class.
    """
    images = jax.lax.stop_gradient(images)

    def margin(x):
      logits = logits_fn(x, rngs[0]) if self.randomized else logits_fn(x)
      return objectives.margin(logits, labels)

    def further(index, best):
      kept, highest = best
      found = self.attempt(logits_fn, attempt_keys(rngs, index), images, labels, index)
      margins = margin(found)
      better = margins > highest
      return (
        jnp.where(better[:, None, None, None], found, kept),
        jnp.where(better, margins, highest),
      )

    first = margin(images)
    classes = num_classes(logits_fn, images, self.randomized)
    found = jax.lax.fori_loop(0, self.num_attempts(classes), further, (images, first))
    return jax.lax.stop_gradient(found[0])


def attempt_keys(rngs: jax.Array, index: int | jax.Array) -> jax.Array:
  """The keys [B] of one attempt, from those of the attack."""
  return jax.vmap(lambda rng: jax.random.fold_in(rng, index))(rngs)


def num_classes(
  logits_fn: LogitsFn, images: jax.Array, randomized: bool = False
) -> int:
  """K of the logits [B, K], without computing them."""
  arguments = (images, jax.random.key(0)) if randomized else (images,)
  return jax.eval_shape(logits_fn, *arguments).shape[-1]
