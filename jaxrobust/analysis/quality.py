"""How close generated images are to real ones, in the features of a named network.

Frechet distance (FID; Heusel et al., 2017), density and coverage (Naeem et al., 2020),
and the nearest training images of samples, which show whether the generator repeats
them. All depend on the network: figures by different networks are not comparable, and
published FIDs are by one Inception network, whose features can be given as a file.
This coverage is Naeem's, not the share of the paper's coverage table.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import PIL.Image
from etils import epath

from jaxrobust.analysis import distances
from jaxrobust.config import dataset_info
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.files import arrays
from jaxrobust.models import classifiers, lpips
from jaxrobust.samples import pictures, stratified

LPIPS = 'lpips:'  # before the path of its weights
OR_FEATURES = ' (or an .npz of features)'  # what may stand for a network, in messages

_BLOCK = 1_024  # rows taken at a time


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


def density_coverage(
  real: np.ndarray, generated: np.ndarray, k: int = 5
) -> tuple[float, float]:
  """Density and coverage (Naeem et al., 2020, equations 5 and 6).

  Each real image has a ball up to its k-th nearest other real image.

  Args:
    real: features [n, F], n > k.
    generated: features [m, F].
    k: 5 as published.

  Returns:
    (density, coverage): the mean number of balls that a generated image lies in, over
    k; the share of balls with a generated image inside. For samples of the real
    distribution the first is 1 on average, the second near 1 - 2^-k.
  """
  radii = distances.nearest(real, real, k + 1)[0][
    :, k
  ]  # The first is the image itself.
  density = distances.count_in_balls(generated, real, radii) / (k * len(generated))
  coverage = (distances.nearest(real, generated, 1)[0][:, 0] <= radii).mean()
  return float(density), float(coverage)


class Figures(NamedTuple):
  """What `compare` finds.

  Attributes:
    fid: squared Frechet distance of all features given. It falls with the number of
      images, so compare at equal numbers.
    density: see `density_coverage`.
    coverage: see `density_coverage`.
    distances: float [m, 5], of each generated image to its nearest real ones.
    indices: int [m, 5], which those are.
  """

  fid: float
  density: float
  coverage: float
  distances: np.ndarray
  indices: np.ndarray


def compare(real: np.ndarray, generated: np.ndarray) -> Figures:
  """All figures of generated features [m, F] beside real ones [n, F], n > 5.

  Density and coverage are of at most 10,000 images of each, as published, one from each
  of as many equal parts.
  """
  some = lambda x: x[stratified.one_of_each_part(len(x), 10_000, 0)]
  return Figures(
    fid(real, generated),
    *density_coverage(some(real), some(generated)),
    *distances.nearest(generated, real, 5),
  )


def neighbours(
  figures: Figures, real: np.ndarray, generated: np.ndarray, rows: int = 10
) -> PIL.Image.Image:
  """The generated images nearest to a training image, beside those they are near to.

  Args:
    figures: of `compare`.
    real: images uint8 [n, H, W, C], of the same rows as the features.
    generated: images uint8 [m, H, W, C].
    rows: how many generated images, the nearest first.

  Returns:
    A picture of rows: a generated image, then its nearest training images.
  """
  order = np.argsort(figures.distances[:, 0], kind='stable')[:rows]
  return pictures.grid([[generated[i], *real[figures.indices[i]]] for i in order])


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
    path: of a classifier, as of `classifiers.find`; or 'lpips:FILE', see
      `jaxrobust.models.lpips`.
    batch_size: images at a time on each device.
    dataset: whose images it is to see, a key of `dataset_info.INFO`: UserError where
      it was trained on others; '' for any.

  Returns:
    The network, named by its card, or 'LPIPS (AlexNet)'.

  Raises:
    UserError: as of `classifiers.load`, or for a file without LPIPS.
  """
  if path.startswith(LPIPS):
    name = 'LPIPS (AlexNet)'
    variables = parallel.replicate(lpips.read(epath.Path(path.removeprefix(LPIPS))))
    features_fn = lpips.features
  else:
    info = dataset_info.INFO.get(dataset) if dataset in dataset_info.INFO else None
    found, model, variables = classifiers.load(path, 'features', info, OR_FEATURES)
    name = f'{found.card.name} (penultimate layer)'
    features_fn = lambda v, x: model.features(*v, x)
  mapped = parallel.pmap(lambda v, x: features_fn(v, jnp.float32(x) / 255), local=True)
  return Network(
    name,
    lambda images: parallel.map_in_batches(mapped, variables, images, batch_size),
  )


def features_of(
  source: str, real: np.ndarray, generated: np.ndarray, dataset: str = ''
) -> tuple[str, np.ndarray, np.ndarray]:
  """The features of real and generated images, by a network or from a file.

  Args:
    source: an `.npz` as of `read_features`, or a network as of `network`.
    real, generated: uint8 [n, H, W, C].
    dataset: as of `find_classifier`.

  Returns:
    (name of the network, features [n, F] of real, and of generated).

  Raises:
    UserError: as `read_features` or `network`; the file is of other numbers of images.
  """
  if not source.endswith('.npz'):
    name, features_fn = network(source, dataset=dataset)
    return name, features_fn(real), features_fn(generated)
  name, *features = read_features(source)
  rows = [len(real), len(generated)]
  if [len(x) for x in features] != rows:
    raise UserError(
      f'{source} has features of {[len(x) for x in features]} real and generated '
      f'images; it needs {rows}'
    )
  return name, *features


def read_features(
  path: str | os.PathLike, sets: tuple[str, ...] = ('real', 'generated')
) -> tuple[str, ...]:
  """Reads features that another program computed.

  Args:
    path: `.npz` with `network` (its name), and float [n, F] for each of the sets.
    sets: their names; F is the same for all.

  Returns:
    (network, features of each set).

  Raises:
    UserError: the file is absent, damaged or holds something else.
  """
  expected = {'network': ('U', 0), **{name: ('fiu', 2) for name in sets}}
  content = arrays.read_npz(path, expected)
  found = [content[name] for name in sets]
  if len({x.shape[1] for x in found}) > 1 or not found[0].shape[1]:
    shapes = zip(sets, (list(x.shape) for x in found), strict=True)
    raise UserError(
      f'{path} holds {" and ".join(f"{name} {shape}" for name, shape in shapes)}: '
      'they must be [n, F], of one F'
    )
  return str(content['network']), *found
