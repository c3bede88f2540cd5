"""Metrics of a run: `metrics.jsonl`, TensorBoard events and the log line."""

import collections
import io
import itertools
import json
import math
import sys
import time

import PIL.Image
from absl import logging
from etils import epath
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.files import json_files
from jaxrobust.runs import exits
from jaxrobust.runs import workdir as workdirs

FILE = 'metrics.jsonl'  # in a workdir

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
    self._path = folder / FILE
    lines, damaged = _read(self._path)
    self._lines = [x for x in lines if x['step'] <= step]
    self._events = None
    if parallel.is_writer():
      if damaged:
        _set_aside(self._path)
      self._flush()
      self._events = EventFileWriter(str(folder))

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Adds a line; figures that are not finite are written as null."""
    if not self._events:
      return
    if error := workdirs.removed():
      raise error
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

  def picture(self, step: int, image: PIL.Image.Image) -> None:
    """Adds a picture of samples to the events, and as a PNG file to `figures/`.

    Args:
      step: completed updates.
      image: of PIL, in RGB.
    """
    if not self._events:
      return
    buffer = io.BytesIO()
    image.save(buffer, 'png')
    path = self._path.parent / workdirs.FIGURES / f'samples-{step:08}.png'
    path.parent.mkdir(exist_ok=True)
    workdirs.write(path, buffer.getvalue())
    value = Summary.Value(tag='samples')
    value.image.width, value.image.height = image.size
    value.image.colorspace = 3
    value.image.encoded_image_string = buffer.getvalue()
    self._events.add_event(
      Event(step=step, wall_time=time.time(), summary=Summary(value=[value]))
    )

  def _flush(self):
    workdirs.write(self._path, ''.join(json.dumps(x) + '\n' for x in self._lines))

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._events:
      self._events.close()


def read(folder: epath.Path) -> list[dict]:
  """The lines of `metrics.jsonl`: a step, and figures of which some may be None.

  Lines that cannot be read are left out: a last one that was cut short, or others that
  were damaged, which are reported.
  """
  path = epath.Path(folder) / FILE
  lines, damaged = _read(path)
  if damaged:
    logging.warning('%s: %d damaged lines are left out', path, damaged)
  return lines


def _read(path: epath.Path) -> tuple[list[dict], int]:
  """The lines that can be read, and the number of whole ones that cannot."""
  if not path.exists():
    return [], 0
  json_files.require_file(path)
  lines, damaged = [], 0
  # Not splitlines(): text has more ends of lines than the file.
  *whole, rest = path.read_bytes().split(b'\n')
  for content in [*whole, rest]:
    try:
      line = json_files.parse(content, str(path))
      json_files.check(line, str(path), {'step': int})
      for value in line.values():
        json_files.check(value, str(path), (float, type(None)))
      lines.append(line)
    except UserError:
      damaged += content is not rest  # Which a kill cut short, or nothing.
  return lines, damaged


def _set_aside(path: epath.Path):
  """Copies a file with damaged lines to a name that is free."""
  names = (path.with_name(f'damaged-{i}-{path.name}') for i in itertools.count(1))
  aside = next(name for name in names if not name.exists())
  path.copy(aside)
  logging.warning('%s has damaged lines: it is kept as %s', path, aside)


def log_line(line: str) -> None:
  """Logs a line; to a caller from Python who has not turned logs on, on stderr."""
  if logging.level_info():
    logging.info('%s', line)
  else:
    exits.say(line)


class Progress:
  """Progress of a long loop: a bar in a terminal or a notebook, lines elsewhere."""

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
    self._seconds, self._done = seconds, done
    self._last = time.monotonic()
    # Times and units of the last log lines, which the speed is of: what took its time
    # long before, such as compiling, says nothing of the time left.
    self._marks = collections.deque(maxlen=10)
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

  def advance(self, count: int = 1, note: str = '') -> None:
    """Reports that `count` more units are done, with a note such as an accuracy."""
    self._done += count
    if self._bar:
      self._bar.set_postfix_str(note, refresh=False)
      self._bar.update(count)
      return
    now = time.monotonic()
    if not self._marks:  # The first units compile: the speed is of the others.
      self._marks.append((now, self._done))
    if parallel.is_writer() and (
      now - self._last >= self._seconds or self._done >= self._total
    ):
      self._last = now
      started, first = self._marks[0]
      self._marks.append((now, self._done))
      rate = (self._done - first) / max(now - started, 1e-9)
      remaining = self._total - self._done
      left = 'time left unknown'
      if rate or not remaining:
        left = f'{duration(remaining / rate if remaining else 0)} left'
      log_line(
        f'{self._what}: {self._done} of {self._total} {self._unit}'
        f'{f", {rate:.3g} a second" if rate else ""}, {left}'
        f'{f", {note}" if note else ""}'
      )

  def close(self) -> None:
    """Ends the bar's line."""
    if self._bar:
      self._bar.close()


def duration(seconds: float) -> str:
  """Seconds as h:mm:ss or m:ss."""
  minutes, seconds = divmod(int(round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def counted(count: int, what: str) -> str:
  """A number and what there are so many of: '1 device', '2 devices'."""
  return f'{count} {what}{"" if count == 1 else "s"}'
