"""The launch scripts, against stand-ins for python and pip that record their calls."""

import fcntl
import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Plays `python -m venv`, pip and the programs of a finished environment.
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >> "$RECORD"
case "$*" in
  "-c import sys"*) exit "${OLD_PYTHON:-0}" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip "*) exit "${PIP_EXIT:-0}" ;;
  "-m jaxrobust.${FAILING:-none} "*) exit "${FAIL_WITH:-1}" ;;
esac
"""

PYTEST = (
  'python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile '
  '--no-loadscope-reorder'
)


@pytest.fixture
def call(tmp_path):
  """Runs a script with every python replaced; returns its result and the calls."""
  tools = tmp_path / 'tools'
  tools.mkdir()
  for name in (
    'python3',
    'python3.11',
    'python3.12',
    'python3.13',
    'python3.14',
    'python',
  ):
    (tools / name).write_text(STAND_IN)
    (tools / name).chmod(0o755)
  record = tmp_path / 'record'

  def start(script, *args, **variables):
    record.write_text('')
    environment = {
      **os.environ,
      'PATH': f'{tools}:/usr/bin:/bin',
      'RECORD': str(record),
      'JAXROBUST_VENV': str(tmp_path / 'venv'),
      **variables,
    }
    return subprocess.Popen(
      ['bash', str(ROOT / 'launch' / script), *args],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(script, *args, **variables):
    process = start(script, *args, **variables)
    out, err = process.communicate()
    done = subprocess.CompletedProcess(script, process.returncode, out, err)
    return done, record.read_text().splitlines()

  run.start = start
  return run


def test_environment_is_made_once(call):
  done, calls = call('test.sh', '-k', 'nothing')
  assert done.returncode == 0, done.stderr
  assert any('-m venv' in c for c in calls)
  assert any('pip install' in c and 'requirements.txt' in c for c in calls)
  assert calls[-1] == f'{PYTEST} -k nothing'
  _, calls = call('test.sh')
  assert calls == [PYTEST]


def test_an_interrupted_installation_is_repeated(call):
  done, calls = call('test.sh', PIP_EXIT='1')
  assert done.returncode == 1
  [line] = done.stderr.splitlines()
  assert line.startswith('error: the installation')
  assert 'another Python 3.11, 3.12 or 3.13' in line and 'remove ' in line
  assert not any('-m pytest' in c for c in calls)
  done, calls = call('test.sh')
  assert done.returncode == 0
  assert any('pip install' in c for c in calls)


def test_nothing_of_an_unfinished_environment_stays_but_its_cache(call, tmp_path):
  """Links to the Python that it began with would be kept by `python -m venv`."""
  venv = tmp_path / 'venv'
  (venv / 'bin').mkdir(parents=True)
  (venv / 'cache').mkdir()
  for name in ('pyvenv.cfg', 'bin/python3', 'cache/fetched', '.package'):
    (venv / name).touch()
  assert call('test.sh')[0].returncode == 0
  assert not (venv / 'bin' / 'python3').exists()
  assert (venv / 'cache' / 'fetched').exists()


def test_a_finished_environment_is_brought_up_to_date_by_its_own_python(call, tmp_path):
  assert call('test.sh')[0].returncode == 0
  (tmp_path / 'venv' / '.installed').write_text('an older list')
  done, calls = call('test.sh', OLD_PYTHON='1')
  assert done.returncode == 0, done.stderr
  assert not any('-m venv' in c for c in calls)
  assert any('pip install' in c and 'requirements.txt' in c for c in calls)
  # That Python is gone.
  (tmp_path / 'venv' / 'bin' / 'python').unlink()
  assert any('-m venv' in c for c in call('test.sh')[1])


@pytest.mark.skipif(not shutil.which('flock'), reason='flock is not installed')
def test_one_script_at_a_time_installs(call, tmp_path):
  (tmp_path / 'venv').mkdir()
  with (tmp_path / 'venv' / '.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    process = call.start('test.sh')
    assert process.stdout.readline().startswith('another script installs into ')
    assert not (tmp_path / 'record').read_text()
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert 'making the environment' in out


@pytest.mark.parametrize('script', ['docs.sh', 'test.sh'])
def test_help_of_a_script_installs_nothing(call, script):
  done, calls = call(script, '--help')
  assert done.returncode == 0
  assert f'bash launch/{script}' in done.stdout
  assert not calls


def test_an_old_python_is_refused_in_one_line(call):
  done, calls = call('test.sh', OLD_PYTHON='1')
  assert done.returncode == 1
  assert done.stderr.startswith('error: no Python 3.11, 3.12 or 3.13')
  assert not any('venv' in c for c in calls)


def test_local_runs_the_public_programs_in_order(call, tmp_path):
  done, calls = call('local.sh', str(tmp_path / 'out'))
  assert done.returncode == 0, done.stderr
  programs = [
    c.split('-m jaxrobust.')[1].split()[0] for c in calls if '-m jaxrobust.' in c
  ]
  assert programs == [
    'train',
    'generate',
    'train',
    'evaluate',
    'train',
    'evaluate',
    'report',
  ]
  assert all(f'--workdir={tmp_path}/out' in c for c in calls if '-m jaxrobust.' in c)


def test_local_with_several_seeds(call, tmp_path):
  done, calls = call('local.sh', str(tmp_path / 'out'), '--seeds=3')
  assert done.returncode == 0, done.stderr
  trained = [c for c in calls if '-m jaxrobust.train' in c]
  assert len(trained) == 1 + 3 * 2
  assert len({c.split('--workdir=')[1].split()[0] for c in trained}) == 7
  assert [sum(f'--config.seed={s}' in c for c in trained) for s in range(4)] == [
    2,
    2,
    2,
    0,
  ]


def test_local_in_full_trains_with_the_samples_of_both_generators(call, tmp_path):
  done, calls = call('local.sh', '--full', str(tmp_path / 'out'))
  assert done.returncode == 0, done.stderr
  generated = [c for c in calls if '-m jaxrobust.generate' in c]
  assert [c.split('--config=')[1].split()[0] for c in generated] == [
    'digits_gaussian',
    'digits_edm',
  ]
  headings = [x for x in done.stderr.splitlines() if re.match(r'\d+/10 ', x)]
  assert [x.split('/')[0] for x in headings] == [str(i) for i in range(1, 11)]
  trained = [c for c in calls if '-m jaxrobust.train' in c]
  samples = [c.split('.samples=')[1] for c in trained if '.samples=' in c]
  assert samples == [f'{tmp_path}/out/{x}/samples' for x in ('gaussian', 'edm')]
  assert sum('-m jaxrobust.evaluate' in c for c in calls) == 3


@pytest.mark.parametrize('code', [1, 42, 134])
def test_local_stops_with_the_code_of_the_program_that_failed(call, tmp_path, code):
  done, calls = call('local.sh', str(tmp_path), FAILING='generate', FAIL_WITH=str(code))
  assert done.returncode == code
  assert 'jaxrobust.generate' in calls[-1]


def test_help_of_local(call):
  done, calls = call('local.sh', '--help')
  assert done.returncode == 0
  assert 'bash launch/local.sh' in done.stdout
  assert not calls
  done, _ = call('local.sh', '--fast')
  assert done.returncode == 1
  assert done.stderr.startswith('error: --fast: give a folder')
