"""The forward process of denoising diffusion, its loss, and guidance.

Noise is added to an image x in steps t = 0 … T - 1 until nothing else is left,
  x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) noise,
and a network learns to predict the noise in x_t (Ho et al. 2020, equations 4 and 14).
Images are in [-1, 1] here, outside this package's generators in [0, 1] or uint8.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from jaxrobust.errors import UserError


class Process(NamedTuple):
  """The forward process.

  Attributes:
    betas: float64 [T], variance that step t adds.
    alpha_bars: float64 [T], share of the image's variance that is left after step t.
  """

  betas: np.ndarray
  alpha_bars: np.ndarray

  @property
  def sigmas(self) -> np.ndarray:
    """Noise per signal after each step, float64 [T], ascending."""
    return np.sqrt((1 - self.alpha_bars) / self.alpha_bars)

  def add_noise(
    self, images: jax.Array, noise: jax.Array, times: jax.Array
  ) -> jax.Array:
    """Images [B, H, W, C] after the steps `times` int [B], with the given noise."""
    signal, spread = (
      jnp.asarray(np.sqrt(x), jnp.float32)[times].reshape(-1, 1, 1, 1)
      for x in (self.alpha_bars, 1 - self.alpha_bars)
    )
    return signal * images + spread * noise


def linear(num_steps: int, first_beta: float, last_beta: float) -> Process:
  """The process whose variances grow linearly, 1e-4 → 0.02 in 1,000 steps by Ho et al.

  Args:
    num_steps: T.
    first_beta, last_beta: of steps 0 and T - 1, in (0, 1).

  Returns:
    The process.
  """
  betas = np.linspace(first_beta, last_beta, num_steps)
  return Process(betas, np.cumprod(1 - betas))


def loss(
  predict: Callable,
  process: Process,
  images: jax.Array,
  times: jax.Array,
  noise: jax.Array,
) -> jax.Array:
  """Mean square error of the predicted noise, `L_simple` (Ho et al., equation 14).

  Args:
    predict: `(noisy images, times float [B]) -> noise`.
    process: forward process.
    images: [B, H, W, C] in [-1, 1].
    times: int [B] in [0, T).
    noise: standard normal [B, H, W, C].

  Returns:
    [B], means over pixels and channels.
  """
  noisy = process.add_noise(images, noise, times)
  predicted = predict(noisy, times.astype(jnp.float32))
  return jnp.mean((predicted - noise) ** 2, axis=(1, 2, 3))


def denoiser(predict: Callable, process: Process) -> Callable:
  """The images that predictions of noise mean, for samplers of `heun`.

  Args:
    predict: `(noisy images, times float [n]) -> noise`, of x_t.
    process: forward process.

  Returns:
    `(noisy images, sigmas float [n]) -> images [n, H, W, C] in [-1, 1]`, of images to
    which noise of deviation sigma was added, x_t / sqrt(alpha_bar_t). Times between
    steps are interpolated.
  """
  known = jnp.asarray(np.log(process.sigmas), jnp.float32)
  steps = jnp.arange(float(len(process.betas)))

  def denoise(images, sigmas):
    signals, sigma = (
      x[:, None, None, None] for x in (jax.lax.rsqrt(1 + sigmas**2), sigmas)
    )
    times = jnp.interp(jnp.log(sigmas), known, steps)
    return jnp.clip(images - sigma * predict(signals * images, times), -1, 1)

  return denoise


def noise_predictor(denoise: Callable) -> Callable:
  """The noise that denoised images mean, for samplers of `samplers`; see `denoiser`.

  Args:
    denoise: `(noisy images, sigmas float [n]) -> images`.

  Returns:
    `(noisy images x_t, sigmas float [n]) -> noise`.
  """

  def predict(images, sigmas):
    sigma = sigmas[:, None, None, None]
    images *= jnp.sqrt(1 + sigma**2)
    return (images - denoise(images, sigmas)) / sigma

  return predict


def guided(
  predict: Callable, classes: jax.Array, null_class: int, weight: float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Classifier-free guidance (Ho and Salimans 2022, equation 6).

  Args:
    predict: `(images, times, classes) -> noise` of a network that knows classes; or,
      as it is linear in noise, `(images, sigmas, classes) -> images`.
    classes: int [B].
    null_class: the class that stands for no condition.
    weight: w of `(1 + w) noise(class) - w noise(no class)`; 0 is no guidance.

  Returns:
    The same without classes. Guidance makes one call of twice the batch.
  """
  if not weight:
    return lambda images, times: predict(images, times, classes)

  def predict_guided(images, times):
    twice = lambda x: jnp.concatenate([x, x])
    labels = jnp.concatenate([classes, jnp.full_like(classes, null_class)])
    with_class, without = jnp.split(predict(twice(images), twice(times), labels), 2)
    return (1 + weight) * with_class - weight * without

  return predict_guided


def check_guidance(settings: config_dict.ConfigDict) -> None:
  """Raises UserError for `config.generator` with guidance that it cannot have."""
  guidance = settings.sampling.guidance
  if guidance and not settings.network.conditional:
    raise UserError(
      f'config.generator.sampling.guidance = {guidance} for a network without classes: '
      'set config.generator.network.conditional=True, or 0'
    )
  if guidance and not settings.training.condition_dropout:
    raise UserError(
      f'config.generator.sampling.guidance = {guidance} for a network that never '
      'learns to do without a class: use 0, or fit with '
      'config.generator.training.condition_dropout above 0'
    )
