"""Augmentation for discriminators, by numbers of the reference and by closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.config.generator_fields import adversarial
from jaxrobust.generators import ada, diff_augment, resampling


def images_of(count=4, size=16):
  """Smooth ones, so that filters hardly change them."""
  y, x = np.mgrid[:size, :size]
  waves = [np.cos(0.35 * x + 0.3) * np.cos(0.25 * y), np.sin(0.3 * x + 0.2 * y)]
  return jnp.float32(np.stack([waves[i % 2] * 0.9**i for i in range(count)]))[..., None]


def keys(count):
  return jax.random.split(jax.random.key(0), count)


def moved(images, name, *drawn):
  matrix = ada.GEOMETRY[name].matrix(jnp.float32(*drawn), images.shape[1:3])
  return ada.warp(images, jnp.broadcast_to(matrix[None], (len(images), 3, 3)))


def recoloured(images, name, drawn):
  matrix = ada.COLOUR[name].matrix(jnp.float32(drawn))
  return ada.recolour(images, jnp.broadcast_to(matrix[None], (len(images), 4, 4)))


def test_without_probability_nothing_changes():
  noise = jax.random.uniform(jax.random.key(1), (4, 8, 8, 3), minval=-1)
  found = ada.augment(noise, 0.0, keys(4))
  np.testing.assert_allclose(found, noise, atol=7e-6)


@pytest.mark.parametrize('turns', [1, 2, 3])
def test_quarter_turns(turns):
  """Counter-clockwise; the filter, which is not symmetric, costs a little."""
  images = images_of()
  found = moved(images, 'quarter-turns', turns)
  np.testing.assert_allclose(found, jnp.rot90(images, turns, (1, 2)), atol=0.07)


def test_flip_and_shifts():
  images = images_of()
  np.testing.assert_allclose(moved(images, 'flip', 1), images[:, :, ::-1], atol=0.07)
  # One pixel to the right, two down, of 16.
  for name in ('whole-shifts', 'shifts'):
    found = moved(images, name, [1 / 16, 2 / 16])
    np.testing.assert_allclose(found[:, 2:, 1:], images[:, :-2, :-1], atol=1e-5)
  # A third of a pixel is rounded by the former alone.
  found = moved(images, 'whole-shifts', [0.3 / 16, 0])
  np.testing.assert_allclose(found, images, atol=1e-5)
  assert np.abs(moved(images, 'shifts', [0.3 / 16, 0]) - images).max() > 0.05


def test_edges_are_reflected():
  """A shift to the right shows the mirror of what was left of it, then nothing."""
  images = images_of()
  found = moved(images, 'shifts', [4 / 16, 0])
  np.testing.assert_allclose(found[:, :, :4], images[:, :, 4:0:-1], atol=0.03)
  far = moved(images, 'shifts', [40 / 16, 0])
  np.testing.assert_allclose(far[:, :, :8], 0, atol=1e-5)


def test_scale_and_stretch_are_about_the_centre():
  centre = 7.5
  y, x = np.mgrid[6:10, 6:10] - centre
  for name, factors in (('scale', (0.5, 0.5)), ('stretch', (0.5, 2.0))):
    found = moved(images_of(1), name, 1.0)[0, 6:10, 6:10, 0]
    at_x, at_y = factors[0] * x + centre, factors[1] * y + centre
    wanted = np.cos(0.35 * at_x + 0.3) * np.cos(0.25 * at_y)
    np.testing.assert_allclose(found, wanted, atol=0.03)


@pytest.mark.parametrize(
  'name, drawn, wanted',
  [
    ('luma-flip', 1, (-0.0666667, 0.2333333, -0.5666667)),
    ('hue', math.pi / 2, (-0.3285469, 0.4220084, 0.3065384)),
    ('contrast', 0.5 * 0.4769363, (0.2359479, 0.5898697, -0.3539219)),
    ('brightness', 0.1, (0.3, 0.6, -0.2)),
    # Twice the distance from grey, which is 0.4 / 3.
    ('saturation', 1, (0.2666667, 0.8666667, -0.7333333)),
  ],
)
def test_colours(name, drawn, wanted):
  colour = jnp.float32([0.2, 0.5, -0.3]).reshape(1, 1, 1, 3)
  found = recoloured(colour, name, drawn).reshape(3)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_of_grey_images_the_mean_colour_counts():
  grey = jnp.full((1, 1, 1, 1), 0.5)
  assert recoloured(grey, 'luma-flip', 1).item() == pytest.approx(-0.5)
  assert recoloured(grey, 'brightness', 0.2).item() == pytest.approx(0.7)
  # What needs three channels is not done: as where nothing is chosen.
  found = ada.augment(jnp.full((4, 8, 8, 1), 0.5), 1.0, keys(4), ('hue', 'saturation'))
  np.testing.assert_array_equal(found, 0.5)


def test_each_operation_comes_with_its_probability():
  """Quarter turns at 1: each of four in a quarter; at 1/2: none in 5/8."""
  count = 2_000
  corner = jnp.zeros((count, 8, 8, 1)).at[:, 1, 1].set(1)
  augment = jax.jit(lambda p: ada.augment(corner, p, keys(count), ('quarter-turns',)))
  for probability, shares in ((1.0, [0.25] * 4), (0.5, [0.625, *[0.125] * 3])):
    found = np.asarray(augment(probability))
    places = [(1, 1), (6, 1), (6, 6), (1, 6)]  # counter-clockwise
    seen = np.stack([found[:, y, x, 0] for y, x in places]).argmax(0)
    counts = np.bincount(seen, minlength=4)
    deviation = np.sqrt(count * np.multiply(shares, np.subtract(1, shares)))
    assert (np.abs(counts - count * np.array(shares)) < 4 * deviation).all(), counts


def test_one_of_two_rotations_comes_with_the_probability():
  chance = ada.GEOMETRY['rotation'].chance(jnp.float32(0.3))
  assert 1 - (1 - float(chance)) ** 2 == pytest.approx(0.3)


def test_an_image_depends_on_its_own_key():
  images, rngs = images_of(4, 8), keys(4)
  both = ada.augment(images, 0.9, rngs)
  some = ada.augment(images[2:3], 0.9, rngs[2:3])
  np.testing.assert_allclose(some, both[2:3], atol=1e-5)
  assert np.abs(both - images).max(axis=(1, 2, 3)).min() > 0.01


def test_it_is_linear_in_images_but_for_brightness():
  """So that its gradient, and that of R1 through it, are exact."""
  images, rngs = images_of(2, 8), keys(2)
  geometry = lambda x: ada.augment(x, 1.0, rngs, tuple(ada.GEOMETRY))
  direction = jnp.ones_like(images)
  _, found = jax.jvp(geometry, (images,), (direction,))
  np.testing.assert_allclose(found, geometry(direction), atol=1e-5)
  pulled = jax.vjp(geometry, images)[1](direction)[0]
  total = float(jnp.vdot(geometry(images), direction))
  assert float(jnp.vdot(pulled, images)) == pytest.approx(total, rel=1e-3)


def test_kinds_are_those_of_the_config():
  known = {*ada.KINDS, *diff_augment.KINDS}
  assert known == set(adversarial.AUGMENTATION['kind'].choices)
  assert len(ada.KINDS['bgc']) == 13 and len(ada.KINDS['upright']) == 9


def test_the_probability_rises_by_one_in_its_ramp():
  probability, share = jnp.float32(0), 64 * 4 / 500_000
  for _ in range(4):
    probability = ada.adapted(probability, 0.7, 0.6, share)
  assert float(probability) == pytest.approx(4 * share)
  for _ in range(6):
    probability = ada.adapted(probability, 0.5, 0.6, share)
  assert float(probability) == 0


def test_a_resampling_matrix_is_what_numpy_convolves():
  row, taps = np.arange(1.0, 6), np.array([1.0, -2, 3, 0.5])
  fine = np.zeros(15)
  fine[::3] = row
  wanted = np.convolve(np.pad(fine, (2, 1)), taps, 'valid')[::2]
  found = resampling.matrix(5, taps, up=3, down=2, pads=(2, 1))
  np.testing.assert_allclose(found @ row, wanted)
  cut = resampling.matrix(5, taps, pads=(-1, 2))
  wanted = np.convolve(np.pad(row[1:], (0, 2)), taps, 'valid')
  np.testing.assert_allclose(cut @ row, wanted)
