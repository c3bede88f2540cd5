"""PGD against closed forms on linear models and a float64 Adam."""

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

import jaxrobust.attacks
from jaxrobust.attacks import norms, objectives, pgd
from jaxrobust.errors import UserError

SHAPE = (4, 4, 2)
SIZE = 32
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(SIZE, 3)).astype(np.float32)
LABELS = jnp.array([0, 1, 2, 0, 1])
KEYS = jax.random.split(jax.random.key(0), 5)


def linear(images):
  """Logits of a linear model; an elementwise sum, the same in any batch."""
  flat = images.reshape(len(images), SIZE, 1)
  return jnp.sum(flat * WEIGHTS[None], axis=1)


def two_class(images):
  """The same for the first two classes, whose margin is linear."""
  return linear(images)[:, :2]


def curved(images):
  """Logits whose gradient changes from place to place."""
  return linear(jnp.sin(4 * images) + images**2)


def some_images(low=0.0, high=1.0):
  rng = np.random.default_rng(1)
  return rng.uniform(low, high, (5, *SHAPE)).astype(np.float32)


def direction(labels):
  """Gradient of the two-class margin, [B, H, W, C]: constant in the image."""
  other = WEIGHTS[:, 1] - WEIGHTS[:, 0]
  signs = np.where(np.asarray(labels) == 0, 1, -1)
  return (signs[:, None] * other[None, :]).reshape(-1, *SHAPE)


def attack(**fields):
  base = dict(
    ball=norms.Linf(0.1),
    objective=objectives.margin,
    step_rule=pgd.STEP_RULES['sign'],
    num_steps=20,
    step_sizes=(0.02,),
  )
  return pgd.PGD(**(base | fields))


@pytest.mark.parametrize('initialization', pgd.INITIALIZATIONS)
@pytest.mark.parametrize('step_rule', ['sign', 'adam'])
def test_linf_on_a_linear_model_reaches_the_optimum(initialization, step_rule):
  images, labels = some_images(), LABELS % 2
  found = attack(initialization=initialization, step_rule=pgd.STEP_RULES[step_rule])(
    two_class, KEYS, images, labels
  )
  # The box of the ball and of the pixel range: each value goes to its own end.
  optimum = np.clip(images + 0.1 * np.sign(direction(labels)), 0, 1)
  np.testing.assert_allclose(found, optimum, atol=1e-6)


@pytest.mark.parametrize('initialization', pgd.INITIALIZATIONS)
def test_l2_on_a_linear_model_reaches_the_optimum(initialization):
  images, labels = some_images(0.4, 0.6), LABELS % 2
  ball = norms.L2(0.3)
  found = attack(
    ball=ball,
    step_rule=pgd.STEP_RULES['normalized'],
    num_steps=60,
    step_sizes=(0.1,),
    initialization=initialization,
  )(two_class, KEYS, images, labels)
  slope = direction(labels)
  length = np.linalg.norm(slope.reshape(5, -1), axis=1)[:, None, None, None]
  # From a random start the part across the slope shrinks by a third a step or more.
  np.testing.assert_allclose(found, images + 0.3 * slope / length, atol=1e-5)


def test_fgsm_is_one_sign_step():
  images = some_images(0.2, 0.8)
  found = attack(
    num_steps=1,
    step_sizes=(0.1,),
    initialization='zero',
    objective=objectives.cross_entropy,
  )(curved, KEYS, images, LABELS)
  gradient = jax.grad(
    lambda x: -jax.nn.log_softmax(curved(x))[jnp.arange(5), LABELS].sum()
  )(jnp.asarray(images))
  np.testing.assert_allclose(found, images + 0.1 * np.sign(gradient), atol=1e-6)


def test_adam_steps_against_float64():
  """Three steps, far from the ball's boundary."""
  images, ball = some_images(0.3, 0.7), norms.Linf(0.25)
  found = attack(
    ball=ball,
    step_rule=pgd.STEP_RULES['adam'],
    num_steps=3,
    step_sizes=(0.05, 0.01),
    step_boundaries=(2,),
    initialization='zero',
    objective=objectives.cross_entropy,
  )(curved, KEYS, images, LABELS)

  x, weights = images.reshape(5, SIZE).astype(np.float64), WEIGHTS.astype(np.float64)
  one_hot = np.eye(3)[np.asarray(LABELS)]
  first, second = np.zeros_like(x), np.zeros_like(x)
  for t, size in enumerate((0.05, 0.05, 0.01), start=1):
    logits = (np.sin(4 * x) + x**2) @ weights
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = (p - one_hot) @ weights.T * (4 * np.cos(4 * x) + 2 * x)
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    step = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-9)
    x = x + size * step
  assert np.abs(x - images.reshape(5, SIZE)).max() < 0.25
  # The division makes the error relative to a gradient's cancellation: 1e-4 of it.
  np.testing.assert_allclose(np.reshape(found, (5, SIZE)), x, atol=2e-5)


def test_step_sizes_change_at_their_boundaries():
  """On a slope of 1 in a wide ball the path's length is the sum of the sizes."""
  images = np.full((1, *SHAPE), 0.1, np.float32)
  up = lambda x: jnp.stack([-x.sum((1, 2, 3)), x.sum((1, 2, 3))], axis=1)
  found = attack(
    ball=norms.Linf(0.9),
    num_steps=8,
    step_sizes=(0.1, 0.01, 0.001),
    step_boundaries=(3, 6),
    initialization='zero',
  )(up, KEYS[:1], images, jnp.array([0]))
  np.testing.assert_allclose(found, 0.1 + 3 * 0.1 + 3 * 0.01 + 2 * 0.001, atol=1e-6)


@pytest.mark.parametrize('ball', [norms.Linf(0.1), norms.L2(0.5)])
@pytest.mark.parametrize('step_rule', list(pgd.STEP_RULES))
@pytest.mark.parametrize('objective', list(objectives.OBJECTIVES))
def test_every_combination_stays_in_the_ball(ball, step_rule, objective):
  images = some_images()
  reference = LABELS
  if objectives.REFERENCES[objective] == 'probabilities':
    reference = jax.nn.softmax(curved(images))
  score = lambda x: objectives.OBJECTIVES[objective](curved(x), reference)
  found = attack(
    ball=ball,
    step_rule=pgd.STEP_RULES[step_rule],
    objective=objectives.OBJECTIVES[objective],
    step_sizes=(0.05,),
  )(curved, KEYS, images, reference)
  assert found.shape == images.shape and found.dtype == jnp.float32
  assert found.min() >= 0 and found.max() <= 1
  assert ball.distance(found, images).max() <= ball.epsilon + 1e-6
  # One value of 32 moves a step: too few for so short an attack to climb for certain.
  if step_rule != 'sparse':
    assert (score(found) > score(images)).all()


@pytest.mark.parametrize('step_rule', list(pgd.STEP_RULES))
def test_an_image_is_attacked_alike_in_any_batch(step_rule):
  images = some_images()
  configured = attack(step_rule=pgd.STEP_RULES[step_rule], restarts=2, num_steps=5)
  run = jax.jit(lambda *args: configured(curved, *args))
  whole = run(KEYS, images, LABELS)
  alone = run(KEYS[3:4], images[3:4], LABELS[3:4])
  others = run(
    KEYS, np.where(np.arange(5)[:, None, None, None] == 3, images, 1 - images), LABELS
  )
  # Compiled for another batch size, sums may round differently.
  np.testing.assert_allclose(alone[0], whole[3], atol=1e-5)
  np.testing.assert_allclose(others[3], whole[3], atol=1e-5)
  assert not np.allclose(others[2], whole[2], atol=1e-3)


def test_adam_sees_the_gradient_of_a_single_image_not_of_a_mean():
  """A gradient near eps: a mean over the batch would shrink the step with it."""
  images = some_images(0.4, 0.6)
  tiny = lambda x: 1e-8 * two_class(x)
  found = attack(step_rule=pgd.STEP_RULES['adam'], num_steps=1, initialization='zero')(
    tiny, KEYS, images, LABELS % 2
  )
  gradient = 1e-8 * direction(LABELS % 2)
  expected = images + 0.02 * gradient / (np.abs(gradient) + 1e-9)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_restarts_keep_the_highest_of_each_image():
  images = some_images()
  run = attack(num_steps=2, step_sizes=(0.01,))
  score = lambda x: objectives.margin(curved(x), LABELS)
  fold = lambda i: jax.vmap(lambda rng: jax.random.fold_in(rng, i))(KEYS)
  # Each start on its own, climbed from where the ball puts it.
  runs = []
  for i in range(4):
    start = run.ball.initialize(fold(i), images)
    gradient = jax.grad(lambda x: score(x).sum())
    for _ in range(2):
      start = run.ball.project(start + 0.01 * jnp.sign(gradient(start)), images)
    runs.append(start)
  scores = np.array([score(x) for x in runs])
  assert len(set(scores.argmax(0))) > 1, 'choose other keys: one start wins all'
  best = np.array([runs[r][i] for i, r in enumerate(scores.argmax(0))])
  found = dataclasses.replace(run, restarts=4)(curved, KEYS, images, LABELS)
  np.testing.assert_allclose(found, best, atol=1e-6)
  np.testing.assert_allclose(run(curved, KEYS, images, LABELS), runs[0], atol=1e-6)


def test_a_flat_objective_stays_where_it_starts():
  images = some_images()
  reference = jax.nn.softmax(curved(images))
  for rule in pgd.STEP_RULES:
    found = attack(
      step_rule=pgd.STEP_RULES[rule],
      objective=lambda logits, _: 0 * logits[:, 0],
      initialization='zero',
    )(curved, KEYS, images, reference)
    np.testing.assert_array_equal(found, images)


def test_no_gradient_flows_through_an_attack():
  run = attack(ball=norms.L2(0.5), step_rule=pgd.STEP_RULES['normalized'], num_steps=2)

  def outcome(images, bend):
    # Unlike a scale, the bend changes the direction of each step.
    found = run(lambda x: linear(jnp.sin(bend * x)), KEYS, images, LABELS)
    return jnp.sum(found)

  gradients = jax.grad(outcome, argnums=(0, 1))(jnp.asarray(some_images()), 4.0)
  np.testing.assert_array_equal(gradients[0], 0)
  assert gradients[1] == 0


def config(**fields):
  base = dict(
    objective='margin',
    step_rule='adam',
    num_steps=40,
    step_sizes=(0.1, 0.01, 0.0001),
    step_boundaries=(20, 30),
    initialization='uniform',
    restarts=1,
  )
  return config_dict.ConfigDict(base | fields)


def test_from_config():
  ball = norms.L2(0.5)
  built = pgd.from_config(config(), ball)
  assert built == pgd.PGD(
    ball,
    objectives.margin,
    pgd.STEP_RULES['adam'],
    40,
    (0.1, 0.01, 0.0001),
    (20, 30),
    'uniform',
    1,
  )


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'objective': 'loss'}, "attack.objective = 'loss': use one of cross_entropy"),
    ({'step_rule': 'sgd'}, "attack.step_rule = 'sgd': use one of adam"),
    ({'initialization': 'ones'}, "attack.initialization = 'ones'"),
    ({'num_steps': 0}, 'attack.num_steps = 0: use a number above 0'),
    ({'restarts': 0}, 'attack.restarts = 0'),
    ({'step_sizes': (0.1,)}, 'one size more than boundaries'),
    ({'step_sizes': (0.1, 0.0, 0.1)}, 'attack.step_sizes = .*: use a number above 0'),
    ({'step_boundaries': (30, 20)}, 'in rising order'),
    ({'step_boundaries': (0, 20)}, 'above 0'),
    ({'initialization': 'zero', 'restarts': 2}, 'would repeat one attack'),
  ],
)
def test_from_config_refuses(fields, message):
  with pytest.raises(UserError, match=message):
    pgd.from_config(config(**fields), norms.Linf(0.1))


def test_the_tutorial_runs():
  results = doctest.testmod(jaxrobust.attacks)
  assert results.attempted > 5 and results.failed == 0
