"""StyleGAN2 with adaptive augmentation of what the discriminator sees.

Source: Karras et al. 2020, "Training generative adversarial networks with limited
data", whose configuration for CIFAR-10 is the default.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import config_dict

from jaxrobust.config import dataset_info, registries
from jaxrobust.errors import UserError
from jaxrobust.generators import adversarial
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators.stylegan2 import networks, released, training

_LATENT, _NOISE = range(2)  # what a sample's key is used for


@registries.GENERATORS.register('stylegan2')
class StyleGAN2(adversarial.Adversarial):
  """A fitted generator; its variables are G's averaged parameters and mean style."""

  licence = released.LICENCE

  @classmethod
  def check(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> None:
    """Raises UserError for settings that cannot be meant for images of `info`."""
    height, width, _ = info.image_shape
    if height != width or height < 8 or height & (height - 1):
      raise UserError(
        f'images of {height}x{width} pixels: stylegan2 makes squares of 8, 16, 32, … '
        'pixels a side; use another generator'
      )
    network, size = settings.network, settings.training.batch_size
    if network.channels_base < height:
      raise UserError(
        f'config.generator.network.channels_base = {network.channels_base} leaves '
        f'images of {height} pixels a side no channel: use {height} or more'
      )
    if size % _group(settings):
      raise UserError(
        f'config.generator.network.stddev_group = {network.stddev_group} does not '
        f'divide config.generator.training.batch_size = {size}: use a divisor of it'
      )

  @classmethod
  def check_devices(
    cls,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
    num_devices: int,
  ) -> None:
    """Raises UserError if devices cannot share a batch, or a group of it, equally."""
    super().check_devices(settings, info, num_devices)
    group = _group(settings)
    images = settings.training.batch_size // num_devices
    if images % group and group % images:
      raise UserError(
        f'config.generator.network.stddev_group = {group} and {images} images on each '
        f'of {num_devices} devices: one must be a multiple of the other; change it, '
        'config.generator.training.batch_size or the number of devices'
      )

  @classmethod
  def conditional(cls, settings: config_dict.ConfigDict) -> bool:
    """Whether samples are drawn for classes, by these settings."""
    return settings.network.conditional

  @classmethod
  def recipe(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> recipes.Recipe:
    """How it is trained; see `training`."""
    return training.make_recipe(_functions(settings, info), settings.training)

  @classmethod
  def make_draw(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> Callable:
    """Builds the function that draws samples; see Generator."""
    functions = _functions(settings, info)
    truncation = settings.sampling.truncation

    def draw(variables, rngs, classes):
      use = lambda number: jax.vmap(lambda rng: jax.random.fold_in(rng, number))(rngs)
      latents = jax.vmap(lambda rng: jax.random.normal(rng, (functions.latent_size,)))(
        use(_LATENT)
      )
      styles = functions.style_fn(variables, latents, classes)
      mean = variables['style_mean'][None]
      styles = mean + truncation * (styles - mean)
      styles = jnp.repeat(styles[:, None], functions.num_styles, 1)
      return (functions.image_fn(variables, styles, use(_NOISE)) + 1) * 127.5

    return draw

  @classmethod
  def read_released(
    cls,
    path: epath.Path,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
  ) -> dict:
    """Reads G_ema of a pickle of stylegan2-ada-pytorch; see Generator."""
    return released.read(path)


def _group(settings) -> int:
  """Images of a batch that share a standard deviation."""
  return min(settings.network.stddev_group, settings.training.batch_size)


def _functions(settings, info: dataset_info.DatasetInfo) -> training.Functions:
  """The networks, with G's two as a tree of both."""
  network = settings.network
  mapping, synthesis, discriminator = networks.make(network, info, _group(settings))
  num_styles = networks.num_styles(info.image_shape[0])

  def init(rng):
    rngs = jax.random.split(rng, 3)
    classes = jnp.zeros(1, jnp.int32)
    latents = jnp.zeros((1, network.latent_size))
    styles = jnp.zeros((1, num_styles, network.style_size))
    images = jnp.zeros((1, *info.image_shape))
    return {
      training.GENERATOR: {
        'mapping': mapping.init(rngs[0], latents, classes),
        'synthesis': synthesis.init(rngs[1], styles, None),
      },
      training.DISCRIMINATOR: discriminator.init(rngs[2], images, classes),
    }

  return training.Functions(
    init_fn=init,
    style_fn=lambda params, *given: mapping.apply(params['mapping'], *given),
    image_fn=lambda params, *given: synthesis.apply(params['synthesis'], *given),
    logit_fn=discriminator.apply,
    latent_size=network.latent_size,
    style_size=network.style_size,
    num_styles=num_styles,
  )
