"""JSON that others may have written: whole, finite and of the type that is expected."""

import json
import math
import os
from typing import Any

from etils import epath

from jaxrobust.errors import UserError

MAX_BYTES = 2**26  # 64 MiB; a config has some kilobytes, a table of runs some megabytes
MAX_DEPTH = 64
_TOO_LONG = f'{{}} has {{}} bytes; JSON of more than {MAX_BYTES} is not read'
_KINDS = {
  dict: 'an object',
  list: 'a list',
  str: 'text',
  int: 'a whole number',
  float: 'a number',
  bool: 'true or false',
  type(None): 'null',
}


def parse(content: bytes | str, name: str, expected: type = dict) -> Any:
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
    raise UserError(_TOO_LONG.format(name, len(content)))
  try:
    text = content.decode() if isinstance(content, bytes) else content
    value = json.loads(
      text, parse_int=_whole, parse_float=_finite, parse_constant=_finite
    )
    if '\\' in text:  # An escape may write half a character.
      json.dumps(value, ensure_ascii=False).encode()
    if _is_deep(value):
      raise RecursionError
  except RecursionError:
    raise UserError(
      f'{name} is not JSON as expected: it is nested too deeply'
    ) from None
  except ValueError as e:  # Not UTF-8, or not JSON.
    raise UserError(f'{name} is not JSON as expected: {e}') from e
  if not isinstance(value, expected):
    raise UserError(
      f'{name} is not as expected: it holds {_said(value)} and not '
      f'{_KINDS.get(expected, expected.__name__)}'
    )
  return value


def _is_deep(value) -> bool:
  """Whether values are nested deeper than any of ours, which may be walked into."""
  level = [value]
  for _ in range(MAX_DEPTH):
    level = [x for x in level if isinstance(x, dict | list)]
    level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
  return bool(level)


def read(path: epath.Path, expected: type = dict) -> Any:
  """The value that a file of JSON holds; raises as `parse`.

  Args:
    path: local or `gs://`.
    expected: type of the outermost value.
  """
  require_file(path)
  if (size := path.stat().length) > MAX_BYTES:
    raise UserError(_TOO_LONG.format(path, size))
  return parse(path.read_bytes(), str(path), expected)


def require_file(path: epath.Path) -> None:
  """Raises UserError for a folder, or a pipe, which would wait for its writer."""
  remote = '://' in str(path)
  if not (path.is_file() if remote else os.path.isfile(path)):
    raise UserError(f'{path} is not a file')


def check(value: Any, name: str, shape: Any) -> None:
  """Checks that a value of `parse` has the fields and types that are read of it.

  Args:
    value: of JSON.
    name: of the file, for the message; what is inside is named after it.
    shape: a type, of which float takes integers too, and numbers have at most 64 bits;
      a tuple of shapes, of which one must fit; `[shape]`, a list of such values; or
      `{field: shape}`, an object that has these fields, those with a name that ends in
      '?' only if they are there, and maybe others.

  Raises:
    UserError: in one line that names the place.
  """
  if isinstance(shape, dict):
    check(value, name, dict)
    for field, inner in shape.items():
      optional, field = field.endswith('?'), field.removesuffix('?')
      if field in value:
        check(value[field], f'{name}: {field}', inner)
      elif not optional:
        raise UserError(f'{name} is not as expected: it has no {field}')
  elif isinstance(shape, list):
    check(value, name, list)
    for number, item in enumerate(value):
      check(item, f'{name}: {number}', shape[0])
  elif not any(_is(value, kind) for kind in _alternatives(shape)):
    allowed = ' or '.join(_KINDS.get(x, x.__name__) for x in _alternatives(shape))
    raise UserError(
      f'{name} is not as expected: it is {_said(value)} and not {allowed}'
    )


def _alternatives(shape) -> tuple[type, ...]:
  return shape if isinstance(shape, tuple) else (shape,)


def _is(value: Any, kind: type) -> bool:
  """Whether a value is of a type; no truth value is a number."""
  if kind in (int, float) and isinstance(value, int):
    return not isinstance(value, bool) and -(2**63) <= value < 2**63
  return isinstance(value, kind)


def _said(value) -> str:
  """A value, or its kind where it may be long."""
  return (
    _KINDS[type(value)] if isinstance(value, dict | list | str) else f'{value!r:.40}'
  )


def _whole(text: str) -> int:
  """Refuses what has more than 64 bits, which no array holds."""
  if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**64:
    raise ValueError(f'{text[:25]} is too large a number')
  return number


def _finite(text: str) -> float:
  """Refuses Infinity, NaN and 1e999, which JSON does not know."""
  if not math.isfinite(number := float(text)):
    raise ValueError(f'{text[:20]} is not a finite number')
  return number
