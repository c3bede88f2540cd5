"""Pickles: what arrays need is read, all else is refused, within bounds."""

import collections
import io
import pickle
import pickletools
import struct
import tracemalloc

import numpy as np
import pytest
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.files import pickles
from jaxrobust.models import parameter_files
from tests.helpers import mutations

HEADER = b"{'descr': '|O', 'fortran_order': False, 'shape': (2,), }\n"
START = b'\x93NUMPY\1\0' + struct.pack('<H', len(HEADER)) + HEADER


def load(raw: bytes):
  return pickles.ArrayUnpickler(io.BytesIO(raw)).load()


def name(module: str, attribute: str) -> bytes:
  return f'c{module}\n{attribute}\n'.encode()


def text(value: str) -> bytes:
  return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def data(value: bytes) -> bytes:
  return b'B' + struct.pack('<I', len(value)) + value


def dtype(code: str, state: bytes = b'') -> bytes:
  return name('numpy', 'dtype') + text(code) + b'\x89\x88\x87R' + state


def array(shape: bytes, kind: bytes, content: bytes) -> bytes:
  """The instructions that numpy writes for an array."""
  start = name('numpy._core.multiarray', '_reconstruct') + name('numpy', 'ndarray')
  return start + b'K\0\x85C\1b\x87R(K\1' + shape + kind + b'\x89' + content + b'tb'


STATE = b'(K\3X\1\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb'


@pytest.mark.parametrize('protocol', range(6))
def test_arrays_in_containers(protocol):
  content = {
    'single': np.arange(6, dtype=np.float32).reshape(2, 3),
    'turned': np.arange(6.0).reshape(2, 3).T,
    'big': np.arange(4, dtype='>i8'),
    'bool': np.array([True, False]),
    'empty': np.zeros((0, 3), np.uint8),
    'one': np.array(3),
    'scalar': np.float64(0.5),
    'ordered': collections.OrderedDict(a=1),
    'list': [1, -5, 2.5, 10**20, None, True, 'é', b'x', b'', (1, (2,))],
  }
  found = load(pickle.dumps(content, protocol))
  assert found.keys() == content.keys()
  for key, wanted in content.items():
    if isinstance(wanted, np.ndarray):
      assert found[key].dtype == wanted.dtype.newbyteorder('=')
      assert found[key].shape == wanted.shape
      np.testing.assert_array_equal(found[key], wanted)
    else:
      assert found[key] == wanted
  assert type(found['scalar']) is np.float64
  assert found['bool'].dtype == bool


def test_names_of_either_numpy_and_text_of_python_2():
  raw = array(b'K\2\x85', dtype('i2', STATE), b'U\4\1\0\xff\xff')  # Its text is bytes.
  for core in (b'numpy._core', b'numpy.core'):
    found = load(b'\x80\2' + raw.replace(b'numpy._core', core) + b'.')
    assert found.tolist() == [1, -1]


def test_optimised_pickles_and_objects_of_haiku():
  raw = pickletools.optimize(pickle.dumps([np.ones(3), np.ones(3)], 4))
  assert [x.tolist() for x in load(raw)] == [[1, 1, 1]] * 2
  raw = name('haiku._src.data_structures', 'FlatMapping') + b'}\x85R.'
  assert load(raw) == {}


# A type that says of itself that it holds no objects, to make one of an address.
FORGED = dtype('O8', STATE)
# A type with a field at an offset far from its bytes.
INVENTED = dtype('V8', STATE.replace(b'NNN', b'N' + text('a') + b'\x85}' + text('a')))
ADDRESS = data(b'A' * 8)


def nested(levels: int, code: bytes = b'\x86') -> bytes:
  """A pair of the pair of the pair …, each one object: 2^levels of them."""
  doubled = b''.join(b'q%ch%c' % (i, i) + code for i in range(levels))
  return b')' + doubled + b'.'


ATTACKS = {
  'a command': name('os', 'system') + text('true') + b'\x85R.',
  'a command, by other means': name('builtins', 'eval') + text('1') + b'\x85R.',
  'the class of an object': name('numpy', 'ndarray') + b')R.',
  'a forged type': name('numpy._core.multiarray', 'scalar')
  + FORGED
  + ADDRESS
  + b'\x86R.',
  'a forged type, of an array': array(b'K\1\x85', FORGED, ADDRESS) + b'.',
  'a forged type, of a buffer': (
    *(name('numpy._core.numeric', '_frombuffer') + b'(' + ADDRESS + FORGED,),
    b'K\1\x85' + text('C') + b'tR.',
  ),
  'an invented subarray': array(b'K\1\x85', INVENTED, ADDRESS) + b'.',
  'the state of a type again': array(
    b'K\1\x85', dtype('f8', STATE + STATE.replace(b'NNN', b'N)N')), ADDRESS
  )
  + b'.',
  'an object of bytes': (
    name('numpy._core.multiarray', 'scalar') + dtype('O8') + ADDRESS + b'\x86R.'
  ),
  'a shape beyond its bytes': array(b'K\2\x85', dtype('f8', STATE), ADDRESS) + b'.',
  'a shape of 2^80': array(
    b'\x8a\x0b' + b'\0' * 10 + b'\1\x85', dtype('f8', STATE), ADDRESS
  )
  + b'.',
  'a negative shape': array(b'J\xff\xff\xff\xff\x85', dtype('f8', STATE), ADDRESS)
  + b'.',
  'too many axes': array(b'(' + b'K\1' * 65 + b't', dtype('f8', STATE), ADDRESS) + b'.',
  'an array of objects that are none': array(b'K\2\x85', dtype('O8'), b']') + b'.',
  'a memo of 400 million': b'\x80\2Np400000000\n.',
  'a memo of 4 billion': b'\x80\2Nr\xff\xff\xff\xff.',
  'text of 4 GiB': b'X\xff\xff\xff\xff.',
  'bytes of 2^63': b'\x8e' + b'\xff' * 7 + b'\x7f.',
  'a number of 2^31 bytes': b'\x8b\xff\xff\xff\x7f.',
  'a number of a million digits': b'I' + b'9' * 10**6 + b'\n.',
  'pairs of pairs': nested(80),
  'punycode': name('_codecs', 'encode')
  + text('x' * 10**5)
  + text('punycode')
  + b'\x86R.',
  'a list of a large array': (
    *(
      name('builtins', 'list')
      + array(b'J\0\0\x08\0\x85', dtype('b1'), data(bytes(2**19))),
    ),
    b'\x85R.',
  ),
  'text that is encoded again and again': (
    *(b'](' + name('_codecs', 'encode') + b'q\0' + text('x' * 10**6) + b'q\1',),
    text('latin1') + b'q\2\x86R' + b'h\0h\1h\2\x86R' * 10**4 + b'e.',
  ),
  'an array that is made again and again': (
    *(b'](' + name('numpy._core.numeric', '_frombuffer') + b'q\0(',),
    *(data(bytes(10**6)) + dtype('>u1') + b'J\x40\x42\x0f\0\x85' + text('C'),),
    b'tq\1R' + b'h\0h\1R' * 10**4 + b'e.',
  ),
  'pairs that are made a dictionary again and again': (
    *(b'](' + name('collections', 'OrderedDict') + b'q\0](',),
    b''.join(b'K%cN\x86' % (i % 256) for i in range(10**4)),
    b'e\x85q\1R' + b'h\0h\1R' * 10**4 + b'e.',
  ),
  'a list in itself': b']q\0h\0a.',
  '5,000 levels': b']' * 5000 + b'a' * 4999 + b'.',
  'an array before it is made': (
    *(name('numpy._core.multiarray', '_reconstruct') + name('numpy', 'ndarray'),),
    b'K\0\x85C\1b\x87Rq\0h\0.',
  ),
  'a name for a value': name('numpy', 'ndarray') + b'.',
  'keys that are numbers of one hash': (
    b'}('
    + b''.join(
      b'\x8a\x09%sN' % (i * (2**61 - 1)).to_bytes(9, 'little') for i in range(99)
    )
    + b'u.'
  ),
  'keys that are arrays': b'}' + array(b'K\1\x85', dtype('f8'), ADDRESS) + b'Ns.',
  'another machine': b'Pelsewhere\n.',
  'a class of its own': name('collections', 'OrderedDict') + b')\x81.',
  'an extension': b'\x82\1.',
  'nothing': b'',
  'no value': b'.',
  'no end': b'N',
  'half a letter': b'X\1\0\0\0\xff.',
  'half a pair of letters': b'V\\ud800\n.',
}


@pytest.mark.parametrize('attack', ATTACKS)
def test_attacks_are_refused_in_a_line_and_within_memory(attack, monkeypatch):
  monkeypatch.setattr(pickles, 'MAX_STEPS', 2**17)
  raw = ATTACKS[attack]
  raw = raw if isinstance(raw, bytes) else b''.join(raw)
  tracemalloc.start()
  try:
    with pytest.raises(ValueError) as e:
      load(raw)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  line = str(e.value)
  assert line.startswith('it ') and '\n' not in line and len(line) < 200
  assert line.isprintable()
  # An instruction of a byte or two makes a container and notes it.
  assert peak < 20 * len(raw) + 2**20


def test_the_number_of_instructions_is_bounded(monkeypatch):
  monkeypatch.setattr(pickles, 'MAX_STEPS', 1000)
  assert load(b'](' + b'N' * 900 + b'e.') == [None] * 900
  with pytest.raises(ValueError, match='more than 1000 instructions'):
    load(b'](' + b'N' * 1000 + b'e.')


def test_an_array_of_objects_is_a_list():
  found = load(pickle.dumps(np.array([{'a': 1}, None], dtype=object)))
  assert found == [{'a': 1}, None]


CHECKPOINTS = {
  'text': [{'a': 'text'}, {}],
  'levels': [{'a': {'b': {'c': np.ones(2)}}}, {}],
  'keys that are numbers': [{3: {'w': np.ones(2)}, 'x': {}}, {}],
  'a list of numbers': [{'a': {'w': [1.0, 2.0]}}, {}],
  'a number of Python': [{'a': {'w': 1.0}}, {}],
  'arrays without a module': [{'a': np.ones(2)}, {}],
  'names of two lines': [{'a\nb': {'w': np.ones(2)}}, {}],
  'long names': [{'a' * 1000: {'w': np.ones(2)}}, {}],
  'three trees': [{}, {}, {}],
  'one tree': {},
  'objects': [{'a': {'w': np.array([None, 1], dtype=object)}}, {}],
  'complex numbers': [{'a': {'w': np.ones(2, np.complex64)}}, {}],
  'texts': [{'a': {'w': np.array(['a', 'b'])}}, {}],
  'dates': [{'a': {'w': np.zeros(2, 'M8[s]')}}, {}],
  'records': [{'a': {'w': np.zeros(2, [('a', 'f4'), ('b', 'i4')])}}, {}],
  'one module many times': [
    dict.fromkeys(map(str, range(300)), {str(i): np.float32(i) for i in range(300)}),
    {},
  ],
}


@pytest.mark.parametrize('kind', CHECKPOINTS)
def test_a_checkpoint_is_dictionaries_of_dictionaries_of_numbers(tmp_path, kind):
  path = tmp_path / 'odd.npy'
  path.write_bytes(START + pickle.dumps(CHECKPOINTS[kind]))
  with pytest.raises(UserError, match=r'odd\.npy ') as e:
    parameter_files.import_npy(path)
  assert '\n' not in str(e.value) and len(str(e.value)) < 400


def test_damaged_copies_are_read_or_refused_in_a_line(tmp_path):
  """What is read is still arrays, and no larger than the file."""
  path, taken = epath.Path(tmp_path / 'x.npy'), 0
  trees = (
    {'net/~/conv': {'w': np.arange(6, dtype=np.float32).reshape(2, 3)}},
    {'net/~/bn/~/mean_ema': {'counter': np.int32(3), 'average': np.ones(3)}},
  )
  parameter_files.export_npy(path, *trees)
  whole = path.read_bytes()
  pickled = START + pickle.dumps(list(trees), 2)
  for seed, content in enumerate((whole, pickled)):
    for damaged in mutations.mutations(content, 400, seed):
      path.write_bytes(damaged)
      try:
        found = parameter_files.import_npy(path)
      except UserError as e:
        line = str(e)
        assert line.startswith(f'{path} ') and '\n' not in line
        assert len(line) < len(str(path)) + 300
      else:
        taken += 1
        leaves = [x for tree in found for m in tree.values() for x in m.values()]
        assert all(isinstance(x, np.ndarray | np.generic) for x in leaves)
        assert sum(x.nbytes for x in leaves) <= len(damaged)
  assert 10 < taken < 100  # Some damages hit numbers only, most do not.
