"""Fields of configs: of each its default, its meaning, its choices and its range.

A kind of config declares its fields as nested dicts of `field(…)`. All else follows
from them: the config that an experiment starts from, what a config from before a field
meant, checks, and the page that `--helpfull` prints.
"""

import textwrap
from typing import Any, NamedTuple

from ml_collections import config_dict

from jaxrobust.config import registries
from jaxrobust.errors import UnknownNameError, UserError

_DEFAULT = object()


class Field(NamedTuple):
  """A field of a config; see `field`."""

  default: Any
  about: str
  type: type
  choices: tuple[str, ...] | registries.Registry
  above: float | None
  least: float | None
  most: float | None
  meant: Any
  free: bool
  below: float | None


def field(
  default: Any,
  about: str,
  *,
  type: type | None = None,
  choices: tuple[str, ...] | registries.Registry = (),
  above: float | None = None,
  least: float | None = None,
  most: float | None = None,
  below: float | None = None,
  absent: Any = _DEFAULT,
  free: bool = False,
) -> Field:
  """Declares a field.

  Args:
    default: its value where an experiment sets no other; None where it then follows
      from others.
    about: what it is, with its unit.
    type: of its values; that of the default, if that is not None.
    choices: that it has; of a registry, what is registered when a config is checked.
    above, least, most, below: the range of a number, or of each of several.
    absent: what configs meant that were written before the field was made, or its
      default changed; the default, where left out.
    free: whether a run may be continued with another value: it says where, how often or
      what to look at, and not what is trained.
  """
  meant = default if absent is _DEFAULT else absent
  of = type or default.__class__
  return Field(default, about, of, choices, above, least, most, meant, free, below)


def make(fields: dict) -> config_dict.ConfigDict:
  """The config of all defaults, unlocked."""
  value = lambda x: config_dict.placeholder(x.type) if x.default is None else x.default
  return config_dict.ConfigDict(
    {k: make(x) if isinstance(x, dict) else value(x) for k, x in fields.items()}
  )


def flatten(tree: dict | config_dict.ConfigDict, prefix: str = '') -> dict[str, Any]:
  """Dotted paths → what stands there, of nested dicts or a config."""
  flat = {}
  for name, value in tree.items():
    path = f'{prefix}{name}'
    nested = isinstance(value, dict | config_dict.ConfigDict)
    flat |= flatten(value, f'{path}.') if nested else {path: value}
  return flat


def restore(tree: dict, fields: dict, prefix: str = '') -> config_dict.ConfigDict:
  """The config that nested dicts of JSON hold, unlocked.

  A field that is not there gets what its absence meant; one that is not declared is
  kept as it is.

  Args:
    tree: of JSON.
    fields: that are declared.
    prefix: of the dotted paths, for messages.

  Raises:
    UserError: for a value of another type than its field's, or a part that is none.
  """
  found = {}
  for name in tree | fields:
    path, known = f'{prefix}{name}', fields.get(name)
    value = tree.get(name, _DEFAULT)
    if isinstance(known, dict) or (known is None and isinstance(value, dict)):
      value = {} if value is _DEFAULT else value
      if not isinstance(value, dict):
        raise UserError(f'{path} is {value!r:.40}, and not a part with fields')
      found[name] = restore(value, known or {}, f'{path}.')
    elif known is None:
      found[name] = _unset(object) if value is None else _plain(value)
    else:
      value = known.meant if value is _DEFAULT else _typed(value, known, path)
      found[name] = _unset(known.type) if value is None else value
  return config_dict.ConfigDict(found)


def _unset(of: type):
  """A field that has a type of its own though no value, so that it can be set."""
  return config_dict.placeholder(of)


def _plain(value):
  return tuple(map(_plain, value)) if isinstance(value, list) else value


def _typed(value, known: Field, path: str):
  """A value of JSON as its field has it; UserError for one of another type."""
  value = _plain(value)
  is_number = _is_number(value)
  if value is None:
    fits = known.default is None or known.meant is None
  elif known.type is float:
    fits = is_number
    value = float(value) if fits else value
  elif known.type is tuple:
    fits = isinstance(value, tuple) and all(map(_is_number, value))
  else:
    fits = isinstance(value, known.type) and (is_number or known.type is not int)
  if not fits:
    raise UserError(f'{path} is {value!r:.40}, and not {_KINDS[known.type]}')
  return value


def _is_number(value) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'text',
  tuple: 'a list of numbers',
}


def check(config: config_dict.ConfigDict, fields: dict, prefix: str = '') -> None:
  """Raises UserError for the first field with a value that cannot be meant.

  Args:
    config: with all of the fields.
    fields: that are declared.
    prefix: of the dotted paths, for messages: '' of a whole config.
  """
  for name, known in fields.items():
    if isinstance(known, dict):
      check(config[name], known, f'{prefix}{name}.')
    else:
      check_value(config[name], known, f'config.{prefix}{name}')


def check_value(value: Any, known: Field, given: str) -> None:
  """Raises UserError for a value that a field cannot have; `given` names the field."""
  if value is None and known.default is None:
    return
  if known.choices and value not in known.choices:
    names = ', '.join(x or "''" for x in known.choices)
    raise UnknownNameError(
      f'{given} = {value!r}: use one of {names}'
      f'{registries.did_you_mean(value, known.choices)}'
    )
  for number in value if isinstance(value, tuple) else (value,):
    if not _is_within(number, known):
      unset = ', or leave it unset' if known.default is None else ''
      raise UserError(f'{given} = {value}: use {_range(known)}{unset}')


def _is_within(number, known: Field) -> bool:
  if (known.above, known.least, known.most, known.below) == (None,) * 4:
    return True
  return (
    _is_number(number)
    and (known.above is None or number > known.above)
    and (known.least is None or number >= known.least)
    and (known.most is None or number <= known.most)
    and (known.below is None or number < known.below)
  )


def _range(known: Field) -> str:
  """A range in words; '' for a field without one."""
  if known.below is not None:
    return f'{known.least} to below {known.below}'
  if known.most is None:
    if known.above is not None:
      return f'a number above {known.above}'
    return '' if known.least is None else f'{known.least} or more'
  if known.above is not None:
    return f'a number above {known.above} and up to {known.most}'
  return f'a number from {known.least} to {known.most}'


def describe(fields: dict) -> str:
  """The page of all fields, each with its default, its meaning and what it may be."""
  lines = []
  for path, known in flatten(fields).items():
    allowed = (
      f'one of {", ".join(x or repr("") for x in known.choices)}'
      if known.choices
      else _range(known)
    )
    lines.append(f'  --config.{path}={_shown(known.default)}')
    text = '; '.join(filter(None, (known.about, allowed)))
    lines.append(
      textwrap.fill(text, 80, initial_indent=6 * ' ', subsequent_indent=6 * ' ')
    )
  return '\n'.join(lines) + '\n'


def _shown(value) -> str:
  return f'"{value}"' if isinstance(value, tuple) else repr(value)


def nearest(config: config_dict.ConfigDict, path: str) -> str:
  """'; did you mean config.…?' for a path that is no field of a config, or ''.

  Args:
    config: or a part of one.
    path: dotted, without 'config.' before it.
  """
  paths = list(flatten(config))
  group, _, last = path.rpartition('.')
  same = [x for x in paths if x.rpartition('.')[2] == last]
  if len(same) == 1:
    return f'; did you mean config.{same[0]}?'
  # A group's name must not make its fields alike.
  names = [x.rpartition('.')[2] for x in paths if x.rpartition('.')[0] == group]
  dot = f'{group}.' if group else ''
  near = registries.did_you_mean(last, names).replace('mean ', f'mean config.{dot}')
  return near or registries.did_you_mean(path, paths, 0.8).replace(
    'mean ', 'mean config.'
  )


def override(
  config: config_dict.ConfigDict, values: dict[str, Any], given: str
) -> config_dict.ConfigDict:
  """A locked copy of a config with other values.

  Args:
    config: which is left as it is.
    values: dotted path → value.
    given: where the values stand, for messages.

  Raises:
    UserError: for a path that is no field, or a value of another type.
  """
  known = flatten(config)
  for path, value in values.items():
    if path not in known:
      raise UserError(
        f'{given}: {path}={value}: there is no such field'
        f'{nearest(config, path).replace("mean config.", "mean ")}'
      )
    try:
      config = replace(config, {path: value})
    except (KeyError, TypeError, ValueError) as e:
      raise UserError(
        f'{given}: {path}={value!r} is a {type(value).__name__}: use a value like '
        f'{known[path]!r}'
      ) from e
  return replace(config, {})


def replace(
  config: config_dict.ConfigDict, values: dict[str, Any]
) -> config_dict.ConfigDict:
  """A locked copy of a config with other values at dotted paths that it has."""
  same = config.copy_and_resolve_references().lock()
  same.update_from_flattened_dict(values)
  return same
