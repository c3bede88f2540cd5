"""The programs as users run them: the whole path, resume, refusals, exit codes."""

import importlib
import json
import pathlib
import re
import signal

import numpy as np
import pytest

from jaxrobust.runs import cli
from tests.helpers.programs import TINY, assert_same_file, wait_for_step

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_training_writes_what_the_contract_says(trained, call):
  assert json.loads((trained / 'config.json').read_text())['seed'] == 0
  lines = [json.loads(x) for x in (trained / 'metrics.jsonl').read_text().splitlines()]
  assert [x['step'] for x in lines if 'train/loss' in x] == list(range(1, 13))
  last = [x for x in lines if 'eval_ema/pgd3_accuracy' in x]
  assert [x['step'] for x in last] == [4, 8, 12]
  assert {'eval/clean_accuracy', 'eval_ema/clean_accuracy'} <= set(last[-1])
  assert list(trained.glob('events.*'))
  assert (trained / 'checkpoint.npy').exists()
  code, _, err = call('train', f'--workdir={trained}', *TINY)
  assert code == 0
  assert 'is finished' in err


@pytest.mark.slow
def test_another_config_in_the_workdir_is_refused(trained, call):
  before = (trained / 'config.json').read_bytes()
  code, _, err = call('train', f'--workdir={trained}', *TINY, '--config.loss.beta=5')
  assert code == 1
  assert err.count('\n') == 1
  assert 'loss.beta: 6.0 → 5.0' in err
  assert (trained / 'config.json').read_bytes() == before


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(trained, start, call, tmp_path):
  process = start('train', f'--workdir={tmp_path}', *TINY)
  wait_for_step(process, tmp_path, 7)
  process.kill()
  process.communicate()
  assert not (tmp_path / 'checkpoint.npy').exists()
  code, _, err = call('train', f'--workdir={tmp_path}', *TINY)
  assert code == 0, err
  assert_same_file(trained / 'checkpoint.npy', tmp_path / 'checkpoint.npy')
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  steps = [x['step'] for x in map(json.loads, lines) if 'train/loss' in x]
  assert steps == list(range(1, 13))


@pytest.mark.slow
def test_sigterm_saves_and_exits_42(trained, start, call, tmp_path):
  process = start('train', f'--workdir={tmp_path}', *TINY)
  wait_for_step(process, tmp_path, 3)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 42, err
  step = int(re.search(r'stopped after step (\d+)', err)[1])
  code, _, err = call('train', f'--workdir={tmp_path}', *TINY)
  assert code == 0
  assert f'resuming after step {step}' in err
  assert_same_file(trained / 'checkpoint.npy', tmp_path / 'checkpoint.npy')


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(call, tmp_path):
  code, _, err = call(
    'train', f'--workdir={tmp_path}', *TINY, '--config.optimizer.learning_rate=1e18'
  )
  assert code == 1
  message = err.strip().splitlines()[-1]
  assert re.match(r'error: the loss is (nan|inf) at step \d+', message)
  assert not (tmp_path / 'checkpoint.npy').exists()
  # What was saved before is finite.
  step = int(re.search(r'at step (\d+)', message)[1])
  saved = [
    int(p.name) for p in (tmp_path / 'checkpoints').glob('*') if p.name.isdigit()
  ]
  assert all(s < step for s in saved)


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused(trained, call, tmp_path):
  code, _, err = call(
    'evaluate',
    f'--workdir={tmp_path / "x"}',
    *TINY,
    '--config.model.name=wrn-10-2',
    f'--config.evaluation.checkpoint={trained}',
  )
  assert code == 1
  assert err.count('\n') == 1
  assert 'says model.name wrn-10-2' in err and 'wrn-10-1' in err
  assert not (tmp_path / 'x').exists()


@pytest.mark.slow
def test_generate_then_train_on_the_samples_then_report(call, tmp_path):
  code, _, err = call(
    'train',
    f'--workdir={tmp_path}/labeller',
    *TINY,
    '--config.loss.name=standard',
    '--config.training.num_steps=60',
  )
  assert code == 0, err
  generate = [
    'generate',
    f'--workdir={tmp_path}/gaussian',
    '--config=experiments/digits_gaussian.py',
    '--config.samples.count=95',
    '--config.samples.batch_size=64',
    '--config.samples.shard_size=40',
    f'--config.labeller={tmp_path}/labeller',
  ]
  code, _, err = call(*generate)
  assert code == 0, err
  metadata = json.loads((tmp_path / 'gaussian/samples/metadata.json').read_text())
  assert metadata['selection']['balanced'] is True
  assert metadata['selection']['pool']['total'] == 95
  assert metadata['labeller']['experiment'] == 'digits_standard_wrn-10-1_real'
  labels = np.concatenate(
    [np.load(p) for p in sorted((tmp_path / 'gaussian/samples').glob('labels-*'))]
  )
  assert np.bincount(labels).tolist() == [10] * 5 + [9] * 5
  code, _, err = call(*generate)
  assert code == 0
  assert 'is finished: 95 samples' in err

  mixed = [
    'train',
    f'--workdir={tmp_path}/mixed',
    *TINY,
    f'--config.data.samples={tmp_path}/gaussian/samples',
    '--config.data.real_fraction=0.25',
  ]
  code, _, err = call(*mixed)
  assert code == 0, err
  assert '8 real and 24 generated' in err
  assert call('evaluate', f'--workdir={tmp_path}/mixed')[0] == 0
  code, out, err = call('report', f'--workdir={tmp_path}')
  assert code == 0, err
  [entry] = json.loads((tmp_path / 'mixed/results.json').read_text())
  row = '| digits_linf_wrn-10-1_gaussian | 25% real | 1 |'
  assert f'{row} {100 * entry["clean_accuracy"]:.2f} |' in out
  row = '| digits_standard_wrn-10-1_real | real | 1 |'
  assert f'{row} – | – | not evaluated | – |' in out
  assert (tmp_path / 'report.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  'args, words',
  [
    (['train', '--workdir=x'], '--config is missing'),
    (['train', '--config=experiments/digits.py'], '--workdir is missing'),
    (['train', '--workdir=x', '--config=experiments/none.py'], 'none.py'),
    (
      [
        'train',
        '--workdir=x',
        '--config=experiments/digits.py',
        '--config.data.batchsize=3',
      ],
      'batchsize',
    ),
    (
      [
        'train',
        '--workdir=x',
        '--config=experiments/digits.py',
        '--config.loss.beta=six',
      ],
      'six',
    ),
    (
      ['train', '--workdir=x', '--config=experiments/digits.py', '--confg.seed=1'],
      'confg',
    ),
    (['train', '--workdir=x', '--config=experiments/digits.py:wrn-11-1'], 'wrn-11-1'),
    (['train', '--workdir=x', '--config=experiments'], 'experiments: no such file'),
    (
      ['train', '--workdir=x', '--config=experiments/digits.py', '--config.model.nam='],
      '; did you mean --config.model.name?',
    ),
    (
      ['train', '--workdir=x', '--config=experiments/digits.py', '--config.seed=x'],
      '--config.seed=x: use an integer',
    ),
    (
      [
        'train',
        '--workdir=x',
        '--config=experiments/cifar10_linf.py:real',
        '--config.dataset.data_dir=/nowhere',
      ],
      'cifar10',
    ),
    (['train', '--workdir=x', '--config=experiments/digits.py', 'stray'], 'stray'),
    (['evaluate', '--workdir=x'], 'holds no run to evaluate'),
    (
      ['generate', '--workdir=x', '--config=experiments/digits_gaussian.py'],
      'config.labeller is not set',
    ),
    (['report', '--workdir=x'], 'no such folder'),
    (
      ['train', '--workdir=x', '--config=experiments/digits.py:a,b'],
      'names two data sources',
    ),
    (
      [
        'train',
        '--workdir=x',
        '--config=experiments/cifar10_linf.py:wrn-10-1,ddpm',
        '--config.data.real_fraction=0.3',
        '--config.data.real_repeats=1',
      ],
      'real_fraction',
    ),
  ],
  ids=lambda x: ' '.join(x[-1:]) if isinstance(x, list) else '',
)
def test_mistakes_are_told_in_one_line(args, words, tmp_path, monkeypatch, capsys):
  """In this process, whose four devices cannot share 307 real images."""
  program, *args = [
    a.replace('=x', f'={tmp_path}/x') if a == '--workdir=x' else a for a in args
  ]
  assert cli._run(importlib.import_module(f'jaxrobust.{program}').PROGRAM, args) == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ')
  assert err.count('\n') == 1, err
  assert words in err
  assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize(
  'program', ['train', 'evaluate', 'generate', 'analyze', 'report']
)
def test_help_is_a_page(program, monkeypatch, capsys):
  with pytest.raises(SystemExit) as e:
    cli.run(importlib.import_module(f'jaxrobust.{program}').PROGRAM, ['--help'])
  assert e.value.code == 0
  out = capsys.readouterr().out
  assert f'jaxrobust {program} --workdir=' in out
  assert 'Example' in out
  assert 'Exit codes' in out


def test_a_mistake_in_a_real_process(call, tmp_path):
  code, out, err = call('train', f'--workdir={tmp_path}/x', '--confg=1')
  assert (code, out) == (1, '')
  assert err.startswith('error: --confg is not a flag of this program')
  assert err.count('\n') == 1
