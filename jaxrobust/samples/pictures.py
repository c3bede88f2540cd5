"""Samples as one picture."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
import PIL.Image

from jaxrobust.errors import UserError
from jaxrobust.samples.sample_sets import SampleSet


def grid(
  images: Sequence[np.ndarray | Sequence[np.ndarray]], least_size: int = 32
) -> PIL.Image.Image:
  """Arranges images in rows.

  Args:
    images: rows of images uint8 [H, W, C], C = 1 or 3, all of one shape; rows may be
      of different lengths.
    least_size: small images are enlarged by a whole factor to at least this height.

  Returns:
    The picture, with 2 pixels of white around each image.
  """
  shape = next(image.shape for row in images for image in row)
  scale, gap = -(-least_size // shape[0]), 2
  height, width = (scale * side + gap for side in shape[:2])
  columns = max(map(len, images))
  canvas = np.full(
    (len(images) * height + gap, columns * width + gap, 3), 255, np.uint8
  )
  for i, row in enumerate(images):
    for j, image in enumerate(row):
      y, x = gap + i * height, gap + j * width
      large = image.repeat(scale, 0).repeat(scale, 1)
      canvas[y : y + height - gap, x : x + width - gap] = large
  return PIL.Image.fromarray(canvas)


def contact_sheet(sample_set: SampleSet, columns: int = 10) -> PIL.Image.Image:
  """Shows some images of each class, always the same ones.

  Args:
    sample_set: the set.
    columns: images of a class, evenly spread over the class.

  Returns:
    A picture with a row for each class, empty for a class without images.
  """
  labels = sample_set.gather_labels(slice(None))
  rows = []
  for label in range(sample_set.num_classes):
    members = np.flatnonzero(labels == label)
    rows.append(sample_set.gather(members[spread(len(members), columns)]))
  return grid(rows)


def spread(total: int, count: int) -> np.ndarray:
  """The positions int [min(count, total)] that lie evenly in range(total)."""
  count = min(count, total)
  return np.arange(count) * total // max(count, 1)


def save(picture: PIL.Image.Image, path: str | os.PathLike) -> None:
  """Writes a picture as PNG; raises UserError where that is impossible."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.tmp')
  try:
    picture.save(temporary, 'png')
    temporary.replace(path)
  except OSError as error:
    raise UserError(
      f'{path} cannot be written ({error.strerror or error}): name another file'
    ) from None
