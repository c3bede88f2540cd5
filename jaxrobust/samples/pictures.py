"""Folders of PNG files as samples, and samples as one picture."""

import concurrent.futures
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image

from jaxrobust.errors import UserError
from jaxrobust.samples.import_source import Source
from jaxrobust.samples.sample_sets import SampleSet

_CHUNK = 1_024  # images held in memory while a folder is copied


def number_classes(
  paths: Sequence[pathlib.Path], has_gaps: bool = False
) -> dict[str, int]:
  """Numbers the classes of folders of PNG files, alike for all of them.

  Args:
    paths: The folders. Each of their subfolders that holds PNG files and is not hidden
      is a class: of the number that is its name where all names are numbers, else of
      its place among the names of all folders, sorted.
    has_gaps: Whether numbers may lack some of 0, 1, ….

  Returns:
    The number of each name, in sorted order of names.

  Raises:
    UserError: A folder has no classes, some names are numbers and some not, or numbers
      have gaps, as those of folders that hold parts of a set do.
  """
  found = set()
  for path in paths:
    if not (names := _class_names(path)):
      raise UserError(
        f'{path} holds no folders with PNG files: give a folder with one for each '
        'class, or --labels=FILE'
      )
    found.update(names)
  names = sorted(found)
  numbered = [name for name in names if name.isdecimal()]
  if not numbered:
    return {name: number for number, name in enumerate(names)}
  where = ', '.join(map(str, paths))
  if words := [name for name in names if name not in numbered]:
    raise UserError(
      f'{where}: the folders {numbered[0]} and {words[0]} are classes by number and by '
      'name; rename them, or give --labels=FILE'
    )
  classes = {name: int(name) for name in names}
  numbers = set(classes.values())
  if not has_gaps and len(numbers) <= max(numbers):
    least = next(k for k in itertools.count() if k not in numbers)
    raise UserError(
      f'{where}: {len(numbers)} folders have numbers up to {max(numbers)}, none '
      f'{least}; if they are classes, give --num_classes, if parts of a set, '
      '--labels=FILE'
    )
  return classes


def open_folder(
  path: str | os.PathLike,
  classes: dict[str, int],
  labels: str | os.PathLike = '',
) -> Source:
  """Opens a folder of PNG files.

  Args:
    path: The folder. Without `labels` it holds a folder for each class.
    classes: The number of each class, of `number_classes`.
    labels: File that names images, relative to the folder, with their labels: lines
      `NAME LABEL` (parted by a space, a tab or a comma), or EDM's `dataset.json`.
      Images that it does not name are left out.

  Returns:
    The samples: class by class in sorted order of names, or in that of `labels`.

  Raises:
    UserError: There are no images, or the labels are not as above.
  """
  path = pathlib.Path(path)
  if labels:
    listed = _read_labels(pathlib.Path(labels))
    named = lambda: ((path / name, label) for name, label in listed)
    num_classes = 1 + max(label for _, label in listed)
    return Source(len(listed), num_classes, lambda: _batches(named()))
  names = _class_names(path)
  count = sum(1 for name in names for _ in _png_names(path / name))
  named = lambda: (
    (path / name / file, classes[name])
    for name in names
    for file in sorted(_png_names(path / name))
  )
  return Source(count, 1 + max(classes.values()), lambda: _batches(named()))


def grid(
  images: Sequence[Sequence[np.ndarray]], least_size: int = 32
) -> PIL.Image.Image:
  """Arranges images in rows.

  Args:
    images: Rows of images uint8 [H, W, C], C = 1 or 3, all of one shape; rows may be
      of different lengths.
    least_size: Small images are enlarged by a whole factor to at least this height.

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
    sample_set: The set.
    columns: Images of a class, evenly spread over the class.

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


def _class_names(path) -> list[str]:
  """The folders in a folder that hold PNG files and are not hidden, sorted."""
  folders = (e for e in path.iterdir() if e.is_dir() and not e.name.startswith('.'))
  return sorted(e.name for e in folders if any(_png_names(e)))


def _png_names(folder) -> Iterator[str]:
  """The names of the PNG files in a folder that are not hidden."""
  names = (entry.name for entry in os.scandir(folder))
  return (n for n in names if n.lower().endswith('.png') and not n.startswith('.'))


def _read_labels(path) -> list[tuple[str, int]]:
  """Reads (name, label) pairs from a text file or EDM's dataset.json."""
  try:
    text = path.read_text()
    if path.suffix == '.json':
      pairs = json.loads(text)['labels']
    else:
      lines = (line.strip() for line in text.splitlines())
      pairs = [
        re.split(r'[\s,]+(?=[^\s,]+$)', line, maxsplit=1) for line in lines if line
      ]
    found = [(name, int(label)) for name, label in pairs]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{path} is no file of labels ({error}): write a line NAME LABEL for each image'
    ) from None
  if not found or min(label for _, label in found) < 0:
    raise UserError(f'{path} has no labels, or negative ones: labels are 0, 1, …')
  return found


def _batches(named) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (images, labels) of (path, label) pairs, decoded by threads."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    while chunk := list(itertools.islice(named, _CHUNK)):
      paths, labels = zip(*chunk, strict=True)
      images = list(pool.map(_read_png, paths))
      for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
          raise UserError(
            f'{path} is {list(image.shape)}, {paths[0]} is {list(images[0].shape)}: '
            'all images must be of one shape'
          )
      yield np.stack(images), np.array(labels)


def _read_png(path) -> np.ndarray:
  """One image as uint8 [H, W, C], C = 1 for gray and 3 for colours."""
  try:
    with PIL.Image.open(path) as image:
      if image.mode not in ('L', 'RGB', 'P'):
        raise UserError(
          f'{path} has pixels of mode {image.mode}: save it as 8-bit gray or RGB'
        )
      pixels = np.asarray(image.convert('RGB') if image.mode == 'P' else image)
  except (OSError, SyntaxError) as error:
    raise UserError(f'{path} is no readable PNG ({error}): make it again') from None
  return pixels[..., None] if pixels.ndim == 2 else pixels
