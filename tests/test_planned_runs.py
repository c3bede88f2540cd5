"""Points of tables: what is done, what runs, what failed, and what is needed."""

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from jaxrobust import sweep
from jaxrobust.config import classifier
from jaxrobust.config.tables import Preparation, Row, Table
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.reporting import planned_runs
from jaxrobust.runs import cli, workdir
from tests.helpers.results import protocol

DIGITS = 'experiments/digits.py'
SET = {'data.samples': '{workdir}/set/samples'}
PREPARATIONS = {
  'judge': Preparation('train', f'{DIGITS}:labeller'),
  'set': Preparation(
    'generate', 'experiments/digits_gaussian.py', {'labeller': '{workdir}/judge'}
  ),
}
TABLE = Table(
  'Digits',
  'accuracies',
  [
    Row('published', published={'clean': 1.0, 'robust': 1.0}),
    Row('real', DIGITS),
    Row('generated', DIGITS, SET | {'variant': 'half'}),
  ],
  'pgd-40',
  seeds=(0, 1),
)


@pytest.fixture
def found(tmp_path):
  return planned_runs.Maker(f'{tmp_path}/', PREPARATIONS).of_table(TABLE)


def claim(point):
  return workdir.claim(str(point.workdir), point.config)


def finish(point, *suites):
  folder = claim(point)
  if 'train' in point.programs:
    (folder / 'checkpoint.npy').touch()
  if 'generate' in point.programs:
    (folder / 'samples').mkdir()
    (folder / 'samples' / 'metadata.json').touch()
  for suite in suites:
    workdir.add_result(folder, protocol(point, suite), {'robust_accuracy': 0.5})


def test_preparations_then_rows_over_their_seeds(found, tmp_path):
  assert [(p.name, p.programs, p.needs) for p in found] == [
    ('judge', ('train',), ()),
    ('set', ('generate',), ('judge',)),
    ('digits_linf_wrn-10-1_real_seed-0', ('train', 'evaluate'), ()),
    ('digits_linf_wrn-10-1_real_seed-1', ('train', 'evaluate'), ()),
    ('digits_linf_wrn-10-1_set_half_seed-0', ('train', 'evaluate'), ('set',)),
    ('digits_linf_wrn-10-1_set_half_seed-1', ('train', 'evaluate'), ('set',)),
  ]
  assert found[1].config.labeller == f'{tmp_path}/judge'
  assert found[4].flags == [
    f'--workdir={tmp_path}/digits_linf_wrn-10-1_set_half_seed-0',
    f'--config={DIGITS}',
    f'--config.data.samples={tmp_path}/set/samples',
    '--config.seed=0',
    '--config.variant=half_seed-0',
  ]
  assert found[4].commands()[1][0][-1] == '--suite=pgd-40'


def test_what_is_chosen_brings_what_it_needs(found):
  names = lambda **how: [p.name for p in sweep.points_to_run(found, **how)]
  assert names(only='.*real_seed-1') == [found[3].name]
  assert names(only='.*half_seed-1') == ['judge', 'set', found[5].name]
  with pytest.raises(UserError, match=r"with --only='judge\|set'"):
    names(shard='0/2')
  finish(found[0])
  finish(found[1])
  assert names(shard='0/2') == ['judge', 'set', found[2].name, found[4].name]
  assert names(shard='0/4') == [found[2].name]


def test_done_is_what_left_its_result(found):
  run = found[2]
  assert run.state() == ('missing', '')
  claim(run)
  assert run.state() == ('unfinished', 'train is missing')
  finish(run, 'autoattack')
  assert run.state() == ('unfinished', 'evaluate is missing')
  finish(run, 'pgd:restarts=2')
  assert not run.is_finished()
  finish(run, 'pgd-40')
  assert run.state() == ('done', '') and run.is_finished()
  assert run.result()['protocol']['suite'] == 'pgd-40'
  for preparation in found[:2]:
    assert not preparation.is_finished()
    finish(preparation)
    assert preparation.state() == ('done', '')


def test_only_the_whole_evaluation_of_its_own_checkpoint_answers(found):
  run = found[2]
  finish(run)
  own = [{'name': 'pgd-40', **run.config.evaluation.attack.to_dict()}]
  for changes in (
    {'num_images': 8},
    {'split': 'validation'},
    {'checkpoint_sha256': 'of another'},
    {'attacks': own},
  ):
    workdir.add_result(run.workdir, protocol(run, **changes), {})
    assert run.result() is None, changes
  assert run._replace(suite='pgd').result() is not None
  finish(run, 'pgd-40')
  workdir.add_result(run.workdir, protocol(run, num_images=8), {})
  assert run.result()['robust_accuracy'] == 0.5
  few = run.config.copy_and_resolve_references().unlock()
  few.evaluation.num_images = 8
  assert run._replace(config=few).result()['protocol']['num_images'] == 8


def test_what_other_images_of_ones_own_gave_is_not_the_points(found, tmp_path):
  def write(seed, count=9):
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    arrays = {'train_images': images, 'train_labels': np.arange(count) % 3}
    arrays |= {'test_images': images, 'test_labels': np.arange(count) % 3}
    np.savez(tmp_path / 'own.npz', **arrays)
    planned_runs._checksum.cache_clear()  # Of images that another program replaced.

  write(0)
  config = classifier.get_config()
  config.dataset.name, config.dataset.path = 'npz', f'{tmp_path}/own.npz'
  config.dataset.validation_images, config.evaluation.num_images = 2, 5
  run = found[2]._replace(config=datasets.record(config))
  finish(run)
  of = {'dataset': 'own', 'num_images': 5}
  workdir.add_result(run.workdir, protocol(run, **of), {'a': 0})
  assert run.is_finished()  # Which images they were, earlier versions did not say.
  images, labels = datasets.of(run.config.dataset, 'test')
  judged = datasets.Split(images[:5], labels[:5]).checksum()
  workdir.add_result(run.workdir, protocol(run, **of, images=judged), {'a': 1})
  assert run.result()['a'] == 1
  for others in (1, 9), (0, 8):
    write(*others)
    assert run.result()['a'] == 0
  (tmp_path / 'own.npz').unlink()  # On a machine that has only the results.
  planned_runs._checksum.cache_clear()
  assert run.result()['a'] == 1


def test_what_was_made_of_another_preparation_is_not_the_rows(found):
  judge, set_, _, _, row, _ = found
  finish(set_)
  finish(row, 'pgd-40')
  assert row.state() == ('done', '')
  other = judge.config.copy_and_resolve_references().unlock()
  other.loss.beta = 5.0
  workdir.claim(str(judge.workdir), other.lock())
  said = 'of judge: its value → the planned one, loss.beta: 5.0 → 6.0'
  assert set_.state() == ('other', said)
  assert row.state() == ('other', f'of set: {said}')
  with pytest.raises(UserError, match='judge holds a run with another config'):
    sweep.refuse_others(found)


@pytest.mark.parametrize('content', ['{', '[]', '{"state": "running"}'])
def test_a_damaged_status_is_none(found, content):
  (claim(found[2]) / 'status.json').write_text(content)
  assert found[2].state() == ('unfinished', 'train is missing')


def test_a_run_of_another_config_is_not_the_rows(found):
  other = found[4].config.copy_and_resolve_references().unlock()
  other.data.samples = 'elsewhere/set/samples'  # The same set by another path.
  workdir.claim(str(found[4].workdir), other.lock())
  assert found[4].state()[0] == 'unfinished'
  other = found[5].config.copy_and_resolve_references().unlock()
  other.loss.beta = 5.0
  workdir.claim(str(found[5].workdir), other.lock())
  assert found[5].state() == (
    'other',
    'its value → the planned one, loss.beta: 5.0 → 6.0',
  )


def status(point, state, command, message='', host=None, pid=None):
  claim(point)
  (point.workdir / 'status.json').write_text(
    json.dumps(
      {
        'state': state,
        'message': message,
        'command': command,
        'host': platform.node() if host is None else host,
        'pid': os.getpid() if pid is None else pid,
      }
    )
  )
  return point.state()


def test_states_of_programs(found):
  run, train = found[2], ['train', *found[2].flags]
  assert status(run, 'running', train) == ('running', 'train')
  ended = subprocess.Popen([sys.executable, '-c', ''])
  ended.wait()
  assert status(run, 'running', train, pid=ended.pid) == ('interrupted', 'train')
  elsewhere = status(run, 'running', train, host='another', pid=ended.pid)
  assert elsewhere == ('running', 'train')
  assert status(run, 'failed', train, 'no data') == ('failed', 'train: no data')
  assert status(run, 'preempted', train)[0] == 'preempted'
  finish(run)
  # Now the evaluation is missing, so what became of the training is of no interest.
  assert status(run, 'failed', train) == ('unfinished', 'evaluate is missing')
  other = ['evaluate', *run.flags, '--suite=autoattack']
  assert status(run, 'failed', other) == ('unfinished', 'evaluate is missing')
  this = run.commands()[1][0]
  assert status(run, 'failed', this, 'bad') == ('failed', 'evaluate: bad')


def program(found, monkeypatch, end):
  """What status.json says after a program that claims a workdir and ends so."""
  run = found[2]

  def main(config, workdir):
    claim(run)
    during.append(status_of(run))
    end()

  during = []
  program = cli.Program('train', main)
  cli._run(program, [f'--workdir={run.workdir}'])
  assert during[0]['state'] == 'running' and during[0]['pid'] == os.getpid()
  return status_of(run)


def status_of(point):
  return json.loads((point.workdir / 'status.json').read_text())


def test_programs_say_how_they_end(found, monkeypatch):
  def fail(error):
    raise error

  done = program(found, monkeypatch, lambda: None)
  assert done['command'] == ['train', f'--workdir={found[2].workdir}']
  assert (done['state'], done['message']) == ('done', '')
  for error, state, message in (
    (UserError('one\nline'), 'failed', 'one line'),
    (cli.PreemptedError('again'), 'preempted', 'again'),
    (ZeroDivisionError('x / 0'), 'failed', 'ZeroDivisionError: x / 0'),
    (KeyboardInterrupt(), 'preempted', 'interrupted from the keyboard'),
  ):
    ended = program(found, monkeypatch, lambda error=error: fail(error))
    assert ended['state'] == state and ended['message'].endswith(message)
  assert not list(found[2].workdir.glob('*.tmp'))


def test_who_is_refused_does_not_touch_the_status_of_another_run(found, monkeypatch):
  def main(config, folder):
    workdir.claim(str(found[2].workdir), found[3].config)

  claim(found[2])
  assert cli._run(cli.Program('train', main), ['--workdir=x']) == cli.ERROR
  assert not (found[2].workdir / 'status.json').exists()
  claim(found[2])  # No program any more.
  assert not (found[2].workdir / 'status.json').exists()


@pytest.mark.parametrize(
  'row, message',
  [
    (Row('a', DIGITS, {'sed': 1}), 'digits.py: sed=1: there is no such field'),
    (Row('a', 'experiments/none.py'), 'no such file'),
    (Row('a', DIGITS, {'data.samples': '{workdir}/x/samples'}), 'is named x'),
  ],
)
def test_a_wrong_row_is_refused_in_one_line(tmp_path, row, message):
  with pytest.raises(UserError) as e:
    planned_runs.Maker(str(tmp_path), PREPARATIONS).of_table(TABLE._replace(rows=[row]))
  assert message in str(e.value) and '\n' not in str(e.value)


def test_rows_that_share_a_workdir_must_be_one_run(tmp_path):
  rows = [Row('a', DIGITS), Row('b', DIGITS)]
  make = planned_runs.Maker(str(tmp_path), {}).of_table
  assert len(make(TABLE._replace(rows=rows))) == 2
  rows[1] = Row('b', DIGITS, {'loss.beta': 1.0})
  with pytest.raises(UserError, match='two rows are both named .*_seed-0'):
    make(TABLE._replace(rows=rows))


def test_an_experiments_own_variant_stays(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(
    'from experiments import digits\n'
    'def get_config():\n'
    '  c = digits.get_config().unlock()\n'
    "  c.variant = 'mine'\n"
    '  return c\n'
  )
  table = TABLE._replace(rows=[Row('a', str(file))], seeds=(3,))
  (point,) = planned_runs.Maker(str(tmp_path), {}).of_table(table)
  assert point.name == 'digits_linf_wrn-10-1_real_mine_seed-3'


def test_tables_are_read_from_a_file(tmp_path):
  file = tmp_path / 'mine.py'
  with pytest.raises(UserError, match='use one of a'):
    planned_runs.find_table('b', {'a': 1})
  file.write_text('')
  with pytest.raises(UserError, match='defines no TABLES'):
    planned_runs.read_tables(str(file))
  with pytest.raises(UserError, match='none.py: no such file.*--tables=FILE'):
    planned_runs.read_tables('none.py')
  assert 'digits-linf' in planned_runs.read_tables()[0]
  assert 'digits-linf' in planned_runs.read_tables('experiments/paper.py')[0]


@pytest.mark.parametrize(
  'content, message',
  [
    ('TABLES = {', 'SyntaxError: '),
    ("TABLES = {'x': 3}", 'TABLES: x is 3, not a Table of'),
    ('TABLES = [1]', 'TABLES is no dict of Table'),
    ("TABLES = {'x': Table('', 'bars', [Row('a')])}", "table x: kind 'bars'; use one"),
    ("TABLES = {'x': Table('', 'accuracies', [])}", 'no list with a Row'),
    ("TABLES = {'x': Table('', 'accuracies', ['a'])}", 'rows: 0 is .a., not a Row'),
    (
      "TABLES = {'x': Table('', 'accuracies', [Row('a')], 'autoatack')}",
      "table x: suite 'autoatack': there is no attack",
    ),
    ('TABLES, PREPARATIONS = {}, {1: 2}', 'PREPARATIONS: 1 is 2, not a Preparation'),
  ],
)
def test_wrong_tables_are_told_in_one_line(tmp_path, content, message):
  file = tmp_path / 'mine.py'
  file.write_text(f'from jaxrobust.config.tables import Row, Table\n{content}\n')
  with pytest.raises(UserError, match=message) as e:
    planned_runs.read_tables(str(file))
  assert '\n' not in str(e.value)


def test_a_wrong_argument_of_a_rows_experiment_is_told_in_one_line(tmp_path):
  table = TABLE._replace(rows=[Row('a', f'{DIGITS}:foo,bar')])
  with pytest.raises(
    UserError, match=f"{DIGITS}:foo,bar: .* two data sources, 'foo' and 'bar'"
  ):
    planned_runs.Maker(str(tmp_path), {}).of_table(table)


def test_a_table_is_added_in_one_file(tmp_path):
  """With an experiment of one's own in the same file."""
  file = tmp_path / 'mine.py'
  file.write_text(
    'from jaxrobust.config import classifier\n'
    'from jaxrobust.config.tables import Row, Table\n'
    'def get_config(arg="real"):\n'
    "  c = classifier.get_config('mnist')\n"
    "  return classifier.with_arg(c, arg, 'wrn-10-1,real')\n"
    f"ROWS = [Row('mine', '{file}'), Row('theirs', 'digits')]\n"
    "TABLES = {'own': Table('My table', 'accuracies', ROWS, 'autoattack')}\n"
  )
  tables, preparations = planned_runs.read_tables(str(file))
  table = planned_runs.find_table('own', tables)
  points = planned_runs.Maker(str(tmp_path), preparations).of_table(table)
  assert [p.name for p in points] == [
    'mnist_linf_wrn-10-1_real_seed-0',
    'digits_linf_wrn-10-1_real_seed-0',
  ]
  assert points[0].commands()[0][0][:3] == [
    'train',
    f'--workdir={tmp_path}/mnist_linf_wrn-10-1_real_seed-0',
    f'--config={file}',
  ]
