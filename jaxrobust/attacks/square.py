"""The Square Attack: random search with square windows, without gradients.

Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a query-efficient black-box
adversarial attack via random search" (ECCV 2020): the black-box attack of AutoAttack.
It sees the network's outputs only, so that it finds images on networks whose gradients
mislead the other attacks. Each query changes one window of the best image so far and
keeps the change if the margin rises; the windows shrink as the queries go on.

A network that rounds its input has no gradient, yet falls:

>>> import jax
>>> import jax.numpy as jnp
>>> from jaxrobust.attacks import norms, objectives, square
>>> weights = jax.random.normal(jax.random.key(0), (64, 3))
>>> logits_fn = lambda images: jnp.round(images * 10).reshape(-1, 64) @ weights
>>> images = jax.random.uniform(jax.random.key(1), (8, 8, 8, 1))
>>> labels = logits_fn(images).argmax(axis=-1)
>>> attack = square.Square(norms.Linf(0.4), num_queries=1000)
>>> rngs = jax.random.split(jax.random.key(2), 8)
>>> adversarial = attack(logits_fn, rngs, images, labels)
>>> bool((logits_fn(adversarial).argmax(axis=-1) != labels).all())
True
>>> bool((attack.ball.distance(adversarial, images) <= 0.4 + 1e-6).all())
True

How many queries each image withstood:

>>> _, queries = attack.search(logits_fn, rngs, images, labels)
>>> bool((queries >= 1).all() and (queries < 1000).all())
True

The defaults are those of AutoAttack's standard version: 5000 queries, p_init 0.8, one
restart. As there, the windows shrink after the same numbers of queries however many
there are: the schedule of the paper's 10,000 queries is not squeezed into fewer.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import attack, norms, objectives

# Queries after which the windows' share of the image halves.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

# The exponent q of the norm (sum |x|^q)^(1/q), and the power with which a window's
# pattern, eta, fades from its middles.
_EXPONENTS = {norms.L2: (2, 2), norms.L1: (1, 4)}

# Keeps a norm of 0 from dividing, as published.
_TINY = 1e-12


class _State(NamedTuple):
  """The search so far."""

  turn: jax.Array  # 0 for the image, 1 for the start, then the windows
  images: jax.Array  # [B, H, W, C], the best
  margins: jax.Array  # [B], theirs
  queries: jax.Array  # int [B], made while the image stood


@dataclasses.dataclass(frozen=True)
class Square(attack.Attack):
  """Changes random windows of an image and keeps what raises the margin.

  Attributes:
    ball: where images may go.
    num_queries: windows tried after the start; at least 1.
    p_init: share of the image that the first windows cover, in (0, 1].
    restarts: random starts, one an attempt.
  """

  ball: norms.Ball
  num_queries: int = 5000
  p_init: float = 0.8
  restarts: int = 1

  @property
  def turns(self) -> int:
    return self.num_queries + 2

  def num_attempts(self, num_classes: int) -> int:
    """The restarts."""
    del num_classes
    return self.restarts

  def attempt(
    self,
    logits_fn: attack.LogitsFn,
    rngs: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    index: int | jax.Array,
  ) -> jax.Array:
    """One restart on every image of a batch: the images of `search`."""
    del index
    return self.search(logits_fn, rngs, images, labels)[0]

  def search(
    self,
    logits_fn: attack.LogitsFn,
    rngs: jax.Array,
    images: jax.Array,
    labels: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """One restart, and what it took.

    Each image is left as it is from its first misclassified query on; the loop ends
    when there are no others.

    Args:
      logits_fn: images [B, H, W, C] in [0, 1] → logits [B, K].
      rngs: keys [B], one an image.
      images: [B, H, W, C] in [0, 1], float.
      labels: int [B] in [0, K).

    Returns:
      Images [B, H, W, C], in the ball and in [0, 1], with the highest margin that was
      seen; queries int [B] as the published code counts them: 0 for an image that is
      misclassified from the beginning, 1 if the start does it, and
      num_queries + 1, the start and all windows, if none does.
    """
    sizes = jnp.asarray(self._sizes(*images.shape[1:3]))
    # Deviation: an image stands until its margin is above 0, not from 0 on: at a tie
    # the prediction may still be the label, and a search that ends there is lost.
    margin = lambda x: objectives.margin(logits_fn(x), labels)
    # Deviation: windows and patterns are drawn for each image, where the published
    # code draws one for all images of a batch: a result depends on its own image only.
    keys = lambda query: jax.vmap(lambda rng: jax.random.fold_in(rng, query))(rngs)
    start, move = _linf_start, _linf_move
    if not isinstance(self.ball, norms.Linf):
      start, move = _eta_start, _eta_move
    start = jax.vmap(functools.partial(start, self.ball))
    move = jax.vmap(functools.partial(move, self.ball), in_axes=(0, 0, 0, None))

    inside = lambda x: self.ball.project(x.astype(images.dtype), images)

    def proceed(state):
      # Of the image itself, of the start, and of a window a turn: one call of the
      # network, which is then compiled once.
      found = jax.lax.switch(
        jnp.minimum(state.turn, 2),
        (
          lambda: images,
          lambda: inside(start(keys(0), images)),
          lambda: inside(
            move(keys(state.turn - 1), images, state.images, sizes[state.turn - 2])
          ),
        ),
      )
      margins = margin(found)
      stands = state.margins <= 0
      better = stands & ((state.turn < 2) | (margins > state.margins))
      return _State(
        state.turn + 1,
        jnp.where(better[:, None, None, None], found, state.images),
        jnp.where(better, margins, state.margins),
        state.queries + (stands & (state.turn > 0)),
      )

    def goes_on(state):
      return (state.turn < self.num_queries + 2) & jnp.any(state.margins <= 0)

    margin_type = jax.eval_shape(margin, images).dtype
    state = _State(
      jnp.array(0),
      images,
      jnp.full(len(images), -jnp.inf, margin_type),
      jnp.zeros(len(images), jnp.int32),
    )
    state = jax.lax.while_loop(goes_on, proceed, state)
    return jax.lax.stop_gradient(state.images), state.queries

  def _sizes(self, height: int, width: int) -> np.ndarray:
    """Side of the window of each query, int [num_queries]."""
    queries = np.arange(self.num_queries)
    share = self.p_init / 2.0 ** np.searchsorted(_HALVINGS, queries)
    sides = np.round(np.sqrt(share * height * width)).astype(np.int32)
    if isinstance(self.ball, norms.Linf):
      sides = np.maximum(sides, 1)
    else:
      # Odd, so that a pattern has a middle.
      sides = np.maximum(sides, 3) // 2 * 2 + 1
    return np.minimum(sides, min(height, width))


def _linf_start(ball, rng, image):
  """One image [H, W, C] with vertical stripes of -epsilon and epsilon."""
  stripes = jax.random.rademacher(rng, (1, *image.shape[1:]), image.dtype)
  return image + ball.epsilon * stripes


def _linf_move(ball, rng, image, best, size):
  """The best image so far with a window at -epsilon or epsilon, by channel."""
  draws = jax.random.uniform(rng, (2 + image.shape[-1],))
  window = _inside(*_places(draws[:2], size, image.shape), size)
  return jnp.where(window, image + ball.epsilon * _signs(draws[2:]), best)


def _eta_start(ball, rng, image):
  """One image [H, W, C] with a pattern on each tile of a fifth of its height."""
  height, width, channels = image.shape
  # Deviation: images less than 5 high get tiles of one pixel, and tiles are cut at the
  # image's edge; the published code fails on such sizes.
  size = max(height // 5, 1)
  border = max(height - 5 * size, 0) // 2
  tiles = (height // size, width // size)
  draws = jax.random.uniform(rng, (*tiles, 1 + channels))
  draws = draws.repeat(size, axis=0).repeat(size, axis=1)
  places = jnp.arange(size)
  eta = _eta(_EXPONENTS[type(ball)], places, places, size, turned=False)
  spread = lambda tile: jnp.tile(tile, tiles)[..., None]
  pattern = jnp.where(draws[..., :1] < 0.5, spread(eta), spread(eta.T))
  pattern = jnp.pad(
    pattern * _signs(draws[..., 1:]), ((border, height), (border, width), (0, 0))
  )
  return image + _scale(ball, pattern[:height, :width])


def _eta_move(ball, rng, image, best, size):
  """The best image so far with one window emptied and a pattern added to another.

  The pattern and what the other window held are weighed equally in each channel, and
  get the norm that both windows had there and a share of what the ball has left.
  """
  q, _ = exponents = _EXPONENTS[type(ball)]
  channels = image.shape[-1]
  draws = jax.random.uniform(rng, (5 + channels,))
  places = _places(draws[:2], size, image.shape)
  window = _inside(*places, size)
  emptied = _inside(*_places(draws[2:4], size, image.shape), size)
  eta = _eta(exponents, *places, size, turned=draws[4] < 0.5)

  offset = best - image
  mass = jnp.abs(offset) ** q
  total = lambda x, where: jnp.sum(jnp.where(where, x, 0), axis=(0, 1), keepdims=True)
  left = jnp.maximum(ball.epsilon**q - jnp.sum(mass), 0)
  wanted = (left / channels + total(mass, window | emptied)) ** (1 / q)
  if isinstance(ball, norms.L1):
    wanted *= channels  # As published; the projection takes it back.
  held = offset / (total(mass, window) ** (1 / q) + _TINY)
  added = eta[..., None] * _signs(draws[5:]) + held
  added *= wanted / (total(jnp.abs(added) ** q, window) ** (1 / q) + _TINY)
  offset = jnp.where(window, added, jnp.where(emptied, 0, offset))
  return image + _scale(ball, offset)


def _scale(ball, offset):
  """An offset [H, W, C] of length epsilon; one in l1, which is projected, as it is."""
  if isinstance(ball, norms.L1):
    return offset
  return offset * ball.epsilon / (jnp.sqrt(jnp.sum(jnp.square(offset))) + _TINY)


def _eta(exponents, rows, columns, size, turned):
  """The pattern of a window: a bump and a pit beside each other, of norm 1.

  Either half of a window has a middle, round which squares of the sides 1, 3, 5, …
  lie on each other with the heights 1, 1 / 2^power, 1 / 3^power, … down to 0 outside.

  Args:
    exponents: (q, power).
    rows, columns: int [H] and [W], places relative to the window's corner.
    size: the window's side; may be traced.
    turned: whether the halves lie side by side rather than one above the other.

  Returns:
    [H, W].
  """
  q, power = exponents
  # A value is the sum of terms 1 / n^power from its distance from the middle to the
  # outermost square: a difference of two sums from the far end, which keeps the
  # smallest accurate.
  terms = 1.0 / np.arange(1, max(len(rows), len(columns)) // 2 + 2) ** power
  sums = jnp.asarray(np.append(np.cumsum(terms[::-1])[::-1], 0), jnp.float32)
  last = size // 2 + 1
  half = size // 2

  def profile(places, middle):
    distance = jnp.minimum(jnp.abs(places - middle), last)
    inside = (places >= 0) & (places < size)
    return jnp.where(inside, sums[distance] - sums[last], 0)

  def halved(places):
    lower = half + (size - half) // 2
    return profile(places, jnp.where(places < half, half // 2, lower))

  # The distance is the larger of those along the axes, and terms fall with it.
  down = jnp.where(turned, profile(rows, half), halved(rows))
  across = jnp.where(turned, halved(columns), profile(columns, half))
  height = jnp.minimum(down[:, None], across[None])
  first = jnp.where(turned, columns[None] < half, rows[:, None] < half)
  mass = height**q
  upper = jnp.sum(jnp.where(first, mass, 0))
  lower = jnp.sum(jnp.where(first, 0, mass))
  # A window of one pixel has no first half.
  share = jnp.where(size > 1, 0.5, 1)
  weight = jnp.where(first, share / jnp.maximum(upper, _TINY), share / lower)
  sign = jnp.where(first, 1, -1)
  return sign * height * weight ** (1 / q)


def _places(draws, size, shape) -> tuple[jax.Array, jax.Array]:
  """Rows [H] and columns [W] relative to the corner of a window at random.

  Windows never reach the last row and column, as published, unless they fill them.
  """
  height, width, _ = shape
  top = jnp.floor(draws[0] * (height - size)).astype(jnp.int32)
  left = jnp.floor(draws[1] * (width - size)).astype(jnp.int32)
  return jnp.arange(height) - top, jnp.arange(width) - left


def _inside(rows, columns, size):
  """Whether a pixel lies in a window, [H, W, 1]."""
  row, column = (rows >= 0) & (rows < size), (columns >= 0) & (columns < size)
  return (row[:, None] & column[None])[..., None]


def _signs(draws):
  """Signs from uniform draws [..., C], of an image's rank: [..., 1, 1, C]."""
  signs = jnp.where(draws < 0.5, -1, 1)
  return signs if signs.ndim == 3 else signs[None, None]
