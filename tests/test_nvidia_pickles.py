"""NVIDIA's pickles: the arrays of a network are read, and nothing is run."""

import tracemalloc

import numpy as np
import pytest

from jaxrobust.errors import UserError
from jaxrobust.files import nvidia_pickles
from tests.helpers import mutations
from tests.helpers import nvidia_files as files

RNG = np.random.default_rng(0)
NETWORK = {
  'model.map.weight': np.float32(RNG.normal(size=(3, 2))),
  'model.enc.8x8_conv.weight': np.float32(RNG.normal(size=(2, 3, 3, 3))),
  'model.enc.8x8_conv.bias': np.float32([np.inf, -0.0]),
  'model.enc.8x8_conv.resample_filter': np.float32(RNG.normal(size=(1, 1, 2, 2))),
  'w_avg': np.float32(RNG.normal(size=5)),
}


@pytest.fixture
def read(tmp_path):
  """Reads a file of this content."""
  path = tmp_path / 'network.pkl'

  def run(content, key='ema'):
    path.write_bytes(content)
    return nvidia_pickles.read(path, key)

  return run


def test_parameters_and_buffers_to_the_bit(read):
  content = files.dump({'G': {}, 'ema': NETWORK}, ('model.enc',))
  found = read(content)
  assert found.keys() == NETWORK.keys()
  for name, array in NETWORK.items():
    assert found[name].dtype == np.float32 and found[name].shape == array.shape
    assert found[name].tobytes() == array.tobytes()
  assert read(content, 'G') == {}
  with pytest.raises(UserError, match='no network D, but G, ema, loss_fn'):
    read(content, 'D')


def test_older_pickles_and_turned_tensors(read):
  """Sets of protocol 3, and a tensor whose numbers stand in another order."""
  numbers = np.arange(6, dtype=np.float32)
  turned = files.tensor(numbers.reshape(2, 3).T, files.storage(numbers))
  none = files.named('builtins', 'set') + b']\x85R'
  easy = files.named('dnnlib.util', 'EasyDict') + b')\x81' + b'(Va\nI1\nu'
  state = {'_buffers': files.dictionary({'x': turned}), 'set': none, 'easy': easy}
  network = files.persistent(files.dictionary(state))
  found = read(b'\x80\3' + files.dictionary({'ema': network}) + b'.')
  np.testing.assert_array_equal(found['x'], numbers.reshape(2, 3).T)


def whole(content: bytes) -> bytes:
  return b'\x80\4' + content + b'.'


def with_state(**made):
  """A file whose network has this state, written already."""
  return whole(files.dictionary({'ema': files.persistent(files.dictionary(made))}))


def with_buffers(**made):
  return with_state(_buffers=files.dictionary(made))


ARRAY = np.arange(4, dtype=np.float32)
RUN = files.named('os', 'system') + files.value('true') + b'\x85R'
NO_STORAGE = files.named('torch.storage', '_load_from_bytes') + files.value(
  b'\x80\2' + files.value({'a': 1}) + b'.'
)
LONG = files.value(2**30) + b'N'  # a storage's length, and that it is no view
EASY = files.named('dnnlib.util', 'EasyDict')
LOAD = files.named('torch.storage', '_load_from_bytes')
HOSTILE = {
  'a command': (with_buffers(x=RUN), 'wants to run os.system'),
  'a command as a module': (
    whole(files.dictionary({'ema': RUN})),
    'wants to run os.system',
  ),
  'a command in a storage': (
    with_buffers(x=LOAD + files.value(RUN) + b'\x85R'),
    'wants to run os.system',
  ),
  'a command in the state': (with_state(training=RUN), 'wants to run os.system'),
  'another class': (
    whole(files.named('collections', 'OrderedDict') + b')\x81'),
    'an object of a class',
  ),
  'a class with arguments': (whole(EASY + b'N\x85\x81'), 'an object of a class'),
  'a module without a state': (
    whole(files.dictionary({'ema': files.persistent(b'N')})),
    'a module without a state',
  ),
  'a module in itself': (
    whole(files.dictionary({'ema': b'}q\1' + files.items({'_modules': b'h\1'})})),
    'levels deep',
  ),
  'parts that are none': (
    with_state(_buffers=b'K\1'),
    '_buffers of a module is no dictionary',
  ),
  'a buffer that is text': (with_buffers(x=files.value('text')), 'x is no part of a'),
  'a tensor of a larger shape': (
    with_buffers(x=files.tensor(np.zeros((9, 9), np.float32), files.storage(ARRAY))),
    'reaches beyond its numbers',
  ),
  'a tensor without a storage': (
    with_buffers(x=files.tensor(ARRAY, files.value(b'text'))),
    'a tensor without a storage',
  ),
  'a storage that is none': (
    with_buffers(x=files.tensor(ARRAY, LOAD + files.value(b'\x80\2N.') + b'\x85R')),
    'begin as one',
  ),
  'a storage that is left over': (with_buffers(x=files.storage(ARRAY)), 'else than'),
  'a storage of 2^30 numbers': (
    with_buffers(
      x=files.tensor(ARRAY, files.storage(ARRAY).replace(files.value(4) + b'N', LONG))
    ),
    'another length',
  ),
  'attributes of one dictionary for many': (
    whole(
      files.dictionary(
        {
          'state': files.dictionary({str(i): b'N' for i in range(2000)}) + b'\x94',
          'ema': EASY + b'\x94(' + b'h\1)\x81h\0b' * 6000 + b't',
        }
      )
    ),
    'instructions',
  ),
}


@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_files_are_refused_in_a_line(read, kind, tmp_path):
  content, words = HOSTILE[kind]
  with pytest.raises(UserError, match=words) as e:
    read(content)
  line = str(e.value)
  assert 'network.pkl' in line and '\n' not in line and line.isprintable()


def test_memory_is_bounded_by_the_size(read):
  """A storage of 1 MiB that is opened, and made a tensor, again and again."""
  opened = files.storage(np.zeros(2**18, np.float32))
  start = LOAD + b'q\1' + opened[len(LOAD) : -len(b'\x85R')] + b'q\2'
  tensor = files.named('torch._utils', '_rebuild_tensor_v2') + b'q\3'
  shape = files.value(0) + files.value((2**18,)) + files.value((1,)) + b'\x89}tR'
  many = b'h\3(h\1h\2\x85R' + shape
  content = whole(start + tensor + b'](' + many * 500 + b'e')
  tracemalloc.start()
  try:
    with pytest.raises(UserError, match='more arrays than it has bytes for'):
      read(content)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 8 * len(content)


def test_damaged_copies_are_read_or_refused_in_a_line(read):
  content, taken = files.dump({'ema': NETWORK}, ('model.enc',)), 0
  for damaged in mutations.mutations(content, 500, seed=3):
    try:
      found = read(damaged)
    except UserError as e:
      line = str(e)
      assert 'network.pkl' in line and '\n' not in line and len(line) < 500
    else:
      taken += 1
      assert all(isinstance(x, np.ndarray) for x in found.values())
      assert sum(x.nbytes for x in found.values()) <= 2 * len(damaged)
  assert 10 < taken < 300
