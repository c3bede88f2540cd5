"""Arrays of others: what is taken, what is refused in one line, and at what cost."""

import io
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from jaxrobust.errors import UserError
from jaxrobust.files import arrays
from tests.helpers.mutations import mutations

EXPECTED = {'means': ('f', 2), 'labels': ('iu', 1)}
GOOD = {
  'means': np.arange(6.0).reshape(2, 3),
  'labels': np.array([3, 1, 2], '>i4'),
  'flags': np.array([True, False]),
  'name': np.array('Größe 1'),
  'empty': np.zeros((0, 4), np.float32),
}


def npy_bytes(array, version=None):
  buffer = io.BytesIO()
  np.lib.format.write_array(buffer, np.asanyarray(array), version)
  return buffer.getvalue()


def header(text, data=b''):
  return b'\x93NUMPY\1\0' + struct.pack('<H', len(text)) + text.encode() + data


def zip_of(members, compression=zipfile.ZIP_STORED):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w', compression) as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return buffer.getvalue()


def refusal(call, path):
  """The line by which a file is refused."""
  with pytest.raises(UserError) as caught:
    call()
  line = str(caught.value)
  assert str(path) in line and '\n' not in line and len(line) < len(str(path)) + 300
  return line


def same(found, wanted):
  assert found.dtype.isnative and found.dtype.kind == wanted.dtype.kind
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('write', [np.savez, np.savez_compressed])
def test_takes_what_numpy_writes(tmp_path, write):
  write(tmp_path / 'x.npz', **GOOD)
  expected = {key: (array.dtype.kind, array.ndim) for key, array in GOOD.items()}
  found = arrays.read_npz(tmp_path / 'x.npz', expected)
  assert list(found) == list(GOOD)
  for key, array in GOOD.items():
    same(found[key], array)


def test_takes_what_it_writes_itself(tmp_path):
  (tmp_path / 'x.npz').write_bytes(arrays.npz_bytes(**GOOD))
  same(arrays.read_npz(tmp_path / 'x.npz', EXPECTED)['means'], GOOD['means'])


@pytest.mark.parametrize('version', [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize('order', ['C', 'F'])
def test_takes_all_versions_and_orders(tmp_path, version, order):
  wanted = np.asarray(np.arange(24, dtype='u2').reshape(2, 3, 4), order=order)
  (tmp_path / 'x.npy').write_bytes(npy_bytes(wanted, version))
  same(arrays.read_npy(tmp_path / 'x.npy', 'iu', 3), wanted)


def test_takes_headers_of_python_2_and_of_other_programs(tmp_path):
  for text in (
    "{'descr': '<u2', 'fortran_order': False, 'shape': (3L,), }\n",
    "{'descr':'<u2','fortran_order':False,'shape':(3,)}",
  ):
    (tmp_path / 'x.npy').write_bytes(header(text, bytes([1, 0, 2, 0, 0, 1])))
    same(arrays.read_npy(tmp_path / 'x.npy', 'u'), np.array([1, 2, 256], 'u2'))


def test_others_and_optional_arrays(tmp_path):
  np.savez(tmp_path / 'x.npz', **GOOD)
  read = lambda **options: arrays.read_npz(tmp_path / 'x.npz', EXPECTED, **options)
  assert set(read()) == {'means', 'labels'}
  assert set(read(optional={'flags': ('b', 1), 'x': ('f', 1)})) == {
    'means',
    'labels',
    'flags',
  }
  assert set(read(others='fbU')) == set(GOOD)
  line = refusal(lambda: read(others='f'), tmp_path / 'x.npz')
  assert 'flags' in line and 'floats' in line


def test_what_is_absent_is_named_beside_what_is_there(tmp_path):
  np.savez(tmp_path / 'x.npz', **{f'a{i}': np.zeros(1) for i in range(1_000)})
  line = refusal(
    lambda: arrays.read_npz(tmp_path / 'x.npz', EXPECTED), tmp_path / 'x.npz'
  )
  assert 'lacks means, labels' in line and 'a0, a1' in line and '992 more' in line


HEAD = "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }"


@pytest.mark.parametrize(
  'content, message',
  [
    (b'', 'no .npy file'),
    (b'\x93NUMPY\4\0', 'no .npy file'),
    (header(HEAD % ('<f4', '3,'), bytes(11)), 'truncated'),
    (header(HEAD % ('<f4', '3,'), bytes(13)), 'appended'),
    (header(HEAD % ('<f4', '-1,')), 'no header'),
    (header(HEAD % ('<f4', f'{2**63},')), 'damaged'),
    (header(HEAD % ('<f4', f'0, {2**62}')), 'damaged'),
    (header(HEAD % ('<f4', '9' * 5_000)), 'damaged'),
    (header(HEAD % ('<f4', '1,' * 40), bytes(4)), '40 axes'),
    (header(HEAD % ('|O', '1,'), bytes(8)), 'no header'),
    (header(HEAD % ('<c8', '1,'), bytes(8)), 'no header'),
    (header(HEAD % ('<f3', '1,'), bytes(3)), 'f3'),
    (header(HEAD % ('<U0', f'{2**40},')), 'U0'),
    (header("{'descr': '<f4', 'shape': (1,)"), 'no header'),
    (header('(' * 9_000), 'no header'),
    (header('\x00' * 100), 'no header'),
    (header("{'descr': '<f4\n'''"), 'no header'),  # numpy's tokenizer breaks on it.
    (b'\x93NUMPY\2\0\xff\xff\xff\xff{', 'cut short'),
    (header(HEAD % ('|b1', '2,'), b'\1\2'), 'booleans above 1'),
    (header(HEAD % ('<U1', ''), b'\xff\xff\xff\xff'), 'no text'),
    (header(HEAD % ('<U1', ''), b'\x00\xd8\0\0'), 'no text'),
    (header(HEAD % ('<U1', ''), b'a\0\0\0'), 'floats or booleans of 1 axis'),
    (header(HEAD % ('<f4', '1, 1'), bytes(4)), 'of 1 axis'),
  ],
  ids=range(23),
)
def test_refuses_npy(tmp_path, content, message):
  path = tmp_path / 'x.npy'
  path.write_bytes(content)
  kinds = 'U' if 'no text' in message else 'fb'
  assert message in refusal(
    lambda: arrays.read_npy(path, kinds, 1 - (kinds == 'U')), path
  )


def set_bits(content, signature, offset, value):
  """A zip file with a field of its local or central header of the first member set."""
  at = content.index(signature) + offset
  return content[:at] + struct.pack('<H', value) + content[at + 2 :]


ARCHIVE = zip_of({'means.npy': npy_bytes(GOOD['means']), 'labels.npy': npy_bytes([1])})


@pytest.mark.parametrize(
  'content, message',
  [
    (set_bits(ARCHIVE, b'PK\1\2', 8, 1), 'encrypted'),
    (set_bits(ARCHIVE, b'PK\1\2', 10, 99), 'method 99'),
    (set_bits(ARCHIVE, b'PK\1\2', 10, zipfile.ZIP_LZMA), 'method 14'),
    (set_bits(ARCHIVE, b'PK\1\2', 6, 200), 'damaged'),
    (ARCHIVE.replace(npy_bytes([1])[-8:], bytes(8)), 'CRC'),
    (zip_of({'means': b'', 'labels': b''}), 'holds no arrays'),
    (zip_of({}), 'holds no arrays'),
    (ARCHIVE[:-1], 'damaged'),
    (b'', 'damaged'),
  ],
  ids=range(9),
)
def test_refuses_npz(tmp_path, content, message):
  path = tmp_path / 'x.npz'
  path.write_bytes(content)
  assert message in refusal(lambda: arrays.read_npz(path, EXPECTED), path)


def test_refuses_two_members_of_one_name(tmp_path):
  with (
    pytest.warns(UserWarning, match='Duplicate'),
    zipfile.ZipFile(tmp_path / 'x.npz', 'w') as archive,
  ):
    for value in (1.0, 2.0):
      archive.writestr('a.npy', npy_bytes(value))
  read = lambda: arrays.read_npz(tmp_path / 'x.npz', {'a': ('f', 0)})
  assert 'two files of one name' in refusal(read, tmp_path / 'x.npz')


def test_a_bomb_takes_no_memory(tmp_path):
  """A gigabyte of zeros deflates to a megabyte; most of it is not even there."""
  n, path = 2**30, tmp_path / 'x.npz'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    start = header((HEAD % ('|u1', f'{n},')).ljust(200))
    with archive.open('a.npy', 'w') as member:
      member.write(start)
      for _ in range(300):
        member.write(bytes(2**20))
  size, whole = len(start) + 300 * 2**20, len(start) + n
  content = path.read_bytes().replace(struct.pack('<I', size), struct.pack('<I', whole))
  path.write_bytes(content)
  tracemalloc.start()
  line = refusal(lambda: arrays.read_npz(path, {'a': ('u', 1)}), path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert '1.0 GiB' in line and 'savez' in line and peak < 2**24


def test_a_folder_and_a_pipe_are_no_files(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for name in ('', 'pipe', 'absent'):
    refusal(lambda path=tmp_path / name: arrays.read_npy(path, 'f'), tmp_path / name)


def survives(path, damaged, read):
  """Reads damaged files: each gives arrays or one line."""
  taken = 0
  for content in damaged:
    path.write_bytes(content)
    try:
      found = read()
    except UserError as error:
      line = str(error)
      assert str(path) in line and '\n' not in line and len(line) < len(str(path)) + 300
    else:
      taken += 1
      for array in found.values():
        assert array.dtype.kind in 'biufU' and array.tolist() is not None
  return taken


@pytest.mark.parametrize('write', [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path, write):
  path = tmp_path / 'x.npz'
  write(path, **GOOD)
  damaged = mutations(path.read_bytes(), 300, seed=1)
  read = lambda: arrays.read_npz(path, EXPECTED, others='biufU')
  # Dates, attributes and comments may be anything.
  assert survives(path, damaged, read) < 100


@pytest.mark.parametrize('key', ['means', 'labels', 'flags', 'name'])
def test_damaged_npy(tmp_path, key):
  content = npy_bytes(GOOD[key])
  head = len(content) - GOOD[key].nbytes
  damaged = [x + content[head:] for x in mutations(content[:head], 150, seed=2)]
  damaged += mutations(content, 50, seed=3)
  path = tmp_path / 'x.npy'
  survives(path, damaged, lambda: {'x': arrays.read_npy(path, 'biufU')})
