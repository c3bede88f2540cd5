"""How close generated images are to real ones, in the features of a named network.

Frechet distance (FID; Heusel et al., 2017), density and coverage (Naeem et al., 2020),
and the nearest training images of samples, which show whether the generator repeats
them. All depend on the network: figures by different networks are not comparable, and
published FIDs are by one Inception network, whose features can be given as a file.
This coverage is Naeem's, not the share of the paper's coverage table.
"""

from typing import NamedTuple

import numpy as np
import PIL.Image

from jaxrobust.analysis import distances
from jaxrobust.models import feature_networks
from jaxrobust.samples import pictures, stratified


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
    feature_networks.fid(real, generated),
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
