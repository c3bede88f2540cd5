"""Values that are more than a value go through tpu.sh as what they are."""

import subprocess

import pytest

from launch import gcloud, tpu
from tests.helpers.gcloud_play import BABYSIT, Play, ended

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
