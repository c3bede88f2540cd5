"""RandAugment and AutoAugment on the device: random chains of image operations.

Each operation gives what PIL's namesake gives for the same uint8 image, so that
policies found with PIL mean the same here. Magnitudes run from 0 to 1 and mean what
they do in AutoAugment's released code for CIFAR-10, for both policies:

  shear_x shear_y           up to 0.3 pixels a pixel, either way
  translate_x translate_y   up to 10 / 32 of the side, either way
  rotate                    up to 30 degrees, either way
  solarize                  inverts values from 256 down to 0
  posterize                 keeps 8 down to 4 bits
  color contrast brightness sharpness   PIL's factor, 0.1 to 1.9: 1/2 changes nothing

Deviation: the released code keeps 4 bits down to 0; here posterize is as in the paper.
It cuts shifts off to whole pixels; here the nearest pixel is taken. Where an image was
moved away, `fill` is left. (Other libraries count the four factors from 1, up or down:
there 1/2 is not idle.)

Every operation is computed for every image and one is kept, since images of a batch
draw different ones: so they share one gather, one blend and one histogram.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Those of RandAugment, in the order of its paper, and one of AutoAugment's own.
OPERATIONS = (
  'identity',
  'autocontrast',
  'equalize',
  'rotate',
  'solarize',
  'color',
  'posterize',
  'contrast',
  'brightness',
  'sharpness',
  'shear_x',
  'shear_y',
  'translate_x',
  'translate_y',
  'invert',
)
NUM_RANDAUGMENT = 14

_BLENDS = ('color', 'contrast', 'brightness', 'sharpness')
_MOVES = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')

# Name, probability and magnitude in tenths of both operations of each sub-policy; the
# magnitude of autocontrast, equalize and invert means nothing.
CIFAR10_POLICY = (
  (('invert', 0.1, 0), ('contrast', 0.2, 6)),
  (('rotate', 0.7, 2), ('translate_x', 0.3, 9)),
  (('sharpness', 0.8, 1), ('sharpness', 0.9, 3)),
  (('shear_y', 0.5, 8), ('translate_y', 0.7, 9)),
  (('autocontrast', 0.5, 0), ('equalize', 0.9, 0)),
  (('shear_y', 0.2, 7), ('posterize', 0.3, 7)),
  (('color', 0.4, 3), ('brightness', 0.6, 7)),
  (('sharpness', 0.3, 9), ('brightness', 0.7, 9)),
  (('equalize', 0.6, 0), ('equalize', 0.5, 0)),
  (('contrast', 0.6, 7), ('sharpness', 0.6, 5)),
  (('color', 0.7, 7), ('translate_x', 0.5, 8)),
  (('equalize', 0.3, 0), ('autocontrast', 0.4, 0)),
  (('translate_y', 0.4, 3), ('sharpness', 0.2, 6)),
  (('brightness', 0.9, 6), ('color', 0.2, 8)),
  (('solarize', 0.5, 2), ('invert', 0.0, 0)),
  (('equalize', 0.2, 0), ('autocontrast', 0.6, 0)),
  (('equalize', 0.2, 0), ('equalize', 0.6, 0)),
  (('color', 0.9, 9), ('equalize', 0.6, 0)),
  (('autocontrast', 0.8, 0), ('solarize', 0.2, 8)),
  (('brightness', 0.1, 3), ('color', 0.7, 0)),
  (('solarize', 0.4, 5), ('autocontrast', 0.9, 0)),
  (('translate_y', 0.9, 9), ('translate_y', 0.7, 9)),
  (('autocontrast', 0.9, 0), ('solarize', 0.8, 3)),
  (('equalize', 0.8, 0), ('invert', 0.1, 0)),
  (('translate_y', 0.7, 9), ('autocontrast', 0.9, 0)),
)


def randaugment(
  images: jax.Array,
  rngs: jax.Array,
  *,
  num_operations: int,
  magnitude: float,
  fill: tuple[float, ...],
) -> jax.Array:
  """Applies operations drawn uniformly, with replacement, at one magnitude.

  Source: Cubuk et al. 2020.

  Args:
    images: uint8 [B, H, W, C], of one or three channels.
    rngs: keys [B], one an image.
    num_operations: how many, one after another.
    magnitude: of all operations, in [0, 1].
    fill: value in [0, 1] of each channel where nothing is left.

  Returns:
    uint8 [B, H, W, C].
  """

  def draw(rng):
    operation_rng, sign_rng = jax.random.split(rng)
    shape = (num_operations,)
    operations = jax.random.randint(operation_rng, shape, 0, NUM_RANDAUGMENT)
    return operations, jnp.full(shape, magnitude), _signs(sign_rng, num_operations)

  return _chain(images, jax.vmap(draw)(rngs), fill)


def autoaugment(
  images: jax.Array, rngs: jax.Array, *, fill: tuple[float, ...]
) -> jax.Array:
  """Applies one of the 25 sub-policies found for CIFAR-10, drawn uniformly.

  Source: Cubuk et al. 2019, table of the policy found on reduced CIFAR-10.

  Args:
    images: uint8 [B, H, W, C], of one or three channels.
    rngs: keys [B], one an image.
    fill: value in [0, 1] of each channel where nothing is left.

  Returns:
    uint8 [B, H, W, C].
  """
  column = lambda k, as_number: jnp.array(
    [[as_number(step[k]) for step in steps] for steps in CIFAR10_POLICY]
  )
  operations = column(0, OPERATIONS.index)
  probabilities, magnitudes = column(1, float), column(2, float) / 10

  def draw(rng):
    which_rng, apply_rng, sign_rng = jax.random.split(rng, 3)
    which = jax.random.randint(which_rng, (), 0, len(CIFAR10_POLICY))
    applied = jax.random.bernoulli(apply_rng, probabilities[which])
    operation = jnp.where(applied, operations[which], OPERATIONS.index('identity'))
    return operation, magnitudes[which], _signs(sign_rng, 2)

  return _chain(images, jax.vmap(draw)(rngs), fill)


def transform(
  image: jax.Array,
  operation: jax.Array,
  magnitude: jax.Array,
  sign: jax.Array,
  fill: jax.Array,
) -> jax.Array:
  """Applies one operation to one image.

  Args:
    image: uint8 [H, W, C], of one or three channels.
    operation: int [], an index of `OPERATIONS`.
    magnitude: float [] in [0, 1].
    sign: float [], 1 or -1; the direction of shears, shifts and rotations.
    fill: int [C] in [0, 255], where nothing is left.

  Returns:
    uint8 [H, W, C].
  """
  values = image.astype(jnp.int32)
  lost_bits = jnp.round(4 * magnitude).astype(jnp.int32)
  outcomes = {
    'identity': values,
    'autocontrast': _autocontrast(values),
    'equalize': _equalized(values),
    'solarize': jnp.where(values < 256 - 256 * magnitude, values, 255 - values),
    'posterize': values >> lost_bits << lost_bits,
    'invert': 255 - values,
    'blend': _blended(values, operation, 0.1 + 1.8 * magnitude),
    'move': _moved(values, operation, sign * magnitude, fill),
  }
  kinds = dict.fromkeys(_BLENDS, 'blend') | dict.fromkeys(_MOVES, 'move')
  table = [list(outcomes).index(kinds.get(name, name)) for name in OPERATIONS]
  kept = jax.lax.select_n(jnp.array(table)[operation], *outcomes.values())
  return kept.astype(jnp.uint8)


def _chain(images, draws, fill):
  """Images after their operations, magnitudes and signs, each [B, steps]."""
  fill = jnp.round(255 * jnp.array(fill)).astype(jnp.int32)

  def step(images, drawn):
    transformed: Callable = jax.vmap(transform, (0, 0, 0, 0, None))
    return transformed(images, *drawn, fill), None

  return jax.lax.scan(step, images, jax.tree.map(jnp.transpose, draws))[0]


def _signs(rng, count):
  """1 or -1, float [count]."""
  return jnp.where(jax.random.bernoulli(rng, shape=(count,)), 1.0, -1.0)


def _is(operation, name):
  """Whether an operation is the one of that name, bool []."""
  return operation == OPERATIONS.index(name)


def _autocontrast(values):
  """Stretches each channel to [0, 255]; one of a single value stays."""
  low, high = (f(values, (0, 1), keepdims=True) for f in (jnp.min, jnp.max))
  stretched = (values - low) * 255 // jnp.maximum(high - low, 1)
  return jnp.where(high > low, stretched, values)


def _equalized(values):
  """Flattens each channel's histogram, in PIL's steps of whole counts.

  As in PIL, a channel with fewer than 255 pixels below its brightest value stays: so
  does every image of 8x8.
  """
  height, width, channels = values.shape
  flat = values.reshape(-1, channels)
  bins = jnp.zeros((256, channels), jnp.int32)
  histogram = bins.at[flat, jnp.arange(channels)[None]].add(1)
  brightest = jnp.sum(flat == flat.max(0, keepdims=True), axis=0, keepdims=True)
  step = (height * width - brightest) // 255
  below = jnp.cumsum(histogram, axis=0) - histogram
  table = (step // 2 + below) // jnp.maximum(step, 1)
  found = jnp.take_along_axis(
    jnp.minimum(table, 255), flat, axis=0, mode='promise_in_bounds'
  )
  return jnp.where(step > 0, found, flat).reshape(values.shape)


def _blended(values, operation, factor):
  """Blends from what each enhancer calls factor 0, through the image (1) and beyond."""
  grey = _grey(values)
  mean = jnp.floor(jnp.mean(grey.astype(jnp.float32)) + 0.5).astype(jnp.int32)
  start = jnp.where(
    _is(operation, 'color'),
    grey,
    jnp.where(
      _is(operation, 'sharpness'),
      _smooth(values),
      jnp.where(_is(operation, 'contrast'), mean, 0),
    ),
  )
  # Cut off, not rounded, as in PIL; in integers, so that no compiler rounds otherwise.
  factor = jnp.round(2**15 * factor).astype(jnp.int32)
  return jnp.clip(start + (factor * (values - start) >> 15), 0, 255)


def _grey(values):
  """PIL's luminance, int [H, W, 1]."""
  if values.shape[-1] == 1:
    return values
  weights = jnp.array([19595, 38470, 7471])  # Of 2**16.
  return (jnp.sum(values * weights[None, None], -1, keepdims=True) + 2**15) >> 16


def _smooth(values):
  """The mean of 3x3 pixels, the middle one five times; the border stays, as in PIL."""
  height, width, _ = values.shape
  padded = jnp.pad(values, ((1, 1), (1, 1), (0, 0)))
  total = 4 * values
  for row in range(3):
    for column in range(3):
      total += padded[row : row + height, column : column + width]
  rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
  inside = (rows > 0) & (rows < height - 1) & (columns > 0) & (columns < width - 1)
  return jnp.where(inside, (2 * total + 13) // 26, values)


def _moved(values, operation, amount, fill):
  """Takes each pixel from where an affine map says, to the nearest pixel."""
  height, width, channels = values.shape
  of = lambda name, greatest: jnp.where(_is(operation, name), greatest * amount, 0.0)
  angle = of('rotate', jnp.pi / 6)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x, y = jnp.arange(width)[None, :] + 0.5, jnp.arange(height)[:, None] + 0.5
  # Rotations turn round the middle, the others keep the origin.
  right, down = x - width / 2, y - height / 2
  from_x = cos * right - sin * down + width / 2
  from_y = sin * right + cos * down + height / 2
  from_x += of('shear_x', 0.3) * y + of('translate_x', width * 10 / 32)
  from_y += of('shear_y', 0.3) * x + of('translate_y', height * 10 / 32)
  column, row = (jnp.floor(z).astype(jnp.int32) for z in (from_x, from_y))
  inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
  flat = jnp.where(inside, row * width + column, 0).reshape(-1, 1)
  moved = jnp.take_along_axis(
    values.reshape(-1, channels), flat, axis=0, mode='promise_in_bounds'
  )
  return jnp.where(inside[:, :, None], moved.reshape(values.shape), fill[None, None])
