"""Configs: plain values, each field declared once with its unit, choices and range.

There are three kinds: of a classifier's run (`classifier`), of a generator's
(`generator`) and of an analysis (`analysis`). Each module has the fields of its kind,
the config that an experiment starts from, and the checks. What experiments import is
here and in `tables`; `experiments` finds and reads their files.
"""

from jaxrobust.config.classifier import (
  Derived,
  check,
  experiment_name,
  ignored,
  resolve,
  without_seed,
)
from jaxrobust.config.records import (
  continued,
  describe,
  differences,
  fields_of,
  from_json,
  to_json,
  unset,
)

__all__ = [
  'Derived',
  'check',
  'continued',
  'describe',
  'differences',
  'experiment_name',
  'fields_of',
  'from_json',
  'ignored',
  'resolve',
  'to_json',
  'unset',
  'without_seed',
]
