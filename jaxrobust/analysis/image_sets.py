"""The sets of images that an analysis compares: train, test and generated."""

import functools
from collections.abc import Callable

import numpy as np
from ml_collections import config_dict

from jaxrobust.config import dataset_info
from jaxrobust.errors import UserError
from jaxrobust.runs import checksums
from jaxrobust.samples import sample_sets, shards, stratified

Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [n, H, W, C], labels int32 [n]


class ImageSets:
  """The sample set of an analysis, and the real images beside it.

  Attributes:
    metadata: of the sample set.
  """

  def __init__(self, config: config_dict.ConfigDict, real_fn: Callable[[str], Arrays]):
    """Opens the sample set; real images are read when they are first drawn from.

    Args:
      config: of the analysis.
      real_fn: reads 'train' or 'test'.

    Raises:
      UserError: if there is no sample set, or its images are not like those of the data
        set.
    """
    found = sample_sets.SampleSet.open(config.samples)
    info = dataset_info.of(config.dataset)
    # Imported sets may lack the last classes.
    if found.image_shape != info.image_shape or found.num_classes > info.num_classes:
      raise UserError(
        f'config.samples = {config.samples} holds images {list(found.image_shape)} of '
        f'{found.num_classes} classes, {info.name} {list(info.image_shape)} of '
        f'{info.num_classes}: name the data set that the samples are of'
      )
    self._config, self._generated, self.metadata = config, found, found.metadata
    self._real_fn = real_fn

  def sha256(self) -> str:
    """The sha256 of the sample set's metadata, which have that of each of its files."""
    return checksums.sha256(self._generated.path / shards.METADATA)

  def draw(self, name: str, field: str) -> Arrays:
    """Images of a set, spread at random over all of it.

    Args:
      name: 'train', 'test' or 'generated'.
      field: of the config, how many.

    Raises:
      UserError: if the set has fewer.
    """
    (total, gather), count = self._sources[name], self._config[field]
    if count > total:
      raise UserError(
        f'config.{field} = {count}: there are {total} {name} images; use at most '
        f'{total}'
      )
    return gather(stratified.one_of_each_part(total, count, self._config.seed))

  @functools.cached_property
  def _sources(self) -> dict[str, tuple[int, Callable]]:
    """The size of each set, and a function from indices to its images and labels."""
    made = self._generated
    sources: dict[str, tuple[int, Callable]] = {
      'generated': (len(made), lambda i: (made.gather(i), made.gather_labels(i)))
    }
    for name in ('train', 'test'):
      real = self._real_fn(name)
      sources[name] = len(real[0]), functools.partial(_rows, real)
    return sources


def _rows(real: Arrays, indices: np.ndarray) -> Arrays:
  """Some of the images."""
  images, labels = real
  return images[indices], labels[indices]
