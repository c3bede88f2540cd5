"""Robust training with generated data, in JAX and Haiku.

Gowal, Rebuffi, Wiles, Stimberg, Calian and Mann, "Improving Robustness using
Generated Data", NeurIPS 2021 (https://arxiv.org/abs/2110.09468).

What a notebook needs is here, imported when it is first asked for:

  load                  a trained classifier, from a run, a file or a released name
  evaluate_robustness   judges any jax function by AutoAttack and other suites
  attacks               every attack alone
"""

import importlib
from typing import TYPE_CHECKING

__version__ = '0.2.0.dev0'

# Public name → the module that has it.
_PUBLIC = {
  'Classifier': 'jaxrobust.models.classifier',
  'Outcome': 'jaxrobust.attacks.evaluation',
  'evaluate_robustness': 'jaxrobust.attacks.robustness',
  'load': 'jaxrobust.models.classifier',
}
__all__ = ['Classifier', 'Outcome', 'evaluate_robustness', 'load']

if TYPE_CHECKING:
  from jaxrobust.attacks.evaluation import Outcome
  from jaxrobust.attacks.robustness import evaluate_robustness
  from jaxrobust.models.classifier import Classifier, load


def __getattr__(name: str):
  """A public name, imported when it is first asked for."""
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *_PUBLIC})
