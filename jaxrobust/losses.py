"""Losses of training, and the weight decay that is part of them."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax


def log_probabilities(logits: jax.Array) -> jax.Array:
  """Log-softmax, in single precision or better.

  Args:
    logits: [B, K].

  Returns:
    [B, K], at most 0; float32, or the logits' type if that is finer.
  """
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  return jax.nn.log_softmax(logits.astype(dtype))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross-entropy of the softmax of logits to targets.

  Args:
    logits: [B, K].
    targets: [B, K], rows that sum to 1.

  Returns:
    [B], in nats.
  """
  return -jnp.sum(targets * log_probabilities(logits), axis=-1)


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
