"""Suites: which attacks judge a network, by name.

`autoattack`, `autoattack-plus` and `autoattack-rand` are the versions standard, plus
and rand of AutoAttack (Croce and Hein 2020) with their attacks, order and restarts; in
l1 the parameters of "Mind the box" (Croce and Hein 2021). `aa+mt` is what the authors
of "Improving Robustness using Generated Data" report: AutoPGD on the cross-entropy and
on DLR, 5 restarts each, and MultiTargeted. `pgd-40` is their in-training evaluation.
Any list of attacks is a suite too: `apgd-ce:restarts=5,square:num_queries=1000`.

An attack of your own joins them by one decorator, in a file of your own (an experiment
or a notebook), and has options as the others do:

>>> import dataclasses
>>> import jax
>>> from jaxrobust.attacks import norms, suites
>>> from jaxrobust.attacks.attack import Attack
>>> @suites.register('random-starts')
... @dataclasses.dataclass(frozen=True)
... class RandomStarts(Attack):
...   ball: norms.Ball
...   restarts: int = 100
...
...   def num_attempts(self, num_classes):
...     return self.restarts
...
...   def attempt(self, logits_fn, rngs, images, labels, index):
...     return self.ball.initialize(rngs, images)
>>> [(name, mine)] = suites.get('random-starts:restarts=7', norms.Linf(0.1))
>>> mine.num_attempts(num_classes=10)
7
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

from ml_collections import config_dict

from jaxrobust.attacks import apgd, fab, multitargeted, norms, objectives, pgd, square
from jaxrobust.attacks.attack import Attack
from jaxrobust.config import registries
from jaxrobust.errors import UnknownNameError, UserError

CLEAN = 'clean'  # without attacks
_AUTOATTACK = 'apgd-ce,apgd-t,fab-t,square'
SUITES = {
  CLEAN: '',
  'pgd-40': 'pgd',
  'autoattack': _AUTOATTACK,
  'autoattack-plus': 'apgd-ce:restarts=5,apgd-dlr:restarts=5,fab:restarts=5,square,'
  'apgd-t,fab-t',
  'autoattack-rand': 'apgd-ce:samples=20,apgd-dlr:samples=20',
  'aa+mt': 'apgd-ce:restarts=5,apgd-dlr:restarts=5,multitargeted',
}
# Where l1 differs. The other versions are not made for it: the published code runs
# them without the schedule of larger balls that APGD needs there.
_L1 = {'autoattack': 'apgd-ce:restarts=5,apgd-t:num_targets=5,fab-t,square'}
_NOT_IN_L1 = ('autoattack-plus', 'autoattack-rand')


def _pgd_40(ball: norms.Ball) -> pgd.PGD:
  """PGD-40 on the margin, as the released code evaluates while it trains."""
  if isinstance(ball, norms.Linf):
    rule, sizes, boundaries = 'adam', (0.1, 0.01, 0.0001), (20, 30)
  else:
    # Not published for other norms: 30/255 for 128/255, as in use elsewhere.
    rule = 'normalized' if isinstance(ball, norms.L2) else 'sparse'
    sizes, boundaries = (ball.epsilon * 30 / 128,), ()
  return pgd.PGD(ball, objectives.margin, pgd.STEP_RULES[rule], 40, sizes, boundaries)


# The package's own; `registries.ATTACKS` has those of others, too.
ATTACKS: dict[str, Callable[[norms.Ball], Attack]] = {
  'apgd-ce': apgd.APGD,
  'apgd-dlr': functools.partial(apgd.APGD, loss='dlr'),
  'apgd-t': functools.partial(apgd.APGD, loss='targeted_dlr'),
  'fab': functools.partial(fab.FAB, num_targets=0),
  'fab-t': fab.FAB,
  'square': square.Square,
  'multitargeted': multitargeted.MultiTargeted,
  'pgd': _pgd_40,
}


for _name, _make in ATTACKS.items():
  registries.ATTACKS.register(_name, _make)

# A decorator of an attack of your own: a dataclass that extends `Attack` and whose
# first field is `ball`, or a function from a ball to one. Its fields that are numbers
# with a default are its options.
register = registries.ATTACKS.register


def parse(suite: str) -> list[str]:
  """Checks a suite before its ball is known: every attack and option exists.

  Args:
    suite: as for `get`.

  Returns:
    Its attacks with their options, as they are named in results.

  Raises:
    UserError: for a name or an option that does not exist, with the choices.
  """
  return [name for name, _ in get(suite, norms.Linf(8 / 255))]


def get(suite: str, ball: norms.Ball) -> list[tuple[str, Attack]]:
  """The attacks of a suite.

  Args:
    suite: one of SUITES, or names of attacks with options, such as
      'apgd-ce:restarts=5:num_steps=50,square'.
    ball: where images may go.

  Returns:
    Pairs of a name and an attack, in the order in which they run.

  Raises:
    UserError: for a name or an option that does not exist.
  """
  if isinstance(ball, norms.L1):
    if suite in _NOT_IN_L1:
      raise UserError(
        f'suite {suite!r} is not made for l1: use autoattack, or a list of attacks'
      )
    suite = _L1.get(suite, suite)
  found = {}
  for item in filter(None, SUITES.get(suite, suite).split(',')):
    # Attacks of one kind draw other random numbers if their names differ.
    if item in found:
      raise UserError(f'suite {suite!r}: {item!r} is named twice; use its restarts')
    found[item] = _attack(suite, item, ball)
  randomized = [attack.randomized for attack in found.values()]
  if any(randomized) and not all(randomized):
    raise UserError(
      f'suite {suite!r} has attacks with samples, for randomised networks, and '
      'without: give all of them samples (apgd-ce, apgd-dlr and apgd-t have them)'
    )
  return list(found.items())


def from_config(
  settings: config_dict.ConfigDict, ball: norms.Ball, suite: str = ''
) -> tuple[str, list[tuple[str, Attack]]]:
  """The attacks by which a config has its network judged.

  Args:
    settings: the part `evaluation` of a config, with the fields suite and attack.
    ball: where images may go.
    suite: that takes the place of the config's.

  Returns:
    The suite's name in results, which for 'pgd' says how many steps
    `settings.attack` has, and pairs of a name and an attack, as `get`.

  Raises:
    UserError: as `get` and `attack_from_config`, or for randomised attacks, which no
      network of a config is made for.
  """
  suite = suite or settings.suite
  if suite == 'pgd':
    attack = attack_from_config(settings.attack, ball)
    suite = f'pgd-{attack.num_steps}'
    return suite, [(suite, attack)]
  attacks = get(suite, ball)
  if any(attack.randomized for _, attack in attacks):
    raise UserError(
      f'config.evaluation.suite = {suite!r} is for randomised networks, and none of '
      'the models is: use autoattack (for a network of your own, '
      'jaxrobust.attacks.robustness.evaluate_robustness)'
    )
  return suite, attacks


def protocol(
  settings: config_dict.ConfigDict, ball: norms.Ball, suite: str = ''
) -> dict:
  """What a result says of its attacks: the same for the same figures.

  Args:
    settings, ball, suite: as for `from_config`.

  Returns:
    JSON values: the suite's name in results, and the parameters of its attacks.
  """
  name, attacks = from_config(settings, ball, suite)
  said = [describe(*attack) for attack in attacks]
  if (suite or settings.suite) == 'pgd':  # Objective and step rule have names there.
    said = [{'name': name, **settings.attack.to_dict()}]
  return {'suite': name, 'attacks': json.loads(json.dumps(said))}


def _attack(suite: str, item: str, ball: norms.Ball) -> Attack:
  """An attack from its name and options."""
  name, *options = item.split(':')
  attacks = registries.ATTACKS
  if name in SUITES and name not in attacks:
    raise UserError(
      f'suite {suite!r}: {name!r} is a whole suite, which is given alone; what commas '
      f'join are attacks: {", ".join(attacks.names())}'
    )
  if name not in attacks:
    near = registries.did_you_mean(name, [*SUITES, *attacks.names()])
    if steps := re.fullmatch(r'pgd-?(\d+)', name):  # Another number is another attack.
      near = f'; did you mean pgd:num_steps={steps[1]}?'
    raise UnknownNameError(
      f'suite {suite!r}: there is no attack or suite {name!r}; use one of the suites '
      f'{", ".join(SUITES)}, or attacks, separated by commas: '
      f'{", ".join(attacks.names())}{near}'
    )
  attack = attacks.get(name)(ball)
  if not (isinstance(attack, Attack) and dataclasses.is_dataclass(attack)):
    raise UserError(
      f'attack {name!r} is a {type(attack).__name__}: make it a dataclass that extends '
      'jaxrobust.attacks.attack.Attack'
    )
  return dataclasses.replace(attack, **dict(_option(attack, name, o) for o in options))


def _option(attack: Any, name: str, option: str) -> tuple[str, int | float]:
  """An option `field=value` of an attack."""
  field, _, value = option.partition('=')
  fields = {
    f.name: type(getattr(attack, f.name))
    for f in dataclasses.fields(attack)
    if type(getattr(attack, f.name)) in (int, float)
  }
  if field not in fields:
    raise UserError(
      f'attack {name} has no option {option!r}: use field=value of {", ".join(fields)}'
      f'{registries.did_you_mean(field, fields)}'
    )
  try:
    number = fields[field](value)
  except ValueError as e:
    raise UserError(f'attack {name}: {option!r} is not a number') from e
  if field in ('rho', 'p_init', 'alpha_max', 'beta') and number > 1:
    raise UserError(f'attack {name}: {option!r}; use a number up to 1')
  if fields[field] is int and number < (0 if field == 'samples' else 1):
    raise UserError(f'attack {name}: {option!r}; use 1 or more')
  if not 0 <= number < math.inf or (number == 0 and fields[field] is float):
    raise UserError(f'attack {name}: {option!r}; use a number above 0')
  return field, number


def attack_from_config(config: config_dict.ConfigDict, ball: norms.Ball) -> pgd.PGD:
  """`pgd.from_config` for an attack that judges: it must move away from labels.

  Raises:
    UserError: as `pgd.from_config`, or if the objective wants probabilities.
  """
  attack = pgd.from_config(config, ball)
  if objectives.REFERENCES[config.objective] == 'probabilities':
    raise UserError(
      f'evaluation.attack.objective = {config.objective!r} does not know '
      'labels: use margin or cross_entropy'
    )
  return attack


def describe(name: str, attack: Any) -> dict:
  """An attack's parameters as JSON values, for the protocol of a result.

  Args:
    name: in the suite.
    attack: a dataclass that extends Attack.
  """
  # By type: an optax transformation is a tuple too, of functions.
  plain = lambda value: type(value) in (int, float, str, bool, tuple)
  fields = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}
  return {'name': name, **{k: v for k, v in fields.items() if plain(v)}}
