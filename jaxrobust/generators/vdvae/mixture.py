"""A mixture of logistics over the grey levels of a pixel.

Source: Salimans et al. 2017 (PixelCNN++), in the form of Child 2021's released code:
the channels of a pixel share the component, in which the means of green and blue depend
linearly on the channels before them. Grey level v stands for x = v / 127.5 - 1, and has
the probability of [x - 1 / 255, x + 1 / 255], 0 and 255 with all that is beyond.
"""

import jax
import jax.numpy as jnp

_LEAST_LOG_SCALE = -7.0
# Under it, a bin's probability is taken from the density in its middle.
_LEAST_BIN = 1e-5
_HALF_BIN = 1 / 255
_LEAST_UNIFORM = 1e-5  # of Gumbel and logistic noise


def num_outputs(num_mixtures: int, channels: int) -> int:
  """Numbers that describe the mixture of a pixel of 1 or 3 channels.

  They are the logits of the components, then for each channel the means, the logs of
  the scales and, of three channels, the coefficients.
  """
  return num_mixtures * (1 + channels * _kinds(channels))


def _kinds(channels):
  """Of numbers for a channel of a component."""
  return 3 if channels == 3 else 2


def log_likelihood(outputs: jax.Array, images: jax.Array) -> jax.Array:
  """The logs of the probabilities of pixels.

  Args:
    outputs: [B, H, W, num_outputs].
    images: float [B, H, W, C] of whole numbers in 0..255.

  Returns:
    [B, H, W], in nats.
  """
  channels = images.shape[-1]
  logits, means, log_scales, coefficients = _split(outputs, channels)
  x = (images / 127.5 - 1)[..., None]
  pixels = [x[..., i, :] for i in range(channels)]
  means = jnp.stack(
    [_mean(i, means, coefficients, pixels) for i in range(channels)], -2
  )
  inverse = jnp.exp(-log_scales)
  centred = x - means
  upper, lower = inverse * (centred + _HALF_BIN), inverse * (centred - _HALF_BIN)
  middle = inverse * centred
  probability = jax.nn.sigmoid(upper) - jax.nn.sigmoid(lower)
  density = middle - log_scales - 2 * jax.nn.softplus(middle) + jnp.log(2 * _HALF_BIN)
  inside = jnp.where(
    probability > _LEAST_BIN, jnp.log(jnp.maximum(probability, 1e-12)), density
  )
  levels = images[..., None]
  bins = jnp.where(
    levels == 0,
    jax.nn.log_sigmoid(upper),
    jnp.where(levels == 255, jax.nn.log_sigmoid(-lower), inside),
  )
  return jax.nn.logsumexp(jnp.sum(bins, -2) + jax.nn.log_softmax(logits), -1)


def sample(outputs: jax.Array, rngs: jax.Array, channels: int) -> jax.Array:
  """Draws the pixels of images.

  Args:
    outputs: [B, H, W, num_outputs].
    rngs: keys [B].
    channels: C.

  Returns:
    [B, H, W, C], in [-1, 1].
  """
  logits, means, log_scales, coefficients = _split(outputs, channels)
  num_mixtures, shape = logits.shape[-1], outputs.shape[1:3]

  def uniform(rng):
    return jax.random.uniform(
      rng,
      (*shape, num_mixtures + channels),
      outputs.dtype,
      _LEAST_UNIFORM,
      1 - _LEAST_UNIFORM,
    )

  drawn = jax.vmap(uniform)(rngs)
  gumbel = -jnp.log(-jnp.log(drawn[..., :num_mixtures]))
  chosen = jax.nn.one_hot(jnp.argmax(logits + gumbel, -1), num_mixtures)
  of_chosen = lambda values: jnp.sum(values * chosen[..., None, :], -1)
  means, log_scales, coefficients = map(of_chosen, (means, log_scales, coefficients))
  drawn = drawn[..., num_mixtures:]
  noise = jnp.exp(log_scales) * (jnp.log(drawn) - jnp.log1p(-drawn))
  pixels = []
  for channel in range(channels):
    mean = _mean(channel, means[..., None], coefficients[..., None], pixels)
    pixels.append(jnp.clip(mean + noise[..., channel, None], -1, 1))
  return jnp.concatenate(pixels, -1)


def _split(outputs, channels):
  """Logits [B, H, W, M]; means, log-scales and coefficients [B, H, W, C, M]."""
  of_component, kinds = num_outputs(1, channels), _kinds(channels)
  num_mixtures = outputs.shape[-1] // of_component
  logits, rest = outputs[..., :num_mixtures], outputs[..., num_mixtures:]
  rest = rest.reshape(*outputs.shape[:3], channels, kinds, num_mixtures)
  log_scales = jnp.maximum(rest[..., 1, :], _LEAST_LOG_SCALE)
  coefficients = jnp.tanh(rest[..., 2, :]) if kinds > 2 else jnp.zeros_like(log_scales)
  return logits, rest[..., 0, :], log_scales, coefficients


def _mean(channel, means, coefficients, pixels):
  """[..., M], of a channel by the channels before it, each [..., 1]."""
  mean, first = means[..., channel, :], channel * (channel - 1) // 2
  for earlier in range(channel):
    mean = mean + coefficients[..., first + earlier, :] * pixels[earlier]
  return mean
