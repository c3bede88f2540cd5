"""A workdir belongs to one config, and its files are whole or absent."""

import contextlib
import json
import subprocess
import sys

import pytest
from etils import epath

from experiments import digits
from jaxrobust.errors import UserError
from jaxrobust.runs import metrics, workdir


def test_claim_is_idempotent_and_refuses_another_config(tmp_path):
  config = digits.get_config()
  folder = workdir.claim(str(tmp_path / 'run'), config)
  assert json.loads((folder / 'config.json').read_text())['loss']['beta'] == 6.0
  assert workdir.claim(str(tmp_path / 'run'), config) == folder
  other = digits.get_config().unlock()
  other.loss.beta = 5.0
  other.seed = 1
  with pytest.raises(UserError) as e:
    workdir.claim(str(tmp_path / 'run'), other)
  assert 'loss.beta: 6.0 → 5.0; seed: 0 → 1' in str(e.value)
  for words in ('its value → yours', f'--checkpoint={folder}'):
    assert words in str(e.value)
  assert json.loads((folder / 'config.json').read_text())['loss']['beta'] == 6.0


def test_claim_under_a_file_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write to .*file/run'):
    workdir.claim(str(tmp_path / 'file' / 'run'), digits.get_config())


def test_results_are_added_and_found_by_protocol(tmp_path):
  folder = epath.Path(tmp_path)
  protocol = {'suite': 'pgd-40', 'sizes': (1, 2)}
  assert workdir.find_result(folder, protocol) is None
  workdir.add_result(folder, protocol, {'robust_accuracy': 0.5})
  workdir.add_result(folder, {'suite': 'clean'}, {'robust_accuracy': 0.9})
  assert len(workdir.read_results(folder)) == 2
  found = workdir.find_result(folder, protocol)
  assert found['robust_accuracy'] == 0.5
  assert found['versions']['jax']
  assert not list(tmp_path.glob('*.tmp'))


def test_metrics_forget_what_was_written_after_the_checkpoint(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = epath.Path('.')  # A relative path, as users give it.
  writer = metrics.Writer(folder, 0)
  for step in (1, 2, 3):
    writer.write(step, {'train/loss': step / 2, 'bad': float('nan')})
  writer.close()
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 4, "train/lo')  # Cut short by a kill.
  assert [x['step'] for x in metrics.read(folder)] == [1, 2, 3]
  writer = metrics.Writer(folder, 2)
  writer.write(3, {'train/loss': 9.0})
  writer.close()
  lines = metrics.read(folder)
  assert [(x['step'], x['train/loss']) for x in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]
  assert lines[0]['bad'] is None
  assert list(tmp_path.glob('events.*'))


def test_progress_leaves_compilation_out_of_the_speed(monkeypatch):
  clock = iter([0, 100, 110, 120])  # The first step takes 100 seconds, the others 10.
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: next(clock))
  lines = []
  monkeypatch.setattr(metrics, 'log_line', lines.append)
  progress = metrics.Progress('train', 10, 'steps', seconds=0)
  for _ in range(3):
    progress.advance(1, 'loss 1')
  assert lines == [
    'train: 1 of 10 steps, time left unknown, loss 1',
    'train: 2 of 10 steps, 0.1 a second, 1:20 left, loss 1',
    'train: 3 of 10 steps, 0.1 a second, 1:10 left, loss 1',
  ]


def test_what_took_its_time_long_ago_says_nothing_of_the_time_left(monkeypatch):
  """Here the second step, which compiles another program."""
  clock = iter([0, 1, 1_001, *range(1_002, 1_017)])
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: next(clock))
  lines = []
  monkeypatch.setattr(metrics, 'log_line', lines.append)
  progress = metrics.Progress('train', 100, 'steps', seconds=0)
  for _ in range(17):
    progress.advance()
  assert lines[-1] == 'train: 17 of 100 steps, 1 a second, 1:23 left'


def test_a_workdir_in_use_is_refused(tmp_path, monkeypatch):
  """By a program of this host that is there, which is not any with its number."""
  config = digits.get_config()
  workdir.begin(['train', '--workdir=x'])
  folder = workdir.claim(tmp_path, config)
  status = json.loads((folder / 'status.json').read_text())
  workdir.claim(tmp_path, config)  # Its own.
  script = 'import sys; print(1, flush=True); sys.stdin.read()'
  for words, refused in (
    (['jaxrobust.train', '--workdir=x'], True),
    (['jaxrobust.train', '--workdir=y'], False),
    (['jaxrobust.sweep', '--workdir=x'], False),
  ):
    other = subprocess.Popen(
      [sys.executable, '-c', script, *words],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    other.stdout.readline()
    (folder / 'status.json').write_text(json.dumps(status | {'pid': other.pid}))
    with contextlib.ExitStack() as stack:
      if refused:
        message = f'is in use by process {other.pid} \\(train\\): wait for it'
        stack.enter_context(pytest.raises(UserError, match=message))
      workdir.claim(tmp_path, config)
    other.communicate()
  workdir.write_status('done')


def test_durations():
  assert metrics.duration(59.6) == '1:00'
  assert metrics.duration(3_725) == '1:02:05'
