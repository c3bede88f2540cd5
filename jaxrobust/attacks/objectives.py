"""Objectives: what an attack climbs, one number an image."""

import jax
import jax.numpy as jnp
import optax

from jaxrobust import losses


def cross_entropy(logits: jax.Array, reference: jax.Array) -> jax.Array:
  """Cross-entropy to labels or to targets.

  Args:
    logits: [B, K].
    reference: labels int [B] in [0, K), or targets [B, K], rows that sum to 1.

  Returns:
    [B], in nats.
  """
  if reference.ndim == 1:
    reference = jax.nn.one_hot(reference, logits.shape[-1])
  return losses.cross_entropy(logits, reference)


def kl_divergence(logits: jax.Array, probabilities: jax.Array) -> jax.Array:
  """KL(probabilities || softmax(logits)), the objective of TRADES.

  The probabilities are held fixed, so that it differs from the cross-entropy to them
  by a constant: the gradients, and hence the attacks, are the same. If they are the
  network's own at the clean images, both the value and the gradient are 0 there, and
  an attack that starts there stays: start at a random point.

  Args:
    logits: [B, K].
    probabilities: [B, K], rows that sum to 1; zeros are allowed.

  Returns:
    [B], in nats, at least 0 up to rounding.
  """
  return optax.losses.kl_divergence(
    losses.log_probabilities(logits), jax.lax.stop_gradient(probabilities)
  )


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The highest logit of another class, less that of the label.

  Above 0 exactly where the label is not the prediction. Unlike the cross-entropy its
  gradient does not fade where the network is confident.

  Args:
    logits: [B, K], K at least 2.
    labels: int [B] in [0, K).

  Returns:
    [B].
  """
  is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  # An infinite mask rather than a large constant, which would swallow the logits in
  # half precision or lie below them.
  others = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)
  return others - jnp.sum(jnp.where(is_label, logits, 0), axis=-1)


OBJECTIVES = {
  'cross_entropy': cross_entropy,
  'kl_divergence': kl_divergence,
  'margin': margin,
}

# What each objective takes as its reference: labels [B], probabilities [B, K].
REFERENCES = {
  'cross_entropy': 'either',
  'kl_divergence': 'probabilities',
  'margin': 'labels',
}
