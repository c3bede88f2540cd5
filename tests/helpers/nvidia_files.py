"""Pickles as NVIDIA's code writes them, by hand: no PyTorch is needed."""

import struct

import numpy as np

SOURCE = 'raise AssertionError("the source text of a file was run")\n'
# What torch keeps beside parameters: it is not trained.
_BUFFERS = ('resample_filter', 'freqs', 'noise_const', 'w_avg')


def dump(networks: dict[str, dict[str, np.ndarray]], dicts: tuple[str, ...] = ()):
  """The content of a file.

  Args:
    networks: by their key in the file, such as 'ema': float32 arrays by dotted names.
    dicts: names of modules that are a torch.nn.ModuleDict, such as 'model.enc'.

  Returns:
    Bytes.
  """
  modules = {key: module(_nest(x), dicts) for key, x in networks.items()}
  others = {'loss_fn': None, 'dataset_kwargs': value({'use_labels': True, 'size': 5})}
  content = {key: x or b'N' for key, x in (modules | others).items()}
  return b'\x80\4' + dictionary(content) + b'.'


def module(parts: dict, dicts: tuple[str, ...] = (), path: str = '') -> bytes:
  """A module: arrays are its parameters and buffers, dictionaries modules inside."""
  is_array = lambda x: isinstance(x, np.ndarray)
  buffers = {k: tensor(x) for k, x in parts.items() if is_array(x) and k in _BUFFERS}
  parameters = {
    k: parameter(tensor(x))
    for k, x in parts.items()
    if is_array(x) and k not in _BUFFERS
  }
  inside = {
    k: module(x, dicts, f'{path}.{k}'.lstrip('.'))
    for k, x in parts.items()
    if isinstance(x, dict)
  }
  state = dictionary(
    {
      'training': value(False),
      '_parameters': ordered(parameters | {'absent': b'N'}),
      '_buffers': ordered(buffers),
      '_non_persistent_buffers_set': b'\x8f',
      '_modules': ordered(inside),
      '_init_kwargs': value({'channels': [1, 2], 'scale': 0.5}),
    }
  )
  if path in dicts:
    return named('torch.nn.modules.container', 'ModuleDict') + b')\x81' + state + b'b'
  return persistent(state)


def persistent(state: bytes) -> bytes:
  """The call that makes a module of a state."""
  meta = {'type': 'class', 'version': 6, 'module_src': SOURCE, 'class_name': 'Module'}
  meta = {key: value(x) for key, x in meta.items()} | {'state': state}
  make = named('torch_utils.persistence', '_reconstruct_persistent_obj')
  return make + dictionary(meta) + b'\x85R'


def tensor(array: np.ndarray, opened: bytes | None = None) -> bytes:
  """The call that makes a tensor, of a storage of its own or another one."""
  if opened is None:
    array = np.ascontiguousarray(array).reshape(array.shape)  # It gives () an axis.
  strides = tuple(step // array.itemsize for step in array.strides)
  return b''.join(
    [
      named('torch._utils', '_rebuild_tensor_v2') + b'(',
      opened or storage(array.reshape(-1)),
      value(0) + value(array.shape) + value(strides) + value(False),
      ordered({}) + b'tR',
    ]
  )


def parameter(made: bytes) -> bytes:
  """The call that makes a parameter of a tensor."""
  make = named('torch._utils', '_rebuild_parameter')
  return make + made + value(False) + ordered({}) + b'\x87R'


def storage(numbers: np.ndarray) -> bytes:
  """The call that opens a storage, which stands there as a file of old PyTorch."""
  key, count = value('94026'), len(numbers)
  system = {'protocol_version': 1001, 'little_endian': True}
  persistent_id = [value('storage'), named('torch', 'FloatStorage'), key, value('cpu')]
  pickles = (
    b'\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19',
    value(1001),
    value(system),
    b'(' + b''.join([*persistent_id, value(count), b'N']) + b'tQ',
    value(['94026']),
  )
  content = b''.join(b'\x80\2' + x + b'.' for x in pickles)
  content += struct.pack('<q', count) + numbers.astype('<f4').tobytes()
  return named('torch.storage', '_load_from_bytes') + value(content) + b'\x85R'


def ordered(written: dict[str, bytes]) -> bytes:
  """An OrderedDict of values that are written already."""
  return named('collections', 'OrderedDict') + b')R' + items(written)


def dictionary(written: dict[str, bytes]) -> bytes:
  """A dictionary of values that are written already."""
  return b'}' + items(written)


def named(home: str, name: str) -> bytes:
  """A name."""
  return value(home) + value(name) + b'\x93'


def value(x) -> bytes:
  """A plain value."""
  match x:
    case bool():
      return b'\x88' if x else b'\x89'
    case int():
      return b'J' + struct.pack('<i', x)
    case float():
      return b'G' + struct.pack('>d', x)
    case str():
      return b'X' + struct.pack('<I', len(x.encode())) + x.encode()
    case bytes():
      return b'B' + struct.pack('<I', len(x)) + x
    case tuple():
      return b'(' + b''.join(map(value, x)) + b't'
    case list():
      return b'](' + b''.join(map(value, x)) + b'e'
    case dict():
      return dictionary({k: value(v) for k, v in x.items()})
  raise TypeError(type(x))


def items(written: dict[str, bytes]) -> bytes:
  """What sets items of the dictionary before it, written already."""
  return b'(' + b''.join(value(k) + x for k, x in written.items()) + b'u'


def _nest(flat):
  """A tree, by dotted names."""
  tree = {}
  for name, array in flat.items():
    *path, last = name.split('.')
    home = tree
    for part in path:
      home = home.setdefault(part, {})
    home[last] = array
  return tree
