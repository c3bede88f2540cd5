"""What samples made elsewhere look like to the code that imports them."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.files import arrays
from jaxrobust.samples import shards

# Names of images and of labels in files; the first row of which a file has any counts.
_KEYS = (
  (('image', 'images', 'data'), ('label', 'labels', 'extrapolated_targets')),
  (('x',), ('y',)),
  (('arr_0',), ('arr_1',)),
)
NEEDED = (
  'image, images, data, x or arr_0 (uint8 [n, H, W, C], C = 1 or 3) with label, '
  'labels, extrapolated_targets, y or arr_1 (integers [n] from 0), n > 0'
)
_CHUNK_BYTES = 2**24  # of images held in memory while they are copied
_CHUNK_IMAGES = 2**13


class Source(NamedTuple):
  """Samples of a file or folder, opened and checked but for their bytes.

  Attributes:
    count: number of images.
    num_classes: the least number of classes that its labels allow.
    batches: starts reading: pairs of images uint8 [n, H, W, C] and labels int [n].
  """

  count: int  # type: ignore[assignment]
  num_classes: int
  batches: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]


def find_keys(path: str | os.PathLike, keys: Iterable[str]) -> tuple[str, str]:
  """The names of the images and of the labels among those of arrays in a file."""
  keys = list(map(str, keys))  # Those of a pickle may be anything.
  for row in _KEYS:
    found = [[key for key in known if key in keys] for known in row]
    if [len(names) for names in found] == [1, 1]:
      return found[0][0], found[1][0]
    if any(found):
      break
  raise UserError(f'{path} holds {arrays.listed(keys)}; it needs {NEEDED}')


def check_arrays(
  path: str | os.PathLike,
  images: arrays.Stream | np.ndarray,
  labels: arrays.Stream | np.ndarray,
) -> None:
  """Refuses arrays, by their shapes and dtypes, that are no images with labels."""
  if (
    images.dtype != np.uint8
    or not shards.is_image_shape(images.shape[1:])
    or images.shape[-1] not in (1, 3)
    or labels.dtype.kind not in 'iu'
    or tuple(labels.shape) != tuple(images.shape[:1])
    or not images.shape[0]
  ):
    raise UserError(
      f'{path} holds images {images.dtype} {list(images.shape)} and labels '
      f'{labels.dtype} {list(labels.shape)}; it needs {NEEDED}, images of at most '
      f'{shards.MAX_IMAGE_BYTES >> 20} MiB'
    )


def check_labels(path: str | os.PathLike, least: int, most: int) -> int:
  """The number of classes of labels from `least` to `most`, which may be a file's."""
  if not 0 <= least <= most < shards.MAX_CLASSES:
    raise UserError(
      f'{path} has the label {least if least < 0 else most}; labels are numbers of '
      f'classes, 0, 1, … up to {shards.MAX_CLASSES - 1}: leave out what has none (-1, '
      'which is a large number where it was saved as unsigned), or number the classes '
      'anew'
    )
  return most + 1


def chunks(count: int, image_shape: Iterable[int]) -> Iterator[int]:
  """Lengths of parts of `count` images that are small enough to be held in memory."""
  fitting = _CHUNK_BYTES // math.prod(image_shape)
  size = min(max(fitting, 1), _CHUNK_IMAGES)
  for start in range(0, count, size):
    yield min(size, count - start)
