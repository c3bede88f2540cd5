"""JSON that others may have written: whole, finite and of the type that is expected."""

import json
import math

from jaxrobust.errors import UserError

MAX_BYTES = 2**26  # 64 MiB; a config has some kilobytes, a table of runs some megabytes


def parse(content: bytes | str, name: str, expected: type = dict):
  """The value that JSON holds.

  Args:
    content: of the file, UTF-8 if bytes.
    name: of the file, for the message.
    expected: type of the outermost value.

  Returns:
    The value. Its numbers are finite, its text can be written as UTF-8.

  Raises:
    UserError: for anything else, in one line that names the file.
  """
  if len(content) > MAX_BYTES:
    raise UserError(
      f'{name} has {len(content)} bytes; JSON of more than {MAX_BYTES} is not read'
    )
  try:
    text = content.decode() if isinstance(content, bytes) else content
    value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    if '\\' in text:  # An escape may write half a character.
      json.dumps(value, ensure_ascii=False).encode()
  except RecursionError:
    raise UserError(
      f'{name} is not JSON as expected: it is nested too deeply'
    ) from None
  except ValueError as e:  # Not UTF-8, not JSON, or an integer of thousands of digits.
    raise UserError(f'{name} is not JSON as expected: {e}') from e
  if not isinstance(value, expected):
    kinds = {dict: 'an object', list: 'a list', str: 'text'}
    raise UserError(
      f'{name} is not as expected: it holds {kinds.get(type(value), repr(value))[:40]} '
      f'and not {kinds.get(expected, expected.__name__)}'
    )
  return value


def _finite(text: str) -> float:
  """Refuses Infinity, NaN and 1e999, which JSON does not know."""
  if not math.isfinite(number := float(text)):
    raise ValueError(f'{text[:20]} is not a finite number')
  return number
