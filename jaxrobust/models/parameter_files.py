"""Files of parameters and BatchNorm state, in all formats."""

import io

import jax
import numpy as np
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.files import pickles
from jaxrobust.models import architecture, download, pytorch, safetensors, zoo
from jaxrobust.runs import workdir as workdirs

SUFFIXES = ('.npy', '.pt', '.pth', '.safetensors')


def export_npy(path: epath.Path, params, net_state):
  """Writes parameters and BatchNorm state in the authors' released format.

  Args:
    path: of the file, usually `checkpoint.npy`.
    params, net_state: Haiku trees of arrays.
  """
  numpy = lambda tree: jax.tree.map(np.asarray, tree)
  pair = np.empty(2, dtype=object)
  pair[0], pair[1] = numpy(params), numpy(net_state)
  buffer = io.BytesIO()
  np.save(buffer, pair, allow_pickle=True)
  workdirs.write(path, buffer.getvalue())


def import_npy(path: str):
  """Reads parameters and BatchNorm state from a file in the authors' format.

  A pickle can name any function for the reader to call, so this one builds arrays and
  containers only, and refuses everything else.

  Args:
    path: of the file, local or `gs://`.

  Returns:
    (params, net_state), Haiku trees of numpy arrays.

  Raises:
    UserError: if the file is absent, damaged, not of this format, or not harmless.
  """
  file = _existing(path)
  try:
    buffer = io.BytesIO(file.read_bytes())
    version = np.lib.format.read_magic(buffer)
    read_header = (
      np.lib.format.read_array_header_1_0
      if version == (1, 0)
      else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read_header(buffer)
    if shape != (2,) or not dtype.hasobject:
      raise ValueError(f'it holds an array {shape} of {dtype}')
    params, net_state = pickles.ArrayUnpickler(buffer).load()
  except Exception as e:  # Whatever a damaged header or pickle may raise.
    raise UserError(f'{file} is not a checkpoint of (parameters, state): {e}') from e
  for tree in (params, net_state):
    if (
      not isinstance(tree, dict)
      or not all(isinstance(module, str) for module in tree)
      or not all(
        isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in 'fiub'
        for leaf in jax.tree.leaves(tree)
      )
    ):
      raise UserError(f'{file} holds something else than dictionaries of numbers')
  return params, net_state


def export(path: epath.Path, params, net_state, metadata: dict[str, str]):
  """Writes parameters and BatchNorm state in the format that the path's ending names.

  Args:
    path: ends in one of SUFFIXES: the authors' Haiku format, a PyTorch state dict
      twice, safetensors.
    params, net_state: Haiku trees of arrays of a network of `models.build`.
    metadata: text, which only safetensors has a place for.

  Raises:
    UserError: for another ending, or `.pt` without PyTorch.
  """
  if path.suffix == '.npy':
    export_npy(path, params, net_state)
  elif path.suffix == '.safetensors':
    workdirs.write(path, safetensors.write(params, net_state, metadata))
  elif path.suffix in SUFFIXES:
    workdirs.write(path, pytorch.write(params, net_state))
  else:
    raise UserError(f'{path}: the name must end in one of {", ".join(SUFFIXES)}')


def read(path: str):
  """Reads parameters and BatchNorm state from a file of any format, or a workdir.

  The first time that a released checkpoint is read its checksum is noted beside it,
  and from then on compared.

  Args:
    path: of a file that ends in one of SUFFIXES, or of a workdir that holds a
      `checkpoint.npy`.

  Returns:
    (params, net_state), Haiku trees of numpy arrays.

  Raises:
    UserError: if the file is absent, damaged, of no known format or network, not
      harmless, or not the one that was read before.
  """
  file = epath.Path(path)
  file = _existing(file / 'checkpoint.npy' if file.is_dir() else file)
  if file.stem in zoo.ENTRIES:
    download.compare_checksum(file)
  if file.suffix == '.npy':
    return import_npy(file)
  if file.suffix == '.safetensors':
    return safetensors.read(file.read_bytes(), str(file))
  if file.suffix in SUFFIXES:
    return pytorch.read(file.read_bytes(), str(file))
  raise UserError(f'{file}: the name must end in one of {", ".join(SUFFIXES)}')


def load(path: str, model):
  """Reads a checkpoint and checks that it is of this network.

  Args:
    path: as of `read`.
    model: of `models.build`.

  Returns:
    (params, net_state), Haiku trees of numpy arrays.

  Raises:
    UserError: as `read`, or if names or shapes are not those of `model`.
  """
  found = read(path)
  check_fits(path, found, jax.eval_shape(model.init, jax.random.key(0)))
  return found


def check_fits(path: str, found, wanted):
  """Refuses parameters and state of another network than the one wanted.

  Args:
    path: whose they are, for the message.
    found: (params, net_state).
    wanted: the same of the network, arrays or shapes.

  Raises:
    UserError: with both architectures, or the first array that differs.
  """
  difference = next(filter(None, map(architecture.mismatch, found, wanted)), None)
  if difference is None:
    return
  are = [architecture.infer(params, str(path)) for params, _ in (found, wanted)]
  detail = (
    f'{difference.module} {difference.leaf} is {difference.found or "absent"} and the '
    f'network has {difference.wanted or "none"}'
  )
  if are[0] != are[1]:
    detail = f'it is of {are[0]}, the network is of {are[1]}'
  raise UserError(
    f'{path} does not fit the network of this config: {detail}; check config.model and '
    'config.dataset'
  )


def _existing(path) -> epath.Path:
  """The path of a file that is there."""
  file = epath.Path(path)
  if not file.exists():
    raise UserError(f'no checkpoint at {file}: {zoo.where_to_get(file)}')
  return file
