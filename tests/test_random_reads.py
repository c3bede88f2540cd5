"""Records are read alike, whatever the system has cached and can do."""

import errno
import os

import numpy as np
import pytest

from jaxrobust.samples import random_reads

SIZE = 3_072


@pytest.fixture
def file(tmp_path):
  content = np.random.default_rng(0).integers(0, 256, (50, SIZE), np.uint8)
  path = tmp_path / 'file'
  path.write_bytes(b'head' + content.tobytes())
  with path.open('rb') as opened:
    random_reads.expect(opened.fileno())
    yield opened.fileno(), content


def read(number, rows):
  found = np.zeros((len(rows), SIZE), np.uint8)
  flat = memoryview(found.reshape(-1))
  ended = random_reads.read(
    random_reads.Read(number, flat[i * SIZE : (i + 1) * SIZE], 4 + row * SIZE)
    for i, row in enumerate(rows)
  )
  return found, ended


@pytest.mark.parametrize('system', ['all', 'no word of the cache', 'neither'])
def test_whatever_the_system_has_cached(file, monkeypatch, system):
  number, content = file
  advised, preadv, advise = [], os.preadv, os.posix_fadvise

  def uncached(number, buffers, offset, *flags):
    """A third is cached, a third in part, of the others nothing is."""
    row = (offset - 4) // SIZE
    if flags and row % 3 == 0:
      raise BlockingIOError(errno.EAGAIN, 'it would wait')
    if flags and row % 3 == 1:
      return preadv(number, (buffers[0][:1_000],), offset)
    return preadv(number, buffers, offset)

  monkeypatch.setattr(os, 'preadv', uncached)
  monkeypatch.setattr(os, 'posix_fadvise', lambda *x: advised.append(x) or advise(*x))
  if system != 'all':
    monkeypatch.setattr(random_reads, '_ONLY_CACHED', 0)
  if system == 'neither':
    monkeypatch.delattr(os, 'posix_fadvise')
    random_reads.expect(number)
  rows = np.random.default_rng(1).permutation(50)[:40]
  found, ended = read(number, rows)
  np.testing.assert_array_equal(found, content[rows])
  assert ended is None
  missed = [row for row in rows if system != 'all' or row % 3 != 2]
  expected = [(number, 4 + row * SIZE, SIZE, os.POSIX_FADV_WILLNEED) for row in missed]
  assert advised == ([] if system == 'neither' else expected)


def test_a_file_that_ends_before_a_record_does(file, tmp_path):
  number, content = file
  os.truncate(tmp_path / 'file', 4 + 49 * SIZE + 7)
  found, ended = read(number, [48])
  np.testing.assert_array_equal(found, content[[48]])
  assert ended is None
  assert read(number, [3, 49])[1] == number


def test_errors_of_the_disk_are_not_hidden(file, monkeypatch):
  def fail(*_):
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(os, 'preadv', fail)
  with pytest.raises(OSError, match='Input/output error'):
    read(file[0], [0])
