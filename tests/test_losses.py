"""Losses against float64, with gradients by finite differences."""

import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.config import registries
from jaxrobust.training import losses
from tests.helpers.loss_formulas import (
  finite_differences,
  numpy_cross_entropy,
  numpy_improved_kl,
  numpy_kl,
  numpy_lbgat,
  numpy_score,
  numpy_trades,
  numpy_uat,
)

RNG = np.random.default_rng(0)
CLEAN = RNG.normal(size=(6, 5)) * 2
ADV = CLEAN + RNG.normal(size=(6, 5))
TARGETS = RNG.dirichlet(np.ones(5), size=6)


NATURAL = RNG.normal(size=(6, 5))
WEIGHTS = RNG.dirichlet(np.ones(5), size=6)
UNLABELLED = np.array([True, False, True, True, False, False])


def settings(beta=6.0, divergence='kl', pairwise=10.0):
  """What a loss reads of `config.loss`."""
  return types.SimpleNamespace(beta=beta, divergence=divergence, pairwise=pairwise)


def value(name, logits, targets=TARGETS, is_generated=UNLABELLED, **given):
  """Of the loss of that name, of the passes' logits: clean, adversarial, natural."""
  weights = given.pop('class_weights', WEIGHTS)
  clean, adv, natural = [*logits, NATURAL][:3]
  passes = losses.Passes(clean, adv, targets, is_generated, natural, weights)
  return registries.LOSSES.get(name)(passes, settings(**given))


# Of each loss its name, its settings and its derivation from the logits.
VARIANTS = [
  ('standard', {}, lambda c, a, n: numpy_cross_entropy(c, TARGETS).mean()),
  ('adversarial', {}, lambda c, a, n: numpy_cross_entropy(a, TARGETS).mean()),
  ('trades', {}, lambda c, a, n: numpy_trades(c, a, TARGETS, 6.0)),
  (
    'trades',
    {'divergence': 'squared', 'beta': 4.0},
    lambda c, a, n: numpy_score(c, a, TARGETS, 4.0),
  ),
  (
    'trades',
    {'divergence': 'improved_kl', 'beta': 3.0},
    lambda c, a, n: numpy_improved_kl(c, a, TARGETS, WEIGHTS, 3.0, 10.0, CLEAN),
  ),
  ('lbgat', {}, lambda c, a, n: numpy_lbgat(c, a, n, TARGETS, 6.0)),
  (
    'uat',
    {'beta': 5.0},
    lambda c, a, n: numpy_uat(c, a, TARGETS, UNLABELLED, 5.0, CLEAN),
  ),
]


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('name, given, derivation', VARIANTS)
def test_losses_and_their_gradients(name, given, derivation):
  """Through all logits: in float64 central differences are good to about 1e-9."""
  logits = CLEAN, ADV, NATURAL
  loss = lambda *logits: value(name, logits, **given)
  np.testing.assert_allclose(loss(*logits), derivation(*logits), rtol=1e-12)
  gradients = jax.grad(loss, argnums=(0, 1, 2))(*logits)
  for i, gradient in enumerate(gradients):
    moved = lambda x, i=i: derivation(*logits[:i], x, *logits[i + 1 :])
    np.testing.assert_allclose(
      gradient, finite_differences(moved, logits[i]), atol=1e-8
    )


def test_every_built_in_loss_is_derived_here():
  assert {name for name, *_ in VARIANTS} == set(registries.LOSSES.names())
  trades = {given.get('divergence', 'kl') for name, given, _ in VARIANTS}
  assert trades == set(registries.DIVERGENCES)


def test_variants_by_hand():
  flat, sure = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.8, 0.2]]))
  first, even = jnp.array([[1.0, 0.0]]), jnp.full((1, 2), 0.5)
  # |(.8, .2) - (1, 0)|² = .08 and |(.5, .5) - (.8, .2)|² = .18
  found = value('trades', (sure, flat), first, beta=2.0, divergence='squared')
  np.testing.assert_allclose(found, 0.44, rtol=1e-6)
  # d = (log 4, 0) up to a constant: a quarter of 2 * ¼ (log 4)²
  given = {'beta': 0.0, 'pairwise': 1.0, 'class_weights': even}
  found = value('trades', (sure, flat), first, divergence='improved_kl', **given)
  np.testing.assert_allclose(found, -np.log(0.8) + np.log(4) ** 2 / 8, rtol=1e-5)
  # ((1 - 0)² + (0 - 0)²) / 2 + log 2
  found = value('lbgat', (sure, first, flat), first, beta=0.0)
  np.testing.assert_allclose(found, 0.5 + np.log(2), rtol=1e-6)
  for given, expected in ((True, 0.0), (False, np.log(0.5 / 0.8) + np.log(0.5 / 0.2))):
    found = value('uat', (flat, sure), first, jnp.array([not given]), beta=1.0)
    np.testing.assert_allclose(found, -np.log(0.8) + expected / 2, rtol=1e-5)


def test_values():
  clean, adv, targets = map(jnp.float32, (CLEAN, ADV, TARGETS))
  # Single precision: values of about 5, so 1e-5 is 20 roundings.
  np.testing.assert_allclose(
    losses.cross_entropy(clean, targets), numpy_cross_entropy(CLEAN, TARGETS), rtol=1e-5
  )
  np.testing.assert_allclose(
    losses.kl_divergence(clean, adv), numpy_kl(CLEAN, ADV), rtol=1e-5
  )
  np.testing.assert_allclose(
    value('trades', (clean, adv), targets),
    numpy_trades(CLEAN, ADV, TARGETS, 6.0),
    rtol=1e-5,
  )


def test_by_hand():
  flat, sure = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.8, 0.2]]))
  np.testing.assert_allclose(
    losses.cross_entropy(sure, jnp.array([[1.0, 0.0]])), [-np.log(0.8)], rtol=1e-6
  )
  np.testing.assert_allclose(
    losses.kl_divergence(flat, sure),
    [0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.5 / 0.2)],
    rtol=1e-5,
  )


@pytest.mark.usefixtures('float64')
class TestGradients:
  """In float64, where central differences are good to about 1e-9."""

  def test_cross_entropy(self):
    gradient = jax.grad(lambda x: losses.cross_entropy(x, TARGETS).sum())(CLEAN)
    expected = finite_differences(
      lambda x: numpy_cross_entropy(x, TARGETS).sum(), CLEAN
    )
    np.testing.assert_allclose(gradient, expected, atol=1e-8)

  def test_kl_divergence_through_both(self):
    gradients = jax.grad(lambda p, q: losses.kl_divergence(p, q).sum(), argnums=(0, 1))(
      CLEAN, ADV
    )
    expected = (
      finite_differences(lambda p: numpy_kl(p, ADV).sum(), CLEAN),
      finite_differences(lambda q: numpy_kl(CLEAN, q).sum(), ADV),
    )
    for found, wanted in zip(gradients, expected, strict=True):
      assert np.abs(wanted).max() > 0.1
      np.testing.assert_allclose(found, wanted, atol=1e-8)


def test_kl_divergence_of_equals_is_0_and_flat():
  logits = jnp.float32(CLEAN)
  np.testing.assert_array_equal(losses.kl_divergence(logits, logits), 0)
  # A constant added to the logits changes no probability.
  np.testing.assert_allclose(losses.kl_divergence(logits, logits + 3), 0, atol=1e-6)
  for gradient in jax.grad(
    lambda p, q: losses.kl_divergence(p, q).sum(), argnums=(0, 1)
  )(logits, logits):
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_trades_without_beta_is_cross_entropy():
  clean, adv, targets = map(jnp.float32, (CLEAN, ADV, TARGETS))
  np.testing.assert_allclose(
    value('trades', (clean, adv), targets, beta=0.0),
    losses.cross_entropy(clean, targets).mean(),
    rtol=1e-6,
  )


@pytest.mark.parametrize('size', [1e3, 1e10, 1e20])
def test_saturated_logits_are_finite_and_right(size):
  clean = jnp.float32(size) * jnp.array([[1.0, 0.0, -1.0]])
  adv, targets = -clean, jnp.array([[0.0, 1.0, 0.0]])
  np.testing.assert_allclose(losses.cross_entropy(clean, targets), size, rtol=1e-6)
  np.testing.assert_allclose(losses.kl_divergence(clean, adv), 2 * size, rtol=1e-6)
  trades = lambda *logits: value('trades', logits, targets)
  gradients = jax.grad(trades, argnums=(0, 1))(clean, adv)
  assert all(jnp.isfinite(g).all() for g in gradients)


def test_half_precision_logits_are_summed_in_single():
  logits = jnp.asarray(CLEAN, jnp.bfloat16)
  found = losses.cross_entropy(logits, jnp.float32(TARGETS))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(
    found, numpy_cross_entropy(np.float64(logits), TARGETS), rtol=1e-5
  )


def test_weight_decay_counts_weights_and_biases_only():

  def network(images):
    x = hk.Conv2D(3, 3, name='conv')(images)
    x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
    return hk.Linear(2)(x.mean((1, 2)))

  shapes, _ = jax.eval_shape(
    hk.transform_with_state(network).init, jax.random.key(0), jnp.ones((2, 4, 4, 1))
  )
  params = jax.tree.map(lambda x: np.full(x.shape, 2.0, x.dtype), shapes)
  counted = 3 * 3 * 1 * 3 + 3 + 3 * 2 + 2
  assert losses.weight_decay(params) == 0.5 * 4 * counted
  gradient = jax.grad(losses.weight_decay)(params)
  np.testing.assert_array_equal(gradient['linear']['w'], params['linear']['w'])
  np.testing.assert_array_equal(gradient['batch_norm']['scale'], 0)
  np.testing.assert_array_equal(gradient['batch_norm']['offset'], 0)
