"""The compiled training step: what crosses devices does not grow with their number."""

import json
import os
import re
import subprocess
import sys

import jax
import pytest

from experiments import digits
from jaxrobust import costs, parallel, programs
from tests.conftest import ROOT

DEVICES = (1, 2, 4, 8)


def measure():
  """Prints the collectives and the exits to the host of the step on DEVICES."""
  found = {}
  for count in DEVICES:
    config = digits.get_config('wrn-10-1').unlock()
    config.update_from_flattened_dict(
      {
        'data.batch_size': 4 * count,
        'model.batch_norm_group': 4,
        'attack.num_steps': 2,
        'optimizer.warmup_epochs': 0.0,
      }
    )
    program = programs.of(config, 'train', count)
    text = (
      parallel.lower_for(
        jax.devices()[:count], program.fn, program.arguments, program.donated
      )
      .compile()
      .as_text()
    )
    state, _ = jax.eval_shape(
      lambda *x, program=program: (x[0], x[1]), *program.arguments
    )
    leaves = jax.tree.leaves((state.params, state.net_state))
    found[count] = {
      'collectives': costs.collectives(text),
      'once a step': costs.collectives(text[text.index('\nENTRY ') :]),
      'host': re.findall(r'\b(?:infeed|outfeed|send|recv)\(|\w*callback\w*', text),
      'averaged': sum(x.size * x.dtype.itemsize for x in leaves if x.dtype.kind == 'f'),
    }
  print(json.dumps(found))


@pytest.mark.slow
def test_collectives_are_constant_and_nothing_goes_to_the_host():
  done = subprocess.run(
    [sys.executable, '-c', 'from tests import test_scaling; test_scaling.measure()'],
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(max(DEVICES)),
      # The passes over the program as a whole, which place collectives, all run.
      'XLA_FLAGS': '--xla_backend_optimization_level=0',
    },
    capture_output=True,
    text=True,
    timeout=500,
  )
  assert done.returncode == 0, done.stderr
  found = {int(k): v for k, v in json.loads(done.stdout).items()}
  assert [v['host'] for v in found.values()] == [[]] * len(DEVICES)
  assert found[2]['collectives'] == found[4]['collectives'] == found[8]['collectives']
  assert list(found[8]['collectives']) == ['all-reduce']
  for each in found.values():
    # None in the loop of the attack, which the count would take for one.
    assert each['collectives'] == each['once a step']
  # The gradients and statistics, and the three metrics.
  _, size = found[8]['collectives']['all-reduce']
  assert size == found[8]['averaged'] + 3 * 4
