"""tpu.sh, against a gcloud that plays states and a sleep that only records itself."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import types

import pytest

from launch import LaunchError, babysit, code, gcloud, tpu

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not shutil.which('git'), reason='git is not installed')

RUNNING = '0 == a: running\\n== b: running\\n  step 7'
BABYSIT = ('babysit', 'x', '--type=v4-16', '--spot', 'train', '--workdir=gs://b/x')
# Values that are more than a value to a shell, to YAML or to a terminal.
HOSTILE = (
  '$(touch X)',
  '`touch X`',
  'x; touch X',
  'x && touch X',
  "'; touch X; '",
  '"; touch X; "',
  'a b',
  'x\ntouch X',
  'x\n',
  'x: y',
  'x # y',
  '{x: y}',
  '- x',
  'x"\nsecurityContext: {privileged: true}',
  '\x1b[2J',
  '\x85\u2028\ufeff\x7f',
  '$(JAXROBUST_TPU) $$(X) $',
  '*',
  '../..',
  '\\',
)


def ended(a, b):
  return f'0 == a: {a}\\n== b: {b}\\n  last line'


class Play:
  """A gcloud that answers each kind of call with the next line that it was given.

  A line is an exit code, then output, which failures print as errors; the last one
  comes again and again. Without one: success.
  """

  KINDS = (
    *(('create', 'queued-resources create '), ('delete', 'queued-resources delete ')),
    *(('state', 'queued-resources describe '), ('hosts', 'value(networkEndpoints')),
    *(('node', 'tpu-vm describe '), ('copy', 'tpu-vm scp '), ('setup', '--setup')),
    *(('start', '--start'), ('status', '--status'), ('stop', '--stop')),
  )

  def __init__(self, answers):
    self.answers = {kind: list(lines) for kind, lines in answers.items()}
    self.calls, self.kinds = [], []

  def sleep(self, seconds):
    self.kinds.append(f'sleep {seconds}')

  def execute(self, words, stdout=None, stderr=None):
    line = ' '.join(words)
    assert len(self.kinds) < 1000, self.kinds[-10:]
    kind = next((kind for kind, part in self.KINDS if part in line), 'other')
    self.kinds.append(kind)
    self.calls.append(words[1:])
    if kind == 'copy':
      with tarfile.open(words[5]) as archive:
        self.sent = {m.name: archive.extractfile(m) for m in archive if m.isfile()}
        self.sent = {name: file.read().decode() for name, file in self.sent.items()}
    lines = self.answers.get(kind) or ['0']
    answer = lines.pop(0) if len(lines) > 1 else lines[0]
    exit_code, _, text = answer.partition(' ')
    out = text.replace('\\n', '\n') + '\n' if text else ''
    error = 'WARNING: gcloud is old\n'
    if exit_code != '0':
      out, error = '', error + out
    if not stdout:
      print(out, end='')
    if not stderr:
      print(error, end='', file=sys.stderr)
    return subprocess.CompletedProcess(words, int(exit_code), out, error)

  @property
  def story(self):
    """The calls that change something or look at the workers, and the pauses."""
    return [k for k in self.kinds if k not in ('state', 'node', 'hosts', 'copy')]

  @property
  def commands(self):
    """What the workers' shells get."""
    flags = [word for call in self.calls for word in call]
    return [f[len('--command=') :] for f in flags if f.startswith('--command=')]


def make_repository(root):
  """A repository with the launch folder and an experiment."""
  (root / 'experiments').mkdir(parents=True)
  (root / 'experiments' / 'old.py').write_text('old')
  (root / 'jaxrobust').mkdir()
  (root / 'jaxrobust' / 'core.py').write_text('core')
  (root / '.gitignore').write_text('/runs/\n__pycache__/\nprivate.py\n')
  shutil.copytree(
    ROOT / 'launch', root / 'launch', ignore=shutil.ignore_patterns('__pycache__')
  )
  identity = ['-c', 'user.name=x', '-c', 'user.email=x@example.org']
  for command in (['init', '-q'], ['add', '-A'], [*identity, 'commit', '-qm', 'x']):
    subprocess.run(['git', *command], cwd=root, check=True)


@pytest.fixture(scope='module')
def repository(tmp_path_factory):
  """One that no test changes."""
  root = tmp_path_factory.mktemp('repository') / 'root'
  make_repository(root)
  return root


@pytest.fixture
def call(repository, monkeypatch, capfd):
  """Runs a command line of tpu.py in this process."""
  monkeypatch.setattr(shutil, 'which', lambda _: '/usr/bin/gcloud')

  def run(*args, wait='30', root=repository, **answers):
    play = Play(answers)
    for module in (babysit, code, gcloud, tpu):
      monkeypatch.setattr(module, 'ROOT', root)
    monkeypatch.setattr(gcloud, 'execute', play.execute)
    monkeypatch.setattr(babysit, 'time', types.SimpleNamespace(sleep=play.sleep))
    monkeypatch.setenv('JAXROBUST_WAIT', wait)
    if root != ROOT:  # It has no package that could check flags.
      monkeypatch.setattr(code, 'check_words', lambda _: None)
    shutil.rmtree(root / 'runs', ignore_errors=True)
    play.code = tpu.main(list(args))
    play.out, play.err = capfd.readouterr()
    return play

  run.repository = repository
  return run


@pytest.fixture
def copy(repository, tmp_path):
  """A repository that the test may change."""
  root = tmp_path / 'root'
  shutil.copytree(repository, root)
  return root


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
  def test_create(self, call, accelerator, runtime):
    run = call('create', 'x', f'--type={accelerator}', '--zone=z', '--project=p')
    expected = (
      f'compute tpus queued-resources create x --node-id=x '
      f'--accelerator-type={accelerator} --runtime-version={runtime} '
      '--quiet --zone=z --project=p'
    )
    assert run.calls == [expected.split()]
    assert run.err.splitlines()[0] == f'+ gcloud {expected}'

  def test_create_spot(self, call):
    (words,) = call('create', 'x', '--type=v3-8', '--spot').calls
    assert '--spot' in words

  def test_delete(self, call):
    (words,) = call('delete', 'x', '--zone=z').calls
    assert ' '.join(words) == (
      'compute tpus queued-resources delete x --force --quiet --zone=z'
    )

  def test_setup_sends_the_code_to_all_workers(self, call):
    run = call('setup', 'x', '--data=gs://b/data/')
    assert run.code == 0, run.err
    assert run.kinds == ['copy', 'setup']
    assert run.calls[0][:3] == ['compute', 'tpus', 'tpu-vm']
    assert run.calls[0][5:] == ['x:', '--worker=all', '--quiet']
    assert not pathlib.Path(run.calls[0][4]).parent.exists()  # the archive is removed
    assert run.calls[1][4:6] == ['x', '--worker=all']
    assert run.commands[0].endswith(
      'bash jaxrobust/launch/worker.sh --setup && '
      'gcloud storage rsync --recursive gs://b/data jaxrobust/data'
    )

  def test_setup_leaves_nothing_of_an_older_package(self, call, tmp_path):
    home = tmp_path / 'home'
    stale = ('jaxrobust/old.py', 'experiments/gone.py')
    for name in (*stale, 'data/kept', 'launch/worker.sh'):
      (home / 'jaxrobust' / name).parent.mkdir(parents=True, exist_ok=True)
      (home / 'jaxrobust' / name).write_text('')
    run = call('setup', 'x')
    code.pack(code.files(), str(home / 'jaxrobust.tar.gz'))
    subprocess.run(
      ['bash', '-c', run.commands[0]],
      cwd=home,
      env={**os.environ, 'HOME': str(home), 'JAXROBUST_TPU': '0', 'PATH': '/bin'},
      capture_output=True,
    )
    assert not any((home / 'jaxrobust' / name).exists() for name in stale)
    assert (home / 'jaxrobust' / 'jaxrobust' / 'core.py').exists()
    assert (home / 'jaxrobust' / 'data' / 'kept').exists()
    assert (home / 'jaxrobust' / 'launch' / 'worker.sh').read_text()

  def test_code_that_cannot_be_packed_is_not_sent(self, call, copy):
    shutil.rmtree(copy / '.git')
    for args in (('setup', 'x'), BABYSIT):
      run = call(*args, root=copy, state=['0 ACTIVE'], node=['0 READY'])
      assert run.code == 1
      assert 'error: the code is sent from a git clone' in run.err
      assert run.calls == []

  def test_every_program_starts_on_all_workers(self, call):
    for program in ('train', 'report', 'data'):
      assert call('run', 'x', program).calls[-1][5] == '--worker=all'

  def test_the_other_verbs(self, call):
    run = call('status', 'x', status=[RUNNING], state=['0 ACTIVE'])
    assert run.out.splitlines() == [
      'ACTIVE',
      '== a: running',
      '== b: running',
      '  step 7',
    ]
    assert call('stop', 'x').kinds == ['stop']
    (words,) = call('logs', 'x').calls
    assert words[4:7] == ['x', '--worker=0', '--command=tail -n 100 -F .jaxrobust/log']
    assert call('logs', 'x', '--worker=all').calls[-1][5] == '--worker=all'

  def test_codes_of_gcloud_pass_through(self, call):
    assert call('create', 'x', '--type=v3-8', create=['3']).code == 3
    assert call('run', 'x', 'train', start=['255']).code == 255
    assert call('status', 'x', state=['4']).kinds == ['state']

  def test_dry_run_calls_nothing(self, call):
    for args in (
      ('create', 'x', '--type=v3-8', '--dry-run'),
      ('setup', 'x', '--dry-run'),
      ('status', 'x', '--dry-run'),
      (*BABYSIT[:3], '--dry-run', *BABYSIT[4:]),
    ):
      run = call(*args)
      assert run.code == 0, run.err
      assert run.calls == []
      assert run.err.startswith('+ ')
    order = ('create', 'scp', '--setup', '--start', 'describe', '--status')
    assert [
      next(kind for kind in order if kind in line) for line in run.err.splitlines()
    ] == list(order)

  @pytest.mark.parametrize(
    'args, message',
    [
      ((), 'give create'),
      (('babysit', 'x', '--attempts=1x', 'train'), '--attempts=1x: give a number'),
      (
        ('jobset', 'a' * 41, '--type=v4-8', 'train'),
        f'{"a" * 41}: give a JobSet a name',
      ),
      (('make', 'x'), 'make is no verb: give create'),
      (('create',), 'give create the name of a TPU'),
      (('create', 'X_1'), 'X_1 is no name: give create the name'),
      (('create', 'x'), '--type=: give an accelerator type'),
      (('create', 'x', '--type=h100-8'), '--type=h100-8: give'),
      (('create', 'x', '--type=v4-08'), '--type=v4-08: give'),
      (('create', 'x', '--fast'), '--fast is not a flag'),
      (('create', 'x', '--spot=1'), '--spot=1 is not a flag'),
      (('setup', 'x', '--data=data'), '--data=data: give a folder in a bucket'),
      (('setup', 'x', '--data=gs://b/d,ro'), '--data=gs://b/d,ro: give a folder'),
      (('create', 'x', '--type', 'v4-8'), '--type: write --type=VALUE'),
      (('run', 'x', 'trian'), 'trian is no program: give train,'),
      (('run', 'x', 'python', '-m'), 'give train, evaluate,'),
      (('run', 'x', 'jaxrobust'), 'give train, evaluate,'),
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
      (
        ('jobset', 'x', '--type=v2-8', '--image=i', '--topology=2x2', 'train'),
        '--type=v2-8: GKE has v3',
      ),
    ],
  )
  def test_refusals(self, call, args, message):
    run = call(*args)
    assert run.code == 1
    assert run.err.startswith(f'error: {message}')
    assert run.err.count('\n') == 1
    assert run.calls == []


class TestHostileValues:
  @pytest.mark.parametrize('value', HOSTILE, ids=ascii)
  def test_flags_and_names_are_refused_in_a_line(self, call, value):
    needed = {'create': ['--type=v4-8'], 'babysit': ['--type=v4-8']}
    needed['jobset'] = ['--type=v4-8', '--image=i', '--topology=2x2x1']
    needed['skypilot'] = ['--type=v4-8']
    for verb, (_, takes_program) in tpu.VERBS.items():
      words = ['train'] if takes_program else []
      given = [('x', f'--{flag}={value}') for flag in tpu.FLAGS]
      given += [('x', f'--data=gs://{value}'), ('x', f'--data=gs://b/{value}')]
      given += [('x', f'--image=host/{value}'), ('x', f'--type=v4-{value}')]
      if value != '../..':  # What a folder in a bucket may be called.
        assert ('x', f'--data=gs://b/{value}') in given
      else:
        given.remove(('x', f'--data=gs://b/{value}'))
      for name, flag in [*given, (value, '--spot'), (f'x{value}', '--spot')]:
        run = call(verb, name, *needed.get(verb, []), flag, *words)
        assert (run.code, run.calls, run.out) == (1, [], ''), (verb, name, flag)
        assert run.err.startswith('error: ')
        assert run.err.count('\n') == 1
        assert run.err.rstrip('\n').isprintable()

  @pytest.mark.parametrize('first', HOSTILE, ids=ascii)
  def test_programs_and_verbs_are_refused_in_a_line(self, call, first):
    for args in (('run', 'x', first), (first, 'x'), ('create', 'x', f'-{first}')):
      run = call(*args)
      assert (run.code, run.calls) == (1, [])
      assert run.err.startswith('error: ') and run.err.count('\n') == 1
      assert run.err.rstrip('\n').isprintable()

  def test_a_programs_words_reach_the_workers_as_they_are(self, call, tmp_path):
    """Those of the user's shell, through that of the worker, to worker.sh."""
    words = ['train', *(f'--workdir=gs://b/{value}' for value in HOSTILE), *HOSTILE]
    words += ['--x=\'"$HOME\\', '--y=ü;|&', '']
    worker = tmp_path / 'jaxrobust' / 'launch' / 'worker.sh'
    worker.parent.mkdir(parents=True)
    worker.write_text('printf "%s\\0" "$@"\n')
    spellings = (('python', '-m', 'jaxrobust.train'), ('jaxrobust', 'train'))
    for args in (*(('run', 'x', *spelling) for spelling in spellings), BABYSIT[:-1]):
      run = call(
        *(*args, *words[1:]),
        state=['0 ACTIVE'],
        node=['0 READY'],
        status=[ended('exit 0', 'exit 0')],
      )
      assert run.code == 0, run.err
      (command,) = [c for c in run.commands if '--start' in c]
      done = subprocess.run(
        ['bash', '-c', command], cwd=tmp_path, capture_output=True, text=True
      )
      assert done.stdout.split('\0')[:-1] == ['--start', *words], done.stderr
      # What is printed is a line that says the same to bash.
      (line,) = [x for x in run.err.splitlines() if '--start' in x]
      echo = f'gcloud() {{ printf "%s\\0" "$@"; }}; {line[2:]}'
      done = subprocess.run(
        ['bash', '-c', echo], cwd=tmp_path, capture_output=True, text=True
      )
      assert f'--command={command}' in done.stdout.split('\0')
    assert [path.name for path in tmp_path.iterdir()] == ['jaxrobust']

  def test_data_are_quoted_even_if_they_were_not_checked(self, call, monkeypatch):
    call('status', 'x')
    for value in HOSTILE:
      play = Play({})
      monkeypatch.setattr(gcloud, 'execute', play.execute)
      with gcloud.Pod(tpu.Command('setup', 'x', [], data=value)) as pod:
        assert pod.setup() == 0
      echo = play.commands[0].split('--setup && gcloud ')[1]
      done = subprocess.run(
        ['bash', '-c', f'printf "%s\\0" {echo}'], capture_output=True, text=True
      )
      assert done.stdout.split('\0')[3] == value

  def test_a_worker_refuses_an_experiment_by_any_name(self, call, copy, tmp_path):
    """Its name stands in what the worker's shell tests and says."""
    home = tmp_path / 'home'
    (home / 'jaxrobust').mkdir(parents=True)
    for value in HOSTILE:
      run = call('run', 'x', 'train', f'--config=experiments/{value}.py')
      done = subprocess.run(
        ['bash', '-c', run.commands[0]], cwd=home, capture_output=True, text=True
      )
      assert done.returncode == 1
      assert done.stderr.startswith('error: experiments/')
      assert 'run setup again' in done.stderr and done.stderr.count('\n') == 1
    assert [path.name for path in home.iterdir()] == ['jaxrobust']


class TestCode:
  """What setup sends is what git status shows."""

  def test_what_is_not_committed_is_sent_and_named(self, call, copy):
    (copy / 'experiments' / 'new.py').write_text('new')
    (copy / 'experiments' / 'private.py').write_text('ignored')
    (copy / 'experiments' / 'ünïcode "name"\n.py').write_text('odd')
    (copy / 'launch' / 'pod.sh').write_text('changed')
    (copy / 'launch' / 'test.sh').unlink()
    (copy / 'zoo.py').write_text('another')
    (copy / 'staged.py').write_text('staged')
    subprocess.run(['git', 'add', 'staged.py'], cwd=copy, check=True)
    (copy / 'link').symlink_to('/etc/passwd')
    run = call('setup', 'x', root=copy)
    assert run.code == 0, run.err
    assert run.sent['experiments/new.py'] == 'new'
    assert run.sent['experiments/old.py'] == 'old'
    assert run.sent['experiments/ünïcode "name"\n.py'] == 'odd'
    assert run.sent['launch/pod.sh'] == 'changed'
    assert run.sent['staged.py'] == 'staged'
    left = {'experiments/private.py', 'launch/test.sh', 'link'}
    assert not left & set(run.sent)  # a link stays one
    named = run.err.splitlines()[0]
    assert named.startswith('sent without being committed: ')
    assert 'experiments/new.py' in named and 'and 1 more' in named
    assert 'old.py' not in named and 'test.sh' not in named

  def test_a_clone_with_nothing_of_its_own_says_nothing(self, call):
    assert 'committed' not in call('setup', 'x').err

  def test_a_repository_without_a_commit_sends_all(self, call, copy):
    shutil.rmtree(copy / '.git')
    subprocess.run(['git', 'init', '-q'], cwd=copy, check=True)
    run = call('setup', 'x', root=copy)
    assert run.code == 0, run.err
    assert run.sent['experiments/old.py'] == 'old'

  def test_what_cannot_be_code_is_refused(self, call, copy, monkeypatch):
    monkeypatch.setattr(code, 'LARGEST', 2**20)
    with open(copy / 'images.npy', 'wb') as file:
      file.truncate(2**20 + 1)
    run = call('setup', 'x', root=copy)
    assert (run.code, run.calls) == (1, [])
    assert 'images.npy' in run.err and 'ignore what is no code' in run.err
    (copy / 'images.npy').unlink()
    shutil.copytree(copy / '.git', copy / 'inner' / '.git')
    run = call('setup', 'x', root=copy)
    assert (run.code, run.calls) == (1, [])
    assert run.err.startswith('error: inner/: a repository within this one')

  @pytest.mark.parametrize('flag', ['--config={}', '--config={}:arg', '--config {}'])
  def test_run_refuses_what_is_not_there_as_it_is_here(
    self, call, copy, tmp_path, flag
  ):
    home = tmp_path / 'home'
    worker = home / 'jaxrobust' / 'launch' / 'worker.sh'
    worker.parent.mkdir(parents=True)
    worker.write_text('echo started\n')
    there = home / 'jaxrobust' / 'experiments' / 'new.py'
    here = copy / 'experiments' / 'new.py'
    there.parent.mkdir()

    def start(given):
      run = call('run', 'x', 'train', *flag.format(given).split(), root=copy)
      return subprocess.run(
        ['bash', '-c', run.commands[0]], cwd=home, capture_output=True, text=True
      )

    for given in ('experiments/new.py', 'new', './experiments/new.py'):
      for mine, theirs in (
        ('x', None),
        ('x', 'y'),
        (None, None),
        ('x', 'x'),
        (None, 'x'),
      ):
        for path, text in ((here, mine), (there, theirs)):
          path.unlink(missing_ok=True)
          if text:
            path.write_text(text)
        done = start(given)
        if theirs and mine in (theirs, None):  # This clone may be another.
          assert (done.returncode, done.stdout) == (0, 'started\n'), done.stderr
        else:
          assert (done.returncode, done.stdout) == (1, ''), (mine, theirs)
          assert 'experiments/new.py is not on the workers' in done.stderr

  def test_babysit_refuses_it_before_a_machine_is_made(self, call, copy):
    (copy / 'experiments' / 'private.py').write_text('ignored')
    for config in (
      'experiments/new.py:x',
      '/home/me/new.py',
      '../new.py',
      'experiments/private.py',
    ):
      run = call(*BABYSIT, f'--config={config}', root=copy)
      assert (run.code, run.calls) == (1, [])
      assert 'is not on the workers: setup sends' in run.err
    for verb in (BABYSIT, ('skypilot', 'x', '--type=v4-8', 'train')):
      run = call(*verb, '--config=odl:x', root=copy)
      assert (run.code, run.calls, run.out) == (1, [], '')
      assert 'odl: no experiment of that name' in run.err
      assert 'did you mean old?' in run.err
    (copy / 'experiments' / 'new.py').write_text('new')
    answers = {'state': ['0 ACTIVE'], 'node': ['0 READY']}
    for config in ('experiments/new.py:x', 'new', './experiments/old.py'):
      run = call(
        *(*BABYSIT, f'--config={config}'),
        root=copy,
        status=[ended('exit 0', 'exit 0')],
        **answers,
      )
      assert run.code == 0, run.err
      assert run.sent['experiments/new.py'] == 'new'

  def test_babysit_resumes_with_the_code_that_it_began_with(self, call, copy):
    experiment = copy / 'experiments' / 'new.py'
    experiment.write_text('first')
    play = Play.execute

    def execute(self, words, **pipes):
      experiment.write_text('changed since')
      return play(self, words, **pipes)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(Play, 'execute', execute)
      run = call(
        *(*BABYSIT, '--config=new'),
        root=copy,
        state=['0 ACTIVE'],
        node=['0 READY'],
        status=[ended('exit 42', 'exit 42'), ended('exit 0', 'exit 0')],
      )
    assert run.story.count('setup') == 2
    assert run.sent['experiments/new.py'] == 'first'

  def test_manifests_look_at_the_experiment(self, call, copy):
    """SkyPilot sends the folder; an image may be made of the last commit."""
    experiments = copy / 'experiments'
    (experiments / 'new.py').write_text('new')
    (experiments / 'private.py').write_text('ignored')
    sky = ('skypilot', 'x', '--type=v4-8', 'train')
    gke = ('jobset', 'x', '--type=v4-8', '--topology=2x2x1', '--image=i', 'train')
    for config, sent, committed in (
      ('old', True, True),
      ('experiments/new.py', True, False),
      ('experiments/private.py', False, False),
      ('experiments/none.py', False, True),
      ('../x.py', False, True),
    ):
      run = call(*sky, f'--config={config}', root=copy)
      assert run.code == (0 if sent else 1), config
      assert sent or 'SkyPilot sends the files' in run.err
      run = call(*gke, f'--config={config}', root=copy)
      assert run.code == 0
      assert ('is not committed' in run.err) == (not committed)


ABSENT = '1 ERROR: (gcloud) NOT_FOUND: no such resource'


class TestBabysit:
  def test_from_nothing_to_done(self, call):
    """Creation fails twice, with growing pauses; then the machine is waited for."""
    run = call(
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
    assert (
      (call.repository / 'runs' / 'launch' / 'x.log')
      .read_text()
      .endswith('last line\n')
    )

  @pytest.mark.parametrize('after', ['SUSPENDED', 'FAILED'])
  def test_what_was_preempted_is_made_anew_and_resumed(self, call, after):
    run = call(
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
  def test_a_lost_machine_of_an_active_resource(self, call, node):
    run = call(
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
    self, call, end
  ):
    run = call(
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
  def test_an_error_ends_it(self, call, end):
    run = call(*BABYSIT, state=['0 ACTIVE'], node=['0 READY'], status=[RUNNING, end])
    assert run.code == 1
    assert run.story == [
      *('setup', 'start', 'sleep 30', 'status', 'sleep 30', 'status', 'stop')
    ]
    assert 'error: the program ended with an error' in run.err
    assert 'last line' in run.err

  def test_what_ssh_does_not_know_is_looked_at_again(self, call):
    """255 restarts nothing while the machine is there; half an hour makes it anew."""
    run = call(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=['255', RUNNING, *['255'] * 59, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story == ['setup', 'start', *('sleep 30', 'status') * 62]
    run = call(
      *BABYSIT,
      state=[*['0 ACTIVE'] * 60, ABSENT, '0 ACTIVE'],
      node=['0 READY'],
      status=[*['255'] * 60, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.kinds.count('delete') == 1

  @pytest.mark.parametrize('answer', ['0', '0 == a: exit 0\\nlast line'])
  def test_some_of_the_workers_do_not_say_that_all_are_done(self, call, answer):
    run = call(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      hosts=['0 2'],
      status=[answer, ended('exit 0', 'exit 1')],
    )
    assert run.code == 1, run.err
    assert run.story == ['setup', 'start', *('sleep 30', 'status') * 2, 'stop']

  def test_workers_that_wait_for_a_lost_one_are_started_again(self, call):
    run = call(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[*[ended('stopped', 'running')] * 10, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story.count('start') == 2
    assert run.story.count('status') == 11

  def test_workers_that_end_one_after_the_other_now_and_then_are_left_alone(self, call):
    """What a look saw half-way says nothing by the tenth time in all."""
    between = ended('exit 0', 'running')
    run = call(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[*[between] * 6, RUNNING, *[between] * 6, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story.count('start') == 1

  def test_attempts_and_pauses_are_bounded(self, call):
    run = call(*BABYSIT[:3], '--attempts=8', 'train', create=['1'], state=[ABSENT])
    assert run.code == 1
    assert [k for k in run.story if k != 'create'] == [
      f'sleep {s}' for s in (30, 60, 120, 240, 480, 480, 480)
    ]
    assert 'error: create failed, and no attempt is left' in run.err

  @pytest.mark.parametrize(
    'end',
    [[ended('exit 42', 'exit 42')], [*[RUNNING] * 40, ended('exit 134', 'exit 134')]],
  )
  def test_progress_gives_the_attempts_back(self, call, end):
    crash = ended('exit 134', 'exit 134')
    run = call(
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

  def test_a_run_that_only_crashes_ends(self, call):
    run = call(
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
  def test_a_lost_connection_costs_no_attempt_and_starts_nothing(self, call, look):
    run = call(
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

  def test_a_gcloud_that_fails_creates_nothing(self, call):
    run = call(
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
  def test_what_no_attempt_mends_is_told_at_once(self, call, answers):
    run = call(*BABYSIT, **answers)
    assert run.code == 1
    assert not [k for k in run.kinds if k.startswith('sleep')]
    assert 'error: gcloud refuses, see above' in run.err
    assert answers.get('create', answers['state'])[0][2:] in run.err

  def test_the_wait_is_a_setting(self, call):
    run = call(
      *BABYSIT[:3], '--attempts=3', 'train', create=['1'], state=[ABSENT], wait='0'
    )
    assert run.story == ['create', 'sleep 0', 'create', 'sleep 0', 'create']


# Plays gcloud for a process: success; each look finds the program done.
GCLOUD = """#!/bin/bash
printf '%s\\0' "$@" >> "$PLAY"
case $* in
  *'value(networkEndpoints'*) echo 1 ;;
  *'queued-resources describe '*) echo ACTIVE ;;
  *'tpu-vm describe '*) echo READY ;;
  *--status*) echo '== a: exit 0' ;;
esac
"""


@pytest.fixture
def script(repository, tmp_path):
  """Runs tpu.sh itself, where the PATH has these programs and no other."""
  tools = tmp_path / 'tools'
  tools.mkdir()
  (tools / 'gcloud').write_text(GCLOUD)
  (tools / 'gcloud').chmod(0o755)
  for tool in ('bash', 'dirname', 'git'):
    (tools / tool).symlink_to(shutil.which(tool))
  (tools / 'python3').write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
  (tools / 'python3').chmod(0o755)

  def run(*args, **variables):
    environment = {'PATH': str(tools), 'PLAY': str(tmp_path / 'calls')}
    return subprocess.run(
      ['bash', str(repository / 'launch' / 'tpu.sh'), *args],
      env={**environment, 'JAXROBUST_WAIT': '0', **variables},
      capture_output=True,
      text=True,
      cwd=tmp_path,
      timeout=60,
    )

  run.tools = tools
  return run


class TestScript:
  def test_it_babysits_to_the_end(self, script, repository, tmp_path):
    done = script(*BABYSIT, '--x=a b $(touch X)', CDPATH='/')
    assert done.returncode == 0, done.stderr
    assert 'x: done' in done.stderr
    assert (repository / 'runs' / 'launch' / 'x.log').read_text() == '== a: exit 0\n'
    calls = (tmp_path / 'calls').read_text().split('\0')
    command = 'bash jaxrobust/launch/worker.sh --start train --workdir=gs://b/x '
    assert f"--command={command}'--x=a b $(touch X)'" in calls

  def test_without_gcloud_it_says_so(self, script):
    (script.tools / 'gcloud').unlink()
    done = script('status', 'x')
    assert done.returncode == 1
    assert done.stderr.startswith('error: gcloud is not on the PATH: install')
    assert script('status', 'x', '--dry-run').returncode == 0

  def test_an_old_python_is_refused_in_a_line(self, script):
    (script.tools / 'python3').write_text('#!/bin/bash\nexit 1\n')
    done = script('status', 'x')
    assert done.returncode == 1
    assert done.stderr.startswith('error: python3 on the PATH is not Python 3.8')
    assert done.stderr.count('\n') == 1

  def test_a_wait_that_is_no_number_is_refused(self, script):
    done = script(*BABYSIT, JAXROBUST_WAIT='a[$(touch X)]')
    assert done.returncode == 1
    assert done.stderr.endswith(
      'error: JAXROBUST_WAIT=a[$(touch X)]: give seconds, a number from 0 to 99999\n'
    )

  def test_it_ends_quietly_and_leaves_nothing_in_the_folder_for_temporary_files(
    self, script, tmp_path
  ):
    """A Ctrl-C or a TERM, here of gcloud to the process that started it."""
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    for name, number in (('INT', 130), ('TERM', 143), ('HUP', 129)):
      (script.tools / 'gcloud').write_text(f'#!/bin/bash\nkill -{name} $PPID\n')
      done = script(*BABYSIT, TMPDIR=str(temporary))
      assert done.returncode == number, done.stderr
      assert 'Traceback' not in done.stderr
      assert not list(temporary.iterdir())


def test_a_workdir_that_hosts_may_not_share_is_warned_of(call):
  run = call('run', 'x', '--dry-run', 'train', '--workdir=runs/x')
  assert run.err.startswith('--workdir=runs/x is in no bucket: all workers must share')
  assert 'bucket' not in call('run', 'x', '--dry-run', *BABYSIT[4:]).err


@pytest.mark.parametrize(
  'words, message',
  [
    (('--config.thread.epsilon=1',), 'thread'),
    (('--config.threat.epsilon=1/4', '--stepz=3'), '--stepz'),
    (('--config.threat.epsilon=1/4',), ''),
  ],
)
def test_flags_are_checked_before_a_machine_is_made(capsys, words, message):
  given = ['train', '--workdir=gs://b/x', '--config=digits', *words]
  if message:
    with pytest.raises(LaunchError, match=message):
      code.check_words(given)
  else:
    code.check_words(given)
  assert capsys.readouterr().err == ''


def test_flags_that_cannot_be_checked_are_named(capsys, monkeypatch, copy):
  monkeypatch.setattr(code, 'ROOT', copy)
  code.check_words(['train', '--config.thread.epsilon=1'])
  assert 'flags of train are not checked: the package' in capsys.readouterr().err
  code.check_words(['train', '--config=experiments/none.py'])
  assert 'experiments/none.py is not here' in capsys.readouterr().err


@pytest.mark.parametrize('verb', tpu.VERBS)
@pytest.mark.parametrize('name', [(), ('x', '--zone=a')])
def test_help_of_a_verb(call, verb, name):
  run = call(verb, *name, '--help', 'train')
  assert (run.code, run.err, run.calls) == (0, '', [])
  calls = [x for x in run.out.splitlines() if x.startswith('  bash launch/tpu.sh')]
  assert len(calls) == 1 and verb in calls[0]
  assert '--zone=' in run.out and '--dry-run' in run.out


def test_help_names_every_verb(call):
  run = call('--help')
  assert run.code == 0
  assert all(re.search(rf'tpu\.sh .*\b{verb}\b', run.out) for verb in tpu.VERBS)
  assert all(f'--{flag}' in run.out for flag in tpu.FLAGS)


@pytest.mark.parametrize(
  'path', sorted((ROOT / 'launch').glob('*.py')), ids=lambda path: path.name
)
def test_a_laptop_needs_nothing_but_python(path):
  tree = ast.parse(path.read_text(), feature_version=(3, 8))
  used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      used |= {alias.name for alias in node.names}
  assert {name.split('.')[0] for name in used} <= {*sys.stdlib_module_names, 'launch'}
  methods = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
  assert not methods & {'removeprefix', 'removesuffix', 'is_relative_to'}  # of 3.9
