"""Checkpoints: those a run resumes from, and files of parameters in all formats."""

import hashlib
import io
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from jaxrobust import parallel, pickles
from jaxrobust import workdir as workdirs
from jaxrobust.errors import UserError
from jaxrobust.models import architecture, download, pytorch, safetensors, zoo

SUFFIXES = ('.npy', '.pt', '.pth', '.safetensors')


class Checkpoints:
  """The checkpoints of a run, in `workdir/checkpoints`.

  Keeps the last few and the one with the best score. Arrays are saved unreplicated,
  as numpy, by the one process that writes: a run resumes on any number of devices and
  processes, and none waits in here for another, whose disk may be full. Saving is
  asynchronous; a checkpoint counts once it is whole.
  """

  def __init__(self, folder: epath.Path, keep: int):
    """Opens the checkpoints.

    Args:
      folder: the workdir.
      keep: how many of the last checkpoints to keep.

    Raises:
      UserError: if the score of every checkpoint is damaged.
    """
    policies = ocp.checkpoint_managers
    score = lambda metrics: metrics['score']
    folder = epath.Path(folder).absolute() / 'checkpoints'
    if parallel.is_writer():
      folder.mkdir(parents=True, exist_ok=True)
      _set_aside_damaged(folder)
    parallel.barrier('checkpoints')
    here = parallel.number()
    self._manager = ocp.CheckpointManager(
      folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
          [
            policies.LatestN(keep),
            policies.BestN(
              get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False
            ),
          ]
        ),
        best_fn=score,
        best_mode='max',
        cleanup_tmp_directories=parallel.is_writer(),
        create=False,
        read_only=not parallel.is_writer(),
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=here,
          active_processes={here},
          barrier_sync_key_prefix=f'process-{here}',
        ),
      ),
    )

  def save(self, step: int, state, score: float | None = None):
    """Saves the state after `step` updates (a tree of numpy arrays).

    Args:
      step: completed updates.
      state: the unreplicated state.
      score: higher is better; None when it was not evaluated.
    """
    if not parallel.is_writer():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        digest=ocp.args.JsonSave({'sha256': _digest(state)}),
      ),
      metrics=None if score is None else {'score': score},
    )

  def restore(self, like, step: int | None = None):
    """The state at `step`, or at the last checkpoint that can be read.

    Args:
      like: a state of the same structure and shapes.
      step: completed updates at the best, for the process that writes alone; None for
        the last.

    Returns:
      The state as numpy arrays, or None if there is no checkpoint.

    Raises:
      UserError: if there are checkpoints, and none of them can be read; or if the
        processes do not find the same ones.
    """
    template = jax.tree.map(np.asarray, like)
    steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
    if step is None:
      parallel.require_agreement(max(steps, default=-1))
    damaged = []
    for candidate in steps:
      state = self._read(candidate, template)
      if step is None and not parallel.everywhere(state is not None):
        if parallel.everywhere(state is not None or not parallel.is_writer()):
          raise RuntimeError(  # Which a start anew may mend: the file is whole.
            f'only some processes can read the checkpoint of step {candidate}'
          )
        damaged.append(candidate)
      elif state is None:
        break
      else:
        # Else the run could not save these steps again when it comes by them.
        if damaged and parallel.is_writer():
          for unreadable in damaged:
            _set_aside(self._manager.directory / str(unreadable))
          self._manager.reload()
        return jax.tree.map(np.asarray, state)
    if step is not None:
      raise UserError(
        f'the checkpoint of step {step}, which is the best, cannot be read: restore '
        f'its folder, or remove {self._manager.directory / str(step)} and run the same '
        'command again, which exports the best of the others'
      )
    if damaged:
      raise UserError(
        f'none of the checkpoints {steps} in {self._manager.directory} can be read: '
        'use another --workdir to start anew'
      )
    return None

  def _read(self, step: int, template):
    """The state of a step, None if it cannot be read twice."""
    items = {'state': ocp.args.StandardRestore(template)}
    if (self._manager.directory / str(step) / 'digest').exists():  # Older have none.
      items['digest'] = ocp.args.JsonRestore()
    for _ in range(2):  # The first error may be of the network.
      try:
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        if 'digest' in items and found.digest['sha256'] != _digest(found.state):
          raise ValueError('it is not what was saved, by its sha256')
        return found.state
      except (ValueError, OSError, KeyError) as e:
        logging.warning(
          'the checkpoint of step %d cannot be read: %s',
          step,
          (str(e) or repr(e)).splitlines()[0][:200],
        )
    return None

  def best_step(self) -> int | None:
    """Completed updates at the checkpoint of the highest score, None without one."""
    return self._manager.best_step()

  def wait(self):
    """Waits until what was saved is on disk."""
    self._manager.wait_until_finished()

  def close(self):
    """Waits and releases the folder."""
    self._manager.close()


def _digest(tree) -> str:
  """Of all arrays: tensorstore gives a flipped bit of a number back as it is."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _set_aside_damaged(folder: epath.Path):
  """Renames checkpoints whose score cannot be read, at which orbax would fail."""
  steps = [path for path in folder.iterdir() if path.name.isdigit()]
  damaged = [path for path in steps if not _has_whole_score(path)]
  if damaged and len(damaged) == len(steps):
    raise UserError(
      f'the score of every checkpoint in {folder} is damaged: restore the files '
      'metrics/metrics, or use another --workdir to start anew'
    )
  for path in damaged:
    logging.warning('the score of %s is damaged', path)
    _set_aside(path)


def _set_aside(step: epath.Path):
  """Renames a checkpoint, which may be of use still; orbax does not see it then."""
  aside = step.with_name(f'damaged-{step.name}')
  if aside.exists():
    aside.rmtree()
  step.rename(aside)
  logging.warning('%s is now %s', step, aside)


def _has_whole_score(step: epath.Path) -> bool:
  """Whether the file of a checkpoint's score, if there is one, can be read."""
  try:
    json.loads((step / 'metrics' / 'metrics').read_bytes())['score']
  except FileNotFoundError:  # It was not evaluated.
    return True
  except (ValueError, KeyError, TypeError):
    return False
  return True


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
