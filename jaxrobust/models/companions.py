"""What is learnt beside the robust network and left out of its checkpoint.

Companions lie in the trees of the network, under modules whose names start with
`beside/`, so that checkpoints, averages and resuming know nothing of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from jaxrobust import models
from jaxrobust.config import dataset_info

_PREFIX = 'beside/'
_NATURAL = f'{_PREFIX}natural/'
_CLASSES = f'{_PREFIX}classes'


def for_training(
  config: config_dict.ConfigDict, info: dataset_info.DatasetInfo
) -> models.Model:
  """The network of a config, with what its loss learns beside it.

  Args:
    config: a classifier's.
    info: DatasetInfo of its data set.

  Returns:
    Its `apply` is the network's and leaves companions as they are. With loss 'lbgat'
    `natural` applies the network that is trained without attacks.
  """
  model = models.from_config(config.model, info)
  if config.loss.name == 'lbgat':
    settings = config.model.copy_and_resolve_references()
    with settings.unlocked():
      settings.name = config.loss.natural_model
    return _with_natural(model, models.from_config(settings, info))
  if config.loss.divergence == 'improved_kl':
    return _with_classes(model, info.num_classes)
  return model


def without(tree: Mapping[str, Any]) -> dict[str, Any]:
  """The network's own part of its parameters or its state."""
  return {k: v for k, v in tree.items() if not k.startswith(_PREFIX)}


def has_classes(net_state: Mapping[str, Any]) -> bool:
  """Whether mean predictions of the classes are kept in a state."""
  return _CLASSES in net_state


def class_weights(net_state: Mapping[str, Any], labels: jax.Array) -> jax.Array:
  """The mean prediction for images of the same class, [B, K]; rows sum to 1."""
  sums = net_state[_CLASSES]['sums'][labels]
  return sums / jnp.sum(sums, axis=-1, keepdims=True)


def with_predictions(
  net_state: Mapping[str, Any],
  labels: jax.Array,
  logits: jax.Array,
  temperature: float,
  decay: float,
) -> dict[str, Any]:
  """The state after a batch's predictions have joined the means of their classes.

  Linear in the batch, so that means over devices and parts of a batch are exact.

  Args:
    net_state: of a network `for_training`.
    labels: int [B].
    logits: [B, K].
    temperature: divides the logits.
    decay: of earlier batches, a step.
  """
  classes = jax.nn.one_hot(labels, logits.shape[-1])
  predictions = jax.nn.softmax(jax.lax.stop_gradient(logits) / temperature)
  sums = decay * net_state[_CLASSES]['sums']
  sums += (1 - decay) * classes.T @ predictions / len(labels)
  return {**net_state, _CLASSES: {'sums': sums}}


def _with_natural(model, natural):
  """Both networks in one tree."""
  put = lambda tree: {f'{_NATURAL}{k}': v for k, v in tree.items()}
  take = lambda tree: {
    k.removeprefix(_NATURAL): v for k, v in tree.items() if k.startswith(_NATURAL)
  }

  def init(rng):
    params, net_state = model.init(rng)
    other, other_state = natural.init(jax.random.fold_in(rng, 1))
    return params | put(other), net_state | put(other_state)

  def apply_natural(params, net_state, images, batch_stats):
    logits, moved = natural.apply(take(params), take(net_state), images, batch_stats)
    return logits, net_state | put(moved)

  return model._replace(init=init, natural=apply_natural)


def _with_classes(model, num_classes):
  """The network with the mean predictions of each class, uniform at first."""

  def init(rng):
    params, net_state = model.init(rng)
    sums = jnp.full((num_classes, num_classes), 1 / num_classes**2)
    return params, net_state | {_CLASSES: {'sums': sums}}

  return model._replace(init=init)
