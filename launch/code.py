"""The code that workers get: every file of the repository that git does not ignore."""

from __future__ import annotations

import ast
import difflib
import os
import subprocess
import sys
import tarfile

from launch import ROOT, LaunchError
from launch.text import say

# Of what is not committed: a folder of images that git does not ignore is no code.
LARGEST = 100 * 2**20


def _git(*words):
  """The names that git prints, relative to the repository's folder."""
  done = subprocess.run(
    ['git', *words, '-z', '--', '.'], cwd=str(ROOT), capture_output=True
  )
  if done.returncode:
    why = os.fsdecode(done.stderr).strip().split('\n')[0]
    raise LaunchError(f'the code is sent from a git clone, and git says: {why}')
  return [os.fsdecode(name) for name in done.stdout.split(b'\0')[:-1]]


def _ls_files(*words):
  """Those of `git ls-files` that exist: a file may be deleted and not yet committed."""
  names = _git('ls-files', *words)
  return [name for name in names if os.path.lexists(ROOT / name)]


def uncommitted() -> list[str]:
  """Files whose content is in no commit, as `git status` shows them."""
  # Staged ones are found by a comparison with the commit, which a new clone lacks.
  changed = set(_ls_files('--others', '--modified', '--exclude-standard'))
  try:
    changed |= set(_git('diff', '--name-only', '--relative', '--cached', 'HEAD'))
  except LaunchError:
    changed |= set(_ls_files('--cached'))
  return sorted(name for name in changed if os.path.lexists(ROOT / name))


def files() -> list[str]:
  """What is sent, by name; prints what of it is not committed.

  Raises:
    LaunchError: where git knows no files here, or some are too large to be code.
  """
  found = sorted(set(_ls_files('--cached', '--others', '--exclude-standard')))
  for name in found:
    path = ROOT / name
    if path.is_dir() and not path.is_symlink():
      raise LaunchError(
        f'{name}: a repository within this one is not sent: ignore it '
        '(.git/info/exclude), or move it elsewhere'
      )
  changed = uncommitted()
  size = sum((ROOT / name).lstat().st_size for name in changed)
  if size > LARGEST:
    largest = max(changed, key=lambda name: (ROOT / name).lstat().st_size)
    raise LaunchError(
      f'{size >> 20} MiB are not committed, the most in {largest}: up to '
      f'{LARGEST >> 20} MiB are sent; ignore what is no code (.git/info/exclude), or '
      'commit it'
    )
  if changed:
    more = f' and {len(changed) - 5} more' if len(changed) > 5 else ''
    say(f'sent without being committed: {", ".join(changed[:5])}{more}')
  return found


def pack(names: list[str], archive: str):
  """Writes the files of these names to a `.tar.gz`."""
  with tarfile.open(archive, 'w:gz') as tar:
    for name in names:
      tar.add(str(ROOT / name), arcname=name, recursive=False)


def experiment(words: list[str]) -> str:
  """The file of a program's --config, '' where it has none."""
  given = ''
  for word, following in zip(words, [*words[1:], '']):
    if word.startswith('--config='):
      given = word[len('--config=') :]
    elif word == '--config':
      given = following
  path = given.split(':')[0]
  if not path or '/' in path or path.endswith('.py'):
    return path
  return f'experiments/{path}.py'


# Prints why a program would refuse its words. 3: the package that would be sent cannot
# be imported; one that is installed elsewhere has other flags.
_CHECK = """
import importlib, os, sys
try:
  import jaxrobust
  if not os.path.samefile(jaxrobust.__file__, 'jaxrobust/__init__.py'):
    sys.exit(3)
  from jaxrobust.errors import UserError
  from jaxrobust.runs import cli
  module = importlib.import_module('jaxrobust.' + sys.argv[1])
except Exception:
  sys.exit(3)
try:
  if hasattr(module, 'PROGRAM'):
    cli.check(module.PROGRAM, sys.argv[2:])
except UserError as e:
  print(ascii(str(e)))
  sys.exit(1)
"""


def check_words(words: list[str]):
  """Refuses a program with flags or fields that it would refuse on the workers.

  The environment of this clone says so, where there is one; a laptop needs none.
  """
  path = experiment(words)
  if {'-h', '--help'} & set(words):
    return
  if path and not (ROOT / os.path.expanduser(path)).is_file():
    say(f'the flags of {words[0]} are not checked: {path} is not here')
    return
  venv = os.environ.get('JAXROBUST_VENV') or str(ROOT / '.venv')
  python = os.path.join(os.path.abspath(venv), 'bin', 'python')
  try:
    done = subprocess.run(
      [python if os.path.isfile(python) else sys.executable, '-c', _CHECK, *words],
      cwd=str(ROOT),
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      timeout=120,
    )
    found, status = done.stdout.decode().split('\n'), done.returncode
  except (OSError, subprocess.TimeoutExpired):
    found, status = [], 3
  if status == 1 and len(found) > 1:
    raise LaunchError(ast.literal_eval(found[-2]))
  if status:
    say(
      f'the flags of {words[0]} are not checked: the package cannot be imported here '
      '(bash launch/worker.sh --setup makes its environment)'
    )


def _refuse_unknown(words, path):
  """Refuses an experiment given by a name that none here has."""
  name = os.path.basename(path)[: -len('.py')]
  given = [word.split('=')[-1].split(':')[0] for word in words]
  if not path or name not in given or (ROOT / path).is_file():
    return
  names = sorted(file.stem for file in (ROOT / 'experiments').glob('*.py'))
  near = difflib.get_close_matches(name, names, n=1)
  raise LaunchError(
    f'{name}: no experiment of that name in experiments/; '
    + (f'did you mean {near[0]}?' if near else 'give one of those there, or a path')
  )


def check_sent(words: list[str], names: list[str]):
  """Refuses a program whose experiment is not among the files that are sent."""
  path = experiment(words)
  _refuse_unknown(words, path)
  if path and os.path.normpath(path) not in names:
    raise LaunchError(
      f'{path} is not on the workers: setup sends the files of this repository that '
      'git does not ignore; write it there, and as a path from its folder'
    )


def check_manifest(verb: str, words: list[str]):
  """Looks at the experiment of a manifest, whose code goes another way than setup's.

  SkyPilot sends this folder as git sees it: what it would leave out is refused. A
  JobSet runs an image, which cannot be looked into; launch/Dockerfile makes it of the
  last commit, so that what is not in there is named.
  """
  path = experiment(words)
  if not path:
    return
  _refuse_unknown(words, path)
  done = subprocess.run(
    ['git', '--literal-pathspecs', 'status', '--porcelain', '--ignored', '--', path],
    cwd=str(ROOT),
    capture_output=True,
  )
  inside = not os.path.isabs(path) and not os.path.normpath(path).startswith('..')
  if verb == 'jobset':
    if done.stdout:
      say(f'{path} is not committed as it is: an image of the last commit has it not')
  elif not inside or not (ROOT / path).is_file() or done.stdout.startswith(b'!!'):
    raise LaunchError(
      f'{path}: SkyPilot sends the files of this repository that git does not ignore; '
      'write it there, and as a path from its folder'
    )
