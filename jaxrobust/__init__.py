"""Robust training with generated data, in JAX and Haiku.

Gowal, Rebuffi, Wiles, Stimberg, Calian and Mann, "Improving Robustness using
Generated Data", NeurIPS 2021 (https://arxiv.org/abs/2110.09468).

What a notebook needs is here, imported when it is first asked for:

  load                  a trained classifier, from a run, a file or a released name
  from_torch            the same from a network of PyTorch
  load_config           the config of an experiment, with other values
  train_classifier      trains one, on arrays or on a data set
  evaluate_robustness   judges any jax function by AutoAttack and other suites
  read_run              metrics, results and figures of a run
  attacks               every attack alone
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxrobust.runs.version import __version__ as __version__

# Public name → the module that has it. No module of the package has such a name, which
# would take its place when it is imported.
_PUBLIC = {
  'Classifier': 'jaxrobust.models.classifier',
  'Curve': 'jaxrobust.attacks.robustness',
  'Outcome': 'jaxrobust.attacks.evaluation',
  'Run': 'jaxrobust.reporting.run',
  'UserError': 'jaxrobust.errors',
  'evaluate_robustness': 'jaxrobust.attacks.robustness',
  'from_torch': 'jaxrobust.models.classifier',
  'load': 'jaxrobust.models.classifier',
  'load_config': 'jaxrobust.config.experiments',
  'read_run': 'jaxrobust.reporting.run',
  'train_classifier': 'jaxrobust.training.train_classifier',
}
__all__ = [
  'Classifier',
  'Curve',
  'Outcome',
  'Run',
  'UserError',
  'evaluate_robustness',
  'from_torch',
  'load',
  'load_config',
  'read_run',
  'train_classifier',
]

if TYPE_CHECKING:
  from jaxrobust.attacks.evaluation import Outcome
  from jaxrobust.attacks.robustness import Curve, evaluate_robustness
  from jaxrobust.config.experiments import load_config
  from jaxrobust.errors import UserError
  from jaxrobust.models.classifier import Classifier, from_torch, load
  from jaxrobust.reporting.run import Run, read_run
  from jaxrobust.training.train_classifier import train_classifier


def __getattr__(name: str) -> Any:
  """A public name, imported when it is first asked for."""
  if name == 'attacks':
    return importlib.import_module('jaxrobust.attacks')
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *_PUBLIC, 'attacks'})
