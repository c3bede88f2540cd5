"""Pickles of arrays, read without running what they name.

A pickle is a program that makes objects by calling whatever it names. Here nothing of
it reaches the unpicklers of Python or numpy: a small machine knows the instructions
that containers, text, bytes and numbers need, and the few names that arrays are made
of are answered by stand-ins, which check every argument. What a file may take in memory
and time is bounded by its size.
"""

import codecs
import math
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from jaxrobust.files.arrays import printable

MAX_STEPS = 2**23  # instructions; an array needs some 30, a number in a list one
MAX_DEPTH = 64  # of containers in containers
_MAX_GROWTH = 16  # how often the parts of a pickle may be referred to, on average
_MAX_AXES, _MAX_LENGTH = 32, 2**40
_MAX_KEY = 2**20  # of a dictionary, where it is a number
_MAX_DIGITS = 40
_MAX_NAME = 200  # bytes of a module or a class

_NUMBERS = {
  *('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8'),
}
_CONTAINERS = {dict, list, tuple}
_LEAVES = {
  *(type(None), bool, int, float, str, bytes, np.ndarray),
  *(np.dtype(code).type for code in _NUMBERS),
}


class RefusedError(ValueError):
  """A pickle names something that is not data.

  Attributes:
    name: what it names, dotted.
  """

  def __init__(self, module: str, name: str):
    self.name = printable(f'{module}.{name}')[:80]
    super().__init__(f'it wants to run {self.name}, which is refused')


class Name:
  """A stand-in for what a pickle may name."""

  def __init__(self, call: Callable | None = None):
    """Makes a name; `call` takes the unpickler and the arguments, if it has any."""
    self.call = call


class _Dtype:
  """A type of numbers, or of objects ('O')."""

  def __init__(self, code):
    self.code, self.order = code, '<'

  def build(self, state):
    """Takes the byte order; whatever else a state may say is refused."""
    fixed = (None, None, None, -1, -1)
    if len(state) != 8 or state[0] != 3 or state[2:7] != fixed:
      raise ValueError('it holds a type that is not of plain numbers')
    if state[1] not in ('<', '>', '|', '=') or type(state[7]) is not int:
      raise ValueError('it holds a type in an unknown byte order')
    self.order = state[1]


class _Array:
  """An array that is not built yet."""

  def __init__(self):
    self.value = None


class ArrayUnpickler:
  """Reads a pickle of arrays and numbers in containers.

  Subclasses may know more names, by `find_class`, `persistent_load`, `new_object` and
  `attributes`.
  """

  leaves = frozenset(_LEAVES)  # types that a result may hold beside containers

  def __init__(self, file: BinaryIO):
    """Opens a pickle.

    Args:
      file: seekable, at the start of the pickle; `load` leaves it behind the end.
    """
    start = file.tell()
    self._file, self._left = file, file.seek(0, 2) - start
    file.seek(start)
    # Bytes that may be made: text is encoded at most once, and seen as an array once.
    self._budget = 2 * self._left
    self._steps, self._memo = 0, {}
    self._stack, self._marks = [], []

  def load(self) -> Any:
    """Reads the pickle.

    Returns:
      Dictionaries (of text, bytes or small numbers as keys), lists, tuples, text,
      bytes, numbers, None, and arrays of numbers, which may be read-only. Arrays of
      objects come as lists, and so do sets. Text of Python 2 is read as Latin-1.

    Raises:
      ValueError: in one line, if it is damaged, or anything else.
    """
    try:
      while (code := self._read(1)) != b'.':
        self._steps += 1
        if self._steps > MAX_STEPS:
          raise ValueError(f'it has more than {MAX_STEPS} instructions')
        if code not in _INSTRUCTIONS:
          raise ValueError(f'it has the instruction {code!r}, which arrays do not need')
        _INSTRUCTIONS[code](self)
      value = self._stack.pop()
    except UnicodeError:
      raise ValueError('it is damaged (it holds text that is none)') from None
    except (LookupError, TypeError, AttributeError, OverflowError) as e:
      raise ValueError(f'it is damaged ({type(e).__name__})') from None
    self._check(value)
    return value

  def find_class(self, module: str, name: str) -> Any:
    """The stand-in for a name; RefusedError if it has none."""
    if name in ('FlatMap', 'FlatMapping'):  # Of early versions of Haiku.
      return _FLAT_MAP
    if found := _NAMES.get((module, name)):
      return found
    raise RefusedError(module, name)

  def persistent_load(self, key: Any) -> Any:
    """The object that stands elsewhere under that key."""
    raise ValueError('it refers to objects outside of it')

  def new_object(self, kind: Any, arguments: Any) -> Any:
    """A new object of a class, in a stand-in's place."""
    raise ValueError('it makes an object of a class, which arrays do not need')

  def attributes(self, target: dict, state: dict) -> None:
    """Gives a dictionary its attributes, which are not kept here."""

  def spend(self, size: int) -> None:
    """Counts bytes that are made of the pickle's; there are two for each of them."""
    self._budget -= size
    if self._budget < 0:
      raise ValueError('it makes more arrays than it has bytes for')

  def _check(self, value):
    """Refuses what is no plain value, and what is larger than it was written."""
    seen, pending = 0, [((value,), 0)]
    while pending:
      inner, depth = pending.pop()
      seen += len(inner)
      if depth > MAX_DEPTH:
        raise ValueError(f'it is nested more than {MAX_DEPTH} levels deep')
      if seen > _MAX_GROWTH * (self._steps + 1):
        raise ValueError('it refers to its own parts far more often than it has parts')
      for x in inner:
        if (kind := type(x)) in _CONTAINERS:
          pending.append((x.values() if kind is dict else x, depth + 1))
        elif kind not in self.leaves:
          raise ValueError('it holds something else than numbers in containers')

  # What instructions are made of.

  def _read(self, size) -> bytes:
    """The next bytes."""
    if size > self._left:
      raise ValueError('it ends too early')
    self._left -= size
    content = self._file.read(size)
    if len(content) != size:
      raise ValueError('it ends too early')
    return content

  def _line(self, most=None) -> bytes:
    """The next bytes up to the end of a line, which is dropped."""
    most = self._left if most is None else min(most + 1, self._left)
    line = self._file.readline(most)
    self._left -= len(line)
    if not line.endswith(b'\n'):
      raise ValueError('it has a line that does not end, or is too long')
    return line[:-1]

  def _number(self, size) -> int:
    return int.from_bytes(self._read(size), 'little')

  def _push(self, value):
    self._stack.append(value)

  def _mark(self):
    self._marks.append(self._stack)
    self._stack = []

  def _since_mark(self) -> list:
    """What was pushed since the last mark, which is dropped."""
    items, self._stack = self._stack, self._marks.pop()
    return items

  def _last(self, count) -> list:
    """The last values, which are dropped."""
    items = self._stack[-count:]
    del self._stack[-count:]
    if len(items) != count:
      raise ValueError('it is damaged (values are missing)')
    return items

  def _put(self, index):
    if index > MAX_STEPS:
      raise ValueError(f'it numbers its parts beyond {MAX_STEPS}')
    self._memo[index] = self._stack[-1]

  def _get(self, index):
    value = self._memo[index]
    if type(value) is _Array:
      value = value.value
      if value is None:
        raise ValueError('it uses an array before it is made')
    self._push(value)

  def _append(self, items):
    if type(target := self._stack[-1]) is not list:
      raise ValueError('it appends to what is no list')
    target.extend(items)

  def _set(self, items):
    if type(target := self._stack[-1]) is not dict:
      raise ValueError('it sets items of what is no dictionary')
    for key, value in zip(items[::2], items[1::2], strict=True):
      is_number = type(key) is int and 0 <= key < _MAX_KEY
      if type(key) not in (str, bytes) and not is_number:
        raise ValueError('it has a dictionary with keys that are no text')
      target[key] = value

  def _dictionary(self, items):
    self._push({})
    self._set(items)

  def _find(self, module, name):
    if type(module) is not str or type(name) is not str:
      raise ValueError('it names something that is no name')
    self._push(self.find_class(module, name))

  def _reduce(self):
    name, arguments = self._last(2)
    if type(name) is not Name or not name.call or type(arguments) is not tuple:
      raise ValueError('it calls what cannot be called')
    self._push(name.call(self, *arguments))

  def _build(self):
    target, state = self._last(2)
    if type(target) is dict and type(state) is dict:
      self._steps += len(state)
      self.attributes(target, state)
      self._push(target)
      return
    if type(target) not in (_Dtype, _Array) or type(state) is not tuple:
      raise ValueError('it gives a state to what has none')
    if type(target) is _Dtype:
      target.build(state)
    else:
      target = self._build_array(target, *state)
    self._push(target)

  def _integer(self, line):
    if line in (b'00', b'01'):  # Booleans of protocol 0.
      return line == b'01'
    return int(line.removesuffix(b'L'))

  def _long(self, size):
    if size > _MAX_DIGITS:
      raise ValueError('it has a number of too many digits')
    self._push(int.from_bytes(self._read(size), 'little', signed=True))

  def _quoted(self, line):
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b'"', b"'"):
      raise ValueError('it is damaged (text without quotes)')
    return codecs.escape_decode(line[1:-1])[0].decode('latin1')

  def _escaped(self, line):
    text = line.decode('raw_unicode_escape')
    text.encode()  # An escape may write half a character.
    return text

  # Stand-ins.

  def _dtype(self, code, align=False, copy=False):
    if type(code) is not str or code not in (*_NUMBERS, 'O', 'O4', 'O8'):
      shown = printable(code)[:20] if type(code) is str else type(code).__name__
      raise ValueError(f'it holds numbers of the type {shown}, which are not read')
    return _Dtype(code)

  def _reconstruct(self, kind, shape, code):
    if kind is not _NDARRAY:
      raise ValueError('it holds an array of an unknown class')
    return _Array()

  def _build_array(self, array, version, shape, dtype, is_fortran, content):
    check_shape(shape)
    known = type(version) is int and version == 1 and type(is_fortran) in (bool, int)
    if array.value is not None or not known or type(dtype) is not _Dtype:
      raise ValueError('it holds an array of an unknown kind')
    if dtype.code.startswith('O'):
      if type(content) is not list or shape != (len(content),):
        raise ValueError('it holds an array of objects that is no list')
      array.value = content
    else:
      order = 'F' if is_fortran else 'C'
      array.value = self._numbers(content, dtype, shape, order)
    return array.value

  def _numbers(self, content, dtype, shape, order='C'):
    """An array, of bytes that are as many as its shape says."""
    if type(content) is str:
      content = self._encode(content, 'latin1')
    if type(content) is not bytes or type(dtype) is not _Dtype or order not in 'CF':
      raise ValueError('it holds an array that is not of bytes')
    if dtype.code not in _NUMBERS:
      raise ValueError('it makes objects of bytes')
    check_shape(shape)
    kind = np.dtype(dtype.code).newbyteorder(dtype.order)
    if math.prod(shape) * kind.itemsize != len(content):
      raise ValueError(
        f'it gives {len(content)} bytes to an array of {kind} {list(shape)}'
      )
    self.spend(len(content))
    array = np.ndarray(shape, kind, content, order=order)
    if kind.kind == 'b' and (array.view(np.uint8) > 1).any():
      raise ValueError('it holds booleans that are neither true nor false')
    return array.astype(kind.newbyteorder('='), copy=False)

  def _scalar(self, dtype, content):
    return self._numbers(content, dtype, ())[()]

  def _encode(self, text, encoding):
    if type(text) is not str or encoding not in ('latin1', 'latin-1'):
      raise ValueError('it encodes text as arrays do not')
    self.spend(len(text))
    return text.encode('latin1')

  def _bytes(self):
    return b''

  def _ordered(self, pairs=()):
    if type(pairs) not in (list, tuple):
      raise ValueError('it makes a dictionary of what is no list')
    self._steps += len(pairs)
    self._dictionary([x for key, value in pairs for x in (key, value)])
    return self._stack.pop()

  def _flat_map(self, mapping):
    if type(mapping) is not dict:
      raise ValueError('it makes a dictionary of what is none')
    return mapping


def check_shape(shape) -> None:
  """Refuses what is no tuple of lengths of axes."""
  if (
    type(shape) is not tuple
    or len(shape) > _MAX_AXES
    or not all(type(n) is int and 0 <= n <= _MAX_LENGTH for n in shape)
  ):
    raise ValueError('it holds an array whose shape is none')


_NDARRAY = Name()
_FLAT_MAP = Name(ArrayUnpickler._flat_map)
_NAMES = {
  ('numpy', 'ndarray'): _NDARRAY,
  ('numpy', 'dtype'): Name(ArrayUnpickler._dtype),
  ('_codecs', 'encode'): Name(ArrayUnpickler._encode),
  ('builtins', 'bytes'): Name(ArrayUnpickler._bytes),  # Empty ones, in protocol 2.
  ('__builtin__', 'bytes'): Name(ArrayUnpickler._bytes),
  ('collections', 'OrderedDict'): Name(ArrayUnpickler._ordered),
}
for _core in ('numpy.core', 'numpy._core'):
  _NAMES |= {
    (f'{_core}.multiarray', '_reconstruct'): Name(ArrayUnpickler._reconstruct),
    (f'{_core}.multiarray', 'scalar'): Name(ArrayUnpickler._scalar),
    (f'{_core}.numeric', '_frombuffer'): Name(ArrayUnpickler._numbers),
  }

# https://github.com/python/cpython/blob/main/Lib/pickletools.py has the instructions.
_INSTRUCTIONS: dict[bytes, Callable[[ArrayUnpickler], Any]] = {
  b'\x80': lambda m: m._read(1),  # PROTO
  b'\x95': lambda m: m._read(8),  # FRAME
  b'N': lambda m: m._push(None),
  b'\x88': lambda m: m._push(True),
  b'\x89': lambda m: m._push(False),
  b'I': lambda m: m._push(m._integer(m._line(_MAX_DIGITS))),
  b'L': lambda m: m._push(m._integer(m._line(_MAX_DIGITS))),
  b'J': lambda m: m._long(4),
  b'K': lambda m: m._push(m._number(1)),
  b'M': lambda m: m._push(m._number(2)),
  b'\x8a': lambda m: m._long(m._number(1)),
  b'\x8b': lambda m: m._long(m._number(4)),
  b'F': lambda m: m._push(float(m._line(_MAX_DIGITS))),
  b'G': lambda m: m._push(struct.unpack('>d', m._read(8))[0]),
  b'S': lambda m: m._push(m._quoted(m._line())),
  b'T': lambda m: m._push(m._read(m._number(4)).decode('latin1')),
  b'U': lambda m: m._push(m._read(m._number(1)).decode('latin1')),
  b'V': lambda m: m._push(m._escaped(m._line())),
  b'\x8c': lambda m: m._push(m._read(m._number(1)).decode()),
  b'X': lambda m: m._push(m._read(m._number(4)).decode()),
  b'\x8d': lambda m: m._push(m._read(m._number(8)).decode()),
  b'C': lambda m: m._push(m._read(m._number(1))),
  b'B': lambda m: m._push(m._read(m._number(4))),
  b'\x8e': lambda m: m._push(m._read(m._number(8))),
  b'\x96': lambda m: m._push(m._read(m._number(8))),  # BYTEARRAY8
  b'(': lambda m: m._mark(),
  b')': lambda m: m._push(()),
  b']': lambda m: m._push([]),
  b'}': lambda m: m._push({}),
  b'\x8f': lambda m: m._push([]),  # EMPTY_SET
  b't': lambda m: m._push(tuple(m._since_mark())),
  b'\x85': lambda m: m._push(tuple(m._last(1))),
  b'\x86': lambda m: m._push(tuple(m._last(2))),
  b'\x87': lambda m: m._push(tuple(m._last(3))),
  b'l': lambda m: m._push(m._since_mark()),
  b'd': lambda m: m._dictionary(m._since_mark()),
  b'a': lambda m: m._append(m._last(1)),
  b'e': lambda m: m._append(m._since_mark()),
  b'\x90': lambda m: m._append(m._since_mark()),  # ADDITEMS
  b's': lambda m: m._set(m._last(2)),
  b'u': lambda m: m._set(m._since_mark()),
  b'p': lambda m: m._put(int(m._line(_MAX_DIGITS))),
  b'q': lambda m: m._put(m._number(1)),
  b'r': lambda m: m._put(m._number(4)),
  b'\x94': lambda m: m._put(len(m._memo)),
  b'g': lambda m: m._get(int(m._line(_MAX_DIGITS))),
  b'h': lambda m: m._get(m._number(1)),
  b'j': lambda m: m._get(m._number(4)),
  b'c': lambda m: m._find(*(m._line(_MAX_NAME).decode() for _ in range(2))),
  b'\x93': lambda m: m._find(*m._last(2)),
  b'R': lambda m: m._reduce(),
  b'\x81': lambda m: m._push(m.new_object(*m._last(2))),
  b'b': lambda m: m._build(),
  b'Q': lambda m: m._push(m.persistent_load(*m._last(1))),
}
