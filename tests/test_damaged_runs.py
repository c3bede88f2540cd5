"""Damaged files of a run: one line that names the file, and nothing is lost."""

import json
import logging
import os
import platform
import shutil

import numpy as np
import pytest
from etils import epath

from experiments import digits
from jaxrobust import config as configs
from jaxrobust.errors import UserError
from jaxrobust.reporting import runs_table
from jaxrobust.runs import checkpoints, metrics, workdir
from tests.helpers.mutations import json_mutations, mutations

PROTOCOL = {
  'suite': 'pgd-40',
  'norm': 'linf',
  'epsilon': 0.2,
  'num_images': 797,
  'split': 'test',
  'seed': 0,
  'attacks': [{'name': 'pgd-40'}],
  'checkpoint_sha256': 'a',
}
FIGURES = {'clean_accuracy': 0.9, 'robust_accuracy': 0.5, 'warnings': ['few images']}


def damages(value, seed):
  """Bytes of a file that held `value`."""
  yield from json_mutations(value, 150, seed)
  yield from mutations(json.dumps(value, indent=2).encode(), 150, seed)


def in_one_line(action, path):
  """Does it; what it raises is one line that names the file."""
  try:
    return action()
  except UserError as e:
    line = str(e)
    assert line.startswith(str(path)), line
    assert '\n' not in line and len(line) < 500, line


@pytest.fixture
def run(tmp_path):
  return workdir.claim(tmp_path / 'run', digits.get_config())


@pytest.mark.parametrize(
  'content', [b'[]', b'5', b'{"a.b": 1}', b'{"": {}}', b'\xff', b'{"seed": 1e999}']
)
def test_a_config_that_is_none_is_refused(run, content):
  path = run / 'config.json'
  path.write_bytes(content)
  with pytest.raises(UserError, match=f'{path} .*restore it'):
    workdir.read_config(run)


def test_any_config(run):
  path = run / 'config.json'
  for content in damages(json.loads(path.read_text()), seed=1):
    path.write_bytes(content)
    config = in_one_line(lambda: workdir.read_config(run), path)
    if config is not None:
      configs.to_json(config)


def test_any_status(run):
  """Is none, or has what its readers ask of it; none ends a program."""
  path = run / 'status.json'
  status = {
    'state': 'running',
    'message': '',
    'command': ['train', '--workdir=x'],
    'host': platform.node(),
    'pid': os.getpid(),
  }
  for content in damages(status, seed=2):
    path.write_bytes(content)
    if found := workdir.read_status(run):
      texts = [found['state'], found['message'], found['host'], *found['command']]
      assert all(isinstance(x, str) for x in texts) and found['command']


@pytest.mark.parametrize('pid', [2**32, 10**30, -1, 0, True, 1.5, '1'])
def test_a_status_whose_process_cannot_be(run, pid):
  status = {'state': 'running', 'message': '', 'command': ['train']}
  status |= {'host': platform.node(), 'pid': pid}
  (run / 'status.json').write_text(json.dumps(status))
  assert workdir.read_status(run) == {}


def test_any_results(run):
  path = run / 'results.json'
  entry = workdir.add_result(run, PROTOCOL, FIGURES)
  for content in damages([entry, entry], seed=3):
    path.write_bytes(content)
    in_one_line(lambda: workdir.find_result(run, PROTOCOL), path)
    in_one_line(lambda: runs_table.markdown(runs_table.find(run.parent)), path)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(run):
  os.mkfifo(run / 'results.json')
  with pytest.raises(UserError, match='results.json is not a file'):
    workdir.read_results(run)


def test_any_metrics(run):
  """A resume keeps all lines that are whole, and sets the others aside."""
  path, logged = run / 'metrics.jsonl', logging.getLogger('absl')
  lines = [{'step': i, 'train/loss': 1 / i} for i in range(1, 26)]
  texts = [json.dumps(x).encode() for x in lines]
  files = [
    b'\n'.join([*texts[:2], content, *texts[3:], b''])
    for content in json_mutations(lines[2], 60, seed=4)
  ]
  files += mutations(b'\n'.join([*texts, b'']), 60, seed=5)
  logged.setLevel('ERROR')
  for number, content in enumerate(files):
    folder = run / str(number)
    folder.mkdir()
    path = folder / 'metrics.jsonl'
    path.write_bytes(content)
    whole = [line for line in content.split(b'\n')[:-1] if line in texts]
    found = metrics.read(folder)
    metrics.Writer(folder, 25).close()
    now = path.read_bytes().split(b'\n')
    assert set(whole) <= set(now)
    assert metrics.read(folder) == [x for x in found if x['step'] <= 25]
    kept = [x.read_bytes() for x in folder.glob('damaged-*')]
    damaged = len(content.split(b'\n')) - 1 - len(found)
    assert kept in ([], [content]) and (kept or damaged <= 0)


def test_one_bad_byte_costs_one_line(run):
  path = run / 'metrics.jsonl'
  texts = [f'{{"step": {i}}}\n'.encode() for i in range(1, 26)]
  content = b''.join([*texts[:2], b'{"step": \xff}\n', *texts[3:]])
  path.write_bytes(content)
  metrics.Writer(run, 20).close()
  steps = [x['step'] for x in metrics.read(run)]
  assert steps == [i for i in range(1, 21) if i != 3]
  [aside] = run.glob('damaged-*')
  assert aside.read_bytes() == content


LIKE = {'x': np.zeros(100, np.float32), 'n': np.int32(0)}
STATES = {
  step: {
    'x': np.random.RandomState(step).normal(size=100).astype(np.float32),
    'n': np.int32(step),
  }
  for step in (1, 2, 3)
}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir with three checkpoints."""
  folder = tmp_path_factory.mktemp('saved')
  manager = checkpoints.Checkpoints(epath.Path(folder), keep=3)
  for step, state in STATES.items():
    manager.save(step, state, step / 10)
  manager.close()
  return folder


def damage(folder, rng):
  """Changes one file or folder of checkpoints."""
  places = sorted(folder.rglob('*'))
  files = [x for x in places if x.is_file()]
  kind, file = rng.integers(5), files[rng.integers(len(files))]
  if kind == 0:
    [content] = mutations(file.read_bytes(), 1, int(rng.integers(1000)))
    file.write_bytes(content)
  elif kind == 1:
    texts = [x for x in files if x.read_bytes()[:1] == b'{']
    file = texts[rng.integers(len(texts))]
    value = json.loads(file.read_text())
    file.write_bytes(next(json_mutations(value, 1, int(rng.integers(1000)))))
  elif kind == 2:
    file.unlink()
  elif kind == 3:
    place = places[1 + rng.integers(len(places) - 1)]
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.write_bytes(b'junk') if rng.random() < 0.5 else place.mkdir()
  else:
    name = ('4', '007', '²', '٣', '9' * 20, 'notes')[rng.integers(6)]
    (folder / 'checkpoints' / name).write_bytes(b'junk')


def test_any_checkpoints(saved, tmp_path):
  """What is restored is what was saved; else it is one line, and all is still there."""
  rng = np.random.default_rng(6)
  for number in range(40):
    folder = tmp_path / str(number)
    shutil.copytree(saved, folder)
    damage(folder, rng)
    names = {x.name for x in (folder / 'checkpoints').iterdir()}
    try:
      manager = checkpoints.Checkpoints(epath.Path(folder), keep=3)
      state = manager.restore(LIKE)
      manager.close()
    except UserError as e:
      assert str(folder) in str(e) and '\n' not in str(e) and len(str(e)) < 500
      continue
    if (folder / 'checkpoints' / str(state['n']) / 'digest').exists():
      np.testing.assert_array_equal(state['x'], STATES[int(state['n'])]['x'])
    left = {x.name for x in (folder / 'checkpoints').iterdir()}
    assert {x.removeprefix('damaged-') for x in left} >= names


@pytest.mark.parametrize('content', [b'[]', b'5', b'{}', b'{"sha256": []}', b'\xff'])
def test_a_digest_that_is_none_sets_its_checkpoint_aside(saved, tmp_path, content):
  shutil.copytree(saved, tmp_path / 'run')
  [digest] = (tmp_path / 'run' / 'checkpoints' / '3' / 'digest').glob('metadata')
  digest.write_bytes(content)
  manager = checkpoints.Checkpoints(epath.Path(tmp_path / 'run'), keep=3)
  assert manager.restore(LIKE)['n'] == 2
  manager.close()
  assert (tmp_path / 'run' / 'checkpoints' / 'damaged-3').exists()


def test_two_damaged_checkpoints_of_a_step_are_both_kept(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'run')
  home = tmp_path / 'run' / 'checkpoints'
  for content in (b'first', b'second'):
    shutil.rmtree(home / '3', ignore_errors=True)
    (home / '3').write_bytes(content)
    checkpoints.Checkpoints(epath.Path(tmp_path / 'run'), keep=3).close()
  kept = {x.name: x.read_bytes() for x in home.glob('damaged*')}
  assert kept == {'damaged-3': b'first', 'damaged2-3': b'second'}


def test_a_file_in_the_place_of_the_checkpoints(tmp_path):
  (tmp_path / 'checkpoints').write_text('')
  with pytest.raises(UserError, match='checkpoints is not a folder: move it away'):
    checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
