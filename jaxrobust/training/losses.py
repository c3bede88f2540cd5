"""Losses of training, and the weight decay that is part of them."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from jaxrobust.attacks.objectives import cross_entropy, log_probabilities


def kl_divergence(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
  """KL(softmax(p_logits) || softmax(q_logits)); gradients flow through both.

  Args:
    p_logits: [B, K].
    q_logits: [B, K].

  Returns:
    [B], in nats, at least 0 up to rounding.
  """
  return optax.losses.kl_divergence_with_log_targets(
    log_probabilities(q_logits), log_probabilities(p_logits)
  )


def trades(
  clean_logits: jax.Array, adv_logits: jax.Array, targets: jax.Array, beta: float
) -> jax.Array:
  """Accuracy on clean images plus beta times the effect of the attack.

  Source: Zhang et al. 2019; the released recipe has beta = 6.

  Args:
    clean_logits: [B, K], of the images.
    adv_logits: [B, K], of their adversarial versions.
    targets: [B, K], rows that sum to 1.
    beta: weight of the second term, 0 or more.

  Returns:
    [], mean over the batch.
  """
  clean = jnp.mean(cross_entropy(clean_logits, targets))
  return clean + beta * jnp.mean(kl_divergence(clean_logits, adv_logits))


def squared_distance(logits: jax.Array, probabilities: jax.Array) -> jax.Array:
  """Squared l2 distance of the softmax of logits to probabilities.

  Args:
    logits: [B, K].
    probabilities: [B, K], rows that sum to 1.

  Returns:
    [B], from 0 to 2.
  """
  found = jnp.exp(log_probabilities(logits))
  return jnp.sum(jnp.square(found - probabilities), axis=-1)


def score(
  clean_logits: jax.Array, adv_logits: jax.Array, targets: jax.Array, beta: float
) -> jax.Array:
  """TRADES with squared distances of probabilities in both terms.

  Source: Pang et al. 2022 (SCORE); their clipping is left out, which their command for
  generated data leaves at 0.

  Args:
    clean_logits: [B, K], of the images.
    adv_logits: [B, K], of their adversarial versions.
    targets: [B, K], rows that sum to 1.
    beta: weight of the second term, 0 or more.

  Returns:
    [], mean over the batch.
  """
  clean = jnp.exp(log_probabilities(clean_logits))
  return jnp.mean(
    squared_distance(clean_logits, targets) + beta * squared_distance(adv_logits, clean)
  )


def improved_kl(
  clean_logits: jax.Array,
  adv_logits: jax.Array,
  targets: jax.Array,
  class_weights: jax.Array,
  beta: float,
  pairwise: float,
) -> jax.Array:
  """TRADES with the improved Kullback-Leibler divergence.

  The divergence is beta * cross-entropy to the clean prediction, held fixed, +
  pairwise / 4 * sum over classes j, k of w_j w_k ((d_j - d_k)²), where d is the
  difference of clean and adversarial logits. The second is half the variance of d
  under w. Source: Cui et al. 2023, "Decoupled Kullback-Leibler Divergence Loss".

  Args:
    clean_logits: [B, K], of the images; in the second part gradients flow into them.
    adv_logits: [B, K], of their adversarial versions.
    targets: [B, K], rows that sum to 1.
    class_weights: w [B, K], rows that sum to 1: mean prediction for the class.
    beta: weight of the cross-entropy, 0 or more (their alpha).
    pairwise: weight of the logits' differences, 0 or more (their beta).

  Returns:
    [], mean over the batch.
  """
  clean = jax.lax.stop_gradient(jnp.exp(log_probabilities(clean_logits)))
  soft = cross_entropy(adv_logits, clean)
  difference = clean_logits - adv_logits
  mean = jnp.sum(class_weights * difference, axis=-1, keepdims=True)
  variance = jnp.sum(class_weights * jnp.square(difference - mean), axis=-1)
  return jnp.mean(
    cross_entropy(clean_logits, targets) + beta * soft + pairwise * variance / 2
  )


def lbgat(
  clean_logits: jax.Array,
  adv_logits: jax.Array,
  natural_logits: jax.Array,
  targets: jax.Array,
  beta: float,
) -> jax.Array:
  """Adversarial logits follow those of a network that learns beside, without attacks.

  Mean square of (adversarial - natural logits) + cross-entropy of the natural network
  + beta * KL(clean || adversarial); gradients flow through everything.
  Source: Cui et al. 2021, "Learnable Boundary Guided Adversarial Training".

  Args:
    clean_logits: [B, K], of the robust network at the images.
    adv_logits: [B, K], of the robust network at their adversarial versions.
    natural_logits: [B, K], of the natural network at the images.
    targets: [B, K], rows that sum to 1.
    beta: weight of the last term, 0 or more (their alpha: 0 or 6).

  Returns:
    [], mean over the batch.
  """
  pull = jnp.mean(jnp.square(adv_logits - natural_logits))
  natural = jnp.mean(cross_entropy(natural_logits, targets))
  return pull + natural + beta * jnp.mean(kl_divergence(clean_logits, adv_logits))


def uat(
  clean_logits: jax.Array,
  adv_logits: jax.Array,
  targets: jax.Array,
  is_generated: jax.Array,
  beta: float,
) -> jax.Array:
  """Unsupervised adversarial training with fixed and online targets (UAT++).

  Cross-entropy of adversarial images to their labels, fixed pseudo-labels where these
  were not given, + beta * KL(clean || adversarial) of the images without given labels,
  with the clean prediction held fixed. Source: Uesato et al. 2019, "Are Labels Required
  for Improving Adversarial Robustness?".

  Args:
    clean_logits: [B, K], of the images.
    adv_logits: [B, K], of their adversarial versions.
    targets: [B, K], rows that sum to 1.
    is_generated: bool [B], of the images whose labels were not given.
    beta: weight of the second term, 0 or more.

  Returns:
    [], mean over the batch.
  """
  smooth = kl_divergence(jax.lax.stop_gradient(clean_logits), adv_logits)
  return jnp.mean(
    cross_entropy(adv_logits, targets) + beta * jnp.where(is_generated, smooth, 0)
  )


def weight_decay(params) -> jax.Array:
  """Half the sum of squares of weights and biases.

  BatchNorm's scale and offset are left out (released recipe).

  Args:
    params: of Haiku, {module: {name: array}}; names 'w' and 'b' count.

  Returns:
    [].
  """
  return 0.5 * sum(
    jnp.sum(jnp.square(value))
    for _, name, value in hk.data_structures.traverse(params)
    if name in ('w', 'b')
  )
