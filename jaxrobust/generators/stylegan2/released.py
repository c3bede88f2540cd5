"""NVIDIA's names and layouts of the generator of StyleGAN2, as ours."""

import os
import re

import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, nvidia_pickles

LICENCE = "NVIDIA's licence of their source code (not for commercial use)"
_KEY = 'G_ema'  # of the averaged generator in a file
_MEAN = 'mapping.w_avg'
# Filters follow from the architecture; noise is drawn for each sample.
_LEFT_OUT = ('resample_filter', 'noise_const')
_CONSTANT = 'synthesis.b4.const'
_MAPPING = re.compile(r'mapping\.(embed|fc\d+)\.(weight|bias)')
_LAYER = re.compile(
  r'synthesis\.(b\d+)\.(conv0|conv1|torgb)\.(affine\.)?(weight|bias|noise_strength)'
)
_LEAVES = {'weight': 'w', 'bias': 'b'}


def read(path: str | os.PathLike) -> dict:
  """The averaged generator in a file that NVIDIA released, or that their code wrote.

  Args:
    path: of the `.pkl` file.

  Returns:
    Variables of `StyleGAN2`, with the numbers of the file to the bit.

  Raises:
    UserError: as of `nvidia_pickles.read`, or for a network of another kind.
  """
  parts = {'mapping': {}, 'synthesis': {}}
  mean = None
  for name, value in nvidia_pickles.read(path, _KEY).items():
    if name.endswith(_LEFT_OUT):
      continue
    if value.dtype != np.float32:
      raise UserError(
        f'{path}: {arrays.printable(name)[:80]} is {value.dtype}; floats of 32 bits '
        'are expected: give a file as NVIDIA released it'
      )
    if name == _MEAN:
      mean = value
    else:
      part, module, key, value = _rename(path, name, value)
      parts[part].setdefault(module, {})[key] = value
  if mean is None:
    raise UserError(
      f'{path} lacks {_MEAN}: give a file of stylegan2-ada-pytorch as NVIDIA released '
      'it'
    )
  return {**parts, 'style_mean': mean}


def _rename(path, name, value):
  """(network, module, name in it, value in our layout)."""
  if name == _CONSTANT:
    return 'synthesis', '~', 'b4_const', _arranged(path, name, value, {3: (1, 2, 0)})
  if found := _MAPPING.fullmatch(name):
    part, module, kind, leaf = 'mapping', found[1], '', found[2]
  elif found := _LAYER.fullmatch(name):
    part, module, kind, leaf = 'synthesis', f'{found[1]}_{found[2]}', found[2], found[4]
    if found[3]:
      module, kind = f'{module}/style', ''
  else:
    raise UserError(
      f'{path} is of another network than the generator of StyleGAN2 (its skip '
      f'architecture): it has {arrays.printable(name)[:80]}'
    )
  if leaf == 'weight':
    axes = {4: (2, 3, 1, 0)} if kind else {2: (1, 0)}
    value = _arranged(path, name, value, axes)
  if leaf == 'weight' and kind == 'conv0':
    value = value[::-1, ::-1]  # They convolve there, and correlate elsewhere.
  return part, module, _LEAVES.get(leaf, leaf), value


def _arranged(path, name, value, axes):
  """The value with its axes in our order, by their number."""
  if value.ndim not in axes:
    raise UserError(
      f'{path}: {arrays.printable(name)[:80]} has shape {list(value.shape)}, and no '
      'layer of such a network has: give a file as NVIDIA released it'
    )
  return value.transpose(axes[value.ndim])
