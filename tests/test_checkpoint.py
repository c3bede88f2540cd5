"""The authors' file format, refusal of what is not it, and the run's checkpoints."""

import os
import shutil

import numpy as np
import pytest
from etils import epath

from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.models import parameter_files
from jaxrobust.runs import checkpoints


@pytest.fixture
def trees():
  params = {'net/~/conv': {'w': np.arange(6, dtype=np.float32).reshape(2, 3)}}
  state = {'net/~/bn/~/mean_ema': {'counter': np.int32(3), 'average': np.ones(3)}}
  return params, state


def test_round_trip_is_exact_and_numpy_reads_it(tmp_path, trees):
  path = epath.Path(tmp_path) / 'checkpoint.npy'
  parameter_files.export_npy(path, *trees)
  for read in (parameter_files.import_npy(path), np.load(path, allow_pickle=True)):
    params, state = read
    np.testing.assert_array_equal(
      params['net/~/conv']['w'], trees[0]['net/~/conv']['w']
    )
    assert state['net/~/bn/~/mean_ema']['counter'] == 3


def test_reads_what_np_save_of_a_tuple_writes(tmp_path, trees):
  """The released files were written so."""
  path = tmp_path / 'released.npy'
  np.save(path, np.array(trees, dtype=object), allow_pickle=True)
  params, _ = parameter_files.import_npy(path)
  assert list(params) == ['net/~/conv']


class Bomb:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self._path = str(path)

  def __reduce__(self):
    return os.mkdir, (self._path,)


def test_a_malicious_file_runs_nothing(tmp_path, trees):
  path, proof = tmp_path / 'bad.npy', tmp_path / 'it-ran'
  pair = np.empty(2, dtype=object)
  pair[0], pair[1] = {'a': {'w': Bomb(proof)}}, trees[1]
  np.save(path, pair, allow_pickle=True)
  with pytest.raises(UserError, match='bad.npy.*mkdir, which is refused'):
    parameter_files.import_npy(path)
  assert not proof.exists()


def test_absent_truncated_and_foreign_files_are_named(tmp_path, trees):
  with pytest.raises(UserError, match='no checkpoint at .*none.npy'):
    parameter_files.import_npy(tmp_path / 'none.npy')
  whole = tmp_path / 'whole.npy'
  parameter_files.export_npy(epath.Path(whole), *trees)
  cut = tmp_path / 'cut.npy'
  cut.write_bytes(whole.read_bytes()[:-40])
  with pytest.raises(UserError, match='cut.npy is not a checkpoint'):
    parameter_files.import_npy(cut)
  numbers = tmp_path / 'numbers.npy'
  np.save(numbers, np.ones(3))
  with pytest.raises(UserError, match='numbers.npy is not a checkpoint'):
    parameter_files.import_npy(numbers)
  page = tmp_path / 'page.npy'
  page.write_text('<html>404</html>')
  with pytest.raises(UserError, match='page.npy is not a checkpoint'):
    parameter_files.import_npy(page)
  other = tmp_path / 'other.npy'
  np.save(other, np.array([{'a': 'text'}, {}], dtype=object), allow_pickle=True)
  with pytest.raises(UserError, match='something else than dictionaries of numbers'):
    parameter_files.import_npy(other)


def test_failed_export_leaves_the_old_file(tmp_path, trees, monkeypatch):
  path = epath.Path(tmp_path) / 'checkpoint.npy'
  parameter_files.export_npy(path, *trees)
  before = path.read_bytes()

  def full_disk(self, data):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(type(path), 'write_bytes', full_disk)
  with pytest.raises(OSError):
    parameter_files.export_npy(path, {}, {})
  monkeypatch.undo()
  assert path.read_bytes() == before


def test_keeps_the_last_ones_and_the_best(tmp_path):
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=2)
  for step, score in ((1, 0.2), (2, 0.9), (3, 0.4), (4, None), (5, 0.5), (6, None)):
    manager.save(step, {'x': np.full(3, step, np.float32)}, score)
  manager.wait()
  assert manager.best_step() == 2
  like = {'x': np.zeros(3, np.float32)}
  assert manager.restore(like, 2)['x'][0] == 2
  assert manager.restore(like)['x'][0] == 6
  kept = {p.name for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()}
  assert kept == {'2', '5', '6'}
  manager.close()


def test_nothing_to_restore(tmp_path):
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=1)
  assert manager.restore({'x': np.zeros(1)}) is None
  manager.close()


@pytest.mark.parametrize('content', [b'', b'{"sco', bytes(20)])
def test_a_damaged_score_sets_its_checkpoint_aside(tmp_path, content):
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  for step in (1, 2):
    manager.save(step, {'x': np.full(3, step, np.float32)}, step / 10)
  manager.close()
  score = lambda step: tmp_path / 'checkpoints' / step / 'metrics' / 'metrics'
  score('2').write_bytes(content)
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  assert manager.best_step() == 1
  like = {'x': np.zeros(3, np.float32)}
  assert manager.restore(like)['x'][0] == 1
  manager.save(2, {'x': np.full(3, 7, np.float32)}, 0.7)
  manager.close()
  assert score('damaged-2').read_bytes() == content
  for step in ('1', '2'):
    score(step).write_bytes(content)
  with pytest.raises(UserError, match='every checkpoint in .*1 has a damaged score'):
    checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  assert score('2').exists()


def test_an_error_that_passes_loses_no_checkpoint(tmp_path, monkeypatch):
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  like = {'x': np.zeros(3, np.float32)}
  manager.save(1, like)
  manager.wait()
  restore, errors = manager._manager.restore, [OSError('the network')]

  def fails_once(*args, **kwargs):
    if errors:
      raise errors.pop()
    return restore(*args, **kwargs)

  monkeypatch.setattr(manager._manager, 'restore', fails_once)
  assert manager.restore(like) is not None and not errors
  # Another process may be as unlucky: whoever can read it keeps it.
  answers = iter((False, True))
  monkeypatch.setattr(parallel, 'everywhere', lambda condition: next(answers))
  with pytest.raises(RuntimeError, match='only some processes can read .* step 1'):
    manager.restore(like)
  assert (tmp_path / 'checkpoints' / '1').exists()
  manager.close()


def test_falls_back_to_the_checkpoint_before_a_damaged_one(tmp_path):
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  for step in (1, 2):
    manager.save(step, {'x': np.full(3, step, np.float32)})
  manager.close()
  for file in (tmp_path / 'checkpoints' / '2' / 'state').rglob('*'):
    if file.is_file():
      file.write_bytes(b'')
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  like = {'x': np.zeros(3, np.float32)}
  assert manager.restore(like)['x'][0] == 1
  assert (tmp_path / 'checkpoints' / 'damaged-2' / 'state').exists()
  # The step can be saved again, whole.
  manager.save(2, {'x': np.full(3, 7, np.float32)})
  manager.wait()
  assert manager.restore(like)['x'][0] == 7
  manager.close()


def test_a_flipped_bit_is_noticed(tmp_path):
  """In random numbers, which are stored as they are: no compression fails at it."""
  like = {'x': np.zeros(500, np.uint32), 'count': np.int32(0)}
  states = [
    {
      'x': np.frombuffer(np.random.RandomState(step).bytes(2000), np.uint32),
      'count': np.int32(step),
    }
    for step in (1, 2)
  ]
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  for step, state in enumerate(states, 1):
    manager.save(step, state)
  manager.close()
  number = states[1]['x'][100:101].tobytes()
  files = (tmp_path / 'checkpoints' / '2' / 'state').rglob('*')
  [file] = [x for x in files if x.is_file() and number in x.read_bytes()]
  content = bytearray(file.read_bytes())
  content[content.index(number)] ^= 1
  file.write_bytes(content)
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  np.testing.assert_array_equal(manager.restore(like)['x'], states[0]['x'])
  manager.close()


def test_a_checkpoint_without_a_digest_is_read(tmp_path):
  """As runs that began before there were any have them."""
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  manager.save(1, {'x': np.ones(3, np.float32)})
  manager.close()
  shutil.rmtree(tmp_path / 'checkpoints' / '1' / 'digest')
  manager = checkpoints.Checkpoints(epath.Path(tmp_path), keep=3)
  assert manager.restore({'x': np.zeros(3, np.float32)})['x'][0] == 1
  manager.close()
