"""The files of a sample set, written as its images arrive."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterable

import numpy as np
from absl import logging

from jaxrobust.errors import UserError
from jaxrobust.runs import checksums
from jaxrobust.samples import shards


def make_parent(path: pathlib.Path) -> None:
  """Makes the folder that `path` is to be in; UserError where a file is in its place.

  Args:
    path: of what will be written.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise UserError(
      f'{path.parent} is no folder: {path} cannot be made in it; choose another place'
    ) from None


def claim(folder: pathlib.Path) -> int:
  """Makes an empty folder for this process, removing what a killed one left there.

  Args:
    folder: to make; its parent exists.

  Returns:
    A descriptor that holds the folder until it is closed.

  Raises:
    UserError: another process is writing there, or the folder cannot be locked.
  """
  folder.mkdir(exist_ok=True)
  lock = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(lock)
    raise UserError(
      f'{folder} is being written by another process: wait for it, or stop it'
    ) from None
  except OSError as error:  # Of network disks that know no locks.
    os.close(lock)
    raise UserError(
      f'{folder} cannot be locked against other writers ({error.strerror}): write the '
      'set to a local disk, and copy it'
    ) from None
  for left in folder.iterdir():
    logging.warning('removing %s of a killed command: this one starts over', left)
    shutil.rmtree(left) if left.is_dir() else left.unlink()
  return lock


def _check_batch(images, labels, image_shape, num_classes):
  """Refuses a batch that does not fit a set."""
  if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
    raise UserError(
      f'images {images.dtype} {list(images.shape)} with labels '
      f'{list(labels.shape)}; a sample set takes uint8 [n, H, W, C] and [n]'
    )
  if images.shape[-1] not in (1, 3):
    raise UserError(
      f'images of shape {list(images.shape[1:])}; a sample set takes 1 channel (grey) '
      'or 3 (colours): convert them'
    )
  if list(images.shape[1:]) != image_shape:
    raise UserError(
      f'images of shape {list(images.shape[1:])} after images of '
      f'shape {image_shape}; all must be equal'
    )
  if labels.dtype.kind not in 'iu' or labels.ndim != 1:
    raise UserError(
      f'labels {labels.dtype} {list(labels.shape)}; a sample set takes integers [n]'
    )
  if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
    raise UserError(
      f'labels {labels.min()}..{labels.max()}; {num_classes} classes '
      f'allow 0..{num_classes - 1}: give more classes, or number them from 0'
    )


def _check_confidence(confidence, labels, dtype):
  """Refuses confidences that do not fit a set; None where it has none."""
  found = None if confidence is None else confidence.dtype
  if found != dtype:
    raise UserError(
      f'confidences {found} after {dtype}; give all batches confidences, or none'
    )
  if confidence is None:
    return
  if dtype not in (np.float16, np.float32) or confidence.shape != labels.shape:
    raise UserError(
      f'confidences {dtype} {list(confidence.shape)} with {len(labels)} labels; a '
      'sample set takes float16 or float32 [n]'
    )
  if not ((confidence >= 0) & (confidence <= 1)).all():
    raise UserError('confidences outside [0, 1]; they are probabilities')


def write_shards(
  folder: pathlib.Path, batches: Iterable, num_classes: int, shard_size: int
) -> tuple[list[int], list[int], list[int], np.dtype | None, dict[str, str]]:
  """Writes images-0, labels-0 and, where given, confidence-0, …

  Returns:
    (counts per class, counts per shard, image shape, dtype of the confidences, sha256
    of each file by its name).
  """
  per_class = np.zeros(num_classes, np.int64)
  per_shard, image_shape, dtype = [], None, None
  digests = {}
  file, held = None, []  # (labels,) or (labels, confidence) of the open shard

  def finish():
    columns = [np.concatenate(parts) for parts in zip(*held, strict=True)]
    # The header of numpy has room for any count, so it is rewritten in place.
    file.seek(0)
    shards.write_header(file, (len(columns[0]), *image_shape))
    file.close()
    names = [f'images-{len(per_shard)}']
    for kind, column in zip(('labels', 'confidence'), columns, strict=False):
      names.append(f'{kind}-{len(per_shard)}')
      with open(folder / names[-1], 'wb') as column_file:
        np.save(column_file, column)
    for name in names:  # Now, while the system still has it in memory.
      digests[name] = checksums.sha256(folder / name)
    per_shard.append(len(columns[0]))
    held.clear()

  with contextlib.ExitStack() as stack:
    for images, labels, *rest in batches:
      images, labels = np.ascontiguousarray(images), np.asarray(labels)
      confidence = np.asarray(rest[0]) if rest else None
      if image_shape is None:
        image_shape = list(images.shape[1:])
        dtype = None if confidence is None else confidence.dtype
      _check_batch(images, labels, image_shape, num_classes)
      _check_confidence(confidence, labels, dtype)
      labels = labels.astype(np.int32)
      per_class += np.bincount(labels, minlength=num_classes)
      columns = [labels, *([confidence] if rest else [])]
      while len(images):
        if not held:
          name = folder / f'images-{len(per_shard)}'
          file = stack.enter_context(open(name, 'wb'))
          shards.write_header(file, (shard_size, *image_shape))
        n = min(len(images), shard_size - sum(len(part[0]) for part in held))
        file.write(images[:n].data)
        held.append([column[:n] for column in columns])
        images, columns = images[n:], [column[n:] for column in columns]
        if sum(len(part[0]) for part in held) == shard_size:
          finish()
    if held:
      finish()
  if not per_shard:
    raise UserError('no images were given; a sample set holds at least one')
  return per_class.tolist(), per_shard, image_shape, dtype, digests
