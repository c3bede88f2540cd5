"""The evaluator: every image once, whatever the batches, on a linear network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import parallel
from jaxrobust.attacks import norms, objectives, pgd, suites
from jaxrobust.errors import UserError

EPSILON = 0.1


@pytest.fixture(scope='module')
def case():
  """Images uint8, and a linear two-class network with logits (0, w x + b)."""
  rng = np.random.RandomState(0)
  # Away from 0 and 255 by more than epsilon, so that the box never binds.
  images = rng.randint(64, 192, (37, 4, 4, 1)).astype(np.uint8)
  weights = rng.normal(size=16).astype(np.float32)
  bias = 0.01 - np.float32(np.median(images.reshape(37, 16) / 255 @ weights))
  scores = images.reshape(37, 16) / 255 @ weights + bias
  labels = (scores + rng.normal(scale=0.1, size=37) > 0).astype(np.int32)
  return images, labels, (weights, bias), scores


def logits_fn(variables, images):
  weights, bias = variables
  scores = images.reshape(len(images), -1) @ weights + bias
  return jnp.stack([jnp.zeros_like(scores), scores], axis=-1)


def attack():
  return pgd.PGD(
    norms.Linf(EPSILON),
    objectives.margin,
    pgd.STEP_RULES['sign'],
    num_steps=5,
    step_sizes=(EPSILON,),
  )


@pytest.mark.parametrize('batch_size', [4, 16, 37, 100])
def test_judges_a_linear_network_exactly(case, batch_size):
  """The margin of a linear network moves by epsilon times the l1 norm of w."""
  images, labels, (weights, bias), scores = case
  evaluator = suites.Evaluator(logits_fn, attack(), batch_size=batch_size)
  outcome = evaluator(parallel.replicate((weights, bias)), images, labels, keep=3)
  margin = np.where(labels == 1, scores, -scores)
  # One score may lie on the threshold up to rounding; none here does.
  assert np.abs(margin).min() > 1e-5
  assert np.abs(margin - EPSILON * np.abs(weights).sum()).min() > 1e-5
  np.testing.assert_array_equal(outcome.clean, margin > 0)
  np.testing.assert_array_equal(
    outcome.robust, margin > EPSILON * np.abs(weights).sum()
  )
  assert len(outcome.adversarial) == 3
  moved = np.abs(outcome.adversarial - images[:3] / 255)
  assert moved.max() <= EPSILON + 1e-6
  assert outcome.robust.sum() < outcome.clean.sum() < 37


def test_without_an_attack_robust_is_clean(case):
  images, labels, variables, _ = case
  evaluator = suites.Evaluator(logits_fn, None, batch_size=8)
  outcome = evaluator(parallel.replicate(variables), images, labels)
  np.testing.assert_array_equal(outcome.clean, outcome.robust)
  assert len(outcome.adversarial) == 0


def test_an_attack_never_mends_a_wrong_prediction(case):
  """An image that is wrong without an attack is not robust."""
  images, _, variables, scores = case
  wrong = (scores <= 0).astype(np.int32)
  evaluator = suites.Evaluator(
    logits_fn,
    pgd.PGD(
      norms.Linf(0.5),
      lambda x, y: -objectives.margin(x, y),
      pgd.STEP_RULES['sign'],
      num_steps=3,
      step_sizes=(0.5,),
    ),
    batch_size=37,
  )
  outcome = evaluator(parallel.replicate(variables), images, wrong)
  assert not outcome.robust.any()


def test_random_starts_depend_on_the_image_only():
  """Also where the attack is nothing but its random start."""
  images = np.full((10, 2, 2, 1), 128, np.uint8)
  found = []
  for batch_size in (4, 8, 12):
    evaluator = suites.Evaluator(
      lambda _, x: jnp.zeros((len(x), 2)) * x.sum(), attack(), batch_size=batch_size
    )
    found.append(
      evaluator(
        parallel.replicate({'a': np.zeros(1)}), images, np.zeros(10, np.int32), keep=4
      ).adversarial
    )
  np.testing.assert_array_equal(found[0], found[1])
  np.testing.assert_array_equal(found[0], found[2])
  assert len(np.unique(found[0][:, 0, 0, 0])) == 4


def test_progress_counts_every_image(case):
  images, labels, variables, _ = case
  seen = []
  evaluator = suites.Evaluator(logits_fn, None, batch_size=16)
  evaluator(
    parallel.replicate(variables),
    images,
    labels,
    progress=lambda n, note: seen.append(n),
  )
  assert seen == [16, 16, 5]


def test_no_images_is_an_error(case):
  evaluator = suites.Evaluator(logits_fn, None, batch_size=4)
  with pytest.raises(UserError, match='no images to evaluate'):
    evaluator({}, np.zeros((0, 2, 2, 1), np.uint8), np.zeros(0, np.int32))


def test_compiles_once_for_other_parameters(case):
  images, labels, (weights, bias), _ = case
  traces = []

  def counted(variables, x):
    traces.append(None)
    return logits_fn(variables, x)

  evaluator = suites.Evaluator(counted, None, batch_size=16)
  evaluator(parallel.replicate((weights, bias)), images, labels)
  count = len(traces)
  evaluator(parallel.replicate((2 * weights, bias)), images, labels)
  assert len(traces) == count
  assert jax.device_count() == 4
