"""Files as PyTorch writes them, made by hand: an archive of a pickle and of numbers."""

import io
import struct
import zipfile

import numpy as np


def make(tensors: dict[str, np.ndarray]) -> bytes:
  """A file of a dictionary of tensors, each of floats of 32 bits."""
  entries = [
    _text(name) + _tensor(str(index), np.float32(x))
    for index, (name, x) in enumerate(tensors.items())
  ]
  content = b'\x80\x02}(' + b''.join(entries) + b'u.'
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_STORED) as archive:
    archive.writestr('archive/data.pkl', content)
    for index, x in enumerate(tensors.values()):
      archive.writestr(f'archive/data/{index}', np.float32(x).tobytes())
    archive.writestr('archive/version', b'3\n')
  return buffer.getvalue()


def _text(x):
  return b'X' + struct.pack('<I', len(x.encode())) + x.encode()


def _numbers(values):
  return b'(' + b''.join(b'J' + struct.pack('<i', x) for x in values) + b't'


def _tensor(key, x):
  """What the pickle has of one: its storage's key, and what is where in it."""
  strides = [step // x.itemsize for step in np.ascontiguousarray(x).strides][-x.ndim :]
  strides = strides if x.ndim else []
  storage = b'(' + _text('storage') + b'ctorch\nFloatStorage\n' + _text(key)
  storage += _text('cpu') + b'J' + struct.pack('<i', x.size) + b'tQ'
  hooks = b'ccollections\nOrderedDict\n)R'
  rest = b'J' + struct.pack('<i', 0) + _numbers(x.shape) + _numbers(strides)
  return (
    b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + rest + b'\x89' + hooks + b'tR'
  )
