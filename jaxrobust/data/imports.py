"""Sample sets of what others generated, streamed from their files.

Order. Images keep the order of their files, whatever it is: files sorted by class
need no shuffling here, since training shuffles each set as a whole, anew in each
epoch (see `pipeline`), and everything that looks at a part of a set takes it by class
or evenly spread.
"""

import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxrobust import pickles
from jaxrobust.data import npz, pictures, samples, shards
from jaxrobust.data.sources import Source
from jaxrobust.errors import UserError

_PICKLES = ('.pickle', '.pkl', '.p')
_IMAGE_KEYS = ('image', 'images', 'data')
_LABEL_KEYS = ('label', 'labels', 'extrapolated_targets')
_CHUNK = 2**13


def import_samples(
  paths: Sequence[str | os.PathLike],
  out: str | os.PathLike,
  *,
  metadata: dict[str, Any],
  num_classes: int | None = None,
  shard_size: int = samples.SHARD_SIZE,
  labels: str | os.PathLike = '',
  progress: Callable[[Iterable, int], Iterable] = lambda batches, _: batches,
) -> samples.SampleSet:
  """Makes one sample set of files and folders, in the order given.

  An `.npz` (see `npz.open_npz`) and a folder of PNG files (see
  `pictures.open_folder`) are streamed. A `.pickle` holds a dictionary with uint8
  [n, H, W, C] under `image`, `images` or `data` and int [n] under `label`, `labels`
  or `extrapolated_targets`, or a pair of those arrays; it is held in memory whole,
  and can run nothing. An import that is killed starts over.

  Args:
    paths: What to read, at least one.
    out: The folder to make.
    metadata: As for `samples.write`.
    num_classes: Number of classes K; by default the largest label plus 1.
    shard_size: Images in a file of the set.
    labels: As for `pictures.open_folder`.
    progress: Wraps the batches of images and labels, given the number of images.

  Returns:
    The set, opened.

  Raises:
    UserError: A file is absent, damaged or holds something else, or `samples.write`
      refuses.
  """
  if shards.local_path(out).exists():  # Before hours of reading.
    raise UserError(f'{out} exists; remove it or choose another folder')
  sources = [_open(pathlib.Path(path), labels) for path in paths]
  for source in sources:
    metadata = {**source.metadata, **metadata}
  total = sum(source.count for source in sources)
  batches = (batch for source in sources for batch in source.batches())
  return samples.write(
    out,
    progress(batches, total),
    metadata=metadata,
    num_classes=num_classes or max(source.num_classes for source in sources),
    shard_size=shard_size,
  )


def _open(path: pathlib.Path, labels) -> Source:
  """The samples of a file or folder, by its kind."""
  if path.is_dir():
    return pictures.open_folder(path, labels)
  if labels:
    raise UserError(f'{path} has labels of its own: --labels is for folders of PNG')
  if path.suffix in _PICKLES:
    return _open_pickle(path)
  if path.suffix == '.npz':
    return npz.open_npz(path)
  raise UserError(
    f'{path}: give .npz, {", ".join(_PICKLES)} or a folder of PNG files that exists'
  )


def _open_pickle(path: pathlib.Path) -> Source:
  """The samples of a pickle."""
  size, free = path.exists() and path.stat().st_size, _available_memory()
  if size > free:
    raise UserError(
      f'{path} has {size / 2**30:.1f} GiB, and a pickle is held in memory whole, of '
      f'which {free / 2**30:.1f} GiB are free: import it on a larger machine, or '
      'save its arrays as image and label of an .npz there, which is streamed'
    )
  try:
    with open(path, 'rb') as file:
      # Latin-1 is how numpy's bytes come out of pickles of Python 2.
      content = pickles.ArrayUnpickler(file, encoding='latin1').load()
    if isinstance(content, dict):
      # Exactly one of each, or the next line but one refuses.
      found = [key for key in (*_IMAGE_KEYS, *_LABEL_KEYS) if key in content]
      content = [content[key] for key in found]
    images, labels = map(np.asarray, content)
  except FileNotFoundError:
    raise UserError(f'{path} does not exist; give the path of the pickle') from None
  except pickles.ERRORS as error:
    raise UserError(
      f'{path} is not taken ({type(error).__name__}: {error}): it must hold arrays '
      f'under one of {", ".join(_IMAGE_KEYS)} and one of {", ".join(_LABEL_KEYS)}'
    ) from None
  if (
    (images.dtype, images.ndim) != (np.uint8, 4)
    or labels.dtype.kind not in 'iu'
    or not labels.size
    or labels.shape != images.shape[:1]
  ):
    raise UserError(
      f'{path} holds images {images.dtype} {list(images.shape)} and labels '
      f'{labels.dtype} {list(labels.shape)}; it needs uint8 [n, H, W, C] and integers '
      '[n], n > 0'
    )
  return Source(len(images), int(labels.max()) + 1, lambda: _slices(images, labels))


def _available_memory() -> float:
  """Bytes that can be had without swapping; infinite where the system does not say."""
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
    sizes = {line.split(':')[0]: int(line.split()[1]) for line in lines}
    return sizes['MemAvailable'] * 2**10
  except (OSError, KeyError):
    return float('inf')


def _slices(images, labels) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields arrays in parts."""
  for start in range(0, len(images), _CHUNK):
    yield images[start : start + _CHUNK], labels[start : start + _CHUNK]
