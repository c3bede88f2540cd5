"""The exceptions that programs turn into exit codes."""

import re


class UserError(ValueError):
  """Bad input: one line with the value, what is allowed and the remedy.

  Programs print it as `error: …` and exit with 1. Used from Python, it is a
  `ValueError` like any other.
  """


class UnknownNameError(UserError):
  """A name that nothing has registered; a file of the user's may be there to do it."""


class PreemptedError(Exception):
  """A checkpoint was written because somebody asked the program to stop."""


def one_line(error: Exception) -> str:
  """What an error of a library or of a user's file says, without a traceback in it."""
  text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
  text = re.sub(r"\\(['\"])", r'\1', text.replace('\\n', '\n'))
  lines = [x.strip() for x in text.splitlines() if x.strip('\'"\\ ')]
  if any('Traceback' in x for x in lines):
    lines = [lines[0], lines[-1]]
  line = ' '.join(lines)
  # A message with quotes that was quoted once more.
  return line[1:-1] if re.match('[\'"]{2}', line) else line
