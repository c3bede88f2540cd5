"""Rivals that take turns: each in a process of its own, in alternating order.

So what else the machine does meets all of them. A benchmark gives a function of its
module, `make(rival, case) -> (tasks, size)`, which runs in the rival's process: what is
timed by its name, and the number of parameters, which is asserted to be that of all.
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


class Task(NamedTuple):
  """What is timed.

  Attributes:
    fn: does it once, and waits for its end.
    times: how often a turn does it.
    warm: how often it is done after the first call, before all turns.
  """

  fn: Callable[[], Any]
  times: int = 1
  warm: int = 1


class Times(NamedTuple):
  """Of a rival at a task; all are pairs of seconds, by the clock and of processors.

  Attributes:
    first: of the first call, which compiles.
    warm: of the last call before the turns.
    turns: of each turn.
  """

  first: tuple[float, float]
  warm: tuple[float, float]
  turns: list[tuple[float, float]]


def parser(
  doc: str, choices: Iterable | None, cases: Sequence[str], rounds: int, threads: int
) -> argparse.ArgumentParser:
  """The command line of a benchmark, with its defaults."""
  found = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  found.add_argument('--rounds', type=int, default=rounds)
  found.add_argument('--threads', type=int, default=threads)
  found.add_argument('--cases', nargs='+', choices=choices, default=cases)
  return found


def installed(rivals: Iterable[str]) -> list[str]:
  """Those that can run here; says so where PyTorch's cannot."""
  if importlib.util.find_spec('torch'):
    return list(rivals)
  print('PyTorch is not installed (pip install torch): without its rivals')
  return [rival for rival in rivals if not rival.startswith('torch')]


def serve(pipe, make: Callable, rival: str, case: Any, threads: int | None) -> None:
  """Sends (size, first and warm times of each task); then the times of turns asked for.

  What is raised is sent, too, as text.
  """
  try:
    if threads:
      os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
      os.environ['OMP_NUM_THREADS'] = str(threads)
      os.environ['JAX_NUM_CPU_DEVICES'] = '1'
      if rival.startswith('torch'):
        import torch

        torch.set_num_threads(threads)
    tasks, size = make(rival, case)
    before = {}
    for name, task in tasks.items():
      first = warm = _seconds(task.fn)
      for _ in range(task.warm):
        warm = _seconds(task.fn)
      before[name] = first, warm
    pipe.send((size, before))
    while name := pipe.recv():
      pipe.send(_seconds(tasks[name].fn, tasks[name].times))
  except Exception as e:
    pipe.send(f'{type(e).__name__}: {e}')
    raise


def _seconds(fn: Callable, times: int = 1) -> tuple[float, float]:
  start = time.perf_counter(), time.process_time()
  for _ in range(times):
    fn()
  return time.perf_counter() - start[0], time.process_time() - start[1]


class Rival:
  """A rival in its process."""

  def __init__(self, make: Callable, name: str, case: Any, threads: int | None = None):
    """Starts the process; arguments as of `measure`."""
    context = multiprocessing.get_context('spawn')
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(
      target=serve, args=(theirs, make, name, case, threads), daemon=True
    )
    self._process.start()
    theirs.close()  # So that its end is noticed here.

  def ready(self, seconds: float | None = None) -> tuple[Any, dict[str, tuple]]:
    """(size, first and warm times of each task), when it has them.

    Raises:
      TimeoutError: if that takes longer.
      RuntimeError: for what was raised there, or if the process ended.
    """
    return self._receive(seconds)

  def turn(self, task: str, seconds: float | None = None) -> tuple[float, float]:
    """Times of a turn; raises as `ready` does."""
    self._pipe.send(task)
    return self._receive(seconds)

  def close(self, kill: bool = False) -> None:
    """Ends the process."""
    if kill:
      self._process.kill()
    else:
      self._pipe.send('')
    self._process.join()

  def _receive(self, seconds: float | None):
    if not self._pipe.poll(seconds):
      raise TimeoutError
    try:
      found = self._pipe.recv()
    except EOFError as e:
      self._process.join()
      raise RuntimeError(f'ended with code {self._process.exitcode}') from e
    if isinstance(found, str):
      raise RuntimeError(found)
    return found


def measure(
  make: Callable, names: Sequence[str], case: Any, threads: int, rounds: int
) -> tuple[dict[str, dict[str, Times]], Any]:
  """Lets rivals take turns.

  Args:
    make: as at the top.
    names: of the rivals.
    case: of the benchmark, for `make`.
    threads: of each.
    rounds: in each of which every rival has a turn at every task.

  Returns:
    Times by task and rival, and the size.
  """
  rivals, sizes, found = {}, [], {}
  for name in names:
    rivals[name] = Rival(make, name, case, threads)
    size, before = rivals[name].ready()
    sizes.append(size)
    for task, (first, warm) in before.items():
      found.setdefault(task, {})[name] = Times(first, warm, [])
  assert all(size == sizes[0] for size in sizes), f'networks of other sizes: {sizes}'
  for index in range(rounds):
    for task, times in found.items():
      for name in names[:: 1 if index % 2 == 0 else -1]:
        times[name].turns.append(rivals[name].turn(task))
  for rival in rivals.values():
    rival.close()
  return found, sizes[0]


def spread(values: Sequence[float], form: str) -> str:
  """Median (least … greatest)."""
  return (
    f'{statistics.median(values):{form}} ({min(values):{form}} … {max(values):{form}})'
  )


def ratios(theirs: Times, ours: Times) -> list[str]:
  """The rival's time over ours, of the turns of a round; then by processor time."""
  pairs = list(zip(theirs.turns, ours.turns, strict=True))
  return [
    f'{spread([a[index] / b[index] for a, b in pairs], ".2f")} x{kind}'
    for index, kind in enumerate(('', ' in processor time'))
  ]
