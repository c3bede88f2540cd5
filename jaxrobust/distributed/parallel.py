"""Devices and processes: the one module that names pmap and its axis.

A program is written for one device, as a function of its shard of the batch;
`pmap` runs it on all of them. What crosses devices goes through the three
collectives here. Arrays that enter and leave carry a leading axis of the local
devices: `replicate` and `shard` add it, `unreplicate` and `gather` remove it.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import re
import signal
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.extend.core import ClosedJaxpr

from jaxrobust.errors import UserError

AXIS = 'devices'

Tree = TypeVar('Tree')  # of arrays, which keeps its structure

# That ask a program to save and stop; SIGHUP comes from a terminal that is closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Of the questions whether to stop: every process asks equally often.
_questions = itertools.count(1)

# Of `mallopt` in the C library's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def _with_scoped_memory(arguments: str) -> str:
  """Arguments of the TPU's compiler that give each of its operations 44 MiB to work in.

  That is a third of the fast memory of a core of v5e, of which an operation gets 16 MiB
  otherwise, too little for large tiles: convolutions then read their inputs and
  kernels from the main memory several times. A larger limit leaves less room for arrays
  that stay there from one operation to the next. What this and other limits save, by
  the compiler's schedule, is in docs/planning.md; programs for v2, v3 and v4 take the
  same cycles. A limit that the user sets remains.
  """
  option = '--xla_tpu_scoped_vmem_limit_kib'
  return arguments if option in arguments else f'{arguments} {option}=45056'.strip()


# Libtpu reads it once, when jax first asks for devices.
os.environ['LIBTPU_INIT_ARGS'] = _with_scoped_memory(
  os.environ.get('LIBTPU_INIT_ARGS', '')
)

# On GPU each draw of random numbers becomes a call of a kernel that jax brings, where
# it would otherwise be some hundred operations to compile. The numbers are the same.
# docs/benchmarks.md says what it saves.
if 'JAX_THREEFRY_GPU_KERNEL_LOWERING' not in os.environ:
  jax.config.update('jax_threefry_gpu_kernel_lowering', True)


def use_cores(images: int, parameters: int) -> None:
  """On CPU, gives this process a device for each core, before jax looks for devices.

  XLA computes many convolutions with few channels on one core of those that a device
  has. On two cores 100 images of 32x32 pass WRN-10-1 forward and backward in 60 to 70
  ms, and in 74 to 119 with one device. Nothing changes if the user says how many
  devices there are, or if jax has found its devices.

  Args:
    images: of a batch; each device gets at least 8.
    parameters: bytes of them; all copies together take at most 128 MiB. The wide
      convolutions of larger networks take several cores of one device as well.
  """
  affinity = getattr(os, 'sched_getaffinity', lambda _: range(os.cpu_count() or 1))
  devices = min(len(affinity(0)), images // 8, 2**27 // max(parameters, 1))
  said = 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  if devices < 2 or said or jax.config.values['jax_num_cpu_devices'] > 0:
    return
  with contextlib.suppress(RuntimeError):  # jax has its devices.
    jax.config.update('jax_num_cpu_devices', devices)


def number() -> int:
  """The number of this process, from 0."""
  return jax.process_index()


def is_writer() -> bool:
  """Whether this process writes logs and results (one of them does)."""
  return jax.process_index() == 0


def num_devices() -> int:
  """Devices of the whole run, over all processes."""
  return jax.device_count()


def kind_of_device() -> str:
  """What the devices are."""
  return jax.devices()[0].device_kind


def require_agreement(step: int) -> None:
  """Raises UserError if the processes would start from different steps.

  Until all have asked, none goes on.
  """
  if jax.process_count() > 1:
    steps = multihost_utils.process_allgather(np.int32(step)).tolist()
    if len(set(steps)) > 1:
      raise UserError(
        f'the processes found different progress, {steps}: give all of them one '
        'workdir that they share'
      )


def require_equal_processes() -> None:
  """Raises UserError if processes have unequal numbers of devices."""
  found = jax.device_count(), jax.process_count(), jax.local_device_count()
  if found[0] != found[1] * found[2]:
    raise UserError(
      f'{found[0]} devices in {found[1]} processes, and {found[2]} in this one: give '
      'every process the same number of devices'
    )


def everywhere(condition: bool) -> bool:
  """Whether something holds in every process; all of them ask."""
  if jax.process_count() == 1:
    return condition
  return bool(multihost_utils.process_allgather(np.int32(condition)).all())


def num_local_devices() -> int:
  """Devices of this process."""
  return jax.local_device_count()


def share(items: list) -> list:
  """This process's part of a list; None makes it as long as any other's."""
  rounds = -(-len(items) // jax.process_count())
  turns = range(jax.process_index(), rounds * jax.process_count(), jax.process_count())
  return [items[i] if i < len(items) else None for i in turns]


def pmap(
  fn: Callable, donate_argnums: int | tuple[int, ...] = (), local: bool = False
) -> jax.stages.Wrapped:
  """Maps `fn` over all devices; inside, the collectives below may be used.

  Args:
    fn: for one device.
    donate_argnums: as of jax.
    local: whether over those of this process only, so that the processes of a run need
      not call it together.
  """
  devices = jax.local_devices() if local and jax.process_count() > 1 else None
  if jax.default_backend() == 'cpu':
    _keep_memory()
  return jax.pmap(fn, axis_name=AXIS, devices=devices, donate_argnums=donate_argnums)


@functools.cache
def _keep_memory():
  """Has the C library keep the memory that a step on CPU frees, for the next step.

  XLA allocates a step's temporaries as one block. Blocks above 32 MiB glibc gives back
  to the system each time, at a page fault for each 4 KiB of the next: 22 of 124 ms of
  processor time in a step of experiments/digits_ddpm.py. In threads but the first it
  still does so above 64 MiB.
  """
  library = ctypes.CDLL(None)
  if hasattr(library, 'mallopt'):
    for option, size in ((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_THRESHOLD, 2**30)):
      library.mallopt(option, size)


def lower_for(
  devices: list,
  fn: Callable,
  arguments: Sequence,
  donate_argnums: int | tuple[int, ...] = (),
) -> jax.stages.Lowered:
  """`pmap(fn)` for devices that need not be here, lowered to be compiled.

  Args:
    devices: of `slices.devices`.
    fn: for one device, as in `pmap`.
    arguments: trees of a device's shapes, as jax.ShapeDtypeStruct.
    donate_argnums: as in `pmap`.

  Returns:
    jax's Lowered.
  """
  copies = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype), arguments
  )
  mapped = jax.pmap(fn, axis_name=AXIS, devices=devices, donate_argnums=donate_argnums)
  return mapped.lower(*copies)


def trace(fn: Callable, arguments: Sequence, num_devices: int) -> ClosedJaxpr:
  """The jaxpr of `fn`, for one of so many devices; arguments as in `lower_for`."""
  return jax.make_jaxpr(fn, axis_env=[(AXIS, num_devices)])(*arguments)


def mean_over_devices(tree: Tree) -> Tree:
  """Mean of every leaf over all devices (inside `pmap`).

  Leaves of integers, such as step counts, agree on all devices and stay as they are.
  """
  leaves, treedef = jax.tree.flatten(tree)
  inexact = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
  means = jax.lax.pmean([leaves[i] for i in inexact], AXIS)
  for i, mean in zip(inexact, means, strict=True):
    leaves[i] = mean
  return jax.tree.unflatten(treedef, leaves)


def mean_in_group(x: jax.Array, devices_per_group: int) -> jax.Array:
  """Mean of `x` over each aligned group of consecutive devices (inside `pmap`)."""
  devices = jax.lax.axis_size(AXIS)
  if devices % devices_per_group:
    raise UserError(
      f'a BatchNorm group spans {devices_per_group} devices, which does not '
      f'divide the {devices} of this run: change model.batch_norm_group or the '
      'number of devices'
    )
  groups = np.arange(devices).reshape(-1, devices_per_group).tolist()
  return jax.lax.pmean(x, AXIS, axis_index_groups=groups)


def all_gather(tree: Tree) -> Tree:
  """Concatenates every leaf [b, ...] over all devices, as [B, ...] (inside `pmap`)."""
  return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)


def _local_sharding():
  """That of what pmap returns; with any other, the second call compiles again."""
  mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))


def replicate(tree: Tree) -> Tree:
  """Copies a tree to every local device, with a leading device axis."""
  sharding, count = _local_sharding(), jax.local_device_count()
  place = lambda x: jax.device_put(
    np.broadcast_to(np.asarray(x), (count, *np.shape(x))), sharding
  )
  return jax.tree.map(place, tree)


def unreplicate(tree: Tree) -> Tree:
  """The first local device's copy of a replicated tree, as numpy."""
  first = lambda x: x.addressable_shards[0].data
  return jax.tree.map(lambda x: np.asarray(x)[0], jax.tree.map(first, tree))


def shard(tree: Tree) -> Tree:
  """Spreads numpy arrays [b, ...] of this process over its devices, [d, b / d, ...]."""
  count, sharding = jax.local_device_count(), _local_sharding()
  place = lambda x: jax.device_put(
    np.reshape(x, (count, x.shape[0] // count, *x.shape[1:])), sharding
  )
  return jax.tree.map(place, tree)


def gather(tree: Tree) -> Tree:
  """Concatenates sharded arrays [d, b, ...] of all processes, as numpy [B, ...]."""
  if jax.process_count() > 1:
    tree = multihost_utils.process_allgather(jax.tree.map(jax.device_get, tree))
    merge = lambda x: np.reshape(x, (-1, *x.shape[3:]))
  else:
    merge = lambda x: np.reshape(x, (-1, *x.shape[2:]))
  return jax.tree.map(lambda x: merge(np.asarray(x)), tree)


def map_in_batches(mapped: Callable, variables: Any, rows: Any, batch_size: int) -> Any:
  """Applies a function of `pmap` to any number of rows, on the devices of a process.

  Every device always gets batch_size rows, the last of them padding, so that the
  compiled program, and with it every rounding, is the same for any number of devices.

  Args:
    mapped: local `pmap` of `(variables, rows [b, ...]) -> outputs [b, ...]`.
    variables: replicated tree.
    rows: tree of numpy arrays [n, ...], n at least 1.
    batch_size: b.

  Returns:
    Tree of numpy arrays [n, ...].
  """
  count = len(jax.tree.leaves(rows)[0])
  whole = batch_size * jax.local_device_count()
  merge = lambda x: np.asarray(x).reshape(-1, *x.shape[2:])
  found = []
  for start in range(0, count, whole):
    chosen = np.minimum(np.arange(start, start + whole), count - 1)
    part = jax.tree.map(functools.partial(np.take, indices=chosen, axis=0), rows)
    found.append(jax.tree.map(merge, mapped(variables, shard(part))))
  return jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *found)


def process_slots(batch_size: int) -> tuple[int, int]:
  """The global slots [start, stop) of a batch that this process feeds.

  Raises:
    UserError: if the batch does not divide over the devices.
  """
  if batch_size % jax.device_count():
    raise UserError(
      f'a batch of {batch_size} does not divide over {jax.device_count()} '
      'devices: use a multiple of that number'
    )
  local = batch_size // jax.device_count() * jax.local_device_count()
  start = jax.process_index() * local
  return start, start + local


class Preemption:
  """Answers in all processes at the same question that one was asked to stop.

  What comes too late for the last question of one is answered by the next: a signal in
  the last step of a fit stops the sampling.
  """

  _unanswered = False

  def __init__(self):
    self._asked, Preemption._unanswered = Preemption._unanswered, False
    self._answered = self._interrupted = False
    handlers = dict.fromkeys(STOP_SIGNALS, self._ask)
    if jax.process_count() > 1:
      # jax's own service listens for SIGTERM and agrees on the question; a handler of
      # ours would hide the signal from it.
      handlers = {
        signal.SIGINT: self._interrupt,
        signal.SIGHUP: lambda *_: os.kill(os.getpid(), signal.SIGTERM),
      }
    self._previous = {
      number: signal.signal(number, handler)
      for number, handler in handlers.items()
      if signal.getsignal(number) != signal.SIG_IGN  # As nohup leaves SIGHUP.
    }

  def _ask(self, signum, frame):
    del frame
    # A second Ctrl-C means now. SIGTERM often comes twice: when a machine shuts down,
    # from the system and passed on by a launcher.
    if self._asked and signum == signal.SIGINT:
      raise KeyboardInterrupt(f'signal {signum}')
    self._asked = True

  def _interrupt(self, signum, frame):
    del frame
    self._interrupted = True
    raise KeyboardInterrupt(f'signal {signum}')

  def reached(self) -> bool:
    """Whether to save and stop now; every process asks after every step.

    Raises:
      KeyboardInterrupt: in a run of several processes, after Ctrl-C. It was raised when
        the signal came, but Python drops an exception that is raised in a finalizer or
        during garbage collection.
    """
    if jax.process_count() > 1:
      if self._interrupted:
        raise KeyboardInterrupt
      # They stop at the question after the last that any has asked: 1 before the first,
      # wherever the run resumed. That one must come, so numbers have no gap.
      return multihost_utils.reached_preemption_sync_point(next(_questions))
    self._answered = self._asked
    return self._asked

  def close(self) -> None:
    """Gives the signals back."""
    Preemption._unanswered = self._asked and not self._answered
    for number, handler in self._previous.items():
      signal.signal(number, handler)


def memory_error(e: Exception) -> UserError | None:
  """One line on a device whose memory is too small; None for another error."""
  text = ' '.join(str(e).split())
  if not isinstance(e, jax.errors.JaxRuntimeError) or not re.search(
    'RESOURCE_EXHAUSTED.*memory', text, re.I
  ):
    return None
  return UserError(
    f'the memory of a device is too small ({text[:200]}): train on more devices, with '
    'config.model.remat or a higher config.training.accumulation (jaxrobust plan '
    '--suggest says what fits), or else with a smaller config.data.batch_size; '
    'generate and evaluate with a smaller batch_size'
  )


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def key_per_slot(rng: jax.Array, slots: jax.Array) -> jax.Array:
  """One key for each global slot [b], so that no draw depends on the layout."""
  return jax.vmap(lambda slot: jax.random.fold_in(rng, slot))(jnp.asarray(slots))
