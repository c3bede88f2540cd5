"""Sample sets: folders of generated images with their pseudo-labels.

A set holds `images-00000-of-00016.npy` (uint8 [n, H, W, C]), a
`labels-….npy` (int32 [n]) for each, and `metadata.json`: what made the images
(generator, seed, labeller, selection), image_shape, num_classes, counts (total,
per_class, per_shard) and the sha256 of each shard file. Optional: how sure the
labeller is of each label, `confidence-….npy` (float16 or float32 [n], which
metadata.json then names as `confidence`). Near 1 float16 has steps of 0.0005, so that
many confident samples tie: float32 ranks them.

  python -m jaxrobust.data {import,export,info,verify,select} --help
"""

import concurrent.futures
import contextlib
import io
import json
import mmap
import os
import pathlib
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, json_files
from jaxrobust.runs import checksums
from jaxrobust.samples import shards, writing

SHARD_SIZE = 2**18  # 0.8 GB of 32x32x3; 100M images stay under 1,024 open files.
RESERVED = (
  'format_version',
  'image_shape',
  'num_classes',
  'confidence',
  'counts',
  'sha256',
)
_STAMP = 'verified.json'
# An image maps at most the 16 pages around it, so at most 512 MiB are mapped at a time.
_IMAGES_BETWEEN_RELEASES = 8_192


class SampleSet:
  """A sample set on local disk, read image by image, never loaded whole.

  Images are memory-mapped: a batch of 704 random images takes 0.26 ms from cached
  files, against 1.15 ms with a `preadv` an image. Mapped pages count as resident
  memory, so they are given back regularly.

  Attributes:
    path: the folder.
    metadata: the content of `metadata.json`.
    image_shape: (H, W, C).
    num_classes: number of classes K; labels lie in [0, K).
  """

  def __init__(
    self,
    path: pathlib.Path,
    metadata: dict,
    files: list[io.FileIO],
    offsets: list[int],
    labels: np.ndarray,
  ):
    self.path = path
    self.metadata = metadata
    self.image_shape = tuple(metadata['image_shape'])
    self.num_classes = metadata['num_classes']
    self._files = files
    self._maps = [mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) for f in files]
    self._sizes = [len(mapped) for mapped in self._maps]
    self._images = [
      np.frombuffer(mapped, np.uint8, offset=offset).reshape(count, -1)
      for mapped, offset, count in zip(
        self._maps, offsets, metadata['counts']['per_shard'], strict=True
      )
    ]
    for mapped in self._maps:  # Reading ahead would read what nobody asked for.
      mapped.madvise(mmap.MADV_RANDOM)
    self._gathered = 0
    self._labels = labels
    self._starts = np.cumsum([0, *metadata['counts']['per_shard'][:-1]])

  @classmethod
  def open(cls, path: str | os.PathLike) -> 'SampleSet':
    """Opens a set and checks all but the bytes of the images (see `verify`).

    Args:
      path: a sample set folder, on local disk or in a bucket: see `bucket.fetch`.

    Returns:
      The set.

    Raises:
      UserError: the folder is absent or no sample set, or a file of it
        is missing, superfluous, truncated, of the wrong shape or type, or holds
        labels outside the classes or other than the metadata counts.
    """
    if shards.is_remote(path):
      path = _bucket().fetch(path)
    path = pathlib.Path(path)
    metadata = shards.read_metadata(path)
    counts, num_classes = metadata['counts'], metadata['num_classes']
    kinds = shards.kinds(metadata)
    names = shards.shard_names(len(counts['per_shard']), kinds)
    expected = {name for pair in names for name in pair}
    for file in sorted(path.glob('*.npy')):
      if file.name not in expected:
        raise UserError(
          f'{file} does not belong to this sample set, whose metadata names '
          f'{len(names)} shards; move it away or make the set again'
        )
    files, offsets, labels = [], [], []
    narrow = np.min_scalar_type(num_classes - 1)
    for (image_name, label_name, *rest), n in zip(
      names, counts['per_shard'], strict=True
    ):
      shape = (n, *metadata['image_shape'])
      offsets.append(shards.check_array(path / image_name, shape, np.uint8))
      offset = shards.check_array(path / label_name, (n,), np.int32)
      for name in rest:
        shards.check_array(path / name, (n,), np.dtype(metadata['confidence']))
      shard = np.fromfile(path / label_name, np.int32, offset=offset)
      if shard.min() < 0 or shard.max() >= num_classes:
        raise UserError(
          f'{path / label_name} holds labels {shard.min()}..{shard.max()}; '
          f'{num_classes} classes allow 0..{num_classes - 1}; label the set again'
        )
      labels.append(shard.astype(narrow))  # a byte a label: 100 MB for 100M
      try:
        files.append(io.FileIO(path / image_name))
      except OSError as error:
        raise UserError(
          f'{path / image_name} cannot be opened ({error.strerror}); with too many '
          f'open files ({len(names)} shards) raise the limit by `ulimit -n`'
        ) from None
    labels = np.concatenate(labels)
    per_class = np.bincount(labels, minlength=num_classes).tolist()
    if per_class != counts['per_class']:
      label = next(
        k for k in range(num_classes) if per_class[k] != counts['per_class'][k]
      )
      raise UserError(
        f'{path} is mislabelled: its label files hold {per_class[label]} images of '
        f'class {label}, its metadata.json says {counts["per_class"][label]}; '
        'fetch or make the set again'
      )
    return cls(path, metadata, files, offsets, labels)

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
      IndexError: an index is outside the set.
      UserError: A file has shrunk since the set was opened.
    """
    indices = np.asarray(indices, np.int64)
    if out is None:
      out = np.empty((len(indices), *self.image_shape), np.uint8)
    if not len(indices):
      return out
    if indices.min() < 0 or indices.max() >= len(self):
      raise IndexError(
        f'indices {indices.min()}..{indices.max()} in a set of {len(self)} images'
      )
    rows = np.arange(len(indices)) if rows is None else rows
    flat = out.reshape(len(out), -1)
    shard_of = np.searchsorted(self._starts, indices, side='right') - 1
    for shard in np.unique(shard_of):
      if os.fstat(self._files[shard].fileno()).st_size < self._sizes[shard]:
        raise UserError(
          f'{self._files[shard].name} has been truncated while in use; '
          'restore the file and start again'
        )
      chosen = shard_of == shard
      flat[rows[chosen]] = self._images[shard][indices[chosen] - self._starts[shard]]
    self._gathered += len(indices)
    if self._gathered >= _IMAGES_BETWEEN_RELEASES:
      self._gathered = 0
      for mapped in self._maps:
        mapped.madvise(mmap.MADV_DONTNEED)
    return out

  def gather_labels(self, indices: np.ndarray | slice) -> np.ndarray:
    """Returns the labels int32 [n] of the images at `indices` int [n]."""
    return self._labels[indices].astype(np.int32)

  def confidence(self) -> np.ndarray | None:
    """Reads how sure the labeller is of each label, float [n]; None if unknown."""
    dtype = self.metadata.get('confidence')
    if not dtype:
      return None
    names = shards.shard_names(len(self._files), ('confidence',))
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
    with contextlib.suppress(OSError, ValueError):
      return json.loads((self.path / _STAMP).read_text()) == self._stamp()
    return False

  def checksum(self) -> str:
    """Of the metadata, which hold those of all files: as of `datasets.Split`."""
    return f'{zlib.crc32((self.path / shards.METADATA).read_bytes()):08x}'

  def _stamp(self):
    """Size and time of modification of each file."""
    names = [*self.metadata['sha256'], shards.METADATA]
    stats = {name: (self.path / name).stat() for name in names}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}

  def verify(
    self, progress: Callable[[Iterable], Iterable] = iter, anew: bool = False
  ) -> None:
    """Compares the sha256 of each shard file with the metadata, once.

    A finished verification is remembered in the folder, where it is writable,
    and holds until a file changes size or time of modification.

    Args:
      progress: wraps the list of files, as `tqdm.tqdm` does.
      anew: whether to read files that were verified before: bits that a disk has lost
        change neither.

    Raises:
      UserError: files are corrupt; the message names each of them.
    """
    if not anew and self.is_verified():
      return
    stamp, stamp_file = self._stamp(), self.path / _STAMP
    expected = self.metadata['sha256']
    files = [self.path / name for name in sorted(expected)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      digests = pool.map(checksums.sha256, files)
      corrupt = [
        str(file)
        for file, digest in zip(progress(files), digests, strict=True)
        if digest != expected[file.name]
      ]
    if corrupt:
      with contextlib.suppress(OSError):
        stamp_file.unlink()  # What an earlier verification said is no longer so.
      raise UserError(
        f'corrupt (sha256 differs from metadata.json): {", ".join(corrupt)}; '
        'fetch or make these files again'
      )
    with contextlib.suppress(OSError):
      temporary = stamp_file.with_name(f'.{_STAMP}.{uuid.uuid4().hex}')
      temporary.write_text(json.dumps(stamp))
      temporary.replace(stamp_file)


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
