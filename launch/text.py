"""Words as lines: for a terminal, and for bash to read again."""

from __future__ import annotations

import os
import shlex
import sys


def printable(text: str) -> str:
  """The text in one line, without what a terminal would obey."""
  return ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode() for c in text
  )


def say(text: str):
  """Prints a line to standard error."""
  print(printable(text), file=sys.stderr, flush=True)


def shown(word: str) -> str:
  """A word as bash reads it, in one line: control characters are escapes."""
  if word.isprintable():
    return shlex.quote(word)
  return "$'" + ''.join(map(_escaped, word)) + "'"


def _escaped(c):
  if c in "\\'":
    return f'\\{c}'
  if c.isprintable():
    return c
  return ''.join(f'\\x{byte:02x}' for byte in os.fsencode(c))
