"""Heun's method where the best denoiser, and what it leads to, are known.

Of data N(0, s^2) it is D(x; sigma) = x s^2 / (s^2 + sigma^2), by which noise 80 z goes
to 80 z s / sqrt(s^2 + 80^2).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.generators import diffusion, heun, samplers

SHAPE = (2, 1, 1)


def gaussian(deviation):
  def denoise(images, sigmas):
    variance = deviation**2
    return images * (variance / (variance + sigmas**2))[:, None, None, None]

  return denoise


def draw(denoise, table, count):
  """(samples, the standard normal numbers that they started from), float64."""
  rngs = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(count))
  run = jax.jit(functools.partial(heun.sample, denoise, table, shape=SHAPE))
  start = jax.vmap(lambda rng: jax.random.normal(jax.random.fold_in(rng, 0), SHAPE))(
    rngs
  )
  return np.float64(run(rngs)), np.float64(start)


def test_the_published_schedule():
  expected = [
    *(80, 57.58598, 40.78557, 28.37458, 19.35245, 12.91008, 8.400935, 5.315195),
    *(3.256822, 1.92334, 1.088171, 0.5853481, 0.2964423, 0.1395165, 0.05994731),
    *(0.02293452, 0.00752802, 0.002, 0),
  ]
  np.testing.assert_allclose(heun.schedule(18, 0.002, 80.0), expected, rtol=1e-6)
  table = heun.table(heun.schedule(18, 0.002, 80.0))
  assert len(table.sigmas) == 35 and not table.added.any()


@pytest.mark.parametrize(
  'num_steps, deviation, expected',
  [
    *((5, 0.5, 1.2578863), (10, 0.5, 0.6097980), (18, 0.5, 0.5276246)),
    *((40, 0.5, 0.5048769), (100, 0.5, 0.5007203), (18, 1.0, 1.0447288)),
  ],
)
def test_on_gaussian_data(num_steps, deviation, expected):
  """The reference's figures; float32 here, and the step is linear."""
  table = heun.table(heun.schedule(num_steps, 0.002, 80.0))
  images, start = draw(gaussian(deviation), table, 3)
  np.testing.assert_allclose(images / start, expected, rtol=2e-5)


def test_it_is_of_second_order():
  def error(num_steps):
    table = heun.table(heun.schedule(num_steps, 0.002, 80.0))
    x = begin = 80.0
    d = 0.0
    for sigma, length, share in zip(*table[:3], strict=True):
      slope = x * sigma / (0.25 + sigma**2)
      begin = x if share == 1 else begin
      x, d = begin + length * (share * slope + (1 - share) * d), slope
    return x - 80 * 0.5 / np.sqrt(0.25 + 6400)

  errors = [error(n) for n in (50, 100, 200)]
  assert errors[0] / errors[1] > 3.5 and errors[1] / errors[2] > 3.8  # 4 in the limit


def test_on_a_point_and_on_two():
  table = heun.table(heun.schedule(18, 0.002, 80.0))
  point = lambda images, sigmas: jnp.full_like(images, 0.3)
  images, _ = draw(point, table, 4)
  np.testing.assert_allclose(images, 0.3, atol=1e-5)
  two = lambda images, sigmas: jnp.tanh(images / sigmas[:, None, None, None] ** 2)
  images, start = draw(two, table, 50)
  np.testing.assert_allclose(images, np.sign(start), atol=1e-5)


def test_churn_keeps_the_variance_of_gaussian_data():
  table = heun.table(heun.schedule(60, 0.002, 80.0), 20.0, (0.05, 50.0))
  assert (table.added > 0).sum() == sum(
    0.05 <= x <= 50 for x in heun.schedule(60, 0.002, 80.0)
  )
  images, start = draw(gaussian(0.5), table, 10_000)
  # 20,000 numbers: four deviations of a variance, and 1 % of the solver's own error.
  assert images.var() == pytest.approx(0.25, rel=4 * (2 / 20_000) ** 0.5 + 0.01)
  correlation = np.corrcoef(images.ravel(), start.ravel())[0, 1]
  assert correlation < 0.9  # What is added matters.
  # Too much noise for each step is cut to sqrt(2) - 1 of what is there.
  most = heun.table(heun.schedule(5, 0.002, 80.0), 1e6)
  np.testing.assert_allclose(most.sigmas[0], 80 * np.sqrt(2))
  np.testing.assert_allclose(most.added[0], 80)


def test_an_image_depends_on_its_own_key_only():
  table = heun.table(heun.schedule(4, 0.01, 5.0), 2.0)
  rngs = jax.random.split(jax.random.key(0), 6)
  sample = lambda keys: heun.sample(gaussian(0.5), table, keys, SHAPE)
  np.testing.assert_array_equal(sample(rngs)[2:5], sample(rngs[2:5]))


def test_a_network_of_noise_is_sampled_too():
  """Of N(0, 0.1^2), by the noise that is best predicted; ours, not clipped there."""
  process = diffusion.linear(1_000, 1e-4, 0.02)
  known = jnp.asarray(np.log(process.sigmas), jnp.float32)

  def predict(images, times):
    """E[noise | x_t] = s x_t / (a^2 v + s^2)."""
    sigma = jnp.exp(jnp.interp(times, jnp.arange(1_000.0), known))
    bar = 1 / (1 + sigma**2)
    scale = jnp.sqrt(1 - bar) / (bar * 0.01 + 1 - bar)
    return images * scale[:, None, None, None]

  ends = process.sigmas[[0, -1]]
  table = heun.table(heun.schedule(40, *ends))
  images, start = draw(diffusion.denoiser(predict, process), table, 5)
  expected = ends[1] * 0.1 / np.sqrt(0.01 + ends[1] ** 2)
  np.testing.assert_allclose(images / start, expected, rtol=0.05)


def test_a_denoiser_is_sampled_by_dpm_solver_too():
  table = samplers.dpm_solver_between(0.002, 80.0, 40)
  predict = diffusion.noise_predictor(gaussian(0.1))
  rngs = jax.random.split(jax.random.key(0), 4)
  images = samplers.sample(predict, table, rngs, SHAPE)
  start = jax.vmap(lambda rng: jax.random.normal(jax.random.fold_in(rng, 0), SHAPE))(
    rngs
  )
  expected = 80 * 0.1 / np.sqrt(0.01 + 6400)
  np.testing.assert_allclose(images / start, expected, rtol=0.03)
