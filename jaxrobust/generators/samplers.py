"""Samplers of a diffusion model: from pure noise to images in [-1, 1].

All have one form. At noise level i the network's prediction of the noise gives a
prediction D_i of the clean image, clipped to its range (as Ho et al. do), and
  x_{i+1} = keep_i x_i + now_i D_i + before_i D_{i-1} + spread_i z_i,
with standard normal z_i. A sampler is a table of these numbers, computed in float64
from the forward process; each row costs one evaluation of the network.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.generators.diffusion import Process


class Table(NamedTuple):
  """The rows of a sampler, float64 [n] each.

  Attributes:
    times: at which the network is evaluated, in steps of the process; may be broken.
    signals, sigmas: sqrt(alpha_bar) and sqrt(1 - alpha_bar) at these times.
    keep, now, before, spread: as in the module's docstring.
  """

  times: np.ndarray
  signals: np.ndarray
  sigmas: np.ndarray
  keep: np.ndarray
  now: np.ndarray
  before: np.ndarray
  spread: np.ndarray


def ancestral(process: Process, num_steps: int) -> Table:
  """Every step of the process in reverse, with fresh noise (Ho et al., algorithm 2).

  The variance of the noise is beta_t, the larger of their two choices and the one of
  their released CIFAR-10 run.

  Args:
    process: forward process of T steps.
    num_steps: must be T.
  """
  if num_steps != len(process.betas):
    raise UserError(
      f'config.generator.sampling.num_steps = {num_steps}: ancestral sampling takes '
      f"all of the process's {len(process.betas)} steps; use that, or ddim or "
      'dpm-solver++'
    )
  betas, after = process.betas[::-1], process.alpha_bars[::-1]
  left = np.append(after[1:], 1.0)  # alpha_bar of the next, less noisy level
  return Table(
    times=np.arange(num_steps - 1.0, -1, -1),
    signals=np.sqrt(after),
    sigmas=np.sqrt(1 - after),
    keep=np.sqrt(1 - betas) * (1 - left) / (1 - after),
    now=np.sqrt(left) * betas / (1 - after),
    before=np.zeros(num_steps),
    spread=np.where(left < 1, np.sqrt(betas), 0.0),
  )


def ddim(process: Process, num_steps: int) -> Table:
  """Deterministic steps at equal distances of time (Song et al. 2021, eta = 0).

  Args:
    process: forward process of T steps.
    num_steps: 1 to T.
  """
  _check_steps(process, num_steps)
  times = np.round(np.linspace(len(process.betas) - 1, 0, num_steps))
  alpha_bars = process.alpha_bars[times.astype(int)]
  none = np.zeros(num_steps)
  return Table(times, *_first_order(alpha_bars), none, none)


def dpm_solver(process: Process, num_steps: int) -> Table:
  """DPM-Solver++(2M), deterministic and of second order; about 20 steps suffice.

  Source: Lu et al. 2022, "DPM-Solver++", algorithm 2. The levels lie at equal
  distances of half the log signal-to-noise ratio, log(signal / spread), between the
  ends of the process. There the time is found by interpolation, and need not be a
  whole step. First and last step are of first order: one has nothing before it, the
  other leads to no noise at all.

  Args:
    process: forward process of T steps.
    num_steps: 1 to T.
  """
  _check_steps(process, num_steps)
  known = 0.5 * np.log(process.alpha_bars / (1 - process.alpha_bars))
  ratios = np.linspace(known[-1], known[0], num_steps)
  times = np.interp(ratios, known[::-1], np.arange(len(known) - 1.0, -1, -1))
  return _second_order(ratios, times)


def dpm_solver_between(least: float, greatest: float, num_steps: int) -> Table:
  """DPM-Solver++(2M) for a network that knows the noise itself.

  Args:
    least, greatest: noise per signal, sigma / sqrt(alpha_bar), at the ends.
    num_steps: at least 1.

  Returns:
    A table whose times are noise per signal.
  """
  ratios = np.linspace(-np.log(greatest), -np.log(least), num_steps)
  return _second_order(ratios, np.exp(-ratios))


SAMPLERS = {'ancestral': ancestral, 'ddim': ddim, 'dpm-solver++': dpm_solver}


def _check_steps(process, num_steps):
  if not 1 <= num_steps <= len(process.betas):
    raise UserError(
      f'config.generator.sampling.num_steps = {num_steps}: use 1 to '
      f"{len(process.betas)}, the process's steps"
    )


def _second_order(ratios, times) -> Table:
  """DPM-Solver++(2M) at equal distances of half the log signal-to-noise ratio."""
  alpha_bars = 1 / (1 + np.exp(-2 * ratios))
  signals, sigmas, keep, now = _first_order(alpha_bars)
  # The straight line through D_{i-1} and D_i, continued to the middle of the step:
  # as steps are of equal length, half a step on.
  before = -0.5 * now
  before[[0, -1]] = 0
  none = np.zeros(len(ratios))
  return Table(times, signals, sigmas, keep, now - before, before, none)


def _first_order(alpha_bars):
  """`signals` to `now` of steps along the predicted noise, the last to no noise."""
  signals, sigmas = np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars)
  keep = np.append(sigmas[1:], 0.0) / sigmas
  return signals, sigmas, keep, np.append(signals[1:], 1.0) - keep * signals


def sample(
  predict: Callable, table: Table, rngs: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Draws images.

  Args:
    predict: `(noisy images [n, H, W, C], times float [n]) -> noise`.
    table: of a sampler.
    rngs: keys [n], one an image: an image depends on its own key only.
    shape: (H, W, C).

  Returns:
    float32 [n, H, W, C] in [-1, 1].
  """
  noise = lambda i: jax.vmap(
    lambda rng: jax.random.normal(jax.random.fold_in(rng, i), shape)
  )(rngs)
  is_random = table.spread.any()

  def step(carry, row):
    index, row = row
    images, before = carry
    predicted = predict(images, jnp.full(len(images), row.times))
    clean = jnp.clip((images - row.sigmas * predicted) / row.signals, -1, 1)
    images = row.keep * images + row.now * clean + row.before * before
    if is_random:
      images += row.spread * noise(index)
    return (images, clean), None

  rows = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), table)
  indices = jnp.arange(1, len(table.times) + 1)
  start = noise(0)
  (images, _), _ = jax.lax.scan(step, (start, jnp.zeros_like(start)), (indices, rows))
  return images
