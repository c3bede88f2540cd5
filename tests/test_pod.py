"""pod.sh and worker.sh, against a stand-in for the environment's python."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / 'launch').glob('*.sh')) + [ROOT / '.ci' / 'run']

# Plays a program: $CODES has the exit code of each process, $MODE how it takes signals.
STAND_IN = """#!/bin/bash
i=0
for argument; do
  case $argument in --process_id=*) i=${argument#*=} ;; esac
done
echo "$*" >> "$RECORD"
case $* in '-m jaxrobust.'*) ;; *) exit ;; esac
echo "devices ${JAX_NUM_CPU_DEVICES:-none}"
modes=(${MODE:-end})
case ${modes[i]:-$modes} in
  stubborn)
    trap '' TERM INT
    sleep 100 &
    echo "child $!" >> "$RECORD" ;;
  polite) trap 'echo saved; exit 42' TERM; trap 'exit 130' INT ;;
  end) codes=(${CODES:-0}); exit "${codes[i]:-0}" ;;
esac
echo ready
while :; do sleep 0.01; done
"""


@pytest.fixture
def environment(tmp_path):
  """Variables with which a finished environment holds the stand-in."""
  venv = tmp_path / 'venv'
  (venv / 'bin').mkdir(parents=True)
  (venv / 'bin' / 'python').write_text(STAND_IN)
  (venv / 'bin' / 'python').chmod(0o755)
  stamp = subprocess.run(
    ['cksum'],
    stdin=(ROOT / 'requirements.txt').open(),
    capture_output=True,
    text=True,
  ).stdout
  (venv / '.installed').write_text(stamp)
  described = b''.join((ROOT / x).read_bytes() for x in ('setup.py', 'pyproject.toml'))
  stamp = subprocess.run(
    ['cksum'], input=described, capture_output=True
  ).stdout.decode()
  (venv / '.package').write_text(f'{ROOT} {stamp}')
  tools = tmp_path / 'tools'
  tools.mkdir()
  shutil.copy(venv / 'bin' / 'python', tools / 'python3')  # makes no environment
  (tmp_path / 'record').touch()
  return {
    **{k: v for k, v in os.environ.items() if not k.startswith(('JAX', 'TPU_'))},
    'PATH': f'{tools}:/usr/bin:/bin',
    'HOME': str(tmp_path),
    'RECORD': str(tmp_path / 'record'),
    'JAXROBUST_VENV': str(venv),
    'JAXROBUST_STATE': str(tmp_path / 'state'),
    'JAXROBUST_TPU': '0',
  }


@pytest.fixture
def call(environment):
  """Runs a script to its end."""

  def run(script, *args, stdout=subprocess.PIPE, **variables):
    return subprocess.run(
      ['bash', str(ROOT / 'launch' / script), *args],
      env={**environment, **variables},
      stdout=stdout,
      stderr=subprocess.PIPE,
      text=True,
      timeout=60,
    )

  return run


@pytest.fixture
def start(environment):
  """Starts a script and returns it once as many of its processes are ready."""
  started = []

  def run(script, *args, ready, own_group=False, **variables):
    process = subprocess.Popen(
      ['bash', str(ROOT / 'launch' / script), *args],
      start_new_session=own_group,
      env={**environment, **variables},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    while ready:
      line = process.stdout.readline()
      assert line, process.stderr.read()
      ready -= line.endswith('ready\n')
    return process

  yield run
  for process in started:
    process.kill()
    process.wait()  # Not for its pipes, which a program that it started may hold.
    process.stdout.close()
    process.stderr.close()


def until(condition):
  """Looks again and again; fails after a minute."""
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline, 'it did not happen'


@pytest.fixture
def record(tmp_path):
  return lambda: (tmp_path / 'record').read_text().splitlines()


def assert_children_are_gone(lines):
  """What a killed program waited for would hold the devices."""
  children = [line.split()[1] for line in lines if line.startswith('child')]
  assert children
  for child in children:
    shown = subprocess.run(['ps', '-o', 'stat=', child], capture_output=True, text=True)
    assert shown.stdout.strip()[:1] in ('', 'Z')


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_clean(script):
  beside = pathlib.Path(sys.executable).parent
  shellcheck = shutil.which('shellcheck', path=f'{beside}:{os.environ["PATH"]}')
  if not shellcheck:
    pytest.skip('shellcheck is not installed')
  done = subprocess.run(
    [shellcheck, '-x', str(script)], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  'grace', ['a[$(touch "$HOME/X")0]', '-1', '1.5', '1\n', '9' * 9]
)
@pytest.mark.parametrize('args', [('pod.sh', '1', 'train'), ('worker.sh', 'train')])
def test_a_grace_that_is_no_number_is_refused(call, record, tmp_path, args, grace):
  """Bash would run what stands in an expression."""
  done = call(*args, JAXROBUST_GRACE=grace)
  assert done.returncode == 1
  assert done.stderr.startswith('error: JAXROBUST_GRACE=')
  assert 'give seconds, 0 to 999999' in done.stderr and done.stderr.count('\n') == 1
  assert record() == []
  assert not (tmp_path / 'X').exists()


needs_ps = pytest.mark.skipif(not shutil.which('ps'), reason='ps is not installed')
needs_full = pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')


def test_the_scripts_know_every_program():
  script = (ROOT / 'launch' / 'contract.sh').read_text()
  names = re.search(r'require_program.*?case \$1 in\n(.*?)\*\)', script, re.S)[1]
  programs = {
    p.stem for p in (ROOT / 'jaxrobust').glob('*.py') if 'PROGRAM = ' in p.read_text()
  }
  assert set(re.findall(r'[a-z.]+', names)) == programs | {'data', 'models.download'}


@needs_ps
class TestPod:
  def test_the_processes_find_each_other(self, call, record):
    done = call(
      *('pod.sh', '3', '--devices=2', 'jaxrobust', 'train'),
      '--workdir=a b',
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f'[{i}] devices 2' for i in range(3)]
    calls = [line.split('--coordinator=') for line in sorted(record())]
    assert {before for before, _ in calls} == {'-m jaxrobust.train --workdir=a b '}
    addresses, rest = zip(*(after.split(' ', 1) for _, after in calls), strict=True)
    assert len(set(addresses)) == 1
    assert addresses[0].startswith('127.0.0.1:')
    assert sorted(rest) == [f'--num_processes=3 --process_id={i}' for i in range(3)]

  @pytest.mark.parametrize(
    'codes, together',
    [
      ('0 0', 0),
      ('42 42', 42),
      ('0 42', 42),
      ('42 134', 134),
      ('139 134', 139),
      ('134 1', 1),
      ('1 42', 1),
      ('0 2', 1),  # such as bash's own
      ('0 127', 1),
    ],
  )
  def test_the_codes_of_all_give_one(self, call, codes, together):
    assert call('pod.sh', '2', 'train', CODES=codes).returncode == together

  @needs_full
  def test_output_that_cannot_be_written_changes_no_code(self, call):
    with open('/dev/full', 'w') as full:
      done = call('pod.sh', '2', 'train', CODES='0 42', stdout=full)
    assert done.returncode == 42
    assert 'No space left' in done.stderr

  def test_a_signal_reaches_every_process(self, start):
    for number, code in ((signal.SIGTERM, 42), (signal.SIGINT, 130)):
      pod = start('pod.sh', '2', 'train', ready=2, MODE='polite')
      pod.send_signal(number)
      _, err = pod.communicate(timeout=60)
      assert pod.returncode == code, err
      assert err == ''

  @pytest.mark.parametrize('number, code', [('TERM', 42), ('INT', 130)])
  def test_a_signal_to_its_group_waits_for_the_processes(self, start, number, code):
    """As that of a terminal, or of timeout: it ends what the script waits with, too."""
    for _ in range(3):
      pod = start('pod.sh', '2', 'train', ready=2, own_group=True, MODE='polite')
      os.killpg(pod.pid, signal.Signals[f'SIG{number}'])
      out, err = pod.communicate(timeout=60)
      assert pod.returncode == code, err
      assert 'No such file' not in out + err

  def test_a_signal_reaches_those_that_are_about_to_begin(
    self, environment, start, record, tmp_path
  ):
    slow = pathlib.Path(environment['PATH'].split(':')[0]) / 'sh'
    slow.write_text(
      '#!/bin/bash\necho begun >> "$RECORD"\n'
      'while [ ! -f "$HOME/go" ]; do sleep 0.01; done\nexec /bin/sh "$@"\n'
    )
    slow.chmod(0o755)
    pod = start('pod.sh', '2', 'train', ready=0, MODE='polite')
    until(lambda: record().count('begun') == 2)
    pod.send_signal(signal.SIGTERM)
    (tmp_path / 'go').touch()
    _, err = pod.communicate(timeout=60)
    # It ends the stand-in before, or after, that is polite.
    assert (pod.returncode, err) in ((42, ''), (143, '')), err

  def test_stragglers_get_term_then_kill(self, call, record):
    done = call(
      *('pod.sh', '3', 'train'),
      MODE='end polite stubborn',
      CODES='1',
      JAXROBUST_GRACE='0',
    )
    assert done.returncode == 1
    assert_children_are_gone(record())
    assert done.stderr.splitlines()[:2] == [
      'processes that are left get TERM',
      'processes that are left get KILL',
    ]

  def test_a_killed_straggler_is_a_crash(self, call):
    done = call(
      *('pod.sh', '2', 'train'),
      MODE='end stubborn',
      CODES='42',
      JAXROBUST_GRACE='0',
    )
    assert done.returncode == 137

  def test_those_that_end_with_0_wait_for_the_others(self, start):
    pod = start('pod.sh', '2', 'train', ready=1, MODE='end polite', JAXROBUST_GRACE='0')
    pod.send_signal(signal.SIGTERM)
    pod.communicate(timeout=60)
    assert pod.returncode == 42

  @pytest.mark.parametrize(
    'args, message',
    [
      ((), 'give the number of processes'),
      (('2\n',), r"$'2\n': give the number of processes"),
      (('2', '--devices=2\n', 'train'), r"$'--devices=2\n': write --devices=M"),
      (('2', 'python', '-m'), 'give train, evaluate'),
      (('2', 'jaxrobust'), 'give train, evaluate'),
      (('x',), 'x: give the number of processes'),
      (('2',), 'give train, evaluate'),
      (('2', '--fast', 'train'), '--fast is no program: give train'),
      (('2', 'trian'), 'trian is no program: give train, evaluate'),
      (('2', '--devices=x', 'train'), '--devices=x: write --devices=M, M from 1 to 99'),
      (('2', 'python', '-m', 'jaxrobust.data', 'list'), 'data runs on one host'),
    ],
  )
  def test_refusals(self, call, args, message):
    done = call('pod.sh', *args)
    assert done.returncode == 1
    assert done.stderr.startswith(f'error: {message}')
    assert done.stderr.count('\n') == 1


@needs_ps
class TestWorker:
  def test_output_goes_to_the_log_and_the_code_through(self, call, record, tmp_path):
    done = call('worker.sh', 'train', '--workdir=a b', CODES='42')
    assert done.returncode == 42
    assert record() == ['-m jaxrobust.train --workdir=a b']
    assert done.stdout == 'devices none\n'
    header, line = (tmp_path / 'state' / 'log').read_text().splitlines()
    assert header.endswith(r' train --workdir=a\ b')
    assert line == 'devices none'
    status = call('worker.sh', '--status').stdout.splitlines()
    assert status[0] == f'== {os.uname().nodename}: exit 42'
    assert status[1:] == [f'  {header}', f'  {line}']

  @needs_full
  @pytest.mark.parametrize('code', [0, 42, 134])
  def test_output_that_cannot_be_written_changes_no_code(self, call, tmp_path, code):
    with open('/dev/full', 'w') as full:
      done = call('worker.sh', 'train', CODES=str(code), stdout=full)
    assert done.returncode == code
    assert 'No space left' in done.stderr
    assert (tmp_path / 'state' / 'exit').read_text() == f'{code}\n'

  def test_a_record_that_cannot_be_written_changes_no_code(self, call, tmp_path):
    (tmp_path / 'state' / 'exit.tmp').mkdir(parents=True)
    assert call('worker.sh', 'train', CODES='42').returncode == 42

  @pytest.mark.parametrize(
    'words, program',
    [
      (('jaxrobust', 'train'), 'train'),
      (('jaxrobust', 'download'), 'models.download'),
      (('python', '-m', 'jaxrobust.train'), 'train'),  # as sweeps printed it
    ],
  )
  def test_a_line_of_a_sweep_is_a_program(self, call, record, words, program):
    assert call('worker.sh', *words, '-x', 'a b').returncode == 0
    assert record() == [f'-m jaxrobust.{program} -x a b']

  @pytest.mark.parametrize('number, code', [('TERM', 42), ('INT', 130)])
  def test_signals_reach_the_program(self, start, number, code):
    worker = start('worker.sh', 'train', ready=1, MODE='polite')
    worker.send_signal(signal.Signals[f'SIG{number}'])
    worker.communicate(timeout=60)
    assert worker.returncode == code

  def test_a_shutdown_cuts_nothing_off(self, start, call, tmp_path):
    """It sends TERM to the script, to the program and to whoever reads its output."""
    worker = start('worker.sh', 'train', ready=1, MODE='polite')
    program = int((tmp_path / 'state' / 'pid').read_text())
    os.killpg(os.getpgid(program), signal.SIGTERM)
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=60)
    assert worker.returncode == 42
    status = call('worker.sh', '--status').stdout.splitlines()
    assert status[0].endswith(': exit 42')
    assert status[-1] == '  saved'

  def test_the_one_before_is_stopped_first(self, start, call, record):
    before = start('worker.sh', 'train', ready=1, MODE='polite')
    assert ': running\n' in call('worker.sh', '--status').stdout
    done = call('worker.sh', 'evaluate')
    before.communicate(timeout=60)
    assert before.returncode == 42
    assert done.returncode == 0
    assert 'stopping process' in done.stderr
    assert record() == ['-m jaxrobust.train', '-m jaxrobust.evaluate']

  def test_what_does_not_stop_is_killed(self, start, call, record):
    worker = start('worker.sh', 'train', ready=1, MODE='stubborn')
    assert call('worker.sh', '--stop', JAXROBUST_GRACE='0').returncode == 0
    worker.communicate(timeout=60)
    assert worker.returncode == 137
    assert_children_are_gone(record())
    assert ': exit 137\n' in call('worker.sh', '--status').stdout

  def test_another_program_with_the_recorded_number_is_left_alone(self, call, tmp_path):
    other = subprocess.Popen(['sleep', '100'])
    (tmp_path / 'state').mkdir()
    (tmp_path / 'state' / 'pid').write_text(f'{other.pid}\n')
    assert ': stopped\n' in call('worker.sh', '--status').stdout
    assert call('worker.sh', 'train', JAXROBUST_GRACE='0').returncode == 0
    assert other.poll() is None
    other.kill()
    other.wait()

  def test_start_returns_at_once_and_stop_ends_it(self, call, tmp_path):
    assert call('worker.sh', '--start', 'train', MODE='polite').returncode == 0
    assert ': running\n' in call('worker.sh', '--status').stdout
    # Until the program has begun, a stop ends the script that would start it.
    log = tmp_path / 'state' / 'log'
    until(lambda: log.exists() and 'ready' in log.read_text())
    assert call('worker.sh', '--stop').returncode == 0
    # The script writes the code as soon as the program has ended.
    until(lambda: ': exit 42\n' in call('worker.sh', '--status').stdout)

  def test_words_of_a_program_are_no_lines_of_the_status(self, call, tmp_path):
    """They, and what it prints, stand in the log, whose end the status shows."""
    words = ('--x=\n== a: exit 1', '--config.name=y: running', '$(touch X)')
    assert call('worker.sh', 'train', *words).returncode == 0
    with open(tmp_path / 'state' / 'log', 'a') as log:
      log.write('== b: exit 1\n')
    first, *rest = call('worker.sh', '--status').stdout.splitlines()
    assert first == f'== {os.uname().nodename}: exit 0'
    assert len(rest) == 3 and all(line.startswith('  ') for line in rest)

  def test_the_state_may_be_in_a_folder_of_this_one(self, call, record, tmp_path):
    relative = os.path.relpath(tmp_path / "a 'b", os.getcwd())
    done = call('worker.sh', 'train', JAXROBUST_STATE=relative, CDPATH='/')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a 'b" / 'exit').read_text() == '0\n'

  def test_folders_where_cd_looks_are_not_taken_for_this_one(self, environment):
    done = subprocess.run(
      ['bash', 'launch/worker.sh', 'train'],
      cwd=ROOT,
      env={**environment, 'CDPATH': str(ROOT)},
      capture_output=True,
      text=True,
    )
    assert (done.returncode, done.stdout) == (0, 'devices none\n'), done.stderr

  def test_a_record_that_is_no_process_is_left_alone(self, call, tmp_path):
    (tmp_path / 'state').mkdir()
    for pid in ('-1', '1 2', '$(touch X)', ''):
      (tmp_path / 'state' / 'pid').write_text(pid)
      done = call('worker.sh', '--stop')
      assert (done.returncode, done.stderr) == (0, '')

  def test_refusals(self, call):
    for args, given in (
      ((), ''),
      (('--fast',), '--fast is no program: '),
      (('python', '-m'), ''),
      (('x\ny\x1b',), r"$'x\ny\E' is no program: "),
    ):
      done = call('worker.sh', *args)
      assert done.returncode == 1
      assert done.stderr.startswith(f'error: {given}give train, evaluate')
      assert done.stderr.count('\n') == 1


class TestWorkerOnTPU:
  def tool(self, environment, name, script):
    path = pathlib.Path(environment['PATH'].split(':')[0]) / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$RECORD"\n{script}\n')
    path.chmod(0o755)

  def test_programs_join_those_of_the_other_hosts(self, environment, call, record):
    self.tool(environment, 'rm', 'case $* in *libtpu*) ;; *) exec /bin/rm "$@" ;; esac')
    for program, given, expected in (
      ('train', [], ['--coordinator=auto']),
      ('report', [], ['--coordinator=auto']),
      ('train', ['--coordinator=a:1'], ['--coordinator=a:1']),
      ('train', ['--coordinator', 'a:1'], ['--coordinator', 'a:1']),
      # A word of another flag.
      (
        'train',
        ['--x= --coordinator '],
        ['--x=', '--coordinator', '--coordinator=auto'],
      ),
      # They know no such flag.
      ('data', [], []),
      ('models.download', [], []),
    ):
      done = call('worker.sh', program, *given, JAXROBUST_TPU='1')
      assert done.returncode == 0, done.stderr
      assert record()[-1].split() == ['-m', f'jaxrobust.{program}', *expected]
    assert 'rm -f /tmp/libtpu_lockfile' in record()

  def test_the_lock_of_another_user_ends_nothing(self, environment, call, record):
    self.tool(
      environment, 'rm', 'case $* in *libtpu*) exit 1 ;; *) exec /bin/rm "$@" ;; esac'
    )
    done = call('worker.sh', 'train', JAXROBUST_TPU='1')
    assert done.returncode == 0, done.stderr
    assert record()[-1].startswith('-m jaxrobust.train')

  def test_the_environment_gets_the_tpu_extra_once(self, call, record):
    for _ in range(2):
      assert call('worker.sh', '--setup', JAXROBUST_TPU='1').returncode == 0
    (line,) = [x for x in record() if 'requirements.txt' in x]
    assert line.endswith('requirements.txt jax[tpu]')

  def test_an_interpreter_comes_by_uv_where_there_is_none(
    self, environment, call, record, tmp_path
  ):
    """Images of TPU VMs have Python 3.10."""
    tools = pathlib.Path(environment['PATH'].split(':')[0])
    for tool in ('bash', 'cat', 'cksum', 'dirname', 'mkdir', 'cp', 'sh', 'chmod'):
      (tools / tool).symlink_to(shutil.which(tool))
    install = (
      'case "$*" in\n'
      '  "-c "*) exit 1 ;;\n'
      '  "-m uv"*) mkdir -p "$HOME/.local/bin"\n'
      '    cp "$JAXROBUST_VENV/bin/python" "$HOME/.local/bin/python3.11" ;;\n'
      'esac'
    )
    self.tool(environment, 'python3', install)
    for _ in range(2):
      done = call('worker.sh', '--setup', JAXROBUST_TPU='1', PATH=str(tools))
      assert done.returncode == 0, done.stderr
    assert [x for x in record() if x.startswith('python3 -m')] == [
      'python3 -m pip install --quiet --user uv',
      'python3 -m uv python install 3.11',
    ]
