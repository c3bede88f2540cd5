"""Finds and reads the files of experiments, by name or by path.

They lie beside the package in a clone, in its folder `experiments`; in an installed
package, inside it. Nothing in the package imports one.
"""

import functools
import importlib.util
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust.config import fields, registries
from jaxrobust.config import overrides as texts
from jaxrobust.errors import UserError, one_line

_PACKAGE = pathlib.Path(__file__).parents[1]


def folder() -> pathlib.Path:
  """Where the package's experiments are."""
  inside = _PACKAGE / 'experiments'
  return inside if inside.is_dir() else _PACKAGE.parent / 'experiments'


def names() -> list[str]:
  """Names of the package's experiments."""
  found = {path.stem for path in folder().glob('*.py')}
  return sorted(
    x for x in found - {'base', 'paper'} if not x.startswith(('base_', '_'))
  )


def find(experiment: str) -> str:
  """The path of an experiment's file, from any folder.

  Args:
    experiment: a path, or the name of one of the package's experiments ('digits',
      'experiments/digits.py').

  Raises:
    UserError: if there is none, with the nearest name.
  """
  path = os.path.expanduser(experiment)
  if os.path.isfile(path):
    return path
  parent, name = os.path.split(experiment)
  here = folder() / f'{name.removesuffix(".py")}.py'
  if parent in ('', 'experiments') and here.is_file():
    return (
      os.path.relpath(here) if here.is_relative_to(pathlib.Path.cwd()) else str(here)
    )
  raise UserError(
    f'{experiment}: no such file, and no experiment of that name; give the path of a '
    f'file, or one of {", ".join(names())}'
    f'{registries.did_you_mean(here.stem, names())}'
  )


def load_file(file: str) -> types.ModuleType:
  """The module in a Python file; UserError if there is none, or it does not run."""
  path = find(file)
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  if spec is None or spec.loader is None:  # It does not end in .py.
    raise UserError(f'{file}: no file of Python, whose name ends in .py')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as e:  # Whatever a user's file may raise.
    raise UserError(f'{file}: {_said(e)}') from e
  return module


def load(experiment: str) -> config_dict.ConfigDict:
  """The locked config of an experiment, written `NAME[:ARG]` or `FILE.py[:ARG]`."""
  file, *arg = experiment.split(':', 1)
  module = load_file(file)
  if not hasattr(module, 'get_config'):
    raise UserError(f'{file} defines no get_config(): an experiment returns its config')
  try:
    return module.get_config(*arg).lock()
  except Exception as e:
    raise UserError(f'{experiment}: {_said(e)}') from e


def _said(error: Exception) -> str:
  """What an experiment's file raised, with its kind unless it is meant to be read."""
  text = one_line(error)
  return text if isinstance(error, UserError) else f'{type(error).__name__}: {text}'


def load_config(
  experiment: str, values: Mapping[str, Any] | None = None
) -> config_dict.ConfigDict:
  """The config of an experiment, with other values.

  Args:
    experiment: by name or path, with its argument, such as 'digits' or
      'cifar10_linf:wrn-28-10,ddpm'.
    values: under dotted paths, such as {'threat.epsilon': 8 / 255}; or as text, as
      flags have them: '8/255'.

  Returns:
    The config, locked.

  Raises:
    UserError: for an experiment that is absent or fails, a path that is no field, or a
      value of another type.
  """
  config, found = load(experiment), dict(values or {})
  known = fields.flatten(config)
  for path, value in found.items():
    if not isinstance(value, str) or path not in known:
      continue
    *parts, name = path.split('.')
    kind = functools.reduce(getattr, parts, config).get_type(name)
    found[path] = texts.parse(value, kind, f'{experiment}: {path}={value}')
  return fields.override(config, found, experiment)


def sweep_points(
  config: config_dict.ConfigDict, file: str
) -> list[tuple[str, dict, config_dict.ConfigDict]]:
  """The points that the sweep() of an experiment's file yields.

  Args:
    config: the experiment's, with the overrides common to all points.
    file: the experiment's file.

  Returns:
    Of each its name, its overrides and its config.

  Raises:
    UserError: without a sweep(), for an override that is no field or has another type,
      or if two points have the same experiment's name.
  """
  experiment = load_file(file)
  if not hasattr(experiment, 'sweep'):
    raise UserError(
      f'{file} defines no sweep(): yield pairs of a name and overrides from it, such '
      "as ('seed-1', {'seed': 1, 'variant': 'seed-1'})"
    )
  points, known = [], dict[str, str]()
  for name, overrides in experiment.sweep():
    point = fields.override(config, overrides, f'{file}, sweep(), {name}')
    run = configs.experiment_name(point)
    if run in known:
      raise UserError(
        f'{file}, sweep(): {known[run]} and {name} are both named {run}; '
        'give each a name of its own by the field variant'
      )
    known[run] = name
    points.append((name, overrides, point))
  return points
