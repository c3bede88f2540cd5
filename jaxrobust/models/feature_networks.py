"""Features of images by a network that is here, and how far two sets of them are apart.

The Frechet distance of features (FID; Heusel et al., 2017) depends on the network:
figures by different networks are not comparable.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrobust.config import dataset_info
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.models import lpips, named_classifiers

LPIPS = 'lpips:'  # before the path of its weights
OR_FEATURES = ' (or an .npz of features)'  # what may stand for a network, in messages

_BLOCK = 1_024  # rows taken at a time


class Network(NamedTuple):
  """Gives features; for another network, such as an Inception, make one of these.

  Attributes:
    name: says which network, in results.
    features: `images uint8 [n, H, W, C] -> features float [n, F]`.
  """

  name: str
  features: Callable[[np.ndarray], np.ndarray]


def network(path: str, batch_size: int = 256, dataset: str = '') -> Network:
  """A network that is here: the penultimate layer of a classifier, or LPIPS.

  Args:
    path: of a classifier, as of `named_classifiers.find`; or 'lpips:FILE', see
      `jaxrobust.models.lpips`.
    batch_size: images at a time on each device.
    dataset: whose images it is to see, a key of `dataset_info.INFO`: UserError where
      it was trained on others; '' for any.

  Returns:
    The network, named by its card, or 'LPIPS (AlexNet)'.

  Raises:
    UserError: as of `named_classifiers.load`, or for a file without LPIPS.
  """
  if path.startswith(LPIPS):
    name = 'LPIPS (AlexNet)'
    variables = parallel.replicate(lpips.read(epath.Path(path.removeprefix(LPIPS))))
    features_fn = lpips.features
  else:
    info = dataset_info.INFO.get(dataset) if dataset in dataset_info.INFO else None
    found, model, variables = named_classifiers.load(
      path, 'features', info, OR_FEATURES
    )
    name = f'{found.card.name} (penultimate layer)'
    features_fn = lambda v, x: model.features(*v, x)
  mapped = parallel.pmap(lambda v, x: features_fn(v, jnp.float32(x) / 255), local=True)
  return Network(
    name,
    lambda images: parallel.map_in_batches(mapped, variables, images, batch_size),
  )


class Moments:
  """Mean and covariance of features that arrive in batches, in float64.

  Attributes:
    count: rows so far.
    mean: [F].
  """

  def __init__(self, num_features: int):
    self.count, self.mean = 0, np.zeros(num_features)
    self._scatter = np.zeros((num_features, num_features))

  def update(self, features: np.ndarray) -> None:
    """Adds rows [n, F] (Chan et al., 1983, which does not cancel)."""
    features = np.asarray(features, np.float64)
    n, total = len(features), self.count + len(features)
    if not n:
      return
    mean = features.mean(0)
    centred, shift = features - mean, mean - self.mean
    self._scatter += centred.T @ centred
    self._scatter += np.outer(shift, shift) * (self.count * n / total)
    self.mean += shift * (n / total)
    self.count = total

  def covariance(self) -> np.ndarray:
    """The unbiased covariance [F, F]; at least two rows are needed."""
    if self.count < 2:
      raise UserError(f'{self.count} images have no covariance: compare at least 2')
    return self._scatter / (self.count - 1)


def moments(features: np.ndarray) -> Moments:
  """The moments of features [n, F]."""
  found = Moments(features.shape[1])
  for start in range(0, len(features), _BLOCK):
    found.update(features[start : start + _BLOCK])
  return found


def frechet_distance(a: Moments, b: Moments) -> float:
  """Squared Frechet distance of two Gaussians, the FID of their features.

  |m - n|^2 + tr(A + B - 2 (A B)^(1/2)); the trace of the root is that of
  (A^(1/2) B A^(1/2))^(1/2), whose eigenvalues are real and not negative.
  """
  covariances = a.covariance(), b.covariance()
  values, vectors = np.linalg.eigh(covariances[0])
  root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
  product = np.linalg.eigvalsh(root @ covariances[1] @ root)
  traces = sum(np.trace(covariance) for covariance in covariances)
  distance = traces - 2 * np.sqrt(product.clip(0)).sum()
  return float(distance + np.square(a.mean - b.mean).sum())


def fid(a: np.ndarray, b: np.ndarray) -> float:
  """The squared Frechet distance of features [n, F] and [m, F].

  Of fewer rows than features the covariances are not formed: with centred rows X and Y
  the trace of the root is the sum of singular values of X Y^T, over
  ((n - 1) (m - 1))^(1/2).
  """
  few, many = sorted((a, b), key=len)
  if len(few) >= few.shape[1] or len(few) < 2:
    return frechet_distance(moments(a), moments(b))
  means = [rows.mean(0, dtype=np.float64) for rows in (few, many)]
  centred, gram, trace = few - means[0], np.zeros((len(few), len(few))), 0.0
  for start in range(0, len(many), _BLOCK):
    block = many[start : start + _BLOCK] - means[1]
    product = block @ centred.T
    gram += product.T @ product
    trace += np.square(block).sum()
  singular = np.sqrt(np.linalg.eigvalsh(gram).clip(0))
  counts = len(few) - 1, len(many) - 1
  traces = np.square(centred).sum() / counts[0] + trace / counts[1]
  distance = traces - 2 * singular.sum() / np.sqrt(counts[0] * counts[1])
  return float(distance + np.square(means[0] - means[1]).sum())
