"""The U-Net of Ho et al. (2020), which predicts the noise in a noisy image.

Source: Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", appendix B;
what it leaves out (GroupNorm, initialisation, order of layers) is as in their released
code. With 128 base channels, multipliers (1, 2, 2, 2), two blocks and attention at
16x16 it has the 35.7 million parameters of their CIFAR-10 network.
"""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
from ml_collections import config_dict

from jaxrobust.config import dataset_info
from jaxrobust.errors import UserError
from jaxrobust.generators import layers


def check(network: config_dict.ConfigDict, info: dataset_info.DatasetInfo) -> None:
  """Raises UserError for a network that cannot be built for images.

  Args:
    network: `config.generator.network`, with channels, multipliers and attention_sizes.
    info: of the data set.
  """
  if network.channels < 4 or network.channels % 4:
    raise UserError(
      f'config.generator.network.channels = {network.channels}: use a multiple of 4'
    )
  if not network.multipliers:
    raise UserError('config.generator.network.multipliers = (): give one at least')
  halvings = len(network.multipliers) - 1
  if any(size % 2**halvings for size in info.image_shape[:2]):
    raise UserError(
      f'config.generator.network.multipliers = {network.multipliers} halve '
      f'images {halvings} times, which '
      f'{info.image_shape[0]}x{info.image_shape[1]} do not: give fewer'
    )
  sizes = [info.image_shape[0] // 2**i for i in range(len(network.multipliers))]
  if not set(network.attention_sizes) <= set(sizes):
    raise UserError(
      f'config.generator.network.attention_sizes = {network.attention_sizes}: the '
      f'maps have heights {", ".join(map(str, sizes))}; use some of them, or ()'
    )


class UNet(hk.Module):
  """Predicts the noise in images of 8x8 and more, for a time and perhaps a class."""

  def __init__(
    self,
    channels: int,
    multipliers: tuple[int, ...],
    num_blocks: int,
    attention_sizes: tuple[int, ...],
    dropout: float,
    num_classes: int = 0,
    name: str = 'unet',
  ):
    """Makes the network.

    Args:
      channels: at full resolution, before the multiplier; a multiple of 4.
      multipliers: on the channels of each resolution; each next one has half the
        height and width.
      num_blocks: residual blocks at each resolution on the way down; one more up.
      attention_sizes: heights of the maps that pass through self-attention.
      dropout: share of the channels' values that a residual block drops in training.
      num_classes: K; 0 for a network that knows no classes.
      name: of the module.
    """
    super().__init__(name=name)
    self._channels, self._multipliers = channels, tuple(multipliers)
    self._num_blocks, self._attention_sizes = num_blocks, tuple(attention_sizes)
    self._dropout, self._num_classes = dropout, num_classes

  def __call__(
    self,
    images: jax.Array,
    times: jax.Array,
    classes: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Predicts the noise.

    Args:
      images: noisy, [B, H, W, C] with data in [-1, 1]; H and W must halve evenly at
        each resolution but the last.
      times: float [B], in steps of the forward process from 0; need not be whole.
      classes: int [B] in [0, K], where K is the null class: no condition. None for a
        network without classes.
      rngs: keys [B] of dropout, one an image; None for no dropout.

    Returns:
      [B, H, W, C]; zero at initialisation.
    """
    embedding = self._embed(times, classes)
    conv = functools.partial(layers.Conv, in_loops=rngs is None)  # samplers loop
    num_calls = 0

    def block(x, features, name):
      nonlocal num_calls
      keys = None
      if rngs is not None and self._dropout:
        keys = jax.vmap(jax.random.fold_in, (0, None))(rngs, num_calls)
      num_calls += 1
      return _ResidualBlock(features, self._dropout, conv, name)(x, embedding, keys)

    def attend(x, name):
      return _Attention(name)(x) if x.shape[1] in self._attention_sizes else x

    x = conv(self._channels, name='conv_in')(images)
    skips = [x]
    last = len(self._multipliers) - 1
    for level, multiplier in enumerate(self._multipliers):
      for index in range(self._num_blocks):
        x = block(x, self._channels * multiplier, f'down_{level}_block_{index}')
        x = attend(x, f'down_{level}_attention_{index}')
        skips.append(x)
      if level != last:
        x = conv(x.shape[-1], stride=2, name=f'down_{level}_downsample')(x)
        skips.append(x)
    x = block(x, x.shape[-1], 'middle_block_0')
    x = _Attention('middle_attention')(x)
    x = block(x, x.shape[-1], 'middle_block_1')
    for level, multiplier in reversed(list(enumerate(self._multipliers))):
      for index in range(self._num_blocks + 1):
        x = jnp.concatenate([x, skips.pop()], -1)
        x = block(x, self._channels * multiplier, f'up_{level}_block_{index}')
        x = attend(x, f'up_{level}_attention_{index}')
      if level:
        x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        x = conv(x.shape[-1], name=f'up_{level}_upsample')(x)
    x = jax.nn.swish(layers.GroupNorm('norm_out')(x))
    return conv(images.shape[-1], scale=0.0, name='conv_out')(x)

  def _embed(self, times, classes):
    """The time and the class for every block, a vector [B, 4 * channels]."""
    width = 4 * self._channels
    x = layers.sinusoids(times, self._channels)
    x = jax.nn.swish(layers.linear(width, 'time_0')(x))
    x = layers.linear(width, 'time_1')(x)
    if self._num_classes:
      x += hk.Embed(self._num_classes + 1, width, name='class')(classes)
    return x


class _ResidualBlock(hk.Module):
  """Two convolutions with the embedding added in between."""

  def __init__(self, features, dropout, conv, name):
    super().__init__(name=name)
    self._features, self._dropout, self._conv = features, dropout, conv

  def __call__(self, inputs, embedding, rngs):
    x = jax.nn.swish(layers.GroupNorm('norm_0')(inputs))
    x = self._conv(self._features, name='conv_0')(x)
    shift = layers.linear(self._features, 'embedding')(jax.nn.swish(embedding))
    x = jax.nn.swish(layers.GroupNorm('norm_1')(x + shift[:, None, None, :]))
    if rngs is not None:
      x = layers.dropout(x, self._dropout, rngs)
    x = self._conv(self._features, scale=0.0, name='conv_1')(x)
    if inputs.shape[-1] != self._features:
      inputs = layers.linear(self._features, 'shortcut')(inputs)
    return inputs + x


class _Attention(hk.Module):
  """Self-attention over all pixels of a map, with one head."""

  def __init__(self, name):
    super().__init__(name=name)

  def __call__(self, inputs):
    batch, height, width, channels = inputs.shape
    x = layers.GroupNorm('norm')(inputs).reshape(batch, height * width, channels)
    query, key, value = (
      layers.linear(channels, n)(x) for n in ('query', 'key', 'value')
    )
    weights = jax.nn.softmax(
      jnp.einsum('bqc,bkc->bqk', query, key) * channels**-0.5, axis=-1
    )
    x = jnp.einsum('bqk,bkc->bqc', weights, value)
    return inputs + layers.linear(channels, 'out', scale=0.0)(x).reshape(inputs.shape)
