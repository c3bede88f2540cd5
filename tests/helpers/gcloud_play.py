"""Stand-ins for gcloud that play the states of a TPU machine, and what they answer."""

import shutil
import subprocess
import sys
import tarfile

from tests.helpers.programs import ROOT

RUNNING = '0 == a: running\\n== b: running\\n  step 7'
BABYSIT = ('babysit', 'x', '--type=v4-16', '--spot', 'train', '--workdir=gs://b/x')
ABSENT = '1 ERROR: (gcloud) NOT_FOUND: no such resource'


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
