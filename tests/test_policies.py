"""Operations against PIL's on the same images, and what the policies draw."""

import collections
import functools
import math

import jax
import numpy as np
import PIL.Image
import pytest
from PIL import ImageEnhance, ImageOps

from jaxrobust.data import policies

RNG = np.random.default_rng(0)
FILL = (10, 200, 90)
ROUNDED = ('autocontrast', 'color', 'contrast', 'brightness', 'sharpness')

transformed = jax.jit(
  jax.vmap(
    jax.vmap(policies.transform, (None, 0, 0, 0, None)), (0, None, None, None, None)
  )
)

one_by_one = jax.jit(policies.transform)


def picture(shape, low=20, high=230):
  """Smooth stripes with some noise, so that neighbours and values are related."""
  height, width, channels = shape
  wave = np.sin(np.arange(height)[:, None] / 5 + np.arange(width)[None, :] / 9)
  noise = RNG.normal(size=shape)
  image = wave[..., None] * np.linspace(1, 2, channels) + 0.3 * noise
  image = (image - image.min()) / np.ptp(image)
  return np.round(low + (high - low) * image).astype(np.uint8)


def by_pil(image, name, magnitude, sign):
  """The same operation by PIL, from the documented meaning of the magnitude."""
  channels = image.shape[-1]
  pil = PIL.Image.fromarray(image if channels == 3 else image[..., 0])
  fill = FILL if channels == 3 else FILL[0]
  moved = lambda *matrix: pil.transform(
    pil.size, PIL.Image.AFFINE, matrix, fillcolor=fill
  )
  shear, (width, height) = 0.3 * magnitude * sign, pil.size
  shift = 10 / 32 * magnitude * sign
  factor = 0.1 + 1.8 * magnitude
  found = {
    'identity': lambda: pil,
    'autocontrast': lambda: ImageOps.autocontrast(pil),
    'equalize': lambda: ImageOps.equalize(pil),
    'invert': lambda: ImageOps.invert(pil),
    'rotate': lambda: pil.rotate(30 * magnitude * sign, fillcolor=fill),
    'solarize': lambda: ImageOps.solarize(pil, math.ceil(256 - 256 * magnitude)),
    'posterize': lambda: ImageOps.posterize(pil, 8 - round(4 * magnitude)),
    'color': lambda: ImageEnhance.Color(pil).enhance(factor),
    'contrast': lambda: ImageEnhance.Contrast(pil).enhance(factor),
    'brightness': lambda: ImageEnhance.Brightness(pil).enhance(factor),
    'sharpness': lambda: ImageEnhance.Sharpness(pil).enhance(factor),
    'shear_x': lambda: moved(1, shear, 0, 0, 1, 0),
    'shear_y': lambda: moved(1, 0, 0, shear, 1, 0),
    'translate_x': lambda: moved(1, 0, width * shift, 0, 1, 0),
    'translate_y': lambda: moved(1, 0, 0, 0, 1, height * shift),
  }[name]()
  return np.asarray(found).reshape(image.shape)


@pytest.mark.parametrize('shape', [(32, 32, 3), (20, 30, 1), (8, 8, 1)])
def test_operations_are_pils(shape):
  flat, sparse = np.full(shape, 77, np.uint8), picture(shape) // 60 * 60
  images = np.stack([picture(shape), picture(shape, 0, 255), sparse, flat])
  cases = [
    (name, magnitude, sign)
    for name in policies.OPERATIONS
    for magnitude in (0.0, 0.3, 14 / 30, 0.7, 0.9, 1.0)
    for sign in (1, -1)
  ]
  found = transformed(
    images,
    np.array([policies.OPERATIONS.index(name) for name, _, _ in cases]),
    np.array([magnitude for _, magnitude, _ in cases], np.float32),
    np.array([sign for _, _, sign in cases], np.float32),
    np.array(FILL[: shape[-1]]),
  )
  assert found.dtype == np.uint8
  changed = set()
  for image, outcomes in zip(images, np.asarray(found), strict=True):
    for case, outcome in zip(cases, outcomes, strict=True):
      expected = by_pil(image, *case)
      difference = np.abs(outcome.astype(int) - expected)
      if case[0] in ('rotate', 'shear_x', 'shear_y'):
        # PIL counts positions in 1 / 65536 pixels: some fall into the next pixel.
        assert (difference > 0).mean() < 0.01, case
      else:
        # PIL's autocontrast cuts off float64 where integers are exact here; blends are
        # cut off in both, and a compiler may round their product once less.
        assert difference.max() <= (case[0] in ROUNDED), case
      if (outcome != image).any():
        changed.add(case[0])
  same = {'identity'}
  if shape[-1] == 1:
    same |= {'color'}
  if shape[0] * shape[1] < 255:
    same |= {'equalize'}
  assert changed == set(policies.OPERATIONS) - same


def outcomes_of(image, steps):
  """Bytes of each outcome of a chain → its probability.

  Args:
    steps: of each step the operations to choose from: name, probability, magnitude.
  """
  chances = {image.tobytes(): 1.0}
  for choices in steps:
    after = collections.Counter()
    for before, chance in chances.items():
      start = np.frombuffer(before, np.uint8).reshape(image.shape)
      for name, probability, magnitude in choices:
        signs = (1, -1) if name.startswith(('rotate', 'shear', 'translate')) else (1,)
        for sign in signs:
          operation = policies.OPERATIONS.index(name)
          changed = one_by_one(start, operation, magnitude, sign, np.array(FILL))
          after[np.asarray(changed).tobytes()] += chance * probability / len(signs)
    chances = after
  return chances


def assert_frequencies(images, chances):
  """That only these images occur, and as often as they should."""
  assert sum(chances.values()) == pytest.approx(1)
  counts = collections.Counter(image.tobytes() for image in np.asarray(images))
  assert set(counts) <= {key for key, chance in chances.items() if chance}
  for key, chance in chances.items():
    mean = len(images) * chance
    # 6 standard deviations, and an image for those that hardly ever occur.
    assert abs(counts[key] - mean) <= 6 * np.sqrt(mean) + 1


@pytest.fixture(scope='module')
def repeated():
  """An image, copies of it, a key for each, and the fill in [0, 1]."""
  count, image = 4000, picture((18, 20, 3))
  rngs = jax.random.split(jax.random.key(0), count)
  return image, np.repeat(image[None], count, 0), rngs, tuple(x / 255 for x in FILL)


def test_randaugment_draws_operations_and_directions_uniformly(repeated):
  image, images, rngs, fill = repeated
  draw = functools.partial(policies.randaugment, magnitude=0.3, fill=fill)
  found = jax.jit(functools.partial(draw, num_operations=2))(images, rngs)
  uniform = [(name, 1 / 14, 0.3) for name in policies.OPERATIONS if name != 'invert']
  assert len(outcomes_of(image, [uniform])) == 9 + 2 * 5
  assert_frequencies(found, outcomes_of(image, [uniform] * 2))


def test_autoaugment_applies_its_sub_policies_uniformly(repeated):
  image, images, rngs, fill = repeated
  found = jax.jit(functools.partial(policies.autoaugment, fill=fill))(images, rngs)
  chances = collections.Counter()
  assert len(policies.CIFAR10_POLICY) == 25
  for steps in policies.CIFAR10_POLICY:
    choices = [
      [(name, probability, tenths / 10), ('identity', 1 - probability, 0)]
      for name, probability, tenths in steps
    ]
    for key, chance in outcomes_of(image, choices).items():
      chances[key] += chance / 25
  assert len(chances) > 60
  assert_frequencies(found, chances)
