"""The loss of a step: clean pass → attack → adversarial pass → terms."""

import jax
import jax.numpy as jnp

from jaxrobust.attacks import norms, objectives, pgd
from jaxrobust.errors import UserError
from jaxrobust.models import companions
from jaxrobust.training import losses


def make(config, model):
  """Builds the loss of a config, without weight decay.

  Args:
    config: a classifier's config.
    model: of `models.build`, or of `beside.for_training`.

  Returns:
    `loss(params, net_state, images, targets, is_generated, rngs, adv_images=None) ->
    (loss, (net_state, adv_images, metrics))`. Keys are of the attack, which is left out
    where its images are given.

  Raises:
    UserError: for an attack that cannot be meant.
  """
  name = config.loss.name
  attack = None
  if name != 'standard':
    attack = pgd.from_config(
      config.attack, norms.get(config.threat.norm, config.threat.epsilon)
    )
  reference_of = _make_reference(config)

  def loss_fn(params, net_state, images, targets, is_generated, rngs, adv_images=None):
    forward = lambda p, x: model.apply(p, net_state, x, batch_stats=True)
    labels = jnp.argmax(targets, axis=-1)
    accuracy = lambda logits: jnp.mean(jnp.argmax(logits, axis=-1) == labels)
    metrics = {}
    if name == 'standard':
      adv_images = images
      logits, net_state = forward(params, images)
      metrics['train/clean_accuracy'] = accuracy(logits)
      loss = jnp.mean(losses.cross_entropy(logits, targets))
    else:
      # One clean pass serves the loss and, held fixed, the attack: both use the
      # statistics of the same batch and the same parameters.
      clean_logits = forward(params, images)[0]
      if adv_images is None:
        frozen = jax.lax.stop_gradient(params)
        adv_images = attack(
          lambda x: forward(frozen, x)[0],
          rngs,
          images,
          reference_of(jax.lax.stop_gradient(clean_logits), targets),
        )
      adv_logits, net_state = forward(params, adv_images)
      metrics['train/clean_accuracy'] = accuracy(clean_logits)
      metrics['train/adv_accuracy'] = accuracy(adv_logits)
      beta = config.loss.beta
      if name == 'adversarial':
        loss = jnp.mean(losses.cross_entropy(adv_logits, targets))
      elif name == 'uat':
        loss = losses.uat(clean_logits, adv_logits, targets, is_generated, beta)
      elif name == 'lbgat':
        natural_logits, net_state = model.natural(
          params, net_state, images, batch_stats=True
        )
        metrics['train/natural_accuracy'] = accuracy(natural_logits)
        loss = losses.lbgat(clean_logits, adv_logits, natural_logits, targets, beta)
      elif config.loss.divergence == 'squared':
        loss = losses.score(clean_logits, adv_logits, targets, beta)
      elif config.loss.divergence == 'improved_kl':
        weights = companions.class_weights(net_state, labels)
        net_state = companions.with_predictions(
          net_state,
          labels,
          clean_logits,
          config.loss.class_temperature,
          config.loss.class_decay,
        )
        loss = losses.improved_kl(
          clean_logits, adv_logits, targets, weights, beta, config.loss.pairwise
        )
      else:
        loss = losses.trades(clean_logits, adv_logits, targets, beta)
    return loss, (net_state, adv_images, metrics)

  return loss_fn


def with_weight_decay(config, loss_fn):
  """The loss of `make` with the weight decay that is part of it, in the metrics too."""

  def decayed(params, *args):
    loss, (net_state, adv_images, metrics) = loss_fn(params, *args)
    loss += config.loss.weight_decay * losses.weight_decay(params)
    return loss, (net_state, adv_images, {**metrics, 'train/loss': loss})

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
