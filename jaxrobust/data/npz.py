"""Sample sets from and to `.npz` files.

The authors of the paper release generated images as one file with the arrays
`image` and `label`; later work keeps to it.
"""

import os
import uuid
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxrobust.data import samples, shards
from jaxrobust.errors import UserError

_CHUNK = 2**13  # images held in memory while a file is copied


def import_npz(
  npz_path: str | os.PathLike,
  out: str | os.PathLike,
  *,
  metadata: dict[str, Any],
  num_classes: int | None = None,
  shard_size: int = samples.SHARD_SIZE,
) -> samples.SampleSet:
  """Makes a sample set of an `.npz` file as the paper's authors release them.

  Args:
    npz_path: File with `image` uint8 [n, H, W, C] and `label` int [n], stored or
      compressed; it is streamed.
    out: The folder to make.
    metadata: As for `write`.
    num_classes: Number of classes K; by default the largest label plus 1.
    shard_size: Images in a file.

  Returns:
    The set, opened.

  Raises:
    UserError: The file is absent, damaged or holds something else, or `write`
      refuses.
  """
  try:
    with zipfile.ZipFile(npz_path) as archive:
      keys = sorted(name.removesuffix('.npy') for name in archive.namelist())
      if not {'image', 'label'} <= set(keys):
        raise UserError(f'{npz_path} holds {keys}; it needs image and label')
      with archive.open('label.npy') as member:
        labels = np.lib.format.read_array(member)
      if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in 'iu':
        raise UserError(
          f'label in {npz_path} is {labels.dtype} '
          f'{list(labels.shape)}; it must be integers [n], n > 0'
        )
      with archive.open('image.npy') as member:
        return samples.write(
          out,
          _npz_batches(member, labels, npz_path),
          metadata=metadata,
          num_classes=num_classes or int(labels.max()) + 1,
          shard_size=shard_size,
        )
  except FileNotFoundError:
    raise UserError(f'{npz_path} does not exist; give the path of the .npz') from None
  except UserError:
    raise
  except (zipfile.BadZipFile, EOFError, ValueError) as error:
    raise UserError(
      f'{npz_path} is damaged or no .npz file ({error}); fetch it again'
    ) from None


def export_npz(sample_set: samples.SampleSet, npz_path: str | os.PathLike) -> None:
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


def _npz_batches(member, labels, name) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (images, labels) from an open member `image.npy`."""
  shape, dtype = shards.read_header(member, f'image in {name}')
  if len(shape) != 4 or dtype != np.uint8 or shape[0] != len(labels):
    raise UserError(
      f'{name} holds image {dtype} {list(shape)} and {len(labels)} labels; it '
      'needs uint8 [n, H, W, C] and n labels'
    )
  size = int(np.prod(shape[1:]))
  for start in range(0, shape[0], _CHUNK):
    n = min(_CHUNK, shape[0] - start)
    content = member.read(n * size)
    if len(content) != n * size:
      raise UserError(f'image in {name} is truncated; fetch the file again')
    images = np.frombuffer(content, np.uint8).reshape(n, *shape[1:])
    yield images, labels[start : start + n]
