"""DDPM++ and NCSN++, the U-Nets of EDM for CIFAR-10.

Source: Song et al. 2021, "Score-Based Generative Modeling through Stochastic
Differential Equations", as Karras et al. 2022 (appendix F.3) train them; what they
leave out is as in the released code of the latter.
"""

import functools
import math

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.generators import layers, resampling

NUM_LABELS = 9  # numbers that say how an image was augmented
_HALF = 0.5**0.5  # keeps the variance of a sum of two
# Variance of an initial layer, as a share of the usual one: that of the last layer of a
# residual part, and of queries, keys and values.
_LAST, _ATTENTION = 1e-10, 0.2
_FOURIER_SCALE = 16.0


class UNet(hk.Module):
  """F of the paper: from a scaled noisy image to what its denoising needs."""

  def __init__(
    self,
    architecture: str,
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
      architecture: 'ddpm++' or 'ncsn++', which embeds noise levels by random
        frequencies, adds the input to each resolution, and resamples more smoothly.
      channels: before the multiplier; a multiple of 4.
      multipliers: on the channels of each resolution; each next one has half the
        height and width.
      num_blocks: residual blocks at each resolution on the way down; one more up.
      attention_sizes: heights of the maps that pass through self-attention, in all
        blocks down and the last up; the smallest maps always do, once.
      dropout: share of the channels' values that a residual block drops in training.
      num_classes: K; 0 for a network that knows no classes.
      name: of the module.
    """
    super().__init__(name=name)
    self._is_smooth = architecture == 'ncsn++'
    self._channels, self._multipliers = channels, tuple(multipliers)
    self._num_blocks, self._attention_sizes = num_blocks, tuple(attention_sizes)
    self._dropout, self._num_classes = dropout, num_classes

  def __call__(
    self,
    images: jax.Array,
    levels: jax.Array,
    classes: jax.Array | None = None,
    labels: jax.Array | None = None,
    rngs: jax.Array | None = None,
  ) -> jax.Array:
    """Applies the network.

    Args:
      images: noisy, [B, H, W, C] of variance 1; H and W must halve evenly at each
        resolution but the last.
      levels: float [B], of noise: ln(sigma) / 4.
      classes: int [B] in [0, K], where K is no condition. None for a network without
        classes.
      labels: float [B, 9], how the images were augmented; None for not at all.
      rngs: keys [B] of dropout, one an image; None for no dropout.

    Returns:
      [B, H, W, C]; near zero at initialisation.
    """
    embedding = _embed(
      levels, classes, labels, self._channels, self._num_classes, self._is_smooth
    )
    taps = np.array([1.0, 3.0, 3.0, 1.0] if self._is_smooth else [1.0, 1.0])
    conv = functools.partial(layers.Conv, in_loops=rngs is None)  # samplers loop
    num_calls = 0

    def block(x, width, name, **more):
      nonlocal num_calls
      keys = None
      if rngs is not None and self._dropout:
        keys = jax.vmap(jax.random.fold_in, (0, None))(rngs, num_calls)
      num_calls += 1
      module = _Block(width, self._dropout, taps, conv, name, **more)
      return module(x, embedding, keys)

    widths = [self._channels * multiplier for multiplier in self._multipliers]
    heights = [images.shape[1] >> i for i in range(len(widths))]
    places = [f'{h}x{images.shape[2] >> i}' for i, h in enumerate(heights)]
    attends = [height in self._attention_sizes for height in heights]
    x = conv(self._channels, name=f'enc_{places[0]}_conv')(images)
    pyramid, skips = images, [x]
    for level, (width, place) in enumerate(zip(widths, places, strict=True)):
      if level:
        x = block(x, x.shape[-1], f'enc_{place}_down', resamples='down')
        if self._is_smooth:
          added = _SmoothDown(x.shape[-1], taps, f'enc_{place}_aux_residual')(pyramid)
          x = pyramid = _HALF * (x + added)
        skips.append(x)
      for index in range(self._num_blocks):
        x = block(x, width, f'enc_{place}_block{index}', attends=attends[level])
        skips.append(x)
    x = block(x, x.shape[-1], f'dec_{places[-1]}_in0', attends=True)
    x = block(x, x.shape[-1], f'dec_{places[-1]}_in1')
    for level, (width, place) in reversed(
      list(enumerate(zip(widths, places, strict=True)))
    ):
      if level < len(widths) - 1:
        x = block(x, x.shape[-1], f'dec_{place}_up', resamples='up')
      for index in range(self._num_blocks + 1):
        x = block(
          jnp.concatenate([x, skips.pop()], -1),
          width,
          f'dec_{place}_block{index}',
          attends=attends[level] and index == self._num_blocks,
        )
    x = jax.nn.swish(_norm(x, f'dec_{places[0]}_aux_norm'))
    return conv(images.shape[-1], scale=_LAST, name=f'dec_{places[0]}_aux_conv')(x)


def _embed(levels, classes, labels, channels, num_classes, is_smooth):
  """The vector [B, 4 * channels] of noise level, class and augmentation."""
  width = channels * (2 if is_smooth else 1)
  if is_smooth:
    draw = hk.initializers.RandomNormal(_FOURIER_SCALE)
    frequencies = hk.get_parameter('frequencies', (channels,), levels.dtype, draw)
    # They stay as they are drawn.
    angles = 2 * math.pi * levels[:, None] * jax.lax.stop_gradient(frequencies)[None]
    x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
  else:
    x = layers.sinusoids(levels, width)
  if num_classes:
    known = jax.nn.one_hot(classes, num_classes, dtype=x.dtype)  # of K, zeros
    x += layers.linear(width, 'map_label')(known * math.sqrt(num_classes))
  if labels is None:
    labels = jnp.zeros((len(x), NUM_LABELS), x.dtype)
  x += hk.Linear(width, False, layers.initializer(), name='map_augment')(labels)
  x = jax.nn.swish(layers.linear(4 * channels, 'map_layer0')(x))
  return jax.nn.swish(layers.linear(4 * channels, 'map_layer1')(x))


class _Block(hk.Module):
  """Two convolutions with the embedding added in between, and perhaps attention."""

  def __init__(self, width, dropout, taps, conv, name, resamples='', attends=False):
    super().__init__(name=name)
    self._width, self._dropout, self._conv = width, dropout, conv
    self._taps, self._resamples, self._attends = taps, resamples, attends

  def __call__(self, inputs, embedding, rngs):
    resample = {'': lambda x, taps: x, 'down': _down, 'up': _up}[self._resamples]
    x = resample(jax.nn.swish(_norm(inputs, 'norm0')), self._taps)
    x = self._conv(self._width, name='conv0')(x)
    x += layers.linear(self._width, 'affine')(embedding)[:, None, None, :]
    x = jax.nn.swish(_norm(x, 'norm1'))
    if rngs is not None:
      x = layers.dropout(x, self._dropout, rngs)
    x = self._conv(self._width, scale=_LAST, name='conv1')(x)
    passed = resample(inputs, self._taps)
    if self._resamples or inputs.shape[-1] != self._width:
      passed = layers.linear(self._width, 'skip')(passed)
    x = _HALF * (x + passed)
    return _attend(x) if self._attends else x


def _attend(inputs):
  """Self-attention over all pixels of a map, with one head."""
  batch, height, width, channels = inputs.shape
  x = _norm(inputs, 'norm2').reshape(batch, height * width, channels)
  x = layers.linear(3 * channels, 'qkv', scale=_ATTENTION)(x)
  query, key, value = jnp.split(x, 3, -1)
  weights = jax.nn.softmax(jnp.einsum('bqc,bkc->bqk', query, key) * channels**-0.5)
  x = jnp.einsum('bqk,bkc->bqc', weights, value)
  x = layers.linear(channels, 'proj', scale=_LAST)(x)
  return _HALF * (inputs + x.reshape(inputs.shape))


class _SmoothDown(hk.Module):
  """A 3x3 convolution, and half its resolution.

  Its map has a margin, which the filter sees beyond the edge.
  """

  def __init__(self, width, taps, name):
    super().__init__(name=name)
    self._width, self._taps = width, taps

  def __call__(self, images):
    margin = len(self._taps) // 2 - 1
    around = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    x = layers.Conv(self._width, name='conv')(jnp.pad(images, around))
    return _filter(x, self._taps / self._taps.sum(), down=2)


def _norm(x, name):
  """GroupNorm with 32 groups, or as many of 4 channels as there are."""
  channels = x.shape[-1]
  most = max(min(layers.MOST_GROUPS, channels // layers.LEAST_CHANNELS), 1)
  groups = next(n for n in range(most, 0, -1) if channels % n == 0)
  return layers.GroupNorm(name, groups)(x)


def _down(images, taps):
  """Half the height and width, each pixel a mean by taps."""
  margin = len(taps) // 2 - 1
  return _filter(images, taps / taps.sum(), down=2, pads=(margin, margin))


def _up(images, taps):
  """Twice the height and width."""
  before = len(taps) // 2
  return _filter(images, 2 * taps / taps.sum(), up=2, pads=(before, before - 1))


def _filter(images, taps, **resampling_of):
  rows, columns = (
    resampling.matrix(size, taps, **resampling_of) for size in images.shape[1:3]
  )
  return resampling.resample(images, rows, columns)
