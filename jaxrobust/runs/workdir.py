"""A folder that is the identity of a run: its config and its results.

Files are written to a temporary name and renamed, so that none is ever half there.
Paths may be local or `gs://`.
"""

import contextlib
import errno
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError, one_line
from jaxrobust.files import arrays, json_files
from jaxrobust.runs.version import __version__

# What else a workdir holds, for what writes it and what reads it.
CHECKPOINT = 'checkpoint.npy'  # the averaged parameters of a run that is finished
GENERATOR = 'generator.npz'  # that was fitted
SAMPLES = 'samples'  # the set that was drawn from it
FIGURES = 'figures'
_CONFIG, _RESULTS, _STATUS_FILE = 'config.json', 'results.json', 'status.json'

_PACKAGES = ('jax', 'jaxlib', 'dm-haiku', 'optax', 'numpy')
_STATUS = {
  'state': str,
  'message': str,
  'command': [str],
  'host': str,
  'pid': int,
  'config?': [str],
}
_MAKERS = ('train', 'generate')  # whose flags say what a run was made with
_CHECKSUMS = 'images.json'  # of arrays, where a run was given some
_MAX_PID = 2**31 - 1  # of the type that the system gives processes' numbers
# What is read of entries of results.json, whatever made them.
_ENTRY = {
  'protocol': {
    'suite?': str,
    'norm?': str,
    'epsilon?': float,
    'split?': str,
    'num_images?': int,
  },
  'clean_accuracy?': float,
  'robust_accuracy?': float,
  'warnings?': [str],
}
# Of this process: its command, and the folder that it has claimed.
_program: dict[str, Any] = {}

# Errors of a disk that its user can mend; others may be gone at the next start.
_DISK_ERRORS = (
  errno.EACCES,
  errno.EDQUOT,
  errno.EFBIG,
  errno.ENOSPC,
  errno.EPERM,
  errno.EROFS,
)
# The same of buckets: names of tensorflow's errors, which are no OSError.
_BUCKET_ERRORS = (
  'FailedPreconditionError',
  'InvalidArgumentError',
  'NotFoundError',
  'PermissionDeniedError',
  'UnauthenticatedError',
)


def claim(
  workdir: str | os.PathLike, config: config_dict.ConfigDict, free: tuple[str, ...] = ()
) -> epath.Path:
  """Makes `workdir` the home of `config`, or checks that it is already.

  Args:
    workdir: a folder, made if absent.
    config: the resolved config.
    free: fields on which nothing there depends yet: they may differ, and are replaced.

  Returns:
    The folder.

  Raises:
    UserError: if another config lives there; the message shows the difference.
  """
  folder = epath.Path(workdir)
  path = folder / _CONFIG
  if path.exists():
    known = read_config(folder)
    found = configs.differences(known, config)
    if changed := [x for x in found if x.partition(':')[0] not in free]:
      # A workdir that only evaluations were made in has no checkpoint of its own.
      judged = known.get('evaluation', {}).get('checkpoint') or folder
      raise UserError(
        f'{folder} holds a run with another config (its value → yours, '
        f'{"; ".join(changed)}): leave out what differs, or use another --workdir; to '
        f'evaluate its checkpoint so: --workdir=OTHER --checkpoint={judged}'
      )
    if found and parallel.is_writer():
      write(path, configs.to_json(config))
  elif parallel.is_writer():
    try:
      folder.mkdir(parents=True, exist_ok=True)
      write(path, configs.to_json(config))
    except OSError as e:
      raise UserError(f'cannot write to {folder}: {e.strerror or e}') from e
  if _program:
    _refuse_second(folder)
    _program['folder'] = folder
    known = config_flags(folder)
    if known and _program['command'][0] not in _MAKERS or not _program['config']:
      _program['config'] = known
    if parallel.is_writer() and '://' not in str(folder):
      # Open, so that no other gets its number.
      _program['opened'] = os.open(folder, os.O_RDONLY)
    write_status('running')
  return folder


def continued(
  workdir: str | epath.Path, config: config_dict.ConfigDict
) -> config_dict.ConfigDict:
  """A command's config, with what the run in `workdir` keeps: see `configs.continued`.

  Args:
    workdir: a folder; without a run in it, the config is returned as it is.
    config: the resolved config.
  """
  if not has_run(workdir):
    return config
  return configs.continued(config, read_config(workdir))


def _refuse_second(folder: epath.Path):
  """Raises UserError if another program of this host is at work in the folder."""
  status = read_status(folder)
  if status.get('state') != 'running' or not parallel.is_writer():
    return
  number, (program, *flags) = status['pid'], status['command']
  if status['host'] != platform.node() or number == os.getpid():
    return
  # Numbers are used again, in a container that starts anew most of all.
  words = set()
  with contextlib.suppress(OSError):
    words = set(pathlib.Path(f'/proc/{number}/cmdline').read_text().split('\0'))
  if {f'jaxrobust.{program}', *flags} <= words:
    raise UserError(
      f'{folder} is in use by process {number} ({program}): wait for it, or stop it '
      f'(kill {number})'
    )


def begin(command: list[str], config: Sequence[str] = ()) -> None:
  """Says that this process is a program: what it claims gets a status.json.

  Args:
    command: the program's name and its flags, or the name of a function of Python.
    config: the flags that gave its config; () leaves what the workdir says.
  """
  _program.update(command=command, config=list(config), folder=None)


def removed(error: Exception | None = None) -> UserError | None:
  """One line if the workdir that this program claimed is there no more, else None.

  Args:
    error: that the program met. If it misses a checkpoint's file, all may be going.
  """
  folder: Any = _program.get('folder')
  opened = _program.get('opened')
  if opened is None or not parallel.is_writer():
    return None
  text = str(error)
  going = f'{folder}/checkpoints' in text and re.search('NOT_FOUND|No such file', text)
  if _is_at(opened, folder) and has_run(folder) and not going:
    return None
  return UserError(
    f'{folder} was removed or moved while this program ran, which writes nothing more '
    'there: move it back, or run the same command again to start anew'
  )


def clear_remains() -> None:
  """Removes what a save that was under way wrote where the workdir had been."""
  folder = _program['folder']
  with contextlib.suppress(OSError):
    if not _is_at(_program['opened'], folder) and not has_run(folder):
      (folder / 'checkpoints').rmtree()
      folder.rmdir()


def _is_at(opened: int, folder: epath.Path) -> bool:
  """Whether a folder that is open is still where it was."""
  try:
    return os.path.samestat(os.fstat(opened), os.stat(folder))
  except FileNotFoundError:
    return False


def config_flags(folder: str | epath.Path) -> list[str]:
  """The flags that gave the config of the run in `folder`; none where it is unknown."""
  found = read_status(epath.Path(folder)).get('config', [])
  return found if all(map(str.isprintable, found)) else []


def write_status(state: str, message: str = '') -> None:
  """Writes status.json, if this process is a program that has claimed a workdir.

  Args:
    state: 'running', 'done', 'preempted' or 'failed'.
    message: what else there is to say; kept in one line.
  """
  folder, command = _program.get('folder'), _program.get('command')
  config = _program.get('config', [])
  gone = removed()
  if state != 'running':
    if (opened := _program.get('opened')) is not None:
      os.close(opened)
    _program.clear()
  if folder is None or gone or not parallel.is_writer():
    return
  status = {
    'state': state,
    'message': ' '.join(message.split()),
    'command': command,
    'config': config,
    'host': platform.node(),
    'pid': os.getpid(),
  }
  with contextlib.suppress(Exception):  # A full disk must not hide a program's error.
    write(folder / _STATUS_FILE, json.dumps(status, indent=2) + '\n')


def read_status(folder: epath.Path) -> dict:
  """What status.json says; {} if it is absent or damaged.

  A program that runs no more, though the file says so, is 'interrupted'. Only its own
  host can say so.
  """
  path = folder / _STATUS_FILE
  if not path.exists():
    return {}
  try:
    status = json_files.read(path)
    json_files.check(status, str(path), _STATUS)
    if not status['command'] or not 0 < status['pid'] <= _MAX_PID:
      raise UserError(f'{path} is not as expected: no program wrote it')
  except (UserError, OSError) as e:  # It is written anew by the next program.
    logging.warning('%s', e)
    return {}
  if status['state'] == 'running' and status['host'] == platform.node():
    try:
      os.kill(status['pid'], 0)
    except ProcessLookupError:
      status['state'] = 'interrupted'
    except PermissionError:  # It runs, and is of another user.
      pass
  return status


def how_far(folder: epath.Path) -> str:
  """How far training is, such as 'preempted at step 40'; '' if it is finished."""
  if (folder / CHECKPOINT).exists():
    return ''
  saved = folder / 'checkpoints'
  found = saved.iterdir() if saved.exists() else ()
  steps = [int(x.name) for x in found if x.name.isdecimal()]
  status = read_status(folder)
  command = status.get('command', [''])[0]  # An evaluation may have been the last.
  trains = command.startswith('train') and status['state'] != 'done'
  if not steps:
    return status['state'] if trains else ''
  return f'{status["state"] if trains else "unfinished"} at step {max(steps)}'


def has_run(folder: str | epath.Path) -> bool:
  """Whether a folder is the workdir of a run."""
  return (epath.Path(folder) / _CONFIG).exists()


def read_config(folder: str | epath.Path) -> config_dict.ConfigDict:
  """The config of the run in `folder`; UserError if there is none, or a broken one."""
  path = epath.Path(folder) / _CONFIG
  if not path.exists():
    raise UserError(f'{path} is absent: give the workdir of a run')
  try:
    # Its fields are named in Python and on command lines.
    if strange := [x for x in _names(json_files.read(path)) if not x.isidentifier()]:
      raise UserError(f'{path} is not as expected: {strange[0]!r:.40} names no field')
    return configs.from_json(path.read_text())
  except (ValueError, TypeError, LookupError, AttributeError) as e:
    raise UserError(f'{_damaged(path, e)}: restore it, or use another --workdir') from e


def _names(tree: dict):
  """Yields the names of all fields, those of parts too."""
  for name, value in tree.items():
    yield name
    if isinstance(value, dict):
      yield from _names(value)


def _damaged(path: epath.Path, error: Exception) -> str:
  """What is wrong with a file, which it names once."""
  text = one_line(error)[:200]
  return text if text.startswith(str(path)) else f'{path} is damaged ({text})'


def write(path: epath.Path, content: str | bytes) -> None:
  """Writes a whole file, or nothing."""
  temporary = path.with_name(f'{path.name}.tmp')
  try:
    if isinstance(content, bytes):
      temporary.write_bytes(content)
    else:
      temporary.write_text(content)
    temporary.replace(path)
  except BaseException:
    with contextlib.suppress(Exception):  # The first error says more.
      temporary.unlink(missing_ok=True)
    raise


def write_npz(path: epath.Path, **content: np.ndarray | str) -> None:
  """Writes arrays to a whole `.npz` file, or nothing."""
  write(path, arrays.npz_bytes(**content))


def read_checksums(folder: epath.Path) -> dict | None:
  """What `write_checksums` wrote into a workdir; None if it did not.

  Raises:
    UserError: for a damaged file.
  """
  path = folder / _CHECKSUMS
  return json_files.parse(path.read_bytes(), str(path)) if path.exists() else None


def write_checksums(folder: epath.Path, found: dict) -> None:
  """Records which arrays a run in Python began with."""
  write(folder / _CHECKSUMS, json.dumps(found) + '\n')


def cache_folder(kind: str) -> epath.Path:
  """Where this machine keeps what it would compute or fetch again, of a kind."""
  home = os.environ.get('JAXROBUST_CACHE') or '~/.cache/jaxrobust'
  return epath.Path(home).expanduser() / kind


def read_results(folder: epath.Path) -> list[dict]:
  """The entries of `results.json`, one an evaluation; none if it is absent.

  Raises:
    UserError: if it is damaged.
  """
  path = folder / _RESULTS
  if not path.exists():
    return []
  try:
    entries = json_files.read(path, list)
    json_files.check(entries, str(path), [_ENTRY])
  except UserError as e:
    raise UserError(f'{e}: restore it, or remove it to judge again') from e
  return entries


def find_result(folder: epath.Path, protocol: dict) -> dict | None:
  """The entry of an evaluation by the same protocol, if it was made."""
  protocol = json.loads(json.dumps(protocol))
  matches = (r for r in read_results(folder) if r['protocol'] == protocol)
  return next(matches, None)


def add_result(folder: epath.Path, protocol: dict, figures: dict) -> dict:
  """Adds an evaluation to `results.json`.

  Args:
    folder: the workdir.
    protocol: what was evaluated and how (JSON values).
    figures: counts and accuracies as fractions.

  Returns:
    The entry: protocol, figures and versions. No date, so that an evaluation that
    was interrupted ends with the same file.
  """
  entry = {
    'protocol': protocol,
    **figures,
    'versions': versions(),
  }
  results = [*read_results(folder), entry]
  write(folder / _RESULTS, json.dumps(results, indent=2) + '\n')
  return entry


def disk_error(e: Exception, workdir: str | None = None) -> UserError | None:
  """One line on a disk or bucket that may not be used, or is full; else None.

  Args:
    e: the error.
    workdir: to be named if the error names no file.
  """
  kind = type(e)
  if kind.__module__.startswith('tensorflow.') and kind.__name__ in _BUCKET_ERRORS:
    text = one_line(e)[:200]
    return UserError(
      f'cannot use a bucket: {kind.__name__}: {text}; what was saved before is whole: '
      'give access, or correct its name, and run the same command again'
    )
  path, number = getattr(e, 'filename', None), getattr(e, 'errno', None)
  if found := re.search(r"os_error_code='(\d+)'", str(e)):  # As tensorstore says it.
    number = int(found[1])
    path = re.search(r'local file "([^"]*)"', str(e))
    path = path and path[1]
  if number not in _DISK_ERRORS:
    return None
  verb = 'use' if number in (errno.EACCES, errno.EPERM) else 'write'
  return UserError(
    f'cannot {verb} {path or workdir or "to a disk"}: {os.strerror(number)}; what was '
    'saved before is whole: make room, or give access, and run the same command again'
  )


def package_versions() -> dict[str, str]:
  """The versions of the libraries that the numbers depend on."""
  return {name: importlib.metadata.version(name) for name in _PACKAGES}


def versions() -> dict:
  """Versions of this package and of what the numbers depend on, and the device."""

  return {
    'jaxrobust': __version__,
    'python': platform.python_version(),
    **package_versions(),
    'device': parallel.kind_of_device(),
    'num_devices': parallel.num_devices(),
  }
