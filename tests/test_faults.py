"""Runs of several processes, and what breaks them: signals, disks, other hosts."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from jaxrobust.attacks.record import Record
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.runs import checkpoints, process_group, workdir
from tests.helpers.programs import (
  FAST,
  ROOT,
  TINY,
  assert_same_file,
  ends,
  free_port,
  wait_for_step,
)

# Updates that compile fast, each with a checkpoint; more than four faults can take.
SHORT = [
  *TINY,
  '--config.training.num_steps=24',
  '--config.loss.name=standard',
  '--config.checkpoint.interval_epochs=0.25',
]


def lines(workdir):
  """The lines of `metrics.jsonl` without the speed."""
  text = (workdir / 'metrics.jsonl').read_text()
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith('time/')}
    for line in text.splitlines()
  ]


@pytest.fixture
def disk(tmp_path):
  """A small disk, and a function that leaves a process no room there until it ends.

  Where none may be mounted it is a limit on the size of the process's files.
  """
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', str(folder)]
  mounted = subprocess.run(mount, capture_output=True).returncode == 0

  def fill(process):
    if not mounted:
      limits = 50_000, resource.RLIM_INFINITY
      resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
      return
    ballast = folder / 'ballast'
    with ballast.open('ab', buffering=0) as f:
      while process.poll() is None:  # It makes room by removing old checkpoints.
        with contextlib.suppress(OSError):
          f.write(bytes(4096))
    ballast.unlink()

  yield folder, fill
  if mounted:
    subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.slow
def test_one_run_on_three_layouts_through_every_fault(pod, disk, tmp_path):
  """Four devices in 4, 2 and 1 processes: the same numbers, whatever happens between.

  The whole run is of four processes, the broken one of two, until one ends it.

  All use the collectives of several processes, which add up in an order of their own;
  on an accelerator there are no others.
  """
  folder, fill = disk
  whole, broken = tmp_path / 'whole', folder / 'broken'
  command = [f'--workdir={broken}', *SHORT]
  codes, texts = ends(pod(4, 'train', f'--workdir={whole}', *SHORT, **FAST))
  assert codes == [0] * 4, texts

  # SIGTERM to one that does not write: all save at the same step.
  # (While they compile: later they might be done before they have agreed on a step.)
  processes = pod(2, 'train', *command, devices=2, **FAST)
  wait_for_step(processes[0], broken, 0)
  processes[1].send_signal(signal.SIGTERM)
  codes, texts = ends(processes)
  assert codes == [42] * 2, texts
  [step] = {re.search(r'stopped after step (\d+)', text)[1] for text in texts}

  # The disk of the writer is full: the others hear of it, the checkpoints stay.
  processes = pod(2, 'train', *command, devices=2, **FAST)
  wait_for_step(processes[0], broken, int(step) + 1)
  fill(processes[0])
  codes, texts = ends(processes)
  assert codes == [1, 1], texts
  assert not any('Traceback' in text for text in texts), texts
  told = [re.findall('^error: .*', text, re.M) for text in texts]
  assert [len(x) for x in told] == [1, 1], texts
  assert re.match(
    rf'error: cannot write {broken}.*: (No space left on device|File too large); '
    'what was saved before is whole',
    told[0][0],
  )
  assert told[1][0] == told[0][0].replace('error: ', 'error: process 0: ')
  assert all(f'resuming after step {step}' in text for text in texts)

  # Ctrl-C, to the one that does not write: all end, and say so.
  before = len(lines(broken))
  processes = pod(2, 'train', *command, devices=2, **FAST)
  wait_for_step(processes[0], broken, before + 1)
  processes[1].send_signal(signal.SIGINT)
  codes, texts = ends(processes)
  assert codes == [130, 130], texts
  assert not any('Traceback' in text for text in texts), texts
  status = workdir.read_status(epath.Path(broken))
  assert status['state'] == 'preempted', status

  # The last checkpoint was half-written: the run goes on from the one before.
  names = [x.name for x in (broken / 'checkpoints').iterdir()]
  saved = sorted(int(name) for name in names if name.isdigit())
  last = broken / 'checkpoints' / str(saved[-1]) / 'state'
  for file in [x for x in last.rglob('*') if x.is_file()]:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

  # KILL, to the one that does not write and to the one that does.
  for victim in (1, 0):
    before = len(lines(broken))
    processes = pod(2, 'train', *command, devices=2, **FAST)
    wait_for_step(processes[0], broken, before + 1)
    processes[victim].kill()
    codes, texts = ends(processes)
    assert codes[victim] == -signal.SIGKILL
    # A negative code is a signal, which a shell calls 128 and more.
    assert codes[1 - victim] < 0 or codes[1 - victim] >= 128, texts
    if victim == 1:
      assert f'the checkpoint of step {saved[-1]} cannot be read' in texts[0]
      assert all(f'resuming after step {saved[-2]}\n' in text for text in texts)

  codes, texts = ends(pod(1, 'train', *command, devices=4, **FAST))
  assert codes == [0], texts
  assert 'resuming after step' in texts[0]
  assert_same_file(whole / 'checkpoint.npy', broken / 'checkpoint.npy')
  assert lines(whole) == lines(broken)


LOCKSTEP = """
import sys
from jaxrobust.distributed import parallel
from jaxrobust.runs import process_group

process_group.join(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
while parallel.everywhere(True):
  print('together', flush=True)
"""


@pytest.mark.slow
def test_a_host_that_freezes_ends_the_others():
  """Its connections stay open: only the heartbeat tells."""
  port = free_port()
  frozen, other = (
    subprocess.Popen(
      [sys.executable, '-c', LOCKSTEP, str(port), str(i)],
      cwd=ROOT,
      env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1', 'JAXROBUST_HEARTBEAT': '3'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in (1, 0)
  )
  try:
    assert 'together\n' in frozen.stdout  # Reads until it is.
    frozen.send_signal(signal.SIGSTOP)
    _, err = other.communicate(timeout=120)
    assert other.returncode == -signal.SIGABRT, err
  finally:
    for process in (frozen, other):
      process.kill()
      process.communicate()


TOLD_EARLY = """
import os, signal, sys
from jaxrobust.distributed import parallel
from jaxrobust.runs import process_group

process_group.join(f'localhost:{sys.argv[1]}', 2, int(sys.argv[2]))
if sys.argv[2] == '1':
  os.kill(os.getpid(), signal.SIGTERM)
for _ in range(50):  # Starts up.
  parallel.everywhere(True)
preemption, asked = parallel.Preemption(), 1
while not preemption.reached():
  parallel.everywhere(True)
  asked += 1
print(asked)
"""


@pytest.mark.slow
def test_a_signal_before_the_first_step_is_not_lost():
  port = free_port()
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', TOLD_EARLY, str(port), str(i)],
      cwd=ROOT,
      env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    told = [process.communicate(timeout=120) for process in processes]
    [last] = {out.splitlines()[-1] for out, _ in told}
    assert int(last) > 0, told
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def test_a_signal_after_the_last_question_waits_for_the_next():
  first = parallel.Preemption()
  assert not first.reached()
  signal.raise_signal(signal.SIGTERM)
  first.close()
  second = parallel.Preemption()
  assert second.reached()
  second.close()
  third = parallel.Preemption()
  assert not third.reached()
  third.close()


def test_sigterm_may_come_twice_but_a_second_ctrl_c_means_now():
  preemption = parallel.Preemption()
  for _ in range(2):
    signal.raise_signal(signal.SIGTERM)
  assert preemption.reached()
  with pytest.raises(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)
  preemption.close()


def test_ctrl_c_is_not_lost_where_python_drops_exceptions(monkeypatch):
  """As in finalizers, and where JAX has Python call it at every garbage collection."""

  class Finalized:
    def __del__(self):
      signal.raise_signal(signal.SIGINT)

  dropped = []
  monkeypatch.setattr(sys, 'unraisablehook', lambda e: dropped.append(e.exc_type))
  monkeypatch.setattr(parallel.jax, 'process_count', lambda: 2)
  preemption = parallel.Preemption()
  try:
    Finalized()  # And gone at once.
    assert KeyboardInterrupt in dropped
    with pytest.raises(KeyboardInterrupt):
      preemption.reached()
  finally:
    preemption.close()
  # It does not stop what is called next by one that caught it.
  assert not parallel.Preemption._unanswered


def test_the_heartbeat_is_checked(monkeypatch):
  for text in ('0', 'soon'):
    monkeypatch.setenv('JAXROBUST_HEARTBEAT', text)
    with pytest.raises(UserError, match=f'JAXROBUST_HEARTBEAT={text}: use a whole'):
      process_group.join()


def test_a_full_disk_is_one_line(tmp_path):
  with pytest.raises(OSError) as e, open('/dev/full', 'w') as f:
    f.write('x')
  assert 'cannot write to a disk: No space left' in str(workdir.disk_error(e.value))
  assert 'cannot write runs/a: No space' in str(workdir.disk_error(e.value, 'runs/a'))
  # As tensorstore tells it where it has no name of a file.
  told = ValueError("Failed to write 9 bytes to file 27 [os_error_code='28']")
  assert 'cannot write runs/a: No space' in str(workdir.disk_error(told, 'runs/a'))
  assert workdir.disk_error(FileNotFoundError(2, 'No such file', 'x')) is None
  assert workdir.disk_error(ValueError('something else')) is None
  denied = type('PermissionDeniedError', (Exception,), {})
  assert workdir.disk_error(denied('of another kind')) is None
  denied.__module__ = 'tensorflow.python.framework.errors_impl'
  line = str(workdir.disk_error(denied('403\nno access')))
  assert line.startswith('cannot use a bucket: PermissionDeniedError: 403 no access;')
  # As orbax tells it.
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  like = {'x': np.arange(30_000, dtype=np.float32)}
  manager.save(1, like)
  manager.wait()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
  try:
    manager.save(2, {'x': np.random.RandomState(0).normal(size=30_000)})
    with pytest.raises(ValueError) as e:
      manager.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  line = str(workdir.disk_error(e.value))
  assert line.startswith(f'cannot write {tmp_path}/checkpoints/2')
  assert 'File too large' in line and '\n' not in line
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  np.testing.assert_array_equal(manager.restore(like)['x'], like['x'])
  manager.close()


def test_a_damaged_best_checkpoint_is_reported(tmp_path):
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  like = {'x': np.zeros(3, np.float32)}
  for step, score in ((1, 0.9), (2, 0.5), (3, 0.7)):
    manager.save(step, like, score)
  manager.wait()
  folder = tmp_path / 'checkpoints' / '1'
  for file in (folder / 'state').rglob('*'):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:50])
  with pytest.raises(UserError, match=f'step 1, which is the best.* remove {folder} '):
    manager.restore(like, manager.best_step())
  manager.close()
  shutil.rmtree(folder)  # What the line says to do.
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  assert manager.best_step() == 3
  assert manager.restore(like, 3) is not None
  manager.close()


def test_damaged_results_are_reported(tmp_path):
  (tmp_path / 'results.json').write_text('[{')
  with pytest.raises(UserError, match='results.json is not JSON .* remove it'):
    workdir.read_results(epath.Path(tmp_path))
  record = Record(4, epath.Path(tmp_path) / 'state', {})
  record.advance(np.arange(2), np.array([True, False]), keep=0, write=True)
  file = tmp_path / 'state' / 'state.npz'
  file.write_bytes(file.read_bytes()[:-100])
  damaged = 'state.npz is damaged.*remove .* to start'
  with pytest.raises(UserError, match=damaged):
    Record(4, epath.Path(tmp_path) / 'state', {})
  for content in (b'', bytes(500)):
    file.write_bytes(content)
    with pytest.raises(UserError, match=damaged):
      Record(4, epath.Path(tmp_path) / 'state', {})
