"""The loss of a step: clean pass → attack → adversarial pass → loss of the passes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from jaxrobust import models
from jaxrobust.attacks import norms, objectives, pgd
from jaxrobust.config import registries
from jaxrobust.errors import UserError
from jaxrobust.models import companions
from jaxrobust.runs import metrics as names
from jaxrobust.training import losses


class Inputs(NamedTuple):
  """What a step trains on, of one device.

  Attributes:
    images: float [b, H, W, C] in [0, 1], augmented.
    targets: float [b, K], rows that sum to 1.
    is_generated: bool [b].
    rngs: keys [b] of the attack.
    adv_images: float [b, H, W, C]; None where the attack is still to be run.
  """

  images: jax.Array
  targets: jax.Array
  is_generated: jax.Array
  rngs: jax.Array
  adv_images: jax.Array | None = None


# (params, net_state, inputs) → (loss [], (net_state, adv_images, metrics)).
LossFn = Callable[[Any, Any, Inputs], tuple[jax.Array, tuple[Any, jax.Array, dict]]]


def make(config: config_dict.ConfigDict, model: models.Model) -> LossFn:
  """Builds the loss of a config, without weight decay.

  Args:
    config: a classifier's config.
    model: of `models.build`, or of `companions.for_training`.

  Returns:
    `loss(params, net_state, inputs) -> (loss, (net_state, adv_images, metrics))`, of
    Inputs. The attack is left out where its images are given.

  Raises:
    UserError: for an attack that cannot be meant, or a loss that does not exist.
  """
  loss_of_passes = registries.LOSSES.get(config.loss.name, 'config.loss.name')
  attack = None
  if config.loss.name != 'standard':
    attack = pgd.from_config(
      config.attack, norms.get(config.threat.norm, config.threat.epsilon)
    )
  reference_of = _make_reference(config)

  def loss_fn(params, net_state, inputs: Inputs):
    images, targets, adv_images = inputs.images, inputs.targets, inputs.adv_images
    forward = lambda p, x: model.apply(p, net_state, x, batch_stats=True)
    labels = jnp.argmax(targets, axis=-1)
    accuracy = lambda logits: jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    metrics = {}
    # One clean pass serves the loss and, held fixed, the attack: both use the
    # statistics of the same batch and the same parameters.
    clean_logits, moved = forward(params, images)
    if attack is None:
      adv_images, adv_logits = images, clean_logits
      metrics[names.TRAIN_CLEAN] = accuracy(clean_logits)
    else:
      if adv_images is None:
        frozen = jax.lax.stop_gradient(params)
        adv_images = attack(
          lambda x: forward(frozen, x)[0],
          inputs.rngs,
          images,
          reference_of(jax.lax.stop_gradient(clean_logits), targets),
        )
      # Only the adversarial pass moves the running statistics.
      adv_logits, moved = forward(params, adv_images)
      metrics[names.TRAIN_CLEAN] = accuracy(clean_logits)
      metrics[names.TRAIN_ADV] = accuracy(adv_logits)
    passes = losses.Passes(clean_logits, adv_logits, targets, inputs.is_generated)
    if model.natural is not None:
      logits, moved = model.natural(params, moved, images, batch_stats=True)
      metrics[names.TRAIN_NATURAL] = accuracy(logits)
      passes = passes._replace(natural_logits=logits)
    if companions.has_classes(net_state):
      passes = passes._replace(class_weights=companions.class_weights(moved, labels))
      moved = companions.with_predictions(
        moved,
        labels,
        clean_logits,
        config.loss.class_temperature,
        config.loss.class_decay,
      )
    loss = loss_of_passes(passes, config.loss)
    if jnp.ndim(loss):
      raise UserError(
        f'loss {config.loss.name!r} gave shape {list(jnp.shape(loss))}: return its '
        'mean over the images'
      )
    return loss, (moved, adv_images, metrics)

  return loss_fn


def with_weight_decay(config: config_dict.ConfigDict, loss_fn: LossFn) -> LossFn:
  """The loss of `make` with the weight decay that is part of it, in the metrics too."""

  def decayed(params, *args):
    loss, (net_state, adv_images, metrics) = loss_fn(params, *args)
    loss += config.loss.weight_decay * losses.weight_decay(params)
    return loss, (net_state, adv_images, {**metrics, names.TRAIN_LOSS: loss})

  return decayed


def _make_reference(config):
  """`(clean logits, targets) → what the attack moves away from`."""
  wants = objectives.REFERENCES[config.attack.objective]
  mixed = config.augment.cutmix or config.augment.mixup
  if wants == 'labels':
    if mixed:
      raise UserError(
        f'config.attack.objective = {config.attack.objective!r} wants hard labels, '
        'which CutMix and mixup mix: use kl_divergence or cross_entropy'
      )
    return lambda clean_logits, targets: jnp.argmax(targets, axis=-1)
  if wants == 'probabilities' and not mixed:
    return lambda clean_logits, targets: jax.nn.softmax(clean_logits)
  # With CutMix the published attack moves away from the mixed targets; so it does here
  # with mixup, of which the published attack is not known to us.
  return lambda clean_logits, targets: targets
