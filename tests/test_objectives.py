"""Objectives against values by hand and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.attacks import objectives

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 5)) * 3
LABELS = np.array([0, 1, 2, 3, 4, 0])
TARGETS = RNG.dirichlet(np.ones(5), size=6)


def log_softmax(logits):
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_cross_entropy_to_labels_and_to_targets():
  log_p = log_softmax(LOGITS)
  # Single precision: values of about 10.
  np.testing.assert_allclose(
    objectives.cross_entropy(jnp.float32(LOGITS), jnp.asarray(LABELS)),
    -log_p[np.arange(6), LABELS],
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    objectives.cross_entropy(jnp.float32(LOGITS), jnp.float32(TARGETS)),
    -(TARGETS * log_p).sum(-1),
    rtol=1e-5,
  )


def test_kl_divergence():
  expected = (TARGETS * (np.log(TARGETS) - log_softmax(LOGITS))).sum(-1)
  np.testing.assert_allclose(
    objectives.kl_divergence(jnp.float32(LOGITS), jnp.float32(TARGETS)),
    expected,
    rtol=1e-5,
  )


def test_kl_divergence_to_labels_is_cross_entropy():
  one_hot = jnp.eye(5)[LABELS]
  np.testing.assert_allclose(
    objectives.kl_divergence(jnp.float32(LOGITS), one_hot),
    objectives.cross_entropy(jnp.float32(LOGITS), one_hot),
    rtol=1e-6,
  )


def test_kl_divergence_has_the_gradient_of_cross_entropy():
  gradient = lambda f: jax.grad(lambda x: f(x, jnp.float32(TARGETS)).sum())(
    jnp.float32(LOGITS)
  )
  # Both are softmax(logits) - targets.
  expected = np.exp(log_softmax(LOGITS)) - TARGETS
  for f in (objectives.kl_divergence, objectives.cross_entropy):
    np.testing.assert_allclose(gradient(f), expected, atol=1e-6)


def test_kl_divergence_holds_its_reference_fixed():
  value = lambda x: objectives.kl_divergence(x, jax.nn.softmax(x + 1.0 * x)).sum()
  fixed = jax.nn.softmax(2 * jnp.float32(LOGITS))
  expected = jax.grad(lambda x: objectives.kl_divergence(x, fixed).sum())
  np.testing.assert_array_equal(
    jax.grad(value)(jnp.float32(LOGITS)), expected(jnp.float32(LOGITS))
  )


def test_kl_divergence_at_the_networks_own_prediction_is_flat():
  logits = jnp.float32(LOGITS)
  value = lambda x: objectives.kl_divergence(x, jax.nn.softmax(logits)).sum()
  np.testing.assert_allclose(value(logits), 0, atol=1e-5)
  np.testing.assert_allclose(jax.grad(value)(logits), 0, atol=1e-6)


def test_margin_by_hand():
  logits = jnp.array([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0], [-7.0, -9.0, -8.5]])
  np.testing.assert_array_equal(
    objectives.margin(logits, jnp.array([0, 1, 0])), [4.0, -2.0, -1.5]
  )


def test_margin_gradient_moves_two_logits():
  gradient = jax.grad(lambda x: objectives.margin(x, jnp.array([1, 0])).sum())(
    jnp.array([[1.0, 5.0, 3.0], [2.0, 0.0, 1.0]])
  )
  np.testing.assert_array_equal(gradient, [[0, -1, 1], [-1, 0, 1]])


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_margin_in_half_precision(dtype):
  # Exact in either type; the last row lies far below 0 everywhere.
  rows = [[1.5, 0.25, -3.0], [0.25, 1.5, 1.25], [-30000.0, -60000.0, -50000.0]]
  logits = jnp.array(rows, dtype)
  margins = objectives.margin(logits, jnp.array([0, 1, 0]))
  expected = [0.25 - 1.5, 1.25 - 1.5, float(logits[2, 2] - logits[2, 0])]
  np.testing.assert_array_equal(np.float32(margins), expected)


def test_margin_is_above_0_where_the_prediction_is_wrong():
  margins = objectives.margin(jnp.float32(LOGITS), jnp.asarray(LABELS))
  np.testing.assert_array_equal(margins > 0, LOGITS.argmax(-1) != LABELS)


def test_saturated_logits_have_finite_values_and_gradients():
  logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
  references = {
    'labels': jnp.array([1, 1]),
    'either': jnp.array([1, 1]),
    'probabilities': jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]),
  }
  for name, objective in objectives.OBJECTIVES.items():
    reference = references[objectives.REFERENCES[name]]
    values, gradient = jax.value_and_grad(
      lambda x, f=objective, r=reference: f(x, r).sum()
    )(logits)
    assert jnp.isfinite(values) and jnp.isfinite(gradient).all(), name
    np.testing.assert_allclose(objective(logits, reference)[0], 2e4, rtol=1e-6)


def test_each_objective_says_what_it_wants():
  assert set(objectives.REFERENCES) == set(objectives.OBJECTIVES)
