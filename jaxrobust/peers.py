"""The processes of a run: they start alike, and end together.

What they tell each other goes through the key-value store of process 0, which needs no
devices, so that a process is heard while others wait for it in a collective.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import threading
import time

from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust import parallel
from jaxrobust import workdir as workdirs
from jaxrobust.errors import UserError

_START, _VERDICT, _END = (f'jaxrobust/{x}' for x in ('start', 'verdict', 'end'))
_ALIKE = 'alike'
_START_MS = 300_000  # As jax waits for processes that are late.
_END_MS = 5_000
_FOREVER_MS = 2**31 - 1
_MAX_DIFFERENCES = 5
# Besides those of the numbers: what makes batches, and reads checkpoints.
_PACKAGES = ('tensorflow', 'tensorflow-cpu', 'orbax-checkpoint')

# Held by whoever says why this process ends: its own program, or another process.
_last_word = threading.Lock()
_listeners = []  # None in a process that is alone, or one.


def start(command: dict, config):
  """Checks that all processes run the same; from then on they end together.

  Args:
    command: the program and its flags, as JSON values.
    config: the resolved config, or None.

  Raises:
    UserError: in every process, before any of them wrote: with what differs in the
      commands, the configs, this package's code, or the versions of libraries.
  """
  here = parallel.membership()
  if here is None:
    return
  _listeners.append(threading.Thread(target=_listen, args=[here], daemon=True))
  _listeners[0].start()
  facts = {
    'command': command,
    'config': config and config.to_dict(),
    'code': source_digest(),
    'python': platform.python_version(),
    **workdirs.package_versions(),
    **{name: _version(name) for name in _PACKAGES},
  }
  if here.number:
    here.store.key_value_set(f'{_START}/{here.number}', json.dumps(facts))
    verdict = here.store.blocking_key_value_get(_VERDICT, _START_MS)
  else:
    get = lambda i: here.store.blocking_key_value_get(f'{_START}/{i}', _START_MS)
    others = {i: json.loads(get(i)) for i in range(1, here.count)}
    verdict = compare(json.loads(json.dumps(facts)), others) or _ALIKE
    here.store.key_value_set(_VERDICT, verdict)
  if verdict != _ALIKE:
    raise UserError(verdict)


def compare(facts: dict, others: dict[int, dict]) -> str:
  """One line on how processes differ from process 0, '' if they do not.

  Args:
    facts: of process 0, JSON values under names.
    others: the same of the others, by their numbers.
  """
  found = {}
  for number, other in others.items():
    changed = configs.differences(*map(config_dict.ConfigDict, (facts, other)), ())
    if len(changed) > _MAX_DIFFERENCES:
      changed[_MAX_DIFFERENCES:] = [f'{len(changed) - _MAX_DIFFERENCES} more']
    if changed:
      found.setdefault('; '.join(changed), []).append(str(number))
  if not found:
    return ''
  told = [f'process {", ".join(who)} has {what}' for what, who in found.items()]
  return (
    f'the processes differ, process 0 → others: {"; ".join(told)}: run the same '
    'command and the same installation on every host'
  )


def _version(package: str) -> str:
  """Of one that may be absent."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return 'absent'


def source_digest() -> str:
  """Of this package's source."""
  digest, folder = hashlib.sha256(), pathlib.Path(__file__).parent
  for file in sorted(folder.rglob('*.py')):
    digest.update(f'{file.relative_to(folder)}\n'.encode() + file.read_bytes())
  return digest.hexdigest()[:12]


def finish():
  """To be called by a process that is done, as the others are: stops listening."""
  for listener in _listeners:
    with contextlib.suppress(Exception):  # Another was first.
      parallel.membership().store.key_value_set(_END, json.dumps(None))
    # A thread that still waits when the interpreter ends would abort the process.
    listener.join()


def take_last_word():
  """To be called before a process says why it fails: no other process will, then."""
  if parallel.membership():
    _last_word.acquire()


def end(code: int, state: str, line: str):
  """Ends all processes of the run, this one too; returns if there is but one.

  Args:
    code: exit code of all.
    state: of all, as of `workdir.write_status`.
    line: what happened to this one, for the others to say.
  """
  here = parallel.membership()
  if here is None:
    return
  line = f'process {here.number}: {" ".join(line.split())}'
  with contextlib.suppress(Exception):  # Another was first, or process 0 is gone.
    here.store.key_value_set(_END, json.dumps([code, state, line]))
  _leave(here, code)


def _listen(here: parallel.Membership):
  """Waits for another process to fail, which this one may not notice by itself."""
  try:
    message = json.loads(here.store.blocking_key_value_get(_END, _FOREVER_MS))
  except Exception:  # The run is over, or process 0 is gone, which jax notices.
    return
  if message is not None:
    take_last_word()
    code, state, line = message
    try:
      print(f'error: {line}', file=sys.stderr)
      workdirs.write_status(state, line)
    finally:  # The program itself may wait for its last word, forever.
      _leave(here, code)


def _leave(here: parallel.Membership, code: int):
  """Ends this process without jax's farewell, which waits for all the others."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):
      stream.flush()
  with contextlib.suppress(Exception):  # Some may be dead.
    here.store.wait_at_barrier(_END, _END_MS)
  if here.number == 0:
    time.sleep(1)  # It runs the store: jax aborts processes that it leaves behind.
  os._exit(code)
