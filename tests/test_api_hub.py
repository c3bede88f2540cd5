"""Checkpoints on the Hugging Face hub, of which a folder takes the place."""

import json
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest
from etils import epath

import jaxrobust
from jaxrobust import convert
from jaxrobust.errors import UserError
from jaxrobust.models import card as cards
from jaxrobust.models import hub, parameter_files, safetensors
from jaxrobust.runs import cli
from tests.helpers.random_variables import assert_same, random_variables

CONFIG = '--config=experiments/digits.py:wrn-10-1'


class Hub:
  """The functions of huggingface_hub that are called, on a folder."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.messages = folder, []
    self.module = types.ModuleType('huggingface_hub')
    self.module.hf_hub_download = self.hf_hub_download
    self.module.HfApi = lambda: self

  def hf_hub_download(self, *, repo_id, filename):
    path = self.folder / repo_id / filename
    if not path.exists():
      raise FileNotFoundError(f'404 Client Error\n{repo_id}/{filename} is not there')
    return str(path)

  def create_repo(self, *, repo_id, exist_ok):
    if repo_id.startswith('others/'):
      raise PermissionError('403 Forbidden')
    (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)

  def upload_folder(self, *, repo_id, folder_path, commit_message):
    shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
    self.messages.append(commit_message)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  found = Hub(tmp_path / 'hub')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', found.module)
  return found


@pytest.fixture
def source(tmp_path):
  path = epath.Path(tmp_path / 'source.npy')
  parameter_files.export_npy(path, *random_variables('wrn-10-1', 10, 1))
  return path


@pytest.fixture
def call(capsys):
  """Converts in this process: (exit code, stdout, stderr)."""

  def run(*args):
    code = cli._run(convert.PROGRAM, [*map(str, args)])
    return code, *capsys.readouterr()

  return run


def test_there_and_back(stand_in, source, call, tmp_path):
  code, out, err = call(f'--from={source}', '--to=hf:me/digits', CONFIG)
  assert code == 0, err
  assert out.startswith('hf:me/digits: wrn-10-1, 10 classes')
  there = stand_in.folder / 'me' / 'digits'
  assert {x.name for x in there.iterdir()} == {
    'README.md',
    'model.json',
    'model.safetensors',
  }
  assert len(stand_in.messages) == 1
  back = tmp_path / 'back.npy'
  code, _, err = call('--from=hf:me/digits', f'--to={back}')
  assert code == 0, err
  assert_same(parameter_files.read(back), parameter_files.read(source))
  card = json.loads((tmp_path / 'back.json').read_text())
  assert card.pop('formats') == ['.npy']
  assert card == json.loads((there / 'model.json').read_text())
  classifier = jaxrobust.load('hf:me/digits')
  assert classifier.card.name == 'digits_linf_wrn-10-1_real'
  assert classifier(np.zeros((2, 8, 8, 1), np.uint8)).shape == (2, 10)


def some_card(**changes):
  protocol = {
    'suite': 'autoattack',
    'dataset': 'cifar10',
    'split': 'test',
    'num_images': 10_000,
    'norm': 'linf',
    'epsilon': 8 / 255,
  }
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
    'accuracies': (
      {'protocol': protocol, 'clean_accuracy': 0.875, 'robust_accuracy': 0.634449},
    ),
    'source': 'a run',
  }
  return cards.Card(**facts | changes)


def test_without_an_attack_the_page_has_no_robust_accuracy():
  [entry] = some_card().accuracies
  entry |= {'attacks': []}
  text = hub.readme(some_card(accuracies=(entry,)), 'me/ours')
  assert '| 87.50% | – |' in text and 'robust accuracy,' not in text


def test_the_page_of_a_repository():
  text = hub.readme(some_card(), 'me/ours')
  front, body = text.removeprefix('---\n').split('---\n', 1)
  # Each line is a key and a value of JSON, which is YAML, too.
  facts = {
    key: json.loads(value)
    for key, value in (line.split(': ', 1) for line in front.splitlines())
  }
  assert 'license' not in facts
  assert facts['library_name'] == 'jaxrobust'
  [result] = facts['model-index'][0]['results']
  assert result['dataset']['name'] == 'cifar10'
  assert len(result['metrics']) == 2
  assert [metric['value'] for metric in result['metrics']] == [0.875, 0.6344]
  assert 'autoattack' in result['metrics'][1]['name']
  assert "jaxrobust.load('hf:me/ours')" in body
  assert '| autoattack | 10000 test | linf | 0.0313725 | 87.50% | 63.44% |' in body
  assert 'images 32x32x3, 10 classes' in body
  assert 'not been judged' in hub.readme(some_card(accuracies=()), 'me/ours')


@pytest.mark.parametrize(
  'name', ['', 'me', 'me/a/b', '../x', 'me/..', 'me/a b', '/me/a', 'me/a\n']
)
def test_what_is_no_name_of_a_repository(stand_in, name):
  with pytest.raises(UserError, match='write hf:OWNER/NAME'):
    jaxrobust.load(f'hf:{name}')


def test_refusals_of_the_hub_take_one_line(stand_in, source, call):
  code, _, err = call(f'--from={source}', '--to=hf:others/x', CONFIG)
  assert code == 1
  assert err.count('\n') == 1
  assert 'hf:others/x cannot be written (PermissionError: 403 Forbidden)' in err
  with pytest.raises(UserError, match='hf:me/none: model.safetensors cannot') as e:
    jaxrobust.load('hf:me/none')
  assert '\n' not in str(e.value) and 'log in' in str(e.value)


@pytest.mark.parametrize('kind', ['builtin', 'requests', 'wrapped'])
def test_a_hub_that_cannot_be_reached_is_named_as_the_cause(
  stand_in, monkeypatch, kind
):
  def fail(**_):
    if kind == 'builtin':
      raise ConnectionRefusedError('refused')
    if kind == 'requests':
      raise type('ConnectTimeout', (type('Timeout', (OSError,), {}),), {})('late')
    try:
      raise ConnectionResetError('reset')
    except OSError as e:
      raise FileNotFoundError('not in the cache') from e

  monkeypatch.setattr(stand_in.module, 'hf_hub_download', fail)
  with pytest.raises(UserError, match='check the connection') as e:
    jaxrobust.load('hf:me/x')
  assert 'correct the name' not in str(e.value)


def test_a_repository_of_others(stand_in, source):
  folder = stand_in.folder / 'me' / 'other'
  folder.mkdir(parents=True)
  raw = safetensors.write(*parameter_files.read(source), {})
  (folder / 'model.safetensors').write_bytes(raw)
  with pytest.raises(UserError, match='hf:me/other has no model card of jaxrobust'):
    jaxrobust.load('hf:me/other')


def test_without_the_package(source, call, monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)  # As if it were absent.
  code, _, err = call(f'--from={source}', '--to=hf:me/x', CONFIG)
  assert code == 1
  assert "pip install '.[hub]'" in err
  with pytest.raises(UserError, match='hf:me/x needs the package huggingface_hub'):
    jaxrobust.load('hf:me/x')
