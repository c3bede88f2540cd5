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

from jaxrobust.errors import UserError
from jaxrobust.files import pickles
from jaxrobust.samples import import_source, npz, pictures, sample_sets, shards

_PICKLES = ('.pickle', '.pkl', '.p')
_CHUNK = 2**13


def import_samples(
  paths: Sequence[str | os.PathLike],
  out: str | os.PathLike,
  *,
  metadata: dict[str, Any],
  num_classes: int | None = None,
  shard_size: int = sample_sets.SHARD_SIZE,
  labels: str | os.PathLike = '',
  progress: Callable[[Iterable, int], Iterable] = lambda batches, _: batches,
) -> sample_sets.SampleSet:
  """Makes one sample set of files and folders, in the order given.

  An `.npz` (see `npz.open_npz`) and a folder of PNG files (see
  `pictures.open_folder`) are streamed. A `.pickle` holds a dictionary with uint8
  [n, H, W, C] and int [n] under the same names as an `.npz`, or a pair of those
  arrays; it is held in memory whole, and can run nothing. An import that is killed
  starts over.

  Args:
    paths: What to read, at least one.
    out: The folder to make.
    metadata: As for `samples.write`.
    num_classes: Number of classes K; by default the largest label plus 1. Folders
      of PNG whose names are numbers with gaps need it.
    shard_size: Images in a file of the set.
    labels: As for `pictures.open_folder`.
    progress: Wraps the batches of images and labels, given the number of images.

  Returns:
    The set, opened.

  Raises:
    UserError: A file is absent, damaged or holds something else, the classes of
      folders are in doubt, a label is beyond the classes, or `samples.write` refuses.
  """
  if shards.local_path(out).exists():  # Before hours of reading.
    raise UserError(f'{out} exists; remove it or choose another folder')
  if num_classes is not None and num_classes < 1:
    raise UserError(f'num_classes = {num_classes}: give the number of classes, from 1')
  paths = [pathlib.Path(path) for path in paths]
  classes = {}
  if not labels and (folders := [path for path in paths if path.is_dir()]):
    classes = pictures.number_classes(folders, has_gaps=num_classes is not None)
    if not next(iter(classes)).isdecimal():
      if others := [path for path in paths if path not in folders]:
        raise UserError(
          f'{folders[0]} names its classes and {others[0]} numbers them: which are the '
          'same is not known; rename the folders to the numbers'
        )
      metadata = {'class_names': list(classes), **metadata}
  opened = [_open(path, labels, classes) for path in paths]
  needed = max(source.num_classes for source in opened)
  if num_classes is not None and num_classes < needed:
    path = next(
      p for p, x in zip(paths, opened, strict=True) if x.num_classes == needed
    )
    raise UserError(
      f'{path} has labels up to {needed - 1}; num_classes = {num_classes} allows '
      f'0..{num_classes - 1}: give {needed} or more'
    )
  batches = (batch for source in opened for batch in source.batches())
  return sample_sets.write(
    out,
    progress(batches, sum(source.count for source in opened)),
    metadata=metadata,
    num_classes=num_classes or needed,
    shard_size=shard_size,
  )


def _open(path: pathlib.Path, labels, classes: dict[str, int]) -> import_source.Source:
  """The samples of a file or folder, by its kind."""
  if path.is_dir():
    return pictures.open_folder(path, classes, labels)
  if labels:
    raise UserError(f'{path} has labels of its own: --labels is for folders of PNG')
  if path.suffix in _PICKLES:
    return _open_pickle(path)
  if path.suffix == '.npz':
    return npz.open_npz(path)
  raise UserError(
    f'{path}: give .npz, {", ".join(_PICKLES)} or a folder of PNG files that exists'
  )


def _open_pickle(path: pathlib.Path) -> import_source.Source:
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
      content = [content[key] for key in import_source.find_keys(path, content)]
    images, labels = map(np.asarray, content)
  except FileNotFoundError:
    raise UserError(f'{path} does not exist; give the path of the pickle') from None
  except UserError:
    raise
  except (OSError, *pickles.ERRORS) as error:
    raise UserError(
      f'{path} is not taken ({type(error).__name__}: {error}): it needs '
      f'{import_source.NEEDED}'
    ) from None
  import_source.check_arrays(
    path, images.shape, images.dtype, labels.shape, labels.dtype
  )
  import_source.check_labels(path, int(labels.min()))
  return import_source.Source(
    len(images), int(labels.max()) + 1, lambda: _slices(images, labels)
  )


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
