"""The schedule's values by hand, and momentum against its recurrence."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base
from jaxrobust import config as configs
from jaxrobust.training import optimizer


@pytest.fixture
def released():
  return optimizer.schedule(
    'cosine', learning_rate=0.4, num_steps=19_531, warmup_steps=488
  )


@pytest.mark.parametrize('step', [0, 1, 244, 488, 489, 9_765, 19_530, 19_531])
def test_cosine_of_the_released_recipe(released, step):
  if step < 488:
    expected = 0.4 * step / 488
  else:
    expected = 0.2 * (1 + np.cos(np.pi * (step - 488) / (19_531 - 488)))
  # Single precision of a value of at most 0.4.
  np.testing.assert_allclose(released(step), expected, atol=1e-7)


def test_landmarks(released):
  assert released(0) == 0
  np.testing.assert_allclose(released(488), 0.4, rtol=1e-6)
  np.testing.assert_allclose(
    released(9_765), 0.2 * (1 + np.cos(np.pi * 9277 / 19043)), rtol=1e-5
  )
  np.testing.assert_allclose(released(19_530), 0, atol=1e-8)
  np.testing.assert_allclose(released(19_531), 0, atol=1e-8)


def test_step_schedule_drops_at_two_thirds_of_the_whole_run():
  fn = optimizer.schedule('step', learning_rate=0.1, num_steps=300, warmup_steps=30)
  np.testing.assert_allclose(
    [fn(30), fn(199), fn(200), fn(299)], [0.1, 0.1, 0.01, 0.01], rtol=1e-6
  )


def test_drops_at_any_fractions():
  fn = optimizer.schedule(
    'step',
    learning_rate=0.1,
    num_steps=100,
    warmup_steps=0,
    drop_fractions=(0.75, 0.9),
  )
  np.testing.assert_allclose(
    [fn(74), fn(75), fn(89), fn(90)], [0.1, 0.01, 0.01, 0.001], rtol=1e-6
  )
  steps = np.arange(1, 10**6)
  np.testing.assert_array_equal((steps * (2 / 3)).astype(int), steps * 2 // 3)


def test_a_run_shorter_than_its_warmup():
  fn = optimizer.schedule('cosine', learning_rate=1.0, num_steps=5, warmup_steps=10)
  np.testing.assert_allclose([fn(0), fn(5)], [0, 0.5])


def test_nesterov_momentum_against_its_recurrence():
  config = base.get_config()
  derived = configs.resolve(config)
  sgd = optimizer.make(config.optimizer, derived)
  params, state = jnp.float32([1.0, -2.0]), None
  state = sgd.init(params)
  velocity = np.zeros(2)
  for step in range(4):
    gradient = np.float32([0.5 + step, -1.0])
    update, state = sgd.update(jnp.asarray(gradient), state, params)
    velocity = 0.9 * velocity + gradient
    expected = -(0.4 * step / 488) * (gradient + 0.9 * velocity)
    # The warm-up's first values are differences of numbers near 0.4 in float32.
    np.testing.assert_allclose(update, expected, rtol=5e-5, atol=1e-12)


@pytest.mark.parametrize(
  'step, expected', [(0, 0.1), (1, 2 / 11), (10, 0.55), (1_790, 0.995), (5_000, 0.995)]
)
def test_ema_decay(step, expected):
  np.testing.assert_allclose(optimizer.ema_decay(0.995, step), expected, rtol=1e-6)
