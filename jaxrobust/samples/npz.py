"""Samples from `.npz` files and pairs of `.npy` files, and sample sets to `.npz`.

The authors of the paper release generated images as one file with the arrays
`image` and `label`; later work keeps to it, in several files where it has tens of
millions.
"""

import contextlib
import os
import uuid
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.files import arrays
from jaxrobust.samples import import_source, sample_sets, shards, writing

_LABELS_CHUNK = 2**20


def open_npz(path: str | os.PathLike) -> import_source.Source:
  """Opens an `.npz` file; its images and labels are streamed, never held.

  Args:
    path: file with `image` uint8 [n, H, W, C], C = 1 or 3, and `label` int [n],
      stored or compressed, in any order of classes; or under another of the names in
      `import_source`.

  Returns:
    The samples.

  Raises:
    UserError: the file is absent, damaged or holds something else.
  """
  with arrays.open_npz(path) as archive:
    keys = import_source.find_keys(path, archive.keys)

  @contextlib.contextmanager
  def open_both():
    with arrays.open_npz(path) as archive:
      first, second = keys
      with archive.open(first) as images, archive.open(second) as labels:
        yield images, labels

  return _open(path, open_both)


def open_npy(
  images_path: str | os.PathLike, labels_path: str | os.PathLike
) -> import_source.Source:
  """Opens a `.npy` file of images and the one of their labels; as `open_npz`."""

  @contextlib.contextmanager
  def open_both():
    with arrays.open_npy(images_path) as images, arrays.open_npy(labels_path) as labels:
      yield images, labels

  return _open(f'{images_path} with {labels_path}', open_both)


def export_npz(sample_set: sample_sets.SampleSet, npz_path: str | os.PathLike) -> None:
  """Writes a set as one `.npz` with `image` uint8 [n, H, W, C], `label` int64 [n].

  Args:
    sample_set: the set; it is streamed.
    npz_path: the file to make.

  Raises:
    UserError: the file exists.
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
        start = 0
        for n in import_source.chunks(len(sample_set), sample_set.image_shape):
          member.write(sample_set.gather(np.arange(start, start + n)).data)
          start += n
      with archive.open('label.npy', 'w', force_zip64=True) as member:
        labels = sample_set.gather_labels(slice(None)).astype(np.int64)
        np.lib.format.write_array(member, labels)
    temporary.rename(npz_path)
  finally:
    temporary.unlink(missing_ok=True)


def _open(name, open_both: Callable) -> import_source.Source:
  """The samples of two streams, images and labels, that `open_both()` opens."""
  ends = []
  with open_both() as (images, labels):
    import_source.check_arrays(name, images, labels)
    count, image_shape = images.shape[0], images.shape[1:]
    for start in range(0, count, _LABELS_CHUNK):
      part = labels.rows(min(_LABELS_CHUNK, count - start))
      ends += [int(part.min()), int(part.max())]

  def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with open_both() as (images, labels):
      for n in import_source.chunks(count, image_shape):
        yield images.rows(n), labels.rows(n)

  num_classes = import_source.check_labels(name, min(ends), max(ends))
  return import_source.Source(count, num_classes, batches)
