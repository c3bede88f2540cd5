"""What RobustBench wants to know of a network."""

import hashlib
import importlib.util
import json

import pytest
from etils import epath

from jaxrobust import config as configs
from jaxrobust import convert
from jaxrobust.config import experiments
from jaxrobust.errors import UserError
from jaxrobust.models import card as cards
from jaxrobust.models import leaderboard, parameter_files
from jaxrobust.runs import cli
from tests.helpers.random_variables import random_variables

needs_torch = pytest.mark.skipif(
  importlib.util.find_spec('torch') is None,
  reason="PyTorch is not installed (pip install '.[torch]')",
)
PROTOCOL = {
  'suite': 'autoattack',
  'dataset': 'cifar10',
  'split': 'test',
  'num_images': 10_000,
  'norm': 'linf',
  'epsilon': 8 / 255,
}
ENTRY = {'clean_accuracy': 0.875, 'robust_accuracy': 0.634449, 'warnings': []}


def card(*entries, **changes):
  facts = {
    'name': 'ours',
    'dataset': 'cifar10',
    'norm': 'linf',
    'epsilon': 8 / 255,
    'model': {
      'name': 'wrn-28-10',
      'activation': 'swish',
      'mean': (0.5, 0.5, 0.5),
      'std': (0.25, 0.25, 0.25),
      'padding': 0,
    },
    'accuracies': entries,
  }
  return cards.Card(**facts | changes)


def test_the_fields_of_the_protocol():
  older = {'protocol': PROTOCOL, 'clean_accuracy': 0.1, 'robust_accuracy': 0.1}
  assert leaderboard.model_info(card(older, {'protocol': PROTOCOL, **ENTRY})) == {
    'link': None,
    'name': None,
    'authors': None,
    'additional_data': None,
    'number_forward_passes': 1,
    'dataset': 'cifar10',
    'venue': None,
    'architecture': 'WideResNet-28-10',
    'eps': '8/255',
    'clean_acc': '87.50',
    'reported': None,
    'autoattack_acc': '63.44',
  }


def test_other_networks_and_radii():
  protocol = PROTOCOL | {'norm': 'l2', 'epsilon': 0.5}
  model = card().model | {'name': 'preact-resnet-18'}
  info = leaderboard.model_info(
    card({'protocol': protocol, **ENTRY}, norm='l2', epsilon=0.5, model=model)
  )
  assert (info['architecture'], info['eps']) == ('PreActResNet-18', '0.5')


@pytest.mark.parametrize(
  'change',
  [
    {'suite': 'apgd-ce'},
    {'split': 'validation'},
    {'num_images': 1_000},
    {'epsilon': 4 / 255},
    {'norm': 'l2'},
  ],
)
def test_other_evaluations_do_not_count(change):
  with pytest.raises(UserError, match='--suite=autoattack'):
    leaderboard.model_info(card({'protocol': PROTOCOL | change, **ENTRY}))


def test_neither_does_what_is_published():
  entry = {'protocol': PROTOCOL, **ENTRY, 'published': 'A paper'}
  with pytest.raises(UserError, match='no evaluation of our own'):
    leaderboard.model_info(card(entry))


def test_data_sets_without_a_leaderboard():
  with pytest.raises(UserError, match='digits and linf: RobustBench has'):
    leaderboard.model_info(card(dataset='digits'))


@needs_torch
def test_it_is_written_beside_the_weights(tmp_path, capsys):
  run = epath.Path(tmp_path / 'run')
  run.mkdir()
  config = experiments.load('experiments/cifar10_linf.py:wrn-10-2')
  (run / 'config.json').write_text(configs.to_json(config))
  file = run / 'checkpoint.npy'
  parameter_files.export_npy(file, *random_variables('wrn-10-2', 10, 3))
  sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
  protocol = PROTOCOL | {'checkpoint_sha256': sha256}
  other = {'protocol': PROTOCOL | {'checkpoint_sha256': 'another'}, **ENTRY}
  results = [{'protocol': protocol, **ENTRY}, other | {'robust_accuracy': 0.9}]
  (run / 'results.json').write_text(json.dumps(results))
  target, info = tmp_path / 'ours.pt', tmp_path / 'info' / 'ours.json'
  convert_run = lambda to, info: (
    cli._run(convert.PROGRAM, [f'--from={run}', f'--to={to}', f'--robustbench={info}']),
    capsys.readouterr(),
  )
  code, told = convert_run(tmp_path / 'ours.npy', info)
  assert (code, info.exists()) == (1, False)
  assert 'give a .pt file' in told.err
  code, told = convert_run(target, tmp_path / 'ours.json')
  assert (code, target.exists()) == (1, False)
  assert 'the model card' in told.err
  code, told = convert_run(target, info)
  assert code == 0, told.err
  assert json.loads(info.read_text())['autoattack_acc'] == '63.44'
  assert 'fill in link, name, authors' in told.out
  assert 'model_info/cifar10/Linf' in told.out
  # Neither is written if the other cannot be.
  code, told = convert_run(tmp_path / 'again.pt', info)
  assert (code, (tmp_path / 'again.pt').exists()) == (1, False)
  assert 'give a name that no file has' in told.err
