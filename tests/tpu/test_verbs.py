"""What the verbs of tpu.sh ask of gcloud, their flags and their help."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from launch import LaunchError, code, tpu
from tests.helpers.gcloud_play import BABYSIT, RUNNING
from tests.helpers.programs import ROOT


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
