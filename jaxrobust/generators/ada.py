"""Adaptive augmentation of what a discriminator sees (Karras et al. 2020).

Real and generated images alike are changed at random before the discriminator sees
them, each operation with one probability. That follows how surely the discriminator
knows real images: it rises while it overfits. Below a probability of about 0.8 what the
generator learns is not augmented, except by operations that are undone by no other:
leave out those that change what an image shows, as a mirrored digit.

All geometric operations are one affine map, by a lookup at twice the resolution; those
of colour are one affine map of channels.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.generators import resampling

# The orthogonal wavelet sym6 (Daubechies 1992), low pass.
_LOW_PASS = np.array(
  [
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057),
    *(-0.048311742585633, 0.4910559419267466, 0.787641141030194),
    *(0.3379294217276218, -0.07263752278646252, -0.021060292512300564),
    *(0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
  ]
)
_MARGIN = len(_LOW_PASS) // 4  # pixels that its tails reach beyond the image
_AXIS = np.full(3, 3**-0.5)  # of grey


class _Operation(NamedTuple):
  """One of them.

  Attributes:
    draw: `rng -> parameters`.
    matrix: of the affine map by parameters and the image's (height, width): from
      pixels of the result to those of the image, about its centre (x, y, 1), or from
      the colour before to that after (red, green, blue, 1).
    chance: `probability -> that of this operation`.
    in_colour: whether it needs three channels.
  """

  draw: Callable
  matrix: Callable
  chance: Callable = lambda probability: probability
  in_colour: bool = False


def _scale(x, y):
  return jnp.diag(jnp.stack([x, y, jnp.ones_like(x)]))


def _turn(angle):
  """Of what is looked up; the image turns the other way, counter-clockwise."""
  c, s, zero, one = jnp.cos(angle), jnp.sin(angle), 0 * angle, 1 + 0 * angle
  return jnp.array([[c, -s, zero], [s, c, zero], [zero, zero, one]])


def _shift(x, y):
  """What is shown moves right by x and down by y."""
  return jnp.eye(3).at[:2, 2].set(-jnp.stack([x, y]))


def _whole_shift(shares, size):
  return _shift(jnp.round(shares[0] * size[1]), jnp.round(shares[1] * size[0]))


def _about_grey(along, across, offset=0.0):
  """Factors along the axis of grey and, a matrix or a number, across it."""
  project = jnp.outer(_AXIS, _AXIS)
  rest = jnp.eye(3) - project
  across = across @ rest if jnp.ndim(across) else across * rest
  linear = along * project + across
  return jnp.eye(4).at[:3, :3].set(linear).at[:3, 3].set(offset)


def _hue(angle):
  """Rotation about the axis of grey."""
  x, y, z = _AXIS
  cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
  return _about_grey(1.0, jnp.cos(angle) * jnp.eye(3) + jnp.sin(angle) * cross)


def _normal(deviation, shape=()):
  return lambda rng: deviation * jax.random.normal(rng, shape)


def _uniform(limit, shape=()):
  return lambda rng: jax.random.uniform(rng, shape, minval=-limit, maxval=limit)


def _integer(count):
  return lambda rng: jax.random.randint(rng, (), 0, count).astype(jnp.float32)


# Of two rotations, one of which comes with probability p.
_of_two = lambda p: 1 - jnp.sqrt(jnp.clip(1 - p, 0, 1))
_ROTATION = _Operation(_uniform(math.pi), lambda angle, size: _turn(angle), _of_two)

GEOMETRY = {
  'flip': _Operation(_integer(2), lambda i, size: _scale(1 - 2 * i, jnp.ones_like(i))),
  'quarter-turns': _Operation(_integer(4), lambda i, size: _turn(i * math.pi / 2)),
  'whole-shifts': _Operation(_uniform(1 / 8, (2,)), _whole_shift),
  'scale': _Operation(_normal(0.2), lambda x, size: _scale(2**-x, 2**-x)),
  'rotation': _ROTATION,
  'stretch': _Operation(_normal(0.2), lambda x, size: _scale(2**-x, 2**x)),
  'second-rotation': _ROTATION,
  'shifts': _Operation(
    _normal(1 / 8, (2,)), lambda x, size: _shift(x[0] * size[1], x[1] * size[0])
  ),
}
COLOUR = {
  'brightness': _Operation(_normal(0.2), lambda x: _about_grey(1.0, 1.0, x)),
  'contrast': _Operation(_normal(0.5), lambda x: _about_grey(2**x, 2**x)),
  'luma-flip': _Operation(_integer(2), lambda i: _about_grey(1 - 2 * i, 1.0)),
  'hue': _Operation(_uniform(math.pi), _hue, in_colour=True),
  'saturation': _Operation(
    _normal(1.0), lambda x: _about_grey(1.0, 2**x), in_colour=True
  ),
}
OPERATIONS = (*GEOMETRY, *COLOUR)
_TURNING = ('flip', 'quarter-turns', 'rotation', 'second-rotation')
KINDS = {
  'none': (),
  'bgc': OPERATIONS,  # that of the paper
  'upright': tuple(name for name in OPERATIONS if name not in _TURNING),
}


def augment(
  images: jax.Array,
  probability: jax.Array | float,
  rngs: jax.Array,
  operations: tuple[str, ...] = OPERATIONS,
) -> jax.Array:
  """Changes images at random; differentiable in them, any number of times.

  Deviation: theirs pads by what the images of a batch need; here, where shapes are
  static, by their limit, the size less a pixel.

  Args:
    images: float [b, H, W, C], of about [-1, 1], C 1 or 3.
    probability: of each operation, [].
    rngs: keys [b]: an image depends on its own only.
    operations: of `OPERATIONS`, in whose order they come.

  Returns:
    [b, H, W, C], not clipped; the image itself (by rounding) where probability is 0.
  """
  size, channels = images.shape[1:3], images.shape[-1]
  chosen = [name for name in OPERATIONS if name in operations]
  if channels == 1:
    chosen = [x for x in chosen if x not in COLOUR or not COLOUR[x].in_colour]
  draw = lambda name, rng, *given: _draw(name, rng, probability, *given)
  geometry = [name for name in chosen if name in GEOMETRY]
  if geometry:
    maps = lambda rng: [draw(name, rng, size) for name in geometry]
    product = lambda rng: functools.reduce(jnp.matmul, maps(rng))
    images = warp(images, jax.vmap(product)(rngs))
  colour = [name for name in chosen if name in COLOUR]
  if colour:
    maps = lambda rng: [draw(name, rng) for name in reversed(colour)]
    product = lambda rng: functools.reduce(jnp.matmul, maps(rng))
    images = recolour(images, jax.vmap(product)(rngs))
  return images


def _draw(name, rng, probability, *given):
  """The matrix of an operation, or that of none; a key gives each its own draws."""
  operation = {**GEOMETRY, **COLOUR}[name]
  whether, value = jax.random.split(jax.random.fold_in(rng, OPERATIONS.index(name)))
  matrix = operation.matrix(operation.draw(value), *given)
  comes = jax.random.bernoulli(whether, operation.chance(probability))
  return jnp.where(comes, matrix, jnp.eye(len(matrix)))


def warp(images: jax.Array, maps: jax.Array) -> jax.Array:
  """Looks each image up at the places that an affine map says.

  It is continued by reflection, up to three sizes wide; black, 0, is beyond that.

  Args:
    images: [b, H, W, C].
    maps: [b, 3, 3], of (x, y, 1) from the image's centre, in pixels.

  Returns:
    [b, H, W, C].
  """
  height, width = images.shape[1:3]
  fine = resampling.resample(images, *map(_to_fine, (height, width)))
  # Where the fine pixels of the result and its margin are, in pixels from the centre:
  # the first of the two that a pixel becomes is at its own place.
  ys, xs = (
    (np.arange(2 * size) - size + 1) / 2
    for size in (height + 2 * _MARGIN, width + 2 * _MARGIN)
  )
  grid = np.stack([*np.meshgrid(xs, ys), np.ones((len(ys), len(xs)))]).reshape(3, -1)
  places = jnp.einsum(
    'bij,jn->bin',
    maps[:, :2],
    jnp.asarray(grid, maps.dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  found = _lookup(fine, places)
  found = found.reshape(len(images), len(ys), len(xs), -1)
  return resampling.resample(found, *map(_from_fine, (height, width)))


def _to_fine(size):
  """Reflects beyond both edges and doubles the resolution: [2 (3 size - 2), size]."""
  reflected = np.pad(np.arange(size), size - 1, mode='reflect')
  taps = 2 * _LOW_PASS / _LOW_PASS.sum()
  up = resampling.matrix(len(reflected), taps, up=2, pads=(6, 5))
  return up @ np.eye(size)[reflected]


def _from_fine(size):
  """Halves the resolution and cuts the margin off: [size, 2 (size + 2 margin)]."""
  taps = _LOW_PASS[::-1] / _LOW_PASS.sum()
  return resampling.matrix(2 * (size + 2 * _MARGIN), taps, down=2, pads=(-1, -1))


def _lookup(fine, places):
  """Bilinear, at places [b, 2, n], x and y in pixels from the centre: [b, n, C]."""
  batch, height, width, channels = fine.shape
  rows = fine.reshape(batch, height * width, channels)
  x = 2 * places[:, 0] + width / 2 - 1
  y = 2 * places[:, 1] + height / 2 - 1
  left, top = jnp.floor(x), jnp.floor(y)
  total = 0.0
  for dx in (0, 1):
    for dy in (0, 1):
      column, row = left + dx, top + dy
      weight = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
      inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
      weight = jnp.where(inside, weight, 0.0).astype(fine.dtype)
      clip = lambda value, size: jnp.clip(value, 0, size - 1).astype(jnp.int32)
      index = clip(row, height) * width + clip(column, width)
      values = jnp.take_along_axis(
        rows, index[:, :, None], axis=1, mode='promise_in_bounds'
      )
      total += weight[:, :, None] * values
  return total


def recolour(images: jax.Array, maps: jax.Array) -> jax.Array:
  """Images [b, H, W, C] by affine maps of their colours, [b, 4, 4].

  Of a single channel the map is the mean of what becomes of the three of grey.
  """
  maps = maps.astype(images.dtype)
  if images.shape[-1] == 1:
    mean = jnp.mean(maps[:, :3], 1)
    scale, offset = jnp.sum(mean[:, :3], -1), mean[:, 3]
    return images * scale[:, None, None, None] + offset[:, None, None, None]
  changed = jnp.einsum(
    'bij,bhwj->bhwi', maps[:, :3, :3], images, precision=jax.lax.Precision.HIGHEST
  )
  return changed + maps[:, None, None, :3, 3]


def adapted(
  probability: jax.Array, sign: jax.Array, target: float, share: float
) -> jax.Array:
  """The probability after some images; it has no upper limit, as in their code.

  Args:
    probability: before.
    sign: mean sign of D's logits of real images, augmented.
    target: that it is kept at, 0.6 by default.
    share: of the images in which the probability may rise by 1, how many were shown.
  """
  return jnp.maximum(probability + jnp.sign(sign - target) * share, 0.0)
