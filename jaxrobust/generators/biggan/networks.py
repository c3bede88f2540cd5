"""The networks of BigGAN: G, from a latent vector and a class to an image, and D.

Source: Brock et al. 2019, and the PyTorch code that its first author published; the
defaults are that code's recipe for CIFAR-10.
"""

import haiku as hk
import jax
import jax.numpy as jnp
from ml_collections import config_dict

from jaxrobust.config import dataset_info
from jaxrobust.generators.biggan import layers, training


def smallest(
  settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
) -> tuple[int, int]:
  """Height and width of G's first maps."""
  halvings = len(settings.multipliers) - 1
  height, width = (size >> halvings for size in info.image_shape[:2])
  return height, width


def make(
  settings: config_dict.ConfigDict,
  info: dataset_info.DatasetInfo,
  epsilon: float,
  group: int,
) -> training.Functions:
  """The networks of a config, as functions to be trained.

  Args:
    settings: `config.generator.network`.
    info: of the data set.
    epsilon: `config.generator.training.spectral_epsilon`.
    group: images that share BatchNorm statistics in training.
  """
  init = layers.INITIALIZERS[settings.initialisation]
  mode = lambda **fields: layers.Mode(init, epsilon, group=group, **fields)

  def generator(latents, classes, momentum):
    moves = momentum is not None
    chosen = mode(moves=moves, momentum=momentum or 0.0)
    return _generator(settings, info, chosen, latents, classes)

  def discriminator(images, classes, moves):
    return _discriminator(settings, info, mode(moves=moves), images, classes)

  generator, discriminator = (
    hk.without_apply_rng(hk.transform_with_state(fn))
    for fn in (generator, discriminator)
  )

  def init_fn(rng):
    rngs = jax.random.split(rng)
    classes, images = jnp.zeros(1, jnp.int32), jnp.zeros((1, *info.image_shape))
    latents = jnp.zeros((1, settings.latent_size))
    made = {
      training.GENERATOR: generator.init(rngs[0], latents, classes, None),
      training.DISCRIMINATOR: discriminator.init(rngs[1], images, classes, False),
    }
    return tuple({name: pair[i] for name, pair in made.items()} for i in (0, 1))

  return training.Functions(
    init_fn,
    generator.apply,
    discriminator.apply,
    settings.latent_size,
    info.num_classes,
  )


def _generator(settings, info, mode, latents, classes):
  """Images [b, H, W, C] in [-1, 1]."""
  widths = [settings.channels * x for x in settings.multipliers]
  height, width = smallest(settings, info)
  blocks = len(widths) - 1
  # Each block may have a part of the latent vector to itself.
  chunks = [latents] * (blocks + 1)
  if settings.hierarchical:
    chunks = jnp.split(latents, blocks + 1, 1)
  shared = None
  if settings.shared_size:
    table = layers.Embedding(
      info.num_classes, settings.shared_size, mode, name='shared'
    )
    shared = table(classes, latents.dtype)
  x = layers.Linear(height * width * widths[0], mode, name='linear')(chunks[0])
  x = x.reshape(-1, height, width, widths[0])
  for index, features in enumerate(widths[1:]):
    condition = shared
    if settings.hierarchical:
      condition = jnp.concatenate([shared, chunks[index + 1]], -1)
    name = f'block{index}'
    x = _block_up(x, features, condition, classes, info.num_classes, mode, name)
    if x.shape[1] in settings.attention_sizes:
      x = layers.Attention(mode, name=f'{name}_attention')(x)
  x = jax.nn.relu(layers.BatchNorm(mode, name='output_bn')(x))
  return jnp.tanh(layers.Conv(info.image_shape[2], 3, mode, name='output_conv')(x))


def _block_up(x, features, condition, classes, num_classes, mode, name):
  """Residual block that doubles the resolution."""

  def norm(x, part):
    """The class, or what is made of it, scales and shifts each channel."""
    found = []
    for kind in ('gain', 'bias'):
      own = f'{name}_{part}_{kind}'
      if condition is None:
        table = layers.Embedding(num_classes, x.shape[-1], mode, name=own)
        found.append(table(classes, x.dtype))
      else:
        linear = layers.Linear(x.shape[-1], mode, bias=False, name=own)
        found.append(linear(condition))
    return layers.BatchNorm(mode, name=f'{name}_{part}')(x, 1 + found[0], found[1])

  conv = lambda size, part: layers.Conv(features, size, mode, name=f'{name}_{part}')
  inner = layers.upsample(jax.nn.relu(norm(x, 'bn1')))
  inner = jax.nn.relu(norm(conv(3, 'conv1')(inner), 'bn2'))
  # A 1x1 convolution of equal pixels: it comes first here, at a fourth of the cost.
  return conv(3, 'conv2')(inner) + layers.upsample(conv(1, 'conv_sc')(x))


def _discriminator(settings, info, mode, images, classes):
  """Logits [b]."""
  x = images
  for index, multiplier in enumerate(settings.discriminator_multipliers):
    name, features = f'block{index}', settings.channels * multiplier
    halves = index < settings.discriminator_halvings
    x = _block_down(x, features, halves, index > 0, mode, name)
    if x.shape[1] in settings.attention_sizes:
      x = layers.Attention(mode, name=f'{name}_attention')(x)
  x = jnp.sum(jax.nn.relu(x), (1, 2))
  table = layers.Embedding(
    info.num_classes, x.shape[-1], mode, normalised=True, name='embed'
  )
  projection = jnp.sum(table(classes, x.dtype) * x, -1)
  return layers.Linear(1, mode, name='linear')(x)[:, 0] + projection


def _block_down(x, features, halves, activates, mode, name):
  """Residual block that may halve the resolution."""
  conv = lambda size, part: layers.Conv(features, size, mode, name=f'{name}_{part}')
  inner = conv(3, 'conv1')(jax.nn.relu(x) if activates else x)
  inner = conv(3, 'conv2')(jax.nn.relu(inner))
  # The mean of a 1x1 convolution is that of the mean, which costs a fourth.
  pool = layers.downsample if halves else lambda x: x
  learned = halves or features != x.shape[-1]
  shortcut = conv(1, 'conv_sc')(pool(x)) if learned else x
  return pool(inner) + shortcut
