"""The samples that are being drawn, before some of them become a sample set.

Files of equally many samples: `drawn/000000.npz` (images, classes drawn for), and
`labelled/000000.npz` (labels, classes and, where known, confidence). Each is written
whole or not at all, by whichever process has its turn, so that work goes on from the
files that are there. What is in a file depends on its number only.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.files import arrays
from jaxrobust.runs import metrics, workdir
from jaxrobust.samples import selection

_DRAWN, _LABELLED = 'drawn', 'labelled'
_ARRAYS = {  # Those that are there, and those that may be; as of `arrays.read_npz`.
  _DRAWN: ({'images': ('u', 4), 'classes': ('i', 1)}, {}),
  _LABELLED: ({'labels': ('i', 1), 'classes': ('i', 1)}, {'confidence': ('f', 1)}),
}
_REMEDY = 'remove it, and the same command makes it again'


class Draws:
  """The files in a workdir.

  Attributes:
    size: samples in a file.
  """

  def __init__(self, folder: epath.Path, rule: selection.Rule, draw_size: int):
    """Files of `draw_size` samples, or of rule.count where these are fewer."""
    self._folder, self._rule = folder, rule
    self.size = min(draw_size, rule.count)

  def num_needed(self, num_classes: int, max_draws_factor: float) -> tuple[int, bool]:
    """How many files are needed, by the labels there are.

    The number grows by rounds, each from the labels of the whole round before: it is
    the same wherever work was interrupted.

    Args:
      num_classes: K.
      max_draws_factor: gives up after so many times the candidates.

    Returns:
      (files, whether all of them are drawn and labelled, and enough).

    Raises:
      UserError: so many are not enough.
    """
    candidates = self._rule.count / self._rule.top_fraction
    files = lambda count: math.ceil(count / self.size - 1e-6)
    num_files, most = files(candidates), files(candidates * max_draws_factor)
    parallel.barrier('num_needed')  # What the others were writing is there.
    done = self._num_labelled()
    per_class = np.zeros(num_classes, int)
    counted = 0
    while num_files <= done:
      for number in range(counted, num_files):
        labels = self._labelled(number, num_classes)['labels']
        per_class += np.bincount(labels, minlength=num_classes)
      counted = num_files
      short, times = self._rule.shortfall(per_class)
      if not short.any():
        return num_files, True
      if num_files >= most:
        raise UserError(
          f'after {num_files * self.size} samples the labeller has found too few of '
          f'the classes {np.flatnonzero(short).tolist()} ({short.sum()} candidates are '
          'missing): go on in this --workdir with a higher '
          '--config.samples.max_draws_factor or --config.samples.selection=none, or '
          'use another --workdir for a better labeller (with '
          f'--config.fitted={self._folder}, which spares the fit) or generator'
        )
      # Of a class that is rare so far little is known: at most twice as many.
      num_files = min(math.ceil(num_files * min(times, 2)), most)
    return num_files, False

  def has_labels(self) -> bool:
    """Whether a file is labelled."""
    return any((self._folder / _LABELLED).glob('*.npz'))

  def draw(
    self, num_files: int, sample_fn: Callable, at_once: int, stop: Callable
  ) -> None:
    """Draws the files that are missing, this process its share of them.

    Args:
      num_files: of the whole run.
      sample_fn: `numbers int [n] -> images uint8 [n, H, W, C], classes int32 [n]`.
      at_once: samples at a time.
      stop: called before each of these times.
    """

    def open_file(number):
      def draw(rows):
        images, classes = sample_fn(number * self.size + rows)
        return {'images': images, 'classes': classes}

      return draw

    self._fill(_DRAWN, num_files, open_file, at_once, stop)

  def label(
    self, num_files: int, label_fn: Callable, at_once: int, stop: Callable
  ) -> None:
    """Labels the files that are not labelled, this process its share of them.

    Args:
      num_files: of the whole run.
      label_fn: `images, classes -> {'labels': int32 [n]}`, with their 'confidence'
        float32 [n] where it is known.
      at_once, stop: as of `draw`.

    Raises:
      UserError: a file is not drawn yet.
    """

    def open_file(number):
      drawn = self._read(_DRAWN, number)
      images, classes = drawn['images'], drawn['classes']
      return lambda rows: {
        'classes': classes[rows],
        **label_fn(images[rows], classes[rows]),
      }

    if missing := self._missing(_DRAWN, num_files):
      raise UserError(
        f'{self._path(_DRAWN, missing[0])} is absent ({len(missing)} of {num_files} '
        'are): run --stage=sample first'
      )
    self._fill(_LABELLED, num_files, open_file, at_once, stop)

  def choose(self, num_files: int, num_classes: int) -> tuple[Iterator[tuple], dict]:
    """Chooses among the samples of so many files.

    Returns:
      Batches for `sample_sets.write`, and the selection's description for its metadata,
      with the share of the chosen whose label is the class they were drawn for.
    """
    parts = [self._labelled(number, num_classes) for number in range(num_files)]
    for number, part in enumerate(parts):
      if ('confidence' in part) != ('confidence' in parts[0]):
        self._refuse(_LABELLED, number, 'differs from others in having a confidence')
    column = lambda name: np.concatenate([part[name] for part in parts])
    labels, classes = column('labels'), column('classes')
    confidence = column('confidence') if 'confidence' in parts[0] else None
    kept, described = self._rule.choose(labels, confidence, num_classes)
    if confidence is not None and (classes >= 0).all():
      agrees = labels[kept] == classes[kept]
      described['agreement_with_condition'] = float(agrees.mean())

    def batches():
      for number in range(num_files):
        start, stop = np.searchsorted(kept, np.arange(number, number + 2) * self.size)
        if start == stop:
          continue
        chosen = kept[start:stop]
        images = self._read(_DRAWN, number)['images'][chosen - number * self.size]
        rest = [] if confidence is None else [confidence[chosen]]
        yield images, labels[chosen], *rest

    return batches(), described

  def remove(self) -> None:
    """Removes all files."""
    for kind in (_DRAWN, _LABELLED):
      if (self._folder / kind).exists():
        (self._folder / kind).rmtree()

  def _fill(self, kind, num_files, open_file, at_once, stop):
    """Makes the missing files of a kind; `open_file(number)(rows)` gives arrays."""
    share = parallel.share(self._missing(kind, num_files))
    own = sum(number is not None for number in share)
    verb = {_DRAWN: 'sample', _LABELLED: 'label'}[kind]
    progress = metrics.Progress(verb, own * self.size, 'samples')
    (self._folder / kind).mkdir(parents=True, exist_ok=True)
    for number in share:
      part_fn = None if number is None else open_file(number)
      parts = []
      for start in range(0, self.size, at_once):
        stop()  # As often in every process: they agree on when to stop.
        if part_fn:
          rows = np.arange(start, min(start + at_once, self.size))
          parts.append(part_fn(rows))
          progress.advance(len(rows))
      if parts:
        columns = {x: np.concatenate([part[x] for part in parts]) for x in parts[0]}
        workdir.write(self._path(kind, number), arrays.npz_bytes(**columns))
    progress.close()

  def _path(self, kind, number):
    return self._folder / kind / f'{number:06d}.npz'

  def _read(self, kind, number):
    """The arrays of a file."""
    try:
      found = arrays.read_npz(self._path(kind, number), *_ARRAYS[kind])
    except UserError as error:
      raise UserError(f'{error} ({_REMEDY})') from None
    if any(len(column) != self.size for column in found.values()):
      self._refuse(kind, number, f'does not hold {self.size} samples')
    return found

  def _labelled(self, number, num_classes):
    """The arrays of a file of labels."""
    found = self._read(_LABELLED, number)
    labels = found['labels']
    if labels.min() < 0 or labels.max() >= num_classes:
      self._refuse(
        _LABELLED,
        number,
        f'has labels {labels.min()}..{labels.max()}, and {num_classes} classes allow '
        f'0..{num_classes - 1}',
      )
    return found

  def _refuse(self, kind, number, reason):
    raise UserError(f'{self._path(kind, number)} {reason}: {_REMEDY}')

  def _missing(self, kind, num_files):
    """Numbers of the files that are not there, the same in every process."""
    parallel.barrier(kind)  # What the others were writing is there.
    found = [n for n in range(num_files) if not self._path(kind, n).exists()]
    parallel.require_agreement(num_files - len(found))
    return found

  def _num_labelled(self):
    """Files labelled without a gap."""
    number = 0
    while self._path(_LABELLED, number).exists():
      number += 1
    return number
