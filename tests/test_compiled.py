"""What programs compile: once each, ahead of the first step, and not in a new process.

Counted by what jax reports of itself, in processes of their own.
"""

import json
import os
import subprocess
import sys

import jax
import pytest

from jaxrobust.runs import cli
from tests.helpers.programs import ROOT, TINY

# Trains, and writes a line of JSON for each program that was compiled or came from the
# cache, and for each step but the last.
_LISTENING = """
import json, os, sys
import jax
from jaxrobust import train
from jaxrobust.runs import cli, stop_requests

found = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
note = lambda *words: os.write(found, (json.dumps(words) + '\\n').encode())
reached = stop_requests.StopRequests.reached
stop_requests.StopRequests.reached = lambda self: [note('step'), reached(self)][1]
jax.monitoring.register_event_listener(
  lambda event, **_: note('hit') if event.endswith('/cache_hits') else None
)
jax.monitoring.register_event_duration_secs_listener(
  lambda event, seconds, fun_name='', **_: (
    note('program', fun_name) if 'backend_compile' in event else None
  )
)
cli.run(train.PROGRAM, sys.argv[2:])
"""
# What pmap calls the functions that it maps.
_MAPPED = ['program', 'jit(_fun)']


@pytest.fixture(scope='module')
def twice(tmp_path_factory):
  """What two processes noted that trained the same with seeds of their own."""
  folder, notes = tmp_path_factory.mktemp('twice'), []
  environment = {
    **os.environ,
    'JAX_NUM_CPU_DEVICES': '1',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAXROBUST_CACHE': str(folder / 'cache'),
  }
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)
  for seed, name in enumerate(('first', 'second')):
    notes.append(folder / f'{name}.jsonl')
    subprocess.run(
      [
        *(sys.executable, '-c', _LISTENING, notes[-1], f'--workdir={folder / name}'),
        *(*TINY, '--config.training.num_steps=4', f'--config.seed={seed}'),
        '--config.evaluation.interval_epochs=0.5',
      ],
      cwd=ROOT,
      env=environment,
      check=True,
      timeout=300,
    )
  return [[json.loads(x) for x in path.read_text().splitlines()] for path in notes]


@pytest.mark.slow
def test_a_step_and_its_evaluation_are_compiled_before_the_first_step_once(twice):
  notes, _ = twice
  assert notes.count(['step']) == 3  # After the last none asks whether to stop.
  before = notes[: notes.index(['step'])]
  # The step, the pass over clean images and the attack.
  assert before.count(_MAPPED) == notes.count(_MAPPED) == 3


@pytest.mark.slow
def test_another_seed_compiles_nothing(twice):
  first, second = twice
  programs = [x for x in second if x[0] == 'program']
  assert ['hit'] not in first
  assert second.count(['hit']) == len(programs) and programs.count(_MAPPED) == 3


@pytest.fixture
def no_folder_given():
  """As where $JAX_COMPILATION_CACHE_DIR is not set; what it sets is taken back."""
  names = 'jax_compilation_cache_dir', 'jax_persistent_cache_enable_xla_caches'
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize(
  ('workdir', 'place'),
  [
    ('gs://b/runs/cifar10', 'gs://b/runs/compiled'),
    ('gs://b/runs/cifar10/', 'gs://b/runs/compiled'),
    ('gs://b/run', 'gs://b/compiled'),
    ('gs://b', 'gs://b/compiled'),
    ('runs/digits', 'HOME/compiled'),
    ('', 'HOME/compiled'),
  ],
)
def test_compiled_code_is_beside_a_workdir_in_a_bucket(
  workdir, place, tmp_path, monkeypatch, no_folder_given
):
  monkeypatch.setenv('JAXROBUST_CACHE', str(tmp_path))
  cli._keep_compiled(workdir)
  assert jax.config.jax_compilation_cache_dir == place.replace('HOME', str(tmp_path))
  # XLA's own cache of GPU kernels knows local folders alone.
  caches = jax.config.jax_persistent_cache_enable_xla_caches
  assert (caches == 'none') == ('://' in workdir)


def test_a_folder_that_was_given_stays(tmp_path, no_folder_given):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  cli._keep_compiled('gs://b/runs/cifar10')
  assert jax.config.jax_compilation_cache_dir == str(tmp_path)
