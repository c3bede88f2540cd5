"""NVIDIA's names and layouts of EDM's networks, as ours."""

import os
import re

import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, nvidia_pickles

LICENCE = 'CC BY-NC-SA 4.0 of NVIDIA (not for commercial use)'
_KEY = 'ema'  # of the averaged network in a file
_FREQUENCIES = 'model.map_noise.freqs'
_FILTER = 'resample_filter'  # follows from the architecture
_MAP = re.compile(r'model\.(map_\w+)\.(weight|bias)')
_LAYER = re.compile(r'model\.(enc|dec)\.(\w+)\.(\w+)\.(weight|bias)')
_SINGLE = re.compile(r'model\.(enc|dec)\.(\w+)\.(weight|bias)')


def read(path: str | os.PathLike) -> dict[str, dict[str, np.ndarray]]:
  """The parameters in a file that NVIDIA released, or that their code wrote.

  Args:
    path: of the `.pkl` file.

  Returns:
    Those of `network.UNet`, with the numbers of the file to the bit.

  Raises:
    UserError: as of `nvidia_pickles.read`, or for a network of another kind.
  """
  params = {}
  for name, value in nvidia_pickles.read(path, _KEY).items():
    if name.endswith(f'.{_FILTER}'):
      continue
    if value.dtype != np.float32:
      raise UserError(
        f'{path}: {arrays.printable(name)[:80]} is {value.dtype}; floats of 32 bits '
        'are expected: give a file as NVIDIA released it'
      )
    if name == _FREQUENCIES:
      module, key = 'unet', 'frequencies'
    else:
      module, key, value = _rename(path, name, value)
    params.setdefault(module, {})[key] = value
  return params


def _rename(path, name, value):
  """(module, name in it, value in our layout)."""
  if found := _MAP.fullmatch(name):
    module, kind = found[1], found[2]
  elif found := _LAYER.fullmatch(name):
    module, kind = f'{found[1]}_{found[2]}/{found[3]}', found[4]
  elif found := _SINGLE.fullmatch(name):
    module, kind = f'{found[1]}_{found[2]}', found[3]
    if module.endswith('_aux_residual'):
      module += '/conv'
  else:
    raise UserError(
      f'{path} is of another network than DDPM++ and NCSN++: it has '
      f'{arrays.printable(name)[:80]}'
    )
  if 'norm' in module.rpartition('/')[2]:
    return f'unet/{module}', {'weight': 'scale', 'bias': 'offset'}[kind], value
  if module.endswith('/qkv'):  # Theirs are ordered by channel, then q, k and v.
    value = value.reshape(-1, 3, *value.shape[1:]).swapaxes(0, 1)
    value = value.reshape(-1, *value.shape[2:])
  if kind == 'bias':
    return f'unet/{module}', 'b', value
  if value.ndim == 4 and value.shape[2:] == (1, 1):
    value = value[:, :, 0, 0]
  axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(value.ndim)
  if axes is None:
    raise UserError(
      f'{path}: {arrays.printable(name)[:80]} has shape {list(value.shape)}, and no '
      'layer of such a network has: give a file as NVIDIA released it'
    )
  return f'unet/{module}', 'w', value.transpose(axes)
