"""Heun's method for diffusion: from pure noise to images, of second order.

For noise levels sigma_0 > sigma_1 > … > 0 and a denoiser D, an image follows
  dx / d sigma = (x - D(x; sigma)) / sigma,
by a step along the slope and, except to 0, a second along the mean of that slope and
the one at its end. Between steps, noise may be added (churn). Source: Karras et al.
2022, algorithms 1 and 2.

Each evaluation of the network is a row of a table, which is computed in float64:
  x ← x + added noise;  d = (x - D(x; sigma)) / sigma;
  x ← start + length (share d + (1 - share) before).
`start` and `before` are x and d of the step's first evaluation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Table(NamedTuple):
  """The rows of a sampler, float64 [n] each.

  Attributes:
    sigmas: noise levels at which the network is evaluated.
    lengths: of the steps, below 0.
    shares: of the slope found; 1 in a step's first evaluation, 0.5 in its second.
    added: standard deviation of fresh noise.
    first_sigma: of the noise that sampling starts from.
  """

  sigmas: np.ndarray
  lengths: np.ndarray
  shares: np.ndarray
  added: np.ndarray
  first_sigma: float


def schedule(
  num_steps: int, least: float, greatest: float, exponent: float = 7.0
) -> np.ndarray:
  """Noise levels, closer together where they are small (Karras et al., equation 5).

  Args:
    num_steps: n, at least 2.
    least, greatest: noise levels above 0.
    exponent: 1 for equal distances.

  Returns:
    float64 [n + 1], from the greatest to the least, then 0.
  """
  ends = greatest ** (1 / exponent), least ** (1 / exponent)
  return np.append(np.linspace(*ends, num_steps) ** exponent, 0.0)


def table(
  sigmas: np.ndarray,
  churn: float = 0.0,
  churn_range: tuple[float, float] = (0.0, np.inf),
  churn_noise: float = 1.0,
) -> Table:
  """The sampler of a schedule.

  Args:
    sigmas: of n steps, as `schedule` gives them.
    churn: noise that is added in all, as a multiple of the noise that is there; 0 for a
      deterministic sampler. A step adds at most sqrt(2) - 1 times what is there.
    churn_range: noise levels at which it is added.
    churn_noise: standard deviation of the noise added, as a multiple of the right one.

  Returns:
    2 n - 1 rows.
  """
  rows = []
  share = min(churn / (len(sigmas) - 1), np.sqrt(2) - 1)
  for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
    higher = sigma * (1 + share * (churn_range[0] <= sigma <= churn_range[1]))
    added = churn_noise * np.sqrt(higher**2 - sigma**2)
    rows.append((higher, following - higher, 1.0, added))
    if following:
      rows.append((following, following - higher, 0.5, 0.0))
  return Table(*np.array(rows).T, sigmas[0])


def sample(
  denoise: Callable, table: Table, rngs: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Draws images.

  Deviation: x is in float32, which is what accelerators have; their code keeps it in
  float64. Of 1,000 samples of experiments/digits_edm.py that changed one pixel in
  64,000, by one of 255 levels (3e-6 in [-1, 1] at most).

  Args:
    denoise: `(noisy images [n, H, W, C], sigmas float [n]) -> images`.
    table: of a sampler.
    rngs: keys [n], one an image: an image depends on its own key only.
    shape: (H, W, C).

  Returns:
    [n, H, W, C], not clipped.
  """
  noise = lambda i: jax.vmap(
    lambda rng: jax.random.normal(jax.random.fold_in(rng, i), shape)
  )(rngs)
  *rows, first_sigma = table
  adds = rows[-1].any()

  def evaluate(carry, row):
    images, start, before = carry
    index, sigma, length, share, added = row
    if adds:
      images += added * noise(index)
    slope = (images - denoise(images, jnp.full(len(images), sigma))) / sigma
    start = jnp.where(share == 1, images, start)
    images = start + length * (share * slope + (1 - share) * before)
    return (images, start, slope), None

  first = first_sigma * noise(0)
  indices = jnp.arange(1, len(rows[0]) + 1)
  rows = [jnp.asarray(x, first.dtype) for x in rows]
  (images, *_), _ = jax.lax.scan(
    evaluate, (first, first, jnp.zeros_like(first)), (indices, *rows)
  )
  return images
