"""Trains a classifier from a config, and images where the config names none.

>>> from jaxrobust.training import classifier
>>> path = classifier.train(config, 'runs/mine', train=(images, labels))

`jaxrobust train` is this function with the config of its command line.
"""

import functools
import os
from typing import cast

import jax
from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust import models
from jaxrobust.attacks import norms, suites
from jaxrobust.attacks.evaluation import Evaluator
from jaxrobust.config import dataset_info, fields
from jaxrobust.data import datasets, pipeline, training_images
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.models import batch_norm, companions, parameter_files
from jaxrobust.runs import metrics, process_group, waiting
from jaxrobust.runs import workdir as workdirs
from jaxrobust.training import loop, optimizer, update


def train(
  config: config_dict.ConfigDict,
  workdir: str | os.PathLike,
  *,
  train: training_images.Arrays | None = None,
  validation: training_images.Arrays | None = None,
  samples: str | os.PathLike = '',
) -> epath.Path:
  """Trains the run of `config` in `workdir`, from wherever it is.

  Args:
    config: a classifier's config, after all overrides.
    workdir: the run's folder, local or `gs://`; made if absent.
    train: images uint8 [n, H, W, C] and labels int [n] in 0..K-1, in the place of the
      data set's training images: the first `config.dataset.validation_images` of them
      are held out unless `validation` is given. The same ones must be given to resume.
      Where their shape or classes are not those of `config.dataset`, it becomes
      'arrays', and the run normalises by their own mean and standard deviation.
    validation: images and labels that are not trained on, in the place of those.
    samples: folder of a sample set, in the place of `config.data.samples`.

  Returns:
    The path of the final `checkpoint.npy`: the averaged parameters and BatchNorm state.

  Raises:
    PreemptedError: after a checkpoint, because the process was asked to stop.
    UserError: for a config or images that cannot be meant, before anything is written;
      or if training diverges.
  """
  if samples:
    config = fields.replace(config, {'data.samples': os.fspath(samples)})
  config = workdirs.continued(workdir, config)
  config = training_images.record(config, train, validation)
  derived = configs.resolve(config)
  finished = epath.Path(workdir) / workdirs.CHECKPOINT
  done = finished.exists()
  parallel.require_agreement(int(done))
  if done:
    if train is not None or validation is not None:
      given = fields.replace(config, {'data.samples': ''})
      data = training_images.load(given, (0, config.data.batch_size), train, validation)
      _require_recorded(workdir, data)
    workdirs.claim(workdir, config)
    logging.info('%s is finished: %s', configs.experiment_name(config), finished)
    return finished
  # Everything is checked before the workdir is touched.
  evaluation_attacks(config)
  mixes = check_batch(config, derived)
  slots = parallel.process_slots(config.data.batch_size)
  data = training_images.load(config, slots, train, validation)
  info = dataset_info.of(config.dataset)
  for counts in mixes:
    pipeline.check_sources(data.real, data.generated, *counts, info.num_classes)
  model = companions.for_training(config, info)
  process_group.require_alike(data.checksums())
  _require_recorded(workdir, data)
  folder = workdirs.claim(workdir, config)
  if parallel.is_writer() and (train is not None or validation is not None):
    workdirs.write_checksums(folder, data.checksums())
  logging.info(
    '%s: %s of %d images, %s, on %s; learning rate %g',
    configs.experiment_name(config),
    metrics.counted(derived.num_steps, 'step'),
    config.data.batch_size,
    f', from step {derived.later_from_step} on '.join(
      f'{real} real and {generated} generated' for real, generated in mixes
    ),
    metrics.counted(parallel.num_devices(), 'device'),
    derived.learning_rate,
  )
  repeats, found = config.data.real_repeats, len(data.real.labels)
  if (distinct := mixes[0][0] // repeats) > found:
    logging.warning(
      'a batch takes %d different real images, and there are %d training images, so '
      'that each is in it %.2g times: lower config.data.batch_size',
      distinct,
      found,
      repeats * distinct / found,
    )
  return Run(config, derived, folder, model, info.num_classes, data).train()


def _require_recorded(workdir: str | os.PathLike, data: training_images.TrainingImages):
  """Raises UserError if the run in `workdir` began with other images."""
  recorded = workdirs.read_checksums(epath.Path(workdir))
  if recorded is None:
    return
  found = data.checksums()
  if data.generated is None:  # Of a finished run the set may be gone.
    recorded = {x: recorded[x] for x in recorded if x != 'generated images'}
  if recorded != found:
    raise UserError(
      f'{workdir} holds a run with other images: give the same arrays, or another '
      'workdir'
    )


def evaluation_attacks(config: config_dict.ConfigDict) -> list:
  """The attacks of evaluations while training, a name and an attack each.

  Raises:
    UserError: for an attack that cannot be meant, also one of `evaluation.suite`, which
      would otherwise be noticed when the network is trained.
  """
  ball = norms.get(config.threat.norm, config.threat.epsilon)
  attack = suites.attack_from_config(config.evaluation.attack, ball)
  suites.from_config(config.evaluation, ball)
  return [] if config.loss.name == 'standard' else [('pgd', attack)]


def mix(derived: configs.Derived) -> list[pipeline.Share]:
  """The shares of real images, one after the other."""
  shares = [pipeline.Share(derived.real_fraction)]
  if derived.later_real_fraction is not None:
    shares.append(pipeline.Share(derived.later_real_fraction, derived.later_from_step))
  return shares


def check_batch(
  config: config_dict.ConfigDict, derived: configs.Derived
) -> list[tuple[int, int]]:
  """The numbers of real and generated images in a batch, of each share in turn.

  Raises:
    UserError: for a batch that devices, BatchNorm groups or streams cannot share
      equally.
  """
  batch_size, group = config.data.batch_size, config.model.batch_norm_group
  devices = parallel.num_devices()
  parts = {
    'devices': devices,
    'BatchNorm groups': batch_size // group,
    'streams': derived.streams,
  }
  counts = [
    pipeline.mix_counts(
      batch_size,
      share.real_fraction,
      config.data.real_repeats,
      parts,
      field,
    )
    for share, field in zip(
      mix(derived), ('data.real_fraction', 'data.later_real_fraction'), strict=False
    )
  ]
  batch_norm.layout(batch_size // devices, group)
  update.check_parts(batch_size // devices, config.training.accumulation, group)
  return counts


class Run:
  """A run in its workdir: what its loop trains on, evaluates and exports."""

  def __init__(
    self,
    config: config_dict.ConfigDict,
    derived: configs.Derived,
    folder: epath.Path,
    model: models.Model,
    num_classes: int,
    data: training_images.TrainingImages,
  ):
    """Builds the network's programs, and restores the run's last checkpoint."""
    self._config, self._derived, self._folder = config, derived, folder
    self._num_classes, self._data = num_classes, data
    sgd = optimizer.make(config.optimizer, derived)
    step = update.make_step(config, model, sgd, num_classes)
    mapped, root = parallel.pmap(step, donate_argnums=0), update.root_of(config)
    roots = parallel.replicate(root)  # So that one program serves all seeds.
    self._step = lambda state, batch: mapped(state, batch, roots)
    attacks = evaluation_attacks(config)
    self._robust = f'pgd{attacks[0][1].num_steps}' if attacks else 'clean'
    if data.validation is not None:
      self._evaluator = Evaluator(
        lambda variables, x: model.apply(*variables, x, batch_stats=False)[0],
        attacks,
        # More than there are would be padding.
        batch_size=min(config.evaluation.batch_size, len(data.validation.labels)),
        seed=config.seed,
      )
    with waiting.waiting('initialising the network'):
      fresh = jax.jit(lambda root: update.init_state(config, model, sgd, root))(root)
      self._loop = loop.Loop(folder, fresh, keep=config.checkpoint.keep)

  def train(self) -> epath.Path:
    """Runs the loop to its end, then writes the final checkpoint; returns its path."""
    config, derived = self._config, self._derived
    batches = pipeline.train_batches(
      self._data.real,
      self._data.generated,
      mix(derived),
      batch_size=config.data.batch_size,
      steps=range(self._loop.start, derived.num_steps),
      seed=config.seed,
      real_repeats=config.data.real_repeats,
      streams=derived.streams,
      slots=parallel.process_slots(config.data.batch_size),
      num_classes=self._num_classes,
    )
    self._loop.train(
      self._step,
      batches,
      intervals=loop.Intervals(
        num_steps=derived.num_steps,
        log=derived.log_interval_steps,
        checkpoint=derived.checkpoint_interval_steps,
        evaluation=derived.eval_interval_steps,
      ),
      batch_size=config.data.batch_size,
      losses=[metrics.TRAIN_LOSS],
      schedules={
        metrics.LEARNING_RATE: optimizer.schedule(
          config.optimizer.schedule,
          learning_rate=derived.learning_rate,
          num_steps=derived.num_steps,
          warmup_steps=derived.warmup_steps,
          drop_fractions=config.optimizer.drop_fractions,
        )
      },
      note_fn=_note,
      evaluate_fn=None if self._data.validation is None else self._evaluate,
      lower_fn=None if self._data.validation is None else self._lower,
    )
    with waiting.waiting('writing the final checkpoint'):
      return self._export()

  def _lower(self, state: update.TrainState) -> list[jax.stages.Lowered]:
    """The programs of an evaluation, which serve the averaged parameters, too."""
    variables = state.params, state.net_state
    return self._evaluator.lower(
      variables, *cast(datasets.Split, self._data.validation)
    )

  def _evaluate(self, state: update.TrainState) -> tuple[dict[str, float], float]:
    """Accuracies on the validation images, and the one that chooses a checkpoint."""
    figures, validation = {}, cast(datasets.Split, self._data.validation)
    for name, variables in (
      (metrics.EVAL, (state.params, state.net_state)),
      (metrics.EVAL_EMA, (state.ema_params, state.ema_net_state)),
    ):
      with waiting.waiting(f'validation, {name}') as note:
        outcome = self._evaluator(
          variables, *validation, progress=functools.partial(_Noted, note)
        )
      figures[metrics.eval_accuracy(name)] = float(outcome.clean.mean())
      robust = float(outcome.robust.mean())
      figures[metrics.eval_accuracy(name, self._robust)] = robust
    return figures, figures[metrics.eval_accuracy(metrics.EVAL_EMA, self._robust)]

  def _export(self) -> epath.Path:
    """Writes checkpoint.npy from the best or the last checkpoint."""
    checkpoints = self._loop.checkpoints
    step, path = self._derived.num_steps, self._folder / workdirs.CHECKPOINT
    state = parallel.unreplicate(self._loop.state)
    if parallel.is_writer():
      if self._config.checkpoint.export == 'best':
        step = checkpoints.best_step()
        if step is None:
          raise UserError(
            f'no checkpoint in {self._folder} has a score, and '
            "config.checkpoint.export = 'best' exports the one with the highest: "
            "restore their files metrics/metrics, or write 'last' in config.json and "
            'in the command'
          )
        state = checkpoints.restore(state, step)
      parameter_files.export_npy(
        path,
        companions.without(state.ema_params),
        companions.without(state.ema_net_state),
      )
      logging.info('wrote %s, the averaged parameters after step %d', path, step)
    checkpoints.close()
    parallel.barrier('exported')
    return path


class _Noted:
  """The progress of an attack, as the note of a wait."""

  def __init__(self, note, what: str, total: int, unit: str):
    self._note, self._what, self._total, self._unit = note, what, total, unit
    self._done = 0
    note(what)

  def advance(self, count: int, text: str):
    self._done += count
    self._note(f'{self._what}: {self._done} of {self._total} {self._unit}, {text}')

  def close(self):
    pass


def _note(figures: dict[str, float]) -> str:
  """What the progress line says of the last figures."""
  accuracy = figures.get(metrics.TRAIN_ADV, figures[metrics.TRAIN_CLEAN])
  return f'loss {figures[metrics.TRAIN_LOSS]:.3f}, accuracy {accuracy:.1%}'
