"""EDM, the diffusion of Karras et al. 2022, from which today's sample sets are drawn.

A U-Net learns to take noise of any strength from images ("Elucidating the Design Space
of Diffusion-Based Generative Models"); samples are drawn with its averaged parameters,
in 35 evaluations. Beside the noise it may know the class, and it knows how an image was
augmented, so that no sample is.
"""

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from etils import epath
from ml_collections import config_dict

from jaxrobust.config import dataset_info, registries
from jaxrobust.errors import UserError
from jaxrobust.generators import diffusion, heun, samplers, unet
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators.edm import augmentation, denoising, network, released
from jaxrobust.generators.trained import Trained
from jaxrobust.runs import metrics
from jaxrobust.training import optimizer

_NETWORK = 'unet'


@registries.GENERATORS.register('edm')
class EDM(Trained):
  """A fitted generator; its variables are the averaged parameters of the network."""

  licence = released.LICENCE

  @classmethod
  def check(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> None:
    """Raises UserError for settings that cannot be meant for images of `info`."""
    unet.check(settings.network, info)
    sampling = settings.sampling
    if sampling.least_sigma >= sampling.greatest_sigma:
      raise UserError(
        f'config.generator.sampling.least_sigma = {sampling.least_sigma}: use less '
        f'than greatest_sigma = {sampling.greatest_sigma}'
      )
    if sampling.churn and sampling.sampler != 'heun':
      raise UserError(
        f'config.generator.sampling.churn = {sampling.churn} for the sampler '
        f'{sampling.sampler}: use 0, or the sampler heun'
      )
    diffusion.check_guidance(settings)

  @classmethod
  def conditional(cls, settings: config_dict.ConfigDict) -> bool:
    """Whether samples are drawn for classes, by these settings."""
    return settings.network.conditional

  @classmethod
  def recipe(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> recipes.Recipe:
    """The network takes noise away (Karras et al., equation 8, with their settings)."""
    net, training = make_network(settings, info), settings.training

    def init(rng):
      image = jnp.zeros((1, *info.image_shape))
      return {_NETWORK: net.init(rng, image, jnp.zeros(1), jnp.zeros(1, int))}, {}

    return recipes.Recipe(
      init_fn=init,
      optimizers={_NETWORK: make_optimizer(training)},
      phases=(
        recipes.Phase(
          network=_NETWORK,
          metric=metrics.TRAIN_LOSS,
          loss_fn=make_loss(settings, info),
          streams=('augment', 'sigma', 'noise', 'condition', 'dropout'),
          decay_fn=lambda step: optimizer.halflife_decay(
            step,
            batch_size=training.batch_size,
            halflife=training.ema_halflife_images,
            ramp=training.ema_ramp,
          ),
        ),
      ),
      averaged_fn=lambda params, net_state: params[_NETWORK],
    )

  @classmethod
  def make_draw(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> Callable:
    """Builds the function that draws samples; see Generator."""
    denoise = make_denoiser(settings, info)
    sampling = settings.sampling
    ends = sampling.least_sigma, sampling.greatest_sigma
    if sampling.sampler == 'heun':
      table = heun.table(
        heun.schedule(sampling.num_steps, *ends, sampling.exponent),
        churn=sampling.churn,
        churn_range=(sampling.churn_least_sigma, sampling.churn_greatest_sigma),
        churn_noise=sampling.churn_noise,
      )
    else:
      table = samplers.dpm_solver_between(*ends, sampling.num_steps)

    def draw(params, rngs, classes):
      known = lambda x, sigmas, classes=None: denoise(params, x, sigmas, classes)
      if settings.network.conditional:
        known = diffusion.guided(known, classes, info.num_classes, sampling.guidance)
      if sampling.sampler == 'heun':
        images = heun.sample(known, table, rngs, info.image_shape)
      else:
        predict = diffusion.noise_predictor(known)
        images = samplers.sample(predict, table, rngs, info.image_shape)
      return (images + 1) * 127.5

    return draw

  @classmethod
  def read_released(
    cls,
    path: epath.Path,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
  ) -> dict:
    """Reads `edm-cifar10-32x32-cond-vp.pkl` and its like; see Generator."""
    return released.read(path)


def make_network(
  settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
) -> hk.Transformed:
  """The network: `apply(params, images, levels, classes, labels, rngs) -> F`."""
  fields = settings.network.to_dict()
  del fields['data_sigma']
  num_classes = info.num_classes if fields.pop('conditional') else 0
  return hk.without_apply_rng(
    hk.transform(
      lambda *inputs: network.UNet(**fields, num_classes=num_classes)(*inputs)
    )
  )


def make_denoiser(
  settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
) -> Callable:
  """D: `(params, noisy images, sigmas, classes, labels, rngs) -> images`."""
  net = make_network(settings, info)

  def denoise(params, images, sigmas, *conditions):
    apply = lambda *inputs: net.apply(params, *inputs)
    return denoising.denoiser(apply, settings.network.data_sigma)(
      images, sigmas, *conditions
    )

  return denoise


def make_optimizer(training: config_dict.ConfigDict) -> recipes.Optimizer:
  """Adam; gradients that are not finite become 0, or 1e5 where infinite, as theirs.

  Args:
    training: `config.generator.training`.
  """
  warmup = training.warmup_images / training.batch_size

  def learning_rate_fn(step):
    return training.learning_rate * jnp.minimum(step / warmup if warmup else 1.0, 1.0)

  finite = lambda x: jnp.nan_to_num(x, nan=0.0, posinf=1e5, neginf=-1e5)
  adam = optax.adam(
    learning_rate_fn, b1=training.b1, b2=training.b2, eps=training.epsilon
  )
  return recipes.Optimizer(
    optax.chain(
      optax.stateless(lambda updates, params: jax.tree.map(finite, updates)), adam
    ),
    learning_rate_fn,
  )


def make_loss(
  settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
) -> Callable:
  """Builds the loss of `recipes.Phase`: the error of images without their noise."""
  denoise, training = make_denoiser(settings, info), settings.training

  def loss_fn(params, net_state, batch, rngs):
    each = lambda stream, draw: jax.vmap(draw)(rngs(stream))
    images, labels = augmentation.augment(
      jnp.float32(batch.images) / 127.5 - 1,
      rngs('augment'),
      probability=training.augmentation,
      flip=training.flip,
    )
    sigmas = jnp.exp(
      training.log_sigma_mean
      + training.log_sigma_deviation * each('sigma', jax.random.normal)
    )
    noise = each('noise', lambda rng: jax.random.normal(rng, images.shape[1:]))
    unconditional = each(
      'condition', lambda rng: jax.random.bernoulli(rng, training.condition_dropout)
    )
    classes = jnp.where(unconditional, info.num_classes, batch.labels)
    dropout = rngs('dropout')
    known = lambda x, s: denoise(params[_NETWORK], x, s, classes, labels, dropout)
    losses = denoising.loss(known, images, sigmas, noise, settings.network.data_sigma)
    return jnp.mean(losses), (net_state, {})

  return loss_fn
