"""Tests run on four virtual CPU devices, with silent broadcasting refused.

The fixtures run programs as processes of their own.
"""

import gc
import os
import pathlib
import subprocess
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '4')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Programs this small take longer to optimise than to run.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')

import jax  # noqa: E402
import pytest  # noqa: E402

from jaxrobust.distributed import parallel  # noqa: E402
from tests.helpers.programs import ROOT, TINY, free_port  # noqa: E402

# [B] * [B, 1] would broadcast to [B, B] without a word.
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def float64():
  """Runs a test in double precision."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='module', autouse=True)
def room_for_programs():
  """Lets go of compiled programs after a module, before there are too many.

  Each takes some maps of memory, of which Linux gives a process 65,530; a compiler that
  gets none aborts.
  """
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > 20_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def use_devices(monkeypatch):
  """Goes on with the first so many of the four devices."""

  def run(count):
    devices = jax.devices()[:count]
    for name in ('device_count', 'local_device_count'):
      monkeypatch.setattr(jax, name, lambda: count)
    monkeypatch.setattr(jax, 'local_devices', lambda: devices)
    mapped = lambda fn, donate_argnums=(): jax.pmap(
      fn, axis_name=parallel.AXIS, devices=devices, donate_argnums=donate_argnums
    )
    monkeypatch.setattr(parallel, 'pmap', mapped)

  return run


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
