"""Balls: inside, on and outside of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxrobust.attacks import norms
from jaxrobust.errors import UserError

SHAPE = (4, 3, 2)
BALLS = [norms.Linf(0.1), norms.L2(0.1), norms.L1(0.1)]
each_ball = pytest.mark.parametrize('ball', BALLS, ids=['linf', 'l2', 'l1'])


def some_images(count, seed=0):
  return np.random.default_rng(seed).random((count, *SHAPE), np.float32)


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def numpy_distance(ball, images, origin):
  """The norm, in float64, one image at a time."""
  order = {norms.Linf: np.inf, norms.L2: 2, norms.L1: 1}[type(ball)]
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
  if isinstance(ball, norms.L1) and scale > 1:
    pytest.skip('a value of 1e4 is itself known to 1e-3 only')
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
  # Euclidean ball; in that of l1 its size is epsilon times one of d + 1 uniform shares
  # of a whole, whose mean square is 2 / ((d + 1) (d + 2)). No direction is preferred.
  share = {norms.Linf: 3, norms.L2: size + 2, norms.L1: (size + 1) * (size + 2) / 2}
  variance = ball.epsilon**2 / share[type(ball)]
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
  assert norms.get('l1', 12) == norms.L1(12)
  with pytest.raises(UserError, match="'l7' is unknown: use one of linf, l2, l1"):
    norms.get('l7', 0.5)
  for epsilon in (0, -0.1, float('nan')):
    with pytest.raises(UserError, match=f'epsilon = {epsilon}'):
      norms.get('linf', epsilon)


@pytest.mark.parametrize(
  ('epsilon', 'meant'), [(8, '8/255'), (1.5, '1.5/255'), (1, '1/255'), (300, '8/255')]
)
def test_epsilon_in_levels_of_grey_is_refused(epsilon, meant):
  with pytest.raises(UserError) as e:
    norms.get('linf', epsilon)
  assert f'epsilon = {epsilon}' in str(e.value)
  assert 'below 1' in str(e.value) and f'did you mean {meant}?' in str(e.value)
  # In other norms there are balls of that size.
  assert norms.get('l1', epsilon).epsilon == epsilon
  assert norms.get('l2', epsilon / 4).epsilon == epsilon / 4


def crowded(count, seed=0):
  """Images of which a third of the values are 0 and a third are 1."""
  images, kinds = some_images(count, seed), np.random.default_rng(seed + 1)
  kind = kinds.integers(0, 3, images.shape)
  return np.where(kind == 0, 0, np.where(kind == 1, 1, images)).astype(np.float32)


def furthest(direction, origin, epsilon):
  """Most that a point of the l1 ball and of [0, 1] gains along a direction.

  It spends epsilon on the steepest values first, each up to the end of its range.
  """
  room = np.where(direction > 0, 1 - origin, origin)
  gain, left = 0.0, epsilon
  for i in np.argsort(-np.abs(direction)):
    spent = min(left, room[i])
    gain, left = gain + spent * abs(direction[i]), left - spent
  return gain


@pytest.mark.parametrize('epsilon', [0.05, 1.0, 2.0, 9.0])
def test_project_l1_finds_the_nearest_point_of_ball_and_pixel_range(epsilon):
  origin, ball = crowded(40), norms.L1(epsilon)
  far = origin + np.random.default_rng(2).normal(size=origin.shape).astype(np.float32)
  near = np.asarray(ball.project(far, origin))
  assert near.min() >= 0 and near.max() <= 1
  # Sums of 24 float32, each good to 6e-8.
  assert numpy_distance(ball, near, origin).max() <= epsilon + 2e-6
  np.testing.assert_allclose(ball.project(near, origin), near, atol=1e-6)
  # The nearest point p to u of a convex set is that which no point of the set lies
  # beyond, seen from p towards u.
  flat = lambda x: np.asarray(x, np.float64).reshape(40, -1)
  for u, p, x in zip(flat(far), flat(near), flat(origin), strict=True):
    beyond = furthest(u - p, x, epsilon) - (u - p) @ (p - x)
    assert -1e-5 < beyond < 1e-5
  # Balls that bind, and in the last case also balls that hold the clipped image.
  binds = numpy_distance(ball, np.clip(far, 0, 1), origin) > epsilon
  assert binds.any() and binds.all() == (epsilon < 9)


def test_project_l1_against_a_solver():
  rng, ball = np.random.default_rng(0), norms.L1(0.5)
  origin, far = rng.random(6), rng.normal(size=6)
  # x = origin + up - down, a quadratic program with bounds and one constraint.
  found = scipy.optimize.minimize(
    lambda z: np.sum((origin + z[:6] - z[6:] - far) ** 2),
    np.zeros(12),
    bounds=[(0, 1 - x) for x in origin] + [(0, x) for x in origin],
    constraints={'type': 'ineq', 'fun': lambda z: 0.5 - z.sum()},
    options={'ftol': 1e-14, 'maxiter': 1000},
  ).x
  image = lambda x: np.float32(x).reshape(1, 2, 3, 1)
  # The solver's own tolerance.
  np.testing.assert_allclose(
    np.ravel(ball.project(image(far), image(origin))),
    origin + found[:6] - found[6:],
    atol=2e-5,
  )


def test_project_l1_leaves_points_inside_bit_by_bit():
  origin = crowded(10)
  inside = np.clip(origin + 0.01 * (some_images(10, 3) - 0.5), 0, 1)
  # Sums of offsets are below 24 * 0.005.
  np.testing.assert_allclose(norms.L1(0.2).project(inside, origin), inside, atol=6e-8)


def test_starts_in_l1_spend_the_ball_where_the_pixel_range_binds():
  """Clipping alone would leave about half of the mean length of the starts."""
  origin, ball = np.zeros((400, *SHAPE), np.float32), norms.L1(12.0)
  start = np.asarray(ball.initialize(keys(400), origin))
  assert start.min() == 0 and numpy_distance(ball, start, origin).max() <= 12 + 1e-5


@pytest.mark.parametrize(('share', 'count'), [(0.05, 1), (0.25, 6), (1.0, 24)])
def test_steepest_l1_moves_the_largest_gradients_alike(share, count):
  gradient = some_images(5) - 0.5
  steps = np.asarray(norms.L1.steepest(gradient, share)).reshape(5, -1)
  np.testing.assert_allclose(np.abs(steps).sum(-1), 1, rtol=1e-6)
  for step, g in zip(steps, gradient.reshape(5, -1), strict=True):
    expected = np.zeros(24)
    largest = np.argsort(-np.abs(g))[:count]
    expected[largest] = np.sign(g[largest]) / count
    np.testing.assert_allclose(step, expected, rtol=1e-6)


def test_steepest_l1_of_few_gradients_moves_these_only():
  gradient = np.zeros((1, *SHAPE), np.float32)
  gradient[0, 1, 1, 0], gradient[0, 2, 0, 1] = -1e-30, 1e-30
  step = np.asarray(norms.L1.steepest(gradient, 0.5))
  assert step[0, 1, 1, 0] == -0.5 and step[0, 2, 0, 1] == 0.5
  assert np.count_nonzero(step) == 2


def test_kth_largest_is_that_of_a_sort():
  x = crowded(7)
  x[0] = 0
  x[1] = np.round(x[1] * 3) / 3  # Ties.
  x[2] *= np.float32(1e-38)  # Down to denormal numbers.
  x[3] *= np.float32(1e38)
  ordered = -np.sort(-x.reshape(7, -1), axis=-1)
  find = jax.jit(norms.kth_largest)
  for k in (1, 2, 3, 12, 23, 24):
    found = np.asarray(find(x, jnp.full(7, k)))
    np.testing.assert_array_equal(found[:, 0, 0, 0], ordered[:, k - 1])
  ks = np.array([1, 24, 3, 4, 5, 6, 7])
  found = np.asarray(find(x, jnp.asarray(ks)))[:, 0, 0, 0]
  np.testing.assert_array_equal(found, ordered[np.arange(7), ks - 1])
