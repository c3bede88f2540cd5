"""Augmentation of which the network learns, so that no sample looks augmented.

Each image is changed at random, and nine numbers say how; where they are 0, as they are
when samples are drawn, the network has learned the images as they are. Source: Karras
et al. 2022, appendix F.2.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrobust.generators import ada

_SCALE = 0.2  # standard deviation of the binary logarithm of sizes
_SHIFT = 0.125  # the same of shifts, as a share of the size


def augment(
  images: jax.Array, rngs: jax.Array, *, probability: float, flip: bool
) -> tuple[jax.Array, jax.Array]:
  """Changes images at random.

  Args:
    images: float [B, H, W, C] in [-1, 1].
    rngs: keys [B], one an image.
    probability: of each change but the horizontal flip.
    flip: whether half of the images are flipped horizontally.

  Returns:
    (images [B, H, W, C], not clipped, labels [B, 9]: 1 for a horizontal flip, 1 for a
    vertical one, the normal number of the scale, cosine less 1 and sine of the
    rotation, cosine and sine of the direction of the stretch times its normal number,
    and the two normal numbers of the shift; 0 for what was not done).
  """
  changes = jax.vmap(lambda rng: _draw(rng, probability, flip))(rngs)
  mirrored, inverted = (x[:, None, None, None] for x in changes.flips.T)
  images = jnp.where(mirrored, images[:, :, ::-1], images)
  images = jnp.where(inverted, images[:, ::-1], images)
  if probability:
    maps = jax.vmap(lambda x: _map(x, images.shape[1:3]))(changes)
    images = ada.warp(images, maps)
  return images, jax.vmap(_labels)(changes)


class _Changes(NamedTuple):
  """Of an image: numbers are 0 for what is not done.

  Attributes:
    flips: horizontal and vertical, bool [2].
    scale, stretch: normal numbers.
    angle, direction: of rotation and stretch.
    shift: normal numbers of x and y.
  """

  flips: jax.Array
  scale: jax.Array
  angle: jax.Array
  stretch: jax.Array
  direction: jax.Array
  shift: jax.Array


def _draw(rng, probability, flip) -> _Changes:
  """Draws what is done to an image."""
  rngs = iter(jax.random.split(rng, 13))

  def perhaps(value, share=probability):
    return jnp.where(jax.random.uniform(next(rngs)) < share, value, 0)

  normal = lambda shape=(): jax.random.normal(next(rngs), shape)
  angle = lambda: jax.random.uniform(next(rngs), minval=-math.pi, maxval=math.pi)
  return _Changes(
    flips=jnp.stack(
      [
        perhaps(flip, 0.5).astype(bool),
        perhaps(jax.random.bernoulli(next(rngs))),
      ]
    ),
    scale=perhaps(normal()),
    angle=perhaps(angle()),
    stretch=perhaps(normal()),
    direction=perhaps(angle(), 0.5),
    shift=perhaps(normal((2,))),
  )


def _map(changes: _Changes, size) -> jax.Array:
  """Where each pixel of the result is looked up: [3, 3], of (x, y, 1), from the centre.

  Args:
    changes: of an image.
    size: its height and width.
  """
  scale, stretch = (2.0 ** (-_SCALE * x) for x in (changes.scale, changes.stretch))
  along = _turn(changes.direction)
  shift = -_SHIFT * changes.shift * jnp.array(size[::-1])
  linear = scale * _turn(changes.angle) @ along.T
  linear = linear @ jnp.diag(jnp.stack([stretch, 1 / stretch])) @ along
  moved = jnp.concatenate([linear, (linear @ shift)[:, None]], 1)
  return jnp.concatenate([moved, jnp.array([[0.0, 0.0, 1.0]])])


def _turn(angle):
  c, s = jnp.cos(angle), jnp.sin(angle)
  return jnp.array([[c, -s], [s, c]])


def _labels(changes: _Changes) -> jax.Array:
  """What the network is shown."""
  directions = jnp.cos(changes.direction), jnp.sin(changes.direction)
  return jnp.stack(
    [
      *changes.flips.astype(jnp.float32),
      changes.scale,
      jnp.cos(changes.angle) - 1,
      jnp.sin(changes.angle),
      *(changes.stretch * x for x in directions),
      *changes.shift,
    ]
  )
