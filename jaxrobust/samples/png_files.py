"""PNG files, in a folder or a `.zip`, as samples.

Labels come from a file of labels, else from the `dataset.json` among the images, as EDM
and StyleGAN write it, else from the folders that the images are in.
"""

import concurrent.futures
import io
import itertools
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import PIL.Image

from jaxrobust.errors import UserError
from jaxrobust.files import arrays
from jaxrobust.samples import import_source, label_files, shards

_LIST = 'dataset.json'
_MAX_BYTES = 2 * shards.MAX_IMAGE_BYTES  # of a file
_MODES = {'L': 1, 'RGB': 3, 'P': 3}  # of Pillow, and the channels they become


class PngFiles:
  """PNG files of one folder or `.zip`.

  Attributes:
    path: of the folder or `.zip`.
    listed: names of the images, relative to it, with their labels; None where the
      folders that they are in are their classes.
  """

  def __init__(self, path: str | os.PathLike, labels: str | os.PathLike = ''):
    """Opens a folder or `.zip`, whose images `labels` may name; see `label_files`.

    Raises:
      UserError: it is absent or damaged, or its file of labels is.
    """
    self.path = pathlib.Path(path)
    self._members, self._zip = {}, None
    if not self.path.is_dir():
      with arrays.open_file(path), arrays.naming(f'{path}'):
        self._zip = zipfile.ZipFile(path)
        members = self._zip.infolist()
      self._members = {x.filename: x for x in members}
      if len(self._members) < len(members):
        raise UserError(f'{path} holds two files of one name; make it again')
    self.listed = None
    if labels:
      self.listed = label_files.read(labels)
    elif self._has(_LIST):
      self.listed = label_files.parse_json(self._read(_LIST), self._where(_LIST))

  def class_names(self) -> list[str]:
    """The folders directly inside that hold PNG files and are not hidden, sorted."""
    return sorted(set(name.split('/')[0] for name in self._in_folders()))

  def source(self, classes: dict[str, int]) -> import_source.Source:
    """The samples.

    Args:
      classes: the number of each class, of `number_classes`, where none are listed.

    Returns:
      The samples in the order of the list, or class by class in sorted order of names.
    """
    named = self.listed
    if named is None:
      names = sorted(self._in_folders(), key=lambda name: name.split('/'))
      named = [(name, classes[name.split('/')[0]]) for name in names]
    num_classes = 1 + max(label for _, label in named)
    return import_source.Source(len(named), num_classes, lambda: self._batches(named))

  def _in_folders(self) -> Iterator[str]:
    """Names of the images in folders directly inside."""
    if self._zip:
      parts = (name.split('/') for name in self._members)
      pairs = (x for x in parts if len(x) == 2)
    else:
      folders = (x for x in os.scandir(self.path) if x.is_dir())
      pairs = ((x.name, y.name) for x in folders for y in _scan(x))
    for folder, file in pairs:
      hidden = file.startswith('.') or folder.startswith('.')
      if folder and file.lower().endswith('.png') and not hidden:
        yield f'{folder}/{file}'

  def _has(self, name: str) -> bool:
    return name in self._members if self._zip else os.path.lexists(self.path / name)

  def _read(self, name: str) -> bytes:
    """The content of a file in the folder or `.zip`."""
    where = self._where(name)
    with arrays.naming(where):
      if self._zip:
        if name not in self._members:
          raise FileNotFoundError
        member = self._members[name]
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
          raise ValueError(f'compressed by method {member.compress_type}')
        opened = self._zip.open(member)
      else:
        inside, real = map(os.path.realpath, (self.path, self.path / name))
        if os.path.commonpath([inside, real]) != inside:
          raise UserError(f'{where} leads out of {self.path}: copy the file into it')
        opened = arrays.open_file(real)
      with opened as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
      raise UserError(
        f'{where} has more than {_MAX_BYTES >> 20} MiB, too many for an image that '
        'classifiers are trained on: make it smaller'
      )
    return content

  def _where(self, name: str) -> str:
    """What a file is called in messages."""
    return arrays.printable(f'{self.path / name}')

  def _batches(self, named: Iterable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (images, labels) of (name, label) pairs, decoded by threads."""
    named = iter(named)
    first, label = next(named)
    image = decode(self._read(first), self._where(first))
    yield image[None], np.array([label])
    read = lambda name: decode(self._read(name), self._where(name), image.shape)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      size = next(import_source.chunks(2**30, image.shape))
      while chunk := list(itertools.islice(named, min(size, 1_024))):
        names, labels = zip(*chunk, strict=True)
        yield np.stack(list(pool.map(read, names))), np.array(labels)


def number_classes(found: Sequence[PngFiles], has_gaps: bool = False) -> dict[str, int]:
  """Numbers the classes of folders of PNG files, alike for all of them.

  Args:
    found: the files, none of them listed. Each of their folders is a class: of the
      number that is its name where all names are numbers, else of its place among the
      names of all, sorted.
    has_gaps: whether numbers may lack some of 0, 1, …, or be written as `00000`.

  Returns:
    The number of each name, in sorted order of names.

  Raises:
    UserError: there are no classes, some names are numbers and some not, or numbers
      are as those of folders that hold parts of a set.
  """
  names = set()
  for files in found:
    if not (inside := files.class_names()):
      raise UserError(
        f'{files.path} holds no folders with PNG files: give a folder (or .zip) with '
        'one for each class, or --labels=FILE'
      )
    names.update(inside)
  names = sorted(names)
  where = ', '.join(str(files.path) for files in found)
  numbered = [name for name in names if name.isascii() and name.isdecimal()]
  if not numbered:
    return {name: number for number, name in enumerate(names)}
  if words := [name for name in names if name not in numbered]:
    raise UserError(
      f'{where}: the folders {numbered[0]} and {arrays.printable(words[0])} are '
      'classes by number and by name; rename them, or give --labels=FILE'
    )
  classes = {name: int(name) for name in names}
  numbers = set(classes.values())
  import_source.check_labels(f'{where}, by the names of its folders,', 0, max(numbers))
  if has_gaps:
    return classes
  if len(numbers) <= max(numbers):
    least = next(k for k in itertools.count() if k not in numbers)
    raise UserError(
      f'{where}: {len(numbers)} folders have numbers up to {max(numbers)}, none '
      f'{least}; if they are classes, give --num_classes, if parts of a set, '
      '--labels=FILE'
    )
  if parts := [name for name in names if len(name) > 4 and name[0] == '0']:
    raise UserError(
      f'{where}: the folder {parts[0]} is named as a part of a set is by EDM and '
      'StyleGAN; if it is a class, give --num_classes, else --labels=FILE'
    )
  return classes


def decode(
  content: bytes, name: str, shape: tuple[int, ...] | None = None
) -> np.ndarray:
  """Decodes a PNG file, and nothing that only has its name.

  Args:
    content: of the file.
    name: of the file, for messages.
    shape: that the image must have; None for any.

  Returns:
    The image, uint8 [H, W, C], C = 1 for gray and 3 for colours.

  Raises:
    UserError: it is no PNG file, damaged, too large, not of 8 bits or of another shape.
  """
  try:
    with PIL.Image.open(io.BytesIO(content), formats=['PNG']) as image:
      if image.mode not in _MODES:
        raise UserError(
          f'{name} has pixels of mode {image.mode}: save it as 8-bit gray or RGB'
        )
      found = (image.height, image.width, _MODES[image.mode])
      if not shards.is_image_shape(found):
        raise UserError(
          f'{name} is {list(found)}, more than {shards.MAX_IMAGE_BYTES >> 20} MiB: '
          'make it smaller'
        )
      if found != (shape or found):
        raise UserError(
          f'{name} is {list(found)}, the images before it are {list(shape)}: all '
          'images must be of one shape'
        )
      pixels = np.asarray(image.convert('RGB') if image.mode == 'P' else image)
  except UserError:
    raise
  except PIL.UnidentifiedImageError:
    raise UserError(f'{name} is no readable PNG: make it again') from None
  except Exception as error:  # Whatever Pillow may raise of damaged chunks.
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:100]
    raise UserError(f'{name} is no readable PNG ({reason}): make it again') from None
  return pixels.reshape(found)


def _scan(folder: os.DirEntry) -> Iterator[os.DirEntry]:
  """The entries of a folder."""
  with os.scandir(folder) as entries:
    yield from entries
