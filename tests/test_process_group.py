"""Processes that must start alike, of which one may do all the work."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxrobust.errors import UserError
from jaxrobust.runs import process_group
from jaxrobust.samples import sample_sets
from tests.helpers.programs import ROOT, TINY, ends, free_port


def only_line(codes, texts):
  """What all processes say of the error that ends them, once."""
  assert codes == [1] * len(codes), texts
  lines = [re.findall('^error: (?:process \\d: )?(.*)', x, re.M) for x in texts]
  assert [len(x) for x in lines] == [1] * len(lines), texts
  # Whoever hears of another's end first says whose line it is.
  [line] = {x for [x] in lines}
  return line


def test_what_differs_is_reported_once_for_all():
  facts = {'config': {'a': 1, 'b': [2]}, 'jax': '1'}
  assert process_group.compare(facts, {1: facts, 2: facts}) == ''
  other = {**facts, 'jax': '2'}
  line = process_group.compare(facts, {1: other, 2: facts, 3: other})
  assert line.endswith('others: process 1, 3 has jax: 1 → 2')
  many = {'config': {str(i): i for i in range(9)}, 'jax': '1'}
  assert process_group.compare(facts, {1: many}).count('→') == 6
  assert process_group.compare(facts, {1: many}).endswith('; 6 more')


@pytest.mark.slow
def test_processes_that_differ_write_nothing(pod, tmp_path):
  """Another config, another version of the code and of a library."""
  other = tmp_path / 'other'
  for folder in ('jaxrobust', 'experiments'):
    shutil.copytree(ROOT / folder, other / folder)
  with (other / 'jaxrobust' / 'errors.py').open('a') as f:
    f.write('# Another version.\n')
  (other / 'optax-9.9.dist-info').mkdir()
  (other / 'optax-9.9.dist-info' / 'METADATA').write_text('Name: optax\nVersion: 9.9')
  line = only_line(
    *ends(
      pod(
        *(3, 'train', f'--workdir={tmp_path}/run', *TINY),
        different={1: ['--config.seed=1']},
        roots={2: other},
      )
    )
  )
  assert 'process 1 has config.seed: 0 → 1; ' in line
  assert re.search(r'process 2 has code: \w+ → \w+; optax: [\d.]+ → 9.9: run', line)
  assert not (tmp_path / 'run').exists()


def make_set(folder, seed):
  """A sample set on the disk of a host."""
  images = np.random.RandomState(seed).randint(0, 256, (40, 8, 8, 1), np.uint8)
  labels = np.arange(40, dtype=np.int32) % 10
  sample_sets.write(folder / 'set', [(images, labels)], metadata={}, num_classes=10)
  return folder / 'set'


@pytest.mark.slow
@pytest.mark.parametrize('fault', ['corrupt', 'another'])
def test_a_host_with_other_files_ends_all_before_they_write(pod, tmp_path, fault):
  """Each has its own disk, where the relative path of the sample set leads to."""
  roots = [tmp_path / 'a', tmp_path / 'b']
  for root in roots:
    root.mkdir()
    for name in ('jaxrobust', 'experiments'):
      (root / name).symlink_to(ROOT / name)
  make_set(roots[0], seed=0)
  theirs = make_set(roots[1], seed=int(fault == 'another'))
  [shard] = theirs.glob('images-*')
  if fault == 'corrupt':
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
  line = only_line(
    *ends(
      pod(
        *(2, 'train', f'--workdir={tmp_path}/run', *TINY),
        '--config.data.samples=./set',
        '--config.data.real_fraction=0.5',
        roots=dict(enumerate(roots)),
      )
    )
  )
  if fault == 'corrupt':
    assert line.startswith('corrupt') and f'set/{shard.name}' in line
  else:
    assert re.search(
      r'process 1 has generated images: \w+ → \w+: give every host the same files', line
    )
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'flags, words',
  [
    ({'coordinator': 'a'}, '--coordinator=a: write HOST:PORT'),
    ({'coordinator': 'a:1'}, '--coordinator=a:1 needs --num_processes=N and'),
    ({'coordinator': 'a:1', 'num_processes': 2}, 'needs --num_processes=N and'),
    (
      {'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2},
      'process_id = 2 of num_processes = 2: number the processes 0',
    ),
    ({'num_processes': 2}, 'without --coordinator: add --coordinator=HOST:PORT'),
    ({'process_id': 1}, 'without --coordinator: add --coordinator=HOST:PORT'),
  ],
)
def test_flags_of_processes_go_together(flags, words):
  with pytest.raises(UserError, match=words):
    process_group.join(**flags)


@pytest.mark.slow
def test_a_workdir_that_may_not_be_written_ends_all(pod):
  line = only_line(*ends(pod(2, 'train', '--workdir=/proc/run', *TINY)))
  assert line.startswith('cannot write to /proc/run: ')


@pytest.mark.slow
def test_one_works_and_the_others_wait_for_it(pod, tmp_path):
  processes = pod(
    2, 'report', f'--workdir={tmp_path}', '--table=digits-linf', '--status'
  )
  told = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], told
  assert 'missing' in told[0][0] and not told[1][0]
  line = only_line(*ends(pod(2, 'report', f'--workdir={tmp_path}/nowhere')))
  assert 'nowhere: no such folder' in line


ON_TPU = """
import jax
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster

cloud_tpu_init.running_in_cloud_tpu_vm = True
cloud_tpu_cluster.running_in_cloud_tpu_vm = True
jax.config.update('jax_platforms', 'tpu,cpu')
from jaxrobust.runs import process_group

process_group.join()
print(*(process_group.membership() or ['alone'])[:2])
"""


# For which jax would ask the metadata server.
ONE_SLICE = {
  'MEGASCALE_COORDINATOR_ADDRESS': 'localhost',
  'MEGASCALE_NUM_SLICES': '1',
  'MEGASCALE_SLICE_ID': '0',
}


@pytest.mark.slow
@pytest.mark.parametrize(
  'hosts, variables, found',
  [
    ('localhost,localhost', ONE_SLICE, ['0 2', '1 2']),
    ('localhost', {}, ['alone']),
    # It may be one of many, and the server may answer the next time.
    ('a,b', {'GCE_METADATA_IP': '127.0.0.1:1'}, ['']),
  ],
)
def test_hosts_of_a_tpu_find_each_other_without_flags(hosts, variables, found):
  """By jax's own search, of which GKE's variables are the part that works anywhere."""
  port = str(free_port())
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', ON_TPU],
      cwd=ROOT,
      env={
        **os.environ,
        **variables,
        'TPU_WORKER_HOSTNAMES': hosts,
        'TPU_WORKER_ID': str(i),
        'JAX_COORDINATOR_PORT': port,
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(len(found))
  ]
  told = [p.communicate(timeout=120) for p in processes]
  assert [out.strip() for out, _ in told] == found, told
  if found == ['']:
    assert told[0][1].endswith('set TPU_WORKER_HOSTNAMES=localhost\n')
