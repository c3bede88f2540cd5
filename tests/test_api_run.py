"""A run as a notebook reads it."""

import json

import numpy as np
import pytest
from etils import epath

import jaxrobust
from jaxrobust import config as configs
from jaxrobust.config import experiments
from jaxrobust.errors import UserError
from jaxrobust.models import parameter_files
from tests.helpers.random_variables import random_variables


@pytest.fixture
def workdir(tmp_path):
  config = experiments.load('experiments/digits.py:wrn-10-1')
  folder = tmp_path / 'run'
  folder.mkdir()
  (folder / 'config.json').write_text(configs.to_json(config))
  return folder


def write_lines(workdir, *lines):
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (workdir / 'metrics.jsonl').write_text(text)


def test_metrics_are_arrays_by_name(workdir):
  write_lines(
    workdir,
    {'step': 5, 'train/loss': 2.5, 'train/adv_accuracy': 0.25},
    {'step': 10, 'train/loss': None, 'train/adv_accuracy': 0.5},
    {'step': 10, 'eval/clean_accuracy': 0.75},
  )
  run = jaxrobust.read_run(workdir)
  steps, losses = run.metrics['train/loss']
  np.testing.assert_array_equal(steps, [5, 10])
  np.testing.assert_array_equal(losses, [2.5, np.nan])
  assert (steps.dtype, losses.dtype) == (np.int64, np.float64)
  np.testing.assert_array_equal(run.metrics['train/adv_accuracy'].values, [0.25, 0.5])
  np.testing.assert_array_equal(run.metrics['eval/clean_accuracy'].steps, [10])
  with pytest.raises(KeyError, match='train/los: use one of .*mean train/loss?'):
    run.metrics['train/los']
  assert 'train/los' not in run.metrics and run.metrics.get('train/los') is None
  assert run.config.model.name == 'wrn-10-1'
  assert run.name == 'digits_linf_wrn-10-1_real'


def test_a_run_that_has_only_begun(workdir):
  run = jaxrobust.read_run(str(workdir))
  assert (run.metrics, run.results, run.figures, run.status) == ({}, [], {}, '')
  assert repr(run) == f'digits_linf_wrn-10-1_real in {workdir}'
  with pytest.raises(UserError, match='no checkpoint.npy: finish training'):
    run.load()


def test_what_it_came_to(workdir):
  write_lines(workdir, {'step': 40, 'train/loss': 1.0})
  protocol = {'suite': 'auto<attack', 'num_images': 797, 'split': 'test'}
  entry = {'protocol': protocol, 'clean_accuracy': 0.9, 'robust_accuracy': 0.5}
  analysis = {'protocol': {'kind': 'conditions'}}
  clean = entry | {'protocol': protocol | {'suite': 'clean'}}
  (workdir / 'results.json').write_text(json.dumps([entry, clean, analysis]))
  status = {
    'state': 'done',
    'message': '',
    'command': ['train'],
    'host': 'h',
    'pid': 1,
  }
  (workdir / 'status.json').write_text(json.dumps(status))
  (workdir / 'figures').mkdir()
  for name in ('training.png', 'examples.npz'):
    (workdir / 'figures' / name).write_bytes(b'')
  parameter_files.export_npy(
    epath.Path(workdir / 'checkpoint.npy'), *random_variables('wrn-10-1', 10, 1)
  )
  run = jaxrobust.read_run(workdir)
  assert run.results == [entry, clean, analysis]
  assert run.status == 'done'
  assert run.figures == {'training': workdir / 'figures' / 'training.png'}
  assert repr(run).splitlines() == [
    f'digits_linf_wrn-10-1_real in {workdir}',
    '  status: done',
    '  metrics to step 40: train/loss',
    '  clean 90.00%, robust 50.00%, auto<attack, 797 test images',
    '  clean 90.00%, 797 test images',
    '  an analysis',
    '  figures: training',
  ]
  html = run._repr_html_()
  assert 'auto&lt;attack' in html
  assert 'auto<attack' not in html
  classifier = run.load()
  assert classifier.card.name == run.name


@pytest.mark.parametrize('name', ['config.json', 'results.json'])
def test_damaged_files_are_named_in_one_line(workdir, name):
  (workdir / name).write_text('[{"protocol":')
  with pytest.raises(UserError, match=name) as e:
    _ = jaxrobust.read_run(workdir).results
  assert '\n' not in str(e.value)


def test_no_run(tmp_path):
  with pytest.raises(UserError, match='config.json is absent: give the workdir'):
    jaxrobust.read_run(tmp_path)
