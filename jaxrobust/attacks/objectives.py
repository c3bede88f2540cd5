"""Objectives: what an attack climbs, one number an image.

A config names one of `OBJECTIVES`. Another joins them by a decorator, in a file of your
own:

>>> from jaxrobust.attacks import objectives
>>> @objectives.register('highest_other', reference='labels')
... def highest_other(logits, labels):
...   return objectives.margin(logits, labels) + logits.min(axis=-1)
>>> objectives.OBJECTIVES['highest_other'] is highest_other
True
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxrobust.config import registries
from jaxrobust.errors import UserError

# (logits [B, K], reference) → [B], to be maximised.
Objective = Callable[[jax.Array, jax.Array], jax.Array]

OBJECTIVES = registries.OBJECTIVES

# What each takes as its reference: labels int [B], probabilities [B, K], or either.
REFERENCES: dict[str, str] = {}


def register(name: str, reference: str) -> Callable[[Objective], Objective]:
  """Makes an objective known to configs, by its name.

  Args:
    name: as in `config.attack.objective`; as of `registries.Registry.register`.
    reference: what it takes beside the logits [B, K]: 'labels', 'probabilities' or
      'either'.

  Returns:
    A decorator of a function (logits, reference) → [B], which attacks maximise.

  Raises:
    UserError: for a name that is taken, or another kind of reference.
  """
  if reference not in ('labels', 'probabilities', 'either'):
    raise UserError(
      f'objective {name!r}: reference = {reference!r}; use labels, probabilities or '
      'either'
    )
  add = OBJECTIVES.register(name, frames=2)
  REFERENCES[name] = reference
  return add


def log_probabilities(logits: jax.Array) -> jax.Array:
  """Log-softmax, in single precision or better.

  Args:
    logits: [B, K].

  Returns:
    [B, K], at most 0; float32, or the logits' type if that is finer.
  """
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  return jax.nn.log_softmax(logits.astype(dtype))


@register('cross_entropy', reference='either')
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
  return -jnp.sum(reference * log_probabilities(logits), axis=-1)


@register('kl_divergence', reference='probabilities')
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
    log_probabilities(logits), jax.lax.stop_gradient(probabilities)
  )


@register('squared_distance', reference='probabilities')
def squared_distance(logits: jax.Array, probabilities: jax.Array) -> jax.Array:
  """Squared l2 distance of softmax(logits) to probabilities (Pang et al. 2022).

  Args:
    logits: [B, K].
    probabilities: [B, K], rows that sum to 1, held fixed.

  Returns:
    [B], from 0 to 2.
  """
  found = jnp.exp(log_probabilities(logits))
  held = jax.lax.stop_gradient(probabilities)
  return jnp.sum(jnp.square(found - held), axis=-1)


@register('margin', reference='labels')
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


def targeted_margin(
  logits: jax.Array, labels: jax.Array, targets: jax.Array
) -> jax.Array:
  """The target's logit, less that of the label.

  Args:
    logits: [B, K].
    labels, targets: int [B] in [0, K).

  Returns:
    [B].
  """
  return _pick(logits, targets) - _pick(logits, labels)


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Difference of logits ratio (Croce and Hein 2020, "Reliable evaluation", eq. 6).

  The margin over the difference of the first and the third logit, so that neither a
  shift nor a scale of the logits changes it. With two classes there is no third
  logit: then it is the margin.

  Args:
    logits: [B, K], K at least 2.
    labels: int [B] in [0, K).

  Returns:
    [B].
  """
  if logits.shape[-1] < 3:
    return margin(logits, labels)
  first, _, third = jnp.split(jax.lax.top_k(logits, 3)[0], 3, axis=-1)
  return margin(logits, labels) / (first - third + 1e-12)[:, 0]


def targeted_dlr(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
  """Targeted difference of logits ratio (Croce and Hein 2020, eq. 7).

  The target's margin over the difference of the first logit and the mean of the third
  and the fourth. With fewer than four classes it is the target's margin.

  Args:
    logits: [B, K], K at least 2.
    labels, targets: int [B] in [0, K).

  Returns:
    [B].
  """
  found = targeted_margin(logits, labels, targets)
  if logits.shape[-1] < 4:
    return found
  top = jax.lax.top_k(logits, 4)[0]
  return found / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def ranked_class(
  logits: jax.Array, labels: jax.Array, rank: int | jax.Array
) -> jax.Array:
  """The class of a rank among those that are not the label.

  Args:
    logits: [B, K].
    labels: int [B] in [0, K).
    rank: 0 for the class with the highest logit beside the label, up to K - 2.

  Returns:
    int [B].
  """
  is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  order = jnp.argsort(jnp.where(is_label, -jnp.inf, logits), descending=True)
  return jnp.take(order, rank, axis=-1)


def _pick(logits, classes):
  """The logit of one class an image, [B]."""
  return jnp.take_along_axis(logits, classes[:, None], axis=-1)[:, 0]
