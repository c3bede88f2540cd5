"""What samples made elsewhere look like to the code that imports them."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxrobust.errors import UserError

IMAGE_KEYS = ('image', 'images', 'data')
LABEL_KEYS = ('label', 'labels', 'extrapolated_targets')
NEEDED = (
  f'one of {", ".join(IMAGE_KEYS)} (uint8 [n, H, W, C], C = 1 or 3) and one of '
  f'{", ".join(LABEL_KEYS)} (integers [n] from 0), n > 0'
)


class Source(NamedTuple):
  """Samples of a file or folder, opened and checked but for their bytes.

  Attributes:
    count: Number of images.
    num_classes: The least number of classes that its labels allow.
    batches: Starts reading: pairs of images uint8 [n, H, W, C] and labels int [n].
  """

  count: int
  num_classes: int
  batches: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]


def find_keys(path, keys: Iterable[str]) -> tuple[str, str]:
  """The names of the images and of the labels among those of arrays in a file."""
  found = [[k for k in known if k in keys] for known in (IMAGE_KEYS, LABEL_KEYS)]
  if [len(names) for names in found] != [1, 1]:
    raise UserError(f'{path} holds {sorted(map(str, keys))}; it needs {NEEDED}')
  (image_key,), (label_key,) = found
  return image_key, label_key


def check_arrays(path, image_shape, image_dtype, label_shape, label_dtype) -> None:
  """Refuses arrays of a file that are no images with their labels."""
  if (
    len(image_shape) != 4
    or image_dtype != np.uint8
    or image_shape[-1] not in (1, 3)
    or label_dtype.kind not in 'iu'
    or tuple(label_shape) != tuple(image_shape[:1])
    or not image_shape[0]
  ):
    raise UserError(
      f'{path} holds images {image_dtype} {list(image_shape)} and labels {label_dtype} '
      f'{list(label_shape)}; it needs {NEEDED}'
    )


def check_labels(path, least: int) -> None:
  """Refuses a file with a negative label."""
  if least < 0:
    raise UserError(
      f'{path} has the label {least}; labels are numbers of classes, 0, 1, …: leave '
      'out what has none, or number the classes anew'
    )
