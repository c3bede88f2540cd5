"""What follows from a config: checks, the steps and the learning rate, its name.

Configs are plain values (see `experiments/base.py`, where every field stands).
Whatever depends on several fields is computed here, after the overrides of the
command line, so that `--config.data.batch_size=256` moves the learning rate and
the number of steps with it.
"""

import dataclasses
import json
import os

from ml_collections import config_dict

from jaxrobust.config import dataset_info, registries
from jaxrobust.errors import UserError

# Fields that say where, how often or what to look at, not what is trained: a run
# may be continued with other values of them.
_NOT_IDENTITY = (
  'dataset.data_dir',
  'data.verify_samples',
  'evaluation.batch_size',
  'evaluation.checkpoint',
  'evaluation.split',
  'evaluation.num_images',
  'evaluation.suite',
  'evaluation.save_adversarial',
  'checkpoint.keep',
  'model.remat',
  'training.accumulation',
  'samples.max_draws_factor',
  'batch_size',  # of an analysis
)

# Fields younger than configs on disk, and what those configs meant: of a classifier,
# and of a generator.
_YOUNGER = {
  'data': {'later_real_fraction': None, 'later_from_epoch': 0.0},
  'loss': {
    'divergence': 'kl',
    'pairwise': 10.0,
    'class_temperature': 4.0,
    'class_decay': 0.99,
    'natural_model': 'preact-resnet-18',
    'awp_gamma': 0.0,
    'awp_warmup_epochs': 10.0,
  },
  'optimizer': {'drop_fractions': (2 / 3,)},
  'augment': {
    'smooth_real_labels': False,
    'mixup': False,
    'mixup_alpha': 1.0,
    'cutout': 0,
    'policy': '',
    'randaugment_operations': 2,
    'randaugment_magnitude': 14,
  },
  'model': {'remat': False, 'compute_dtype': 'float32'},
  'training': {'accumulation': 1},
}
_YOUNGER_OF_GENERATORS = {'samples': {'top_fraction': 1.0}}
_YOUNGER_OF_TRAINED = {'b1': 0.9, 'b2': 0.999, 'epsilon': 1e-8}  # generator.training

_CHOICES = {
  'dataset.name': tuple(dataset_info.INFO),
  'augment.policy': ('', 'randaugment', 'autoaugment'),
  'threat.norm': ('linf', 'l2', 'l1'),
  'loss.divergence': ('kl', 'improved_kl', 'squared'),
  'optimizer.schedule': ('cosine', 'step', 'constant'),
  'ema.batch_norm': ('raw', 'own'),
  'model.compute_dtype': ('float32', 'bfloat16'),
  'evaluation.split': ('test', 'validation', 'train'),
  'checkpoint.export': ('best', 'last'),
}


@dataclasses.dataclass(frozen=True)
class Derived:
  """Values that follow from a config.

  Attributes:
    num_steps: updates of the whole run.
    warmup_steps: updates of the linear warm-up.
    learning_rate: at the end of the warm-up.
    eval_interval_steps: updates between evaluations.
    checkpoint_interval_steps: updates between checkpoints.
    log_interval_steps: updates between log lines.
    real_fraction: share of real images; 1 without a sample set.
    later_real_fraction: that from `later_from_step` on; None for the same share.
    later_from_step: first update with it.
  """

  num_steps: int
  warmup_steps: int
  learning_rate: float
  eval_interval_steps: int
  checkpoint_interval_steps: int
  log_interval_steps: int
  real_fraction: float
  later_real_fraction: float | None
  later_from_step: int


def resolve(config) -> Derived:
  """Checks a config and computes what follows from it.

  The rules are the released code's: `int(epochs * epoch_examples / batch_size)`
  steps, at least one; learning rate 0.1 for 256 images, never scaled down.

  Args:
    config: a classifier's config after all overrides.

  Raises:
    UserError: for a value out of its range, or fields that contradict each other.
  """
  check(config)
  batch_size = config.data.batch_size
  steps = lambda epochs: max(
    int(epochs * config.training.epoch_examples / batch_size), 1
  )
  learning_rate = config.optimizer.learning_rate
  if learning_rate is None:
    learning_rate = config.optimizer.base_learning_rate * max(batch_size / 256, 1)
  num_steps = config.training.num_steps
  warmup = config.optimizer.warmup_epochs
  return Derived(
    num_steps=steps(config.training.num_epochs) if num_steps is None else num_steps,
    warmup_steps=steps(warmup) if warmup else 0,
    learning_rate=learning_rate,
    eval_interval_steps=steps(config.evaluation.interval_epochs),
    checkpoint_interval_steps=steps(config.checkpoint.interval_epochs),
    log_interval_steps=steps(config.log.interval_epochs),
    real_fraction=config.data.real_fraction if config.data.samples else 1.0,
    later_real_fraction=config.data.later_real_fraction
    if config.data.samples
    else None,
    later_from_step=int(
      config.data.later_from_epoch * config.training.epoch_examples / batch_size
    ),
  )


def check(config):
  """Raises UserError for the first field with a value that cannot be meant."""
  if 'threat' not in config or 'training' not in config:
    raise UserError(
      "this is not a classifier's config: give an experiment such as "
      'experiments/digits.py, or the workdir of such a run'
    )
  for field, choices in _CHOICES.items():
    if (value := _get(config, field)) not in choices:
      names = ', '.join(choice or "''" for choice in choices)
      raise UserError(f'config.{field} = {value!r}: use one of {names}')
  registries.LOSSES.check(config.loss.name, 'config.loss.name')
  positive = (
    'data.batch_size',
    'data.real_repeats',
    'training.num_epochs',
    'training.epoch_examples',
    'evaluation.batch_size',
    'threat.epsilon',
    'evaluation.interval_epochs',
    'checkpoint.interval_epochs',
    'checkpoint.keep',
    'log.interval_epochs',
    'model.batch_norm_group',
    'augment.cutmix_workers',
    'augment.mixup_alpha',
    'augment.randaugment_operations',
    'training.accumulation',
    'loss.class_temperature',
  )
  for field in positive:
    if (value := _get(config, field)) <= 0:
      raise UserError(f'config.{field} = {value}: use a number above 0')
  for field in (
    'training.num_steps',
    'optimizer.learning_rate',
    'dataset.train_images',
    'evaluation.num_images',
  ):
    if (value := _get(config, field)) is not None and value <= 0:
      raise UserError(
        f'config.{field} = {value}: use a number above 0, or leave it unset'
      )
  for field in (
    'dataset.validation_images',
    'augment.pad',
    'augment.cutout',
    'loss.beta',
    'loss.weight_decay',
    'loss.pairwise',
    'loss.awp_gamma',
    'loss.awp_warmup_epochs',
    'data.later_from_epoch',
    'optimizer.warmup_epochs',
    'seed',
  ):
    if (value := _get(config, field)) < 0:
      raise UserError(f'config.{field} = {value}: use 0 or more')
  for field in (
    'data.real_fraction',
    'data.later_real_fraction',
    'augment.label_smoothing',
    'loss.class_decay',
    'ema.decay',
    'optimizer.momentum',
  ):
    value = _get(config, field)
    if value is not None and not 0 <= value <= 1:
      raise UserError(f'config.{field} = {value}: use a number from 0 to 1')
  if config.checkpoint.export == 'best' and not config.dataset.validation_images:
    raise UserError(
      "config.checkpoint.export = 'best' with no validation images to choose by: "
      "set config.dataset.validation_images, or config.checkpoint.export='last'"
    )
  _check_loss(config.loss)
  drops = config.optimizer.drop_fractions
  if not all(0 < a < b for a, b in zip(drops, (*drops, 1)[1:], strict=True)):
    raise UserError(
      f'config.optimizer.drop_fractions = {drops}: use numbers between 0 and 1, in '
      'rising order'
    )
  groups, ragged = divmod(config.data.batch_size, config.model.batch_norm_group)
  if ragged:
    raise UserError(
      f'config.data.batch_size = {config.data.batch_size} is not a multiple of '
      f'config.model.batch_norm_group = {config.model.batch_norm_group} (after '
      f'{groups} groups {ragged} images are left): change one of them'
    )
  parts, group = config.training.accumulation, config.model.batch_norm_group
  if groups % parts:
    raise UserError(
      f'config.training.accumulation = {parts} would cut one of the {groups} BatchNorm '
      f'groups of {group} images in config.data.batch_size = {config.data.batch_size}: '
      'use a divisor of the number of groups'
    )
  _check_augment(config)


def _check_augment(config):
  """Raises UserError for augmentations that cannot be meant."""
  options, batch_size = config.augment, config.data.batch_size
  if options.cutmix and options.mixup:
    raise UserError(
      'config.augment.cutmix and config.augment.mixup both mix the images of a batch: '
      'choose one of them'
    )
  if (options.cutmix or options.mixup) and batch_size % options.cutmix_workers:
    raise UserError(
      f'config.augment.cutmix_workers = {options.cutmix_workers} does not divide '
      f'config.data.batch_size = {batch_size}'
    )
  if not 0 <= options.randaugment_magnitude <= 30:
    raise UserError(
      f'config.augment.randaugment_magnitude = {options.randaugment_magnitude}: use a '
      'number from 0 to 30'
    )
  side = min(dataset_info.INFO[config.dataset.name].image_shape[:2])
  if options.cutout > side:
    raise UserError(
      f'config.augment.cutout = {options.cutout} pixels is more than the side of the '
      f'images, {side}: use 0 to {side}'
    )


def _check_loss(loss):
  """Refuses parts of losses that do not go together."""
  if loss.divergence != 'kl' and loss.name != 'trades':
    raise UserError(
      f'config.loss.divergence = {loss.divergence!r} is a choice of loss trades, not '
      f'of {loss.name}: use kl, or config.loss.name=trades'
    )
  if loss.awp_gamma and loss.name == 'lbgat':
    raise UserError(
      f'config.loss.awp_gamma = {loss.awp_gamma} with loss lbgat, of which one network '
      'should not be perturbed: use 0, or another loss'
    )


def experiment_name(config) -> str:
  """The run's name, `{dataset}_{norm}_{model}_{data}[_{variant}]`.

  A run without attacks has 'standard' in the place of the norm.
  """
  dataset = config.dataset.name
  norm = 'standard' if config.loss.name == 'standard' else config.threat.norm
  folder, samples = os.path.split(config.data.samples.rstrip('/'))
  if samples == 'samples':  # In the workdir of the program that made them.
    samples = os.path.basename(folder)
  data = samples.removeprefix(f'{dataset}_') or 'real'
  parts = [dataset, norm, config.model.name, data, config.variant]
  return '_'.join(filter(None, parts))


def without_seed(config):
  """A copy without the seed, and without the end of the variant that tells it.

  Sweeps and tables name the variants of seeds 'seed-N' and '…_seed-N'.
  """
  same = config.copy_and_resolve_references().unlock()
  same.variant = same.variant.removesuffix(f'seed-{config.seed}').rstrip('_')
  same.seed = 0
  return same


def to_json(config) -> str:
  """The config as JSON, in a stable order."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def from_json(text: str):
  """The locked config that `to_json` wrote."""

  def restore(x):
    if isinstance(x, dict):
      return {k: restore(v) for k, v in x.items()}
    if isinstance(x, list):
      return tuple(x)
    # Without a type of its own, an unset field could not be overridden.
    return config_dict.placeholder(object) if x is None else x

  tree = json.loads(text)
  younger = {}
  if 'loss' in tree:  # A generator's own settings have a part 'training', too.
    younger = _YOUNGER
  elif 'generator' in tree:
    younger = _YOUNGER_OF_GENERATORS
    if training := tree['generator'].get('training'):
      tree['generator']['training'] = _YOUNGER_OF_TRAINED | training
  tree |= {part: fields | tree[part] for part, fields in younger.items()}
  return config_dict.ConfigDict(restore(tree)).lock()


def differences(old, new, ignore=_NOT_IDENTITY) -> list[str]:
  """Fields whose values differ, each as `field: old → new`.

  Args:
    old, new: two configs.
    ignore: fields that may differ.
  """
  flat_old, flat_new = (
    _flatten(json.loads(to_json(old))),
    _flatten(json.loads(to_json(new))),
  )
  fields = sorted(set(flat_old) | set(flat_new))
  absent = '(absent)'
  return [
    f'{f}: {flat_old.get(f, absent)} → {flat_new.get(f, absent)}'
    for f in fields
    if f not in ignore and flat_old.get(f, absent) != flat_new.get(f, absent)
  ]


def _get(config, field: str):
  """The value at a dotted path."""
  for name in field.split('.'):
    config = config[name]
  return config


def _flatten(tree, prefix='') -> dict:
  """Dotted paths → values."""
  if not isinstance(tree, dict):
    return {prefix: tree}
  flat = {}
  for name, value in tree.items():
    flat |= _flatten(value, f'{prefix}.{name}' if prefix else name)
  return flat
