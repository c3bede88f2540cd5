"""The training step: augment → attack → loss → gradient → update → average.

A step is a function of one device's shard of the batch, to be mapped by
`parallel.pmap`. Whatever is random is drawn from (seed, step, global slot), so that
a run does not depend on how its batch is spread over devices, and a resumed run
repeats nothing and misses nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import config_dict

from jaxrobust import models
from jaxrobust.config import dataset_info
from jaxrobust.data import augment, policies
from jaxrobust.data.pipeline import Batch
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.training import optimizer as optimizers
from jaxrobust.training import step_loss, weight_perturbation


class TrainState(NamedTuple):
  """What a run is after `step` updates.

  Attributes:
    params: parameters being trained.
    net_state: BatchNorm statistics of `params`.
    opt_state: of the optimizer.
    ema_params: averaged parameters.
    ema_net_state: BatchNorm statistics that go with `ema_params`.
    step: completed updates, int32 [].
  """

  params: Any
  net_state: Any
  opt_state: Any
  ema_params: Any
  ema_net_state: Any
  step: jax.Array


def init_state(
  config: config_dict.ConfigDict,
  model: models.Model,
  optimizer: optax.GradientTransformation,
  root: jax.Array | None = None,
) -> TrainState:
  """The state before the first update; a function of `config.seed`.

  Args:
    config: a classifier's config.
    model: of `models.build`.
    optimizer: of `optimizer.make`.
    root: of `root_of(config)`, for a program that serves all seeds.
  """
  params, net_state = model.init(_stream(config.seed, 'init', root))
  return TrainState(
    params=params,
    net_state=net_state,
    opt_state=optimizer.init(params),
    ema_params=params,
    ema_net_state=net_state,
    step=jnp.zeros([], jnp.int32),
  )


def batch_like(info: dataset_info.DatasetInfo, images: int) -> Batch:
  """Shapes of a device's batch of so many images, as jax.ShapeDtypeStruct."""
  array = lambda kind, *shape: jax.ShapeDtypeStruct((images, *shape), kind)
  return Batch(
    array(jnp.uint8, *info.image_shape),
    array(jnp.int32),
    array(bool),
    array(jnp.int32),
  )


def make_step(
  config: config_dict.ConfigDict,
  model: models.Model,
  optimizer: optax.GradientTransformation,
  num_classes: int,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Builds the training step of the released recipe, or a variant of it.

  BatchNorm: the clean pass and every pass of the attack use the statistics of their
  own batch and leave the running ones alone; the adversarial pass updates them. The
  running statistics are averaged over devices at each step. With weight perturbation
  the adversarial pass at the perturbed weights updates them, as in its authors' code.
  Deviation: the released code keeps those of each device apart and saves the first
  device's. The average does not depend on the layout, and training does not see it.

  Args:
    config: a classifier's config.
    model: of `models.build`.
    optimizer: of `optimizer.make`.
    num_classes: K.

  Returns:
    `step(state, batch, root=None) -> (state, metrics)` for one device inside
    `parallel.pmap`; metrics are means over the global batch, float32 []. With
    `root_of(config)` as an argument one program serves all seeds.
  """
  loss_fn = step_loss.make(config, model)
  value_and_grad = jax.value_and_grad(
    step_loss.with_weight_decay(config, loss_fn), has_aux=True
  )
  parts = config.training.accumulation

  def step(state: TrainState, batch: Batch, root: jax.Array | None = None):
    inputs = _augmented(config, num_classes, state.step, batch, root)
    check_parts(len(inputs.images), parts, config.model.batch_norm_group)
    params = state.params
    if config.loss.awp_gamma:
      params, adv_images = _perturbed(config, loss_fn, state, inputs)
      inputs = inputs._replace(adv_images=adv_images)

    def pass_of(inputs):
      (_, (net_state, adv_images, metrics)), grads = value_and_grad(
        params, state.net_state, inputs
      )
      return (grads, net_state, metrics), adv_images

    means, adv_images = _in_parts(pass_of, parts, inputs)
    grads, net_state, metrics = parallel.mean_over_devices(means)
    params, opt_state, ema_params = descend(state, grads, optimizer, config.ema.decay)
    if config.ema.batch_norm == 'own':
      statistics_of = lambda x: (
        model.apply(ema_params, state.ema_net_state, x, batch_stats=True)[1],
        None,
      )
      means, _ = _in_parts(statistics_of, parts, adv_images)
      ema_net_state = parallel.mean_over_devices(means)
    else:
      ema_net_state = net_state
    return TrainState(
      params, net_state, opt_state, ema_params, ema_net_state, state.step + 1
    ), metrics

  return step


def descend(
  state: TrainState, grads: Any, optimizer: optax.GradientTransformation, decay: float
) -> tuple[Any, Any, Any]:
  """One update of the parameters and of their average.

  Args:
    state: before the update.
    grads: means over the global batch, as `state.params`.
    optimizer: that made `state.opt_state`.
    decay: of the average, a step; smaller in the first steps.

  Returns:
    (params, opt_state, ema_params) after it.
  """
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  decay = optimizers.ema_decay(decay, state.step)
  ema_params = optax.incremental_update(params, state.ema_params, 1 - decay)
  return params, opt_state, ema_params


def check_parts(batch_size: int, parts: int, group_size: int) -> None:
  """Raises UserError if a device's batch has no `parts` of whole BatchNorm groups.

  Args:
    batch_size: images of a device's batch.
    parts: `training.accumulation`.
    group_size: images that share statistics.
  """
  if parts > 1 and batch_size % (parts * group_size):
    raise UserError(
      f'config.training.accumulation = {parts} would cut BatchNorm groups of '
      f'{group_size} images in a device batch of {batch_size}: use a divisor of '
      f'{max(batch_size // group_size, 1)}, or fewer devices'
    )


def _in_parts(fn, count, inputs):
  """`fn(inputs) -> (means, each)`, a part of the images after the other.

  `means`, which must be means over images or not depend on them, are averaged; `each`
  has a leading axis of images.
  """
  if count == 1:
    return fn(inputs)
  split = lambda x: x.reshape(count, -1, *x.shape[1:])
  parts = jax.tree.map(split, inputs)
  inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)

  def one(total, part):
    means, each = fn(part)
    add = lambda t, x: t + x / count if inexact(x) else x
    return jax.tree.map(add, total, means), each

  shapes, _ = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts))
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  means, each = jax.lax.scan(one, nothing, parts)
  return means, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each)


def _perturbed(config, loss_fn, state, inputs):
  """Weights moved against the network, and the images that were attacked before.

  The published code leaves weight decay out of the direction and moves nothing in the
  first epochs; there the length is 0 here, at the price of a gradient.
  """
  gradient = jax.grad(loss_fn, has_aux=True)

  def pass_of(inputs):
    grads, (_, adv_images, _) = gradient(state.params, state.net_state, inputs)
    return grads, adv_images

  grads, adv_images = _in_parts(pass_of, config.training.accumulation, inputs)
  images = config.loss.awp_warmup_epochs * config.training.epoch_examples
  warm = state.step >= int(images / config.data.batch_size)
  gamma = jnp.where(warm, config.loss.awp_gamma, 0.0)
  grads = parallel.mean_over_devices(grads)
  return weight_perturbation.perturb(state.params, grads, gamma), adv_images


def _augmented(config, num_classes, step, batch: Batch, root=None) -> step_loss.Inputs:
  """What the step of a number trains on."""
  rng = lambda name: jax.random.fold_in(_stream(config.seed, name, root), step)
  rngs = lambda name: parallel.key_per_slot(rng(name), batch.slots)
  options, mean = config.augment, config.model.mean
  images = batch.images
  if options.policy == 'randaugment':
    images = policies.randaugment(
      images,
      rngs('policy'),
      num_operations=options.randaugment_operations,
      magnitude=options.randaugment_magnitude / 30,
      fill=mean,
    )
  elif options.policy == 'autoaugment':
    images = policies.autoaugment(images, rngs('policy'), fill=mean)
  images = augment.augment(images, rngs('augment'), pad=options.pad, flip=options.flip)
  if options.cutout:
    images = augment.cutout(images, rngs('cutout'), options.cutout, fill=mean)
  targets = augment.one_hot_targets(
    batch.labels,
    batch.is_generated,
    num_classes,
    options.label_smoothing,
    options.smooth_real_labels,
  )
  if options.cutmix or options.mixup:
    # The partner may be on another device: mix the whole batch, keep our slots.
    slots, all_images, all_targets = parallel.all_gather((batch.slots, images, targets))
    order = jnp.argsort(slots)
    whole = all_images[order], all_targets[order]
    # Unset: a part for each BatchNorm group, as published for each device's batch.
    parts = options.cutmix_workers or len(order) // config.model.batch_norm_group
    if options.cutmix:
      images, targets = augment.cutmix(*whole, rng('cutmix'), parts)
    else:
      images, targets = augment.mixup(*whole, rng('mixup'), parts, options.mixup_alpha)
    images, targets = images[batch.slots], targets[batch.slots]
  return step_loss.Inputs(images, targets, batch.is_generated, rngs('attack'))


def root_of(config: config_dict.ConfigDict) -> np.ndarray:
  """What all randomness of a run comes from, uint32 [2]: of `config.seed`."""
  return np.asarray(jax.random.key_data(jax.random.key(config.seed)))


def _stream(seed: int, name: str, root: jax.Array | None = None) -> jax.Array:
  """The key of one use of randomness; new ones come last, or old runs change."""
  streams = ('init', 'augment', 'cutmix', 'attack', 'policy', 'cutout', 'mixup')
  key = jax.random.key(seed) if root is None else jax.random.wrap_key_data(root)
  return jax.random.fold_in(key, streams.index(name))
