"""Metrics of a run: `metrics.jsonl`, TensorBoard events and the log line."""

import json
import math
import sys
import time

from absl import logging
from etils import epath
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError
from jaxrobust.runs import workdir as workdirs

# The names of figures, for what writes them and what reads them. Fractions in [0, 1].
TRAIN_LOSS = 'train/loss'
TRAIN_CLEAN = 'train/clean_accuracy'
TRAIN_ADV = 'train/adv_accuracy'
TRAIN_NATURAL = 'train/natural_accuracy'
LEARNING_RATE = 'train/learning_rate'
SPEED = 'time/images_per_second'
EVAL, EVAL_EMA = 'eval', 'eval_ema'  # of the parameters, and of their average


def eval_accuracy(parameters: str, attack: str = 'clean') -> str:
  """The name of an accuracy on the validation images.

  Args:
    parameters: EVAL or EVAL_EMA.
    attack: what the images went through, such as `pgd40`.
  """
  return f'{parameters}/{attack}_accuracy'


class Writer:
  """Writes metrics of a step to the workdir, from one process."""

  def __init__(self, folder: epath.Path, step: int):
    """Opens the files, and forgets what a run that was killed wrote after `step`."""
    self._path = folder / 'metrics.jsonl'
    self._lines = [x for x in read(folder) if x['step'] <= step]
    self._events = None
    if parallel.is_writer():
      self._flush()
      self._events = EventFileWriter(str(folder))

  def write(self, step: int, metrics: dict[str, float]):
    """Adds a line; figures that are not finite are written as null."""
    if not self._events:
      return
    finite = {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
    line = {'step': step, **finite}
    self._lines.append(line)
    if '://' in str(self._path):  # Object stores cannot append.
      self._flush()
    else:
      with self._path.open('a') as f:
        f.write(json.dumps(line) + '\n')
    values = [
      Summary.Value(tag=k, simple_value=v) for k, v in finite.items() if v is not None
    ]
    self._events.add_event(
      Event(step=step, wall_time=time.time(), summary=Summary(value=values))
    )

  def _flush(self):
    workdirs.write(self._path, ''.join(json.dumps(x) + '\n' for x in self._lines))

  def close(self):
    """Flushes and closes the files."""
    if self._events:
      self._events.close()


def read(folder: epath.Path) -> list[dict]:
  """The lines of `metrics.jsonl`; a last line that was cut short is left out."""
  path = epath.Path(folder) / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = []
  for line in path.read_text().splitlines():
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return lines


class Progress:
  """Progress of a long loop: a bar in a terminal or a notebook, lines elsewhere.

  The lines are logged; to a caller from Python who has not turned logs on they are
  written to stderr.
  """

  def __init__(
    self, what: str, total: int, unit: str, done: int = 0, seconds: float = 10.0
  ):
    """Starts the clock.

    Args:
      what: name of the loop.
      total: units of the whole loop.
      unit: name of a unit, in the plural.
      done: units done before now.
      seconds: least time between two log lines.
    """
    self._what, self._total, self._unit = what, total, unit
    self._seconds, self._done, self._first = seconds, done, None
    self._start = self._last = time.monotonic()
    self._bar = None
    in_notebook = 'ipykernel' in sys.modules
    if parallel.is_writer() and (sys.stderr.isatty() or in_notebook):
      if in_notebook:
        from tqdm.auto import tqdm  # By widgets.
      else:
        from tqdm import tqdm
      self._bar = tqdm(
        total=total, initial=done, desc=what, unit=f' {unit}', dynamic_ncols=True
      )

  def advance(self, count: int = 1, note: str = ''):
    """Tells that `count` more units are done, with a note such as an accuracy."""
    self._done += count
    if self._bar:
      self._bar.set_postfix_str(note, refresh=False)
      self._bar.update(count)
      return
    now = time.monotonic()
    if self._first is None:  # The first units compile: the speed is of the others.
      self._first, self._start = self._done, now
    if parallel.is_writer() and (
      now - self._last >= self._seconds or self._done >= self._total
    ):
      self._last = now
      rate = (self._done - self._first) / max(now - self._start, 1e-9)
      left = (self._total - self._done) / rate if rate else math.inf
      left = left if self._done < self._total else 0
      line = (
        f'{self._what}: {self._done} of {self._total} {self._unit}'
        f'{f", {rate:.3g} a second" if rate else ""}, {duration(left)} left'
        f'{f", {note}" if note else ""}'
      )
      if logging.level_info():
        logging.info('%s', line)
      else:
        print(line, file=sys.stderr, flush=True)

  def close(self):
    """Ends the bar's line."""
    if self._bar:
      self._bar.close()


class Watch:
  """Makes progress after which a program stops when it was asked to.

  All processes of a run advance equally often: they agree on when to stop.
  """

  def __enter__(self):
    self._preemption = parallel.Preemption()
    return self

  def __exit__(self, *exception):
    self._preemption.close()

  def progress(self, what: str, total: int, unit: str) -> Progress:
    """A Progress that raises PreemptedError when it has advanced."""
    bar = Progress(what, total, unit)
    advance = bar.advance

    def watched(count, note=''):
      advance(count, note)
      if self._preemption.reached():
        raise PreemptedError(
          f'stopped during {what}, the state is saved: run the same command again'
        )

    bar.advance = watched
    return bar


def duration(seconds: float) -> str:
  """Seconds as h:mm:ss or m:ss."""
  if not math.isfinite(seconds):
    return 'unknown time'
  minutes, seconds = divmod(int(round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
