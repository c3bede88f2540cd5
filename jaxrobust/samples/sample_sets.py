"""Sample sets: folders of generated images with their pseudo-labels.

A set holds `images-00000-of-00016.npy` (uint8 [n, H, W, C]), a
`labels-….npy` (int32 [n]) for each, and `metadata.json`: what made the images
(generator, seed, labeller, selection), image_shape, num_classes, counts (total,
per_class, per_shard) and the sha256 of each shard file. Optional: how sure the
labeller is of each label, `confidence-….npy` (float16 or float32 [n], which
metadata.json then names as `confidence`). Near 1 float16 has steps of 0.0005, so that
many confident samples tie: float32 ranks them.

  jaxrobust data {import,export,info,verify,select} --help
"""

import concurrent.futures
import io
import json
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, json_files
from jaxrobust.samples import random_reads, shards, streams, verification, writing

SHARD_SIZE = 2**18  # 0.8 GB of 32x32x3; 100M images stay under 1,024 open files.
RESERVED = (
  'format_version',
  'image_shape',
  'num_classes',
  'confidence',
  'counts',
  'sha256',
)


class SampleSet:
  """A sample set on local disk, read image by image, never loaded whole.

  Attributes:
    path: the folder.
    metadata: the content of `metadata.json`.
    image_shape: (H, W, C).
    num_classes: number of classes K; labels lie in [0, K).
    images: numbers of the images that are here: all, or those of some streams. The
      labels of all are.
  """

  def __init__(
    self,
    path: pathlib.Path,
    metadata: dict,
    images: range,
    labels: np.ndarray,
    coming: concurrent.futures.Future | None,
  ):
    self.path = path
    self.metadata = metadata
    self.image_shape = tuple(metadata['image_shape'])
    self.num_classes = metadata['num_classes']
    self.images = images
    self._labels = labels
    per_shard = metadata['counts']['per_shard']
    self._starts = np.cumsum([0, *per_shard[:-1]])
    self._shards = shards.overlapping(per_shard, images)
    self._coming = coming
    self._files, self._offsets = {}, np.zeros(len(per_shard), np.int64)
    if coming is None:
      self._open_images()

  @classmethod
  def open(
    cls,
    path: str | os.PathLike,
    part: streams.Streams = streams.ALL,
    in_background: bool = False,
  ) -> 'SampleSet':
    """Opens a set and checks all but the bytes of the images (see `verify`).

    Args:
      path: a sample set folder, on local disk or in a bucket: see `bucket.fetch`.
      part: the streams whose images will be read; others need not be there, and are not
        fetched from a bucket.
      in_background: whether to return while images of a set in a bucket are fetched;
        `wait` then waits for them.

    Returns:
      The set.

    Raises:
      UserError: the folder is absent or no sample set, or a file of it
        is missing, superfluous, truncated, of the wrong shape or type, or holds
        labels outside the classes or other than the metadata counts; or the streams are
        not alike (see `streams.check_classes`).
    """
    coming = None
    if shards.is_remote(path):
      path, coming = _bucket().fetch(path, part)
    path = pathlib.Path(path)
    metadata = shards.read_metadata(path)
    names = shards.shard_names(
      len(metadata['counts']['per_shard']), shards.kinds(metadata)
    )
    expected = {name for pair in names for name in pair}
    for file in sorted(path.glob('*.npy')):
      if file.name not in expected:
        raise UserError(
          f'{file} does not belong to this sample set, whose metadata names '
          f'{len(names)} shards; move it away or make the set again'
        )
    labels = _read_labels(path, metadata)
    if part.count > 1:
      streams.check_classes(path, labels, metadata['num_classes'], part.count)
    found = cls(path, metadata, part.images(len(labels)), labels, coming)
    if not in_background:
      found.wait()
    return found

  def wait(self) -> None:
    """Waits until all images are here that a bucket still gives.

    Raises:
      UserError: they cannot be had, or are corrupt.
    """
    if self._coming is not None:
      self._coming.result()
      self._coming = None
      self._open_images()

  def _open_images(self):
    """Checks the files of the images and opens them."""
    per_shard = self.metadata['counts']['per_shard']
    names = shards.shard_names(len(per_shard), shards.kinds(self.metadata))
    for shard in self._shards:
      image_name, _, *rest = names[shard]
      count, file = per_shard[shard], self.path / image_name
      shape = (count, *self.image_shape)
      self._offsets[shard] = shards.check_array(file, shape, np.uint8)
      # Which labels are sure is asked of a whole set only.
      for name in rest if len(self.images) == len(self) else ():
        dtype = np.dtype(self.metadata['confidence'])
        shards.check_array(self.path / name, (count,), dtype)
      try:
        self._files[shard] = io.FileIO(file)
      except OSError as error:
        raise UserError(
          f'{file} cannot be opened ({error.strerror}); with too many '
          f'open files ({len(self._shards)} shards) raise the limit by `ulimit -n`'
        ) from None
      random_reads.expect(self._files[shard].fileno())

  def __len__(self) -> int:
    return len(self._labels)

  def gather(
    self,
    indices: np.ndarray,
    out: np.ndarray | None = None,
    rows: np.ndarray | None = None,
  ) -> np.ndarray:
    """Reads images by index, in any order; other threads run meanwhile.

    Args:
      indices: which images, int [n] in [0, len(self)).
      out: where to put them, contiguous uint8 [m, H, W, C]; a new array by default.
      rows: where in `out`, int [n]; the first n rows by default.

    Returns:
      out.

    Raises:
      IndexError: an index is outside the images that are here.
      UserError: A file has shrunk since the set was opened.
    """
    self.wait()
    indices = np.asarray(indices, np.int64)
    if out is None:
      out = np.empty((len(indices), *self.image_shape), np.uint8)
    if not len(indices):
      return out
    if indices.min() < self.images.start or indices.max() >= self.images.stop:
      raise IndexError(
        f'indices {indices.min()}..{indices.max()} in a set with the images '
        f'{self.images.start}..{self.images.stop - 1}'
      )
    rows = np.arange(len(indices)) if rows is None else rows
    size, flat = math.prod(self.image_shape), memoryview(out.reshape(-1))
    shard_of = np.searchsorted(self._starts, indices, side='right') - 1
    offsets = self._offsets[shard_of] + (indices - self._starts[shard_of]) * size
    files = {shard: file.fileno() for shard, file in self._files.items()}
    columns = (shard_of.tolist(), (rows * size).tolist(), offsets.tolist())
    ended = random_reads.read(
      random_reads.Read(files[shard], flat[start : start + size], offset)
      for shard, start, offset in zip(*columns, strict=True)
    )
    if ended is not None:
      (file,) = (x for x in self._files.values() if x.fileno() == ended)
      raise UserError(
        f'{file.name} has been truncated while in use; restore the file and start again'
      )
    return out

  def gather_labels(self, indices: np.ndarray | slice) -> np.ndarray:
    """Returns the labels int32 [n] of the images at `indices` int [n]."""
    return self._labels[indices].astype(np.int32)

  def confidence(self) -> np.ndarray | None:
    """Reads how sure the labeller is of each label, float [n]; None if unknown."""
    dtype = self.metadata.get('confidence')
    if not dtype:
      return None
    names = shards.shard_names(len(self._starts), ('confidence',))
    parts = [arrays.read_npy(self.path / name, 'f', 1) for (name,) in names]
    found = np.concatenate(parts)
    if not ((found >= 0) & (found <= 1)).all():
      raise UserError(
        f'{self.path} has confidences outside [0, 1]; fetch or make the set again'
      )
    return found

  @property
  def confidence_bytes(self) -> int:
    """Bytes of a confidence; 0 for a set without them."""
    dtype = self.metadata.get('confidence')
    return np.dtype(dtype).itemsize if dtype else 0

  def is_verified(self) -> bool:
    """Whether `verify` has found the files as they were written, and as they are."""
    return not verification.pending(self.path, self._names())

  def checksum(self) -> str:
    """A checksum of the metadata, which hold those of all files: see `Split`."""
    return f'{zlib.crc32((self.path / shards.METADATA).read_bytes()):08x}'

  def _names(self):
    """The names of the files that are here; a bucket's are compared on the way."""
    here = self._coming is None
    images = shards.image_names(self.metadata, self.images) if here else []
    return [*shards.label_names(self.metadata), *images]

  def verify(
    self, progress: Callable[[Iterable], Iterable] = iter, anew: bool = False
  ) -> None:
    """Compares the sha256 of each file that is here with the metadata, once.

    A finished verification is remembered in the folder, where it is writable,
    and holds until a file changes size or time of modification.

    Args:
      progress: wraps the list of files, as `tqdm.tqdm` does.
      anew: whether to read files that were verified before: bits that a disk has lost
        change neither.

    Raises:
      UserError: files are corrupt; the message names each of them.
    """
    names = self._names()
    if not anew:
      names = verification.pending(self.path, names)
    if names:
      verification.compare(self.path, names, self.metadata['sha256'], progress)


def _read_labels(path, metadata):
  """The labels of a set [n], a byte or two each; UserError where they contradict it."""
  counts, num_classes = metadata['counts'], metadata['num_classes']
  narrow = np.min_scalar_type(num_classes - 1)  # 100 MB for 100M
  labels, per_class = [], np.zeros(num_classes, int)
  names = shards.label_names(metadata)
  for name, n in zip(names, counts['per_shard'], strict=True):
    offset = shards.check_array(path / name, (n,), np.int32)
    shard = np.fromfile(path / name, np.int32, offset=offset)
    if shard.min() < 0 or shard.max() >= num_classes:
      raise UserError(
        f'{path / name} holds labels {shard.min()}..{shard.max()}; '
        f'{num_classes} classes allow 0..{num_classes - 1}; label the set again'
      )
    per_class += np.bincount(shard, minlength=num_classes)
    labels.append(shard.astype(narrow))
  if wrong := np.flatnonzero(per_class != counts['per_class']).tolist():
    raise UserError(
      f'{path} is mislabelled: its label files hold {per_class[wrong[0]]} images of '
      f'class {wrong[0]}, its metadata.json says {counts["per_class"][wrong[0]]}; '
      'fetch or make the set again'
    )
  return np.concatenate(labels)


def write(
  path: str | os.PathLike,
  batches: Iterable[tuple[np.ndarray, ...]],
  *,
  metadata: dict[str, Any],
  num_classes: int,
  shard_size: int = SHARD_SIZE,
) -> SampleSet:
  """Writes a sample set as its images arrive; the folder appears when complete.

  A process that is killed leaves a hidden folder, `.NAME.partial`, which no reader
  takes for a set and the next `write` of the same path removes.

  Args:
    path: the folder to make, on local disk or in a bucket; it must not exist.
    batches: pairs of images uint8 [n, H, W, C] and labels int [n] in
      [0, num_classes); n may vary. For arrays pass `[(images, labels)]`. Or triples,
      with the labels' confidences in [0, 1], float16 or float32 [n].
    metadata: what made the images: `generator`, `seed`, `labeller`, `selection`
      (null where absent), and any other field as JSON.
    num_classes: number of classes K.
    shard_size: images in a file, at least 1; the last file takes the rest.

  Returns:
    The set, opened.

  Raises:
    UserError: the folder exists or is being written by another process, or the
      images, labels or metadata are not as above.
  """
  if shards.is_remote(path):
    draft = _bucket().draft(path)
    write(
      draft, batches, metadata=metadata, num_classes=num_classes, shard_size=shard_size
    )
    _bucket().store(draft, path)
    return SampleSet.open(path)
  path = pathlib.Path(path)
  if path.exists():
    raise UserError(
      f'{path} exists; a sample set is never overwritten: remove it '
      'or choose another folder'
    )
  if shard_size < 1:
    raise UserError(f'shard_size = {shard_size}; it must be at least 1')
  if reserved := sorted(set(metadata) & set(RESERVED)):
    raise UserError(f'metadata fields {reserved} are computed; leave them out')
  shards.check_num_classes(num_classes)
  # What could not be read again is noticed before hours of writing.
  json_files.parse(json.dumps(metadata), f'metadata of {path}')
  writing.make_parent(path)
  folder = shards.partial(path)
  lock = writing.claim(folder)
  try:
    per_class, per_shard, image_shape, confidence, digests = writing.write_shards(
      folder, batches, num_classes, shard_size
    )
    extra = {'confidence': confidence.name} if confidence is not None else {}
    kinds = shards.kinds(extra)
    sha256 = {}
    for shard, names in enumerate(shards.shard_names(len(per_shard), kinds)):
      for kind, name in zip(kinds, names, strict=True):
        (folder / f'{kind}-{shard}').rename(folder / name)
        sha256[name] = digests[f'{kind}-{shard}']
    content = {
      'format_version': shards.FORMAT_VERSION,
      **dict.fromkeys(shards.PROVENANCE),
      **metadata,
      'image_shape': image_shape,
      'num_classes': num_classes,
      **extra,
      'counts': {
        'total': sum(per_shard),
        'per_class': per_class,
        'per_shard': per_shard,
      },
      'sha256': sha256,
    }
    (folder / shards.METADATA).write_text(json.dumps(content, indent=2) + '\n')
    folder.rename(path)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise
  finally:
    os.close(lock)
  return SampleSet.open(path)


def _bucket():
  """The module of sets in buckets, which imports jax: others do without."""
  from jaxrobust.samples import bucket

  return bucket
