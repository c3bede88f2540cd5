"""How a program ends: its exit codes, its last line, and its streams."""

import contextlib
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

DONE, ERROR, PREEMPTED, INTERRUPTED, CRASHED = 0, 1, 42, 130, 134
UNREAD = 141  # what a shell calls a program that SIGPIPE ended: `… | head -1`


def exit_with(program: Callable[[], int]) -> NoReturn:
  """Runs a program and ends this process with the code that it returns.

  Args:
    program: raises nothing that it can name; prints to the standard streams, which
      need not be open, nor read to their end.
  """
  open_closed_streams()
  try:
    code = program()
  except BrokenPipeError:
    if not is_unread():
      raise
    code = UNREAD
  leave(code)


def leave(code: int) -> NoReturn:
  """Ends this process at once, its streams flushed.

  Threads of libraries are not waited for: those of orbax wait for minutes for a disk
  that has failed.
  """
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)


def say(line: str) -> None:
  """Prints to stderr, if anybody reads it."""
  with contextlib.suppress(OSError, ValueError):
    print(line, file=sys.stderr, flush=True)


def is_unread() -> bool:
  """Whether nobody reads what this process prints any more."""
  poll = select.poll()
  poll.register(1, 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


def open_closed_streams() -> None:
  """Leads streams that were closed, as by `>&-`, to the null device.

  Else the next file that is opened would be taken for them, and written into.
  """
  for number, name in enumerate(('stdin', 'stdout', 'stderr')):
    if (stream := getattr(sys, name)) is None:
      null = os.open(os.devnull, os.O_RDWR)  # It takes the lowest number that is free.
      stream = os.fdopen(null, 'w' if number else 'r')
      setattr(sys, name, stream)
    if number:  # A name may have letters that the terminal's encoding lacks.
      stream.reconfigure(errors='backslashreplace')
