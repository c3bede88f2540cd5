"""The processes of a run: they find each other, start alike, and end together.

What they say to each other goes through the key-value store of process 0, which needs
no devices, so that a process is heard while others wait for it in a collective.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import threading
import time
from typing import Any, NamedTuple

import jax
from absl import logging
from jax._src import cloud_tpu_init, distributed  # Have no public names.
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError, one_line
from jaxrobust.runs import exits
from jaxrobust.runs import workdir as workdirs

_ASK, _END = 'jaxrobust/alike', 'jaxrobust/end'
_ALIKE = 'alike'
_END_MS = 5_000
_PATIENCE_S, _REPORT_S = 300, 15  # of whoever waits for the others to start
_FOREVER_MS = 2**31 - 1
_MAX_DIFFERENCES = 5
# Besides those of the numbers: what makes batches, and reads checkpoints.
_PACKAGES = ('tensorflow', 'tensorflow-cpu', 'orbax-checkpoint', 'libtpu')

# Held by whoever says why this process ends: its own program, or another process.
_last_word = threading.Lock()
_listeners = []  # None in a process that is alone, or one.
_questions = itertools.count()  # Every process asks equally often.


def join(
  coordinator: str = '',
  num_processes: int | None = None,
  process_id: int | None = None,
  alone: bool = False,
) -> None:
  """Joins this process to a run of several; call before any other use of jax.

  Args:
    coordinator: `host:port` of process 0; `auto` where jax finds it by itself
      (Cloud TPU, Slurm, Open MPI), which a TPU needs no word for; else empty for a run
      of a single process.
    num_processes: number of processes of the run.
    process_id: index of this process, from 0.
    alone: whether one process will do all the work: it gets the CPU only, and joins
      others only if it is asked to.

  A process that is not heard of for $JAXROBUST_HEARTBEAT seconds (100) ends all others.
  """
  text = os.environ.get('JAXROBUST_HEARTBEAT') or '100'
  if not text.isdecimal() or not int(text):
    raise UserError(f'JAXROBUST_HEARTBEAT={text}: use a whole number of seconds')
  initialize = functools.partial(
    jax.distributed.initialize,
    heartbeat_timeout_seconds=int(text),
    initialization_timeout=2 * _PATIENCE_S,
  )
  if alone:
    jax.config.update('jax_platforms', 'cpu')
    # It saves nothing that a signal should wait for.
    jax.config.update('jax_enable_preemption_service', False)
  if coordinator == 'auto' or (not coordinator and _is_on_tpu()):
    _join_by_itself(initialize)
  elif not coordinator and (num_processes, process_id) != (None, None):
    raise UserError(
      '--num_processes and --process_id without --coordinator: add '
      '--coordinator=HOST:PORT of process 0'
    )
  elif coordinator:
    if not re.fullmatch(r'.+:\d+', coordinator):
      raise UserError(f'--coordinator={coordinator}: write HOST:PORT of process 0')
    if num_processes is None or process_id is None:
      raise UserError(
        f'--coordinator={coordinator} needs --num_processes=N and --process_id=I'
      )
    if not 0 <= process_id < num_processes:
      raise UserError(
        f'process_id = {process_id} of num_processes = {num_processes}: '
        'number the processes 0 .. num_processes - 1'
      )
    if num_processes > 1:
      logging.info('waiting for the %d processes at %s', num_processes, coordinator)
    with _patience(f'the {num_processes} processes at {coordinator}', exits.ERROR):
      initialize(coordinator, num_processes, process_id)


@contextlib.contextmanager
def _patience(what: str, code: int):
  """Reports that others are waited for; in the end ends this process, in one line.

  jax would abort it with a stack, which cannot be caught.
  """
  arrived = threading.Event()

  def wait():
    for waited in range(_REPORT_S, _PATIENCE_S + 1, _REPORT_S):
      if arrived.wait(_REPORT_S):
        return
      logging.info('waiting for %s, for %d s now', what, waited)
    exits.say(
      f'error: {what} did not all come within {_PATIENCE_S} s: start the same command '
      'on every host, with a --coordinator that all can reach and a --process_id of '
      'its own'
    )
    exits.leave(code)

  threading.Thread(target=wait, daemon=True).start()
  try:
    yield
  finally:
    arrived.set()


def _is_on_tpu() -> bool:
  """Whether jax will use a TPU of this host."""
  platforms = (jax.config.jax_platforms or '').split(',')
  return cloud_tpu_init.running_in_cloud_tpu_vm and 'tpu' in platforms


def _join_by_itself(initialize):
  """Joins the processes that jax finds, with a word on how to help it."""
  hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '')
  if hosts and ',' not in hosts and 'MEGASCALE_NUM_SLICES' not in os.environ:
    return  # Alone. jax would ask a metadata server, which not every host has.
  try:
    # A host may be on its way: start this one again.
    with _patience('the hosts of this run', exits.CRASHED):
      initialize()
  except Exception as e:
    if cloud_tpu_init.running_in_cloud_tpu_vm:  # The server may answer the next time.
      e.add_note(
        'jax does not find the hosts of this TPU: if there is but this one, set '
        'TPU_WORKER_HOSTNAMES=localhost'
      )
    elif isinstance(e, ValueError):
      raise UserError(
        '--coordinator=auto: jax finds neither a TPU nor Slurm nor Open MPI here: give '
        '--coordinator=HOST:PORT of process 0, --num_processes and --process_id'
      ) from e
    raise


class Membership(NamedTuple):
  """The place of this process in a run of several processes.

  Attributes:
    number: of this process, from 0.
    count: of the processes.
    store: jax's client of the key-value store that they share.
  """

  number: int
  count: int  # type: ignore[assignment]
  store: Any


def membership() -> Membership | None:
  """This process among the others, None if it is alone; asks no device."""
  state = distributed.global_state
  if state.client is None or state.num_processes == 1:
    return None
  return Membership(state.process_id, state.num_processes, state.client)


def start(command: dict, config: config_dict.ConfigDict | None) -> None:
  """Checks that all processes run the same; from then on they end together.

  Args:
    command: the program and its flags, as JSON values.
    config: the resolved config, or None.

  Raises:
    UserError: in every process, before any of them wrote: with what differs in the
      commands, the configs, this package's code, the versions of libraries, or the
      numbers of devices.
  """
  here = membership()
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
  require_alike(facts, 'run the same command and the same installation on every host')
  parallel.require_equal_processes()


def require_alike(facts: dict, remedy: str = 'give every host the same files') -> None:
  """Checks that something is the same in all processes, which all ask.

  It waits as long as they live: one disk is read in minutes, another in an hour.

  Args:
    facts: JSON values under names.
    remedy: what to do where they differ.

  Raises:
    UserError: in every process, with what differs.
  """
  here = membership()
  if here is None:
    return
  question = f'{_ASK}/{next(_questions)}'
  if here.number:
    here.store.key_value_set(f'{question}/{here.number}', json.dumps(facts))
    verdict = here.store.blocking_key_value_get(f'{question}/verdict', _FOREVER_MS)
  else:
    get = lambda i: here.store.blocking_key_value_get(f'{question}/{i}', _FOREVER_MS)
    others = {i: json.loads(get(i)) for i in range(1, here.count)}
    differences = compare(json.loads(json.dumps(facts)), others)
    verdict = f'{differences}: {remedy}' if differences else _ALIKE
    here.store.key_value_set(f'{question}/verdict', verdict)
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
  said = [f'process {", ".join(who)} has {what}' for what, who in found.items()]
  return f'the processes differ, process 0 → others: {"; ".join(said)}'


def _version(package: str) -> str:
  """The version of a package that may be absent."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return 'absent'


def source_digest() -> str:
  """The sha256 of this package's source."""
  digest, folder = hashlib.sha256(), pathlib.Path(__file__).parent.parent
  for file in sorted(folder.rglob('*.py')):
    digest.update(f'{file.relative_to(folder)}\n'.encode() + file.read_bytes())
  return digest.hexdigest()[:12]


def leave_to_first() -> bool:
  """Waits for process 0, which does all the work; False in that process."""
  here = membership()
  if here is None or here.number == 0:
    return False
  _listeners[0].join()
  return True


def lost(e: Exception) -> str:
  """One line on another process that is gone, '' for another error."""
  if not membership() or not isinstance(e, jax.errors.JaxRuntimeError):
    return ''
  found = re.search(r'Gloo|[Cc]onnection (closed|reset)|heartbeat', str(e))
  text = one_line(e)[:200]
  return found and f'another process is lost ({text}): run the same command again' or ''


def finish() -> None:
  """Stops listening; a process that is done, as the others are, calls it."""
  for listener in _listeners:
    with contextlib.suppress(Exception):  # Another was first.
      membership().store.key_value_set(_END, json.dumps(None))
    # A thread that still waits when the process ends would abort it.
    listener.join()
  with contextlib.suppress(Exception):  # Another was lost after it had finished.
    jax.distributed.shutdown()


def take_last_word() -> None:
  """Lets no other process say why it fails; who calls it says so next."""
  if membership():
    _last_word.acquire()


def end(code: int, state: str, line: str) -> None:
  """Ends all processes of the run, this one too; returns if there is but one.

  Args:
    code: exit code of all.
    state: of all, as of `workdir.write_status`.
    line: what happened to this one, for the others to say.
  """
  here = membership()
  if here is None:
    return
  line = f'process {here.number}: {" ".join(line.split())}'
  with contextlib.suppress(Exception):  # Another was first, or process 0 is gone.
    here.store.key_value_set(_END, json.dumps([code, state, line]))
  _leave(here, code)


def _listen(here: Membership):
  """Waits for another process to fail, which this one may not notice by itself."""
  try:
    message = json.loads(here.store.blocking_key_value_get(_END, _FOREVER_MS))
  except Exception:  # The run is over, or process 0 is gone, which jax notices.
    return
  if message is not None:
    take_last_word()
    code, state, line = message
    try:
      exits.say(f'error: {line}')
      workdirs.write_status(state, line)
    finally:  # The program itself may wait for its last word, forever.
      _leave(here, code)


def _leave(here: Membership, code: int):
  """Ends this process without jax's farewell, which waits for all the others."""
  with contextlib.suppress(Exception):  # Some may be dead.
    here.store.wait_at_barrier(_END, _END_MS)
  if here.number == 0:
    time.sleep(1)  # It runs the store: jax aborts processes that it leaves behind.
  exits.leave(code)
