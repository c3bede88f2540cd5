"""Mixup samples: pairs, ratios, determinism, and what is refused."""

import jax
import numpy as np
import pytest
import scipy.stats
from etils import epath

from experiments import base_generator
from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.generators import mixup

INFO = dataset_info.DatasetInfo('test', (2, 2, 1), 2, 4, 0)


def fit(images, alpha=1.0):
  split = datasets.Split(images, np.zeros(len(images), int))
  settings = base_generator.get_config('mixup').generator
  settings.alpha = alpha
  return mixup.Mixup.fit(split, INFO, settings)


@pytest.fixture(scope='module')
def one_hot():
  """Four images, each with one white pixel."""
  return fit(np.uint8(np.eye(4) * 255).reshape(4, 2, 2, 1))


@pytest.fixture(scope='module')
def drawn(one_hot):
  images, classes = one_hot.sample(jax.random.key(0), np.arange(3_000), 250)
  assert images.dtype == np.uint8 and not (classes + 1).any()
  return images.reshape(-1, 4)


def test_each_sample_mixes_two_different_images(drawn):
  """Every pair equally often; what one lacks the other has, up to rounding."""
  assert (np.abs(drawn.sum(1, dtype=int) - 255) <= 1).all()
  assert set((drawn > 0).sum(1)) <= {1, 2}
  pairs = np.sort(np.argsort(drawn, 1)[:, 2:], 1)[(drawn > 0).sum(1) == 2]
  counts = np.unique(pairs, axis=0, return_counts=True)[1]
  assert len(counts) == 6
  assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_ratios_are_uniform(drawn):
  ratios = drawn.max(1) / 255  # The larger of the two: uniform on [1/2, 1].
  assert scipy.stats.kstest(ratios, 'uniform', (0.5, 0.5)).pvalue > 1e-3


def test_sample_i_depends_on_seed_and_i_only_and_survives_the_file(
  one_hot, drawn, tmp_path
):
  path = epath.Path(tmp_path) / 'generator.npz'
  one_hot.save(path)
  again = mixup.Mixup.restore(path, one_hot.settings, INFO)
  part = again.sample(jax.random.key(0), np.arange(20, 30), 250)[0]
  np.testing.assert_array_equal(part.reshape(-1, 4), drawn[20:30])
  other = again.sample(jax.random.key(1), np.arange(20, 30), 250)[0]
  assert (other != part).any()


def test_refusals():
  images = np.zeros((3, 2, 2, 1), np.uint8)
  with pytest.raises(UserError, match='1 training images cannot be mixed'):
    fit(images[:1])
