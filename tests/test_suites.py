"""Suites: the attacks, their order and their numbers as published."""

import doctest
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict

from jaxrobust.attacks import (
  apgd,
  fab,
  multitargeted,
  norms,
  objectives,
  pgd,
  square,
  suites,
)
from jaxrobust.attacks.evaluation import Evaluator
from jaxrobust.config import experiments, registries
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError

LINF, L2, L1 = norms.Linf(8 / 255), norms.L2(0.5), norms.L1(12.0)
each_ball = pytest.mark.parametrize('ball', [LINF, L2, L1], ids=['linf', 'l2', 'l1'])


def attacks(suite, ball=LINF):
  return [attack for _, attack in suites.get(suite, ball)]


def names(suite, ball=LINF):
  return [name.split(':')[0] for name, _ in suites.get(suite, ball)]


@pytest.mark.parametrize('ball', [LINF, L2], ids=['linf', 'l2'])
def test_autoattack_is_the_published_standard_version(ball):
  assert names('autoattack', ball) == ['apgd-ce', 'apgd-t', 'fab-t', 'square']
  cross_entropy, targeted, fab_t, squares = attacks('autoattack', ball)
  assert cross_entropy == apgd.APGD(ball, 'cross_entropy', num_steps=100, restarts=1)
  assert targeted == apgd.APGD(
    ball, 'targeted_dlr', num_steps=100, restarts=1, num_targets=9
  )
  assert isinstance(fab_t, fab.FAB)
  assert (fab_t.num_steps, fab_t.num_targets, fab_t.restarts) == (100, 9, 1)
  assert isinstance(squares, square.Square)
  assert (squares.num_queries, squares.p_init, squares.restarts) == (5000, 0.8, 1)


def test_autoattack_in_l1_has_more_restarts_and_fewer_targets():
  assert names('autoattack', L1) == ['apgd-ce', 'apgd-t', 'fab-t', 'square']
  cross_entropy, targeted, fab_t, squares = attacks('autoattack', L1)
  assert (cross_entropy.restarts, cross_entropy.num_steps) == (5, 100)
  assert (targeted.restarts, targeted.num_targets) == (1, 5)
  assert (fab_t.restarts, fab_t.num_targets) == (1, 9)
  assert squares.num_queries == 5000


@pytest.mark.parametrize('ball', [LINF, L2], ids=['linf', 'l2'])
def test_autoattack_plus_is_the_published_version(ball):
  assert names('autoattack-plus', ball) == [
    'apgd-ce',
    'apgd-dlr',
    'fab',
    'square',
    'apgd-t',
    'fab-t',
  ]
  found = attacks('autoattack-plus', ball)
  assert [a.restarts for a in found] == [5, 5, 5, 1, 1, 1]
  assert [getattr(a, 'loss', None) for a in found] == [
    'cross_entropy',
    'dlr',
    None,
    None,
    'targeted_dlr',
    None,
  ]
  assert found[3].num_queries == 5000
  assert found[4].num_targets == found[5].num_targets == 9


@pytest.mark.parametrize('ball', [LINF, L2], ids=['linf', 'l2'])
def test_autoattack_rand_averages_twenty_draws(ball):
  assert names('autoattack-rand', ball) == ['apgd-ce', 'apgd-dlr']
  for attack in attacks('autoattack-rand', ball):
    assert (attack.samples, attack.restarts, attack.num_steps) == (20, 1, 100)
    assert attack.randomized
  assert not any(a.randomized for a in attacks('autoattack', ball))


@each_ball
def test_aa_mt_is_what_the_paper_reports(ball):
  assert names('aa+mt', ball) == ['apgd-ce', 'apgd-dlr', 'multitargeted']
  cross_entropy, dlr, multi = attacks('aa+mt', ball)
  for attack, loss in ((cross_entropy, 'cross_entropy'), (dlr, 'dlr')):
    assert attack == apgd.APGD(ball, loss, num_steps=100, restarts=5)
  assert multi == multitargeted.MultiTargeted(
    ball, num_steps=200, restarts=10, num_targets=9
  )


@pytest.mark.parametrize(
  ('ball', 'rule', 'sizes', 'boundaries'),
  [
    (LINF, 'adam', (0.1, 0.01, 0.0001), (20, 30)),
    (norms.L2(128 / 255), 'normalized', (30 / 255,), ()),
    (norms.L1(12.8), 'sparse', (3.0,), ()),
  ],
)
def test_pgd_40(ball, rule, sizes, boundaries):
  ((name, attack),) = suites.get('pgd-40', ball)
  assert name == 'pgd' and attack.step_rule is pgd.STEP_RULES[rule]
  assert attack.objective is objectives.margin
  assert (attack.num_steps, attack.restarts) == (40, 1)
  assert attack.step_sizes == pytest.approx(sizes)
  assert attack.step_boundaries == boundaries


def suites_in(ball):
  """The names of the suites that are made for a ball."""
  absent = ('autoattack-plus', 'autoattack-rand') if ball == L1 else ()
  return [name for name in suites.SUITES if name not in absent]


@pytest.mark.parametrize('suite', ['autoattack-plus', 'autoattack-rand'])
def test_versions_that_are_not_made_for_l1(suite):
  with pytest.raises(UserError, match='is not made for l1: use autoattack'):
    suites.get(suite, L1)


def test_randomised_and_other_attacks_do_not_mix():
  with pytest.raises(UserError, match='give all of them samples'):
    suites.get('apgd-ce:samples=20,square', LINF)


@each_ball
def test_every_suite_and_attack_knows_its_ball(ball):
  assert suites.get('clean', ball) == [] and suites.get('', ball) == []
  for suite in [*suites_in(ball), *suites.ATTACKS]:
    assert all(attack.ball == ball for attack in attacks(suite, ball)), suite


def test_a_list_of_attacks_with_options():
  suite = 'apgd-ce:restarts=5:num_steps=50:rho=0.5,square:num_queries=1000,apgd-ce'
  (first, a), (second, b), (third, c) = suites.get(suite, L2)
  assert (first, second, third) == tuple(suite.split(','))
  assert a == apgd.APGD(L2, num_steps=50, restarts=5, rho=0.5)
  assert b == square.Square(L2, num_queries=1000)
  assert c == apgd.APGD(L2)
  assert isinstance(a.restarts, int) and isinstance(a.rho, float)


def test_options_may_be_given_to_each_attack():
  assert attacks('apgd-t:num_targets=3')[0].num_targets == 3
  assert attacks('apgd-dlr:samples=0')[0].samples == 0
  assert attacks('multitargeted:restarts=2')[0].restarts == 2
  assert attacks('pgd:num_steps=7')[0].num_steps == 7


@pytest.mark.parametrize(
  ('suite', 'words'),
  [
    ('autoatack', ["'autoatack'", 'autoattack-plus', 'multitargeted']),
    ('apgd-ce,clean', ["'clean' is a whole suite", 'square']),
    ('apgd-ce,squares', ["'squares'", 'use one of the suites']),
    ('apgd-ce:step=5', ["no option 'step=5'", 'num_steps, restarts']),
    ('apgd-ce:ball=5', ["no option 'ball=5'"]),
    ('apgd-ce:loss=dlr', ["no option 'loss=dlr'"]),
    ('pgd:objective=3', ["no option 'objective=3'"]),
    ('apgd-ce:restarts', ["'restarts' is not a number"]),
    ('apgd-ce:restarts=', ["'restarts=' is not a number"]),
    ('apgd-ce:restarts=two', ["'restarts=two' is not a number"]),
    ('square:p_init=much', ["'p_init=much' is not a number"]),
    ('apgd-ce:num_steps=0', ["'num_steps=0'", 'use 1 or more']),
    ('apgd-ce:restarts=-3', ["'restarts=-3'", 'use 1 or more']),
    ('apgd-ce:samples=-1', ["'samples=-1'"]),
    ('square,apgd-ce,square', ["'square' is named twice", 'restarts']),
  ],
)
def test_errors_are_one_line_with_the_remedy(suite, words):
  with pytest.raises(UserError) as e:
    suites.get(suite, LINF)
  assert '\n' not in str(e.value)
  for word in words:
    assert word in str(e.value)


@pytest.mark.parametrize('option', ['p_init=0', 'p_init=-1', 'p_init=nan'])
def test_fractions_are_above_0(option):
  with pytest.raises(UserError, match=re.escape(option)):
    suites.get(f'square:{option}', LINF)


@each_ball
def test_describe_is_json_that_says_all_numbers(ball):
  for suite in suites_in(ball):
    for name, attack in suites.get(suite, ball):
      found = json.loads(json.dumps(suites.describe(name, attack)))
      assert found['name'] == name and 'ball' not in found
      assert found['restarts'] == attack.restarts
  apgd_t = suites.describe('apgd-t', attacks('apgd-t', ball)[0])
  assert apgd_t == {
    'name': 'apgd-t',
    'loss': 'targeted_dlr',
    'num_steps': 100,
    'restarts': 1,
    'num_targets': 9,
    'rho': 0.75,
    'samples': 0,
  }


@pytest.fixture
def evaluation():
  """The part `evaluation` of a config, as far as suites read it."""
  attack = dict(
    objective='margin',
    step_rule='sign',
    num_steps=3,
    step_sizes=(0.1,),
    step_boundaries=(),
    initialization='uniform',
    restarts=2,
  )
  return config_dict.ConfigDict(dict(suite='pgd', attack=attack))


def test_attack_from_config_judges_labels(evaluation):
  config = evaluation.attack
  attack = suites.attack_from_config(config, LINF)
  assert attack.objective is objectives.margin and attack.restarts == 2
  config.objective = 'kl_divergence'
  with pytest.raises(UserError, match="'kl_divergence' does not know labels"):
    suites.attack_from_config(config, LINF)


def test_the_attacks_of_a_config_and_what_results_say_of_them(evaluation):
  name, [(same, attack)] = suites.from_config(evaluation, LINF)
  assert name == same == 'pgd-3' and attack.num_steps == 3
  (said,) = suites.protocol(evaluation, LINF)['attacks']
  # As lists, which is how results are read again.
  assert said['step_sizes'] == [0.1] and said['step_rule'] == 'sign'
  assert said['name'] == suites.protocol(evaluation, LINF)['suite'] == 'pgd-3'
  found = suites.protocol(evaluation, L2, 'apgd-ce:num_steps=7')
  name, [(same, attack)] = suites.from_config(evaluation, L2, 'apgd-ce:num_steps=7')
  assert found == {'suite': name, 'attacks': [suites.describe(same, attack)]}
  assert attack.ball == L2 and found['attacks'][0]['num_steps'] == 7
  evaluation.suite = 'clean'
  assert suites.protocol(evaluation, LINF) == {'suite': 'clean', 'attacks': []}
  evaluation.suite = 'autoattack-rand'
  with pytest.raises(UserError, match='randomised networks.*use autoattack'):
    suites.from_config(evaluation, LINF)


def test_a_suite_is_checked_before_its_ball_is_known():
  assert suites.parse('pgd-40') == ['pgd']
  assert suites.parse('apgd-ce:restarts=2,square') == ['apgd-ce:restarts=2', 'square']
  with pytest.raises(UserError, match='did you mean autoattack') as e:
    suites.parse('autoatack')
  assert 'multitargeted' in str(e.value) and '\n' not in str(e.value)
  with pytest.raises(UserError, match='did you mean pgd:num_steps=20'):
    suites.parse('pgd-20')  # PGD-40 would be another protocol.


MINE = """
import dataclasses
import jax.numpy as jnp
from jaxrobust.attacks import norms, suites
from jaxrobust.attacks.attack import Attack

@suites.register('brighten')
@dataclasses.dataclass(frozen=True)
class Brighten(Attack):
  ball: norms.Ball
  share: float = 1.0
  restarts: int = 1

  def num_attempts(self, num_classes):
    return self.restarts

  def attempt(self, logits_fn, rngs, images, labels, index):
    return jnp.clip(images + self.share * self.ball.epsilon, 0, 1)

def get_config():
  return {'seed': 0}
"""


@pytest.fixture
def registry(monkeypatch):
  """Forgets afterwards what a test registers."""
  for field in ('_items', '_homes'):
    known = dict(getattr(registries.ATTACKS, field))
    monkeypatch.setattr(registries.ATTACKS, field, known)
  return registries.ATTACKS


def test_an_attack_of_a_file_outside_joins_the_suites(registry, tmp_path):
  """An experiment's file alone adds it: by name, with options, in results."""
  file = tmp_path / 'mine.py'
  file.write_text(MINE)
  experiments.load_file(str(file))
  with pytest.raises(UserError, match='brighter.*did you mean brighten'):
    suites.get('brighter', LINF)
  suite = suites.get('brighten:share=0.5:restarts=2', norms.Linf(0.2))
  [(name, mine)] = suite
  assert suites.describe(name, mine) == {'name': name, 'share': 0.5, 'restarts': 2}
  with pytest.raises(UserError, match='no option .*use field=value of share, restarts'):
    suites.get('brighten:epsilon=3', LINF)
  with pytest.raises(UserError, match="no option 'restart=1'.*did you mean restarts"):
    suites.get('apgd-ce:restart=1', LINF)
  threshold = lambda _, x: jnp.stack(
    [jnp.full(len(x), 0.5), x.mean(axis=(1, 2, 3))], axis=-1
  )
  images = np.linspace(0.3, 0.5, 8, dtype=np.float32).repeat(4).reshape(8, 2, 2, 1)
  evaluator = Evaluator(threshold, suite, batch_size=8)
  outcome = evaluator(parallel.replicate([np.zeros(1)]), images, np.zeros(8, int))
  # Half of 0.2 brighter is brighter than 0.5.
  np.testing.assert_array_equal(outcome.robust, images[:, 0, 0, 0] < 0.4 - 1e-6)
  assert 0 < outcome.robust.sum() < 8


def test_what_is_no_attack_is_refused(registry):
  suites.register('thing')(lambda ball: 3)
  with pytest.raises(UserError, match="'thing' is a int: make it a dataclass"):
    suites.get('thing', LINF)
  with pytest.raises(UserError, match="'square' is registered already"):
    suites.register('square')


def test_the_example_of_an_own_attack_holds(registry):
  assert doctest.testmod(suites).failed == 0
