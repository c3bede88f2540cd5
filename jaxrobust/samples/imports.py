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
from jaxrobust.samples import import_source, npz, png_files, sample_sets, shards

_PICKLES = ('.pickle', '.pkl', '.p')


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

  An `.npz` and a pair of `.npy` (see `npz`) and PNG files in a folder or `.zip` (see
  `png_files`) are streamed. A `.pickle` holds a dictionary with uint8 [n, H, W, C] and
  int [n] under the same names as an `.npz`, or a pair of those arrays; it is held in
  memory whole, and can run nothing. An import that is killed starts over.

  Args:
    paths: what to read, at least one; a `.npy` of images is followed by its labels'.
    out: the folder to make.
    metadata: as for `sample_sets.write`.
    num_classes: number of classes K; by default the largest label plus 1. Folders
      of PNG whose names are numbers with gaps need it.
    shard_size: images in a file of the set.
    labels: file that names the PNG files of all folders and `.zip`; see `label_files`.
      By default it is the `dataset.json` among them, or their folders are classes.
    progress: wraps the batches of images and labels, given the number of images.

  Returns:
    The set, opened.

  Raises:
    UserError: a file is absent, damaged or holds something else, the classes of
      folders are in doubt, a label is beyond the classes, or `sample_sets.write`
      refuses.
  """
  if shards.local_path(out).exists():  # Before hours of reading.
    raise UserError(f'{out} exists; remove it or choose another folder')
  if num_classes is not None:
    shards.check_num_classes(num_classes)
  opened, class_names = _open_all(
    [pathlib.Path(path) for path in paths], labels, num_classes is not None
  )
  if class_names:
    metadata = {'class_names': class_names, **metadata}
  name, needed = max(
    ((name, source.num_classes) for name, source in opened), key=lambda x: x[1]
  )
  if num_classes is not None and num_classes < needed:
    raise UserError(
      f'{name} has labels up to {needed - 1}; num_classes = {num_classes} allows '
      f'0..{num_classes - 1}: give {needed} or more'
    )
  batches = (batch for _, source in opened for batch in source.batches())
  return sample_sets.write(
    out,
    progress(batches, sum(source.count for _, source in opened)),
    metadata=metadata,
    num_classes=num_classes or needed,
    shard_size=shard_size,
  )


def _open_all(
  paths: Sequence[pathlib.Path], labels, has_gaps: bool
) -> tuple[list[tuple[pathlib.Path, import_source.Source]], list[str]]:
  """The samples of each path by its kind, and names of the classes where they have."""
  pngs = {
    path: png_files.PngFiles(path, labels)
    for path in paths
    if path.is_dir() or path.suffix == '.zip'
  }
  in_folders = [files for files in pngs.values() if files.listed is None]
  classes = png_files.number_classes(in_folders, has_gaps) if in_folders else {}
  class_names = [] if next(iter(classes), '0').isdecimal() else list(classes)
  others = [p for p in paths if p not in pngs or pngs[p].listed is not None]
  if class_names and others:
    raise UserError(
      f'{in_folders[0].path} names its classes and {others[0]} numbers them: which '
      'are the same is not known; rename the folders to the numbers'
    )
  opened, left = [], iter(paths)
  for path in left:
    if path in pngs:
      source = pngs[path].source(classes)
    elif labels:
      raise UserError(f'{path} has labels of its own: --labels is for PNG files')
    elif path.suffix == '.npy':
      source = _open_pair(path, next(left, None))
    elif path.suffix == '.npz':
      source = npz.open_npz(path)
    elif path.suffix in _PICKLES:
      source = _open_pickle(path)
    else:
      raise UserError(
        f'{path}: give .npz, two .npy (images, then their labels), '
        f'{", ".join(_PICKLES)}, or a folder or .zip of PNG files that exists'
      )
    opened.append((path, source))
  return opened, class_names


def _open_pair(images: pathlib.Path, labels: pathlib.Path | None):
  """The samples of two `.npy` files."""
  if labels is None or labels.suffix != '.npy':
    raise UserError(
      f'{images} holds one array: give the .npy file of its labels after it'
    )
  return npz.open_npy(images, labels)


def _open_pickle(path: pathlib.Path) -> import_source.Source:
  """The samples of a pickle."""
  if path.exists() and not path.is_file():  # It might block.
    raise UserError(f'{path} is no file; give the path of the pickle')
  size, free = path.exists() and path.stat().st_size, _available_memory()
  if size > free:
    raise UserError(
      f'{path} has {size / 2**30:.1f} GiB, and a pickle is held in memory whole, of '
      f'which {free / 2**30:.1f} GiB are free: import it on a larger machine, or '
      'save its arrays as image and label of an .npz there, which is streamed'
    )
  try:
    with open(path, 'rb') as file:
      content = pickles.ArrayUnpickler(file).load()
    if isinstance(content, dict):
      content = [content[key] for key in import_source.find_keys(path, content)]
    images, labels = map(np.asarray, content)
  except FileNotFoundError:
    raise UserError(f'{path} does not exist; give the path of the pickle') from None
  except UserError:
    raise
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} is not taken ({type(error).__name__}: {error}): it needs '
      f'{import_source.NEEDED}'
    ) from None
  import_source.check_arrays(path, images, labels)
  num_classes = import_source.check_labels(path, int(labels.min()), int(labels.max()))
  return import_source.Source(len(images), num_classes, lambda: _slices(images, labels))


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
  start = 0
  for n in import_source.chunks(len(images), images.shape[1:]):
    yield images[start : start + n], labels[start : start + n]
    start += n
