"""The Gaussian generator: moments, determinism, and what it refuses."""

import io

import jax
import numpy as np
import pytest
from etils import epath

from experiments import base_generator
from jaxrobust.config import dataset_info, registries
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.generators import gaussian

SHAPE = (3, 3, 1)


INFO = dataset_info.DatasetInfo('test', SHAPE, 2, 4_000, 0)


def make_settings(covariance, rank):
  settings = base_generator.get_config('gaussian').generator
  settings.covariance, settings.rank = covariance, rank
  return settings


def fit(real, covariance='empirical', rank=2, info=INFO):
  settings = make_settings(covariance, rank)
  gaussian.Gaussian.check(settings, info)
  return gaussian.Gaussian.fit(datasets.Split(*real), info, settings)


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
  samples, classes = fit(real).sample(jax.random.key(0), np.arange(8_000), 500)
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
  sample = lambda rng, indices: fit(real).sample(rng, indices, 4)[0]
  rng = jax.random.key(7)
  whole = sample(rng, np.arange(50))
  np.testing.assert_array_equal(whole[20:30], sample(rng, np.arange(20, 30)))
  assert (whole != sample(jax.random.key(8), np.arange(50))).any()
  assert len(np.unique(whole, axis=0)) == 50


@pytest.mark.parametrize('covariance', ['oas', 'low-rank'])
def test_save_and_restore_are_exact(real, tmp_path, covariance):
  fitted = fit(real, covariance)
  path = epath.Path(tmp_path) / 'generator.npz'
  fitted.save(path)
  again = gaussian.Gaussian.restore(path, fitted.settings, INFO)
  np.testing.assert_array_equal(
    *(g.sample(jax.random.key(0), np.arange(9), 4)[0] for g in (fitted, again))
  )


def test_a_file_of_an_earlier_version_is_read(real, tmp_path):
  """It held no settings; one that does not fit these is refused."""
  fitted = fit(real, 'low-rank', rank=3)
  buffer = io.BytesIO()
  np.savez(buffer, **fitted.variables)
  path = epath.Path(tmp_path) / 'generator.npz'
  path.write_bytes(buffer.getvalue())
  again = gaussian.Gaussian.restore(path, fitted.settings, INFO)
  np.testing.assert_array_equal(again.variables['means'], fitted.variables['means'])
  with pytest.raises(UserError, match=r'factors has shape \[2, 3, 9\].* \[2, 4, 9\]'):
    gaussian.Gaussian.restore(path, make_settings('low-rank', 4), INFO)


def test_shrinkage_fills_the_directions_that_few_images_lack(real):
  images, labels = real[0][:8], real[1][:8]
  rank = lambda name: np.linalg.matrix_rank(
    np.float64(fit((images, labels), name).variables['factors'][0]),
    tol=1e-5,
  )
  assert rank('empirical') == 3  # Four images span three directions.
  assert rank('ledoit-wolf') == rank('oas') == 9


def test_low_rank_is_probabilistic_pca(real):
  """Its covariance, by the eigenvalues of the empirical one (Tipping and Bishop)."""
  images, labels = real
  fitted = fit(real, 'low-rank', rank=3)
  assert fitted.variables['factors'].shape == (2, 3, 9)
  for label in (0, 1):
    values, vectors = np.linalg.eigh(
      np.cov(images[labels == label].reshape(-1, 9).T / 255)
    )
    values[:6] = values[:6].mean()
    expected = vectors * values @ vectors.T
    factor = np.float64(fitted.variables['factors'][label])
    found = factor.T @ factor + np.float64(
      fitted.variables['residuals'][label]
    ) ** 2 * np.eye(9)
    # Float32 rounding of the factor.
    np.testing.assert_allclose(found, expected, atol=1e-6 * values.max())
    samples, classes = fitted.sample(jax.random.key(0), np.arange(8_000), 500)
    drawn = samples[classes == label].reshape(-1, 9) / 255
    # Five standard errors of a covariance of 4,000, and rounding to 1 / 255.
    spread = np.sqrt(np.outer(np.diag(expected), np.diag(expected)) + expected**2)
    rounding = np.eye(9) / (12 * 255**2)
    error = np.abs(np.cov(drawn.T) - expected - rounding)
    np.testing.assert_array_less(error, 5 * spread / np.sqrt(4_000))


def test_refusals(real):
  images, labels = real
  with pytest.raises(UserError, match='class 2 has 0 training images'):
    fit(real, info=INFO._replace(num_classes=3))
  with pytest.raises(UserError, match='rank = 9: images of 9 values allow 1 to 8'):
    fit(real, 'low-rank', rank=9)
  with pytest.raises(UserError, match='has 4 training images.* needs 5'):
    fit((images[:8], labels[:8]), 'low-rank', rank=3)
  with pytest.raises(UserError, match="name = 'gan': use one of gaussian"):
    registries.GENERATORS.get('gan', 'config.generator.name')
