"""The encoder and decoder of a very deep VAE, as functions of a tree of arrays.

Source: Child 2021, "Very Deep VAEs Generalize Autoregressive Models"; what it leaves
out (order, initialisation, sizes of kernels) is as in the released code.

Blocks of equal shape stand in the tree as one block with a leading axis, and run in a
loop: XLA compiles each shape once, not each of the 162 blocks of the published network.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.generators.vdvae import mixture, stages
from jaxrobust.models.convolution import conv2d

_SMALL = 2  # height of maps at which kernels are 1x1


class Network(NamedTuple):
  """Its sizes.

  Attributes:
    image_size: height and width of images.
    image_channels: 1 or 3.
    width: channels of maps.
    bottleneck: channels inside a block.
    latent: channels of a layer's latent map.
    num_mixtures: components of a pixel's distribution.
    encoder, decoder: their stages.
    pixel_mean, pixel_std: by which the encoder normalises grey levels.
  """

  image_size: int
  image_channels: int
  width: int
  bottleneck: int
  latent: int
  num_mixtures: int
  encoder: list[stages.Stage]
  decoder: list[stages.Stage]
  pixel_mean: float
  pixel_std: float


def init(network: Network, rng: jax.Array) -> dict[str, Any]:
  """Parameters before training.

  Args:
    network: its sizes.
    rng: key.

  Returns:
    'input' and 'output', convolutions; 'encoder' and 'decoder', their stages by number,
    each array with a leading axis of blocks; 'maps', the decoder's first map of each
    size; 'gain' and 'bias' of its last.
  """
  width, middle, latent = network.width, network.bottleneck, network.latent

  def conv(before, after, size, lead=(), scale=1.0):
    kernel = _First((*lead, size, size, before, after), scale / (size * before**0.5))
    return {'w': kernel, 'b': _First((*lead, after))}

  def block(stage, before, after, scale):
    size, lead = 1 if stage.size <= _SMALL else 3, (stage.count,)
    return {
      'c1': conv(before, middle, 1, lead),
      'c2': conv(middle, middle, size, lead),
      'c3': conv(middle, middle, size, lead),
      'c4': conv(middle, after, 1, lead, scale),
    }

  # So that the sum over all blocks does not grow with their number.
  in_encoder, in_decoder = (
    stages.count(x) ** -0.5 for x in (network.encoder, network.decoder)
  )
  outputs = mixture.num_outputs(network.num_mixtures, network.image_channels)
  first = {
    'input': conv(network.image_channels, width, 3),
    'encoder': {
      str(i): block(stage, width, width, in_encoder)
      for i, stage in enumerate(network.encoder)
    },
    'decoder': {
      str(i): {
        'posterior': block(stage, 2 * width, 2 * latent, 1.0),
        'prior': block(stage, width, 2 * latent + width, 0.0),
        'latent': conv(latent, width, 1, (stage.count,), in_decoder),
        'residual': block(stage, width, width, in_decoder),
      }
      for i, stage in enumerate(network.decoder)
    },
    'maps': {
      str(size): _First((size, size, width))
      for size in sorted({stage.size for stage in network.decoder})
    },
    'gain': _First((width,), middle=1.0),
    'bias': _First((width,)),
    'output': conv(width, outputs, 1),
  }
  leaves, treedef = jax.tree.flatten(first, is_leaf=lambda x: isinstance(x, _First))
  # All at once: a draw each would be compiled each.
  ends = np.cumsum([math.prod(leaf.shape) if leaf.limit else 0 for leaf in leaves])
  drawn = jax.random.uniform(rng, (int(ends[-1]),), minval=-1.0, maxval=1.0)
  return jax.tree.unflatten(
    treedef,
    [
      leaf.limit * part.reshape(leaf.shape)
      if leaf.limit
      else jnp.full(leaf.shape, leaf.middle)
      for leaf, part in zip(leaves, jnp.split(drawn, ends[:-1]), strict=True)
    ],
  )


class _First(NamedTuple):
  """An array before training: uniform in middle ± limit."""

  shape: tuple[int, ...]
  limit: float = 0.0
  middle: float = 0.0


def encode(network: Network, params: Any, images: jax.Array) -> dict[int, jax.Array]:
  """The last map of each size that the encoder makes.

  Args:
    network: its sizes.
    params: of `init`.
    images: float [B, H, W, C] in 0..255.

  Returns:
    [B, size, size, width] by size.
  """
  x = _conv(params['input'], (images - network.pixel_mean) / network.pixel_std)
  found = {network.image_size: x}
  for i, stage in enumerate(network.encoder):
    # What goes into the last block counts, if its own map is pooled.
    step = lambda carry, own: ((carry[1], carry[1] + _block(own, carry[1])), None)
    (before, x), _ = jax.lax.scan(step, (x, x), params['encoder'][str(i)])
    found[stage.size] = x
    if stage.factor > 1:
      found[stage.size], size = before, stage.size // stage.factor
      shape = (len(x), size, stage.factor, size, stage.factor, network.width)
      x = jnp.mean(x.reshape(shape), (2, 4))
      found[size] = x
  return found


def decode(
  network: Network,
  params: Any,
  latent_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  batch_size: int,
  encoded: dict[int, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Runs the decoder, by the posterior of images or by the prior.

  Args:
    network: its sizes.
    params: of `init`.
    latent_fn: `(number of the layer, mean, log of the standard deviation) -> latent
      numbers`, the last three [B, size, size, latent].
    batch_size: B.
    encoded: of `encode`; None for the prior.

  Returns:
    (numbers of the mixtures [B, H, W, O], KL from prior to posterior [layers, B] in
    nats, zeros without `encoded`).
  """
  first = {int(k): x[None] for k, x in params['maps'].items()}
  maps = {k: jnp.broadcast_to(x, (batch_size, *x.shape[1:])) for k, x in first.items()}
  rates, done = [], 0
  for i, stage in enumerate(network.decoder):
    x = maps[stage.size]
    if stage.source:
      times = stage.size // stage.source
      x += jnp.repeat(jnp.repeat(maps[stage.source], times, 1), times, 2)

    def step(x, own, stage=stage):
      own, number = own
      prior = _block(own['prior'], x)
      mean, log_std = jnp.split(prior[..., : 2 * network.latent], 2, -1)
      rate = jnp.zeros(batch_size, x.dtype)
      if encoded is None:
        latent = latent_fn(number, mean, log_std)
      else:
        found = _block(own['posterior'], x, encoded[stage.size])
        posterior = jnp.split(found, 2, -1)
        latent = latent_fn(number, *posterior)
        rate = jnp.sum(divergence(*posterior, mean, log_std), (1, 2, 3))
      x = x + prior[..., 2 * network.latent :] + _conv(own['latent'], latent)
      return x + _block(own['residual'], x), rate

    numbers = jnp.arange(done, done + stage.count)
    x, rate = jax.lax.scan(step, x, (params['decoder'][str(i)], numbers))
    maps[stage.size] = x
    rates.append(rate)
    done += stage.count
  wide = lambda name: params[name].reshape(1, 1, 1, -1)
  x = x * wide('gain') + wide('bias')
  return _conv(params['output'], x), jnp.concatenate(rates)


def divergence(
  mean: jax.Array, log_std: jax.Array, other_mean: jax.Array, other_log_std: jax.Array
) -> jax.Array:
  """KL of a normal distribution from another one, in nats, of each number."""
  squares = jnp.exp(2 * log_std) + (mean - other_mean) ** 2
  return other_log_std - log_std - 0.5 + squares * jnp.exp(-2 * other_log_std) / 2


def _block(params, *maps):
  """What a bottleneck block makes of maps, their channels side by side."""
  for name in ('c1', 'c2', 'c3', 'c4'):
    maps = (_activated(params[name], *maps),)
  return maps[0]


# A loop copies all that it keeps for its gradient: here the maps alone, and the rest is
# computed again. The gradient of the digits' network took 75 ms of CPU, and 42 so; with
# erf in place of jax.nn.gelu's erfc, which has more digits far below 0, it takes 30.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _activated(params, *maps):
  """Convolution of the maps after GELU."""
  gelu = lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))
  return _conv(params, jnp.concatenate([gelu(x) for x in maps], -1))


def _conv(params, x):
  """Convolution with bias; of 1x1 a product of matrices, which XLA on CPU does best."""
  kernel = params['w']
  size, _, before, after = kernel.shape
  if size == 1:
    y = (x.reshape(-1, before) @ kernel[0, 0]).reshape(*x.shape[:-1], after)
  else:
    y = conv2d(x, kernel)
  return y + params['b'].reshape(1, 1, 1, -1)
