"""Files of parameters and BatchNorm state, in all formats."""

import io
import re
from typing import Any, BinaryIO

import jax
import numpy as np
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, pickles
from jaxrobust.models import (
  Model,
  architecture,
  companions,
  download,
  pytorch,
  safetensors,
  zoo,
)
from jaxrobust.runs import checkpoints
from jaxrobust.runs import workdir as workdirs

SUFFIXES = ('.npy', '.pt', '.pth', '.safetensors')

_MAX_BYTES = 2**34  # of a file; the largest released one has 1.7 GB
_MAX_ARRAYS = 2**16  # in parameters or state; the largest released ones have some 500
_MAX_NAME = 200
# Of a `.npy` file of two objects.
_HEADER = re.compile(
  rb"{'descr': '\|O[48]?', 'fortran_order': (True|False), 'shape': \(2L?,\), } *\n?"
)


def export_npy(path: epath.Path, params: Any, net_state: Any) -> None:
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


def import_npy(path: str) -> tuple[Any, Any]:
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
    with arrays.open_file(file) as f:
      _skip_header(f)
      content = pickles.ArrayUnpickler(f).load()
    if type(content) is not list or len(content) != 2:
      raise ValueError('it holds no pair')
  except UserError:
    raise
  except ValueError as e:
    raise UserError(
      f'{file} is not a checkpoint of (parameters, state): {e}; fetch or make it again'
    ) from e
  for tree in content:
    _check_tree(tree, file)
  params, net_state = content
  return params, net_state


def _skip_header(file: BinaryIO):
  """Reads up to the pickle of a pair of objects; ValueError if there is none."""
  start = file.read(8)
  width = {b'\1\0': 2, b'\2\0': 4, b'\3\0': 4}.get(start[6:])
  if start[:6] != b'\x93NUMPY' or width is None:
    raise ValueError('it does not begin as a .npy file')
  length = int.from_bytes(file.read(width), 'little')
  if length > 2**12 or not _HEADER.fullmatch(file.read(length)):
    raise ValueError('its header is not that of two objects')


def _check_tree(tree, file):
  """Refuses what is not a dictionary of dictionaries of numbers."""
  is_named = lambda x: (
    type(x) is dict
    and all(
      type(key) is str and len(key) <= _MAX_NAME and key.isprintable() for key in x
    )
  )
  if (
    not is_named(tree)
    or not all(type(leaves) is dict for leaves in tree.values())
    # Before they are looked at: one may stand there many times.
    or sum(map(len, tree.values())) > _MAX_ARRAYS
    or not all(
      is_named(leaves)
      and all(isinstance(x, np.ndarray | np.generic) for x in leaves.values())
      for leaves in tree.values()
    )
  ):
    kinds = {type(x).__name__ for x in tree.values()} if type(tree) is dict else ()
    what = f'a dictionary of {", ".join(sorted(kinds)[:4])}'
    raise UserError(
      f'{file} holds something else than dictionaries of numbers by module and name: '
      f'{what if kinds else type(tree).__name__}'
    )


def export(
  path: epath.Path, params: Any, net_state: Any, metadata: dict[str, str]
) -> None:
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


def read(path: str) -> tuple[Any, Any]:
  """Reads parameters and BatchNorm state from a file of any format, or a workdir.

  The first time that a released checkpoint is read its checksum is noted beside it,
  and from then on compared.

  Args:
    path: of a file that ends in one of SUFFIXES, or of a workdir that holds a
      `checkpoint.npy`; WORKDIR@STEP is the averages after so many updates of a run.

  Returns:
    (params, net_state), Haiku trees of numpy arrays.

  Raises:
    UserError: if the file is absent, damaged, of no known format or network, not
      harmless, or not the one that was read before.
  """
  file = epath.Path(path).expanduser()
  workdir, step = zoo.split_step(file)
  if step is not None:
    state = checkpoints.read_step(workdir, step)
    if 'ema_params' not in state:
      raise UserError(f'{workdir} holds the run of a generator, and no classifier')
    return companions.without(state['ema_params']), companions.without(
      state['ema_net_state']
    )
  file = _existing(file / workdirs.CHECKPOINT if file.is_dir() else file)
  if file.suffix not in SUFFIXES:
    raise UserError(f'{file}: the name must end in one of {", ".join(SUFFIXES)}')
  try:
    if file.stem in zoo.ENTRIES:
      download.compare_checksum(file)
    if file.suffix == '.npy':
      return import_npy(file)
    reader = safetensors if file.suffix == '.safetensors' else pytorch
    with arrays.open_file(file) as f:
      if (size := f.seek(0, 2)) > _MAX_BYTES:
        raise UserError(
          f'{file} has {size} bytes; checkpoints of more than {_MAX_BYTES} are not read'
        )
      f.seek(0)
      raw = f.read()
    return reader.read(raw, str(file))
  except OSError as e:
    raise UserError(f'{file} cannot be read ({e.strerror or e})') from e
  except MemoryError as e:
    raise UserError(f'{file} needs more memory than there is') from e


def load(path: str, model: Model) -> tuple[Any, Any]:
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


def check_fits(path: str, found: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
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
  file = epath.Path(path).expanduser()
  if not file.exists():
    raise UserError(f'no checkpoint at {file}: {zoo.where_to_get(file)}')
  return file
