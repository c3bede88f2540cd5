"""Losses derived in float64, and gradients by finite differences."""

import numpy as np


def log_softmax(logits):
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def numpy_cross_entropy(logits, targets):
  return -(targets * log_softmax(logits)).sum(-1)


def numpy_kl(p_logits, q_logits):
  p, q = log_softmax(p_logits), log_softmax(q_logits)
  return (np.exp(p) * (p - q)).sum(-1)


def numpy_trades(clean, adv, targets, beta):
  return numpy_cross_entropy(clean, targets).mean() + beta * numpy_kl(clean, adv).mean()


def softmax(logits):
  return np.exp(log_softmax(logits))


def numpy_score(clean, adv, targets, beta):
  squares = lambda p, q: ((p - q) ** 2).sum(-1).mean()
  return squares(softmax(clean), targets) + beta * squares(softmax(adv), softmax(clean))


def numpy_improved_kl(clean, adv, targets, weights, beta, pairwise, fixed):
  """As published, class by class; the soft targets do not move with `clean`."""
  difference = clean - adv
  pairs = (difference[:, :, None] - difference[:, None, :]) ** 2
  spread = (weights[:, :, None] * weights[:, None, :] * pairs).sum((1, 2)) / 4
  soft = numpy_cross_entropy(adv, softmax(fixed))
  clean_term = numpy_cross_entropy(clean, targets)
  return (clean_term + beta * soft + pairwise * spread).mean()


def numpy_lbgat(clean, adv, natural, targets, beta):
  return (
    ((adv - natural) ** 2).mean()
    + numpy_cross_entropy(natural, targets).mean()
    + beta * numpy_kl(clean, adv).mean()
  )


def numpy_uat(clean, adv, targets, is_generated, beta, fixed):
  del clean  # No gradient flows into it.
  return (
    numpy_cross_entropy(adv, targets) + beta * is_generated * numpy_kl(fixed, adv)
  ).mean()


def finite_differences(function, x, step=1e-6):
  """Central differences in float64: error about step^2."""
  gradient = np.zeros_like(x)
  for index in np.ndindex(*x.shape):
    shift = np.zeros_like(x)
    shift[index] = step
    gradient[index] = (function(x + shift) - function(x - shift)) / (2 * step)
  return gradient
