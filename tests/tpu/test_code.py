"""The code that tpu.sh sends to the workers of a machine."""

import shutil
import subprocess

import pytest

from launch import code
from tests.helpers.gcloud_play import BABYSIT, Play, ended


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
