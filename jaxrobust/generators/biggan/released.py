"""Names and layouts of BigGAN-PyTorch, whose files hold state dicts of G, as ours."""

import os
import re

import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, pickles, torch_files

LICENCE = (
  'MIT for what BigGAN-PyTorch published; for weights of others, ask who made them'
)
_BLOCK = re.compile(r'blocks\.(\d{1,3})\.0\.(conv1|conv2|conv_sc|bn1|bn2)')
_ATTENTION = re.compile(r'blocks\.(\d{1,3})\.1(?:\.(theta|phi|g|o))?')
_MODULES = {
  'linear': 'linear',
  'shared': 'shared',
  'output_layer.0': 'output_bn',
  'output_layer.2': 'output_conv',
}
_STATISTICS = {'stored_mean': 'mean', 'stored_var': 'var'}


def read(
  path: str | os.PathLike, smallest: tuple[int, int]
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
  """G's variables in a file of the published code, such as `G_ema.pth`.

  Args:
    path: of the file.
    smallest: height and width of G's first maps.

  Returns:
    {'params': parameters, 'state': vectors of spectral norms and statistics}, with the
    numbers of the file to the bit.

  Raises:
    UserError: if the file is damaged, of another network, or wants to run anything.
  """
  found, tensors = {'params': {}, 'state': {}}, _tensors(path)
  for name, value in tensors.items():
    if name.rpartition('.')[2].startswith('sv'):
      continue  # Singular values are noted there, and never read.
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
      raise UserError(
        f'{path}: {arrays.printable(name)[:80]} is no tensor of floats of 32 bits, '
        'which the weights of BigGAN-PyTorch are: give a file as its code wrote it'
      )
    is_table = name.removesuffix('weight') + 'u0' not in tensors
    tree, module, leaf, value = _rename(path, name, value, is_table, smallest)
    found[tree].setdefault(module, {})[leaf] = value
  return found


def _tensors(path) -> dict[str, np.ndarray]:
  """The state dict."""
  with arrays.open_file(path) as opened:
    try:
      file = torch_files.TorchFile(opened)
      content = file.content
      if type(content) is not dict or not all(type(x) is str for x in content):
        raise ValueError('it holds no state dict')
      is_tensor = lambda x: isinstance(x, torch_files.Tensor)
      return {k: file.array(x) if is_tensor(x) else x for k, x in content.items()}
    except pickles.RefusedError as e:
      raise UserError(
        f'{path} wants to run {e.name}, which is refused: ask whoever made it for a '
        'file with the state dict of G alone'
      ) from e
    except ValueError as e:
      raise UserError(
        f'{path} is not a whole PyTorch file of plain tensors: {e}'
      ) from e


def _rename(path, name, value, is_table, smallest):
  """(tree, module, name in it, value in our layout)."""
  place, _, leaf = name.rpartition('.')
  kind = ''
  if place.endswith(('.gain', '.bias')) and '.bn' in place:
    place, _, kind = place.rpartition('.')
  if block := _BLOCK.fullmatch(place):
    module = f'block{int(block[1])}_{block[2]}' + (kind and f'_{kind}')
  elif block := _ATTENTION.fullmatch(place):
    module = f'block{int(block[1])}_attention' + (f'/{block[2]}' if block[2] else '')
  elif place in _MODULES and not kind:
    module = _MODULES[place]
  else:
    raise _other(path, name)
  if leaf in _STATISTICS and value.ndim == 1:
    return 'state', module, _STATISTICS[leaf], value
  if leaf == 'u0' and value.ndim == 2 and len(value) == 1:
    value = value[0]
    if module == 'linear':
      value = _by_pixel(path, name, value, smallest)
    return 'state', module, 'u', value
  if leaf == 'gamma' and value.ndim == 0:
    return 'params', module, leaf, value
  if module == 'output_bn' and leaf in ('gain', 'bias') and value.ndim == 1:
    return 'params', module, leaf, value
  if leaf == 'bias' and value.ndim == 1:
    value = _by_pixel(path, name, value, smallest) if module == 'linear' else value
    return 'params', module, 'b', value
  if leaf == 'weight' and value.ndim == 4:
    return 'params', module, 'w', value.transpose(2, 3, 1, 0)
  if leaf == 'weight' and value.ndim == 2:
    if is_table:
      return 'params', module, 'table', value
    if module == 'linear':
      value = _by_pixel(path, name, value, smallest)
    return 'params', module, 'w', value.T
  raise _other(path, name)


def _by_pixel(path, name, value, smallest):
  """Outputs in the order (channel, row, column) as (row, column, channel)."""
  if not len(value) or len(value) % (smallest[0] * smallest[1]):
    raise UserError(
      f'{path}: {arrays.printable(name)[:80]} has shape {list(value.shape)}, which is '
      f'not of maps of {smallest[0]}x{smallest[1]} pixels: give the config of its fit'
    )
  rest = value.shape[1:]
  value = value.reshape(-1, *smallest, *rest)
  return np.moveaxis(value, 0, 2).reshape(-1, *rest)


def _other(path, name) -> UserError:
  return UserError(
    f'{path} is of another network than the generator of BigGAN-PyTorch: it has '
    f'{arrays.printable(name)[:80]}'
  )
