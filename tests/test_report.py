"""Reports: seeds together, ours beside the published, and what is not there."""

import csv
import io
import json
import os
import platform

import numpy as np
import pytest
from etils import epath

from experiments import digits, paper
from experiments.base_table import Row, Table
from jaxrobust import evaluate, report
from jaxrobust.errors import UserError
from jaxrobust.reporting import (
  figures,
  planned_runs,
  runs_table,
  table_status,
  tables,
)
from jaxrobust.runs import workdir
from tests.helpers.results import protocol as protocol_of

DIGITS = 'experiments/digits.py'


def add_run(folder, name, accuracies, checkpoint='a', suite='pgd-40', **overrides):
  config = digits.get_config().unlock()
  config.update_from_flattened_dict(overrides)
  run = workdir.claim(str(folder / name), config)
  for accuracy in accuracies:
    protocol = {
      'suite': suite,
      'norm': 'linf',
      'epsilon': 0.2,
      'num_images': 797,
      'split': 'test',
      'seed': config.seed,
      'checkpoint_sha256': checkpoint,
    }
    workdir.add_result(
      run, protocol, {'clean_accuracy': 0.9, 'robust_accuracy': accuracy}
    )


@pytest.fixture
def folder(tmp_path):
  add_run(tmp_path, 'a', [0.6])
  add_run(tmp_path, 'b', [0.5], checkpoint='b', seed=1, variant='seed-1')  # of a sweep
  add_run(tmp_path, 'c', [0.1, 0.7], **{'loss.beta': 5.0})  # evaluated again
  add_run(tmp_path, 'd', [], **{'model.name': 'wrn-16-1'})
  add_run(tmp_path, 'e', [], **{'loss.name': 'standard'})
  (tmp_path / 'notes').mkdir()
  return epath.Path(tmp_path)


def test_rows(folder):
  lines = runs_table.markdown(runs_table.find(folder)).splitlines()[2:]
  ours = '| digits_linf_wrn-10-1_real (loss.beta={}) | real |'
  tail = '| pgd-40, linf 0.2 | 797 test |'
  # 55 ± sqrt(2 * 5^2 / 1): the sample standard deviation of 60 and 50 is 7.07.
  assert lines == [
    f'{ours.format(6.0)} 2 | 90.00 ± 0.00 | 55.00 ± 7.07 {tail}',
    f'{ours.format(5.0)} 1 | 90.00 | 70.00 {tail}',
    '| digits_linf_wrn-16-1_real | real | 1 | – | – | not evaluated | – |',
    '| digits_standard_wrn-10-1_real | real | 1 | – | – | not evaluated | – |',
  ]


def test_a_run_that_was_not_attacked_has_no_robust_accuracy(tmp_path):
  add_run(tmp_path, 'a', [0.9], suite='clean')
  row = runs_table.markdown(runs_table.find(epath.Path(tmp_path))).splitlines()[2]
  assert '| 90.00 | – | clean, linf 0.2 |' in row


def test_runs_of_one_name_have_their_own_curves(folder):
  groups = figures.groups_by_experiment(runs_table.find(folder))
  assert {name: len(runs) for name, runs in groups.items()} == {
    'digits_linf_wrn-10-1_real (loss.beta=6.0)': 2,
    'digits_linf_wrn-10-1_real (loss.beta=5.0)': 1,
    'digits_linf_wrn-16-1_real': 1,
  }


@pytest.mark.parametrize(
  'status, steps, said',
  [
    ({'command': ['train'], 'state': 'preempted'}, [20, 40], 'preempted at step 40'),
    ({'command': ['train'], 'state': 'failed'}, [], 'failed'),
    ({'command': ['evaluate'], 'state': 'failed'}, [40], 'unfinished at step 40'),
    ({'command': ['evaluate'], 'state': 'failed'}, [], 'not evaluated'),
  ],
)
def test_a_run_that_is_not_finished_says_how_far_it_is(folder, status, steps, said):
  for step in steps:
    (folder / 'd' / 'checkpoints' / str(step)).mkdir(parents=True)
  status = {'message': '', 'host': 'elsewhere', 'pid': 1} | status
  (folder / 'd' / 'status.json').write_text(json.dumps(status))
  row = runs_table.markdown(runs_table.find(folder)).splitlines()[4]
  assert row == f'| digits_linf_wrn-16-1_real | real | 1 | – | – | {said} | – |'
  if steps:
    with pytest.raises(UserError, match=f'{said}: .*jaxrobust train --workdir=.*@STEP'):
      evaluate.main(None, str(folder / 'd'))


def test_radii_are_in_255ths_where_decimals_are_not_exact():
  shown = {8 / 255: '8/255', 0.2: '0.2', 0.0314: '0.0314', 128 / 255: '128/255'}
  shown |= {0.5: '0.5', 12.0: '12', 1 / 7: '0.1429'}
  assert {x: runs_table._radius(x) for x in shown} == shown


def test_a_figure_of_runs_that_have_not_trained_yet(folder):
  with figures.style() as plt:
    groups = figures.groups_by_experiment(runs_table.find(folder))
    drawn = figures.draw_overview(plt, groups)
    assert figures.render(drawn).startswith(b'\x89PNG')


def test_runs_that_differ_in_much_are_told_apart_by_their_folders(tmp_path):
  many = {f'augment.{x}': 3 for x in ('pad', 'cutout', 'randaugment_operations')}
  add_run(tmp_path, 'a', [0.6])
  add_run(tmp_path, 'b', [0.6], **many, **{'loss.beta': 5.0, 'ema.decay': 0.5})
  lines = runs_table.lines(runs_table.find(epath.Path(tmp_path)))
  assert runs_table.names_of(lines) == [
    f'digits_linf_wrn-10-1_real ({folder})' for folder in ('a', 'b')
  ]


def test_names_show_numbers_as_people_write_them(tmp_path):
  for name, levels in (('a', 8), ('b', 16)):
    add_run(tmp_path, name, [0.6], **{'threat.epsilon': levels / 255})
  add_run(tmp_path, 'c', [0.6], **{'training.num_steps': 77})
  found = runs_table.lines(runs_table.find(epath.Path(tmp_path)))
  names = sorted(runs_table.names_of(found))
  assert [name.partition(' (')[2] for name in names] == [
    'threat.epsilon=0.2, training.num_steps=77)',
    'threat.epsilon=16/255, training.num_steps=1,000)',
    'threat.epsilon=8/255, training.num_steps=1,000)',
  ]


def test_names_leave_out_what_has_no_effect(tmp_path):
  for name, share in (('a', 0.33), ('b', 0.5)):
    add_run(tmp_path, name, [0.6], **{'data.real_fraction': share})
  lines = runs_table.lines(runs_table.find(epath.Path(tmp_path)))
  assert runs_table.names_of(lines) == [
    f'digits_linf_wrn-10-1_real ({folder})' for folder in ('a', 'b')
  ]


def test_a_single_run_is_reported(folder, capsys):
  report.main(None, str(folder / 'a'))
  assert '| digits_linf_wrn-10-1_real | real | 1 | 90.00 | 60.00 |' in (
    capsys.readouterr().out
  )
  assert (folder / 'a' / 'report.png').exists()


def test_the_status_of_a_folder_that_is_not_there(tmp_path, capsys):
  report.main(None, str(tmp_path / 'none'), table='digits-linf', status=True)
  first, *text = capsys.readouterr().out.splitlines()
  assert first.startswith(f'# {tmp_path / "none"} is no folder')
  lines = [x.split()[0] for x in text if x[:2] == '  ']
  assert lines and set(lines) == {'missing'}
  assert not (tmp_path / 'none').exists()


def test_an_empty_folder_is_an_error(tmp_path):
  with pytest.raises(UserError, match='holds no workdir'):
    report.main(None, str(tmp_path))


def variants(*names):
  return [Row(name, DIGITS, {'variant': name}) for name in names]


TABLE = Table(
  'Digits & friends',
  'accuracies',
  [
    Row('published only', published={'clean': 80.0, 'robust': 50.0}),
    Row(
      'done', DIGITS, published={'clean': 91.0, 'robust': 55.5}, uncertain='50 % sure'
    ),
    *variants('partly', 'running', 'failed', 'interrupted', 'other', 'missing'),
  ],
  'pgd-40',
  seeds=(0, 1),
  note='What the paper says.',
)


@pytest.fixture
def maker(tmp_path):
  """Of a folder with runs in every state."""
  made = planned_runs.Maker(str(tmp_path), paper.PREPARATIONS)
  runs = {row.name: made.of_row(TABLE, row) for row in TABLE.rows}

  def result(point, robust, suite='pgd-40', warnings=()):
    folder = workdir.claim(str(point.workdir), point.config)
    (folder / 'checkpoint.npy').touch()
    protocol = protocol_of(point, suite)
    figures = {'clean_accuracy': 0.9, 'robust_accuracy': robust}
    workdir.add_result(folder, protocol, figures | {'warnings': list(warnings)})

  def status(point, state, **changes):
    folder = workdir.claim(str(point.workdir), point.config)
    said = {'state': state, 'message': 'no data', 'command': ['train', *point.flags]}
    said |= {'host': platform.node(), 'pid': os.getpid()} | changes
    (folder / 'status.json').write_text(json.dumps(said))

  result(runs['done'][0], 0.1, suite='autoattack')
  result(runs['done'][0], 0.6)
  result(runs['done'][1], 0.5, warnings=['gradients vanish'])
  result(runs['partly'][1], 0.25)
  for point in runs['running']:
    status(point, 'running')
  status(runs['failed'][0], 'failed')
  status(runs['interrupted'][0], 'running', pid=2**22 + 1)  # No process has it.
  status(runs['interrupted'][1], 'preempted')
  config = runs['other'][0].config.copy_and_resolve_references().unlock()
  config.loss.beta = 1.0
  other = runs['other'][0]._replace(config=config)
  result(other, 0.99)
  return made


# 55 ± 7.07 as above; 55 - 55.5 = -0.5 and 90 - 91 = -1.
CELLS = {
  'published only': ['80.00', '–', '–', '50.00', '–', '–', '–'],
  'done [1] [2]': [
    *('91.00', '90.00 ± 0.00', '−1.00'),
    *('55.50', '55.00 ± 7.07', '−0.50', '2'),
  ],
  'partly': ['–', '90.00', '–', '–', '25.00', '–', '1 of 2: 1 missing'],
  'running [3] [4]': [*['–', 'running', '–'] * 2, '0 of 2: 2 running'],
  'failed [5]': [*['–', 'failed, missing', '–'] * 2, '0 of 2: 1 failed, 1 missing'],
  'interrupted [6] [7]': [
    *['–', 'interrupted, preempted', '–'] * 2,
    '0 of 2: 1 interrupted, 1 preempted',
  ],
  'other [8]': [
    *['–', 'another config, missing', '–'] * 2,
    '0 of 2: 1 another config, 1 missing',
  ],
  'missing': [*['–', 'missing', '–'] * 2, '0 of 2: 2 missing'],
}


def test_each_cell(maker):
  lines = tables.read(TABLE, maker)
  (header, *rows), notes = tables.grid(TABLE, lines)
  assert header == [
    'row',
    *('clean, published', 'ours', 'difference'),
    *('robust, published', 'ours', 'difference', 'seeds'),
  ]
  assert {name: cells for name, *cells in rows} == CELLS
  assert notes[:2] == ['50 % sure', 'gradients vanish']
  name = 'digits_linf_wrn-10-1_real'
  assert notes[2:5] == [
    f'{name}_running_seed-0: running (train: no data)',
    f'{name}_running_seed-1: running (train: no data)',
    f'{name}_failed_seed-0: failed (train: no data)',
  ]
  assert notes[7:] == [
    f'{name}_other_seed-0: another config (its value → the planned one, loss.beta: 1.0 '
    '→ 6.0)'
  ]
  assert 'standard deviation' in tables.caption(TABLE, lines)
  assert 'standard deviation' not in tables.caption(TABLE, lines[:1])


def analysed(folder, kind, num_images=100, **figures):
  """The grid and the caption of an analysis that is done."""
  row = paper.TABLES['digits-conditions'].rows[1]
  row = row._replace(published={'nearest_train': 29.29})
  table = Table('Digits', kind, [row])
  made = planned_runs.Maker(str(folder), paper.PREPARATIONS)
  (point,) = made.of_row(table, row)
  run = workdir.claim(str(point.workdir), point.config)
  workdir.add_result(run, {'num_images': num_images}, figures)
  lines = tables.read(table, made)
  header, cells = tables.grid(table, lines)[0]
  return dict(zip(header, cells, strict=True)), tables.caption(table, lines)


def test_an_analysis_says_no_more_than_its_images_do(tmp_path):
  cells, said = analysed(tmp_path, 'neighbours', nearest_train=0.24, nearest_test=0.1)
  assert 'difference' not in cells  # Features differ.
  assert cells['nearest in train, published'] == '29.29'
  assert (cells['ours'], cells['in test'], cells['in itself']) == ('24', '10', '–')
  assert 'of 100 images of each set' in said


@pytest.mark.parametrize(
  'labelled, condition, shown',
  [(True, None, '–'), (True, 0.5, '50.0'), (False, 0.5, '75.0')],
)
def test_a_labeller_does_not_vouch_for_its_own_labels(
  tmp_path, labelled, condition, shown
):
  cells, _ = analysed(
    *(tmp_path, 'conditions', 1000),
    label_agreement=0.75,
    labelled_by_labeller=labelled,
    agreement_with_condition=condition,
  )
  assert cells['labels agreed'] == shown


def test_without_published_figures_there_is_one_column():
  table = TABLE._replace(rows=variants('missing'))
  lines = tables.read(table, planned_runs.Maker('/nowhere', {}))
  assert tables.grid(table, lines)[0] == [
    ['row', 'clean', 'robust', 'seeds'],
    ['missing', 'missing', 'missing', '0 of 2: 2 missing'],
  ]


def test_numbers_for_programs(maker):
  text = tables.comma_separated(TABLE, tables.read(TABLE, maker))
  rows = {row['row']: row for row in csv.DictReader(io.StringIO(text))}
  assert float(rows['done']['robust_mean']) == pytest.approx(55)
  assert float(rows['done']['robust_deviation']) == pytest.approx(50**0.5)
  assert float(rows['done']['robust_difference']) == pytest.approx(-0.5)
  assert (rows['done']['seeds_done'], rows['done']['states']) == ('2', 'done done')
  assert rows['partly']['robust_deviation'] == ''
  assert rows['missing']['robust_mean'] == rows['missing']['robust_published'] == ''
  assert rows['failed']['states'] == 'failed missing'


def test_latex_escapes_what_it_must(maker):
  text = tables.latex('digits', TABLE, tables.read(TABLE, maker))
  assert '\\caption{Digits \\& friends. ' in text
  assert 'done [1] [2] & 91.00 & 90.00 $\\pm$ 0.00 & $-$1.00 &' in text
  assert '  \\par [1] 50 \\% sure' in text
  assert text.count('{') == text.count('}')
  body = [x for x in text.splitlines() if x.endswith('\\\\')]
  assert len(body) == 1 + len(TABLE.rows)
  assert {x.replace('\\&', '').count('&') for x in body} == {7}


def test_status_tells_what_to_do(maker, tmp_path):
  rows = [*TABLE.rows, Row('set', DIGITS + ':absent-set')]
  rows += [Row('made', DIGITS, {'data.samples': '{workdir}/digits_ddpm/samples'})]
  text = list(table_status.lines(TABLE._replace(rows=rows), maker))
  folder = f'{tmp_path}/digits_linf_wrn-10-1_real'
  assert (
    '  failed       digits_linf_wrn-10-1_real_failed_seed-0 (train: no data)' in text
  )
  assert '  missing      digits_ddpm' in text
  empty = text.index('')
  states = [line.split()[0] for line in text[1:empty] if line.startswith('  ')]
  assert states.count('done') == 3  # Two of `done` and one of `partly`.
  todo = text[empty + 1 :]
  assert not any('real_seed-' in line for line in todo)
  assert todo[0].startswith('jaxrobust train ') and 'digits_labeller' in todo[0]
  place = next(i for i, x in enumerate(todo) if f'{folder}_running_seed-0 ' in x)
  assert todo[place - 1] == f'# running on {platform.node()}, do not start it twice:'
  other = next(x for x in todo if 'another config' in x)
  assert other == (
    f'# {folder}_other_seed-0 holds another config (its value → the planned one, '
    'loss.beta: 1.0 → 6.0), move it away first:'
  )
  absent = [x for x in todo if 'is absent' in x]
  assert len(absent) == 2
  for line in absent:
    assert line.startswith('# data/digits_absent-set is absent')
    assert 'jaxrobust data import FILES data/digits_absent-set' in line
  commands = [x for x in todo if not x.startswith('#')]
  assert len(set(commands)) == len(commands)


def test_files_of_a_table(maker, tmp_path, capsys, monkeypatch):
  """Curves and bars are drawn from what there is; the figures were looked at."""
  file = tmp_path / 'mine.py'
  rows = [r._replace(curve='Set', fraction=i / 8) for i, r in enumerate(TABLE.rows)]
  rows[-1] = rows[-1]._replace(curve='', fraction=1.0)
  monkeypatch.setattr(
    planned_runs,
    'read_tables',
    lambda file: (
      {'bars': TABLE, 'curves': TABLE._replace(kind='fractions', rows=rows)},
      {},
    ),
  )
  done = maker.of_row(TABLE, TABLE.rows[1])[0].workdir
  (done / 'metrics.jsonl').write_text(
    '{"step": 10, "eval_ema/pgd40_accuracy": 0.5, "train/adv_accuracy": 0.6}\n'
  )
  (done / 'figures').mkdir()
  images = np.zeros((10, 8, 8, 1))
  stand = {'labels': np.arange(10), 'predictions': np.arange(10) % 4, 'suite': 'pgd-40'}
  path = done / 'figures' / 'examples.npz'
  np.savez(path, images=np.uint8(images), adversarial=images, **stand)
  strip = figures.image_rows({'a': [(done, digits.get_config())]})[-1]
  assert strip.title == 'adversarial for\na\n(4 of 10 stand, pgd-40)'
  assert strip.marks == (None,) * 4 + (0, 1, 2, 3, 0, 1)  # What the fallen are seen as.
  # An evaluation of a checkpoint may hold out more images than there are.
  judged = digits.get_config().unlock()
  judged.dataset.validation_images = 1024
  judged.evaluation.checkpoint = str(done)
  groups = {'b': [(tmp_path, judged)], 'a': [(done, digits.get_config())]}
  assert figures.image_rows(groups)[0].title == 'real, training'
  report.main(None, str(tmp_path), table='curves', tables=str(file))
  made = {x.name for x in (tmp_path / 'report').iterdir()}
  assert made == {'curves.md', 'curves.csv', 'curves.tex'} | {
    f'curves{part}.{kind}'
    for part in ('', '_training', '_examples')
    for kind in ('png', 'svg')
  }
  text = (tmp_path / 'report' / 'curves.md').read_text()
  assert text in capsys.readouterr().out
  assert '1. 50 % sure\n2. gradients vanish\n' in text
  with figures.style() as plt:
    drawn = [
      figures.render(figures.draw_table(plt, TABLE, tables.read(TABLE, maker)), 'svg')
      for _ in range(2)
    ]
  assert drawn[0] == drawn[1]  # A report of the same runs is the same file.


def test_a_status_is_of_a_table(tmp_path):
  with pytest.raises(UserError, match='give --table=NAME.*digits-linf'):
    report.main(None, str(tmp_path), status='yes')
