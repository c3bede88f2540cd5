"""What became of each image of an evaluation, in memory or in a folder.

The folder makes an evaluation resumable: it is written after every batch, and what is
written after the batch is all that an uninterrupted evaluation would know.
"""

import io
import json
import zipfile

import numpy as np
from absl import logging
from etils import epath

from jaxrobust.errors import UserError

STANDING = -1
_STATE = 'state.npz'


class Record:
  """Which attempt each image fell to, and where the evaluation is.

  Attributes:
    fallen: int32 [n]; STANDING, 0 for an image that is misclassified as it is, else
      the number of the attempt it fell to, counted from 1 over all attacks.
    attempt: number of the attempt that is under way; 0 is the clean pass.
    done: images that this attempt is through with.
    warnings: lines, each once.
    adversarial: index of an image → the image float32 [H, W, C] it was changed to.
    predictions: the same for the class predicted for it.
  """

  def __init__(self, num_images: int, folder: epath.Path | None, identity: dict):
    """Opens the record, where the last evaluation stopped.

    Args:
      num_images: n.
      folder: local or `gs://`; None keeps it in memory.
      identity: JSON values that say what is evaluated and how.

    Raises:
      UserError: if the folder holds the record of another evaluation, or a damaged one.
    """
    self.fallen = np.full(num_images, STANDING, np.int32)
    self.attempt = self.done = self._batches = 0
    self.warnings, self.adversarial, self.predictions = [], {}, {}
    self._files = []  # Batches of which there is a file.
    self._folder = epath.Path(folder) if folder else None
    self._identity = json.dumps(identity, sort_keys=True)
    if self._folder and (self._folder / _STATE).exists():
      try:
        self._read()
      except UserError:
        raise
      except (zipfile.BadZipFile, KeyError, EOFError, OSError, ValueError) as e:
        raise UserError(
          f'{self._folder} is damaged ({e}): remove it to start this evaluation anew'
        ) from e

  def _read(self):
    """Takes the record from its folder."""
    with np.load(io.BytesIO((self._folder / _STATE).read_bytes())) as state:
      if str(state['identity']) != self._identity:
        raise UserError(
          f'{self._folder} holds the evaluation of something else: use another '
          'folder, or remove it'
        )
      self.fallen = state['fallen']
      self.attempt, self.done, self._batches = state['position'].tolist()
      self.warnings = json.loads(str(state['warnings']))
      self._files = state['files'].tolist()
    for batch in self._files:
      path = self._batch_path(batch)
      if not path.exists():
        raise UserError(f'{path} is absent: remove {self._folder} to start anew')
      with np.load(io.BytesIO(path.read_bytes())) as kept:
        self._keep(kept['index'], kept['images'], kept['predictions'])

  def begin(self, attempt: int):
    """Goes to an attempt; one that is under way stays where it is."""
    if self.attempt != attempt:
      self.attempt, self.done = attempt, 0

  def standing(self) -> np.ndarray:
    """Indices of the images that stood when this attempt began."""
    return np.flatnonzero((self.fallen == STANDING) | (self.fallen == self.attempt))

  def advance(self, index, fell, images=None, predictions=None, *, keep, write):
    """Notes a batch.

    Args:
      index: int [b], the images.
      fell: bool [b].
      images, predictions: what they were changed to, and its class.
      keep: of how many of the first images to keep what they were changed to.
      write: whether this process writes to the folder.
    """
    self.fallen[index[fell]] = self.attempt
    self.done += len(index)
    keep = fell & (index < keep)
    if images is not None and keep.any():
      kept = index[keep], images[keep], predictions[keep]
      self._keep(*kept)
      self._files.append(self._batches)
      if self._folder and write:
        names = ('index', 'images', 'predictions')
        self._write(
          self._batch_path(self._batches), **dict(zip(names, kept, strict=True))
        )
    self._batches += 1
    if self._folder and write:
      self._write(
        self._folder / _STATE,
        fallen=self.fallen,
        position=np.array([self.attempt, self.done, self._batches]),
        files=np.array(self._files, int),
        warnings=json.dumps(self.warnings),
        identity=self._identity,
      )

  def warn(self, line: str):
    """Adds a warning, and logs it, if it is new."""
    if line not in self.warnings:
      self.warnings.append(line)
      logging.warning('%s', line)

  def _keep(self, index, images, predictions):
    self.adversarial |= dict(zip(index.tolist(), images, strict=True))
    self.predictions |= dict(zip(index.tolist(), predictions.tolist(), strict=True))

  def _batch_path(self, batch: int) -> epath.Path:
    return self._folder / f'adversarial-{batch:06}.npz'

  def _write(self, path: epath.Path, **arrays):
    """Writes a whole file, or nothing."""
    self._folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)
