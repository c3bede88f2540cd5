"""The U-Net of Ho et al. (2020), which predicts the noise in a noisy image.

Source: Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", appendix B;
what it leaves out (GroupNorm, initialisation, order of layers) is as in their released
code. With 128 base channels, multipliers (1, 2, 2, 2), two blocks and attention at
16x16 it has the 35.7 million parameters of their CIFAR-10 network.
"""

import functools
import math

import haiku as hk
import jax
import jax.numpy as jnp

from jaxrobust.models.convolution import conv2d

# Of GroupNorm; 128 channels, the fewest of the published network, make 32 groups of 4.
_GROUPS, _LEAST_CHANNELS, _EPSILON = 32, 4, 1e-6


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
    conv = functools.partial(_Conv, in_loops=rngs is None)  # samplers loop
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
    x = jax.nn.swish(_GroupNorm('norm_out')(x))
    return conv(images.shape[-1], zero=True, name='conv_out')(x)

  def _embed(self, times, classes):
    """The time and the class for every block, a vector [B, 4 * channels]."""
    width = 4 * self._channels
    x = sinusoids(times, self._channels)
    x = jax.nn.swish(_linear(width, 'time_0')(x))
    x = _linear(width, 'time_1')(x)
    if self._num_classes:
      x += hk.Embed(self._num_classes + 1, width, name='class')(classes)
    return x


def sinusoids(times: jax.Array, size: int) -> jax.Array:
  """Sines and cosines of the times, at wavelengths from 2 pi to 20,000 pi.

  Args:
    times: float [B].
    size: even, at least 4.

  Returns:
    [B, size], the sines first.
  """
  half = size // 2
  frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half) / (half - 1))
  angles = times[:, None] * frequencies[None, :]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class _ResidualBlock(hk.Module):
  """Two convolutions with the embedding added in between."""

  def __init__(self, features, dropout, conv, name):
    super().__init__(name=name)
    self._features, self._dropout, self._conv = features, dropout, conv

  def __call__(self, inputs, embedding, rngs):
    x = jax.nn.swish(_GroupNorm('norm_0')(inputs))
    x = self._conv(self._features, name='conv_0')(x)
    shift = _linear(self._features, 'embedding')(jax.nn.swish(embedding))
    x = jax.nn.swish(_GroupNorm('norm_1')(x + shift[:, None, None, :]))
    if rngs is not None:
      x = _dropout(x, self._dropout, rngs)
    x = self._conv(self._features, zero=True, name='conv_1')(x)
    if inputs.shape[-1] != self._features:
      inputs = _linear(self._features, 'shortcut')(inputs)
    return inputs + x


def _dropout(x, share, rngs):
  """Drops a share of each image's values, by its own key.

  The share is rounded to a multiple of 2**-16: random bits are what dropout costs on
  CPU, and a word of 32 is enough for two values.
  """
  shape = x.shape[1:]
  words = jax.vmap(lambda rng: jax.random.bits(rng, (math.prod(shape) // 2,)))(rngs)
  values = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(x.shape)
  dropped = min(round(share * 2**16), 2**16 - 1)
  return jnp.where(values >= dropped, x / (1 - dropped / 2**16), 0)


class _Attention(hk.Module):
  """Self-attention over all pixels of a map, with one head."""

  def __init__(self, name):
    super().__init__(name=name)

  def __call__(self, inputs):
    batch, height, width, channels = inputs.shape
    x = _GroupNorm('norm')(inputs).reshape(batch, height * width, channels)
    query, key, value = (_linear(channels, n)(x) for n in ('query', 'key', 'value'))
    weights = jax.nn.softmax(
      jnp.einsum('bqc,bkc->bqk', query, key) * channels**-0.5, axis=-1
    )
    x = jnp.einsum('bqk,bkc->bqc', weights, value)
    return inputs + _linear(channels, 'out', zero=True)(x).reshape(inputs.shape)


class _Conv(hk.Module):
  """3x3 convolution with bias, by the package's own gradient rule."""

  def __init__(self, features, stride=1, zero=False, in_loops=True, name=None):
    super().__init__(name=name)
    self._features, self._stride, self._zero = features, stride, zero
    self._in_loops = in_loops

  def __call__(self, x):
    shape = (3, 3, x.shape[-1], self._features)
    kernel = hk.get_parameter('w', shape, x.dtype, init=_initializer(self._zero))
    bias = hk.get_parameter('b', shape[-1:], x.dtype, init=jnp.zeros)
    x = conv2d(x, kernel, self._stride, self._in_loops)
    return x + bias.reshape(1, 1, 1, -1)


def _linear(features, name, zero=False):
  """A matrix product over channels.

  Of a matrix: XLA on CPU is slow with the gradient of a product over more axes.
  """
  linear = hk.Linear(features, w_init=_initializer(zero), name=name)
  return lambda x: linear(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


def _initializer(zero):
  """Their uniform distribution; the last layer of each residual part starts at 0.

  Deviation: theirs starts at 1e-10 times the usual scale, to keep one formula.
  """
  return jnp.zeros if zero else hk.initializers.VarianceScaling(1, 'fan_avg', 'uniform')


class _GroupNorm(hk.Module):
  """GroupNorm with 32 groups, or fewer so that each has at least 4 channels.

  A group of a single channel would take out what the embedding adds to it: such a
  network does not know the time. Parameters and values are hk.GroupNorm's, which takes
  2 to 3.5 times as long on CPU with its gradient: it sums over axes that are apart.
  """

  def __init__(self, name):
    super().__init__(name=name)

  def __call__(self, inputs):
    batch, height, width, channels = inputs.shape
    scale = hk.get_parameter('scale', (channels,), inputs.dtype, init=jnp.ones)
    offset = hk.get_parameter('offset', (channels,), inputs.dtype, init=jnp.zeros)
    groups = math.gcd(_GROUPS, channels // _LEAST_CHANNELS)

    def mean(x):
      """Of the pixels [B, H * W, C] of each group, for each of its channels [B, C]."""
      means = jnp.mean(jnp.mean(x, 1).reshape(batch, groups, -1), -1)
      return jnp.repeat(means, channels // groups, 1)

    x = inputs.reshape(batch, height * width, channels)
    x -= mean(x)[:, None]
    factor = jax.lax.rsqrt(mean(x * x) + _EPSILON) * scale[None]
    return (x * factor[:, None] + offset[None, None]).reshape(inputs.shape)
