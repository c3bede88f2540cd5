"""The weights that Child published (`…-model-ema.th`), without PyTorch.

Source: the names of the parameters in the released code of Child 2021.
"""

from typing import Any

import numpy as np
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, pickles, torch_files
from jaxrobust.generators.vdvae import network as networks

_PREFIX = 'module.'  # of weights that several devices trained
_DECODER = {
  'posterior': 'enc',
  'prior': 'prior',
  'latent': 'z_proj',
  'residual': 'resnet',
}


def read(path: epath.Path, like: dict, network: networks.Network) -> dict[str, Any]:
  """Reads a file of weights.

  Args:
    path: of the file, a state dict of PyTorch.
    like: shapes of the parameters, as `networks.init` gives them.
    network: its sizes.

  Returns:
    The parameters, float32.

  Raises:
    UserError: if it is damaged, of another network, or wants to run anything.
  """
  try:
    with arrays.open_file(path) as file:
      opened = torch_files.TorchFile(file)
      if type(opened.content) is not dict:
        raise ValueError('it holds something else than parameters by their names')
      state = {}
      for name, tensor in opened.content.items():
        if type(name) is not str or type(tensor) is not torch_files.Tensor:
          raise ValueError('it holds something else than parameters by their names')
        state[name.removeprefix(_PREFIX)] = tensor
      return _convert(state, opened, like, network)
  except pickles.RefusedError as e:
    raise UserError(f'{path} wants to run {e.name}, which is refused') from e
  except ValueError as e:
    raise UserError(f'{path} is no such network as config.generator: {e}') from e


def _convert(state, opened, like, network) -> dict[str, Any]:
  """The tree of arrays; ValueError, in one line, for those of another network."""
  sources = _sources(like, network)
  expected = {name for names, _ in sources.values() for name in names}
  if odd := sorted(expected - set(state)) or sorted(set(state) - expected):
    verb = 'lacks' if odd[0] in expected else 'has'
    raise ValueError(f'it {verb} {arrays.printable(odd[0])[:80]}')
  found = {}
  for path, (names, leaf) in sources.items():
    stacked = [_read(state[name], opened, name, leaf) for name in names]
    *parents, last = path
    target = found
    for parent in parents:
      target = target.setdefault(parent, {})
    target[last] = np.reshape(stacked, leaf.shape)
  return found


def _read(tensor, opened, name, leaf):
  """An array of a block, in this package's order of axes."""
  *_, last = name.split('.')
  shape = leaf.shape[1:] if '_blocks.' in name else leaf.shape
  if last == 'weight':
    theirs = tuple(shape[i] for i in (3, 2, 0, 1))
  elif last == 'bias' and name.count('.') > 1:
    theirs = shape
  else:  # a map, or a number a channel
    theirs = (1, shape[-1], *(shape[:2] if len(shape) == 3 else (1, 1)))
  if tensor.shape != theirs:
    raise ValueError(f'{name} has shape {list(tensor.shape)}, and not {list(theirs)}')
  array = opened.array(tensor)
  if array.dtype.kind != 'f' or not np.isfinite(array).all():
    raise ValueError(f'{name} holds something else than finite numbers')
  array = np.float32(array)
  if last == 'weight':
    return array.transpose(2, 3, 1, 0)
  return array if array.ndim == 1 else np.moveaxis(array[0], 0, -1)


def _sources(like, network) -> dict[tuple[str, ...], tuple[list[str], Any]]:
  """By the way to each array: their names of its blocks, and its shape."""
  found = {}

  def conv(way, names):
    leaves = like
    for key in way:
      leaves = leaves[key]
    for ours, theirs in (('w', 'weight'), ('b', 'bias')):
      found[*way, ours] = [f'{name}.{theirs}' for name in names], leaves[ours]

  def block(way, names):
    for part in ('c1', 'c2', 'c3', 'c4'):
      conv((*way, part), [f'{name}.{part}' for name in names])

  conv(('input',), ['encoder.in_conv'])
  conv(('output',), ['decoder.out_net.out_conv'])
  for kind, blocks in (('encoder', 'enc_blocks'), ('decoder', 'dec_blocks')):
    done = 0
    for i, stage in enumerate(getattr(network, kind)):
      numbers = range(done, done + stage.count)
      names = [f'{kind}.{blocks}.{number}' for number in numbers]
      done += stage.count
      if kind == 'encoder':
        block((kind, str(i)), names)
        continue
      for ours, theirs in _DECODER.items():
        make = conv if ours == 'latent' else block
        make((kind, str(i), ours), [f'{name}.{theirs}' for name in names])
  for i, size in enumerate(sorted(like['maps'], key=int)):
    found['maps', size] = [f'decoder.bias_xs.{i}'], like['maps'][size]
  for name in ('gain', 'bias'):
    found[name,] = [f'decoder.{name}'], like[name]
  return found
