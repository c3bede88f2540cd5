"""The training loop: restore, step, log, evaluate, save, stop when asked to.

It knows a state that has `step`, a step function and batches, not what they mean:
classifiers and generators train by the same loop, so that both resume exactly.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError, UserError
from jaxrobust.runs import checkpoints, metrics, stop_requests, waiting

# What the compiler takes, in processor time.
_HINT_FOR_TPUS = 'minutes on a TPU, 3 to 12 for the networks of the paper'
_NOT_FINITE = (
  '{}: the last good checkpoint is kept; lower the learning rate in a new --workdir'
)


class Intervals(NamedTuple):
  """How long to train, and how often to write; all in updates.

  Attributes:
    num_steps: of the whole run.
    log: between two lines of metrics.
    checkpoint: between two checkpoints.
    evaluation: between two evaluations, each of which saves a checkpoint too; 0 if
      there are none.
  """

  num_steps: int
  log: int
  checkpoint: int
  evaluation: int = 0


class Loop:
  """A run in its workdir: its state, and what the loop writes.

  Attributes:
    start: updates that were done when the run was opened.
    state: on all local devices.
    checkpoints: of the run.
  """

  def __init__(
    self,
    folder: epath.Path,
    fresh: Any,
    *,
    keep: int,
    older: checkpoints.Layout | None = None,
  ):
    """Opens a run at its last checkpoint, or else at the beginning.

    Args:
      folder: the workdir.
      fresh: the state before the first update; `fresh.step` counts updates.
      keep: how many of the last checkpoints to keep.
      older: how an earlier version saved the state; None if all did as this one.

    Raises:
      UserError: if none of the checkpoints can be read, or processes disagree.
    """
    self.checkpoints = checkpoints.Checkpoints(folder, keep)
    restored = self.checkpoints.restore(fresh, older=older)
    state = fresh if restored is None else restored
    self.start = int(state.step)
    if restored is not None:
      logging.info('resuming after step %d', self.start)
    self.state = parallel.replicate(state)
    self._writer = metrics.Writer(folder, self.start)

  def train(
    self,
    step_fn: Callable,
    batches: Iterable,
    *,
    intervals: Intervals,
    batch_size: int,
    losses: Iterable[str],
    schedules: dict[str, Callable[[int], Any]],
    note_fn: Callable[[dict[str, float]], str],
    evaluate_fn: Callable | None = None,
    lower_fn: Callable[[Any], list[jax.stages.Lowered]] | None = None,
    picture_fn: Callable | None = None,
    name: str = 'train',
  ) -> None:
    """Trains from `start` to the last step.

    Args:
      step_fn: `(state, batch) -> (state, metrics)` on arrays of all devices; a metric
        is a figure, or a list of those of the step's parts, and may be absent from
        some of the steps.
      batches: of the steps from `start` on, trees of numpy arrays of this process.
      intervals: see Intervals.
      batch_size: images of an update, for the speed.
      losses: names of the metrics that must be finite.
      schedules: `completed updates -> figure`, such as the learning rate, by the name
        under which it is written.
      note_fn: `figures -> text` for the progress line.
      evaluate_fn: `state -> (figures, score)`, higher is better, None where it chooses
        no checkpoint; None for no evaluations.
      lower_fn: `state -> programs` that evaluations run, to be compiled while the step
        is; None where they are compiled when they are first run.
      picture_fn: `state -> picture` of what is learned so far, which the process that
        writes asks for at each checkpoint; None for none.
      name: of the run in progress lines.

    Raises:
      PreemptedError: after a checkpoint, because the process was asked to stop.
      UserError: for a loss or a parameter that is not finite.
    """
    preemption = stop_requests.StopRequests()
    progress = metrics.Progress(name, intervals.num_steps, 'steps', self.start)
    window = _Window(self.start, batch_size, losses)
    pending = None
    try:
      for step, batch in enumerate(batches, start=self.start + 1):
        aloud = contextlib.nullcontext()
        if step == self.start + 1:
          aloud = _compiling(lower_fn(self.state) if lower_fn else [])
        with aloud:
          self.state, current = step_fn(self.state, parallel.shard(batch))
        # Metrics of step t - 1 are fetched while step t runs.
        window.add(step - 1, pending)
        pending = current
        last = step == intervals.num_steps
        stop = not last and preemption.reached()
        due = lambda interval, step=step, last=last: step % interval == 0 or last
        evaluate = evaluate_fn is not None and due(intervals.evaluation)
        save = due(intervals.checkpoint) or evaluate or stop
        note = ''
        if save or due(intervals.log):
          window.add(step, pending)
          pending = None
          if not window.empty:
            figures = window.take(step)
            for figure, schedule_fn in schedules.items():
              figures[figure] = float(schedule_fn(step - 1))
            self._writer.write(step, figures)
            note = note_fn(figures)
        progress.advance(1, note)
        if save:
          started = time.monotonic()
          self._save(step, evaluate_fn if evaluate else None)
          if picture_fn and due(intervals.checkpoint) and parallel.is_writer():
            self._writer.picture(step, picture_fn(self.state))
          window.skip(time.monotonic() - started)
        if stop:
          self.checkpoints.wait()
          parallel.barrier('saved')
          raise PreemptedError(
            f'stopped after step {step}, which is saved: run the same command again'
          )
    finally:
      preemption.close()
      progress.close()
      self._writer.close()
      with waiting.waiting('waiting for the last checkpoint to be on disk'):
        self.checkpoints.wait()

  def _save(self, step: int, evaluate_fn: Callable | None):
    """Saves a checkpoint, with its score when an evaluation is due."""
    state = parallel.unreplicate(self.state)
    # The loss of this step is of the parameters before it.
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(state)):
      raise UserError(
        _NOT_FINITE.format(f'a parameter is not finite after step {step}')
      )
    score = None
    if evaluate_fn is not None:
      figures, score = evaluate_fn(self.state)
      self._writer.write(step, figures)
      logging.info(
        'step %d, evaluation: %s',
        step,
        ', '.join(f'{k} {v:.4f}' for k, v in figures.items()),
      )
    self.checkpoints.save(step, state, score)


@contextlib.contextmanager
def _compiling(evaluation: list[jax.stages.Lowered]):
  """Says so while the first call of a step compiles it, and compiles others beside it.

  These were lowered, so that processes trace in one order whatever their threads do.
  """
  hint = _HINT_FOR_TPUS if 'TPU' in parallel.kind_of_device() else ''
  what = f'compiling the training step{" and the evaluation" * bool(evaluation)}'
  failed = []

  def compile_evaluation():
    try:
      for program in evaluation:
        program.compile()
    except Exception as e:
      failed.append(e)

  # A step that fails does not wait for it.
  thread = threading.Thread(target=compile_evaluation, daemon=True)
  with waiting.waiting(what, hint=hint, first=2.0):
    thread.start()
    yield
    thread.join()
  if failed:
    raise failed[0]


class _Window:
  """Means of the metrics since the last log line, and the speed."""

  def __init__(self, first: int, batch_size: int, losses: Iterable[str]):
    """`first` updates were done at the last log line."""
    self._first, self._batch_size, self._losses = first, batch_size, tuple(losses)
    self._found = {}
    self._started = time.monotonic()

  @property
  def empty(self) -> bool:
    """Whether there are no metrics yet."""
    return not self._found

  def add(self, step: int, values):
    """Adds the metrics of `step` (or None); a loss that is not finite ends the run."""
    if values is None:
      return
    for name, value in parallel.unreplicate(values).items():
      value = float(np.mean(value))
      if name in self._losses and not np.isfinite(value):
        what = 'the loss' if name == metrics.TRAIN_LOSS else name
        raise UserError(_NOT_FINITE.format(f'{what} is {value} at step {step}'))
      total, count = self._found.get(name, (0.0, 0))
      self._found[name] = total + value, count + 1

  def skip(self, seconds: float):
    """Leaves time that was not spent on training out of the speed."""
    self._started += seconds

  def take(self, step: int) -> dict[str, float]:
    """The means, and images a second; starts the next window."""
    now = time.monotonic()
    figures = {name: total / count for name, (total, count) in self._found.items()}
    figures[metrics.SPEED] = (
      (step - self._first) * self._batch_size / max(now - self._started, 1e-9)
    )
    self._first, self._started = step, now
    self._found = {}
    return figures
