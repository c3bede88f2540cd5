"""The Gaussian generator: moments, determinism, and what it refuses."""

import types

import jax
import numpy as np
import pytest
from etils import epath

from jaxrobust import generators
from jaxrobust.errors import UserError
from jaxrobust.generators import gaussian

SHAPE = (3, 3, 1)


def settings(covariance='empirical'):
  return types.SimpleNamespace(covariance=covariance)


@pytest.fixture(scope='module')
def real():
  """Two classes with known moments, far from 0 and 255."""
  rng = np.random.RandomState(0)
  mix = rng.normal(size=(2, 9, 9)) * 3
  labels = np.arange(4_000) % 2
  pixels = (
    128
    + 20 * labels[:, None]
    + np.einsum('nij,nj->ni', mix[labels], rng.normal(size=(4_000, 9)))
  )
  return np.uint8(np.round(pixels)).reshape(-1, *SHAPE), labels


def test_samples_have_the_moments_of_their_class(real):
  images, labels = real
  fitted = gaussian.Gaussian.fit(images, labels, 2, settings())
  samples, classes = fitted.sample(jax.random.key(0), np.arange(8_000))
  np.testing.assert_array_equal(classes, np.arange(8_000) % 2)
  for label in (0, 1):
    x = images[labels == label].reshape(-1, 9).astype(float)
    y = samples[classes == label].reshape(-1, 9).astype(float)
    deviation = x.std(0)
    # Standard errors of a mean of 4,000: 0.016 deviations; of a covariance: 0.03.
    np.testing.assert_allclose(y.mean(0), x.mean(0), atol=0.08 * deviation.max())
    scale = np.outer(deviation, deviation)
    np.testing.assert_allclose(np.cov(y.T) / scale, np.cov(x.T) / scale, atol=0.15)


def test_sample_i_depends_on_seed_and_i_only(real):
  fitted = gaussian.Gaussian.fit(*real, 2, settings())
  rng = jax.random.key(7)
  whole = fitted.sample(rng, np.arange(50))[0]
  np.testing.assert_array_equal(whole[20:30], fitted.sample(rng, np.arange(20, 30))[0])
  assert (whole != fitted.sample(jax.random.key(8), np.arange(50))[0]).any()
  assert len(np.unique(whole, axis=0)) == 50


def test_save_and_restore_are_exact(real, tmp_path):
  fitted = gaussian.Gaussian.fit(*real, 2, settings('oas'))
  path = epath.Path(tmp_path) / 'generator.npz'
  fitted.save(path)
  again = gaussian.Gaussian.restore(path)
  np.testing.assert_array_equal(
    *(g.sample(jax.random.key(0), np.arange(9))[0] for g in (fitted, again))
  )


def test_shrinkage_fills_the_directions_that_few_images_lack(real):
  images, labels = real[0][:8], real[1][:8]
  rank = lambda name: np.linalg.matrix_rank(
    np.float64(gaussian.Gaussian.fit(images, labels, 2, settings(name)).factors[0]),
    tol=1e-5,
  )
  assert rank('empirical') == 3  # Four images span three directions.
  assert rank('ledoit-wolf') == rank('oas') == 9


def test_refusals(real):
  images, labels = real
  with pytest.raises(UserError, match="covariance = 'full': use one of empirical"):
    gaussian.Gaussian.fit(images, labels, 2, settings('full'))
  with pytest.raises(UserError, match='class 2 has 0 training images'):
    gaussian.Gaussian.fit(images, labels, 3, settings())
  with pytest.raises(UserError, match="name = 'gan': use one of gaussian"):
    generators.get('gan')
