"""A Cloud TPU and its workers, by gcloud: each command is printed, then run."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

from launch import ROOT, code
from launch.text import printable, say, shown

# The software of a TPU VM by the family of its type.
RUNTIMES = {
  'v2': 'tpu-ubuntu2204-base',
  'v3': 'tpu-ubuntu2204-base',
  'v4': 'tpu-ubuntu2204-base',
  'v5litepod': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}
# What gcloud says of a resource and of its machines, as the babysitter needs it: ready,
# to be made, to be deleted first, or to be waited for.
LOST = {'FAILED', 'SUSPENDED', 'PREEMPTED', 'TERMINATED', 'STOPPED'}
STATES = {
  *LOST,
  *('READY', 'ABSENT', 'ACCEPTED', 'WAITING_FOR_RESOURCES', 'PROVISIONING'),
  *('CREATING', 'STARTING', 'RESTARTING', 'REIMAGING', 'REPAIRING', 'SUSPENDING'),
  *('STOPPING', 'DELETING'),
  # No state: gcloud failed, or it will not do this however often it is asked.
  *('UNKNOWN', 'REFUSED'),
}


def refuses(errors: str) -> bool:
  """Whether gcloud failed for what waiting does not help: flags, names, rights."""
  causes = 'PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED|required property'
  return bool(re.search(causes, errors))


def execute(words, stdout=None, stderr=None):
  """Runs a program to its end; what comes by a pipe may hold more than UTF-8."""
  return subprocess.run(
    words, stdout=stdout, stderr=stderr, encoding='utf-8', errors='replace'
  )


class Pod:
  """The TPU of a command; the verbs of tpu.sh are its methods.

  Those return gcloud's exit code, 0 in a dry run. Within `with`, the archive of the
  code is made once and removed at the end.
  """

  def __init__(self, command):
    self.name = command.name
    self._command = command
    self._where = ['--quiet']
    for flag in ('zone', 'project'):
      if getattr(command, flag):
        self._where.append(f'--{flag}={getattr(command, flag)}')
    self._folder = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._folder:
      shutil.rmtree(self._folder, ignore_errors=True)

  def _gcloud(self, *words, stdout=None, stderr=None):
    """Prints and runs `gcloud compute tpus …`; the finished process."""
    words = ['gcloud', 'compute', 'tpus', *words, *self._where]
    print('+', *map(shown, words), file=sys.stderr, flush=True)
    if self._command.dry_run:
      return subprocess.CompletedProcess(words, 0, '', '')
    return execute(words, stdout=stdout, stderr=stderr)

  def _on_workers(self, command, worker='all', stdout=None):
    worker = self._command.worker or worker
    return self._gcloud(
      *('tpu-vm', 'ssh', self.name, f'--worker={worker}', f'--command={command}'),
      stdout=stdout,
    )

  def _create(self, stderr=None):
    accelerator = self._command.type
    return self._gcloud(
      *('queued-resources', 'create', self.name, f'--node-id={self.name}'),
      f'--accelerator-type={accelerator}',
      f'--runtime-version={RUNTIMES[accelerator.split("-")[0]]}',
      *(['--spot'] if self._command.spot else []),
      stderr=stderr,
    )

  def create(self) -> int:
    return self._create().returncode

  def delete(self) -> int:
    words = ('queued-resources', 'delete', self.name, '--force')
    return self._gcloud(*words).returncode

  def pack(self):
    """Packs the code, if that is not done; a program's experiment must be in it."""
    if not self._folder:
      files = code.files()
      code.check_sent(self._command.words, files)
      self._folder = tempfile.mkdtemp()
      if not self._command.dry_run:
        code.pack(files, self._archive)

  @property
  def _archive(self):
    return os.path.join(self._folder, 'jaxrobust.tar.gz')

  def setup(self) -> int:
    self.pack()
    words = ('tpu-vm', 'scp', self._archive, f'{self.name}:', '--worker=all')
    copied = self._gcloud(*words).returncode
    if copied:
      return copied
    # Processes compare their packages, so that what is no longer in one must go.
    command = (
      'mkdir -p jaxrobust && rm -rf jaxrobust/jaxrobust jaxrobust/experiments && '
      'tar -xzf jaxrobust.tar.gz -C jaxrobust && '
      'bash jaxrobust/launch/worker.sh --setup'
    )
    if self._command.data:
      data = shlex.quote(self._command.data)
      command += f' && gcloud storage rsync --recursive {data} jaxrobust/data'
    return self._on_workers(command).returncode

  def start(self) -> int:
    """Starts the program on all workers."""
    return self._on_workers(self._start_command()).returncode

  def run(self) -> int:
    """Starts the program, if its experiment is on the workers as it is here."""
    check = self._check_command(code.experiment(self._command.words))
    return self._on_workers(check + self._start_command()).returncode

  def _start_command(self):
    words = ' '.join(map(shlex.quote, self._command.words))
    return f'bash jaxrobust/launch/worker.sh --start {words}'

  def _check_command(self, experiment):
    """For a worker's shell: ends it where it has not the experiment that is here."""
    if not experiment:
      return ''
    where = shlex.quote(posixpath.join('jaxrobust', experiment))
    if experiment.startswith('~/'):
      where = '~/' + shlex.quote(experiment[2:])
    test = f'[ -f {where} ]'
    here = ROOT / os.path.expanduser(experiment)
    if here.is_file():
      digest = hashlib.sha256(here.read_bytes()).hexdigest()
      test += f' && [ "$(sha256sum < {where})" = "{digest}  -" ]'
    error = printable(
      f'error: {experiment} is not on the workers as it is here: run setup again, '
      'which sends every file of the repository that git does not ignore'
    )
    return f'{{ {test}; }} || {{ echo {shlex.quote(error)} >&2; exit 1; }}; '

  def stop(self) -> int:
    return self._on_workers('bash jaxrobust/launch/worker.sh --stop').returncode

  def logs(self) -> int:
    return self._on_workers('tail -n 100 -F .jaxrobust/log', worker='0').returncode

  def status(self) -> int:
    words = ('queued-resources', 'describe', self.name, '--format=value(state.state)')
    return self._gcloud(*words).returncode or self._look().returncode

  def _look(self, stdout=None):
    command = 'bash jaxrobust/launch/worker.sh --status'
    return self._on_workers(command, stdout=stdout)

  # What the babysitter asks.

  def make(self) -> str:
    """Creates it; '' or why not, FAILED or REFUSED."""
    done = self._create(stderr=subprocess.PIPE)
    sys.stderr.write(done.stderr)
    if not done.returncode:
      return ''
    return 'REFUSED' if refuses(done.stderr) else 'FAILED'

  def begin(self) -> bool:
    """Sets up and starts, in the place of what may still run from before."""
    return not (self.setup() or self.start())

  def look(self) -> str | None:
    """What the workers say of themselves, None if ssh or gcloud failed."""
    done = self._look(stdout=subprocess.PIPE)
    return None if done.returncode else done.stdout

  def state(self) -> str:
    """One of STATES: of the resource or, once that is active, of its machines."""
    found = self._described('queued-resources', '--format=value(state.state)')
    if found == 'ACTIVE':
      found = self._described('tpu-vm', '--format=value(state)')
      if found == 'ABSENT':
        found = 'TERMINATED'
    if found not in STATES:
      say(f"gcloud says '{found}', which is no state")
      found = 'UNKNOWN'
    return found

  def count_hosts(self) -> int:
    """How many workers there are, 1 if gcloud does not say."""
    found = self._described('tpu-vm', '--format=value(networkEndpoints.len())')
    return int(found) if re.fullmatch('[1-9][0-9]{0,5}', found) else 1

  def _described(self, kind, field):
    """A field of what gcloud describes; ABSENT, UNKNOWN or REFUSED where it fails."""
    # Its warnings, which it may print with success, are apart.
    pipe = subprocess.PIPE
    done = self._gcloud(kind, 'describe', self.name, field, stdout=pipe, stderr=pipe)
    if not done.returncode:
      return done.stdout.strip()
    if 'NOT_FOUND' in done.stderr:
      return 'ABSENT'
    sys.stderr.write(done.stderr)
    return 'REFUSED' if refuses(done.stderr) else 'UNKNOWN'
