"""Whether generated images complement the real ones, in the features of a network.

Source: Gowal et al. 2021, the tables of complementarity and coverage. Each compares
three sets of equal size: training images, test images and generated images. All but
the two-sample test rest on exact nearest neighbours by Euclidean distance; where two
sets are equally near, real images count as the nearer, training images first.
"""

import warnings
from typing import NamedTuple

import numpy as np
from absl import logging

from jaxrobust.analysis.distances import nearest as nearest_rows
from jaxrobust.errors import UserError
from jaxrobust.models import feature_networks

SETS = ('train', 'test', 'generated')


class Neighbours(NamedTuple):
  """The nearest neighbours of the images of one set, in each of the three.

  Attributes:
    distances: float64 [n, 3], in the order of SETS; an image is not its own neighbour.
    indices: int [n, 3], which images these are.
  """

  distances: np.ndarray
  indices: np.ndarray

  def shares(self) -> np.ndarray:
    """The share of images whose nearest neighbour lies in each set, [3]; sum 1."""
    nearest = self.distances.argmin(1)  # The first of equals.
    return np.bincount(nearest, minlength=len(SETS)) / len(nearest)


def neighbours(features: dict[str, np.ndarray], of: str) -> Neighbours:
  """Finds the nearest images in each set.

  Args:
    features: of each of SETS, float [n, F], of the same n, at least 2.
    of: the set whose neighbours are looked for.

  Raises:
    UserError: The sets are not of one size.
  """
  sizes = [len(features[name]) for name in SETS]
  if len(set(sizes)) > 1:
    raise UserError(f'{", ".join(SETS)} of {sizes} images: compare equally many')
  found = [
    _others(features[of]) if name == of else nearest_rows(features[of], rows, 1)
    for name, rows in ((name, features[name]) for name in SETS)
  ]
  distances, indices = zip(*found, strict=True)
  return Neighbours(np.hstack(distances), np.hstack(indices))


def coverage(features: dict[str, np.ndarray], of: str) -> float:
  """Share of real images whose nearest neighbour is a generated one.

  The paper prints coverage of the training and of the test images without its
  definition. This one takes the nearest among the generated images and the other
  images of that real set. It fits the ideal that its values suggest: two sets of one
  distribution give 50 % on average.

  Args:
    features: as of `neighbours`.
    of: 'train' or 'test'.
  """
  real, generated = features[of], features['generated']
  among, _ = _others(real)
  across, _ = nearest_rows(real, generated, 1)
  return float((across < among).mean())


class TwoSampleTest(NamedTuple):
  """How well a classifier distinguishes two sets.

  Attributes:
    accuracy: on images it was not fitted to; 0.5 where they cannot be distinguished.
    standard_error: of the accuracy, by the number of these images.
  """

  accuracy: float
  standard_error: float


def two_sample_test(
  real: np.ndarray, generated: np.ndarray, seed: int = 0
) -> TwoSampleTest:
  """The classifier two-sample test (Lopez-Paz and Oquab, 2017) by logistic regression.

  Args:
    real, generated: features [n, F] of each, at least 4.
    seed: of the choice of the half of each that the classifier is fitted to; it is
      judged on the other half.

  Returns:
    A TwoSampleTest.
  """
  n = min(len(real), len(generated))
  half = n // 2
  orders = np.random.RandomState(seed)
  mixed = [rows[orders.permutation(len(rows))[:n]] for rows in (real, generated)]
  split = lambda part: np.concatenate([rows[part] for rows in mixed])
  labels = lambda count: np.repeat([0, 1], count)
  # It takes two seconds to import, for which no help page should wait.
  from sklearn import exceptions, linear_model, pipeline, preprocessing

  classifier = pipeline.make_pipeline(
    preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=500)
  )
  with warnings.catch_warnings():  # Nearly converged is good enough.
    warnings.simplefilter('ignore', exceptions.ConvergenceWarning)
    classifier.fit(split(slice(half)), labels(half))
  accuracy = classifier.score(split(slice(half, n)), labels(n - half))
  error = np.sqrt(accuracy * (1 - accuracy) / (2 * (n - half)))
  return TwoSampleTest(float(accuracy), float(error))


def _others(rows):
  """Distances and indices [n, 1] of the nearest other row of the same set."""
  distances, indices = nearest_rows(rows, rows, 2)
  # Of repeated images the first column may be another one.
  itself = indices[:, :1] == np.arange(len(rows))[:, None]
  return distances[:, 1:], np.where(itself, indices[:, 1:], indices[:, :1])


def compare(
  features: dict[str, np.ndarray], seed: int
) -> tuple[dict[str, float], Neighbours]:
  """All figures of three sets.

  Args:
    features: [n, F] of each of SETS.
    seed: of the two-sample test.

  Returns:
    (figures by name, shares as fractions; neighbours of the generated images).

  Raises:
    UserError: for sets of different sizes.
  """
  logging.info('comparing %d features of each image', features['train'].shape[1])
  fid = lambda name: feature_networks.fid(features['train'], features[name])
  distinguished = two_sample_test(features['test'], features['generated'], seed)
  found = neighbours(features, 'generated')
  shares = found.shares()
  return {
    'fid': fid('generated'),
    'fid_test': fid('test'),
    'two_sample_accuracy': distinguished.accuracy,
    'two_sample_standard_error': distinguished.standard_error,
    'nearest_train': float(shares[0]),
    'nearest_test': float(shares[1]),
    'nearest_itself': float(shares[2]),
    'coverage_train': coverage(features, 'train'),
    'coverage_test': coverage(features, 'test'),
  }, found
