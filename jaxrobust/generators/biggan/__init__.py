"""BigGAN, a generator that knows classes, trained against a discriminator that does.

Source: Brock et al. 2019, "Large scale GAN training for high fidelity natural image
synthesis"; the defaults are the recipe for CIFAR-10 of the PyTorch code that its first
author published.
"""

from collections.abc import Callable

import jax
from etils import epath
from ml_collections import config_dict

from jaxrobust.config import dataset_info, registries
from jaxrobust.errors import UserError
from jaxrobust.generators import adversarial
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators.biggan import networks, released, training


@registries.GENERATORS.register('biggan')
class BigGAN(adversarial.Adversarial):
  """A fitted generator; its variables are G's averaged parameters and state.

  Samples are drawn with the statistics of the state, so that each is by itself.
  Deviation: the published code draws them in batches of training mode, where an image
  depends on the others.
  """

  licence = released.LICENCE

  @classmethod
  def check(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> None:
    """Raises UserError for settings that cannot be meant for images of `info`."""
    network, fields = settings.network, 'config.generator.network'
    _check_sizes(network, info)
    if network.hierarchical and not network.shared_size:
      raise UserError(
        f'{fields}.hierarchical = True joins parts of the latent vector to a shared '
        f'embedding: set {fields}.shared_size, or hierarchical to False'
      )
    parts = len(network.multipliers)
    if network.hierarchical and network.latent_size % parts:
      raise UserError(
        f'{fields}.latent_size = {network.latent_size} is cut into {parts} parts by '
        f'hierarchical latents: use a multiple of {parts}'
      )
    own = settings.training
    steps = own.discriminator_steps * own.batch_norm_group
    if own.batch_size % steps:
      raise UserError(
        f'config.generator.training.batch_size = {own.batch_size} is cut into '
        f'{own.discriminator_steps} parts (discriminator_steps), and these into groups '
        f'of {own.batch_norm_group} (batch_norm_group): use a multiple of {steps}'
      )

  @classmethod
  def check_devices(
    cls,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
    num_devices: int,
  ) -> None:
    """Raises UserError if devices cannot share parts of a batch, or groups of them."""
    super().check_devices(settings, info, num_devices)
    fields = settings.training
    images = fields.batch_size // num_devices // fields.discriminator_steps
    group = fields.batch_norm_group
    if images % group and group % images:
      raise UserError(
        f'config.generator.training.batch_norm_group = {group} and parts of {images} '
        f'images on each of {num_devices} devices: one must be a multiple of the '
        'other; change it, batch_size, discriminator_steps or the number of devices'
      )

  @classmethod
  def conditional(cls, settings: config_dict.ConfigDict) -> bool:
    """It always is."""
    return True

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
    functions, limit = _functions(settings, info), settings.sampling.truncation
    shape = (functions.latent_size,)

    def latent(rng):
      if limit:
        return jax.random.truncated_normal(rng, -limit, limit, shape)
      return jax.random.normal(rng, shape)

    def draw(variables, rngs, classes):
      latents = jax.vmap(latent)(rngs)
      images, _ = functions.image_fn(
        variables['params'], variables['state'], latents, classes, None
      )
      return (images + 1) * 127.5

    return draw

  @classmethod
  def read_released(
    cls,
    path: epath.Path,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
  ) -> dict:
    """Reads G of the published code; see `released`.

    Its statistics are the file's, whatever `training.standing_batches` says.
    """
    return released.read(path, networks.smallest(settings.network, info))


def _check_sizes(network, info):
  """Raises UserError unless the maps have whole sizes and some pixels."""
  height, width, _ = info.image_shape
  fields = 'config.generator.network'
  for name, halvings in (
    (f'{fields}.multipliers = {network.multipliers}', len(network.multipliers) - 1),
    (
      f'{fields}.discriminator_halvings = {network.discriminator_halvings}',
      network.discriminator_halvings,
    ),
  ):
    if halvings < 0 or any(size % 2**halvings for size in (height, width)):
      raise UserError(
        f'{name}: images of {height}x{width} pixels cannot be halved so often: use '
        'fewer, and one multiplier at least'
      )
  blocks = len(network.discriminator_multipliers)
  if not blocks or blocks < network.discriminator_halvings:
    raise UserError(
      f'{fields}.discriminator_multipliers = {network.discriminator_multipliers}: '
      f'give one a block, and {max(network.discriminator_halvings, 1)} at least, for '
      'discriminator_halvings'
    )
  made = {height >> i for i in range(len(network.multipliers) - 1)}
  seen = {height >> i for i in range(1, network.discriminator_halvings + 1)}
  if not set(network.attention_sizes) <= made | seen:
    raise UserError(
      f'{fields}.attention_sizes = {network.attention_sizes}: the blocks make maps of '
      f'heights {", ".join(map(str, sorted(made | seen)))}; use some of them, or ()'
    )
  if network.attention_sizes and (network.channels < 8 or network.channels % 8):
    raise UserError(
      f'{fields}.channels = {network.channels}: with attention_sizes, use a multiple '
      'of 8'
    )


def _functions(settings, info) -> training.Functions:
  fields = settings.training
  return networks.make(
    settings.network, info, fields.spectral_epsilon, fields.batch_norm_group
  )
