"""What became of each image of an evaluation, in memory or in a folder.

The folder makes an evaluation resumable: it is written after every batch, and what is
written after the batch is all that an uninterrupted evaluation would know.
"""

import contextlib
import json
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, json_files
from jaxrobust.runs import workdir as workdirs

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
    self._folder: Any = epath.Path(folder) if folder else None
    self._identity = json.dumps(identity, sort_keys=True)
    if self._folder and (self._folder / _STATE).exists():
      self._read()

  def _read(self):
    """Takes the record from its folder; UserError if it cannot be one."""
    path, count = self._folder / _STATE, len(self.fallen)
    vector, text = ('i', 1), ('U', 0)
    kinds = {'fallen': vector, 'position': vector, 'files': vector}
    state = self._arrays(path, kinds | {'warnings': text, 'identity': text})
    if str(state['identity']) != self._identity:
      raise UserError(
        f'{self._folder} holds the evaluation of something else: use another '
        'folder, or remove it'
      )
    position, fallen, files = state['position'], state['fallen'], state['files']
    self._require(len(position) == 3 and (position >= 0).all(), path, 'position')
    self.attempt, self.done, self._batches = position.tolist()
    self._require(self.done <= count, path, 'position')
    known = (fallen >= STANDING) & (fallen <= self.attempt)
    self._require(len(fallen) == count and known.all(), path, 'fallen')
    self._require(((files >= 0) & (files < self._batches)).all(), path, 'files')
    with self._with_remedy():
      warnings = json_files.parse(str(state['warnings']), f'warnings in {path}', list)
    self._require(all(isinstance(x, str) for x in warnings), path, 'warnings')
    self.fallen, self.warnings = fallen.astype(np.int32), warnings
    self._files = files.tolist()
    for batch in self._files:
      self._read_batch(self._batch_path(batch))

  def _read_batch(self, path: epath.Path):
    """Takes the images of a batch that fell."""
    if not path.exists():
      raise UserError(f'{path} is absent: remove {self._folder} to start anew')
    kept = self._arrays(
      path, {'index': ('i', 1), 'images': ('f', 4), 'predictions': ('i', 1)}
    )
    index, images, predictions = kept['index'], kept['images'], kept['predictions']
    known = (index >= 0) & (index < len(self.fallen))
    sizes = {len(index), len(images), len(predictions)}
    self._require(len(sizes) == 1 and known.all(), path, 'index')
    self._require((np.abs(images - 0.5) <= 0.5).all(), path, 'images')
    classes = (predictions >= 0) & (predictions < 2**31)
    self._require(classes.all(), path, 'predictions')
    self._keep(index, images, predictions)

  def _arrays(self, path: epath.Path, kinds: dict) -> dict[str, np.ndarray]:
    """Arrays of one of its files; UserError if it is damaged."""
    with self._with_remedy():
      return arrays.read_npz(path, kinds)

  @contextlib.contextmanager
  def _with_remedy(self):
    """Adds what to do to a UserError on one of its files."""
    try:
      yield
    except UserError as e:
      raise UserError(f'{e} (remove {self._folder} to start anew)') from e

  def _require(self, condition: bool | np.bool, path: epath.Path, what: str):
    """Raises UserError for an array that this evaluation cannot have written."""
    if not condition:
      raise UserError(
        f'{path} is damaged: {what} does not fit the rest; remove {self._folder} to '
        'start anew'
      )

  def check(self, num_attempts: int, image_shape: tuple[int, ...]) -> None:
    """Raises UserError if it is of more attempts, or of images of another shape."""
    self._require(self.attempt <= num_attempts, self._folder, 'the attempt')
    shapes = {image.shape for image in self.adversarial.values()}
    self._require(shapes <= {tuple(image_shape)}, self._folder, 'the shape of images')

  def begin(self, attempt: int) -> None:
    """Goes to an attempt; one that is under way stays where it is."""
    if self.attempt != attempt:
      self.attempt, self.done = attempt, 0

  def standing(self) -> np.ndarray:
    """Indices of the images that stood when this attempt began."""
    return np.flatnonzero((self.fallen == STANDING) | (self.fallen == self.attempt))

  def advance(
    self,
    index: np.ndarray,
    fell: np.ndarray,
    images: np.ndarray | None = None,
    predictions: np.ndarray | None = None,
    *,
    keep: int,
    write: bool,
  ) -> None:
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
    if images is not None and predictions is not None and keep.any():
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

  def warn(self, line: str) -> None:
    """Adds a warning, and logs it, if it is new."""
    if line not in self.warnings:
      self.warnings.append(line)
      logging.warning('%s', line)

  def _keep(self, index, images, predictions):
    self.adversarial |= dict(zip(index.tolist(), images, strict=True))
    self.predictions |= dict(zip(index.tolist(), predictions.tolist(), strict=True))

  def _batch_path(self, batch: int) -> epath.Path:
    return self._folder / f'adversarial-{batch:06}.npz'

  def _write(self, path: epath.Path, **content):
    """Writes a whole file, or nothing."""
    self._folder.mkdir(parents=True, exist_ok=True)
    workdirs.write_npz(path, **content)
