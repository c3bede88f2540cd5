"""A classifier's run: its fields, their checks, and what follows from them.

The defaults are those of the released training recipe (Gowal et al., NeurIPS 2021) for
CIFAR-10, l-inf 8/255. An experiment starts from `get_config` and states what differs.
Whatever depends on several fields is computed by `resolve`, after the overrides of the
command line, so that `--config.data.batch_size=256` moves the learning rate and the
number of steps with it.
"""

import dataclasses
import os
import re
from typing import Any

from ml_collections import config_dict

from jaxrobust.config import attack, dataset_info, fields, registries
from jaxrobust.config.fields import field
from jaxrobust.errors import UserError

FIELDS: dict[str, Any] = {
  'seed': field(0, 'of initialisation, data order, augmentation and attacks', least=0),
  'variant': field('', "last part of the experiment's name"),
  'dataset': dataset_info.FIELDS,
  'data': {
    'batch_size': field(1024, 'images in a global batch, real and generated', above=0),
    'samples': field('', "folder of the sample set; '' is real images only"),
    # Deviation: the published 0.3 was rounded in each device's batch, to 10 of 32
    # images; here the rounded number is the field.
    'real_fraction': field(
      0.3125,
      'share of real images in a batch; exact, so it must resolve to a count that all '
      'devices and BatchNorm groups can share equally. Ignored without samples',
      least=0,
      most=1,
    ),
    'later_real_fraction': field(
      None,
      'share of real images from data.later_from_epoch on; None keeps real_fraction. '
      'Follow-up work trains on generated images alone at first',
      type=float,
      least=0,
      most=1,
    ),
    'later_from_epoch': field(0.0, 'in epochs of training.epoch_examples', least=0),
    # In the published runs four workers read the real images in the same order.
    'real_repeats': field(
      4,
      'times that each real image occurs in a batch, each with its own crop and flip. '
      'For a batch of 256 the released code advises 1',
      above=0,
    ),
    'streams': field(
      1,
      'parts of the sample set, each shuffled by itself and read by its own slots of '
      'the batch, so that a host of a pod holds only the parts of its slots. 1: the '
      'set is shuffled as a whole, and each host holds all of it. They must divide the '
      'batch and share its real images equally; a power of two, such as 32, suits any '
      'pod. Ignored without samples',
      above=0,
    ),
    'verify_samples': field(
      True, 'compare checksums of the sample set once', free=True
    ),
  },
  'augment': {
    'pad': field(4, 'pixels of zeros on each side before the random crop', least=0),
    'flip': field(True, 'horizontal, with probability 1/2'),
    'label_smoothing': field(0.1, 'of generated labels', least=0, most=1),
    'smooth_real_labels': field(
      False, 'smooth the labels of real images too, as follow-up work does'
    ),
    'cutmix': field(False, 'paste a box of another image into each image'),
    # The published runs drew one ratio and one box a device, of 32 images each.
    'cutmix_workers': field(
      None,
      'of CutMix and mixup: parts of the global batch, each with one draw of a ratio '
      '(and a box), in which images are mixed with each other. None is the published '
      'layout, a draw for each BatchNorm group (data.batch_size / '
      'model.batch_norm_group of them)',
      type=int,
      above=0,
      absent=4,
    ),
    # The other augmentations that the paper compares; the values that it used are not
    # known to us, so these are common ones, not the paper's.
    'mixup': field(False, 'average each image with another; not together with cutmix'),
    'mixup_alpha': field(1.0, 'the ratio is of Beta(alpha, alpha)', above=0),
    'cutout': field(
      0, 'side of the erased square, in pixels; 0 is none, 16 usual', least=0
    ),
    'policy': field(
      '', 'before crop and flip', choices=('', 'randaugment', 'autoaugment')
    ),
    'randaugment_operations': field(2, 'an image', above=0),
    'randaugment_magnitude': field(14, 'of 30', least=0, most=30),
  },
  'model': {
    'name': field(
      'wrn-28-10', 'wrn-DEPTH-WIDTH, preact-resnet-18, or one that you registered'
    ),
    'activation': field('swish', 'relu, swish, or another of jax.nn'),
    'mean': field(
      dataset_info.INFO['cifar10'].mean, 'of the data set, a channel, in [0, 1]'
    ),
    'std': field(
      dataset_info.INFO['cifar10'].std, 'of the data set, a channel', above=0
    ),
    'padding': field(0, 'pixels of zeros on each side, before normalisation', least=0),
    'batch_norm_group': field(
      32,
      'images that share BatchNorm statistics in training, whatever the devices. The '
      'published runs had 32 cores with 32 images each',
      above=0,
    ),
    'remat': field(
      False,
      'to fit a large model (not part of the published recipe): compute the '
      'activations of a residual block again in the backward pass, in place of keeping '
      'them; the result is the same but for rounding',
      free=True,
    ),
    'compute_dtype': field(
      'float32',
      'of activations and kernels in the convolutions of training. Parameters, '
      'statistics, logits and losses are float32, and so is all of inference, so that '
      'accuracies of either are measured alike',
      choices=('float32', 'bfloat16'),
    ),
  },
  'threat': attack.THREAT,
  'loss': {
    'name': field('trades', 'of training', choices=registries.LOSSES),
    'beta': field(6.0, 'weight of the KL term, or of what takes its place', least=0),
    'divergence': field(
      'kl',
      'of trades: kl; improved_kl, beta * soft cross-entropy + pairwise * differences '
      'of logits (Cui et al. 2023); squared distances of probabilities in both terms '
      '(SCORE)',
      choices=registries.DIVERGENCES,
    ),
    'pairwise': field(
      10.0, 'of improved_kl: weight of the differences of logits', least=0
    ),
    'class_temperature': field(
      4.0, 'of improved_kl: of the mean prediction of a class', above=0
    ),
    # Deviation: published is the mean over the epoch before.
    'class_decay': field(
      0.99, 'of improved_kl: decay of that mean, a step', least=0, most=1
    ),
    # Deviation: published is the ResNet-18 whose activations come after the sums.
    'natural_model': field(
      'preact-resnet-18',
      'of lbgat: network trained without attacks beside the robust one',
    ),
    'awp_gamma': field(
      0.0,
      'adversarial weight perturbation (Wu et al. 2020): how far weights move, '
      'relative to their norm (0.005 with trades, 0.01 with adversarial; 0 is off)',
      least=0,
    ),
    'awp_warmup_epochs': field(10.0, 'from when on weights are perturbed', least=0),
    'weight_decay': field(
      5e-4, 'of 0.5 * sum of squares of weights and biases', least=0
    ),
  },
  'attack': attack.fields_of('kl_divergence', 10, (0.1, 0.01), (5,)),  # of training
  'optimizer': {
    'learning_rate': field(
      None,
      'after the warm-up; None is base_learning_rate * max(batch_size / 256, 1)',
      type=float,
      above=0,
    ),
    'base_learning_rate': field(0.1, 'for 256 images'),
    'momentum': field(0.9, 'decay of the mean of gradients, a step', least=0, most=1),
    'nesterov': field(True, 'momentum of this kind'),
    'schedule': field(
      'cosine', 'of the learning rate', choices=('cosine', 'step', 'constant')
    ),
    'drop_fractions': field((2 / 3,), 'of the run, where step drops to a tenth'),
    'warmup_epochs': field(10.0, 'linear, from 0', least=0),
  },
  'training': {
    'num_epochs': field(400.0, 'of training.epoch_examples images', above=0),
    'epoch_examples': field(50_000, 'images in an "epoch", real or generated', above=0),
    'num_steps': field(
      None,
      'updates; None is num_epochs * epoch_examples / batch_size, rounded down',
      type=int,
      above=0,
    ),
    'accumulation': field(
      1,
      'micro-batches that a device computes one after another, to fit a large model: '
      'the same update as at once but for rounding. Each must hold whole BatchNorm '
      'groups',
      above=0,
      free=True,
    ),
  },
  'ema': {
    'decay': field(
      0.995, 'a step; at step t at most (1 + t) / (10 + t)', least=0, most=1
    ),
    'batch_norm': field(
      'raw',
      'BatchNorm statistics that go with the averaged parameters: those of the raw '
      'network, as published, or their own (one more forward pass a step)',
      choices=('raw', 'own'),
    ),
  },
  'evaluation': {
    'interval_epochs': field(40.0, 'between evaluations while training', above=0),
    'batch_size': field(1024, 'images', above=0, free=True),
    'checkpoint': field(
      '', "that evaluate judges; '' is the workdir's checkpoint.npy", free=True
    ),
    'split': field(
      'test', 'that evaluate reads', choices=('test', 'validation', 'train'), free=True
    ),
    'num_images': field(
      None,
      'of the split, the first ones; None is all of them',
      type=int,
      above=0,
      free=True,
    ),
    'suite': field(
      'pgd',
      'pgd (evaluation.attack), clean, pgd-40, autoattack, autoattack-plus, aa+mt, or '
      "attacks with options, 'apgd-ce:restarts=5,square'; see evaluate --help",
      free=True,
    ),
    'save_adversarial': field(False, 'of every image that falls', free=True),
    # PGD-40.
    'attack': attack.fields_of('margin', 40, (0.1, 0.01, 0.0001), (20, 30)),
  },
  'checkpoint': {
    'interval_epochs': field(10.0, 'between checkpoints', above=0),
    'keep': field(2, 'last ones kept, besides the best', above=0, free=True),
    'export': field(
      'best',
      'written to checkpoint.npy at the end: the best averaged parameters by PGD-40 '
      'accuracy on the validation images (clean accuracy for loss standard), or the '
      'last ones',
      choices=('best', 'last'),
    ),
  },
  'log': {'interval_epochs': field(0.5, 'between log lines', above=0)},
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
    streams: of the sample set; 1 without one.
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
  streams: int


def get_config(dataset: str = 'cifar10') -> config_dict.ConfigDict:
  """The config of all defaults, unlocked.

  Args:
    dataset: a data set's name, which brings its mean and standard deviation.
  """
  c = fields.make(FIELDS)
  info = dataset_info.INFO.get(dataset)
  c.dataset.name, c.model.mean, c.model.std = dataset, info.mean, info.std
  return c


LABELLER = 'labeller'  # in the place of a sample set: without attacks


def parse_arg(arg: str) -> tuple[str, str]:
  """Splits 'MODEL,DATA' (in any order, each optional) into its two parts."""
  model = data = ''
  for part in filter(None, arg.split(',')):
    if re.fullmatch(r'wrn-\d+-\d+|preact-resnet-18', part) or part in registries.MODELS:
      model = part
    elif re.match(r'(wide|pre|preact)?-?(resnet|wrn|vgg|densenet|vit|convnext)', part):
      raise UserError(
        f'config argument {arg!r}: there is no model {part!r}; use wrn-DEPTH-WIDTH, '
        f'{", ".join(["preact-resnet-18", *registries.MODELS.names()])}'
      )
    elif data:
      raise UserError(
        f'config argument {arg!r} names two data sources, {data!r} and {part!r}; '
        'it reads MODEL,DATA such as wrn-28-10,ddpm'
      )
    else:
      data = part
  return model, data


def said_of_samples(config: config_dict.ConfigDict) -> str:
  """What to say where a config's sample set is not there, which an argument may name.

  That is '', or why a word of the argument was read as a sample set.
  """
  samples, prefix = config.data.samples, f'data/{config.dataset.name}_'
  if not samples.startswith(prefix):
    return ''
  models = ', '.join(
    ['wrn-DEPTH-WIDTH', 'preact-resnet-18', *registries.MODELS.names()]
  )
  return (
    f' (if you gave {samples.removeprefix(prefix)!r} in --config=EXPERIMENT:ARG: it is '
    f"neither a model ({models}), nor 'real', nor '{LABELLER}', so it names this set)"
  )


def with_arg(
  c: config_dict.ConfigDict, arg: str, default: str
) -> config_dict.ConfigDict:
  """Sets model and sample set from 'MODEL,DATA', and locks the config.

  DATA is 'real', a name NAME for the sample set data/{dataset}_NAME, or a folder,
  which has a '/' in it; 'labeller' is real images without attacks. What `arg` leaves
  out is taken from `default`.
  """
  model, data = (
    given or usual
    for given, usual in zip(parse_arg(arg), parse_arg(default), strict=True)
  )
  c.model.name = model
  if data == LABELLER:
    c.loss.name = 'standard'
  elif data != 'real':
    c.data.samples = data if '/' in data else f'data/{c.dataset.name}_{data}'
  return c.lock()


_OF_TRAINING = ('loss', 'attack')  # parts that only training reads


def resolve(config: config_dict.ConfigDict) -> Derived:
  """Checks a config and computes what follows from it.

  The rules are the released code's: `int(epochs * epoch_examples / batch_size)`
  steps, at least one; learning rate 0.1 for 256 images, never scaled down.

  Args:
    config: a classifier's config after all overrides.

  Raises:
    UserError: for a value out of its range, or fields that contradict each other.
  """
  check(config)
  for part in _OF_TRAINING:
    fields.check(config[part], FIELDS[part], f'{part}.')
  _check_loss(config.loss)
  steps = lambda epochs: _steps(config, epochs)
  num_steps, learning_rate = config.training.num_steps, config.optimizer.learning_rate
  unset = follows(config)
  warmup = config.optimizer.warmup_epochs
  return Derived(
    num_steps=unset['training.num_steps'] if num_steps is None else num_steps,
    warmup_steps=steps(warmup) if warmup else 0,
    learning_rate=unset['optimizer.learning_rate']
    if learning_rate is None
    else learning_rate,
    eval_interval_steps=steps(config.evaluation.interval_epochs),
    checkpoint_interval_steps=steps(config.checkpoint.interval_epochs),
    log_interval_steps=steps(config.log.interval_epochs),
    real_fraction=config.data.real_fraction if config.data.samples else 1.0,
    later_real_fraction=config.data.later_real_fraction
    if config.data.samples
    else None,
    later_from_step=int(
      config.data.later_from_epoch
      * config.training.epoch_examples
      / config.data.batch_size
    ),
    streams=config.data.streams if config.data.samples else 1,
  )


def follows(config: config_dict.ConfigDict) -> dict[str, Any]:
  """Dotted paths of fields, and what stands for None there by the other fields."""
  scale = max(config.data.batch_size / 256, 1)
  return {
    'training.num_steps': _steps(config, config.training.num_epochs),
    'optimizer.learning_rate': config.optimizer.base_learning_rate * scale,
  }


def _steps(config, epochs: float) -> int:
  examples = epochs * config.training.epoch_examples
  return max(int(examples / config.data.batch_size), 1)


_OF_SAMPLES = (
  'data.real_fraction',
  'data.later_real_fraction',
  'data.later_from_epoch',
  'data.streams',
)


def ignored(config: config_dict.ConfigDict) -> set[str]:
  """Dotted paths of fields that mean nothing in a config, for want of a sample set."""
  return set() if 'loss' not in config or config.data.samples else {*_OF_SAMPLES}


def check(config: config_dict.ConfigDict) -> None:
  """Raises UserError for the first field with a value that cannot be meant.

  The loss and the attack of training are left to `resolve`: who judges what was trained
  by a loss or an attack of one's own need not know it.
  """
  if 'threat' not in config or 'training' not in config:
    raise UserError(
      "this is not a classifier's config: give an experiment such as "
      'digits, or the workdir of such a run'
    )
  dataset_info.check(config.dataset)
  fields.check(config, {k: x for k, x in FIELDS.items() if k not in _OF_TRAINING})
  attack.check_epsilon(config.threat.norm, config.threat.epsilon)
  if config.checkpoint.export == 'best' and not config.dataset.validation_images:
    raise UserError(
      "config.checkpoint.export = 'best' with no validation images to choose by: "
      "set config.dataset.validation_images, or config.checkpoint.export='last'"
    )
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
      f'config.model.batch_norm_group = {config.model.batch_norm_group} (it leaves a '
      f'remainder of {ragged}): change one of them'
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
  # Without a number, each BatchNorm group is a part.
  if (options.cutmix or options.mixup) and batch_size % (options.cutmix_workers or 1):
    raise UserError(
      f'config.augment.cutmix_workers = {options.cutmix_workers} does not divide '
      f'config.data.batch_size = {batch_size}'
    )
  if options.cutout:
    side = min(dataset_info.of(config.dataset).image_shape[:2])
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


def experiment_name(config: config_dict.ConfigDict) -> str:
  """The run's name, `{dataset}_{norm}_{model}_{data}[_{variant}]`.

  A run without attacks has 'standard' in the place of the norm.
  """
  dataset = dataset_info.label(config.dataset)
  norm = 'standard' if config.loss.name == 'standard' else config.threat.norm
  folder, samples = os.path.split(config.data.samples.rstrip('/'))
  if samples == 'samples':  # In the workdir of the program that made them.
    samples = os.path.basename(folder)
  data = samples.removeprefix(f'{dataset}_') or 'real'
  parts = [dataset, norm, config.model.name, data, config.variant]
  return '_'.join(filter(None, parts))


def without_seed(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """A copy without the seed, and without the end of the variant that says it.

  Sweeps and tables name the variants of seeds 'seed-N' and '…_seed-N'.
  """
  same = config.copy_and_resolve_references().unlock()
  same.variant = same.variant.removesuffix(f'seed-{config.seed}').rstrip('_')
  same.seed = 0
  return same
