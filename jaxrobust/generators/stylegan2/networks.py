"""The networks of StyleGAN2: mapping and synthesis, which make G, and D.

Source: Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN", and
"Training generative adversarial networks with limited data", whose PyTorch code the
released weights belong to. All maps are squares, from 4x4 by doubling to the image.

Deviation: all in float32, without clamps; theirs has the four highest resolutions in
half precision, clamped to +-256.
"""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from ml_collections import config_dict

from jaxrobust.config import dataset_info
from jaxrobust.distributed import parallel
from jaxrobust.generators.stylegan2 import layers
from jaxrobust.models import batch_norm

_MAPPING = 0.01  # how fast D's mapping learns
_EPSILON = 1e-8


class Networks(NamedTuple):
  """Transformed functions.

  Attributes:
    mapping: `latents [b, Z], classes int [b] -> styles [b, W]`.
    synthesis: `styles [b, L, W], keys [b] or None -> images [b, H, W, C]` of about
      [-1, 1]: L is `num_styles`; without keys there is no noise.
    discriminator: `images, classes -> logits [b]`, of a device's images.
  """

  mapping: hk.Transformed
  synthesis: hk.Transformed
  discriminator: hk.Transformed


def make(
  settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo, group: int
) -> Networks:
  """The networks of a config.

  Args:
    settings: `config.generator.network`.
    info: of the data set.
    group: images that share a standard deviation in D.
  """
  num_classes = info.num_classes if settings.conditional else 0
  size, channels = info.image_shape[1:]
  width = lambda size: min(settings.channels_base // size, settings.channels_max)

  def mapping(latents, classes):
    x = layers.normalise(latents)
    if num_classes:
      embedded = layers.Linear(settings.style_size, name='embed')(
        jax.nn.one_hot(classes, num_classes, dtype=x.dtype)
      )
      x = jnp.concatenate([x, layers.normalise(embedded)], -1)
    return _mlp(
      x, settings.style_size, settings.mapping_layers, settings.mapping_multiplier
    )

  def synthesis(styles, rngs):
    return _synthesis(styles, rngs, size, channels, width)

  def discriminator(images, classes):
    x = _features(images, width, settings.discriminator)
    # One image initialises a network of any group.
    seen = 1 if hk.running_init() else group
    x = layers.Conv(width(4), 3, name='b4_conv')(_with_deviation(x, seen))
    x = layers.activate(layers.Linear(width(4), name='b4_fc')(x.reshape(len(x), -1)))
    x = layers.Linear(width(4) if num_classes else 1, name='b4_out')(x)
    if not num_classes:
      return x[:, 0]
    one_hot = jax.nn.one_hot(classes, num_classes, dtype=x.dtype)
    embedded = layers.normalise(layers.Linear(width(4), name='embed')(one_hot))
    count = settings.discriminator_mapping_layers
    embedded = _mlp(embedded, width(4), count, _MAPPING)
    return jnp.sum(x * embedded, -1) / width(4) ** 0.5

  return Networks(
    *(
      hk.without_apply_rng(hk.transform(fn))
      for fn in (mapping, synthesis, discriminator)
    )
  )


def num_styles(size: int) -> int:
  """How many styles a synthesis of images of so many pixels a side takes."""
  return 2 * (size.bit_length() - 2)


def _mlp(x, features, count, multiplier):
  for index in range(count):
    linear = layers.Linear(features, multiplier=multiplier, name=f'fc{index}')
    x = layers.activate(linear(x))
  return x


def _synthesis(styles, rngs, size, channels, width):
  """From a constant, by two layers a resolution, whose images are summed."""

  def layer(x, name, side, resize, index):
    noise = None
    if rngs is not None:
      draw = lambda rng: jax.random.normal(
        jax.random.fold_in(rng, index), (side, side, 1), x.dtype
      )
      noise = jax.vmap(draw)(rngs)
    conv = layers.StyledConv(width(side), resize, name=f'b{side}_{name}')
    return conv(x, styles[:, index], noise)

  normal = hk.initializers.RandomNormal(1.0)
  constant = hk.get_parameter('b4_const', (4, 4, width(4)), styles.dtype, normal)
  x = jnp.broadcast_to(constant[None], (len(styles), *constant.shape))
  images, side, index = None, 4, 0
  while side <= size:
    if images is not None:
      x = layer(x, 'conv0', side, 'up', index - 1)
      images = layers.upsample(images)
    x = layer(x, 'conv1', side, '', index)
    # Its style is that of the next resolution's first layer, too.
    shown = layers.ToImage(channels, name=f'b{side}_torgb')(x, styles[:, index + 1])
    images = shown if images is None else images + shown
    side, index = 2 * side, index + 2
  return images


def _features(images, width, kind):
  """The maps of 4x4 that D's last layers see."""
  side = images.shape[1]
  x = layers.Conv(width(side), 1, name=f'b{side}_fromrgb')(images)
  while side > 4:
    name = f'b{side}'
    inputs = x
    x = layers.Conv(width(side), 3, name=f'{name}_conv0')(x)
    x = layers.Conv(width(side // 2), 3, 'down', name=f'{name}_conv1')(x)
    if kind == 'residual':
      skip = layers.Skip(width(side // 2), name=f'{name}_skip')
      x = (x + skip(inputs)) * 0.5**0.5
    side //= 2
  return x


def _with_deviation(x, group):
  """Appends a channel: the standard deviation in the image's group, of its mean value.

  A group is consecutive images of the global batch, which may be a part of a device's
  or span several devices.
  Deviation: theirs are every n-th image of a device's batch, which is another grouping
  of images in random order.
  """
  groups, devices = batch_norm.layout(len(x), group)
  grouped = x.reshape(groups, -1, *x.shape[1:])
  mean = lambda x: jnp.mean(x, 1, keepdims=True)
  if devices > 1:
    mean = lambda x: parallel.mean_in_group(jnp.mean(x, 1, keepdims=True), devices)
  deviation = jnp.sqrt(mean((grouped - mean(grouped)) ** 2) + _EPSILON)
  deviation = jnp.mean(deviation, (2, 3, 4), keepdims=True)
  shape = (groups, grouped.shape[1], *x.shape[1:3], 1)
  deviation = jnp.broadcast_to(deviation, shape).reshape(*x.shape[:3], 1)
  return jnp.concatenate([x, deviation], -1)
