"""What the TPU's compiler says of a program: memory, schedule, refusals."""

import hashlib
import importlib.metadata
import json
import math
import os
import re
import time

import jax
from absl import logging

from jaxrobust.distributed import parallel
from jaxrobust.planning import device_programs, program_cost, schedule
from jaxrobust.runs import workdir as workdirs

_GIB = 2**30
_PARTS = ('arguments', 'outputs', 'aliased', 'temporaries')  # of a program's memory
_FORMAT = '2'  # of the results that are kept


def operations(program: device_programs.Program, num_devices: int) -> float:
  """FLOPs of a call on one of so many devices."""
  jaxpr = parallel.trace(program.fn, program.arguments, num_devices)
  return program_cost.flops(jaxpr, rounds=program.rounds)


def compile_for(devices: list, topology: str, program: device_programs.Program) -> dict:
  """What the compiler says of a program; from the cache if it said so before.

  Returns:
    Sizes in bytes ('arguments', 'outputs', 'aliased', 'temporaries'), 'schedule' and
    'seconds' of compilation; or only 'refused' and 'seconds', if the memory of a device
    does not suffice.
  """
  lowered = parallel.lower_for(devices, program.fn, program.arguments, program.donated)
  versions = [importlib.metadata.version(name) for name in ('jax', 'libtpu')]
  options = os.environ['LIBTPU_INIT_ARGS']  # which `parallel` sets
  key = hashlib.sha256(
    '\n'.join(
      [_FORMAT, topology, *versions, options, str(program.rounds), lowered.as_text()]
    ).encode()
  ).hexdigest()
  path = workdirs.cache_folder('plan') / f'{key}.json'
  if path.exists():
    found = json.loads(path.read_text())
    if 'schedule' in found:
      found['schedule'] = schedule.from_json(found['schedule'])
    return found
  logging.info('compiling for %s, which takes minutes', topology)
  started = time.monotonic()
  try:
    result = _measures(lowered.compile(), program.rounds)
  except jax.errors.JaxRuntimeError as e:
    result = {'refused': refusal(str(e))}
    if not result['refused']:
      raise
  result['seconds'] = round(time.monotonic() - started, 1)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(result))
    temporary.replace(path)
  except OSError as e:
    logging.warning('the result is not kept in %s: %s', path.parent, e.strerror or e)
  return result


def _measures(compiled, rounds: int) -> dict:
  """What a compiled program takes: its sizes in bytes, and its schedule."""
  sizes = compiled.memory_analysis()
  return {
    'arguments': sizes.argument_size_in_bytes,
    'outputs': sizes.output_size_in_bytes,
    'aliased': sizes.alias_size_in_bytes,
    'temporaries': sizes.temp_size_in_bytes,
    'schedule': schedule.read(compiled.as_text(), rounds),
  }


def refusal(message: str) -> str:
  """One line from the compiler's refusal for want of memory; '' if it is of another."""
  if found := re.search(r'Used ([\d.]+\w) of ([\d.]+\w) hbm', message):
    return f'needs {found[1]}iB of {found[2]}iB'
  # Before it has placed everything.
  if found := re.search(
    r'temporaries \(([\d.]+\w)\) exceeds .*?\(([\d.]+\w)\)', message
  ):
    return f'needs {found[1]}iB and more of {found[2]}iB'
  if 'CompileTimeHbmOom' in message or 'RESOURCE_EXHAUSTED' in message:
    return 'needs more memory than there is'
  return ''


def memory(result: dict) -> float:
  """Bytes of a device that a program takes; infinite for one that was refused."""
  if 'refused' in result:
    return math.inf
  outputs = result['outputs'] - result['aliased']  # The others replace arguments.
  return result['arguments'] + outputs + result['temporaries']


def fits(result: dict, usable: float) -> str:
  """One line on memory."""
  if 'refused' in result:
    return f'does NOT fit: {result["refused"]} on a device (--suggest: what may)'
  gib = {k: result[k] / _GIB for k in _PARTS}
  return (
    f'fits: {memory(result) / _GIB:.2f} GiB of {usable} GiB usable on a device: '
    f'{gib["arguments"]:.2f} arguments, {gib["temporaries"]:.2f} temporaries, '
    f'{gib["outputs"]:.2f} outputs '
    f'({gib["aliased"]:.2f} in place of arguments)'
  )
