"""Programs as processes of their own: a tiny run, its files, and how they end."""

import contextlib
import itertools
import os
import pathlib
import socket
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent.parent
TINY = [
  '--config=experiments/digits.py:wrn-10-1',
  '--config.data.batch_size=32',
  '--config.model.batch_norm_group=8',
  '--config.training.num_steps=12',
  '--config.training.epoch_examples=128',
  '--config.evaluation.interval_epochs=1',
  '--config.checkpoint.interval_epochs=0.5',
  '--config.log.interval_epochs=0.25',
  '--config.dataset.validation_images=32',
  '--config.attack.num_steps=2',
  '--config.evaluation.attack.num_steps=3',
  '--config.evaluation.batch_size=256',
  '--config.optimizer.warmup_epochs=0.5',
]

# To optimise the programs takes longer than so few steps; and until the heartbeat's
# time is over, the survivor of a killed process keeps a processor busy.
FAST = {
  'XLA_FLAGS': '--xla_backend_optimization_level=0',
  'JAXROBUST_HEARTBEAT': '20',
}

# Below those that systems give away; sessions beside this one begin elsewhere.
_PORTS = range(20_000, 32_000)
_next_ports = itertools.cycle((*_PORTS[os.getpid() % len(_PORTS) :], *_PORTS))


def free_port():
  """Of those that no other program is given by chance before it is used."""
  for port in _next_ports:
    with socket.socket() as s, contextlib.suppress(OSError):
      s.bind(('localhost', port))
      return port
  raise AssertionError('no port is free')


def ends(processes):
  """Exit codes and stderr of processes that end by themselves."""
  texts = [p.communicate(timeout=300)[1] for p in processes]
  return [p.returncode for p in processes], texts


def assert_same_file(a, b):
  """Two files of parameters are equal, bit for bit."""
  from jaxrobust.models import parameter_files  # Takes its time, which few tests need.

  for x, y in zip(
    parameter_files.import_npy(a), parameter_files.import_npy(b), strict=True
  ):
    for module in x:
      for leaf in x[module]:
        np.testing.assert_array_equal(x[module][leaf], y[module][leaf])


def wait_for_step(process, workdir, step):
  """Returns once the run has logged `step`."""
  deadline = time.monotonic() + 300
  path = workdir / 'metrics.jsonl'
  while time.monotonic() < deadline and process.poll() is None:
    if path.exists() and len(path.read_text().splitlines()) >= step:
      return
    time.sleep(0.01)
  raise AssertionError(process.communicate()[1])
