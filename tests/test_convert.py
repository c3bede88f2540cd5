"""The program that converts: every direction, its cards and its refusals."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from jaxrobust import convert
from jaxrobust.data import datasets
from jaxrobust.models import card as cards
from jaxrobust.models import parameter_files, zoo
from jaxrobust.runs import cli
from tests.helpers.random_variables import assert_same, random_variables

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = '--config=experiments/digits.py:wrn-10-1'
needs_torch = pytest.mark.skipif(
  importlib.util.find_spec('torch') is None,
  reason="PyTorch is not installed (pip install '.[torch]')",
)


@pytest.fixture
def call(monkeypatch, capsys):
  """Runs the program in this process: (exit code, stdout, stderr)."""

  def run(*args):
    code = cli._run(convert.PROGRAM, [*map(str, args)])
    return code, *capsys.readouterr()

  return run


@pytest.fixture
def source(tmp_path):
  path = epath.Path(tmp_path / 'source.npy')
  parameter_files.export_npy(path, *random_variables('wrn-10-1', 10, 1))
  return path


def test_a_file_needs_a_config_once_and_its_card_goes_along(call, source, tmp_path):
  a, b = tmp_path / 'a.safetensors', tmp_path / 'b.npy'
  code, out, err = call(f'--from={source}', f'--to={a}', CONFIG)
  assert code == 0, err
  assert out.startswith(f'{a}: wrn-10-1, 10 classes, 1 channel, digits; largest diff')
  assert out.endswith(': 0\n')
  code, _, err = call(f'--from={a}', f'--to={b}')
  assert code == 0, err
  assert_same(parameter_files.read(b), parameter_files.read(source))
  card = json.loads((tmp_path / 'b.json').read_text())
  assert card['dataset'] == 'digits'
  assert card['epsilon'] == 0.2
  assert card['num_classes'] == 10
  assert card['model']['name'] == 'wrn-10-1'
  of_a = json.loads((tmp_path / 'a.json').read_text())
  assert (card.pop('formats'), of_a.pop('formats')) == (['.npy'], ['.safetensors'])
  assert card == of_a
  assert not list(tmp_path.glob('.draft*'))
  # Formats of one checkpoint share the card.
  code, _, err = call(f'--from={a}', f'--to={tmp_path / "a.npy"}')
  assert code == 0, err
  of_both = json.loads((tmp_path / 'a.json').read_text())
  assert of_both.pop('formats') == ['.safetensors', '.npy'] and of_both == card


def test_a_card_is_not_of_the_file_it_was_converted_from(call, source, tmp_path):
  # A guess of the config, beside a source of the same name.
  guess = tmp_path / 'source.safetensors'
  relu = '--config.model.activation=relu'
  code, _, err = call(f'--from={source}', f'--to={guess}', CONFIG, relu)
  assert code == 0, err
  assert zoo.find(str(source)) is None
  assert zoo.find(str(guess)).card.model['activation'] == 'relu'
  code, _, err = call(f'--from={source}', f'--to={tmp_path / "a.npy"}', CONFIG)
  assert code == 0, err
  assert 'swish' in (tmp_path / 'a.json').read_text()
  # The corrected card does not take the place of the guess, which is of its own file.
  assert 'source.json exists' in refuse(
    call, f'--from={source}', CONFIG, to=tmp_path / 'source.pth'
  )
  assert 'source.json is of another format' in refuse(
    call, f'--from={source}', to=tmp_path / 'b.npy'
  )
  # Renamed together, file and card still belong to each other.
  for ending in ('.json', '.safetensors'):
    (tmp_path / f'source{ending}').rename(tmp_path / f'best{ending}')
  assert zoo.find(str(tmp_path / 'best.safetensors'))


def test_a_card_of_an_earlier_version_is_of_any_format(call, source, tmp_path):
  code, _, err = call(f'--from={source}', f'--to={tmp_path / "a.npy"}', CONFIG)
  assert code == 0, err
  card = json.loads((tmp_path / 'a.json').read_text())
  del card['formats']
  (tmp_path / 'source.json').write_text(json.dumps(card))
  assert zoo.find(str(source)).card.model['name'] == 'wrn-10-1'
  to = tmp_path / 'source.safetensors'
  code, _, err = call(f'--from={source}', f'--to={to}')
  assert code == 0, err
  assert zoo.find(str(source)) and zoo.find(str(to))


@needs_torch
def test_to_pytorch_and_back(call, source, tmp_path):
  code, _, err = call(f'--from={source}', f'--to={tmp_path / "a.pt"}', CONFIG)
  assert code == 0, err
  assert 'of width 1: its file has layer.0.block.0.shortcut.weight' in err
  assert 'images of 8 pixels' in err
  code, _, err = call(f'--from={tmp_path / "a.pt"}', f'--to={tmp_path / "b.npy"}')
  assert code == 0, err
  assert_same(parameter_files.read(tmp_path / 'b.npy'), parameter_files.read(source))


def refuse(call, *args, to):
  code, out, err = call(*args, f'--to={to}')
  assert (code, out) == (1, '')
  assert err.startswith('error: ')
  assert err.count('\n') == 1, err
  assert not to.exists()
  return err


def test_mistakes_are_told_in_one_line(call, source, tmp_path):
  to = tmp_path / 'x.safetensors'
  told = lambda *args, to=to: refuse(call, *args, to=to)
  assert 'source.npy is wrn-10-1, 10 classes, 1 channel by its parameters' in told(
    f'--from={source}'
  )
  err = told(f'--from={source}', '--config=experiments/digits.py:wrn-16-2')
  assert 'wrn-10-1, 10 classes, 1 channel by' in err
  assert '--config says wrn-16-2, 10 classes' in err
  err = told(f'--from={source}', '--config=experiments/cifar100_linf.py:wrn-10-1')
  assert '--config says wrn-10-1, 100 classes, 3 channels' in err
  assert 'a.ckpt: the name must' in told(f'--from={source}', to=tmp_path / 'a.ckpt')
  assert 'no checkpoint at' in told(f'--from={tmp_path / "none.npy"}')
  assert 'give --from=PATH' in told()
  assert '--workdir=runs/x' in told(f'--from={source}', '--workdir=runs/x')
  assert "or a classifier's config" in told(
    f'--from={source}', '--config=experiments/digits_gaussian.py'
  )
  assert not list(tmp_path.glob('*.json'))


def test_nothing_is_overwritten(call, source, tmp_path):
  before = source.read_bytes()
  code, _, err = call(f'--from={source}', f'--to={source}', CONFIG)
  assert code == 1
  assert f'{source} exists: remove it' in err
  assert source.read_bytes() == before
  (tmp_path / 'x.json').write_text('{}')
  assert 'the card of another' in refuse(
    call, f'--from={source}', CONFIG, to=tmp_path / 'x.safetensors'
  )


def test_what_is_known_and_the_config_must_agree(call, source, tmp_path):
  call(f'--from={source}', f'--to={tmp_path / "a.safetensors"}', CONFIG)
  told = lambda *args: refuse(
    call, f'--from={tmp_path / "a.safetensors"}', *args, to=tmp_path / 'b.npy'
  )
  err = told(CONFIG, '--config.threat.epsilon=0.1')
  assert '--config says epsilon 0.1, and' in err
  assert 'a.json' in err and 'says epsilon 0.2' in err
  err = told(CONFIG, '--config.model.activation=relu')
  assert 'says model.activation relu, and' in err
  assert 'says model.activation swish: correct --config' in err


def test_parameters_that_are_not_finite(call, tmp_path):
  params, net_state = random_variables('wrn-10-1', 10, 1)
  params['wide_res_net/~/logits']['b'][3] = np.nan
  source = epath.Path(tmp_path / 'nan.npy')
  parameter_files.export_npy(source, params, net_state)
  assert 'not finite: the source is damaged' in refuse(
    call, f'--from={source}', CONFIG, to=tmp_path / 'x.safetensors'
  )
  assert not list(tmp_path.glob('.draft*'))


@pytest.mark.parametrize(
  'params',
  [
    {},
    {'a': np.ones(3)},
    {3: {'w': np.ones(3)}, 'x': {}},
    {'wide_res_net/~/init_conv': np.ones(3)},
    {'wide_res_net/~/init_conv': {'w': np.ones(3)}},
    {'preact_res_net/~/conv_2d': {'w': np.ones((3, 3, 3, 64))}},
  ],
)
def test_parameters_of_something_else(call, tmp_path, params):
  source = epath.Path(tmp_path / 'odd.npy')
  np.save(source, np.array([params, {}], dtype=object), allow_pickle=True)
  assert 'odd.npy' in refuse(
    call, f'--from={source}', CONFIG, to=tmp_path / 'x.safetensors'
  )


def test_a_place_that_cannot_be_written_to(call, source):
  err = refuse(
    call, f'--from={source}', CONFIG, to=pathlib.Path('/proc/none/x.safetensors')
  )
  assert 'cannot write to /proc/none/x.safetensors: ' in err


def test_a_layer_that_is_absent_or_of_another_shape(call, tmp_path):
  params, net_state = random_variables('wrn-10-1', 10, 1)
  block = 'wide_res_net/~/resnet_lay_1_block_0/~/'
  params[f'{block}conv_9'] = params.pop(f'{block}conv_1')
  source = epath.Path(tmp_path / 'x.npy')
  parameter_files.export_npy(source, params, net_state)
  err = refuse(call, f'--from={source}', CONFIG, to=tmp_path / 'x.safetensors')
  assert f'{block}conv_1 w is absent and the network has (3, 3, 32, 32)' in err


def test_a_writer_that_changes_numbers_is_caught(call, source, tmp_path, monkeypatch):
  export = parameter_files.export

  def careless(path, params, net_state, metadata):
    params = {m: {k: x * 1.001 for k, x in v.items()} for m, v in params.items()}
    export(path, params, net_state, metadata)

  monkeypatch.setattr(parameter_files, 'export', careless)
  code, out, err = call(f'--from={source}', f'--to={tmp_path / "x.npy"}', CONFIG)
  assert code == 134
  assert out == ''
  assert 'the logits changed by' in err
  assert [p.name for p in tmp_path.iterdir()] == ['source.npy']


def test_help_is_a_page(capsys):
  with pytest.raises(SystemExit) as e:
    cli.run(convert.PROGRAM, ['--help'])
  assert e.value.code == 0
  out = capsys.readouterr().out
  assert 'jaxrobust convert --from=' in out
  assert 'Exit codes' in out


def process(program, *args):
  return subprocess.run(
    [sys.executable, '-m', f'jaxrobust.{program}', *map(str, args)],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'},
    text=True,
    capture_output=True,
    timeout=300,
  )


@pytest.mark.slow
@needs_torch
def test_a_trained_network_predicts_the_same_in_pytorch(tmp_path):
  """Trained and converted as processes; then all 797 test images."""
  import torch

  from tests.helpers import torch_networks

  done = process(
    'train',
    f'--workdir={tmp_path}/run',
    CONFIG,
    '--config.loss.name=standard',
    '--config.training.num_steps=60',
    '--config.checkpoint.export=last',
  )
  assert done.returncode == 0, done.stderr
  target = tmp_path / 'digits.pt'
  done = process('convert', f'--from={tmp_path}/run', f'--to={target}')
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(f'{target}: wrn-10-1, 10 classes, 1 channel, digits; ')
  assert done.stdout.endswith(': 0\n')

  images, labels = datasets.load('digits', 'test')
  images = images.astype(np.float32) / 255
  card = cards.from_workdir(tmp_path / 'run')
  model = card.build()
  variables = parameter_files.load(tmp_path / 'run', model)
  ours = jax.jit(lambda x: model.apply(*variables, x, batch_stats=False)[0])(images)
  network = torch_networks.build(
    'wrn-10-1',
    num_classes=10,
    channels=1,
    mean=(0.5,),
    std=(0.5,),
    padding=0,
    activation=torch.nn.SiLU(),
  )
  network.load_state_dict(torch.load(target, weights_only=True))
  with torch.no_grad():
    theirs = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
  assert len(images) == 797
  np.testing.assert_array_equal(np.argmax(ours, 1), np.argmax(theirs, 1))
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
  assert np.mean(np.argmax(ours, 1) == labels) > 0.5  # It has learned something.
