"""What EDM learns: the image behind noise of any strength, preconditioned.

The noisy image is x = y + n, n ~ N(0, sigma^2). The denoiser is
  D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4),
with a network F whose inputs and outputs have variance 1 at every noise level (Karras
et al. 2022, section 5). Images are in [-1, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Preconditioning(NamedTuple):
  """Factors at noise levels, each of the levels' shape (Karras et al., table 1)."""

  skip: jax.Array
  out: jax.Array
  into: jax.Array
  noise: jax.Array


def precondition(sigmas: jax.Array, data_sigma: float) -> Preconditioning:
  """The factors; `data_sigma` is the standard deviation of pixels in [-1, 1]."""
  total = sigmas**2 + data_sigma**2
  return Preconditioning(
    skip=data_sigma**2 / total,
    out=sigmas * data_sigma * jax.lax.rsqrt(total),
    into=jax.lax.rsqrt(total),
    noise=jnp.log(sigmas) / 4,
  )


def weight(sigmas: jax.Array, data_sigma: float) -> jax.Array:
  """Of the squared error at noise levels: 1 / c_out^2."""
  return (sigmas**2 + data_sigma**2) / (sigmas * data_sigma) ** 2


def denoiser(apply: Callable, data_sigma: float) -> Callable:
  """D of a network.

  Args:
    apply: `(images, noise levels [B], *conditions) -> [B, H, W, C]`, F.
    data_sigma: standard deviation of pixels in [-1, 1].

  Returns:
    `(noisy images, sigmas [B], *conditions) -> images`.
  """

  def denoise(images, sigmas, *conditions):
    factors = precondition(sigmas, data_sigma)
    skip, out, into = (x[:, None, None, None] for x in factors[:3])
    return skip * images + out * apply(into * images, factors.noise, *conditions)

  return denoise


def loss(
  denoise: Callable,
  images: jax.Array,
  sigmas: jax.Array,
  noise: jax.Array,
  data_sigma: float,
) -> jax.Array:
  """Weighted squared error of what is denoised (Karras et al., equation 8).

  Deviation: the mean over pixels; their code sums, a factor that Adam hardly sees.

  Args:
    denoise: `(noisy images, sigmas) -> images`.
    images: [B, H, W, C] in [-1, 1].
    sigmas: [B], above 0.
    noise: standard normal [B, H, W, C].
    data_sigma: standard deviation of pixels in [-1, 1].

  Returns:
    [B]; 1 at every level where the network is 0 and pixels have that deviation.
  """
  noisy = images + sigmas[:, None, None, None] * noise
  errors = jnp.mean((denoise(noisy, sigmas) - images) ** 2, (1, 2, 3))
  return weight(sigmas, data_sigma) * errors
