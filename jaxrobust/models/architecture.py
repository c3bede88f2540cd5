"""Which network parameters belong to, read from their names and shapes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.errors import UserError

# Haiku's name of a network → its first layer, by which files are recognised.
FIRST_LAYERS = {'wide_res_net': 'init_conv', 'preact_res_net': 'conv_2d'}
_MAX_BLOCKS = (models.MAX_DEPTH - 4) // 6


class Architecture(NamedTuple):
  """What follows from the parameters of a network.

  The size of the images is not among it: the networks average over whatever map is
  left, so the same parameters take images of any size.

  Attributes:
    name: as in `models.build`.
    num_classes: K.
    channels: of the images.
  """

  name: str
  num_classes: int
  channels: int

  def __str__(self):
    plural = 's' * (self.channels > 1)
    return f'{self.name}, {self.num_classes} classes, {self.channels} channel{plural}'


class Mismatch(NamedTuple):
  """A leaf that is not as wanted; a shape is None where there is no such leaf."""

  module: str
  leaf: str
  found: tuple[int, ...] | None
  wanted: tuple[int, ...] | None


def infer(params: Mapping, source: str) -> Architecture:
  """The architecture that parameters were made for.

  Only what distinguishes networks is looked at; `mismatch` compares the rest.

  Args:
    params: Haiku parameters, or their shapes.
    source: whose they are, for messages.

  Raises:
    UserError: if they are of no network of this package.
  """
  first = {f'{family}/~/{layer}': family for family, layer in FIRST_LAYERS.items()}
  stem = next((module for module in first if module in params), None)
  if stem is None:
    # Names are not guessed from the order of shapes: a block has two layers of one
    # shape, and exchanged they would give a network that runs, and is wrong.
    names = ', '.join(name[:80] for name in sorted(params)[:2]) or 'nothing'
    raise UserError(
      f'{source} has {names} … for names, and neither '
      f'network here has: they start with {" or ".join(first)}; if there is a .pt of '
      'it, take that, whose names are known; a network of your own stays in its '
      'workdir, which stands for it wherever a checkpoint is asked for'
    )
  family = first[stem]
  shape = lambda module: _shape(params, module, source)
  channels, num_classes = shape(stem)[-2], shape(f'{family}/~/logits')[-1]
  if family == 'preact_res_net':
    return Architecture('preact-resnet-18', num_classes, channels)
  group = f'{family}/~/resnet_lay_0_block_'
  blocks = {m.removeprefix(group).split('/')[0] for m in params if m.startswith(group)}
  width = shape(f'{group}0/~/conv_0')[-1] // 16
  if len(blocks) > _MAX_BLOCKS or not width:
    raise UserError(
      f'{source} has {len(blocks)} blocks of {width} times 16 channels in its first '
      f'group: networks of at most {_MAX_BLOCKS} blocks a group are known here'
    )
  return Architecture(f'wrn-{6 * len(blocks) + 4}-{width}', num_classes, channels)


def template(architecture: Architecture) -> tuple[Any, Any]:
  """Shapes of (params, net_state) of a network, as jax.ShapeDtypeStruct.

  Raises:
    UserError: if there is no network of that name.
  """
  channels = architecture.channels
  model = models.build(
    architecture.name,
    num_classes=architecture.num_classes,
    image_shape=(32, 32, channels),
    activation='swish',
    mean=(0.0,) * channels,
    std=(1.0,) * channels,
    padding=0,
    group_size=None,
  )
  return jax.eval_shape(model.init, jax.random.key(0))


def mismatch(found: Any, wanted: Any) -> Mismatch | None:
  """The first leaf, by name, that two Haiku trees do not share with its shape.

  What is absent comes first: of a renamed layer the name is given that it should have.

  Args:
    found, wanted: of parameters or state; arrays or shapes.
  """
  found, wanted = _leaves(found), _leaves(wanted)
  by_absence = lambda name: (name in found, name)
  for name in sorted(set(found) | set(wanted), key=by_absence):
    if found.get(name) != wanted.get(name):
      return Mismatch(*name, found.get(name), wanted.get(name))
  return None


def _shape(params, module, source):
  """The shape of a module's `w`, which must be a kernel or a matrix."""
  leaves = params.get(module)
  shape = np.shape(leaves['w']) if isinstance(leaves, Mapping) and 'w' in leaves else ()
  if len(shape) < 2:
    raise UserError(f'{source} is not whole: {module}/w is absent, or not a kernel')
  return shape


def _leaves(tree) -> dict[tuple[str, str], tuple[int, ...]]:
  """(module, leaf) → shape; a module may be an array, in a file of somebody else."""
  return {
    (module, leaf): np.shape(value)
    for module, leaves in tree.items()
    for leaf, value in (
      leaves.items() if isinstance(leaves, Mapping) else [('', leaves)]
    )
  }
