"""Log lines while a program waits for one thing, so that it never seems to hang."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from jaxrobust.distributed import parallel
from jaxrobust.runs import metrics


@contextlib.contextmanager
def waiting(
  what: str, *, hint: str = '', first: float = 10.0, every: float = 10.0
) -> Iterator[Callable[[str], None]]:
  """Says what takes so long, and in the end how long it took; nothing if it is quick.

  Args:
    what: is done, such as 'compiling the training step'.
    hint: how long it may take, or why.
    first: seconds before the first line.
    every: seconds between further lines.

  Yields:
    `note(text)`: how far it is, for the next line.
  """
  started, over = time.monotonic(), threading.Event()
  how_far, lines = [hint], 0

  def passed():
    return metrics.duration(time.monotonic() - started)

  def speak():
    nonlocal lines
    while not over.wait(every if lines else first):
      text = f', {how_far[0]}' if how_far[0] else ''
      metrics.log_line(f'{what}: {passed()} so far{text}')
      lines += 1

  speaker = threading.Thread(target=speak, daemon=True)
  if parallel.is_writer():
    speaker.start()
  try:
    yield lambda text: how_far.__setitem__(0, text)
  finally:
    over.set()
    if speaker.is_alive():
      speaker.join()
    if lines:
      metrics.log_line(f'{what} took {passed()}')
