"""Sweeps: each point resolves and has its own name; what is run, and the codes."""

import hashlib
import importlib
import json
import pathlib
import shlex
import signal
import subprocess
import sys

import pytest

from jaxrobust import config as configs
from jaxrobust import sweep
from jaxrobust.data import pipeline
from jaxrobust.errors import UserError
from jaxrobust.reporting import planned_runs
from jaxrobust.runs import cli

ROOT = pathlib.Path(__file__).parent.parent
WITH_SWEEP = sorted(
  p.stem for p in (ROOT / 'experiments').glob('*.py') if 'def sweep()' in p.read_text()
)

# Plays `python -m jaxrobust.PROGRAM`: does what $PLAY says of this run, or finishes.
STAND_IN = """#!/bin/bash
echo "$*" >> "$RECORD"
for argument; do
  case $argument in --workdir=*) folder=${argument#*=} ;; esac
done
mkdir -p "$folder"
case "$2 $(basename "$folder")" in
  "$PLAY_AT")
    case $PLAY in
      signal) trap 'exit 42' TERM; kill -TERM $PPID; while :; do sleep 0.01; done ;;
      late) trap '' TERM; kill -TERM $PPID ;;
      killed) kill -KILL $$ ;;
      *) exit "$PLAY" ;;
    esac ;;
esac
case $2 in
  jaxrobust.train) touch "$folder/checkpoint.npy" ;;
  jaxrobust.evaluate)
    echo "[{\\"protocol\\": $PROTOCOL}]" > "$folder/results.json" ;;
esac
"""


def config_of(name, arg=''):
  return importlib.import_module(f'experiments.{name}').get_config(arg)


@pytest.fixture
def digits(tmp_path):
  """The points of a small sweep over seeds, in a folder of their own."""
  file = tmp_path / 'seeds.py'
  file.write_text(
    'def sweep():\n'
    '  for seed in range(3):\n'
    "    yield f'seed-{seed}', {'seed': seed, 'variant': f'seed-{seed}'}\n"
  )
  return planned_runs.of_sweep(
    config_of('digits'), str(file), str(tmp_path / 'my runs')
  )


@pytest.fixture
def play(tmp_path, monkeypatch):
  """Replaces the programs; returns the lines of what was run."""
  python = tmp_path / 'python'
  python.write_text(STAND_IN)
  python.chmod(0o755)
  record = tmp_path / 'record'
  record.touch()
  monkeypatch.setattr(sys, 'executable', str(python))
  monkeypatch.setenv('RECORD', str(record))
  attack = config_of('digits').evaluation.attack.to_dict()
  protocol = {
    'suite': 'pgd-40',
    'split': 'test',
    'num_images': 797,
    'attacks': [{'name': 'pgd-40', **attack}],
    'checkpoint_sha256': hashlib.sha256(b'').hexdigest(),
  }
  monkeypatch.setenv('PROTOCOL', json.dumps(protocol))
  before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

  def run(points, code='', at=''):
    monkeypatch.setenv('PLAY', code)
    monkeypatch.setenv('PLAY_AT', at)
    record.write_text('')
    try:
      ended = sweep.run(points) or cli.DONE
    except cli.PreemptedError:
      ended = cli.PREEMPTED
    programs = [
      line.split()[1].removeprefix('jaxrobust.')
      + ' '
      + line.split('real_')[1].split()[0]
      for line in record.read_text().splitlines()
    ]
    return ended, programs

  yield run
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.parametrize('name', WITH_SWEEP)
def test_every_point_resolves_and_has_its_own_name(name):
  path = str(ROOT / 'experiments' / f'{name}.py')
  found = planned_runs.of_sweep(config_of(name), path, 'runs')
  folders = [p.workdir.name for p in found]
  assert len(set(folders)) == len({p.name for p in found}) == len(found) > 1
  for point in found:
    derived = configs.resolve(point.config)
    assert configs.experiment_name(point.config) == point.workdir.name
    size = point.config.data.batch_size
    parts = {'BatchNorm groups': size // point.config.model.batch_norm_group}
    repeats = point.config.data.real_repeats
    for devices in (1, 8, 32 if size == 1024 else 2):
      pipeline.mix_counts(
        size, derived.real_fraction, repeats, {'devices': devices, **parts}
      )


def test_some_experiments_have_a_sweep():
  assert {'digits', 'cifar10_linf'} <= set(WITH_SWEEP)


def test_the_flags_make_the_config_of_the_point(digits):
  """What a copied line would train is what the sweep has checked."""
  for point in digits:
    config = config_of('digits').unlock()
    for flag in point.flags:
      if flag.startswith('--config.'):
        field, value = flag.removeprefix('--config.').split('=')
        config[field] = type(config[field])(value)
    assert not configs.differences(config, point.config, ignore=())


def test_a_line_can_be_copied_into_a_shell(digits, tmp_path):
  line = sweep.command_line(digits[0].commands()[0][0])
  assert shlex.split(line)[:3] == [
    'jaxrobust',
    'train',
    f'--workdir={tmp_path}/my runs/digits_linf_wrn-10-1_real_seed-0',
  ]


def test_a_point_wins_over_a_common_flag(tmp_path):
  config = config_of('digits').unlock()
  config.seed = 7
  file = tmp_path / 'x.py'
  file.write_text("def sweep():\n  yield 'a', {'seed': 1}\n")
  (point,) = planned_runs.of_sweep(config, str(file), 'runs', ['--config.seed=7'])
  assert point.config.seed == 1
  assert point.flags[-2:] == ['--config.seed=7', '--config.seed=1']


def test_selection(digits):
  names = lambda **how: [p.name for p in sweep.points_to_run(digits, **how)]
  assert names() == ['seed-0', 'seed-1', 'seed-2']
  assert names(only='seed-[12]') == ['seed-1', 'seed-2']
  assert names(shard='0/2') == ['seed-0', 'seed-2']
  assert names(shard='1/2') == ['seed-1']
  assert names(only='seed-[12]', shard='1/2') == ['seed-2']
  assert names(shard='3/4') == []
  for wrong, message in (
    ({'only': 'seed'}, '--only=seed matches none of seed-0, seed-1, seed-2'),
    ({'only': '('}, '--only=(: '),
    ({'shard': '2/2'}, '--shard=2/2: write I/N'),
    ({'shard': '1'}, '--shard=1: write I/N'),
  ):
    with pytest.raises(UserError) as e:
      names(**wrong)
    assert str(e.value).startswith(message)


@pytest.mark.parametrize(
  'content, message',
  [
    ('', 'defines no sweep()'),
    ("def sweep():\n  yield 'a', {'sed': 1}\n", 'sweep(), a: '),
    ("def sweep():\n  yield 'a', {'seed': 'one'}\n", 'sweep(), a: '),
    (
      "def sweep():\n  yield 'a', {'seed': 1}\n  yield 'b', {'seed': 2}\n",
      'a and b are both named digits_linf_wrn-10-1_real',
    ),
  ],
)
def test_a_wrong_sweep_is_refused_in_one_line(tmp_path, content, message):
  file = tmp_path / 'x.py'
  file.write_text(content)
  with pytest.raises(UserError) as e:
    planned_runs.of_sweep(config_of('digits'), str(file), 'runs')
  assert message in str(e.value)
  assert '\n' not in str(e.value)


ALL = [f'{program} seed-{i}' for i in range(3) for program in ('train', 'evaluate')]
AT = 'jaxrobust.train digits_linf_wrn-10-1_real_seed-1'


def test_runs_everything_once(digits, play):
  assert play(digits) == (0, ALL)
  assert play(digits) == (0, [])


def test_what_is_unfinished_is_run_again(digits, play):
  play(digits)
  (digits[1].workdir / 'results.json').write_text(
    json.dumps([{'protocol': {'suite': 'clean', 'split': 'test', 'num_images': 797}}])
  )
  (digits[2].workdir / 'checkpoint.npy').unlink()
  # What was judged is the checkpoint that is gone.
  left = ['evaluate seed-1', 'train seed-2', 'evaluate seed-2']
  assert play(digits) == (0, left)


@pytest.mark.parametrize('code', [1, 42, 134])
def test_the_first_code_but_0_ends_the_sweep(digits, play, code):
  assert play(digits, str(code), AT) == (code, ALL[:3])
  assert play(digits) == (0, ALL[2:])


def test_a_killed_run_counts_as_a_crash(digits, play):
  assert play(digits, 'killed', AT) == (137, ALL[:3])


def test_a_signal_goes_to_the_run(digits, play):
  assert play(digits, 'signal', AT) == (42, ALL[:3])


def test_a_sweep_that_was_asked_to_stop_starts_nothing_more(digits, play):
  """The run finished nevertheless; what is left needs another start."""
  assert play(digits, 'late', AT) == (42, ALL[:3])
  assert play(digits, 'late', AT.replace('train', 'evaluate')) == (42, [ALL[3]])


def test_an_absent_sample_set_is_told_before_anything_runs(digits, play, tmp_path):
  play(digits[1:2])
  absent = {'data.samples': str(tmp_path / 'gaussian'), 'data.real_fraction': 0.5}
  for point in digits[1:]:
    point.config.update_from_flattened_dict(absent)
  with pytest.raises(UserError, match=r'^seed-2: .*gaussian is absent: make it'):
    play(digits)
  assert not digits[0].workdir.exists()
  (tmp_path / 'gaussian').mkdir()
  assert digits[2].absent_samples() == ''


@pytest.mark.slow
def test_the_program_lists_and_passes_flags_on(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'jaxrobust.sweep', '--list', f'--workdir={tmp_path}'),
      *('--config=experiments/digits.py', '--only=real-seed-1', '--shard=0/2'),
      *('--config.training.num_steps=5', '--coordinator=auto'),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  folder = tmp_path / 'digits_linf_wrn-10-1_real_seed-1'
  flags = (
    f'--workdir={folder} --config=experiments/digits.py '
    '--config.training.num_steps=5 --coordinator=auto --config.data.samples= '
    '--config.seed=1 --config.variant=seed-1'
  )
  assert done.stdout.splitlines() == [
    f'jaxrobust train {flags}',
    f'jaxrobust evaluate {flags}',
  ]
  assert not folder.exists()


@pytest.mark.slow
def test_the_program_lists_a_table(tmp_path):
  def sweep_(*flags):
    return subprocess.run(
      [sys.executable, '-m', 'jaxrobust.sweep', f'--workdir={tmp_path}', *flags],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )

  done = sweep_(
    *('--table=digits-linf', '--list', '--only=.*gaussian_seed-1'),
    '--coordinator=auto',
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert [x.split()[1] for x in lines] == ['train', 'generate', 'train', 'evaluate']
  for line in lines:
    assert '--coordinator=auto' in line
  both = sweep_('--table=digits-linf', '--config=experiments/digits.py')
  assert both.returncode == 1 and 'has no use with --table=' in both.stderr


def test_a_table_takes_no_config(capsys):
  flags = ['--workdir=runs', '--table=digits-linf', '--config.seed=1', '--list']
  assert cli._run(sweep.PROGRAM, flags) == 1
  assert '--config.seed has no use with --table=' in capsys.readouterr().err
