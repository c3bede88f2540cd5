"""Files of tensors that hold no code: https://github.com/huggingface/safetensors.

The names and layouts inside are PyTorch's (see `jaxrobust.models.pytorch`), so that
`safetensors.torch.load_file` gives a state dict; reading and writing need no PyTorch.
"""

import math
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, json_files
from jaxrobust.models import pytorch

# BF16 is the upper half of a float.
_TYPES = {
  **{'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': '<u2', 'BOOL': '|b1'},
  **{f'I{8 * n}': f'<i{n}' for n in (1, 2, 4, 8)},
  **{f'U{8 * n}': f'<u{n}' for n in (1, 2, 4, 8)},
}
_MAX_AXES = 32


def read(raw: bytes, source: str) -> tuple[Any, Any]:
  """Reads a file.

  Args:
    raw: its content.
    source: its path, for messages.

  Returns:
    (params, net_state), Haiku trees of numpy arrays.

  Raises:
    UserError: if it is damaged, or of another network.
  """
  return pytorch.from_state_dict(tensors(raw, source), source)


def tensors(raw: bytes, source: str) -> dict[str, np.ndarray]:
  """Reads the tensors of a file.

  Args:
    raw: its content.
    source: its path, for messages.

  Returns:
    Names → arrays, which may be read-only. Floats of half precision come in single
    precision.

  Raises:
    UserError: if it is damaged, or has tensors of other types.
  """
  length = _header_length(raw[:8], len(raw), source)
  data = memoryview(raw)[8 + length :]
  header = json_files.parse(raw[8 : 8 + length], f'the header of {source}')
  header.pop('__metadata__', None)
  found, stops = {}, []
  for name, entry in header.items():
    match entry:
      case {'dtype': str(kind), 'shape': list(shape), 'data_offsets': [start, stop]}:
        numbers = [*shape, start, stop]
      case _:
        raise _damaged(source, f'{_shown(name)} has no dtype, shape and data_offsets')
    if kind not in _TYPES:
      raise _damaged(
        source,
        f'{_shown(name)} is of the type {_shown(kind)}; {", ".join(_TYPES)} are read',
      )
    if any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
      raise _damaged(source, f'{_shown(name)} has a shape or offsets that are none')
    dtype = np.dtype(_TYPES[kind])
    size = math.prod(shape) * dtype.itemsize
    if len(shape) > _MAX_AXES or not start <= stop <= len(data) or stop - start != size:
      raise _damaged(
        source, f'{_shown(name)} takes {size} bytes, at offsets {start} to {stop}'
      )
    stops.append((start, stop))
    try:
      array = np.ndarray(shape, dtype, data[start:stop])
    except ValueError as e:  # None of its axes, but all of them are too long.
      raise _damaged(source, f'{_shown(name)}: {e}') from None
    if kind == 'BOOL' and (array.view(np.uint8) > 1).any():
      raise _damaged(source, f'{_shown(name)} has booleans above 1')
    if kind == 'BF16':
      array = (array.astype(np.uint32) << 16).view(np.float32)
    found[name] = array.astype(np.float32) if kind == 'F16' else array
  stops.sort()
  if [0, *(stop for _, stop in stops)] != [*(start for start, _ in stops), len(data)]:
    raise _damaged(source, 'its tensors overlap, or leave bytes over')
  return found


def write(params: Any, net_state: Any, metadata: dict[str, str]) -> bytes:
  """The content of a file with these parameters and this text."""
  state = pytorch.to_state_dict(params, net_state)
  contiguous = {key: np.asarray(x, order='C') for key, x in state.items()}
  return safetensors.numpy.save(contiguous, metadata)


def metadata(path: epath.Path) -> dict[str, str]:
  """The text of a file, without reading its tensors; UserError if it is damaged."""
  with arrays.open_file(path) as f:
    start = f.read(8)
    length = _header_length(start, f.seek(0, 2), path)
    f.seek(8)
    header = json_files.parse(f.read(length), f'the header of {path}')
  found = header.get('__metadata__', {})
  if type(found) is not dict or any(type(x) is not str for x in found.values()):
    raise _damaged(path, 'its metadata are no text')
  return found


def _header_length(start: bytes, size: int, source) -> int:
  """The bytes of the header, from the first eight of the file and its size."""
  length = int.from_bytes(start, 'little')
  if size < 8 or length > min(size - 8, json_files.MAX_BYTES):
    raise _damaged(source, f'it has {size} bytes, and a header of {length}')
  return length


def _shown(text):
  return arrays.printable(text)[:40]


def _damaged(source, reason):
  return UserError(
    f'{source} is not a whole safetensors file: {reason}; fetch or make it again'
  )
