"""Fits of generators: what they wrote, and runs that were stopped or killed."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import optax
import pytest

from jaxrobust import generate
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators import trained
from tests.helpers.programs import ROOT

# Each checkpoint is on disk before it goes on.
_DYING = """
import itertools, os, signal, sys
from jaxrobust import generate
from jaxrobust.distributed import parallel
from jaxrobust.runs import checkpoints, cli
steps, last = itertools.count(1), int(sys.argv.pop(1))
save = checkpoints.Checkpoints.save
def saved(self, *args):
  save(self, *args)
  self.wait()
def dying(self):
  if next(steps) == last:
    os.kill(os.getpid(), signal.SIGKILL)
  return False
checkpoints.Checkpoints.save, parallel.Preemption.reached = saved, dying
cli.run(generate.PROGRAM)
"""


def lines_of(folder):
  """Metrics without the time that they took."""
  lines = [json.loads(x) for x in (folder / 'metrics.jsonl').read_text().splitlines()]
  return [{k: v for k, v in x.items() if not k.startswith('time/')} for x in lines]


def sha256(folder):
  """Of the arrays of a sample set, by file."""
  return {
    p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob('*.npy')
  }


def assert_same_fit(a, b):
  """What two workdirs have fitted is equal bit for bit, and so are their metrics."""
  with np.load(a / 'generator.npz') as found, np.load(b / 'generator.npz') as expected:
    assert found.files == expected.files
    for name in expected.files:
      np.testing.assert_array_equal(found[name], expected[name])
  assert lines_of(a) == lines_of(b)


def stop(monkeypatch, config, folder, count, stage='fit'):
  """Runs the program until it has made so many iterations, and is asked to stop."""
  answers = iter([False] * (count - 1) + [True])
  with monkeypatch.context() as patch, pytest.raises(PreemptedError):
    patch.setattr(parallel.Preemption, 'reached', lambda self: next(answers))
    generate.main(config, folder, stage=stage)


def kill(folder, compiled, count, experiment, fields):
  """Runs the program as a process that is killed once it made so many iterations.

  Args:
    folder: the workdir.
    compiled: folder of compiled programs.
    count: of iterations.
    experiment: the file's name in `experiments/`.
    fields: of its config, by name.
  """
  args = [f'--workdir={folder}', f'--config=experiments/{experiment}', '--stage=fit']
  args += [f'--config.{name}={value}' for name, value in fields.items()]
  environment = {
    **os.environ,
    'JAX_NUM_CPU_DEVICES': str(parallel.num_devices()),
    'JAX_COMPILATION_CACHE_DIR': compiled,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  command = [sys.executable, '-c', _DYING, str(count), *args]
  killed = subprocess.run(command, cwd=ROOT, env=environment, timeout=300)
  assert killed.returncode == -signal.SIGKILL
  assert not (folder / 'generator.npz').exists()


def batches_of(config, info):
  """Batches of the digits that a fit of a config trains on."""
  real = datasets.load('digits', 'train', train_images=100, validation_images=400)
  return trained._batches(real, info, config.generator.training, config.seed, 0)


def iterations(recipe, seed, batches):
  """(state, means of metrics) after each of the batches, on all devices."""
  state = parallel.replicate(recipes.init_state(recipe, seed))
  step = recipes.make_step(recipe, seed, 0)
  for batch in batches:
    state, metrics = step(state, parallel.shard(batch))
    metrics = parallel.unreplicate(metrics)
    yield parallel.unreplicate(state), {k: np.mean(v) for k, v in metrics.items()}


def with_descent(recipe):
  """The recipe with plain gradient descent, which shows gradients as they are.

  Adam's first update is of the rate, by rounding's sign where a gradient is nil.
  """
  descent = recipes.Optimizer(optax.sgd(0.1), lambda step: 0.1)
  return recipe._replace(optimizers=dict.fromkeys(recipe.optimizers, descent))
