"""Files of tensors as PyTorch writes them, without PyTorch."""

import io
import struct
import zipfile

import numpy as np


def archive(arrays: dict[str, np.ndarray], extra: bytes = b'') -> bytes:
  """An archive of today's format with a state dict.

  Args:
    arrays: float32, by name.
    extra: instructions that the pickle runs before it ends.
  """
  parts = [b'\x80\x02ccollections\nOrderedDict\n)R(']
  for number, (name, array) in enumerate(arrays.items()):
    assert array.dtype == np.float32
    strides = [x // 4 for x in np.empty(array.shape, np.float32).strides]
    parts += [
      _text(name),
      b'ctorch._utils\n_rebuild_tensor_v2\n(',
      b'(' + _text('storage') + b'ctorch\nFloatStorage\n' + _text(str(number)),
      _text('cpu') + _number(array.size) + b'tQ',
      _number(0) + _numbers(array.shape) + _numbers(strides),
      b'\x89ccollections\nOrderedDict\n)RtR',
    ]
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as file:
    file.writestr('archive/data.pkl', b''.join([*parts, b'u', extra, b'.']))
    for number, array in enumerate(arrays.values()):
      file.writestr(f'archive/data/{number}', array.tobytes())
    file.writestr('archive/version', b'3\n')
  return buffer.getvalue()


def _text(text):
  return b'X' + struct.pack('<I', len(text.encode())) + text.encode()


def _number(number):
  return b'J' + struct.pack('<i', number)


def _numbers(numbers):
  return b'(' + b''.join(map(_number, numbers)) + b't'
