"""What can be chosen by name: losses, attacks, generators, models and data sets.

A file of your own adds one with a decorator (or a call), wherever it stands, as long as
it is imported before the name is used; an experiment's file is:

  from jaxrobust.config import registries

  @registries.LOSSES.register('mine')
  def loss(...): ...

From then on `--config.loss.name=mine` is a choice like any other: checks, help and
messages know it. What is registered, the room that uses it says: `training.losses`,
`attacks.objectives`, `attacks.pgd`, `attacks.suites`, `generators`, `models` and
`config.dataset_info`.

The names of what the package brings stand here, with the module that registers each, so
that a config is checked without importing jax.
"""

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

from jaxrobust.errors import UnknownNameError, UserError


class Registry:
  """Things of one kind by name.

  Attributes:
    kind: what they are, for messages.
  """

  def __init__(self, kind: str, builtin: dict[str, str] | None = None):
    """`builtin` has the names of the package and the module that registers each."""
    self.kind = kind
    self._builtin = dict(builtin or {})
    self._items: dict[str, Any] = {}
    self._homes: dict[str, str] = {}

  def register(
    self, name: str, item: Any = None, *, frames: int = 1
  ) -> Callable[[Any], Any] | Any:
    """Adds a thing under a name: a decorator, or with `item` a call.

    Args:
      name: what configs and flags say. The same file may register it again, as a
        notebook's cell does that runs twice.
      item: the thing; left out, the decorated function or class is.
      frames: how many calls above this one the file stands that registers it.

    Raises:
      UserError: if the package or another file has registered that name.
    """
    caller = sys._getframe(frames).f_globals
    home = caller.get('__file__', caller['__name__'])
    owner = self._builtin.get(name, caller['__name__'])
    if owner != caller['__name__'] or self._homes.setdefault(name, home) != home:
      raise UserError(
        f'{self.kind} {name!r} is registered already, by '
        f'{self._homes.get(name, owner)}: choose another name'
      )

    def add(item):
      self._items[name] = item
      return item

    return add if item is None else add(item)

  def names(self) -> tuple[str, ...]:
    """All names: those of the package, then others in the order of registration."""
    return tuple(dict.fromkeys((*self._builtin, *self._items)))

  def __iter__(self):
    return iter(self.names())

  def __getitem__(self, name: str) -> Any:
    return self.get(name)

  def __contains__(self, name) -> bool:
    return name in self._builtin or name in self._items

  def get(self, name: str, given: str = '') -> Any:
    """The thing of a name; imports the module that registers it if need be.

    Args:
      name: as registered.
      given: how the name was given, such as 'config.loss.name', for the message.

    Raises:
      UserError: for a name that does not exist, with those that do.
    """
    self.check(name, given)
    if name not in self._items:
      importlib.import_module(self._builtin[name])
    return self._items[name]

  def check(self, name: str, given: str = '') -> None:
    """Raises UserError for a name that does not exist; see `get`."""
    if name not in self:
      raise UnknownNameError(
        f'{given or self.kind} = {name!r}: use one of {", ".join(self.names())}'
        f'{did_you_mean(name, self.names())}'
      )


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
  """'; did you mean …?' with the nearest of the names, or '' if none is near."""
  near = difflib.get_close_matches(str(name), names, n=1, cutoff=cutoff)
  return f'; did you mean {near[0]}?' if near else ''


def _all(module: str, *names: str) -> dict[str, str]:
  return dict.fromkeys(names, module)


LOSSES = Registry(
  'loss',
  _all(
    'jaxrobust.training.losses',
    *('standard', 'adversarial', 'trades', 'lbgat', 'uat'),
  ),
)
# Of `config.loss.divergence`.
DIVERGENCES = Registry(
  'divergence', _all('jaxrobust.training.losses', 'kl', 'improved_kl', 'squared')
)
OBJECTIVES = Registry(
  'objective',
  _all(
    'jaxrobust.attacks.objectives',
    *('cross_entropy', 'kl_divergence', 'squared_distance', 'margin'),
  ),
)
STEP_RULES = Registry(
  'step rule', _all('jaxrobust.attacks.pgd', 'adam', 'sign', 'normalized', 'sparse')
)
INITIALIZATIONS = Registry(
  'initialization', _all('jaxrobust.attacks.pgd', 'uniform', 'zero')
)
ATTACKS = Registry(
  'attack',
  _all(
    'jaxrobust.attacks.suites',
    *('apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square', 'multitargeted'),
    'pgd',
  ),
)
GENERATORS = Registry(
  'generator',
  {
    'gaussian': 'jaxrobust.generators.gaussian',
    'ddpm': 'jaxrobust.generators.ddpm',
    'edm': 'jaxrobust.generators.edm',
    'mixup': 'jaxrobust.generators.mixup',
    'vdvae': 'jaxrobust.generators.vdvae',
    'stylegan2': 'jaxrobust.generators.stylegan2',
    'biggan': 'jaxrobust.generators.biggan',
  },
)
# Beside wrn-DEPTH-WIDTH and preact-resnet-18.
MODELS = Registry('model')
DATASETS = Registry('data set')
