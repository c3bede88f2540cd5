"""How programs end: whatever becomes of their streams, threads and workdirs."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import pytest

from experiments import digits
from jaxrobust.config import experiments
from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError, UserError
from jaxrobust.runs import cli, metrics, workdir
from jaxrobust.runs.stop_requests import StopRequests
from tests.helpers.programs import ROOT


def ends(script, *, shell='exec "$0" "$@"', **kwargs):
  """(exit code, stdout, stderr) of a script in a process of its own."""
  done = subprocess.run(
    ['bash', '-c', shell, sys.executable, '-c', script],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=100,
    **kwargs,
  )
  return done.returncode, done.stdout, done.stderr


PRINTS = """
import sys
from jaxrobust.runs import exits

def program():
  while True:
    print('line ' * 1000)

exits.exit_with(program)
"""


def test_a_program_whose_lines_nobody_reads_ends_quietly():
  shell = '"$0" "$@" | head -c 4; echo " ${PIPESTATUS[0]}"'
  assert ends(PRINTS, shell=shell) == (0, 'line 141\n', '')


def test_another_broken_pipe_is_an_error_as_any_other():
  code, _, err = ends(PRINTS.replace("print('line ' * 1000)", 'raise BrokenPipeError'))
  assert code == 1 and err.endswith('BrokenPipeError\n')


WAITS = """
import threading
from jaxrobust.runs import exits

threading.Thread(target=threading.Event().wait).start()
print('the last line')
exits.exit_with(lambda: 42)
"""


def test_threads_of_libraries_are_not_waited_for():
  assert ends(WAITS) == (42, 'the last line\n', '')


CLOSED = """
import os, sys
from jaxrobust.runs import exits

def program():
  with open(sys.argv[1], 'w') as f:
    print('to stdout')
    exits.say('to stderr')
    os.write(2, b'from a library')
    f.write('mine')
  return 0

exits.exit_with(program)
"""


def test_closed_streams_are_no_files_of_the_program(tmp_path):
  file = tmp_path / 'file'
  shell = f'exec "$0" "$@" {file} <&- >&- 2>&-'
  assert ends(CLOSED, shell=shell)[0] == 0
  assert file.read_text() == 'mine'


def program(main, *flags):
  """Runs `main` as a program in this process; its exit code."""
  return cli._run(cli.Program('train', main), list(flags))


DIGITS = '--config=experiments/digits.py'


def test_a_name_that_is_not_utf8_is_refused(capsys, tmp_path):
  flag = f'--workdir={tmp_path}/' + os.fsdecode(b'\xff')
  assert program(None, flag, DIGITS) == cli.ERROR
  assert 'is not UTF-8: rename' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


OWN = """
import jax
from jaxrobust.training import losses

def loss(x):
  return losses.nothing(x)

def raises(config, workdir):
  jax.jit(loss)(1.0)

def lost(config, workdir):
  raise jax.errors.JaxRuntimeError('UNAVAILABLE: a device is lost')

def full(config, workdir):
  raise TimeoutError('the network')
"""


def test_a_fault_of_the_users_own_code_is_an_error(capsys, tmp_path):
  """It would come again, however often a babysitter started it."""
  file = tmp_path / 'own.py'
  file.write_text(OWN)
  home = tmp_path / 'run'

  def code(main):
    capsys.readouterr()
    return program(main, f'--workdir={home}', DIGITS)

  own = experiments.load_file(str(file))
  assert code(own.raises) == cli.ERROR
  *before, line = capsys.readouterr().err.splitlines()
  assert line.startswith(f'error: {file}:6: AttributeError: module')
  assert any('Traceback' in x for x in before)
  # A fault of a device or of the network may be over the next time; nor is a fault of
  # this package, here a main with other arguments, one of the user's.
  for main in (own.lost, own.full, metrics.duration):
    assert code(main) == cli.CRASHED
    assert 'error: ' not in capsys.readouterr().err.replace('Error: ', '')


def test_lines_of_libraries_are_not_shown(tmp_path):
  """Those in an environment, in a clone of the package's name, neither."""
  inside = ROOT / 'jaxrobust' / 'runs' / 'cli.py'
  library = ROOT / '.venv' / 'lib' / 'python3.11' / 'site-packages' / 'orbax' / 'x.py'
  clone = tmp_path / 'jaxrobust' / '.venv' / 'lib' / 'x.py'
  record = lambda path: logging.makeLogRecord({'pathname': str(path)})
  assert [cli._is_ours(record(x)) for x in (inside, library, clone)] == [
    True,
    False,
    False,
  ]


@pytest.mark.parametrize('how', ['removed', 'moved', 'half removed'])
def test_a_workdir_that_is_gone_is_not_made_again(capsys, tmp_path, how):
  home, elsewhere = tmp_path / 'run', tmp_path / 'elsewhere'

  def main(config, folder):
    folder = workdir.claim(folder, config)
    writer = metrics.Writer(folder, 0)
    writer.write(1, {'train/loss': 1.0})
    if how == 'moved':
      home.rename(elsewhere)
    elif how == 'removed':
      shutil.rmtree(home)
      # As a save does that is under way.
      (home / 'checkpoints' / '1.orbax-checkpoint-tmp').mkdir(parents=True)
    else:
      (home / 'config.json').unlink()
    with StopRequests() as stops:
      stops.reached()

  assert program(main, f'--workdir={home}', DIGITS) == cli.ERROR
  err = capsys.readouterr().err
  [line] = [x for x in err.splitlines() if x.startswith('error: ')]
  assert f'{home} was removed or moved' in line and 'Traceback' not in err
  if how == 'half removed':
    assert json.loads((home / 'status.json').read_text())['state'] == 'running'
  else:
    assert not home.exists()


def test_metrics_of_a_workdir_that_is_gone_are_not_written(tmp_path):
  workdir.begin(['train'])
  folder = workdir.claim(tmp_path / 'run', digits.get_config())
  writer = metrics.Writer(folder, 0)
  (folder / 'config.json').unlink()
  with pytest.raises(UserError, match='was removed or moved'):
    writer.write(1, {'train/loss': 1.0})
  assert (folder / 'metrics.jsonl').read_text() == ''
  workdir.write_status('failed')


@pytest.mark.parametrize('number', parallel.STOP_SIGNALS)
def test_requests_to_stop_name_what_is_kept(number):
  with StopRequests('the state is saved') as stops:
    stops.check()
    signal.raise_signal(number)
    with pytest.raises(
      PreemptedError, match='during features, the state is saved: run'
    ):
      stops.progress('features', 10, 'images').advance(1)


def test_a_hangup_that_is_ignored_stays_so():
  """As under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with StopRequests() as stops:
      signal.raise_signal(signal.SIGHUP)
      assert not stops.reached()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


WAITING = """
import sys
from absl import logging
from jaxrobust.runs import process_group

logging.set_verbosity(logging.INFO)
process_group._PATIENCE_S, process_group._REPORT_S = 4, 1
process_group.join('localhost:1', 2, 1)
"""


def test_processes_that_never_come_are_one_line():
  code, _, err = ends(WAITING)
  lines = err.splitlines()
  assert code == 1 and 'Check failure' not in err, err
  assert lines[-1].startswith('error: the 2 processes at localhost:1 did not all come')
  assert sum('waiting for the 2 processes' in x for x in lines) >= 3
