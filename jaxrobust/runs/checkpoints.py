"""Checkpoints that a run resumes from."""

import hashlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError, one_line
from jaxrobust.files import json_files

_OBJECT, _TIME = (dict, type(None)), (int, type(None))
# What orbax reads of a checkpoint when it lists them.
_DESCRIBED = {
  'item_handlers?': (dict, str, type(None)),
  'metrics?': _OBJECT,
  'performance_metrics?': _OBJECT,
  'init_timestamp_nsecs?': _TIME,
  'commit_timestamp_nsecs?': _TIME,
  'custom_metadata?': _OBJECT,
}


# orbax warns of each checkpoint that has no score, which are most.
logging.get_absl_logger().addFilter(lambda x: 'tracked_metric' not in str(x.msg))


class Layout(NamedTuple):
  """How an earlier version saved the state of a run.

  Attributes:
    like: a state of that structure and those shapes, a NamedTuple.
    convert: from such a state to one of today.
  """

  like: Any
  convert: Callable[[Any], Any]


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
      UserError: if no checkpoint that is there can be read.
    """
    policies = ocp.checkpoint_managers
    score = lambda metrics: metrics['score']
    folder = epath.Path(folder).absolute() / 'checkpoints'
    if parallel.is_writer():
      if folder.exists() and not folder.is_dir():
        raise UserError(f'{folder} is not a folder: move it away')
      folder.mkdir(exist_ok=True)
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

  def save(self, step: int, state: Any, score: float | None = None) -> None:
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
        digest=ocp.args.JsonSave({'sha256': digest(state)}),
      ),
      metrics=None if score is None else {'score': score},
    )

  def restore(
    self, like: Any, step: int | None = None, older: Layout | None = None
  ) -> Any:
    """The state at `step`, or at the last checkpoint that can be read.

    Args:
      like: a state of the same structure and shapes.
      step: completed updates at the best, for the process that writes alone; None for
        the last.
      older: how an earlier version saved it; None if all did as this one.

    Returns:
      The state as numpy arrays, or None if there is no checkpoint.

    Raises:
      UserError: if there are checkpoints, and none of them can be read; or if the
        processes do not find the same ones.
    """
    layouts = [Layout(like, lambda state: state), *([older] if older else [])]
    steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
    if step is None:
      parallel.require_agreement(max(steps, default=-1))
    damaged = []
    for candidate in steps:
      state = self._read(candidate, layouts)
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
            _set_aside(self._manager.directory / str(unreadable), 'cannot be read')
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

  def _read(self, step: int, layouts: list[Layout]):
    """The state of a step, None if it cannot be read twice."""
    items = {}
    if (self._manager.directory / str(step) / 'digest').exists():  # Older have none.
      items['digest'] = ocp.args.JsonRestore()
    for _ in range(2):  # The first error may be of the network.
      try:
        layout = self._layout_of(step, layouts) if layouts[1:] else layouts[0]
        template = jax.tree.map(np.asarray, layout.like)
        items['state'] = ocp.args.StandardRestore(template)
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        if 'digest' in items and found.digest != {'sha256': digest(found.state)}:
          raise ValueError('it is not what was saved, by its sha256')
        return layout.convert(found.state)
      except MemoryError:
        raise
      except Exception as e:  # What orbax raises depends on the file that is damaged.
        logging.warning(
          'the checkpoint of step %d cannot be read: %s',
          step,
          (one_line(e) or repr(e))[:200],
        )
    return None

  def _layout_of(self, step: int, layouts: list[Layout]) -> Layout:
    """The one whose parts are those of the state that was saved; else the first."""
    path = self._manager.directory / str(step) / 'state'
    saved = ocp.StandardCheckpointer().metadata(path).item_metadata  # None if damaged.
    found = set(saved.tree) if saved else set()
    return next((x for x in layouts if set(x.like._fields) == found), layouts[0])

  def best_step(self) -> int | None:
    """Completed updates at the checkpoint of the highest score, None without one."""
    return self._manager.best_step()

  def wait(self) -> None:
    """Waits until what was saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and releases the folder."""
    self._manager.close()


def read_step(workdir: epath.Path, step: int) -> dict:
  """What a run saved after `step` updates, without opening it to go on.

  Args:
    workdir: of the run.
    step: completed updates.

  Returns:
    Nested dicts of numpy arrays, under the names of the state's fields.

  Raises:
    UserError: if there is no such checkpoint, with those that there are, or it cannot
      be read.
  """
  folder = epath.Path(workdir).absolute() / 'checkpoints'
  saved = folder / str(step) / 'state'
  if not saved.exists():
    steps = sorted(int(x.name) for x in folder.glob('*') if x.name.isdecimal())
    raise UserError(
      f'{workdir} has no checkpoint of step {step}: '
      f'{f"it has those of {steps}" if steps else "it has none"}'
    )
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return jax.tree.map(np.asarray, checkpointer.restore(saved))
  except MemoryError:
    raise
  except Exception as e:  # What orbax raises depends on the file that is damaged.
    raise UserError(f'{saved} cannot be read: {(one_line(e) or repr(e))[:200]}') from e


def digest(tree: Any) -> str:
  """The sha256 of all arrays: tensorstore does not notice a flipped bit of a number."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _set_aside_damaged(folder: epath.Path):
  """Renames what orbax would take for a checkpoint, and fail at."""
  steps = [path for path in folder.iterdir() if path.name.isdigit()]
  faults = {path: fault for path in steps if (fault := _fault(path))}
  if faults and len(faults) == len(steps):
    path, fault = min(faults.items())
    raise UserError(
      f'every checkpoint in {folder} is damaged ({path} {fault}): restore the files, '
      'or use another --workdir to start anew'
    )
  for path, fault in faults.items():
    _set_aside(path, fault)
  for path in set(steps) - set(faults):
    described = path / '_CHECKPOINT_METADATA'
    try:
      if described.exists():
        json_files.check(json_files.read(described), str(described), _DESCRIBED)
    except UserError:  # orbax can do without it.
      _set_aside(described, 'is damaged')


def _set_aside(path: epath.Path, fault: str):
  """Renames what may be of use still; orbax does not see it then."""
  names = (path.with_name(f'damaged{i}-{path.name}') for i in itertools.count(2))
  names = itertools.chain([path.with_name(f'damaged-{path.name}')], names)
  aside = next(name for name in names if not name.exists())
  path.rename(aside)
  logging.warning('%s %s: it is now %s', path, fault, aside)


def _fault(step: epath.Path) -> str:
  """What makes a checkpoint one that cannot be listed, '' if nothing does."""
  if not step.name.isdecimal() or step.name != str(int(step.name)):
    return 'has a name that no step has'
  if not step.is_dir():
    return 'is not a folder'
  score = step / 'metrics' / 'metrics'
  if not (step / 'metrics').exists():  # It was not evaluated.
    return ''
  try:
    json_files.check(json_files.read(score), str(score), {'score': float})
  except UserError:
    return 'has a damaged score'
  return ''
