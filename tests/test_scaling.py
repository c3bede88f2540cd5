"""The compiled training step: what crosses devices does not grow with their number."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import digits
from jaxrobust.distributed import parallel
from jaxrobust.planning import device_programs, program_cost
from jaxrobust.runs import process_group
from tests.helpers.programs import ROOT, ends, free_port


def measure(counts, coordinator='', processes=1, process=0):
  """Prints the collectives and the exits to the host of the step on so many devices.

  Of several processes, all of which run the one program, the first compiles it; the
  others end with it.
  """
  if coordinator:
    process_group.join(coordinator, processes, process)
  assert jax.device_count() == max(counts)
  if process:
    return
  found = {}
  for count in counts:
    config = digits.get_config('wrn-10-1').unlock()
    config.update_from_flattened_dict(
      {
        'data.batch_size': 4 * count,
        'model.batch_norm_group': 4,
        'attack.num_steps': 2,
        'optimizer.warmup_epochs': 0.0,
      }
    )
    [program] = device_programs.of(config, 'train', count)
    if processes == 1:
      devices = jax.devices()[:count]
      lowered = parallel.lower_for(
        devices, program.fn, program.arguments, program.donated
      )
    else:
      # Where there are several, pmap is lowered for arrays only.
      arrays = jax.tree.map(
        lambda x: np.zeros((jax.local_device_count(), *x.shape), x.dtype),
        program.arguments,
      )
      lowered = parallel.pmap(program.fn, program.donated).lower(*arrays)
    text = lowered.compile().as_text()
    state, _ = jax.eval_shape(
      lambda *x, program=program: (x[0], x[1]), *program.arguments
    )
    leaves = jax.tree.leaves((state.params, state.net_state))
    found[count] = {
      'collectives': program_cost.collectives(text),
      'once a step': program_cost.collectives(text[text.index('\nENTRY ') :]),
      'host': re.findall(r'\b(?:infeed|outfeed|send|recv)\(|\w*callback\w*', text),
      'averaged': sum(x.size * x.dtype.itemsize for x in leaves if x.dtype.kind == 'f'),
    }
  print(json.dumps(found))


def start(devices, *arguments):
  """Measures in a process with so many devices of its own."""
  call = f'test_scaling.measure{arguments!r}'
  return subprocess.Popen(
    [sys.executable, '-c', f'from tests import test_scaling; {call}'],
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices),
      # The passes over the program as a whole, which place collectives, all run.
      'XLA_FLAGS': '--xla_backend_optimization_level=0',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def read(process):
  """What it has found, by the number of devices."""
  out, err = process.communicate(timeout=500)
  assert process.returncode == 0, err
  return {int(k): v for k, v in json.loads(out).items()}


@pytest.mark.slow
def test_collectives_are_constant_and_nothing_goes_to_the_host():
  found = read(start(8, (1, 2, 4, 8)))
  assert [v['host'] for v in found.values()] == [[]] * 4
  assert len({json.dumps(v['collectives']) for v in found.values()}) == 1
  assert list(found[8]['collectives']) == ['all-reduce']
  for each in found.values():
    # None in the loop of the attack, which the count would take for one.
    assert each['collectives'] == each['once a step']
  # The gradients and statistics, and the three metrics.
  _, size = found[8]['collectives']['all-reduce']
  assert size == found[8]['averaged'] + 3 * 4
  for processes in (2, 4):
    place = f'localhost:{free_port()}'
    first, *others = (
      start(2, (2 * processes,), place, processes, i) for i in range(processes)
    )
    devices = 2 * processes
    assert read(first)[devices] == found[devices]
    assert ends(others)[0] == [0] * (processes - 1)
