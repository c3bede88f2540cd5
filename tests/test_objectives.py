"""Objectives against values by hand and float64."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.attacks import objectives
from jaxrobust.errors import UserError

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
  for name in objectives.OBJECTIVES:
    objective = objectives.OBJECTIVES[name]
    reference = references[objectives.REFERENCES[name]]
    values, gradient = jax.value_and_grad(
      lambda x, f=objective, r=reference: f(x, r).sum()
    )(logits)
    assert jnp.isfinite(values) and jnp.isfinite(gradient).all(), name
    # Squared distances of probabilities are at most 2.
    expected = 2.0 if name == 'squared_distance' else 2e4
    np.testing.assert_allclose(objective(logits, reference)[0], expected, rtol=1e-6)


def test_each_objective_says_what_it_wants():
  assert set(objectives.REFERENCES) == set(objectives.OBJECTIVES)


def finite_differences(f, logits, h=1e-5):
  """Gradient of f: [K] → float at each row, in float64."""
  gradient = np.zeros_like(logits)
  for row, k in np.ndindex(logits.shape):
    step = np.zeros(logits.shape[1])
    step[k] = h
    up, down = f(row, logits[row] + step), f(row, logits[row] - step)
    gradient[row, k] = (up - down) / (2 * h)
  return gradient


def numpy_dlr(row, z):
  first, _, third = np.sort(z)[::-1][:3]
  others = np.delete(z, LABELS[row]).max()
  return -(z[LABELS[row]] - others) / (first - third)


def numpy_targeted_dlr(row, z):
  first, _, third, fourth = np.sort(z)[::-1][:4]
  return -(z[LABELS[row]] - z[AIMS[row]]) / (first - (third + fourth) / 2)


AIMS = np.array([1, 2, 3, 4, 0, 3])
DLR = {
  'dlr': (lambda z: objectives.dlr(z, jnp.asarray(LABELS)), numpy_dlr),
  'targeted_dlr': (
    lambda z: objectives.targeted_dlr(z, jnp.asarray(LABELS), jnp.asarray(AIMS)),
    numpy_targeted_dlr,
  ),
}
each_dlr = pytest.mark.parametrize('name', DLR)


def test_dlr_by_hand():
  logits = jnp.array([[1.0, 5.0, 3.0, -9.0], [1.0, 5.0, 3.0, -9.0]])
  # Right: -(5 - 3) / (5 - 1). Wrong: -(3 - 5) / (5 - 1).
  np.testing.assert_array_equal(
    objectives.dlr(logits, jnp.array([1, 2])), np.float32([-0.5, 0.5])
  )


def test_targeted_dlr_by_hand():
  logits = jnp.array([[1.0, 5.0, 3.0, -9.0]])
  # -(5 - 1) / (5 - (1 - 9) / 2), and -(5 - 3) over the same.
  for target, expected in ((0, -4 / 9), (2, -2 / 9), (3, -14 / 9)):
    np.testing.assert_allclose(
      objectives.targeted_dlr(logits, jnp.array([1]), jnp.array([target])),
      expected,
      rtol=1e-6,
    )


@each_dlr
def test_dlr_and_its_gradient_against_float64(name):
  ours, theirs = DLR[name]
  values, pull = jax.vjp(ours, jnp.float32(LOGITS))
  expected = [theirs(row, z) for row, z in enumerate(LOGITS)]
  # Single precision, after two subtractions.
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  np.testing.assert_allclose(
    pull(jnp.ones(6))[0], finite_differences(theirs, LOGITS), rtol=1e-4, atol=1e-5
  )


@each_dlr
@pytest.mark.parametrize(('scale', 'shift'), [(1e-3, 0), (1e4, 0), (1, 64)])
def test_dlr_knows_no_scale_and_no_shift(name, scale, shift):
  ours, _ = DLR[name]
  # A shift by 64 costs six bits.
  np.testing.assert_allclose(
    ours(jnp.float32(LOGITS * scale + shift)), ours(jnp.float32(LOGITS)), rtol=1e-4
  )


@each_dlr
def test_dlr_of_equal_logits_is_finite(name):
  values, pull = jax.vjp(DLR[name][0], jnp.ones((6, 5)))
  assert (values == 0).all() and jnp.isfinite(pull(jnp.ones(6))[0]).all()


def test_dlr_of_two_classes_is_the_margin():
  logits, labels = jnp.float32(LOGITS[:, :2]), jnp.array([0, 1, 0, 1, 0, 1])
  np.testing.assert_array_equal(
    objectives.dlr(logits, labels), objectives.margin(logits, labels)
  )


@pytest.mark.parametrize('classes', [2, 3])
def test_targeted_dlr_of_few_classes_is_the_targeted_margin(classes):
  logits, labels = jnp.float32(LOGITS[:, :classes]), jnp.asarray(LABELS % classes)
  targets = (labels + 1) % classes
  expected = LOGITS[np.arange(6), targets] - LOGITS[np.arange(6), LABELS % classes]
  np.testing.assert_allclose(
    objectives.targeted_dlr(logits, labels, targets), expected, rtol=1e-5
  )


def test_targeted_margin_is_at_most_the_margin():
  logits, labels = jnp.float32(LOGITS), jnp.asarray(LABELS)
  margins = [
    objectives.targeted_margin(
      logits, labels, objectives.ranked_class(logits, labels, r)
    )
    for r in range(4)
  ]
  np.testing.assert_allclose(margins[0], objectives.margin(logits, labels), rtol=1e-6)
  assert (np.diff(margins, axis=0) < 0).all()


def test_ranked_class_leaves_the_label_out():
  found = [
    objectives.ranked_class(jnp.float32(LOGITS), jnp.asarray(LABELS), r)
    for r in range(4)
  ]
  for row, classes in enumerate(np.transpose(found)):
    order = [k for k in np.argsort(-LOGITS[row]) if k != LABELS[row]]
    assert classes.tolist() == order


def test_ranked_class_takes_a_traced_rank():
  rank = jax.jit(lambda r: objectives.ranked_class(jnp.float32(LOGITS), LABELS, r))
  assert rank(3).tolist() == objectives.ranked_class(LOGITS, LABELS, 3).tolist()


@pytest.fixture
def registry(monkeypatch):
  """Forgets afterwards what a test registers."""
  monkeypatch.setattr(objectives, 'REFERENCES', dict(objectives.REFERENCES))
  for name in ('_items', '_homes'):
    known = dict(getattr(objectives.OBJECTIVES, name))
    monkeypatch.setattr(objectives.OBJECTIVES, name, known)


def test_an_own_objective_is_known_by_name(registry):
  assert doctest.testmod(objectives).failed == 0

  @objectives.register('mine', reference='labels')
  def mine(logits, labels):
    return objectives.margin(logits, labels)

  assert objectives.OBJECTIVES['mine'] is mine
  assert objectives.REFERENCES['mine'] == 'labels'
  for name, reference, words in (
    ('margin', 'labels', "'margin' is registered already"),
    ('other', 'label', "reference = 'label'; use labels, probabilities or either"),
  ):
    with pytest.raises(UserError, match=words):
      objectives.register(name, reference)(mine)
