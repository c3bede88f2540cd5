"""Balls: inside, on and outside of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.attacks import norms
from jaxrobust.errors import UserError

SHAPE = (4, 3, 2)
BALLS = [norms.Linf(0.1), norms.L2(0.1)]
each_ball = pytest.mark.parametrize('ball', BALLS, ids=['linf', 'l2'])


def some_images(count, seed=0):
  return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def numpy_distance(ball, images, origin):
  """The norm, in float64, one image at a time."""
  order = np.inf if isinstance(ball, norms.Linf) else 2
  differences = np.asarray(images, np.float64) - np.asarray(origin, np.float64)
  return np.array([np.linalg.norm(d.ravel(), order) for d in differences])


@each_ball
def test_distance_is_the_norm(ball):
  images, origin = some_images(5), some_images(5, seed=1)
  # Single precision: a sum of 24 squares.
  np.testing.assert_allclose(
    ball.distance(images, origin), numpy_distance(ball, images, origin), rtol=1e-6
  )


@each_ball
def test_project_leaves_the_inside_alone(ball):
  origin = 0.25 + 0.5 * some_images(6)
  offset = np.asarray(ball.steepest(some_images(6, seed=1) - 0.5))
  inside = origin + 0.9 * ball.epsilon * offset
  np.testing.assert_allclose(ball.project(inside, origin), inside, atol=1e-7)


@each_ball
@pytest.mark.parametrize('scale', [0.11, 1.0, 1e4])
def test_project_brings_the_outside_to_the_boundary(ball, scale):
  origin = 0.25 + 0.5 * some_images(6)
  far = origin + scale * np.asarray(ball.steepest(some_images(6, seed=1) - 0.5))
  near = ball.project(far, origin)
  # Rounding of pixel values near 1 is 6e-8 each.
  np.testing.assert_allclose(
    numpy_distance(ball, near, origin), ball.epsilon, atol=1e-6
  )
  once_more = ball.project(near, origin)
  np.testing.assert_allclose(once_more, near, atol=1e-7)


def test_project_finds_the_nearest_point():
  origin = jnp.full((1, 1, 2, 1), 0.5)
  far = origin + jnp.array([0.3, -0.4]).reshape(1, 1, 2, 1)
  np.testing.assert_allclose(
    norms.L2(0.1).project(far, origin).ravel(), [0.56, 0.42], atol=1e-7
  )
  far = origin + jnp.array([0.3, -0.05]).reshape(1, 1, 2, 1)
  np.testing.assert_allclose(
    norms.Linf(0.1).project(far, origin).ravel(), [0.6, 0.45], atol=1e-7
  )


@each_ball
def test_project_stays_in_the_ball_and_in_the_pixel_range(ball):
  origin = np.concatenate(
    [
      some_images(20),
      np.zeros((1, *SHAPE), np.float32),
      np.ones((1, *SHAPE), np.float32),
    ]
  )
  far = origin + np.random.default_rng(2).normal(size=origin.shape).astype(np.float32)
  near = np.asarray(ball.project(far, origin))
  assert near.min() >= 0 and near.max() <= 1
  assert numpy_distance(ball, near, origin).max() <= ball.epsilon + 1e-6


@each_ball
def test_starts_are_uniform_in_the_ball(ball):
  count, size = 4000, np.prod(SHAPE)
  origin = np.full((count, *SHAPE), 0.5, np.float32)
  offset = (
    np.asarray(ball.initialize(keys(count), origin), np.float64) - origin
  ).reshape(count, size)
  # P(distance <= r) = (r / epsilon)^d in either norm: its d-th power is uniform.
  # Bounds are 5 standard errors.
  share = (numpy_distance(ball, offset, np.zeros_like(offset)) / ball.epsilon) ** size
  assert share.max() <= 1 + 1e-4
  assert abs(share.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / count)
  assert abs((share**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / count)
  # A coordinate's variance: epsilon^2 / 3 in the cube, epsilon^2 / (d + 2) in the
  # Euclidean ball. No direction is preferred.
  variance = ball.epsilon**2 / (3 if isinstance(ball, norms.Linf) else size + 2)
  np.testing.assert_allclose((offset**2).mean(0), variance, rtol=0.2)
  assert np.abs(offset.mean(0)).max() < 5 * np.sqrt(variance / count)


@each_ball
def test_starts_at_the_edge_of_the_pixel_range_stay_in_it(ball):
  origin = np.zeros((50, *SHAPE), np.float32)
  start = np.asarray(ball.initialize(keys(50), origin))
  assert start.min() == 0 and start.max() > 0
  assert numpy_distance(ball, start, origin).max() <= ball.epsilon + 1e-6


@each_ball
def test_a_start_depends_on_its_own_key_only(ball):
  origin, rngs = some_images(6), keys(6)
  whole = np.asarray(ball.initialize(rngs, origin))
  np.testing.assert_array_equal(ball.initialize(rngs[2:4], origin[2:4]), whole[2:4])
  assert len(np.unique(whole - origin, axis=0)) == 6


def test_steepest_by_hand():
  gradient = jnp.array([3.0, -4.0, 0.0]).reshape(1, 1, 3, 1)
  np.testing.assert_array_equal(norms.Linf.steepest(gradient).ravel(), [1, -1, 0])
  np.testing.assert_allclose(
    norms.L2.steepest(gradient).ravel(), [0.6, -0.8, 0], atol=1e-7
  )


@each_ball
def test_steepest_of_nothing_is_nothing(ball):
  gradient = np.zeros((2, *SHAPE), np.float32)
  gradient[1] = 1.0
  steps = np.asarray(ball.steepest(gradient))
  assert (steps[0] == 0).all() and np.isfinite(steps).all()


@pytest.mark.parametrize('scale', [1e-36, 1e-25, 1.0, 1e25])
def test_steepest_l2_is_of_length_1_at_any_scale(scale):
  gradient = (some_images(3) - 0.5) * np.float32(scale)
  steps = norms.L2.steepest(gradient)
  np.testing.assert_allclose(
    numpy_distance(norms.L2(1), steps, np.zeros_like(steps)), 1, rtol=1e-5
  )


def test_get():
  assert norms.get('linf', 8 / 255) == norms.Linf(8 / 255)
  assert norms.get('l2', 0.5) == norms.L2(0.5)
  with pytest.raises(UserError, match="'l7' is unknown: use one of linf, l2"):
    norms.get('l7', 0.5)
  for epsilon in (0, -0.1, float('nan')):
    with pytest.raises(UserError, match=f'epsilon = {epsilon}'):
      norms.get('linf', epsilon)
