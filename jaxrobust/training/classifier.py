"""Trains a classifier from a config, and images where the config names none.

>>> from jaxrobust.training import classifier
>>> path = classifier.train(config, 'runs/mine', train=(images, labels))

`python -m jaxrobust.train` is this function with the config of its command line.
"""

import functools
import os
from typing import NamedTuple, cast

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust import models
from jaxrobust.attacks import norms, suites
from jaxrobust.attacks.evaluation import Evaluator
from jaxrobust.config import dataset_info, fields
from jaxrobust.data import datasets, pipeline
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.models import batch_norm, companions, parameter_files
from jaxrobust.runs import metrics, process_group, waiting
from jaxrobust.runs import workdir as workdirs
from jaxrobust.samples import sample_sets, streams
from jaxrobust.training import loop, optimizer, update


def train(
  config: config_dict.ConfigDict,
  workdir: str | os.PathLike,
  *,
  train: tuple[np.ndarray, np.ndarray] | None = None,
  validation: tuple[np.ndarray, np.ndarray] | None = None,
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
  if train is None:
    config = datasets.record(config)
  else:
    config = _recorded_of(config, *_given(config, train, validation))
  derived = configs.resolve(config)
  finished = epath.Path(workdir) / 'checkpoint.npy'
  done = finished.exists()
  parallel.require_agreement(int(done))
  if done:
    workdirs.claim(workdir, config)
    logging.info('%s is finished: %s', configs.experiment_name(config), finished)
    return finished
  # Everything is checked before the workdir is touched.
  evaluation_attacks(config)
  mixes = check_batch(config, derived)
  data = load_data(config, train, validation)
  info = dataset_info.of(config.dataset)
  _check_validation(data.validation, info)
  for counts in mixes:
    pipeline.check_sources(data.real, data.generated, *counts, info.num_classes)
  model = companions.for_training(config, info)
  process_group.require_alike(data.checksums())
  recorded = workdirs.read_checksums(epath.Path(workdir))
  if recorded is not None and recorded != data.checksums():
    raise UserError(
      f'{workdir} holds a run with other images: give the same arrays, or another '
      'workdir'
    )
  folder = workdirs.claim(workdir, config)
  if parallel.is_writer() and (train is not None or validation is not None):
    workdirs.write_checksums(folder, data.checksums())
  logging.info(
    '%s: %d steps of %d images, %s, on %d devices; learning rate %g',
    configs.experiment_name(config),
    derived.num_steps,
    config.data.batch_size,
    f', from step {derived.later_from_step} on '.join(
      f'{real} real and {generated} generated' for real, generated in mixes
    ),
    parallel.num_devices(),
    derived.learning_rate,
  )
  return Run(config, derived, folder, model, info.num_classes, data).train()


class Data(NamedTuple):
  """What a run learns from; validation and generated may be None."""

  real: datasets.Split
  validation: datasets.Split | None
  generated: sample_sets.SampleSet | None

  def checksums(self) -> dict[str, str]:
    """Of each source that there is."""
    found = {'training images': self.real.checksum()}
    if self.validation is not None:
      found['validation images'] = self.validation.checksum()
    if self.generated is not None:
      found['generated images'] = self.generated.checksum()
    return found


def load_data(
  config: config_dict.ConfigDict,
  train: tuple[np.ndarray, np.ndarray] | None = None,
  validation: tuple[np.ndarray, np.ndarray] | None = None,
) -> Data:
  """Loads the images that are not given, and opens the sample set.

  The set is compared with its checksums once. Of a set in a bucket the images come in
  the background.
  """
  generated = None
  if config.data.samples:
    batch_size = config.data.batch_size
    part = streams.of_slots(
      config.data.streams, parallel.process_slots(batch_size), batch_size
    )
    generated = sample_sets.SampleSet.open(
      config.data.samples, part, in_background=True
    )
    if config.data.verify_samples:
      logging.info('comparing checksums of %s (once)', config.data.samples)
      generated.verify(functools.partial(tqdm.tqdm, desc='checksums', disable=None))
  if train is not None:
    return Data(*_given(config, train, validation), generated)
  real = datasets.of(config.dataset, 'train')
  if validation is not None:
    validation = _split(validation, 'validation')
  elif config.dataset.validation_images:
    validation = datasets.of(config.dataset, 'validation')
  return Data(real, validation, generated)


def _given(config, train, validation) -> tuple[datasets.Split, datasets.Split | None]:
  """The images to train and to validate on, of arrays; UserError if they are none."""
  real, held_out = _split(train, 'train'), 0
  if validation is not None:
    validation = _split(validation, 'validation')
  elif held_out := config.dataset.validation_images:
    validation = datasets.Split(*(x[:held_out] for x in real))
  last = config.dataset.train_images and held_out + config.dataset.train_images
  if not 0 < (last or held_out + 1) <= len(real.labels):
    raise UserError(
      f'train has {len(real.labels)} images, of which '
      f'config.dataset.validation_images = {held_out} are held out and '
      f'config.dataset.train_images = {config.dataset.train_images} are trained on: '
      'give more images, or lower one of the two'
    )
  return datasets.Split(*(x[held_out:last] for x in real)), validation


def _recorded_of(config, real: datasets.Split, validation: datasets.Split | None):
  """The config with what is known of arrays, unless they are as its data set's."""
  dataset, shape = config.dataset, real.images.shape[1:]
  splits = [real] if validation is None else [real, validation]
  num_classes = 1 + max(int(x.labels.max()) for x in splits)
  if not dataset_info.is_own(dataset):
    info = dataset_info.of(dataset)
    if shape == info.image_shape and num_classes <= info.num_classes:
      return config
  config = fields.replace(
    config,
    {
      'dataset.name': dataset_info.ARRAYS,
      'dataset.path': '',
      'dataset.image_shape': shape,
      'dataset.num_classes': max(num_classes, dataset.num_classes or 2),
      'dataset.train_size': len(real.labels),
      'dataset.test_size': 0,
    },
  )
  if dataset_info.has_others_normalisation(config):
    mean, std = datasets.normalisation(real.images)
    config = fields.replace(config, {'model.mean': mean, 'model.std': std})
  return config


def _split(arrays, name: str) -> datasets.Split:
  """Images and labels of the caller's; UserError if they are none."""
  try:
    images, labels = (np.asarray(x) for x in arrays)
  except (TypeError, ValueError) as e:
    raise UserError(f'{name} is not a pair of images and labels: {e}') from e
  if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
    raise UserError(
      f'{name}: images are {images.dtype} {list(images.shape)}; give uint8 [n, H, W, C]'
      ' from 0 to 255, such as np.rint(255 * images).astype(np.uint8)'
    )
  if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
    raise UserError(
      f'{name}: labels are {labels.dtype} {list(labels.shape)} for {len(images)} '
      'images; give a whole number from 0 for each'
    )
  if not 0 <= labels.min() <= labels.max() < 2**15:
    raise UserError(
      f'{name}: labels are from {labels.min()} to {labels.max()}; number the classes '
      'from 0'
    )
  return datasets.Split(images, labels.astype(np.int32))


def _check_validation(split: datasets.Split | None, info: dataset_info.DatasetInfo):
  """Refuses validation images that the network does not take."""
  if split is None:
    return
  if (shape := split.images.shape[1:]) != tuple(info.image_shape):
    raise UserError(
      f'validation has images {list(shape)}, train {list(info.image_shape)}: give '
      'images of one shape'
    )
  if split.labels.max() >= info.num_classes:
    raise UserError(
      f'validation has the label {split.labels.max()}: {info.name} has '
      f'{info.num_classes} classes, from 0'
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
    data: Data,
  ):
    """Builds the network's programs, and restores the run's last checkpoint."""
    self._config, self._derived, self._folder = config, derived, folder
    self._num_classes, self._data = num_classes, data
    sgd = optimizer.make(config.optimizer, derived)
    step = update.make_step(config, model, sgd, num_classes)
    self._step = parallel.pmap(step, donate_argnums=0)
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
      fresh = jax.jit(lambda: update.init_state(config, model, sgd))()
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
    )
    with waiting.waiting('writing the final checkpoint'):
      return self._export()

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
    step, path = self._derived.num_steps, self._folder / 'checkpoint.npy'
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
