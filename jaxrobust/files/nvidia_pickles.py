"""NVIDIA's pickles of networks, read without PyTorch and without what they would run.

They hold each module as a call of `torch_utils.persistence`, which makes a class of the
source text that the file brings along. Here that text is never looked at: a module is
the dictionary of its attributes, and of these only parameters, buffers and inner
modules are kept. Their numbers stand in files of PyTorch inside the pickle.
"""

import io
import os
from typing import Any

import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, pickles, torch_files

_MODULES = '_modules'
_PARTS = ('_parameters', '_buffers', _MODULES)


def read(path: str | os.PathLike, key: str) -> dict[str, np.ndarray]:
  """The parameters and buffers of a network in such a file.

  Args:
    path: of the file, local or `gs://`.
    key: of the network: 'ema' for EDM, 'G_ema' or 'D' for StyleGAN2.

  Returns:
    Arrays, which may be read-only, by PyTorch's names, such as
    'model.map_layer0.weight'.

  Raises:
    UserError: the file is absent or damaged, wants to run anything, or has no such
      network.
  """
  name = str(path)
  with arrays.open_file(path) as file:
    try:
      content = _ModuleUnpickler(file).load()
    except pickles.RefusedError as e:
      raise UserError(
        f'{name} wants to run {e.name}, which is refused: give a file as NVIDIA '
        'released it, or as its training code wrote it'
      ) from e
    except ValueError as e:
      raise UserError(f"{name} is no whole pickle of NVIDIA's networks: {e}") from e
  if type(content) is not dict or type(content.get(key)) is not dict:
    inside = list(map(str, content)) if type(content) is dict else []
    raise UserError(
      f'{name} has no network {key}, but {arrays.listed(inside)}: give a file as '
      'NVIDIA released it'
    )
  return _flat(name, content[key])


def _flat(name: str, module: dict) -> dict[str, np.ndarray]:
  """The arrays of a module and of those inside."""
  found, pending = {}, [('', module)]
  while pending:
    prefix, module = pending.pop()
    for part in _PARTS:
      if type(inside := module.get(part, {})) is not dict:
        raise UserError(f'{name} is damaged ({part} of a module is no dictionary)')
      for key, value in inside.items():
        full = f'{prefix}{key}'
        if part == _MODULES and type(value) is dict:
          pending.append((f'{full}.', value))
        elif part != _MODULES and isinstance(value, np.ndarray):
          found[full] = value
        elif value is not None:
          shown = arrays.printable(full)[:80]
          raise UserError(f'{name} is damaged ({shown} is no part of a network)')
  return found


class _ModuleUnpickler(pickles.ArrayUnpickler):
  """Reads modules as dictionaries of their attributes."""

  def find_class(self, module: str, name: str) -> Any:
    return _NAMES.get((module, name)) or super().find_class(module, name)

  def new_object(self, kind: Any, arguments: Any) -> Any:
    if kind not in (_MODULE, _DICTIONARY) or arguments != ():
      return super().new_object(kind, arguments)
    return {}

  def attributes(self, target: dict, state: dict) -> None:
    target.update(state)

  def module(self, meta: Any) -> dict:
    """The stand-in for what makes a module: its attributes."""
    if type(meta) is not dict or type(meta.get('state')) is not dict:
      raise ValueError('it holds a module without a state')
    return meta['state']

  def storage(self, content: Any) -> torch_files.TorchFile:
    """The stand-in for what opens a file of PyTorch, which holds one storage."""
    if type(content) is not bytes:
      raise ValueError('it holds a storage that is not of bytes')
    self.spend(len(content))
    found = torch_files.TorchFile(io.BytesIO(content))
    if type(found.content) is not torch_files.Storage:
      raise ValueError('it holds a file of PyTorch that is no storage')
    return found

  def tensor(
    self, storage: Any, offset: Any, shape: Any, strides: Any, *others: Any
  ) -> np.ndarray:
    """The stand-in for what makes a tensor."""
    if type(storage) is not torch_files.TorchFile:
      raise ValueError('it holds a tensor without a storage')
    return storage.array(
      torch_files.tensor(storage.content, offset, shape, strides, *others)
    )

  def parameter(self, tensor: Any, *others: Any) -> Any:
    """The stand-in for a tensor that is trained."""
    return tensor

  def set(self, items: Any = ()) -> Any:
    """The stand-in for a set, which comes as a list."""
    if type(items) not in (list, tuple):
      raise ValueError('it makes a set of what is no list')
    return items


_MODULE, _DICTIONARY = pickles.Name(), pickles.Name()
_SET = pickles.Name(_ModuleUnpickler.set)
_NAMES = {
  ('torch_utils.persistence', '_reconstruct_persistent_obj'): pickles.Name(
    _ModuleUnpickler.module
  ),
  ('torch.nn.modules.container', 'ModuleDict'): _MODULE,
  ('torch.nn.modules.container', 'ModuleList'): _MODULE,
  ('dnnlib.util', 'EasyDict'): _DICTIONARY,
  ('torch._utils', '_rebuild_parameter'): pickles.Name(_ModuleUnpickler.parameter),
  ('torch._utils', '_rebuild_tensor_v2'): pickles.Name(_ModuleUnpickler.tensor),
  ('torch.storage', '_load_from_bytes'): pickles.Name(_ModuleUnpickler.storage),
  ('builtins', 'set'): _SET,  # Up to protocol 3.
  ('__builtin__', 'set'): _SET,
}
