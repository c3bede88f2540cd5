"""Reads the files of experiments, which are no part of the package."""

import importlib.util
import os
import pathlib

from jaxrobust import config as configs
from jaxrobust.errors import UserError


def load_file(file: str):
  """The module in a Python file; UserError if there is none, or it does not run."""
  if not os.path.exists(file):
    raise UserError(f'{file}: no such file; run from the repository, or give its path')
  spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as e:  # Whatever a user's file may raise.
    raise UserError(f'{file}: {_one_line(e)}') from e
  return module


def load(experiment: str):
  """The locked config of an experiment, written `FILE.py` or `FILE.py:ARG`."""
  file, *arg = experiment.split(':', 1)
  module = load_file(file)
  try:
    return module.get_config(*arg).lock()
  except Exception as e:
    raise UserError(f'{experiment}: {_one_line(e)}') from e


def _one_line(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())}'


def sweep_points(config, file: str) -> list[tuple]:
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
  points, names = [], {}
  for name, overrides in experiment.sweep():
    point = config.copy_and_resolve_references().lock()
    try:
      point.update_from_flattened_dict(overrides)
    except (KeyError, TypeError, ValueError) as e:
      raise UserError(
        f'{file}, sweep(), {name}: {e}; experiments/base.py has every field'
      ) from e
    folder = configs.experiment_name(point)
    if folder in names:
      raise UserError(
        f'{file}, sweep(): {names[folder]} and {name} are both named {folder}; tell '
        'them apart by the field variant'
      )
    names[folder] = name
    points.append((name, overrides, point))
  return points
