"""Reads of small records anywhere in files, whether the system has cached them or not.

What is cached is copied at once. Of the rest the system first learns all, so that a
disk has many reads to do at a time, and then gives one after the other. Against files
that are mapped into memory this takes no page fault for each 4 KiB, which threads that
share a memory wait for each other to handle.
"""

import os
from collections.abc import Iterable
from typing import NamedTuple

_ONLY_CACHED = getattr(os, 'RWF_NOWAIT', 0)  # Linux


class Read(NamedTuple):
  """A record to read.

  Attributes:
    file: number of an open file.
    into: writable bytes, as many as are read.
    offset: in the file, in bytes.
  """

  file: int
  into: memoryview
  offset: int


def expect(file: int) -> None:
  """Has the system read what is asked of a file, and nothing around it."""
  if hasattr(os, 'posix_fadvise'):
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)


def read(wanted: Iterable[Read]) -> int | None:
  """Reads records; other threads run meanwhile.

  Args:
    wanted: the records.

  Returns:
    The file that ends before a record does, which is not read; None for no such file.
  """
  missed = [x for x in wanted if not _is_cached(x)]
  if hasattr(os, 'posix_fadvise'):
    for file, into, offset in missed:
      os.posix_fadvise(file, offset, len(into), os.POSIX_FADV_WILLNEED)
  for file, into, offset in missed:
    if os.preadv(file, (into,), offset) < len(into):
      return file
  return None


def _is_cached(wanted: Read) -> bool:
  """Reads a record if that takes no waiting; returns whether it did."""
  file, into, offset = wanted
  try:
    return bool(_ONLY_CACHED) and (
      os.preadv(file, (into,), offset, _ONLY_CACHED) == len(into)
    )
  except OSError:  # It would wait, or the file system does not say.
    return False
