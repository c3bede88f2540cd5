"""Denoising diffusion, the generator of the paper's best results.

A U-Net learns to predict the noise in noisy training images (Ho et al. 2020), by the
training loop of the classifiers; samples are drawn with its averaged parameters. With
`network.conditional` it learns the classes too, and its samples can be guided to them;
the paper's own network knew no classes.
"""

from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrobust.config import dataset_info, registries
from jaxrobust.data import augment
from jaxrobust.errors import UserError
from jaxrobust.generators import diffusion, heun, samplers, unet
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators.trained import Trained
from jaxrobust.runs import checkpoints, metrics
from jaxrobust.training import optimizer

_NETWORK = 'unet'
_MOST_LEFT = 0.01  # of an image's variance, at the end of the process; Ho et al.: 4e-5


@registries.GENERATORS.register('ddpm')
class DDPM(Trained):
  """A fitted generator; its variables are the averaged parameters of the network."""

  @classmethod
  def check(cls, settings, info: dataset_info.DatasetInfo):
    """Raises UserError for settings that cannot be meant for images of `info`."""
    network = settings.network
    unet.check(network, info)
    _check_process(settings.process)
    _make_sampler(settings)
    diffusion.check_guidance(settings)

  @classmethod
  def conditional(cls, settings) -> bool:
    """Whether samples are drawn for classes, by these settings."""
    return settings.network.conditional

  @classmethod
  def recipe(cls, settings, info: dataset_info.DatasetInfo) -> recipes.Recipe:
    """The network predicts noise (Ho et al., algorithm 1, with their settings).

    Deviation: the decay of the average grows to theirs, as `optimizer.ema_decay` says;
    theirs is constant from the first update.
    """
    network = make_network(settings, info)

    def init(rng):
      image = jnp.zeros((1, *info.image_shape))
      params = network.init(rng, image, jnp.zeros(1), jnp.zeros(1, jnp.int32))
      return {_NETWORK: params}, {}

    return recipes.Recipe(
      init_fn=init,
      optimizers={_NETWORK: make_optimizer(settings.training)},
      phases=(
        recipes.Phase(
          network=_NETWORK,
          metric=metrics.TRAIN_LOSS,
          loss_fn=make_loss(settings, info),
          streams=('flip', 'time', 'noise', 'condition', 'dropout'),
          decay_fn=lambda step: optimizer.ema_decay(settings.training.ema_decay, step),
        ),
      ),
      averaged_fn=lambda params, net_state: params[_NETWORK],
    )

  @classmethod
  def older_layout(cls, fresh: recipes.State) -> checkpoints.Layout:
    """That of the first versions, which saved it as a classifier's."""
    return checkpoints.Layout(
      _OlderState(
        params=fresh.params[_NETWORK],
        net_state={},
        opt_state=fresh.opt_state[_NETWORK],
        ema_params=fresh.averaged,
        ema_net_state={},
        step=fresh.step,
      ),
      lambda old: recipes.State(
        params={_NETWORK: old.params},
        net_state={},
        opt_state={_NETWORK: old.opt_state},
        averaged=old.ema_params,
        step=old.step,
      ),
    )

  @classmethod
  def make_draw(cls, settings, info: dataset_info.DatasetInfo):
    """Builds the function that draws samples; see Generator."""
    network = make_network(settings, info)
    sample = _make_sampler(settings)

    def draw(params, rngs, classes):
      predict = lambda x, t, classes=None: network.apply(params, x, t, classes)
      if settings.network.conditional:
        predict = diffusion.guided(
          predict, classes, info.num_classes, settings.sampling.guidance
        )
      images = sample(predict, rngs, info.image_shape)
      return (images + 1) * 127.5

    return draw


class _OlderState(NamedTuple):
  """The state of a fit as the first versions saved it."""

  params: Any
  net_state: Any
  opt_state: Any
  ema_params: Any
  ema_net_state: Any
  step: Any


def make_network(settings, info: dataset_info.DatasetInfo) -> hk.Transformed:
  """The network: `apply(params, images, times, classes, rngs) -> noise`."""
  fields = settings.network.to_dict()
  num_classes = info.num_classes if fields.pop('conditional') else 0
  return hk.without_apply_rng(
    hk.transform(lambda *inputs: unet.UNet(**fields, num_classes=num_classes)(*inputs))
  )


def make_optimizer(training) -> recipes.Optimizer:
  """Adam with a clipped gradient.

  Deviation: it gets, and clips, the mean gradient over all devices; the released code
  of Ho et al. clips that of each device before the mean.

  Args:
    training: `config.generator.training`.
  """
  learning_rate_fn = optimizer.schedule(
    'constant',
    learning_rate=training.learning_rate,
    num_steps=training.num_steps,
    warmup_steps=training.warmup_steps,
  )
  clip = optax.clip_by_global_norm(training.gradient_clip)
  adam = optax.adam(
    learning_rate_fn, b1=training.b1, b2=training.b2, eps=training.epsilon
  )
  return recipes.Optimizer(optax.chain(clip, adam), learning_rate_fn)


def make_loss(settings, info: dataset_info.DatasetInfo):
  """Builds the loss of `recipes.Phase`: the error of the predicted noise."""
  network = make_network(settings, info)
  process = diffusion.linear(**settings.process)
  training = settings.training

  def loss_fn(params, net_state, batch, rngs):
    each = lambda stream, draw: jax.vmap(draw)(rngs(stream))
    images = augment.augment(batch.images, rngs('flip'), pad=0, flip=training.flip)
    num_steps = len(process.betas)
    times = each('time', lambda rng: jax.random.randint(rng, (), 0, num_steps))
    noise = each('noise', lambda rng: jax.random.normal(rng, images.shape[1:]))
    unconditional = each(
      'condition', lambda rng: jax.random.bernoulli(rng, training.condition_dropout)
    )
    classes = jnp.where(unconditional, info.num_classes, batch.labels)
    dropout = rngs('dropout')
    predict = lambda x, t: network.apply(params[_NETWORK], x, t, classes, dropout)
    losses = diffusion.loss(predict, process, 2 * images - 1, times, noise)
    return jnp.mean(losses), (net_state, {})

  return loss_fn


def _make_sampler(settings):
  """`(predict, rngs, shape) -> images`; UserError for steps that cannot be made."""
  process, sampling = diffusion.linear(**settings.process), settings.sampling
  if sampling.sampler != 'heun':
    table = samplers.SAMPLERS[sampling.sampler](process, sampling.num_steps)
    return lambda predict, *given: samplers.sample(predict, table, *given)
  if sampling.num_steps < 2:
    raise UserError(
      f'config.generator.sampling.num_steps = {sampling.num_steps}: heun takes 2 '
      'or more'
    )
  levels = heun.schedule(sampling.num_steps, *process.sigmas[[0, -1]])
  steps = heun.table(levels)
  return lambda predict, *given: heun.sample(
    diffusion.denoiser(predict, process), steps, *given
  )


def _check_process(settings):
  """Raises UserError unless the process ends in noise, by numbers that float32 has."""
  left = diffusion.linear(**settings).alpha_bars[-1]
  least = np.finfo(np.float32).tiny
  if not least <= left <= _MOST_LEFT:
    raise UserError(
      f'config.generator.process leaves {left:.3g} of the variance of an image after '
      f'{settings.num_steps} steps, and sampling starts from noise alone: leave '
      f'{least:.0e} to {_MOST_LEFT} (more steps or greater betas leave less)'
    )
