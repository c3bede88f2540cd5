"""Trains a classifier: TRADES, adversarial or standard, on real and generated images.

Usage:
  python -m jaxrobust.train --workdir=DIR --config=experiments/FILE.py[:MODEL,DATA]

Examples:
  Digits that ship with scikit-learn, on a laptop:
    python -m jaxrobust.train --workdir=runs/digits --config=experiments/digits.py
  The paper's WRN-28-10 with 1M DDPM samples (data/cifar10_ddpm is a sample set):
    python -m jaxrobust.train --workdir=gs://BUCKET/cifar10_linf_wrn-28-10_ddpm \\
        --config=experiments/cifar10_linf.py:wrn-28-10,ddpm
  The same with another share of real images:
    … --config.data.real_fraction=0.5 --config.variant=half

Writes to the workdir: config.json, metrics.jsonl (a line a log step), events.*
(TensorBoard), checkpoints/ (to resume from) and, at the end, checkpoint.npy (averaged
parameters and BatchNorm state, in the authors' format). Interrupted, the same command
goes on where it was and ends with the same parameters, bit for bit.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath

from jaxrobust import config as configs
from jaxrobust.attacks import norms, suites
from jaxrobust.attacks.evaluation import Evaluator
from jaxrobust.config import dataset_info
from jaxrobust.data import datasets, pipeline
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.models import batch_norm, companions, parameter_files
from jaxrobust.runs import cli, process_group
from jaxrobust.runs import workdir as workdirs
from jaxrobust.samples import sample_sets
from jaxrobust.training import loop, optimizer, update


def main(config, workdir):
  """Trains the run of `config` in `workdir`, from wherever it is."""
  if config is None:
    raise UserError(
      '--config is missing: give an experiment, such as --config=experiments/digits.py'
    )
  derived = configs.resolve(config)
  finished = (epath.Path(workdir) / 'checkpoint.npy').exists()
  parallel.require_agreement(int(finished))
  if finished:
    folder = workdirs.claim(workdir, config)
    logging.info(
      '%s is finished: %s', configs.experiment_name(config), folder / 'checkpoint.npy'
    )
    return
  # Everything is checked before the workdir is touched.
  info = dataset_info.INFO[config.dataset.name]
  mixes = check_batch(config, derived)
  network = Network(config, derived, info)
  data = load_data(config)
  for counts in mixes:
    pipeline.check_sources(data.real, data.generated, *counts, info.num_classes)
  process_group.require_alike(data.checksums())
  folder = workdirs.claim(workdir, config)
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
  Run(config, derived, folder, network, data).train()


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


def load_data(config) -> Data:
  """Loads the images; a sample set is opened, and compared with its checksums once."""
  load = lambda split: datasets.load(
    config.dataset.name,
    split,
    data_dir=config.dataset.data_dir,
    train_images=config.dataset.train_images,
    validation_images=config.dataset.validation_images,
  )
  generated = None
  if config.data.samples:
    generated = sample_sets.SampleSet.open(config.data.samples)
    if config.data.verify_samples:
      logging.info('comparing checksums of %s (once)', config.data.samples)
      generated.verify(functools.partial(tqdm.tqdm, desc='checksums', disable=None))
  validation = load('validation') if config.dataset.validation_images else None
  return Data(load('train'), validation, generated)


def check_batch(config, derived: configs.Derived) -> list[tuple[int, int]]:
  """The numbers of real and generated images in a batch, of each mix in turn.

  Refuses a batch that devices or BatchNorm groups cannot share equally.
  """
  batch_size, group = config.data.batch_size, config.model.batch_norm_group
  devices = parallel.num_devices()
  shares = {
    'data.real_fraction': derived.real_fraction,
    'data.later_real_fraction': derived.later_real_fraction,
  }
  mixes = [
    pipeline.mix_counts(
      batch_size,
      share,
      config.data.real_repeats,
      {'devices': devices, 'BatchNorm groups': batch_size // group},
      field,
    )
    for field, share in shares.items()
    if share is not None
  ]
  batch_norm.layout(batch_size // devices, group)
  update.check_parts(batch_size // devices, config.training.accumulation, group)
  return mixes


class Network:
  """The model of a run with its step and its evaluator, built for all devices."""

  def __init__(self, config, derived: configs.Derived, info: dataset_info.DatasetInfo):
    model = companions.for_training(config, info)
    sgd = optimizer.make(config.optimizer, derived)
    self.num_classes = info.num_classes
    self.init = jax.jit(lambda: update.init_state(config, model, sgd))
    self.step = parallel.pmap(
      update.make_step(config, model, sgd, info.num_classes), donate_argnums=0
    )
    attacks, self.score = [], 'eval_ema/clean_accuracy'
    if config.loss.name != 'standard':
      attack = suites.attack_from_config(
        config.evaluation.attack, norms.get(config.threat.norm, config.threat.epsilon)
      )
      attacks = [('pgd', attack)]
      self.score = f'eval_ema/pgd{attack.num_steps}_accuracy'
    self.evaluate = Evaluator(
      lambda variables, x: model.apply(*variables, x, batch_stats=False)[0],
      attacks,
      batch_size=config.evaluation.batch_size,
      seed=config.seed,
    )


class Run:
  """A run in its workdir: what its loop trains on, evaluates and exports."""

  def __init__(
    self,
    config,
    derived: configs.Derived,
    folder: epath.Path,
    network: Network,
    data: Data,
  ):
    self._config, self._derived, self._folder = config, derived, folder
    self._network, self._data = network, data
    self._loop = loop.Loop(folder, network.init(), keep=config.checkpoint.keep)

  def train(self):
    """Runs the loop to its end, then writes the final checkpoint."""
    config, derived = self._config, self._derived
    slots = parallel.process_slots(config.data.batch_size)
    batches = pipeline.train_batches(
      self._data.real,
      self._data.generated,
      batch_size=config.data.batch_size,
      real_fraction=derived.real_fraction,
      real_repeats=config.data.real_repeats,
      seed=config.seed,
      start_step=self._loop.start,
      num_steps=derived.num_steps - self._loop.start,
      slots=slots,
      num_classes=self._network.num_classes,
      later_real_fraction=derived.later_real_fraction,
      later_from_step=derived.later_from_step,
    )
    positions = np.arange(*slots, dtype=np.int32)
    self._loop.train(
      self._network.step,
      (update.Batch(*batch, positions) for batch in batches),
      intervals=loop.Intervals(
        num_steps=derived.num_steps,
        log=derived.log_interval_steps,
        checkpoint=derived.checkpoint_interval_steps,
        evaluation=derived.eval_interval_steps,
      ),
      batch_size=config.data.batch_size,
      learning_rate_fn=optimizer.schedule(
        config.optimizer.schedule,
        learning_rate=derived.learning_rate,
        num_steps=derived.num_steps,
        warmup_steps=derived.warmup_steps,
        drop_fractions=config.optimizer.drop_fractions,
      ),
      note_fn=_note,
      evaluate_fn=None if self._data.validation is None else self._evaluate,
    )
    self._export()

  def _evaluate(self, state: update.TrainState) -> tuple[dict[str, float], float]:
    """Accuracies on the validation images, and the one that chooses a checkpoint."""
    figures = {}
    for name, variables in (
      ('eval', (state.params, state.net_state)),
      ('eval_ema', (state.ema_params, state.ema_net_state)),
    ):
      outcome = self._network.evaluate(variables, *self._data.validation)
      figures[f'{name}/clean_accuracy'] = float(outcome.clean.mean())
      robust = self._network.score.replace('eval_ema', name)
      figures[robust] = float(outcome.robust.mean())
    return figures, figures[self._network.score]

  def _export(self):
    """Writes checkpoint.npy from the best or the last checkpoint."""
    checkpoints = self._loop.checkpoints
    step = self._derived.num_steps
    state = parallel.unreplicate(self._loop.state)
    if parallel.is_writer():
      if self._config.checkpoint.export == 'best':
        step = checkpoints.best_step()
        state = checkpoints.restore(state, step)
      parameter_files.export_npy(
        self._folder / 'checkpoint.npy',
        companions.without(state.ema_params),
        companions.without(state.ema_net_state),
      )
      logging.info(
        'wrote %s, the averaged parameters after step %d',
        self._folder / 'checkpoint.npy',
        step,
      )
    checkpoints.close()
    parallel.barrier('exported')


def _note(figures: dict[str, float]) -> str:
  """What the progress line says of the last figures."""
  accuracy = figures.get('train/adv_accuracy', figures['train/clean_accuracy'])
  return f'loss {figures["train/loss"]:.3f}, accuracy {accuracy:.1%}'


if __name__ == '__main__':
  cli.run(main)
