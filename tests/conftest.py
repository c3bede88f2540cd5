"""Tests run on four virtual CPU devices, with silent broadcasting refused.

The fixtures run programs as processes of their own.
"""

import contextlib
import os
import pathlib
import random
import socket
import subprocess
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '4')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Programs this small take longer to optimise than to run.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# [B] * [B, 1] would broadcast to [B, B] without a word.
jax.config.update('jax_numpy_rank_promotion', 'raise')

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def float64():
  """Runs a test in double precision."""
  with jax.enable_x64(True):
    yield


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


@pytest.fixture(scope='session')
def compiled(tmp_path_factory):
  """One compilation cache for all runs of the session."""
  return str(tmp_path_factory.mktemp('compiled'))


@pytest.fixture(scope='module')
def compiled_once(compiled):
  """Runs of the same program, here and in processes, share its compilation."""
  values = {
    'jax_compilation_cache_dir': compiled,
    'jax_persistent_cache_min_compile_time_secs': 0,
  }
  before = {name: getattr(jax.config, name) for name in values}
  for name, value in values.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope='session')
def start(compiled):
  """Starts a program; `devices` virtual devices, and further variables."""

  def run(program, *args, devices=1, root=ROOT, **variables):
    environment = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices),
      'JAX_COMPILATION_CACHE_DIR': compiled,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      **variables,
    }
    return subprocess.Popen(
      [sys.executable, '-m', f'jaxrobust.{program}', *args],
      cwd=root,
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )

  return run


@pytest.fixture
def pod(start):
  """Starts a program in several processes, and kills what is left of them.

  `different` has further arguments of some of them, `roots` where some start.
  """
  started = []

  def run(count, program, *args, different=None, roots=None, **kwargs):
    port = free_port()
    flags = [f'--coordinator=localhost:{port}', f'--num_processes={count}']
    for i in range(count):
      more = [*flags, f'--process_id={i}', *(different or {}).get(i, ())]
      root = (roots or {}).get(i, ROOT)
      started.append(start(program, *args, *more, root=root, **kwargs))
    return started[-count:]

  yield run
  for process in started:
    process.kill()
    process.communicate()


@pytest.fixture(scope='session')
def call(start):
  """Runs a program to its end: (exit code, stdout, stderr)."""

  def run(*args, **kwargs):
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err

  return run


@pytest.fixture(scope='session')
def trained(call, tmp_path_factory):
  """The workdir of an uninterrupted tiny run."""
  workdir = tmp_path_factory.mktemp('trained')
  code, _, err = call('train', f'--workdir={workdir}', *TINY)
  assert code == 0, err
  return workdir


def free_port():
  """Of those that no other program is given by chance before it is used."""
  while True:
    port = random.randrange(20_000, 32_000)
    with socket.socket() as s, contextlib.suppress(OSError):
      s.bind(('localhost', port))
      return port


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
