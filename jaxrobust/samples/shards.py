"""The files of a sample set: their names, checksums and `.npy` headers."""

import hashlib
import json
import os
import pathlib

import numpy as np
from etils import epath

from jaxrobust.errors import UserError

METADATA = 'metadata.json'
FORMAT_VERSION = 1


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path leads into a bucket."""
  return '://' in str(path)


def is_whole(path: str | os.PathLike) -> bool:
  """Whether there is a set, in a bucket or on disk, that is complete."""
  return (epath.Path(path) / METADATA).exists()


def local_path(path: str | os.PathLike) -> pathlib.Path:
  """Returns the path as pathlib's; raises UserError where it is remote."""
  if is_remote(path):
    raise UserError(
      f'{path} is remote, and is read or written piece by piece: copy it, as by '
      f'gcloud storage cp -r {path} /local/folder, or choose a folder on this machine'
    )
  return pathlib.Path(path)


def partial(path: pathlib.Path) -> pathlib.Path:
  """Returns where a set is written until it is complete."""
  return path.with_name(f'.{path.name}.partial')


def shard_names(n, kinds=('images', 'labels')):
  """Returns the file names of n shards, one of each kind."""
  suffixes = [f'{k:05d}-of-{n:05d}.npy' for k in range(n)]
  return [tuple(f'{kind}-{suffix}' for kind in kinds) for suffix in suffixes]


def kinds(metadata):
  """Returns the kinds of files of a set."""
  confidence = ('confidence',) if metadata.get('confidence') else ()
  return ('images', 'labels', *confidence)


def sha256(path):
  """Returns the sha256 of a file in hex."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def read_header(file, name):
  """Reads the header of a .npy file.

  Args:
    file: The file, open at its start; it is left at the data.
    name: How errors name it.

  Returns:
    (shape, dtype) of the array.

  Raises:
    UserError: It is in Fortran order or of a version that numpy.save rarely writes.
    ValueError: It is no .npy file.
  """
  version = np.lib.format.read_magic(file)
  if version != (1, 0):
    raise UserError(
      f'{name} is .npy version {version}; version (1, 0) is read: '
      'save it again with numpy.save'
    )
  shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
  if fortran and len(shape) > 1:
    raise UserError(f'{name} is in Fortran order; save it in C order')
  return shape, dtype


def write_header(file, shape):
  """Writes the .npy header of images uint8 of `shape` to an open file."""
  header = {'descr': '|u1', 'fortran_order': False, 'shape': tuple(shape)}
  np.lib.format.write_array_header_1_0(file, header)


def check_array(path, shape, dtype):
  """Checks header and size of a .npy file; returns the offset of its data."""
  if not path.is_file():
    raise UserError(f'{path} is missing; fetch or make the sample set again')
  with open(path, 'rb') as file:
    try:
      found_shape, found_dtype = read_header(file, path)
    except UserError:
      raise
    except ValueError as error:
      raise UserError(f'{path} is no .npy file ({error}); fetch it again') from None
    offset = file.tell()
  if found_shape != tuple(shape) or found_dtype != dtype:
    raise UserError(
      f'{path} holds {found_dtype} {list(found_shape)}; its metadata.json says '
      f'{np.dtype(dtype)} {list(shape)}; fetch or make the set again'
    )
  size = offset + int(np.prod(shape)) * np.dtype(dtype).itemsize
  if path.stat().st_size != size:
    raise UserError(
      f'{path} has {path.stat().st_size} bytes, {size} are right '
      '(truncated or appended to); fetch or make it again'
    )
  return offset


def read_metadata(path) -> dict:
  """Reads and checks the metadata of a set, on local disk or in a bucket.

  Args:
    path: The folder, as pathlib's or epath's.

  Returns:
    The content of metadata.json.

  Raises:
    UserError: There is no whole set, or its metadata are damaged.
  """
  file = path / METADATA
  if not path.exists() and partial(path).exists():
    raise UserError(
      f'{path} is not complete: it is being written, or what wrote it was killed; '
      'then run the same command again, which starts over'
    )
  if not file.is_file():
    raise UserError(
      f'{path} is no sample set: it has no metadata.json; make one by '
      '`python -m jaxrobust.generate` or `python -m jaxrobust.data import`'
    )
  try:
    metadata = json.loads(file.read_text())
    if metadata['format_version'] != FORMAT_VERSION:
      raise UserError(
        f'{file} has format_version {metadata["format_version"]}; this program '
        f'reads {FORMAT_VERSION}: update it or make the set again'
      )
    counts, num_classes = metadata['counts'], metadata['num_classes']
    sizes = counts['per_shard']
    rows = shard_names(len(sizes), kinds(metadata))
    names = {name for row in rows for name in row}
    consistent = (
      len(metadata['image_shape']) == 3
      and min(len(sizes), *sizes, *metadata['image_shape'], num_classes) > 0
      and len(counts['per_class']) == num_classes
      and sum(counts['per_class']) == sum(sizes) == counts['total']
      and set(metadata['sha256']) == names
      and metadata.get('confidence') in (None, 'float16', 'float32')
    )
  except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(
      f'{file} is damaged ({type(error).__name__}: {error}); '
      'fetch or make the set again'
    ) from None
  if not consistent:
    raise UserError(
      f'{file} contradicts itself (shapes, classes, counts or file '
      'names); fetch or make the set again'
    )
  return metadata
