"""Losses of training by name, and the weight decay that is part of each.

`config.loss.name` chooses a function of what the passes of a step gave. One of your
own, in an experiment's file, is a choice like any other:

  from jaxrobust.training import losses

  @losses.register('my-loss')
  def my_loss(passes: losses.Passes, settings):
    return losses.cross_entropy(passes.adv_logits, passes.targets).mean()

  def get_config(arg=''):
    ...
    c.loss.name = 'my-loss'
"""

from typing import Any, NamedTuple, cast

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from jaxrobust.attacks.objectives import cross_entropy, log_probabilities
from jaxrobust.config import registries

# A decorator with a name, of `(passes, settings) -> loss []`: `Passes`, and
# `config.loss`. The loss must be a mean over images, so that it does not depend on how
# they lie on devices.
register = registries.LOSSES.register

# The same of what `config.loss.divergence` makes of loss `trades`.
DIVERGENCES = registries.DIVERGENCES


class Passes(NamedTuple):
  """What the passes of a step over its images gave, and what they were to give.

  Attributes:
    clean_logits: float [B, K], of the images; gradients flow, as into all logits.
    adv_logits: float [B, K], of their adversarial versions; with loss `standard`, which
      has no attack, those of the images.
    targets: float [B, K], rows that sum to 1.
    is_generated: bool [B], of images whose labels a classifier gave.
    natural_logits: float [B, K], of the images by a network that learns beside, without
      attacks; None without one.
    class_weights: float [B, K], mean predictions for the classes of the images, rows
      that sum to 1; None where none are kept.
  """

  clean_logits: jax.Array
  adv_logits: jax.Array
  targets: jax.Array
  is_generated: jax.Array
  natural_logits: jax.Array | None = None
  class_weights: jax.Array | None = None


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


@register('standard')
def standard(passes: Passes, settings: config_dict.ConfigDict) -> jax.Array:
  """Cross-entropy of the images as they are."""
  del settings
  return jnp.mean(cross_entropy(passes.clean_logits, passes.targets))


@register('adversarial')
def adversarial(passes: Passes, settings: config_dict.ConfigDict) -> jax.Array:
  """Cross-entropy of adversarial images. Source: Madry et al. 2018."""
  del settings
  return jnp.mean(cross_entropy(passes.adv_logits, passes.targets))


@register('trades')
def trades(passes: Passes, settings: config_dict.ConfigDict) -> jax.Array:
  """Accuracy on clean images plus what the attack changes, by one of DIVERGENCES."""
  return DIVERGENCES[settings.divergence](passes, settings)


@DIVERGENCES.register('kl')
def kl(passes: Passes, settings: config_dict.ConfigDict) -> jax.Array:
  """TRADES: cross-entropy of clean images + beta * KL(clean || adversarial).

  Source: Zhang et al. 2019; the released recipe has beta = 6.
  """
  clean = jnp.mean(cross_entropy(passes.clean_logits, passes.targets))
  effect = kl_divergence(passes.clean_logits, passes.adv_logits)
  return clean + settings.beta * jnp.mean(effect)


@DIVERGENCES.register('squared')
def squared(passes: Passes, settings: config_dict.ConfigDict) -> jax.Array:
  """TRADES with squared distances of probabilities in both terms.

  Source: Pang et al. 2022 (SCORE); their clipping is left out, which their command for
  generated data leaves at 0.
  """
  clean = jnp.exp(log_probabilities(passes.clean_logits))
  return jnp.mean(
    squared_distance(passes.clean_logits, passes.targets)
    + settings.beta * squared_distance(passes.adv_logits, clean)
  )


@DIVERGENCES.register('improved_kl')
def improved_kl(passes: Passes, settings: config_dict.ConfigDict) -> jax.Array:
  """TRADES with the improved Kullback-Leibler divergence.

  The divergence is beta * cross-entropy to the clean prediction, held fixed, +
  pairwise / 4 * sum over classes j, k of w_j w_k ((d_j - d_k)²), where d is the
  difference of clean and adversarial logits, into both of which gradients flow, and w
  are `class_weights`. The second is half the variance of d under w. Source: Cui et al.
  2023, "Decoupled Kullback-Leibler Divergence Loss", whose alpha is beta here, and
  whose beta is pairwise.
  """
  clean_logits, adv_logits, weights = (
    passes.clean_logits,
    passes.adv_logits,
    cast(jax.Array, passes.class_weights),
  )
  clean = jax.lax.stop_gradient(jnp.exp(log_probabilities(clean_logits)))
  soft = cross_entropy(adv_logits, clean)
  difference = clean_logits - adv_logits
  mean = jnp.sum(weights * difference, axis=-1, keepdims=True)
  variance = jnp.sum(weights * jnp.square(difference - mean), axis=-1)
  return jnp.mean(
    cross_entropy(clean_logits, passes.targets)
    + settings.beta * soft
    + settings.pairwise * variance / 2
  )


@register('lbgat')
def lbgat(passes: Passes, settings: config_dict.ConfigDict) -> jax.Array:
  """Adversarial logits follow those of a network that learns beside, without attacks.

  Mean square of (adversarial - natural logits) + cross-entropy of the natural network
  + beta * KL(clean || adversarial); gradients flow through everything.
  Source: Cui et al. 2021, "Learnable Boundary Guided Adversarial Training", whose alpha
  (0 or 6) is beta here.
  """
  natural_logits = cast(jax.Array, passes.natural_logits)
  pull = jnp.mean(jnp.square(passes.adv_logits - natural_logits))
  natural = jnp.mean(cross_entropy(natural_logits, passes.targets))
  return (
    pull
    + natural
    + settings.beta * jnp.mean(kl_divergence(passes.clean_logits, passes.adv_logits))
  )


@register('uat')
def uat(passes: Passes, settings: config_dict.ConfigDict) -> jax.Array:
  """Unsupervised adversarial training with fixed and online targets (UAT++).

  Cross-entropy of adversarial images to their labels, fixed pseudo-labels where these
  were not given, + beta * KL(clean || adversarial) of the images without given labels,
  with the clean prediction held fixed. Source: Uesato et al. 2019, "Are Labels Required
  for Improving Adversarial Robustness?".
  """
  clean = jax.lax.stop_gradient(passes.clean_logits)
  smooth = kl_divergence(clean, passes.adv_logits)
  return jnp.mean(
    cross_entropy(passes.adv_logits, passes.targets)
    + settings.beta * jnp.where(passes.is_generated, smooth, 0)
  )


def weight_decay(params: hk.Params) -> jax.Array:
  """Half the sum of squares of weights and biases.

  BatchNorm's scale and offset are left out (released recipe).

  Args:
    params: of Haiku, {module: {name: array}}; names 'w' and 'b' count.

  Returns:
    [].
  """
  squares: Any = (
    jnp.sum(jnp.square(value))
    for _, name, value in hk.data_structures.traverse(params)
    if name in ('w', 'b')
  )
  return 0.5 * sum(squares)
