"""Overrides of a config's fields, as text from a command line."""

import ast
import math
import os
import re
from collections.abc import Callable
from typing import Any

from ml_collections import config_dict

from jaxrobust.config import fields
from jaxrobust.errors import UserError

_NUMBER = r'[+-]?(?:\d[\d_]*\.?[\d_]*|\.\d+)(?:[eE][+-]?\d+)?'
_FRACTION = re.compile(rf'\s*({_NUMBER})\s*/\s*({_NUMBER})\s*')
_TRUE, _FALSE = ('true', 'yes', 't', '1', 'on'), ('false', 'no', 'f', '0', 'off')


def apply(config: config_dict.ConfigDict, overrides: dict[str, str]) -> None:
  """Sets fields of a config from text.

  Args:
    config: a ConfigDict, which is changed; locked or not.
    overrides: text under dotted paths, such as {'threat.epsilon': '8/255'}.

  Raises:
    UserError: for a path that is no field, with the nearest one, or a value of another
      type than the field's.
  """
  for path, text in overrides.items():
    part, name = _find(config, path)
    part[name] = parse(text, part.get_type(name), f'--config.{path}={text}')


def parse_boolean(text: str) -> bool:
  """true, yes, t, 1 and on, or their opposites; ValueError for anything else."""
  if text.lower() in _TRUE:
    return True
  if text.lower() in _FALSE:
    return False
  raise ValueError('use true or false')


def parse_float(text: str) -> float:
  """A finite number or a fraction of two, such as 8/255; ValueError for others."""
  try:
    if parts := _FRACTION.fullmatch(text):
      number = float(parts[1]) / float(parts[2])
    else:
      number = float(text)
  except (ValueError, ZeroDivisionError):
    number = math.nan
  if not math.isfinite(number):
    raise ValueError('use a number, such as 0.03 or 8/255')
  return number


def _find(config, path: str):
  """The part that a dotted path leads to, and the last name; UserError for no field."""
  part, *rest = config, *path.split('.')
  for name in rest[:-1]:
    if name not in part or not isinstance(part[name], config_dict.ConfigDict):
      raise _no_field(config, path)
    part = part[name]
  if rest[-1] not in part:
    raise _no_field(config, path)
  if isinstance(part[rest[-1]], config_dict.ConfigDict):
    raise UserError(
      f'--config.{path} names a group of fields: give one of '
      f'{", ".join(f"{path}.{name}" for name in sorted(part[rest[-1]]))}'
    )
  return part, rest[-1]


def _no_field(config, path: str) -> UserError:
  """What to say of a path that is no field: the nearest one, or what there is."""
  hint = fields.nearest(config, path).replace('mean config.', 'mean --config.')
  if not hint:
    hint = (
      f'; its groups and fields are {", ".join(sorted(config))}, and --helpfull '
      'explains all of them'
    )
  return UserError(f'--config.{path} is no field of this config{hint}')


def parse(text: str, kind: type, given: str) -> Any:
  """The value that text stands for in a field of a type.

  Args:
    text: such as '8/255'.
    kind: the field's type.
    given: what was written, for messages.

  Raises:
    UserError: if it stands for none of that type.
  """
  if text.lower() == 'none' and kind is not str:
    return None  # The checks of the config refuse it where a value is needed.
  parsers: dict[type, Callable[[str], Any]] = {
    bool: parse_boolean,
    int: _parse_integer,
    float: parse_float,
    tuple: _parse_tuple,
    str: os.path.expanduser,  # of what begins with ~ only
  }
  try:
    return parsers.get(kind, _parse_any)(text)
  except ValueError as e:
    raise UserError(f'{given}: {e}') from e


def _parse_integer(text: str) -> int:
  """1_000 and 1e6 are integers, too."""
  try:
    return int(text, 0)
  except ValueError:
    if re.fullmatch(_NUMBER, text) and float(text).is_integer():
      return int(float(text))
    raise ValueError('use an integer') from None


def _parse_tuple(text: str) -> tuple:
  """(1, 2), [1, 2], or one element."""
  value = _parse_any(text)
  return value if isinstance(value, tuple) else (value,)


def _parse_any(text: str):
  """A literal, in which fractions may stand for numbers; else the text itself."""
  try:
    return _value_of(ast.parse(text, mode='eval').body)
  except (ValueError, SyntaxError, RecursionError, MemoryError, ZeroDivisionError):
    return text


def _value_of(node):
  """What a node of a literal stands for."""
  match node:
    case ast.Tuple(elts=parts) | ast.List(elts=parts):
      return tuple(map(_value_of, parts))
    case ast.BinOp(left=a, op=ast.Div(), right=b):
      return _value_of(a) / _value_of(b)
    case _:
      return ast.literal_eval(node)
