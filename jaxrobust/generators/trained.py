"""Generators whose networks the training loop trains, as it trains classifiers.

Such a generator gives a recipe (see `recipe`) in place of a fit. Its settings have a
part `training` with, beside fields of its own,
  num_steps: iterations;
  batch_size: images in a global batch;
  checkpoint_interval_steps, log_interval_steps: iterations;
  checkpoint_keep: of the last checkpoints;
  early_stopping: whether the fitted variables are those of the best evaluation, by its
    score, in place of the last ones; may be absent.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust.config import dataset_info
from jaxrobust.data import datasets, pipeline
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators.generator import Generator
from jaxrobust.runs import checkpoints, metrics
from jaxrobust.training import loop


class Evaluation(NamedTuple):
  """How a fit is judged while it goes on.

  Attributes:
    interval_steps: iterations between two; the last one is judged too.
    fn: `generator -> (figures, score)` of the generator as it is by then, which every
      process calls; figures by the name under which they are written, and a score of
      which more is better, None where it is to choose nothing.
  """

  interval_steps: int
  fn: Callable[[Generator], tuple[dict[str, float], float | None]]


class Trained(Generator):
  """A generator with networks; `recipe` and `make_draw` are what it must give."""

  @classmethod
  def recipe(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> recipes.Recipe:
    """How it is trained, by settings that were checked."""
    raise NotImplementedError

  @classmethod
  def evaluation(
    cls,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
    real: datasets.Split,
    held_out: dict[str, datasets.Split],
    seed: int,
  ) -> Evaluation | None:
    """How it is judged while it trains; None for not at all. Arguments as of `fit`."""
    del settings, info, real, held_out, seed

  @classmethod
  def older_layout(cls, fresh: recipes.State) -> checkpoints.Layout | None:
    """How earlier versions saved its state, None if all did as this one."""
    del fresh

  @classmethod
  def check_devices(
    cls,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
    num_devices: int,
  ) -> None:
    """Raises UserError if devices and phases cannot share a batch equally."""
    size = settings.training.batch_size
    parts = max(phase.num_parts for phase in cls.recipe(settings, info).phases)
    if size % (num_devices * parts):
      each = f', in {parts} parts on each' if parts > 1 else ''
      raise UserError(
        f'config.generator.training.batch_size: a batch of {size} does not divide over '
        f'{num_devices} devices{each}: use a multiple of {num_devices * parts}'
      )

  @classmethod
  def variables_like(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> Any:
    """Shapes of the variables; see Generator."""
    recipe = cls.recipe(settings, info)
    state = jax.eval_shape(lambda: recipes.init_state(recipe, 0))
    return jax.eval_shape(recipe.variables_fn, state.averaged, state.net_state)

  @classmethod
  def fit(
    cls,
    real: datasets.Split,
    info: dataset_info.DatasetInfo,
    settings: config_dict.ConfigDict,
    *,
    held_out: dict[str, datasets.Split],
    folder: epath.Path,
    seed: int,
  ) -> 'Trained':
    """Trains the networks, from wherever their training in `folder` is.

    It writes metrics and checkpoints, and at each of these a picture of samples.
    Arguments and what it raises are as of Generator; UserError too if training
    diverges. With early stopping, the process that writes alone returns the best.
    """
    recipe, training = cls.recipe(settings, info), settings.training
    fresh = jax.jit(lambda: recipes.init_state(recipe, seed))()
    run = loop.Loop(
      folder, fresh, keep=training.checkpoint_keep, older=cls.older_layout(fresh)
    )

    def variables(averaged, net_state):
      return jax.tree.map(np.asarray, recipe.variables_fn(averaged, net_state))

    now = lambda state: variables(
      *parallel.unreplicate((state.averaged, state.net_state))
    )
    fitted = cls(now(run.state), settings, info)
    judged = cls.evaluation(settings, info, real, held_out, seed)
    losses = [phase.metric for phase in recipe.phases]
    run.train(
      recipes.make_step(recipe, seed, run.start),
      _batches(real, info, training, seed, run.start),
      intervals=loop.Intervals(
        num_steps=training.num_steps,
        log=training.log_interval_steps,
        checkpoint=training.checkpoint_interval_steps,
        evaluation=judged.interval_steps if judged else 0,
      ),
      batch_size=training.batch_size,
      losses=[phase.metric for phase in recipe.phases if not phase.accept_fn],
      schedules=_schedules(recipe),
      note_fn=lambda figures: ', '.join(
        f'{name.removeprefix("train/")} {figures[name]:.4f}'
        for name in losses
        if name in figures
      ),
      evaluate_fn=judged and (lambda state: judged.fn(fitted.having(now(state)))),
      picture_fn=lambda state: fitted.having(now(state)).picture(seed),
      name=f'fit {settings.name}',
    )
    found = now(run.state)
    if training.get('early_stopping') and parallel.is_writer():
      state = _best(run.checkpoints, fresh)
      found = variables(state.averaged, state.net_state)
    run.checkpoints.close()
    return fitted.having(found)


def _best(saved: checkpoints.Checkpoints, fresh: recipes.State) -> recipes.State:
  """The state of the best evaluation."""
  step = saved.best_step()
  if step is None:
    raise UserError(
      'no checkpoint has the score of an evaluation, by which '
      'config.generator.training.early_stopping chooses: restore their files '
      'metrics/metrics, or fit anew'
    )
  logging.info('the best evaluation was after step %d', step)
  return saved.restore(fresh, step)


def _schedules(recipe: recipes.Recipe) -> dict:
  """The learning rates under the names by which they are written."""
  names = {name: f'{metrics.LEARNING_RATE}_{name}' for name in recipe.optimizers}
  if len(names) == 1:
    names = dict.fromkeys(names, metrics.LEARNING_RATE)
  return {names[x]: y.learning_rate_fn for x, y in recipe.optimizers.items()}


def _batches(real, info, training, seed, start):
  """Batches of the training images from iteration `start` on."""
  return pipeline.train_batches(
    real,
    None,
    [pipeline.Share(1.0)],
    batch_size=training.batch_size,
    steps=range(start, training.num_steps),
    seed=seed,
    slots=parallel.process_slots(training.batch_size),
    num_classes=info.num_classes,
  )
