"""Arrays in `.npy` and `.npz` files that others may have written.

A header is read by its own grammar, and what it says must be as large as the file is,
before memory is taken for it. Arrays hold numbers, booleans or text, nothing that numpy
would have to run.
"""

import contextlib
import io
import math
import os
import pathlib
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, BinaryIO

import numpy as np
from etils import epath

from jaxrobust.errors import UserError

_MAX_HEADER = 10_000  # bytes, as numpy's own
_MAX_AXES = 32
_MAX_BYTES = 2**62  # of an array, below what numpy can count
# How many times its size an archive may take in memory, and what any may take. Arrays
# that somebody computed seldom shrink to a tenth of their bytes.
_MAX_GROWTH, _SMALL = 64, 2**28
_HEADER = re.compile(
  r"\{\s*'descr'\s*:\s*'([<>|=]?)([biufU])([0-9]{1,9})'\s*,"
  r"\s*'fortran_order'\s*:\s*(True|False)\s*,"
  r"\s*'shape'\s*:\s*\(([0-9L, ]*)\)\s*,?\s*\}\s*"
)
_ITEM_SIZES = {'b': (1,), 'i': (1, 2, 4, 8), 'u': (1, 2, 4, 8), 'f': (2, 4, 8)}
_WORDS = {'b': 'booleans', 'i': 'integers', 'u': 'integers', 'f': 'floats', 'U': 'text'}


class Stream:
  """An array in an open file, read from its first row to its last.

  Attributes:
    name: of the array, for messages.
    shape, dtype: of the array.
    is_fortran: whether its first axis varies fastest, so that it has no rows.
    offset: bytes before its data.
  """

  def __init__(self, file: IO[bytes], size: int, name: str):
    """Reads the header of the array that fills `file`, which has `size` bytes."""
    self.name, self._file = name, file
    with naming(name):
      self.shape, self.dtype, self.is_fortran, self.offset = _read_header(file)
    self._left = math.prod(self.shape) * self.dtype.itemsize
    if size != (right := self.offset + self._left):
      raise UserError(
        f'{name} has {size} bytes, {right} are right for {self.dtype} '
        f'{list(self.shape)} (truncated or appended to); fetch or make it again'
      )

  def rows(self, count: int) -> np.ndarray:
    """Reads the next rows.

    Args:
      count: of rows, at most as many as are left.

    Returns:
      The rows, [count, ...].

    Raises:
      UserError: the file is damaged, or in Fortran order, which has no rows.
    """
    if self.is_fortran:
      raise UserError(f'{self.name} is in Fortran order; save it in C order')
    return self._read((count, *self.shape[1:]))

  def whole(self) -> np.ndarray:
    """Reads all of the array; UserError if the file is damaged."""
    if self.is_fortran:
      return self._read(self.shape[::-1]).T
    return self._read(self.shape)

  def _read(self, shape) -> np.ndarray:
    """The next values, of this machine's byte order, as an array of `shape`."""
    found = np.empty(shape, self.dtype)
    content = found.reshape(-1).view(np.uint8).data
    self._left -= len(content)
    with naming(self.name):
      while content:
        part = self._file.read(min(len(content), 2**20))
        if not part:
          raise EOFError('it ends too early')
        content[: len(part)] = part
        content = content[len(part) :]
      if not self._left and self._file.read(1):  # Compares the checksum, too.
        raise EOFError('it goes on after its end')
    _check_values(found, self.name)
    return found.astype(found.dtype.newbyteorder('='), copy=False)


class Archive:
  """An open `.npz` file.

  Attributes:
    name: of the file, for messages.
    keys: names of its arrays, in their order.
  """

  def __init__(self, file: BinaryIO, name: str):
    """Reads the list of members."""
    self.name = name
    with naming(name):
      self._zip = zipfile.ZipFile(file)
      members = self._zip.infolist()
    self._members = {x.filename: x for x in members}
    if len(self._members) < len(members):
      raise UserError(f'{name} holds two files of one name; make it again')
    self.keys = [x.removesuffix('.npy') for x in self._members if x.endswith('.npy')]
    file.seek(0, os.SEEK_END)
    self._most = max(_SMALL, _MAX_GROWTH * file.tell())

  @contextlib.contextmanager
  def open(self, key: str) -> Iterator[Stream]:
    """Opens one of its arrays; UserError if its header is damaged."""
    member, name = self._members[f'{key}.npy'], f'{key} in {self.name}'
    with naming(name):
      if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'compressed by method {member.compress_type}')
      file = self._zip.open(member)
    with file:
      yield Stream(file, member.file_size, name)

  def read(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads some of its arrays whole.

    Args:
      keys: their names.

    Returns:
      The arrays by name.

    Raises:
      UserError: one is damaged, or together they would take far more memory than the
        file has bytes.
    """
    keys = list(keys)
    size = sum(self._members[f'{key}.npy'].file_size for key in keys)
    if size > self._most:
      raise UserError(
        f'{self.name} would take {size / 2**30:.1f} GiB of memory, more than '
        f'{_MAX_GROWTH} times its size; save it again with numpy.savez, which does not '
        'compress'
      )
    found = {}
    for key in keys:
      with self.open(key) as stream:
        found[key] = stream.whole()
    return found


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
  """Turns what reading a damaged file may raise into a UserError that names it.

  Args:
    name: of the file, for the message.
  """
  try:
    yield
  except UserError:
    raise
  except FileNotFoundError:
    raise UserError(f'{name} does not exist; give the path of a file') from None
  except OSError as error:
    raise UserError(
      f'{name} cannot be read ({error.strerror or error}); give access, or another file'
    ) from None
  except (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,  # A method or version that zipfile does not know.
    RuntimeError,  # It is encrypted.
  ) as error:
    reason = printable(str(error))[:150]
    raise UserError(f'{name} is damaged ({reason}); fetch or make it again') from None


@contextlib.contextmanager
def open_npz(path: str | os.PathLike) -> Iterator[Archive]:
  """Opens an `.npz` file, local or `gs://`; UserError if it is absent or damaged."""
  with open_file(path) as file:
    yield Archive(file, str(path))


@contextlib.contextmanager
def open_npy(path: str | os.PathLike) -> Iterator[Stream]:
  """Opens a `.npy` file, local or `gs://`; UserError if it is absent or damaged."""
  with open_file(path) as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    yield Stream(file, size, str(path))


@contextlib.contextmanager
def open_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """Opens a file to read; one from a bucket is held in memory.

  Args:
    path: of the file, local or `gs://`.

  Yields:
    The file.

  Raises:
    UserError: it is absent, no regular file, or may not be read.
  """
  with naming(name := printable(str(path))):
    if '://' in str(path):
      file = io.BytesIO(epath.Path(path).read_bytes())
    elif pathlib.Path(path).exists() and not pathlib.Path(path).is_file():
      raise UserError(f'{name} is no file; give the path of a file')  # It might block.
    else:
      file = open(path, 'rb')  # noqa: SIM115
  with file:
    yield file


def read_npz(
  path: str | os.PathLike,
  expected: Mapping[str, tuple[str, int | None]],
  optional: Mapping[str, tuple[str, int | None]] | None = None,
  *,
  others: str = '',
) -> dict[str, np.ndarray]:
  """Reads arrays of an `.npz` file, which are checked before memory is taken for them.

  Args:
    path: of the file, local or `gs://`.
    expected: kinds (of numpy: `f`, `i`, `u`, `b`, `U`, or several) and number of axes
      (None for any) by the name of each array that must be there.
    optional: the same of arrays that may be absent.
    others: kinds of arrays with any other names; by default they are left unread.

  Returns:
    The arrays by name, of this machine's byte order. Floats may be infinite or NaN.

  Raises:
    UserError: the file is absent, damaged or holds something else.
  """
  known = {**expected, **(optional or {})}
  with open_npz(path) as archive:
    if missing := [key for key in expected if key not in archive.keys]:
      raise UserError(
        f'{path} lacks {listed(missing)}; it holds {listed(archive.keys)}: fetch or '
        'make it again'
      )
    keys = [key for key in archive.keys if key in known or others]
    for key in keys:
      with archive.open(key) as stream:
        check_kind(stream, *known.get(key, (others, None)))
    return archive.read(keys)


def read_npy(
  path: str | os.PathLike, kinds: str, ndim: int | None = None
) -> np.ndarray:
  """Reads a `.npy` file; kinds, ndim and what it raises are as of `read_npz`."""
  with open_npy(path) as stream:
    check_kind(stream, kinds, ndim)
    return stream.whole()


def npz_bytes(**arrays: np.ndarray | str) -> bytes:
  """The content of an `.npz` file with these arrays, to be written as a whole."""
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)  # type: ignore[arg-type]
  return buffer.getvalue()


def check_kind(stream: Stream, kinds: str, ndim: int | None = None) -> None:
  """Refuses an array of other kinds or another number of axes."""
  if stream.dtype.kind not in kinds or ndim not in (None, len(stream.shape)):
    words = ' or '.join(dict.fromkeys(_WORDS[kind] for kind in kinds))
    axes = '' if ndim is None else f' of {ndim} {"axis" if ndim == 1 else "axes"}'
    raise UserError(
      f'{stream.name} is {stream.dtype} {list(stream.shape)}; {words}{axes} are '
      'expected: fetch or make it again'
    )


def printable(text: str) -> str:
  """Text of a file as it may stand in a message of one line."""
  return ''.join(c if c.isprintable() else ' ' for c in text)


def listed(keys: Iterable[str]) -> str:
  """Names found in a file, in words that fit a line."""
  keys = [printable(key)[:40] for key in keys]
  more = [f'{len(keys) - 8} more'] if len(keys) > 9 else []
  shown = [*keys[:8], *more] if more else keys
  return ', '.join(shown) or 'no arrays'


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool, int]:
  """(shape, dtype, whether it is in Fortran order, bytes) of the header of a file."""
  start = file.read(8)
  version = {b'\1\0': 2, b'\2\0': 4, b'\3\0': 4}.get(start[6:])
  if start[:6] != b'\x93NUMPY' or version is None:
    raise ValueError('this is no .npy file')
  size = file.read(version)
  length = int.from_bytes(size, 'little')
  text = file.read(min(length, _MAX_HEADER)).decode('latin1')
  if len(size) != version or len(text) != length:
    raise ValueError('its header is cut short, or has no end')
  if not (match := _HEADER.fullmatch(text)):
    raise ValueError(f'no header of numbers, booleans or text: {text[:80]}')
  order, kind, item, fortran, axes = match.groups()
  item = int(item)
  shape = tuple(int(x.strip(' L')) for x in axes.split(',') if x.strip())
  if item not in _ITEM_SIZES.get(kind, (item,)) or not item:
    raise ValueError(f'it has the type {kind}{item}')
  dtype = np.dtype(f'{order}{kind}{item}')
  nonzero = math.prod(max(x, 1) for x in shape) * dtype.itemsize
  if len(shape) > _MAX_AXES or nonzero > _MAX_BYTES:
    raise ValueError(f'it has {len(shape)} axes and {nonzero:.1e} bytes')
  is_fortran = fortran == 'True' and len(shape) > 1
  return shape, dtype, is_fortran, 8 + version + length


def _check_values(values: np.ndarray, name: str) -> None:
  """Refuses bytes that are no booleans, or no text."""
  if values.dtype.kind == 'b' and (values.view(np.uint8) > 1).any():
    raise UserError(f'{name} is damaged (booleans above 1); fetch or make it again')
  if values.dtype.kind == 'U' and values.size:
    codes = np.ascontiguousarray(values).reshape(-1).view(f'{values.dtype.str[0]}u4')
    if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any():
      raise UserError(f'{name} is damaged (it is no text); fetch or make it again')
