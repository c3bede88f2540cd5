"""PyTorch's files of tensors (`.pt`), of today and from before 1.6, without PyTorch.

Today's is an archive of uncompressed members: a pickle, and the bytes of each storage.
The older one is five pickles in a row, and then the storages.
"""

import io
import math
import re
import struct
import zipfile
import zlib
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxrobust.files import arrays, pickles

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the older format
_TYPES = {
  'DoubleStorage': 'f8',
  'FloatStorage': 'f4',
  'HalfStorage': 'f2',
  'BFloat16Storage': 'u2',  # the upper half of a float
  'LongStorage': 'i8',
  'IntStorage': 'i4',
  'ShortStorage': 'i2',
  'CharStorage': 'i1',
  'ByteStorage': 'u1',
  'BoolStorage': 'b1',
}
# What the archive's reader may raise.
_DAMAGE = (
  *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError),
  *(RuntimeError, OverflowError, LookupError),
)
# Tensors that are no arrays of such numbers.
_OTHERS = {
  '_rebuild_sparse_tensor': 'a sparse tensor',
  '_rebuild_sparse_csr_tensor': 'a sparse tensor',
  '_rebuild_nested_tensor': 'a nested tensor',
  '_rebuild_qtensor': 'a quantized tensor',
  '_rebuild_meta_tensor_no_storage': 'a tensor without values (of the device meta)',
  '_rebuild_tensor_v3': 'a tensor of a rare type, such as float8',
  'ComplexFloatStorage': 'a tensor of complex numbers',
  'ComplexDoubleStorage': 'a tensor of complex numbers',
}


class Storage(NamedTuple):
  """Numbers in a row, under a key of the file."""

  key: str
  type: str
  count: int  # type: ignore[assignment]


class Tensor(NamedTuple):
  """Where the numbers of a tensor stand; offset and strides count numbers."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def tensor(storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> Tensor:
  """What PyTorch's pickles call to make a tensor, with its arguments unchecked.

  Args:
    storage: a `Storage`.
    offset, shape, strides: of the tensor, in numbers.
    others: whether it has gradients, its hooks, and perhaps what it is a view of.

  Returns:
    Where its numbers stand.

  Raises:
    ValueError: in one line, if they are of something else.
  """
  pickles.check_shape(shape)
  pickles.check_shape(strides)
  if type(storage) is not Storage or type(offset) is not int or offset < 0:
    raise ValueError('it holds a tensor of an unknown kind')
  if len(shape) != len(strides) or others[2:] and others[2]:
    raise ValueError('it holds a tensor that is a view of another one')
  return Tensor(storage, offset, shape, strides)


class TorchFile:
  """An open file.

  Attributes:
    content: what was saved, with a `Tensor` in the place of each tensor, and a
      `Storage` in that of a storage by itself.
  """

  def __init__(self, file: BinaryIO):
    """Reads the pickle; ValueError, in one line, if the file is anything else."""
    self._file, self._size = file, file.seek(0, 2)
    self._storages = {}  # key → bytes, of those that were read
    self._budget = 2 * self._size
    file.seek(0)
    is_archive = file.read(2) == b'PK'
    file.seek(0)
    if is_archive:
      self._open_archive()
    else:
      self._open_row()

  def array(self, tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor.

    Args:
      tensor: of `content`.

    Returns:
      An array of its shape, which may be read-only. Floats of half precision come in
      single precision.

    Raises:
      ValueError: in one line, if the file has no such numbers.
    """
    storage, offset, shape, strides = tensor
    kind = np.dtype(_TYPES[storage.type]).newbyteorder(self._order)
    size = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if size > storage.count or size and last >= storage.count:
      raise ValueError(f'a tensor {list(shape)} reaches beyond its numbers')
    self._budget -= size * kind.itemsize
    if self._budget < 0:
      raise ValueError('it makes more arrays than it has bytes for')
    content = self._bytes(storage, storage.count * kind.itemsize)
    if not size:
      found = np.zeros(shape, kind)
    else:
      steps = [step * kind.itemsize for step in strides]
      found = np.ndarray(shape, kind, content, offset * kind.itemsize, steps)
    if kind.kind == 'b' and (found.view(np.uint8) > 1).any():
      raise ValueError('it holds booleans that are neither true nor false')
    if storage.type == 'BFloat16Storage':
      return (found.astype(np.uint32) << 16).view(np.float32)
    kind = np.dtype(np.float32) if storage.type == 'HalfStorage' else kind
    return found.astype(kind.newbyteorder('='), copy=False)

  def _open_archive(self):
    """Reads today's format."""
    try:
      self._zip = zipfile.ZipFile(self._file)
    except _DAMAGE as e:
      raise ValueError(arrays.printable(str(e))[:100]) from None
    members = self._zip.infolist()
    names = [member.filename for member in members]
    pickled = [name for name in names if re.fullmatch(r'[^/]*/data\.pkl', name)]
    if len(pickled) != 1 or len(set(names)) < len(names):
      raise ValueError('it is an archive, and not of tensors')
    if any(x.compress_type or x.flag_bits & 1 for x in members) or self._size < sum(
      x.file_size for x in members
    ):
      raise ValueError('it is an archive with compressed members')
    self._folder = pickled[0].removesuffix('data.pkl')
    order = f'{self._folder}byteorder'
    is_big = order in names and self._member(order) == b'big'
    self._order = '>' if is_big else '<'
    self.content = _TensorUnpickler(io.BytesIO(self._member(pickled[0]))).load()

  def _open_row(self):
    """Reads the older format."""
    self._zip, self._starts = None, {}
    if self._size < 8 or pickles.ArrayUnpickler(self._file).load() != _MAGIC:
      raise ValueError('it does not begin as one')
    protocol, system = (pickles.ArrayUnpickler(self._file).load() for _ in range(2))
    if protocol != _PROTOCOL or type(system) is not dict:
      raise ValueError('it is of an unknown version')
    self._order = '>' if system.get('little_endian') is False else '<'
    unpickler = _TensorUnpickler(self._file)
    self.content, used = unpickler.load(), unpickler.storages
    keys = pickles.ArrayUnpickler(self._file).load()
    if type(keys) is not list or {*map(type, keys)} - {str} or set(keys) != set(used):
      raise ValueError('its list of storages is damaged')
    for key in keys:
      count = int.from_bytes(self._file.read(8), 'little')
      if count != used[key].count:
        raise ValueError('a storage has another length than its tensors say')
      self._starts[key] = self._file.tell()
      size = count * np.dtype(_TYPES[used[key].type]).itemsize
      if self._starts[key] + size > self._size:
        raise ValueError('it ends too early')
      self._file.seek(size, 1)

  def _bytes(self, storage, size) -> bytes:
    """The bytes of a storage, which must be so many."""
    if storage.key not in self._storages:
      if self._zip:
        content = self._member(f'{self._folder}data/{storage.key}')
      else:
        self._file.seek(self._starts[storage.key])
        content = self._file.read(size)
      self._storages[storage.key] = content
    if len(content := self._storages[storage.key]) != size:
      raise ValueError('a storage has another length than its tensors say')
    return content

  def _member(self, name) -> bytes:
    """A member of the archive."""
    try:
      return self._zip.read(name)
    except _DAMAGE as e:
      raise ValueError(arrays.printable(str(e))[:100]) from None


class _StorageType(NamedTuple):
  """The class of a storage."""

  name: str


class _TensorUnpickler(pickles.ArrayUnpickler):
  """Leaves tensors where they stand in the file."""

  leaves = pickles.ArrayUnpickler.leaves | {Tensor, Storage}

  def __init__(self, file):
    super().__init__(file)
    self.storages = {}

  def find_class(self, module, name):
    if module.startswith('torch'):
      if name in _OTHERS:
        raise ValueError(f'it holds {_OTHERS[name]}: save what is dense and on the CPU')
      if module in ('torch', 'torch.storage') and name in _TYPES:
        return _StorageType(name)
      if found := _NAMES.get((module, name)):
        return found
    return super().find_class(module, name)

  def persistent_load(self, key):
    match key:
      case ('storage', _StorageType(name), str(found), str(), int(count)):
        view = None
      case ('storage', _StorageType(name), str(found), str(), int(count), view):
        pass
      case _:
        raise ValueError('it refers to something else than storages')
    if view is not None or not 0 <= count < 2**48:
      raise ValueError('it holds a storage that is a part of another one')
    storage = Storage(found, name, count)
    if self.storages.setdefault(found, storage) != storage:
      raise ValueError('it holds one storage as two')
    return storage

  def parameter(self, tensor, *others):
    """The stand-in for a tensor that is trained."""
    return tensor

  def size(self, lengths):
    """The stand-in for a shape."""
    pickles.check_shape(lengths)
    return lengths


_TENSOR = pickles.Name(lambda unpickler, *given: tensor(*given))
_NAMES = {
  ('torch._utils', '_rebuild_tensor'): _TENSOR,
  ('torch._utils', '_rebuild_tensor_v2'): _TENSOR,
  ('torch._utils', '_rebuild_parameter'): pickles.Name(_TensorUnpickler.parameter),
  ('torch', 'Size'): pickles.Name(_TensorUnpickler.size),
}
