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
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, pickles, torch_files
from jaxrobust.models import architecture
from jaxrobust.models.batch_norm import DECAY

_STATISTICS = {'mean_ema': 'running_mean', 'var_ema': 'running_var'}
_COUNT = 'num_batches_tracked'
_NORM = {'weight', 'bias', _COUNT, *_STATISTICS.values()}
# Before all names: of DataParallel, of a compiled network, of wrappers that normalise,
# of torch.nn.Sequential.
_PREFIX = re.compile(r'((module|model|net|_orig_mod|[0-9]+)\.)*')
# Of state dicts inside what was saved; averaged ones first, which are evaluated.
_NESTED = ('model_ema', 'ema', 'model_state_dict', 'state_dict', 'model', 'net')
# Buffers of wrappers that normalise; here they belong to the config.
_NORMALISATION = {'mean': 'mean', 'mu': 'mean', 'std': 'std', 'sigma': 'std'}
_MAX_NAME, _MAX_COUNT = 200, 2**31
_INSTALL = "install PyTorch 2.6 or newer (from a clone: pip install '.[torch]')"


def to_state_dict(params: Any, net_state: Any) -> dict[str, np.ndarray]:
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


def from_state_dict(state: Mapping[str, np.ndarray], source: str) -> tuple[Any, Any]:
  """The inverse of `to_state_dict`; every name and shape is checked.

  Args:
    state: names → arrays. All names may stand behind prefixes of wrappers, such as
      'module.', '_orig_mod.' or '1.', and beside buffers of a normalisation.
    source: whose it is, for messages.

  Returns:
    (params, net_state), Haiku trees of numpy arrays.

  Raises:
    UserError: if names or shapes are not those of one of the networks.
  """
  family, state = _network_alone(state, source)
  modules = {}
  for key, value in state.items():
    module, _, leaf = key.rpartition('.')
    modules.setdefault(module, {})[leaf] = value
  params, net_state = {}, {}
  for name, leaves in modules.items():
    module = _haiku_name(name, family)
    if 'running_mean' in leaves:
      _require(source, name, leaves, _NORM - {_COUNT}, _NORM)
      params[module], statistics = _norm(leaves, f'{source} has {name}.{_COUNT}')
      net_state |= {f'{module}/~/{ema}': x for ema, x in statistics.items()}
    else:
      _require(source, name, leaves, {'weight'}, {'weight', 'bias'})
      params[module] = _linear(leaves)
  _check(params, net_state, source)
  return params, net_state


def read(raw: bytes, source: str) -> tuple[Any, Any]:
  """Reads a `.pt` file; it cannot run code, and PyTorch is not needed.

  Args:
    raw: content of the file: a state dict, or a dict that has one as 'state_dict',
      'model_state_dict', 'model', 'net', 'ema' or 'model_ema'.
    source: its path, for messages.

  Returns:
    (params, net_state), Haiku trees of numpy arrays.

  Raises:
    UserError: if the file is damaged, of another network, or wants to run anything.
  """
  try:
    file = torch_files.TorchFile(io.BytesIO(raw))
    state = _find_state_dict(file.content, source)
    tensors = {
      key: file.array(x) if isinstance(x, torch_files.Tensor) else x
      for key, x in state.items()
    }
  except UserError:
    raise
  except pickles.RefusedError as e:
    raise UserError(
      f'{source} wants to run {e.name}, which is refused: ask whoever made it '
      'for a file with the state dict alone'
    ) from e
  except ValueError as e:
    raise UserError(
      f'{source} is not a whole PyTorch file of plain tensors: {e}'
    ) from e
  return from_state_dict(tensors, source)


def write(params: Any, net_state: Any) -> bytes:
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


def _find_state_dict(content, source) -> dict:
  """The state dict in what was saved: names → tensors or arrays."""
  while type(content) is dict:
    inside = [key for key in _NESTED if type(content.get(key)) is dict]
    if not inside:
      break
    if len(inside) > 1:
      logging.warning(
        '%s holds %s: %s is read', source, arrays.listed(inside), inside[0]
      )
    content = content[inside[0]]
  if type(content) is not dict:
    raise UserError(
      f'{source} holds something else than a state dict of tensors: it is of the type '
      f'{type(content).__name__}'
    )
  tensors = (torch_files.Tensor, np.ndarray)
  found = {key: x for key, x in content.items() if isinstance(x, tensors)}
  numbers = (bool, int, float, np.generic)  # Such as an accuracy beside the tensors.
  others = [k for k, x in content.items() if not isinstance(x, (*tensors, *numbers))]
  if others or not all(type(key) is str for key in content):
    names = arrays.listed(map(str, others or content))
    raise UserError(
      f'{source} holds something else than a state dict of tensors, in {names}; a '
      f'state dict may stand in {", ".join(_NESTED)}'
    )
  return found


def _network_alone(state, source) -> tuple[str, dict[str, np.ndarray]]:
  """Haiku's name of the network, and its arrays under their bare names."""
  if odd := [k for k in state if not k.isprintable() or '/' in k or len(k) > _MAX_NAME]:
    raise UserError(f'{source} has names that no network has: {arrays.listed(odd)}')
  found = {
    (family, prefix[0])
    for family, layer in architecture.FIRST_LAYERS.items()
    for key in state
    if (prefix := _PREFIX.match(key)) and key[prefix.end() :] == f'{layer}.weight'
  }
  if len(found) != 1:
    raise UserError(
      f'{source} is not a state dict of {"one" if found else "a"} WideResNet '
      '(init_conv.weight, …) or PreActResNet (conv_2d.weight, …), whose names may '
      f'stand behind module., model., net., _orig_mod. or 1.: it has '
      f'{arrays.listed(state)}'
    )
  [(family, prefix)] = found
  network, others = {}, []
  for key, value in state.items():
    name = key.rpartition('.')[2]
    if name in _NORMALISATION and np.size(value) <= 16:
      values = np.round(np.ravel(value), 4).tolist()
      field = _NORMALISATION[name]
      logging.warning(
        '%s says %s = %s: compare it with model.%s', source, key, values, field
      )
    elif '.' not in key and not np.ndim(value):
      continue  # A number beside the network, such as the epoch.
    elif key.startswith(prefix):
      network[key.removeprefix(prefix)] = value
    else:
      others.append(key)
  if others:
    raise UserError(
      f'{source} has more than the network under {prefix!r}: {arrays.listed(others)}; '
      'leave it out'
    )
  return family, network


def to_numpy(tensor: Any) -> np.ndarray:
  """A tensor of PyTorch, or what numpy takes, as an array; half precision as single."""
  if hasattr(tensor, 'detach'):
    tensor = tensor.detach().cpu()
    tensor = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
  return np.asarray(tensor)


def logits(module: Any, images: np.ndarray) -> np.ndarray:
  """What a module makes of images, as it infers.

  Args:
    module: of PyTorch, on any device; left in the mode that it is in.
    images: float32 [B, H, W, C] in [0, 1].
  """
  torch = _torch('calling a module of PyTorch')
  some = next(x for x in module.state_dict().values() if x.is_floating_point())
  was_training = module.training
  module.eval()
  try:
    with torch.no_grad():
      return to_numpy(module(torch.from_numpy(images).to(some).permute(0, 3, 1, 2)))
  finally:
    module.train(was_training)


def _pytorch_name(module):
  _, _, name = module.partition('/~/')
  name = re.sub(r'^resnet_lay_(\d+)_block_(\d+)/~/', r'layer.\1.block.\2.', name)
  return re.sub(r'^layer_(\d+)_block_(\d+)/~/', r'layer_\1.\2.', name)


def _haiku_name(name, family):
  name = re.sub(r'^layer\.(\d+)\.block\.(\d+)\.', r'resnet_lay_\1_block_\2/~/', name)
  name = re.sub(r'^layer_(\d+)\.(\d+)\.', r'layer_\1_block_\2/~/', name)
  return f'{family}/~/{name}'


def _norm(leaves, what):
  """Parameters and statistics of a BatchNorm; `what` names its count in messages."""
  wide = lambda x: np.reshape(x, (1, 1, 1, -1))
  count = np.asarray(leaves.get(_COUNT, 0))
  if count.size != 1 or count.dtype.kind not in 'iu' or not 0 <= count < _MAX_COUNT:
    raise UserError(
      f'{what} of {count.dtype} {list(count.shape)}, and one count of batches is '
      'expected there: leave it out, or save the network again'
    )
  counter = count.reshape(()).astype(np.int32)
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
  """Refuses a module with a leaf too few or too many, or of no floats."""
  if wrong := sorted(needed - set(leaves)):
    raise UserError(f'{source} is not whole: {name}.{wrong[0]} is absent')
  if wrong := sorted(set(leaves) - allowed):
    raise UserError(f'{source} has {name}.{wrong[0]}, which its network does not know')
  for leaf, x in leaves.items():
    if leaf != _COUNT and x.dtype.kind != 'f':
      raise UserError(f'{source} has {name}.{leaf} of {x.dtype}; floats are expected')


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
