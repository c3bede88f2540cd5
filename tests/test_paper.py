"""The paper's tables: every row resolves, builds and has a workdir of its own."""

import functools
import importlib
import json

import jax
import pytest

from experiments import paper
from jaxrobust import analyze
from jaxrobust import config as configs
from jaxrobust.attacks import norms, suites
from jaxrobust.data import pipeline
from jaxrobust.generators import checks
from jaxrobust.reporting import planned_runs, tables
from tests.helpers.experiment_steps import CASES, MODELS, load, step_shapes


@functools.cache
def found():
  """The points of every table."""
  maker = planned_runs.Maker('runs/paper', paper.PREPARATIONS)
  return {name: maker.of_table(table) for name, table in paper.TABLES.items()}


@functools.cache
def runs():
  """Every run by its name: one may stand in several tables, and is checked once."""
  return {point.name: point for points in found().values() for point in points}


def line(point, program):
  """What the sweep would run."""
  (command,) = (c for c, _ in point.commands() if c[0] == program)
  return planned_runs.command_line(command)


@pytest.mark.parametrize('name', paper.TABLES)
def test_every_row_resolves_and_is_judged_by_a_known_suite(name):
  table = paper.TABLES[name]
  for point in found()[name]:
    if 'train' in point.programs:
      derived = configs.resolve(point.config)
      config, size = point.config, point.config.data.batch_size
      for devices in (1, 8, 32 if size == 1024 else 2):
        pipeline.mix_counts(
          size,
          derived.real_fraction,
          config.data.real_repeats,
          {'devices': devices, 'groups': size // config.model.batch_norm_group},
        )
    if 'evaluate' in point.programs:
      ball = norms.get(point.config.threat.norm, point.config.threat.epsilon)
      assert point.suite == table.suite and suites.get(point.suite, ball)
      assert configs.experiment_name(point.config) == point.workdir.name
    if 'generate' in point.programs:
      checks.check(point.config)
    if 'analyze' in point.programs:
      analyze.check(point.config)
  assert len({row.name for row in table.rows}) == len(table.rows)
  assert table.kind in tables.COLUMNS


def test_one_workdir_has_one_config_in_all_tables():
  for points in found().values():
    for point in points:
      assert not configs.differences(runs()[point.name].config, point.config, ignore=())


def test_what_a_row_needs_stands_before_it():
  for name, points in found().items():
    names = [p.name for p in points]
    assert len(set(names)) == len(names)
    for place, point in enumerate(points):
      assert set(point.needs) <= set(names[:place]), name
  assert [p.name for p in found()['digits-linf'] if 'evaluate' not in p.programs] == [
    'digits_labeller',
    'digits_gaussian',
    'digits_ddpm',
  ]


# What is compiled or has a shape of its own. Networks, the files' defaults, baselines
# and what followed are built in test_experiments.
def _kind(config):
  tree = json.loads(configs.to_json(config))
  parts = ('augment', 'loss', 'attack', 'ema', 'threat', 'training')
  assert config.model.name in MODELS
  return json.dumps([tree['dataset']['name'], *(tree[k] for k in parts)])


@functools.cache
def new_kinds():
  """Of each table the first runs whose step is of a kind that none before had."""
  seen = {_kind(load(file, f'{model},ddpm')) for file, model in CASES}
  elsewhere = [p.name for t in ('baselines', 'follow-ups') for p in found()[t]]
  first = {}
  for name, points in found().items():
    for point in points:
      if 'train' in point.programs and point.name not in elsewhere:
        kind = _kind(point.config)
        if kind not in seen:
          first.setdefault(name, []).append(point)
        seen.add(kind)
  return first


@pytest.mark.parametrize('name', paper.TABLES)
def test_the_whole_step_of_every_kind_of_row_builds(name):
  for point in new_kinds().get(name, []):
    config = point.config.copy_and_resolve_references().unlock()
    config.model.name = 'wrn-10-1'
    before, after, metrics = step_shapes(config)
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert shapes(before) == shapes(after), point.name
    assert 'train/loss' in metrics


def test_rows_bring_kinds_of_their_own():
  names = [point.name for points in new_kinds().values() for point in points]
  assert 'cifar10_linf_wrn-70-16_ddpm-100m_cutmix_seed-0' in names and len(names) > 10


def test_lines_of_the_digits():
  run = runs()['digits_linf_wrn-10-1_gaussian_real-0.25_seed-1']
  assert line(run, 'train') == (
    'jaxrobust train --workdir=runs/paper/digits_linf_wrn-10-1_gaussian_'
    'real-0.25_seed-1 --config=digits --config.data.samples=runs/paper/'
    'digits_gaussian/samples --config.data.real_fraction=0.25 --config.seed=1 '
    '--config.variant=real-0.25_seed-1'
  )
  assert line(run, 'evaluate').endswith('--suite=pgd-40')
  assert line(runs()['digits_ddpm'], 'generate') == (
    'jaxrobust generate --workdir=runs/paper/digits_ddpm '
    '--config=digits_ddpm '
    '--config.labeller=runs/paper/digits_labeller'
  )


def rows(name):
  return {row.name: row.published for row in paper.TABLES[name].rows}


@pytest.mark.parametrize(
  'name, before, after, percent',
  [
    (
      'cifar10-linf',
      'Gowal et al. 2020, WRN-70-16',
      'WRN-70-16, 100M DDPM, CutMix',
      15.68,
    ),
    ('cifar10-l2', 'Gowal et al. 2020, WRN-70-16', 'WRN-70-16, 1M DDPM', 5.11),
    ('cifar100-linf', 'Gowal et al. 2020, WRN-70-16', 'WRN-70-16, 1M DDPM', 11.52),
    ('svhn-linf', 'WRN-28-10, real images', 'WRN-28-10, DDPM', 7.16),
    ('tiny-imagenet-linf', 'WRN-28-10, real images', 'WRN-28-10, DDPM', 23.65),
  ],
)
def test_the_gains_that_the_paper_prints_follow_from_its_numbers(
  name, before, after, percent
):
  gain = rows(name)[after]['robust'] / rows(name)[before]['robust'] - 1
  assert round(100 * gain, 2) == percent
  assert f'{percent} %' in paper.TABLES[name].note


def test_numbers_agree_with_the_experiments_docstrings():
  """Two places say what was published."""
  for table in paper.TABLES.values():
    for row in table.rows:
      if row.config and 'clean' in row.published:
        file = row.config.split(':')[0]
        page = importlib.import_module(f'experiments.{file}').__doc__
        assert '{clean:.2f} / {robust:.2f}'.format(**row.published) in page


def test_published_shares_sum_to_a_hundred():
  for row in paper.TABLES['complementarity'].rows:
    shares = [v for k, v in row.published.items() if k.startswith('nearest')]
    assert row.published.keys() <= tables.COLUMNS['neighbours'].keys()
    assert sum(shares) == pytest.approx(100) or len(shares) < 3


def test_nothing_published_belongs_to_the_digits():
  for name, table in paper.TABLES.items():
    if name.startswith('digits'):
      assert not any(row.published for row in table.rows)
