"""The files of a sample set: their names, checksums and `.npy` headers."""

import math
import os
import pathlib
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, json_files

METADATA = 'metadata.json'
FORMAT_VERSION = 1
PROVENANCE = ('generator', 'seed', 'labeller', 'selection')
# What a set may hold. A label beyond is a number that was not meant as one; an image
# beyond is not one of those that classifiers are trained on.
MAX_CLASSES = 2**16
MAX_IMAGE_BYTES = 2**26
HEADER = 128  # bytes before the data of an .npy file
LABEL = 4  # bytes


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


def shard_names(
  n: int, kinds: Iterable[str] = ('images', 'labels')
) -> list[tuple[str, ...]]:
  """Returns the file names of n shards, one of each kind."""
  suffixes = [f'{k:05d}-of-{n:05d}.npy' for k in range(n)]
  return [tuple(f'{kind}-{suffix}' for kind in kinds) for suffix in suffixes]


def kinds(metadata: dict) -> tuple[str, ...]:
  """Returns the kinds of files of a set."""
  confidence = ('confidence',) if metadata.get('confidence') else ()
  return ('images', 'labels', *confidence)


def overlapping(per_shard: list[int], images: range) -> range:
  """The numbers of the shards that hold any of these images, at least one."""
  ends = np.cumsum(per_shard)
  first, last = np.searchsorted(ends, (images.start, images.stop - 1), side='right')
  return range(int(first), int(last) + 1)


def label_names(metadata: dict) -> list[str]:
  """Names of the files of labels, which whoever reads a set needs all of."""
  names = shard_names(len(metadata['counts']['per_shard']), ('labels',))
  return [name for (name,) in names]


def image_names(metadata: dict, images: range) -> list[str]:
  """Names of the files that hold these images.

  With all of a set go the labels' confidences, which are asked of no part of it.
  """
  per_shard = metadata['counts']['per_shard']
  is_whole = len(images) == sum(per_shard)
  wanted = ('images', *(kinds(metadata)[2:] if is_whole else ()))
  rows = shard_names(len(per_shard), wanted)
  return [name for shard in overlapping(per_shard, images) for name in rows[shard]]


def write_header(file: IO[bytes], shape: Iterable[int]) -> None:
  """Writes the .npy header of images uint8 of `shape` to an open file."""
  header = {'descr': '|u1', 'fortran_order': False, 'shape': tuple(shape)}
  np.lib.format.write_array_header_1_0(file, header)


def check_array(path: pathlib.Path, shape: Iterable[int], dtype: npt.DTypeLike) -> int:
  """Checks header and size of a .npy file; returns the offset of its data."""
  if not path.is_file():
    raise UserError(f'{path} is missing; fetch or make the sample set again')
  with arrays.open_npy(path) as stream:
    if stream.is_fortran:
      raise UserError(f'{path} is in Fortran order; save it in C order')
    if stream.shape != tuple(shape) or stream.dtype != dtype:
      raise UserError(
        f'{path} holds {stream.dtype} {list(stream.shape)}; its metadata.json says '
        f'{np.dtype(dtype)} {list(shape)}; fetch or make the set again'
      )
    return stream.offset


def read_metadata(path: pathlib.Path | epath.Path) -> dict:
  """Reads and checks the metadata of a set, on local disk or in a bucket.

  Args:
    path: the folder, as pathlib's or epath's.

  Returns:
    The content of metadata.json, with None for what it does not say of how the set was
    made.

  Raises:
    UserError: there is no whole set, or its metadata are damaged.
  """
  return parse_metadata(metadata_bytes(path), f'{path / METADATA}')


def metadata_bytes(path: pathlib.Path | epath.Path) -> bytes:
  """The content of a set's metadata.json; UserError if there is no whole set."""
  file = path / METADATA
  if not path.exists() and partial(path).exists():
    raise UserError(
      f'{path} is not complete: it is being written, or what wrote it was killed; '
      'then run the same command again, which starts over'
    )
  if not file.is_file():
    raise UserError(
      f'{path} is no sample set: it has no {METADATA}; make one by '
      '`jaxrobust generate` or `jaxrobust data import`'
    )
  with file.open('rb') as opened:
    return opened.read(json_files.MAX_BYTES + 1)


def parse_metadata(content: bytes, name: str) -> dict:
  """Checks the content of a metadata.json, called `name` in messages."""
  metadata = json_files.parse(content, name)
  version = metadata.get('format_version')
  if type(version) is int and version != FORMAT_VERSION:
    raise UserError(
      f'{name} has format_version {version}; this program reads {FORMAT_VERSION}: '
      'update it or make the set again'
    )
  for field, is_right in _FIELDS.items():
    value = metadata
    for key in field.split('.'):
      value = value.get(key) if isinstance(value, dict) else None
    if not is_right(value):
      raise UserError(
        f'{name} is damaged: {field} is {str(value)[:40]}; fetch or make the set again'
      )
  counts, num_classes = metadata['counts'], metadata['num_classes']
  rows = shard_names(len(counts['per_shard']), kinds(metadata))
  if (
    len(counts['per_class']) != num_classes
    or not sum(counts['per_class']) == sum(counts['per_shard']) == counts['total']
    or set(metadata['sha256']) != {file for row in rows for file in row}
  ):
    raise UserError(
      f'{name} contradicts itself (classes, counts or file names); fetch or make the '
      'set again'
    )
  return {**dict.fromkeys(PROVENANCE), **metadata}


def check_num_classes(num_classes: int) -> None:
  """Refuses a number of classes that cannot be meant."""
  if not 1 <= num_classes <= MAX_CLASSES:
    raise UserError(
      f'num_classes = {num_classes}: give the number of classes, from 1 to '
      f'{MAX_CLASSES}'
    )


def is_image_shape(shape: Any) -> bool:
  """Whether images may be [H, W, C]."""
  sides = list(shape)
  return (
    len(sides) == 3 and _are_counts(1)(sides) and math.prod(sides) <= MAX_IMAGE_BYTES
  )


def _are_counts(least: int):
  """A check for lists of integers from `least`, which a file can count."""
  return lambda x: (
    isinstance(x, list) and all(type(n) is int and least <= n <= 2**50 for n in x)
  )


_FIELDS = {
  'format_version': lambda x: type(x) is int,
  'image_shape': lambda x: isinstance(x, list) and is_image_shape(x),
  'num_classes': lambda x: type(x) is int and 0 < x <= MAX_CLASSES,
  'confidence': lambda x: x in (None, 'float16', 'float32'),
  'counts': lambda x: isinstance(x, dict),
  'counts.total': lambda x: type(x) is int,
  'counts.per_class': _are_counts(0),
  'counts.per_shard': lambda x: _are_counts(1)(x) and x,
  'sha256': lambda x: isinstance(x, dict) and all(type(y) is str for y in x.values()),
}
