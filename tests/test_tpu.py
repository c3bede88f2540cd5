"""tpu.sh, against a gcloud that plays states and a sleep that only records itself."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not shutil.which('git'), reason='git is not installed')

# Answers each kind of call with the next line of the file of that name in $PLAY (the
# last one again and again): exit code, then output, which failures print as errors.
# Without one: success.
GCLOUD = """#!/bin/bash
case $* in
  *'queued-resources create '*) kind=create ;;
  *'queued-resources delete '*) kind=delete ;;
  *'queued-resources describe '*) kind=state ;;
  *'value(networkEndpoints'*) kind=hosts ;;
  *'tpu-vm describe '*) kind=node ;;
  *'tpu-vm scp '*) kind=copy ;;
  *--setup*) kind=setup ;;
  *--start*) kind=start ;;
  *--status*) kind=status ;;
  *--stop*) kind=stop ;;
  *) kind=other ;;
esac
echo "$kind" >> "$PLAY/kinds"
printf '%s\\0' "$@" >> "$PLAY/calls"
printf '\\n' >> "$PLAY/calls"
[ -f "$PLAY/$kind" ] || exit 0
IFS= read -r line < "$PLAY/$kind"
[ "$(wc -l < "$PLAY/$kind")" = 1 ] || sed -i 1d "$PLAY/$kind"
[ "${line%% *}" = 0 ] || exec >&2
echo 'WARNING: gcloud is old' >&2
[ "${line#* }" = "$line" ] || printf '%b\\n' "${line#* }"
exit "${line%% *}"
"""
SLEEP = '#!/bin/bash\necho "sleep $1" >> "$PLAY/kinds"\n'
RUNNING = '0 == a: running\\n== b: running\\nstep 7'
BABYSIT = ('babysit', 'x', '--type=v4-16', '--spot', 'train', '--workdir=gs://b/x')


def ended(a, b):
  return f'0 == a: {a}\\n== b: {b}\\nlast line'


class Run:
  """What a call of tpu.sh did."""

  def __init__(self, done, play):
    read = lambda name: (play / name).read_text() if (play / name).exists() else ''
    self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
    self.kinds = read('kinds').splitlines()
    self.calls = [c.split('\0')[:-1] for c in read('calls').split('\n')[:-1]]

  @property
  def story(self):
    """The calls that change something or look at the workers, and the pauses."""
    return [k for k in self.kinds if k not in ('state', 'node', 'hosts', 'copy')]


@pytest.fixture
def tpu(tmp_path):
  """Runs tpu.sh in a copy of the launch folder, in a repository of its own."""
  tools, play, root = (tmp_path / name for name in ('tools', 'play', 'root'))
  for folder in (tools, play, root / 'launch'):
    folder.mkdir(parents=True)
  for name, script in (('gcloud', GCLOUD), ('sleep', SLEEP)):
    (tools / name).write_text(script)
    (tools / name).chmod(0o755)
  for script in (ROOT / 'launch').glob('*.sh'):
    (root / 'launch' / script.name).write_text(script.read_text())
  identity = ['-c', 'user.name=x', '-c', 'user.email=x@example.org']
  for command in (['init', '-q'], ['add', '-A'], [*identity, 'commit', '-qm', 'x']):
    subprocess.run(['git', *command], cwd=root, check=True)

  def run(*args, wait='30', path=f'{tools}:/usr/bin:/bin', **answers):
    for kind, lines in answers.items():
      (play / kind).write_text('\n'.join(lines) + '\n')
    done = subprocess.run(
      ['bash', str(root / 'launch' / 'tpu.sh'), *args],
      env={
        **os.environ,
        'PATH': path,
        'PLAY': str(play),
        'JAXROBUST_WAIT': wait,
      },
      capture_output=True,
      text=True,
      timeout=300,
    )
    return Run(done, play)

  run.root = root
  return run


class TestVerbs:
  @pytest.mark.parametrize(
    'accelerator, runtime',
    [
      ('v2-8', 'tpu-ubuntu2204-base'),
      ('v3-32', 'tpu-ubuntu2204-base'),
      ('v4-32', 'tpu-ubuntu2204-base'),
      ('v5litepod-16', 'v2-alpha-tpuv5-lite'),
      ('v5p-8', 'v2-alpha-tpuv5'),
      ('v6e-16', 'v2-alpha-tpuv6e'),
    ],
  )
  def test_create(self, tpu, accelerator, runtime):
    run = tpu('create', 'x', f'--type={accelerator}', '--zone=z', '--project=p')
    expected = (
      f'compute tpus queued-resources create x --node-id=x '
      f'--accelerator-type={accelerator} --runtime-version={runtime} '
      '--quiet --zone=z --project=p'
    )
    assert run.calls == [expected.split()]
    assert run.err == f'+ gcloud {expected}\n'

  def test_create_spot(self, tpu):
    (call,) = tpu('create', 'x', '--type=v3-8', '--spot').calls
    assert '--spot' in call

  def test_delete(self, tpu):
    (call,) = tpu('delete', 'x', '--zone=z').calls
    assert ' '.join(call) == (
      'compute tpus queued-resources delete x --force --quiet --zone=z'
    )

  def test_setup_sends_the_committed_code_to_all_workers(self, tpu):
    (tpu.root / 'launch' / 'pod.sh').write_text('changed')
    run = tpu('setup', 'x', '--data=gs://b/data/')
    assert run.code == 0, run.err
    assert 'uncommitted changes are not sent' in run.err
    assert run.kinds == ['copy', 'setup']
    assert run.calls[0][:3] == ['compute', 'tpus', 'tpu-vm']
    assert run.calls[0][5:] == ['x:', '--worker=all', '--quiet']
    assert not pathlib.Path(run.calls[0][4]).exists()  # the archive is removed
    command = run.calls[1][-2].removeprefix('--command=')
    assert run.calls[1][4:6] == ['x', '--worker=all']
    assert command.endswith(
      'bash jaxrobust/launch/worker.sh --setup && '
      'gcloud storage rsync --recursive gs://b/data jaxrobust/data'
    )

  def test_setup_leaves_nothing_of_an_older_package(self, tpu, tmp_path):
    run = tpu('setup', 'x')
    command = run.calls[1][-2].removeprefix('--command=')
    home = tmp_path / 'home'
    for name in ('jaxrobust/old.py', 'data/kept', 'launch/worker.sh'):
      (home / 'jaxrobust' / name).parent.mkdir(parents=True, exist_ok=True)
      (home / 'jaxrobust' / name).write_text('')
    archive = home / 'jaxrobust.tar.gz'
    subprocess.run(
      ['git', 'archive', '--format=tar.gz', f'--output={archive}', 'HEAD'],
      cwd=tpu.root,
      check=True,
    )
    subprocess.run(
      ['bash', '-c', command],
      cwd=home,
      env={**os.environ, 'HOME': str(home), 'JAXROBUST_TPU': '0', 'PATH': '/bin'},
      capture_output=True,
    )
    assert not (home / 'jaxrobust' / 'jaxrobust' / 'old.py').exists()
    assert (home / 'jaxrobust' / 'data' / 'kept').exists()
    assert (home / 'jaxrobust' / 'launch' / 'worker.sh').read_text()

  def test_code_that_cannot_be_packed_is_not_sent(self, tpu):
    shutil.rmtree(tpu.root / '.git')
    for args in (('setup', 'x'), BABYSIT):
      run = tpu(*args, state=['0 ACTIVE'], node=['0 READY'])
      assert run.code == 1
      assert 'error: git archive failed' in run.err
      assert 'copy' not in run.kinds

  def test_a_command_keeps_its_words_on_the_way_to_the_workers(self, tpu):
    words = ['--workdir=gs://b/a b', '--x=\'"$HOME\\', '--y=ü;|&']
    run = tpu('run', 'x', 'python', '-m', 'jaxrobust.train', *words)
    (call,) = run.calls
    command = next(a for a in call if a.startswith('--command='))
    echo = command.removeprefix('--command=').replace(
      'bash jaxrobust/launch/worker.sh', "printf '%s\\0'"
    )
    out = subprocess.run(['bash', '-c', echo], capture_output=True, text=True).stdout
    assert out.split('\0')[:-1] == ['--start', 'train', *words]

  def test_every_program_starts_on_all_workers(self, tpu):
    for program in ('train', 'report', 'data'):
      assert tpu('run', 'x', program).calls[-1][5] == '--worker=all'

  def test_the_other_verbs(self, tpu):
    run = tpu('status', 'x', status=[RUNNING], state=['0 ACTIVE'])
    assert run.out.splitlines() == [
      'ACTIVE',
      '== a: running',
      '== b: running',
      'step 7',
    ]
    assert tpu('stop', 'x').kinds[-1] == 'stop'
    call = tpu('logs', 'x').calls[-1]
    assert call[4:7] == ['x', '--worker=0', '--command=tail -n 100 -F .jaxrobust/log']
    assert tpu('logs', 'x', '--worker=all').calls[-1][5] == '--worker=all'

  def test_codes_of_gcloud_pass_through(self, tpu):
    assert tpu('create', 'x', '--type=v3-8', create=['3']).code == 3
    assert tpu('run', 'x', 'train', start=['255']).code == 255

  def test_dry_run_calls_nothing(self, tpu):
    for args in (
      ('create', 'x', '--type=v3-8', '--dry-run'),
      ('setup', 'x', '--dry-run'),
      ('status', 'x', '--dry-run'),
      (*BABYSIT[:3], '--dry-run', *BABYSIT[4:]),
    ):
      run = tpu(*args)
      assert run.code == 0, run.err
      assert run.calls == []
      assert run.err.startswith('+ ')
    assert [
      next(
        k for k in ('create', 'archive', 'scp', 'setup', 'start', 'status') if k in x
      )
      for x in run.err.splitlines()
    ] == ['create', 'archive', 'scp', 'setup', 'start', 'status']

  @pytest.mark.parametrize(
    'args, message',
    [
      ((), 'no argument: give create'),
      (('babysit', 'x', '--attempts=1x', 'train'), '--attempts=1x: give a number'),
      (
        ('jobset', 'a' * 41, '--type=v4-8', 'train'),
        f'{"a" * 41}: give a JobSet a name',
      ),
      (('make', 'x'), 'make: give create'),
      (('create',), 'nothing: give a name'),
      (('create', 'X_1'), 'X_1: give a name'),
      (('create', 'x'), '--type=: give an accelerator type'),
      (('create', 'x', '--type=h100-8'), '--type=h100-8: give'),
      (('create', 'x', '--fast'), '--fast is not a flag'),
      (('setup', 'x', '--data=data'), '--data=data: give a folder in a bucket'),
      (('create', 'x', '--type', 'v4-8'), '--type: write --type=VALUE'),
      (('run', 'x', 'trian'), 'trian: give a program here: train,'),
      (('run', 'x', 'train', '--dry-run'), '--dry-run: give it before train'),
      (
        ('jobset', 'x', '--type=v4-32', '--image=i', '--topology=4x4', 'train'),
        '--topology=4x4: slices of v4-32 have 3 sides',
      ),
      (('delete', 'x', 'train'), 'train: delete takes no program'),
      (('run', 'x'), 'run needs a program'),
      (('jobset', 'x', '--type=v4-8', 'train'), 'jobset needs --image'),
      (
        ('jobset', 'x', '--type=v4-8', '--image=i', '--topology=2x2x2', 'train'),
        '--topology=2x2x2 has 16 cores, --type=v4-8 has 8',
      ),
      (
        ('jobset', 'x', '--type=v6e-16', '--image=i', '--topology=2x4', 'train'),
        '--topology=2x4 has 8 chips, --type=v6e-16 has 16',
      ),
    ],
  )
  def test_refusals(self, tpu, args, message):
    run = tpu(*args)
    assert run.code == 1
    assert run.err.startswith(f'error: {message}')
    assert run.err.count('\n') == 1
    assert run.calls == []


ABSENT = '1 ERROR: (gcloud) NOT_FOUND: no such resource'


class TestBabysit:
  def test_from_nothing_to_done(self, tpu):
    """Creation fails twice, with growing pauses; then the machine is waited for."""
    run = tpu(
      *BABYSIT,
      create=['1', '1', '0'],
      state=[
        *[ABSENT] * 3,
        *('0 WAITING_FOR_RESOURCES', '0 PROVISIONING', '0 ACTIVE'),
      ],
      node=['0 CREATING', '0 READY'],
      status=[RUNNING, RUNNING, ended('exit 0', 'running'), ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story == [
      *('create', 'sleep 30', 'create', 'sleep 60', 'create'),
      *('sleep 30', 'sleep 30', 'sleep 30', 'setup', 'start'),
      *('sleep 30', 'status') * 4,
    ]
    created = [c for c in run.calls if 'create' in c]
    assert all(
      '--spot' in c and '--runtime-version=tpu-ubuntu2204-base' in c for c in created
    )
    assert (tpu.root / 'runs' / 'launch' / 'x.log').read_text().endswith('last line\n')

  @pytest.mark.parametrize('after', ['SUSPENDED', 'FAILED'])
  def test_what_was_preempted_is_made_anew_and_resumed(self, tpu, after):
    run = tpu(
      *BABYSIT,
      state=['0 ACTIVE', '0 ACTIVE', '0 SUSPENDING', f'0 {after}', ABSENT, '0 ACTIVE'],
      node=['0 READY'],
      status=[RUNNING, RUNNING, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story == [
      *('setup', 'start', 'sleep 30', 'status', 'sleep 30', 'status'),
      *('sleep 30', 'delete', 'sleep 30', 'create'),
      *('setup', 'start', 'sleep 30', 'status'),
    ]
    deleted = next(c for c in run.calls if 'delete' in c)
    assert {'--force', '--quiet'} <= set(deleted)
    starts = [c for c in run.calls if any('--start' in a for a in c)]
    assert starts[0] == starts[1]

  @pytest.mark.parametrize('node', ['0 PREEMPTED', ABSENT])
  def test_a_lost_machine_of_an_active_resource(self, tpu, node):
    run = tpu(
      *BABYSIT,
      state=['0 ACTIVE', '0 ACTIVE', ABSENT, '0 ACTIVE'],
      node=['0 READY', node, '0 READY'],
      status=['255', ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story.count('delete') == run.story.count('create') == 1

  @pytest.mark.parametrize(
    'end',
    [
      ended('exit 42', 'exit 42'),
      ended('exit 42', 'exit 134'),
      ended('exit 137', 'exit 0'),
      ended('stopped', 'stopped'),
    ],
  )
  def test_preempted_or_crashed_programs_start_again_on_the_same_machine(
    self, tpu, end
  ):
    run = tpu(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[end, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    once = ['setup', 'start', 'sleep 30', 'status']
    assert run.story == [*once, 'sleep 30', *once]

  @pytest.mark.parametrize(
    'end',
    [
      ended('exit 1', 'exit 1'),
      ended('exit 134', 'exit 1'),
      ended('exit 1', 'running'),  # it would only wait for the other
    ],
  )
  def test_an_error_ends_it(self, tpu, end):
    run = tpu(*BABYSIT, state=['0 ACTIVE'], node=['0 READY'], status=[RUNNING, end])
    assert run.code == 1
    assert run.story == [
      *('setup', 'start', 'sleep 30', 'status', 'sleep 30', 'status', 'stop')
    ]
    assert 'error: the program ended with an error' in run.err
    assert 'last line' in run.err

  def test_what_ssh_does_not_know_is_looked_at_again(self, tpu):
    """255 restarts nothing while the machine is there; half an hour makes it anew."""
    run = tpu(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=['255', RUNNING, *['255'] * 59, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story == ['setup', 'start', *('sleep 30', 'status') * 62]
    run = tpu(
      *BABYSIT,
      state=[*['0 ACTIVE'] * 60, ABSENT, '0 ACTIVE'],
      status=[*['255'] * 60, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.kinds.count('delete') == 1

  @pytest.mark.parametrize('answer', ['0', '0 == a: exit 0\\nlast line'])
  def test_some_of_the_workers_do_not_say_that_all_are_done(self, tpu, answer):
    run = tpu(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      hosts=['0 2'],
      status=[answer, ended('exit 0', 'exit 1')],
    )
    assert run.code == 1, run.err
    assert run.story == ['setup', 'start', *('sleep 30', 'status') * 2, 'stop']

  def test_workers_that_wait_for_a_lost_one_are_started_again(self, tpu):
    run = tpu(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[*[ended('stopped', 'running')] * 10, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story.count('start') == 2
    assert run.story.count('status') == 11

  def test_workers_that_end_one_after_the_other_now_and_then_are_left_alone(self, tpu):
    """What a look saw half-way says nothing by the tenth time in all."""
    between = ended('exit 0', 'running')
    run = tpu(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[*[between] * 6, RUNNING, *[between] * 6, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story.count('start') == 1

  def test_attempts_and_pauses_are_bounded(self, tpu):
    run = tpu(*BABYSIT[:3], '--attempts=8', 'train', create=['1'], state=[ABSENT])
    assert run.code == 1
    assert [k for k in run.story if k != 'create'] == [
      f'sleep {s}' for s in (30, 60, 120, 240, 480, 480, 480)
    ]
    assert 'error: create failed, and no attempt is left' in run.err

  @pytest.mark.parametrize(
    'end',
    [[ended('exit 42', 'exit 42')], [*[RUNNING] * 40, ended('exit 134', 'exit 134')]],
  )
  def test_progress_gives_the_attempts_back(self, tpu, end):
    crash = ended('exit 134', 'exit 134')
    run = tpu(
      *(*BABYSIT[:3], '--attempts=3', 'train'),
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[crash, crash, *end, crash, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story.count('start') == 5
    # The third pause begins anew.
    pauses = [
      a
      for a, b, c in zip(run.story, run.story[1:], run.story[2:], strict=False)
      if (b, c) == ('setup', 'start')
    ]
    assert pauses == ['sleep 30', 'sleep 60', 'sleep 30', 'sleep 60']

  def test_a_run_that_only_crashes_ends(self, tpu):
    run = tpu(
      *(*BABYSIT[:3], '--attempts=3', 'train'),
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[x for _ in range(3) for x in (RUNNING, ended('exit 134', 'exit 134'))],
    )
    assert run.code == 1
    assert run.story.count('start') == 3
    assert 'exit code 134, and no attempt is left' in run.err

  @pytest.mark.parametrize(
    'look',
    ['1 ERROR: no network', '1 ERROR: UNAUTHENTICATED', '0 ', '0 NO_WORD_OF_OURS'],
  )
  def test_a_lost_connection_costs_no_attempt_and_starts_nothing(self, tpu, look):
    run = tpu(
      *(*BABYSIT[:3], '--attempts=1', 'train'),
      state=['0 ACTIVE', *[look] * 7, '0 ACTIVE'],
      node=['0 READY'],
      status=[RUNNING, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story == [
      *('setup', 'start', 'sleep 30', 'status'),
      *(f'sleep {s}' for s in (30, 60, 120, 240, 480, 480, 480)),
      *('sleep 30', 'status'),
    ]

  def test_a_gcloud_that_fails_creates_nothing(self, tpu):
    run = tpu(
      *(*BABYSIT[:3], '--attempts=3', 'train'), state=['1 ERROR: no credentials']
    )
    assert run.code == 1
    assert run.story == ['sleep 30', 'sleep 60']
    assert 'no credentials' in run.err

  @pytest.mark.parametrize(
    'answers',
    [
      {'state': ['1 ERROR: The required property [zone] is not currently set.']},
      {'state': ['1 ERROR: PERMISSION_DENIED: no']},
      {'state': [ABSENT], 'create': ['1 ERROR: INVALID_ARGUMENT: no such type']},
    ],
  )
  def test_what_no_attempt_mends_is_told_at_once(self, tpu, answers):
    run = tpu(*BABYSIT, **answers)
    assert run.code == 1
    assert not [k for k in run.kinds if k.startswith('sleep')]
    assert 'error: gcloud refuses, see above' in run.err
    assert answers.get('create', answers['state'])[0][2:] in run.err

  def test_the_wait_is_a_setting(self, tpu):
    run = tpu(
      *BABYSIT[:3], '--attempts=3', 'train', create=['1'], state=[ABSENT], wait='0'
    )
    assert run.story == ['create', 'sleep 0', 'create', 'sleep 0', 'create']


def test_without_gcloud_it_says_so(tpu):
  for tool in ('bash', 'dirname'):  # And no other.
    (tpu.root / tool).symlink_to(shutil.which(tool))
  run = tpu('status', 'x', path=str(tpu.root))
  assert run.code == 1
  assert run.err.startswith('error: gcloud is not on the PATH: install')
  assert tpu('status', 'x', '--dry-run', path=str(tpu.root)).code == 0


def test_a_workdir_that_hosts_may_not_share_is_warned_of(tpu):
  run = tpu('run', 'x', '--dry-run', 'train', '--workdir=runs/x')
  assert run.err.startswith('--workdir=runs/x is in no bucket: all workers must share')
  assert 'bucket' not in tpu('run', 'x', '--dry-run', *BABYSIT[4:]).err


def test_help_names_every_verb(tpu):
  run = tpu('--help')
  verbs = re.search(
    r'\n  (create \|.*?)\) ;;', (ROOT / 'launch' / 'tpu.sh').read_text()
  )[1].split(' | ')
  assert run.code == 0
  assert all(re.search(rf'tpu\.sh .*\b{verb}\b', run.out) for verb in verbs)
