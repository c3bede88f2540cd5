"""CIFAR's archives for Python, as the binary ones that tensorflow-datasets reads.

Both hold the same images in the same order of files, so what is prepared from either is
the same.
"""

import io
import pathlib
import tarfile
from typing import NamedTuple

import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.files import pickles
from jaxrobust.runs import checksums

_PIXELS = 32 * 32 * 3
_MAX_BYTES = 2**28  # of a file in an archive; the largest has 155 MB


class Archive(NamedTuple):
  """An archive for Python, and what its files are called in the binary one.

  Attributes:
    file: its official name.
    sha256: of the official one.
    folders: in it and in the binary one.
    parts: files of images in both.
    labels: keys of the labels that stand before an image, in their order.
    names: of the file with names of classes: key → file of the binary one.
    meta: the file that has these keys.
  """

  file: str
  sha256: str
  folders: tuple[str, str]
  parts: dict[str, str]
  labels: tuple[str, ...]
  names: dict[str, str]
  meta: str


ARCHIVES = {
  'cifar10': Archive(
    'cifar-10-python.tar.gz',
    '6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce',
    ('cifar-10-batches-py', 'cifar-10-batches-bin'),
    {x: f'{x}.bin' for x in (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch')},
    ('labels',),
    {'label_names': 'batches.meta.txt'},
    'batches.meta',
  ),
  'cifar100': Archive(
    'cifar-100-python.tar.gz',
    '85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7',
    ('cifar-100-python', 'cifar-100-binary'),
    {'train': 'train.bin', 'test': 'test.bin'},
    ('coarse_labels', 'fine_labels'),
    {
      'coarse_label_names': 'coarse_label_names.txt',
      'fine_label_names': 'fine_label_names.txt',
    },
    'meta',
  ),
}


def write_binary(name: str, path: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes the files of the binary archive, as if it had been unpacked.

  Args:
    name: a key of `ARCHIVES`.
    path: of the archive for Python.
    folder: where its folder is made.

  Raises:
    UserError: if it is not the official archive.
  """
  known = ARCHIVES[name]
  if checksums.sha256(path) != known.sha256:
    raise UserError(f'{path} is not the official archive of {name}; fetch it again')
  target = folder / known.folders[1]
  target.mkdir()
  with tarfile.open(path) as archive:

    def read(member: str) -> dict:
      return _unpickle(archive, f'{known.folders[0]}/{member}', path)

    try:
      for member, file in known.parts.items():
        (target / file).write_bytes(_examples(read(member), known.labels))
      meta = read(known.meta)
      for key, file in known.names.items():
        (target / file).write_text('\n'.join(map(_text, meta[key])) + '\n')
    except (KeyError, ValueError, TypeError, AttributeError, tarfile.TarError) as e:
      raise UserError(f'{path} does not hold what {name} does: {e!r:.100}') from None


def _unpickle(archive: tarfile.TarFile, member: str, path: pathlib.Path) -> dict:
  """A dictionary of a file in the archive, with text for keys."""
  found = archive.getmember(member)
  if not found.isfile() or found.size > _MAX_BYTES:
    raise ValueError(f'{member} in {path} has {found.size} bytes')
  with archive.extractfile(found) as file:
    content = pickles.ArrayUnpickler(io.BytesIO(file.read())).load()
  return {_text(key): value for key, value in content.items()}


def _text(value) -> str:
  """Text, which Python 2 kept as bytes."""
  return value.decode('latin1') if isinstance(value, bytes) else value


def _examples(batch: dict, labels: tuple[str, ...]) -> bytes:
  """Bytes of examples: of each its labels and its red, green and blue plane."""
  images = np.asarray(batch['data'])
  if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _PIXELS:
    raise ValueError(f'data is {images.dtype} {list(images.shape)}')
  columns = [np.asarray(batch[key]).astype(np.uint8) for key in labels]
  return np.column_stack([*columns, images]).tobytes()
