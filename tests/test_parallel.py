"""pmap on four virtual devices, its collectives, and its shard_map twin."""

import platform
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError


def test_shard_gather_round_trip():
  x = {'a': np.arange(24).reshape(8, 3), 'b': np.arange(8)}
  sharded = parallel.shard(x)
  assert sharded['a'].shape == (4, 2, 3)
  np.testing.assert_array_equal(parallel.gather(sharded)['a'], x['a'])
  np.testing.assert_array_equal(parallel.gather(sharded)['b'], x['b'])


def test_replicate_round_trip():
  x = {'a': np.arange(3.0), 'step': np.int32(5)}
  copies = parallel.replicate(x)
  assert copies['a'].shape == (4, 3)
  assert parallel.unreplicate(copies)['step'] == 5


def test_a_device_for_each_core_if_nothing_else_is_said():
  program = """
import os, jax
from jaxrobust.distributed import parallel
os.sched_getaffinity = lambda _: range(3)
def devices(images, parameters, said=-1):
  jax.config.update('jax_num_cpu_devices', said)
  parallel.use_cores(images, parameters)
  return jax.config.jax_num_cpu_devices
print(devices(100, 8), devices(16, 8), devices(15, 8))
print(devices(100, 2**26), devices(100, 2**27), devices(100, 8, said=1))
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
print(devices(100, 8), jax.device_count())
del os.environ['XLA_FLAGS']
parallel.use_cores(100, 8)  # jax has its devices: they stay.
print(jax.device_count())
"""
  command = [sys.executable, '-c', program]
  found = subprocess.run(command, check=True, capture_output=True, text=True)
  assert found.stdout.splitlines() == ['3 2 -1', '2 -1 1', '-1 2', '2']


def test_a_step_compiles_once():
  """What goes in is placed as what comes out, so the second call is not another."""
  traces = []

  @parallel.pmap
  def step(state, batch):
    traces.append(None)
    return jax.tree.map(lambda x: x + batch.sum().astype(x.dtype), state)

  state = parallel.replicate({'a': np.ones(3, np.float32), 'n': np.int32(0)})
  for _ in range(3):
    state = step(state, parallel.shard(np.ones((8, 2), np.float32)))
  assert len(traces) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of its allocator')
def test_large_memory_is_kept_on_cpu():
  parallel.pmap(lambda x: x)
  count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  use = lambda: len(b'x' * (40 * 2**20))
  for _ in range(2):
    use()
  before = count()
  for _ in range(3):
    use()
  # Three times 40 MiB from the system would be 30,720 pages of 4 KiB.
  assert count() - before < 3_000


@pytest.mark.parametrize(
  'given, expected',
  [
    ('', '--xla_tpu_scoped_vmem_limit_kib=45056'),
    ('--xla_a=1', '--xla_a=1 --xla_tpu_scoped_vmem_limit_kib=45056'),
    (2 * ('--xla_tpu_scoped_vmem_limit_kib=16384',)),
  ],
)
def test_the_tpu_compiler_keeps_what_the_user_asks(given, expected):
  assert parallel._with_scoped_memory(given) == expected
  assert parallel._with_scoped_memory(expected) == expected


def test_a_draw_of_random_numbers_is_one_call_on_gpu():
  draw = jax.jit(lambda key: jax.random.normal(key, (8,)))
  program = draw.trace(jax.random.key(0)).lower(lowering_platforms=('cuda',)).as_text()
  assert program.count('custom_call @cu_threefry2x32') == 1
  assert 'shift_left' not in program  # Of the rotations in it.


def test_mean_over_devices_leaves_integers_alone():
  out = parallel.pmap(parallel.mean_over_devices)(
    {'x': jnp.arange(4.0), 'n': jnp.full(4, 7)}
  )
  np.testing.assert_array_equal(out['x'], [1.5] * 4)
  np.testing.assert_array_equal(out['n'], [7] * 4)
  assert out['n'].dtype == jnp.int32


def test_mean_in_group_of_consecutive_devices():
  out = parallel.pmap(lambda x: parallel.mean_in_group(x, 2))(jnp.arange(4.0))
  np.testing.assert_array_equal(out, [0.5, 0.5, 2.5, 2.5])
  with pytest.raises(UserError, match='spans 3 devices'):
    parallel.pmap(lambda x: parallel.mean_in_group(x, 3))(jnp.arange(4.0))


def test_all_gather_keeps_the_order_of_devices():
  out = parallel.pmap(parallel.all_gather)(jnp.arange(8.0).reshape(4, 2))
  np.testing.assert_array_equal(out, np.tile(np.arange(8.0), (4, 1)))


def test_process_slots():
  assert parallel.process_slots(16) == (0, 16)
  with pytest.raises(UserError, match='batch of 18 does not divide over 4 devices'):
    parallel.process_slots(18)


def test_unequal_processes_are_refused(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(jax, 'local_device_count', lambda: 1)
  with pytest.raises(UserError, match='4 devices in 2 processes, and 1 in this one'):
    parallel.require_equal_processes()


def test_a_device_without_memory_is_told_in_one_line():
  full = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory\nallocating 9')
  line = str(parallel.memory_error(full))
  assert 'Out of memory allocating 9' in line and '--suggest' in line
  assert 'a smaller config.data.batch_size' in line
  assert parallel.memory_error(jax.errors.JaxRuntimeError('INTERNAL: x')) is None
  assert parallel.memory_error(ValueError('RESOURCE_EXHAUSTED: memory')) is None


def test_keys_depend_on_the_slot_only():
  rng = jax.random.key(3)
  keys = lambda slots: jax.random.key_data(parallel.key_per_slot(rng, slots))
  np.testing.assert_array_equal(keys(np.arange(8))[5:], keys(np.arange(5, 8)))
  assert len(np.unique(keys(np.arange(64)), axis=0)) == 64


def test_shard_map_twin_gives_the_same_gradient():
  """The other way to write a step, with variance checks off, equals pmap."""
  w = np.float32([1.0, -2.0, 0.5])
  x = np.random.RandomState(0).normal(size=(8, 3)).astype(np.float32)

  def gradient(w, x):
    loss = lambda w: jnp.mean(jnp.tanh(x @ w) ** 2)
    return parallel.mean_over_devices(jax.grad(loss)(w))

  mapped = parallel.pmap(gradient)(parallel.replicate(w), parallel.shard(x))
  mesh = Mesh(np.array(jax.devices()), (parallel.AXIS,))
  twin = jax.jit(
    jax.shard_map(
      gradient,
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec(parallel.AXIS)),
      out_specs=PartitionSpec(),
      check_vma=False,
    )
  )(w, x)
  np.testing.assert_array_equal(parallel.unreplicate(mapped), twin)
  # The mean over devices of equal shards is the gradient over the whole batch.
  whole = jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
  np.testing.assert_allclose(twin, whole, rtol=1e-5)
