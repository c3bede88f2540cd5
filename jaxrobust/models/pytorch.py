"""Parameters in PyTorch's names and layouts: those of the authors and RobustBench.

The names are those of the authors' WideResNet and PreActResNet (deepmind-research,
adversarial_robustness/pytorch), which RobustBench calls DMWideResNet, DMPreActResNet:

  Haiku                                          PyTorch
  wide_res_net/~/resnet_lay_1_block_0/~/conv_0   layer.1.block.0.conv_0
  preact_res_net/~/layer_1_block_0/~/conv_2d_1   layer_1.0.conv_2d_1
  wide_res_net/~/logits                          logits
  w of a convolution [kh, kw, in, out]           weight [out, in, kh, kw]
  w of a linear layer [in, out]                  weight [out, in]
  scale, offset [1, 1, 1, C]                     weight, bias [C]
  mean_ema, var_ema: average [1, 1, 1, C]        running_mean, running_var [C]
  counter of both                                num_batches_tracked

Haiku's state has one array more, the running sum before its bias is removed. It follows
from average and counter up to rounding, and only training goes on from it.

One convention differs. In the first block of each group the Haiku network projects the
activated input for the shortcut; the PyTorch one does so where the number of channels
changes, and else adds the raw input. They agree unless the width is 1, with 16 channels
before and after. Such a network is written with its projection, under the name it would
have, and one without it cannot be read: no projection gives the raw input back.
"""

import io
import pickle
import re
from collections.abc import Mapping

import numpy as np
from absl import logging

from jaxrobust.errors import UserError
from jaxrobust.models import architecture
from jaxrobust.models.batch_norm import DECAY

_STATISTICS = {'mean_ema': 'running_mean', 'var_ema': 'running_var'}
_COUNT = 'num_batches_tracked'
_NORM = {'weight', 'bias', _COUNT, *_STATISTICS.values()}
_PREFIXES = ('module.', 'model.')  # of DataParallel, and of RobustBench's wrappers
_NESTED = ('model_state_dict', 'state_dict')
_INSTALL = "install PyTorch 2.6 or newer (from a clone: pip install -e '.[torch]')"


def to_state_dict(params, net_state) -> dict[str, np.ndarray]:
  """Haiku parameters and state as a PyTorch state dict of numpy arrays.

  Args:
    params, net_state: of a network of `models.build`.

  Returns:
    Names → arrays; views where only the layout differs.
  """
  state = {}
  for module, leaves in params.items():
    name = _pytorch_name(module)
    if 'scale' in leaves:
      state[f'{name}.weight'] = np.reshape(leaves['scale'], -1)
      state[f'{name}.bias'] = np.reshape(leaves['offset'], -1)
      for ema, statistic in _STATISTICS.items():
        average = net_state[f'{module}/~/{ema}']['average']
        state[f'{name}.{statistic}'] = np.reshape(average, -1)
      counter = net_state[f'{module}/~/mean_ema']['counter']
      state[f'{name}.{_COUNT}'] = np.asarray(counter, np.int64)
    else:
      weight = np.asarray(leaves['w'])
      state[f'{name}.weight'] = (
        weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T
      )
      if 'b' in leaves:
        state[f'{name}.bias'] = np.asarray(leaves['b'])
  return state


def from_state_dict(state: Mapping[str, np.ndarray], source: str):
  """The inverse of `to_state_dict`; every name and shape is checked.

  Args:
    state: names → arrays; all of them may start with 'module.' or 'model.'.
    source: whose it is, for messages.

  Returns:
    (params, net_state), Haiku trees of numpy arrays.

  Raises:
    UserError: if names or shapes are not those of one of the networks.
  """
  for prefix in _PREFIXES:
    if state and all(key.startswith(prefix) for key in state):
      state = {key.removeprefix(prefix): value for key, value in state.items()}
  state = dict(state)
  for name in ('mean', 'std'):
    if name in state:  # Buffers of some versions; here they belong to the config.
      values = np.round(np.ravel(state.pop(name)), 4).tolist()
      logging.warning(
        '%s says %s = %s: compare it with model.%s', source, name, values, name
      )
  family = next(
    (f for f, first in architecture.FIRST_LAYERS.items() if f'{first}.weight' in state),
    None,
  )
  if family is None:
    raise UserError(
      f'{source} is not a state dict of WideResNet (init_conv.weight, …) or '
      f'PreActResNet (conv_2d.weight, …): it has {", ".join(list(state)[:2]) or "none"}'
    )
  modules = {}
  for key, value in state.items():
    module, _, leaf = key.rpartition('.')
    modules.setdefault(module, {})[leaf] = value
  params, net_state = {}, {}
  for name, leaves in modules.items():
    module = _haiku_name(name, family)
    if 'running_mean' in leaves:
      _require(source, name, leaves, _NORM - {_COUNT}, _NORM)
      params[module], statistics = _norm(leaves)
      net_state |= {f'{module}/~/{ema}': x for ema, x in statistics.items()}
    else:
      _require(source, name, leaves, {'weight'}, {'weight', 'bias'})
      params[module] = _linear(leaves)
  _check(params, net_state, source)
  return params, net_state


def read(raw: bytes, source: str):
  """Reads a `.pt` file; it cannot run code.

  Args:
    raw: content of the file: a state dict, or a dict that has one as
      'model_state_dict' or 'state_dict'.
    source: its path, for messages.

  Returns:
    (params, net_state), Haiku trees of numpy arrays.

  Raises:
    UserError: without PyTorch; if the file is damaged, of another network, or wants
      to run anything.
  """
  torch = _torch(f'{source} is a PyTorch file')
  try:
    content = torch.load(io.BytesIO(raw), map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as e:
    if culprit := re.search(r'GLOBAL (\S+)', str(e)):
      raise UserError(
        f'{source} wants to run {culprit[1]}, which is refused: from who made it, ask '
        'for a file with the state dict alone'
      ) from e
    raise _damaged(source, e) from e
  except Exception as e:  # Its readers raise whatever a damaged file makes them.
    raise _damaged(source, e) from e
  for key in _NESTED:
    if isinstance(content, dict) and isinstance(content.get(key), dict):
      content = content[key]
  if not isinstance(content, dict) or not all(
    isinstance(key, str) and isinstance(x, torch.Tensor) for key, x in content.items()
  ):
    raise UserError(f'{source} holds something else than a state dict of tensors')
  # Half precision becomes single without loss.
  half = (torch.float16, torch.bfloat16)
  arrays = {
    key: (x.float() if x.dtype in half else x).detach().numpy()
    for key, x in content.items()
  }
  return from_state_dict(arrays, source)


def write(params, net_state) -> bytes:
  """The content of a `.pt` file: a state dict of tensors, see `to_state_dict`.

  Raises:
    UserError: without PyTorch.
  """
  torch = _torch('writing a PyTorch file')
  state = to_state_dict(params, net_state)
  # A copy that torch may own: those of jax are read-only.
  tensors = {key: torch.from_numpy(np.array(x, order='C')) for key, x in state.items()}
  buffer = io.BytesIO()
  torch.save(tensors, buffer)
  return buffer.getvalue()


def _pytorch_name(module):
  _, _, name = module.partition('/~/')
  name = re.sub(r'^resnet_lay_(\d+)_block_(\d+)/~/', r'layer.\1.block.\2.', name)
  return re.sub(r'^layer_(\d+)_block_(\d+)/~/', r'layer_\1.\2.', name)


def _haiku_name(name, family):
  name = re.sub(r'^layer\.(\d+)\.block\.(\d+)\.', r'resnet_lay_\1_block_\2/~/', name)
  name = re.sub(r'^layer_(\d+)\.(\d+)\.', r'layer_\1_block_\2/~/', name)
  return f'{family}/~/{name}'


def _norm(leaves):
  """Parameters and statistics of a BatchNorm."""
  wide = lambda x: np.reshape(x, (1, 1, 1, -1))
  counter = np.asarray(leaves.get(_COUNT, 0), np.int32)
  # Haiku's average is the sum divided by this, in the precision of the sum.
  debias = 1 - np.power(np.float32(DECAY), counter, dtype=np.float32)
  statistics = {}
  for ema, statistic in _STATISTICS.items():
    average = wide(leaves[statistic])
    statistics[ema] = {
      'counter': counter,
      'hidden': (average * debias).astype(average.dtype),
      'average': average,
    }
  return {'scale': wide(leaves['weight']), 'offset': wide(leaves['bias'])}, statistics


def _linear(leaves):
  """Parameters of a convolution or a linear layer."""
  weight = leaves['weight']
  found = {'w': weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T}
  return found | ({'b': leaves['bias']} if 'bias' in leaves else {})


def _require(source, name, leaves, needed, allowed):
  """Refuses a module with a leaf too few or too many."""
  if wrong := sorted(needed - set(leaves)):
    raise UserError(f'{source} is not whole: {name}.{wrong[0]} is absent')
  if wrong := sorted(set(leaves) - allowed):
    raise UserError(f'{source} has {name}.{wrong[0]}, which its network does not know')


def _check(params, net_state, source):
  """Compares with the network that the parameters are of."""
  found = architecture.infer(params, source)
  wanted = architecture.template(found)
  difference = architecture.mismatch(params, wanted[0]) or architecture.mismatch(
    net_state, wanted[1]
  )
  if difference is None:
    return
  name = _pytorch_name(difference.module)
  if found.name.endswith('-1') and name == 'layer.0.block.0.shortcut':
    raise UserError(
      f'{source} has no {name}.weight: with width 1 the PyTorch network adds the raw '
      'input there and the Haiku one a projection of the activated input, so it has no '
      'equal here'
    )
  raise UserError(
    f'{source} does not fit a {found}, which it is by its names: {name} '
    f'{difference.leaf} is {difference.found or "absent"}, the network has '
    f"{difference.wanted or 'none'} (shapes in Haiku's order)"
  )


def _torch(purpose):
  """The package, which is optional."""
  try:
    import torch
  except ImportError as e:
    raise UserError(
      f'{purpose}: {_INSTALL}, or use .safetensors, which needs none'
    ) from e
  return torch


def _damaged(source, error):
  lines = str(error).splitlines() or [repr(error)]
  return UserError(f'{source} is not a whole PyTorch file: {lines[0][:200]}')
