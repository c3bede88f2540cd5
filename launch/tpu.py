"""Runs programs on Cloud TPUs, on one host or a pod, through gcloud's queued resources.

  bash launch/tpu.sh create   NAME --type=TYPE [--spot]
  bash launch/tpu.sh setup    NAME [--data=gs://…]
  bash launch/tpu.sh run      NAME PROGRAM [--flag=value …]
  bash launch/tpu.sh status|logs|stop|delete NAME
  bash launch/tpu.sh babysit  NAME --type=TYPE [--spot] [--data=gs://…] PROGRAM …
  bash launch/tpu.sh jobset   NAME --type=TYPE --topology=AxB[xC] --image=IMAGE
                              [--spot] [--data=gs://…] PROGRAM …
  bash launch/tpu.sh skypilot NAME --type=TYPE [--spot] [--data=gs://…] PROGRAM …

TYPE is v2-8 … v4-32, v5litepod-16, v5p-8, v6e-16 …. Every verb takes --zone= and
--project= (gcloud's own defaults otherwise) and --dry-run, which only prints the
commands. Flags of this script stand before PROGRAM, its own flags after it; it may be
written `jaxrobust PROGRAM`, as sweeps print it.

setup sends the code to every worker, makes the environment there and copies --data into
its folder data/. The code is every file of this repository that git does not ignore,
committed or not; what is not committed is named. setup may be repeated. run starts
worker.sh on all workers and returns; it refuses an experiment (--config) that is not on
the workers as it is here. logs follows the log of worker 0 (--worker=all: of all). Give
a workdir in a bucket, gs://…: the workers share it, and disks end with their machine.

babysit creates, sets up, runs and watches, until the program is done (exit code 0) or
ends with an error (1). What is preempted, failed or crashed it makes anew and resumes,
with the code that it began with; after --attempts=N (100) in a row it gives up. Code
42, or 40 looks in a row at which all workers run (20 minutes), give all attempts back;
a gcloud that does not answer costs none once it has. Workers that do not answer for
half an hour, while gcloud calls them ready, count as failed. runs/launch/NAME.log keeps
the last lines of the logs. It may be stopped and started again: the same command takes
over. Delete the TPU afterwards: what is done, or ended with an error, stays there and
costs.

jobset prints a GKE JobSet (| kubectl apply -f -), skypilot a SkyPilot task
(sky jobs launch FILE); both restart by the same exit codes.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

from launch import ROOT, LaunchError, babysit, code, gcloud, manifests
from launch.text import say

# The verbs, and of each whether it needs a type and takes a program.
VERBS = {
  'create': (True, False),
  'setup': (False, False),
  'run': (False, True),
  'status': (False, False),
  'logs': (False, False),
  'stop': (False, False),
  'delete': (False, False),
  'babysit': (True, True),
  'jobset': (True, True),
  'skypilot': (True, True),
}
_NAME = '[a-z]([-a-z0-9]{0,61}[a-z0-9])?'
# What each flag may hold, and the same in words.
FLAGS = {
  'type': (
    f'({"|".join(gcloud.RUNTIMES)})-[1-9][0-9]{{0,4}}',
    'an accelerator type such as v3-8, v4-32, v5litepod-16, v5p-8 or v6e-16',
  ),
  'zone': (_NAME, 'a zone of small letters, digits and hyphens, as us-central2-b'),
  'project': (
    '([a-z0-9][-a-z0-9.]{0,61}:)?' + _NAME,
    "a project's id, of small letters, digits and hyphens",
  ),
  'data': (
    r'gs://[a-z0-9]([-a-z0-9._]{0,220}[a-z0-9])?(/[-A-Za-z0-9._+=@%]+)*/?',
    'a folder in a bucket, as gs://my-bucket/folder, small letters, digits and -._ in '
    'the bucket, letters, digits and -._+=@% in the folder',
  ),
  'worker': (
    'all|[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*',
    "all, or workers' numbers such as 0 or 1,4-6",
  ),
  'topology': (
    '[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}',
    'that of the node pool, such as 4x4 or 2x2x4',
  ),
  'image': (
    '([A-Za-z0-9][-A-Za-z0-9.]*(:[0-9]{1,5})?/)?[a-z0-9][-a-z0-9._]*'
    '(/[a-z0-9][-a-z0-9._]*)*(:[A-Za-z0-9_][-A-Za-z0-9._]{0,127})?'
    '(@sha256:[0-9a-f]{64})?',
    "an image's name in small letters, such as "
    'us-docker.pkg.dev/my-project/my-repository/jaxrobust:1',
  ),
  'attempts': ('[1-9][0-9]{0,5}', 'a number from 1 to 999999'),
}


class Command(NamedTuple):
  """A command line of tpu.sh, checked: every text but `words` fits its pattern."""

  verb: str
  name: str
  words: list[str]
  spot: bool = False
  dry_run: bool = False
  type: str = ''
  zone: str = ''
  project: str = ''
  data: str = ''
  worker: str = ''
  topology: str = ''
  image: str = ''
  attempts: str = '100'


def parse(arguments: list[str]) -> Command:
  """Reads and checks a command line.

  Args:
    arguments: the words after `tpu.sh`.

  Returns:
    The command.

  Raises:
    LaunchError: if a word cannot be meant.
  """
  verb, name = [*arguments, '', ''][:2]
  if verb not in VERBS:
    raise LaunchError(
      (f'{verb} is no verb: ' if verb else '')
      + f'give {", ".join(list(VERBS)[:-1])} or skypilot (--help explains them)'
    )
  if not re.fullmatch(_NAME, name):
    raise LaunchError(
      (f'{name} is no name: ' if name else '')
      + f'give {verb} the name of a TPU, at most 63 small letters, digits and hyphens, '
      f'as in {verb} pod1'
    )
  values, words = _flags(verb, arguments[2:])
  needs_type, takes_program = VERBS[verb]
  if needs_type and 'type' not in values:
    raise LaunchError(f'--type=: give {FLAGS["type"][1]}')
  if not takes_program and words:
    raise LaunchError(f'{words[0]}: {verb} takes no program')
  if takes_program and not words:
    raise LaunchError(
      f'{verb} needs a program with its flags, such as train --workdir=…'
    )
  return Command(verb, name, words, **values)


def _flags(verb, arguments):
  """The values of the flags that stand before the program, and the program's words."""
  values = {}
  for i, argument in enumerate(arguments):
    flag, equals, value = argument.partition('=')
    field = flag[2:]
    if not argument.startswith('-'):
      return values, _program(arguments[i:])
    if argument in ('--spot', '--dry-run'):
      values[field.replace('-', '_')] = True
    elif not flag.startswith('--') or field not in FLAGS:
      raise LaunchError(f'{argument} is not a flag of {verb}: --help shows them')
    elif not equals:
      raise LaunchError(f'{flag}: write {flag}=VALUE, with an equals sign')
    elif not re.fullmatch(FLAGS[field][0], value):
      raise LaunchError(f'{argument}: give {FLAGS[field][1]}')
    else:
      values[field] = value.rstrip('/')
  return values, []


def _program(words):
  """The words of a program, without the `jaxrobust` of sweeps, or `python -m`."""
  if words[:1] == ['jaxrobust']:
    words = words[1:] or ['']
    if words[0] == 'download':
      words = ['models.download', *words[1:]]
  if words[:2] == ['python', '-m']:
    words = words[2:] or ['']
    if words[0].startswith('jaxrobust.'):
      words = [words[0][len('jaxrobust.') :], *words[1:]]
  check = '. launch/contract.sh && require_program "$1"'
  done = subprocess.run(
    ['bash', '-c', check, 'tpu.sh', words[0]], cwd=str(ROOT), stderr=subprocess.PIPE
  )
  if done.returncode:
    raise LaunchError(done.stderr.decode().strip()[len('error: ') :])
  for word in words:
    if word == '--dry-run':
      raise LaunchError(
        f'--dry-run: give it before {words[0]}, whose own flags stand after it'
      )
    if word.startswith('--workdir=') and not word.startswith('--workdir=gs://'):
      say(
        f'{word} is in no bucket: all workers must share it, and it is lost with '
        'their disks'
      )
  return words


def help_of(verb: str) -> str:
  """What the page says of one verb: its line, the flags, its paragraphs."""
  first, usage, types, *paragraphs = __doc__.strip().split('\n\n')
  calls = re.split(r'\n(?=  bash)', usage)
  named = re.compile(rf'\b{verb}\b')
  found = [call for call in calls if named.search(call.split(' NAME')[0])]
  return '\n\n'.join([*found, types, *filter(named.search, paragraphs)])


def execute(command: Command) -> int:
  """Does what a command asks for; returns its exit code.

  Raises:
    LaunchError: if it cannot be done.
  """
  verb, words = command.verb, command.words
  if words:
    code.check_words(words)
  if verb in ('jobset', 'skypilot'):
    code.check_manifest(verb, words)
    print(getattr(manifests, verb)(command), end='', flush=True)
    return 0
  if not command.dry_run and not shutil.which('gcloud'):
    raise LaunchError(
      'gcloud is not on the PATH: install the Google Cloud CLI, or use --dry-run'
    )
  with gcloud.Pod(command) as pod:
    if verb == 'babysit':
      pod.pack()
      if not command.dry_run:
        babysit.Babysitter(pod, int(command.attempts), _wait()).run()
        return 0
      steps = (pod.create, pod.setup, pod.start, pod.status)
      return next((failed for failed in (step() for step in steps) if failed), 0)
    return getattr(pod, verb)()


def _wait():
  """Seconds between two looks, of $JAXROBUST_WAIT."""
  wait = os.environ.get('JAXROBUST_WAIT', '30')
  if not re.fullmatch('[0-9]{1,5}', wait):
    raise LaunchError(f'JAXROBUST_WAIT={wait}: give seconds, a number from 0 to 99999')
  return int(wait)


def main(arguments: list[str]) -> int:
  """Runs a command line; returns its exit code and prints an error as one line."""
  try:
    if arguments[:1] in (['-h'], ['--help']):
      print(__doc__.strip(), flush=True)
      return 0
    flags = itertools.takewhile(lambda word: word.startswith('-'), arguments[2:])
    asks = {'-h', '--help'} & {*arguments[1:2], *flags}
    if asks and arguments[0] in VERBS:
      print(help_of(arguments[0]), flush=True)
      return 0
    return execute(parse(arguments))
  except LaunchError as error:
    say(f'error: {error}')
    return 1
  except BrokenPipeError:  # Such as `| head`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except OSError as error:
    say(f'error: {error}')
    return 1
  except KeyboardInterrupt:
    return 130


if __name__ == '__main__':
  for number in (signal.SIGTERM, signal.SIGHUP):  # The archive is removed.
    signal.signal(number, lambda number, _: sys.exit(128 + number))
  sys.exit(main(sys.argv[1:]))
