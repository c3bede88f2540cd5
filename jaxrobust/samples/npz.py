"""Samples from and to `.npz` files.

The authors of the paper release generated images as one file with the arrays
`image` and `label`; later work keeps to it, in several files where it has tens of
millions.
"""

import contextlib
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.samples import import_source, sample_sets, shards, writing

_CHUNK = 2**13  # images held in memory while a file is copied
_LABELS_CHUNK = 2**20


def open_npz(path: str | os.PathLike) -> import_source.Source:
  """Opens an `.npz` file; its images and labels are streamed, never held.

  Args:
    path: File with `image` uint8 [n, H, W, C], C = 1 or 3, and `label` int [n],
      stored or compressed, in any order of classes; or under another of the names in
      `sources`.

  Returns:
    The samples.

  Raises:
    UserError: The file is absent, damaged or holds something else.
  """
  with _archive(path) as archive:
    found = {name.removesuffix('.npy') for name in archive.namelist()}
    keys = import_source.find_keys(path, found)
    with archive.open(f'{keys[0]}.npy') as member:
      shape, dtype = shards.read_header(member, f'{keys[0]} in {path}')
    with archive.open(f'{keys[1]}.npy') as member:
      label_shape, label_dtype = shards.read_header(member, f'{keys[1]} in {path}')
      import_source.check_arrays(path, shape, dtype, label_shape, label_dtype)
      ends = []
      for n in _chunks(shape[0], _LABELS_CHUNK):
        labels = _read(member, n, (), label_dtype, path)
        ends += [int(labels.min()), int(labels.max())]
  import_source.check_labels(path, min(ends))
  return import_source.Source(shape[0], max(ends) + 1, lambda: _batches(path, *keys))


def export_npz(sample_set: sample_sets.SampleSet, npz_path: str | os.PathLike) -> None:
  """Writes a set as one `.npz` with `image` uint8 [n, H, W, C], `label` int64 [n].

  Args:
    sample_set: The set; it is streamed.
    npz_path: The file to make.

  Raises:
    UserError: The file exists.
  """
  npz_path = shards.local_path(npz_path)
  if npz_path.exists():
    raise UserError(f'{npz_path} exists; remove it or choose another name')
  writing.make_parent(npz_path)
  temporary = npz_path.with_name(f'.{npz_path.name}.{uuid.uuid4().hex}')
  try:
    with zipfile.ZipFile(temporary, 'w') as archive:
      with archive.open('image.npy', 'w', force_zip64=True) as member:
        shards.write_header(member, (len(sample_set), *sample_set.image_shape))
        for start in range(0, len(sample_set), _CHUNK):
          stop = min(start + _CHUNK, len(sample_set))
          member.write(sample_set.gather(np.arange(start, stop)).data)
      with archive.open('label.npy', 'w', force_zip64=True) as member:
        labels = sample_set.gather_labels(slice(None)).astype(np.int64)
        np.lib.format.write_array(member, labels)
    temporary.rename(npz_path)
  finally:
    temporary.unlink(missing_ok=True)


def _batches(path, image_key, label_key) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (images, labels), both members read side by side."""
  with (
    _archive(path) as archive,
    archive.open(f'{image_key}.npy') as images,
    archive.open(f'{label_key}.npy') as labels,
  ):
    shape, dtype = shards.read_header(images, f'{image_key} in {path}')
    _, label_dtype = shards.read_header(labels, f'{label_key} in {path}')
    for n in _chunks(shape[0], _CHUNK):
      yield (
        _read(images, n, shape[1:], dtype, path),
        _read(labels, n, (), label_dtype, path),
      )


def _chunks(count, size):
  """Yields the lengths of chunks of at most `size` that make up `count`."""
  for start in range(0, count, size):
    yield min(size, count - start)


def _read(member, n, shape, dtype, path):
  """Reads the next n items of `shape` from an open member."""
  size = n * int(np.prod(shape)) * dtype.itemsize
  content = member.read(size)
  if len(content) != size:
    raise UserError(f'{member.name} in {path} is truncated; fetch the file again')
  return np.frombuffer(content, dtype).reshape(n, *shape)


@contextlib.contextmanager
def _archive(path):
  """Opens a zip file; what is wrong with it becomes a UserError."""
  try:
    with zipfile.ZipFile(path) as archive:
      yield archive
  except FileNotFoundError:
    raise UserError(f'{path} does not exist; give the path of the .npz') from None
  except OSError as error:
    raise UserError(
      f'{path} cannot be read ({error.strerror or error}); give access, or another file'
    ) from None
  except UserError:
    raise
  except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
    raise UserError(
      f'{path} is damaged or no .npz file ({error}); fetch it again'
    ) from None
