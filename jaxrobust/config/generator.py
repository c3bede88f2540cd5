"""A generator's run: its fields and checks; fit, sample, pseudo-label, select, write.

`GENERATORS` has the fields of each generator's own settings, `config.generator`. A
generator of your own adds its fields there by `register`.
"""

from jaxrobust.config import dataset_info, fields, registries
from jaxrobust.config.fields import field
from jaxrobust.errors import UserError

_GAUSSIAN = {
  'name': field('gaussian', 'one normal distribution a class'),
  'covariance': field(
    'empirical',
    'how it is estimated',
    choices=('empirical', 'ledoit-wolf', 'oas', 'low-rank'),
  ),
  'rank': field(64, 'principal components of low-rank, not used by the others'),
}

_MIXUP = {
  'name': field('mixup', 'mixes of two training images'),
  'alpha': field(1.0, "of the ratio's Beta(alpha, alpha); 1 is uniform", above=0),
}

# Denoising diffusion; the values are those of Ho et al. 2020 for CIFAR-10.
_DDPM = {
  'name': field('ddpm', 'denoising diffusion'),
  'network': {
    'channels': field(128, 'at full resolution, before the multiplier'),
    'multipliers': field((1, 2, 2, 2), 'on the channels, a resolution each', above=0),
    'num_blocks': field(2, 'residual blocks at each resolution', above=0),
    'attention_sizes': field((16,), 'heights, in pixels, of maps with attention'),
    'dropout': field(0.1, 'share of values dropped in training', least=0, below=1),
    'conditional': field(
      False, 'whether the network knows classes; classes of samples then take turns'
    ),
  },
  'process': {
    'num_steps': field(1_000, 'of noise', above=0),
    'first_beta': field(
      1e-4, 'variance that the first step adds, growing linearly', above=0
    ),
    'last_beta': field(0.02, 'variance that the last step adds', least=0, below=1),
  },
  'training': {
    'num_steps': field(800_000, 'updates', above=0),
    'batch_size': field(128, 'images in a global batch', above=0),
    'learning_rate': field(2e-4, 'of Adam, constant after the warm-up', above=0),
    'warmup_steps': field(5_000, 'updates, linear from 0', least=0),
    'b1': field(0.9, "decay of Adam's mean of gradients, an update", least=0, below=1),
    'b2': field(
      0.999, "decay of Adam's mean of their squares, an update", least=0, below=1
    ),
    'epsilon': field(1e-8, "beside Adam's root of these", above=0),
    # Deviation: of the mean over all devices; their released code clips each device's
    # before it takes the mean.
    'gradient_clip': field(1.0, 'greatest norm of the whole gradient', above=0),
    # Deviation: at update t at most (1 + t) / (10 + t); theirs is constant.
    'ema_decay': field(
      0.9999, 'of the average of parameters, an update', least=0, below=1
    ),
    'flip': field(True, 'horizontal, with probability 1/2'),
    'condition_dropout': field(
      0.1,
      'share of images whose class a conditional network does not see, for guidance',
      least=0,
      below=1,
    ),
    'checkpoint_interval_steps': field(5_000, 'updates', above=0),
    'checkpoint_keep': field(2, 'last ones kept', above=0),
    'log_interval_steps': field(500, 'updates', above=0),
  },
  'sampling': {
    'sampler': field(
      'dpm-solver++',
      'how the process is run back',
      choices=('ancestral', 'ddim', 'dpm-solver++'),
    ),
    'num_steps': field(
      20, "evaluations of the network; ancestral takes all of the process's"
    ),
    'guidance': field(
      0.0,
      'weight w of (1 + w) noise(class) - w noise(no class); 0 is no guidance',
      least=0,
    ),
  },
}

GENERATORS = {'gaussian': _GAUSSIAN, 'ddpm': _DDPM, 'mixup': _MIXUP}
_BATCH_SIZES = {'ddpm': 250}


def register(name: str, own: dict, batch_size: int = 1_000):
  """Declares the settings of a generator of your own.

  Args:
    name: as in `registries.GENERATORS`, where its class is.
    own: its fields by name, as `fields.field` declares them; 'name' is added.
    batch_size: default of config.samples.batch_size.

  Raises:
    UserError: for the name of a generator of the package.
  """
  if name in (_GAUSSIAN['name'].default, 'ddpm', 'mixup'):
    raise UserError(f'generator {name!r} has its fields already: choose another name')
  GENERATORS[name] = {'name': field(name, 'of the generator')} | own
  _BATCH_SIZES[name] = batch_size


def of(name: str) -> dict:
  """The fields of a generator's run.

  Args:
    name: a key of `GENERATORS`; of another only what all have in common is known.
  """
  return {
    'seed': field(0, 'of the samples, and of the fit where it is random', least=0),
    # The training images that the generator sees: those the classifier trains on.
    'dataset': dataset_info.FIELDS,
    'generator': GENERATORS.get(name, {'name': field('', 'of the generator')}),
    'fitted': field(
      '', "workdir of a run whose fitted generator is sampled; '' fits one"
    ),
    'labeller': field(
      '',
      'the non-robust classifier that gives the pseudo-labels: a workdir, a file with '
      'its card, or a released name; condition takes the classes that samples are '
      'drawn for',
    ),
    'samples': {
      'count': field(1_000_000, 'in the set, after selection', above=0),
      'selection': field(
        'balanced',
        "balanced, the same number for each pseudo-label, the paper's way; or none",
        choices=('balanced', 'none'),
      ),
      'top_fraction': field(
        1.0,
        'share of the candidates that is kept, of each class those with the surest '
        "labels; 1 is the paper's way, 0.2 that of later work, which draws five times "
        'as many',
        above=0,
        most=1,
      ),
      'max_draws_factor': field(
        20.0,
        'give up when so many times the candidates (count / top_fraction) were drawn '
        'and a class is still short',
        above=0,
        free=True,
      ),
      'shard_size': field(100_000, 'images in a file', above=0),
      'draw_size': field(
        10_000,
        'images in a file of draws, of which samples are drawn in whole files: an '
        'interrupted process repeats at most so many. (They are deleted when the set '
        'is written)',
        above=0,
      ),
      'batch_size': field(
        _BATCH_SIZES.get(name, 1_000),
        'images sampled and labelled on a device at a time. Not to be changed for the '
        'number of devices: it keeps the rounding, and with it every bit, the same on '
        'all of them',
        above=0,
      ),
    },
  }


def get_config(generator: str = 'gaussian', dataset: str = 'cifar10'):
  """The config of all defaults, unlocked: 1M balanced samples.

  Args:
    generator: 'gaussian', 'ddpm', 'mixup' or a registered one.
    dataset: a data set's name.

  Raises:
    UserError: for an unknown name.
  """
  if generator not in GENERATORS:
    raise UserError(
      f'generator {generator!r}: use one of {", ".join(GENERATORS)}'
      f'{registries.did_you_mean(generator, GENERATORS)}'
    )
  c = fields.make(of(generator))
  c.dataset.name = dataset_info.INFO.get(dataset).name
  return c


def check(config):
  """Raises UserError for the first field with a value that cannot be meant."""
  if 'generator' not in config or 'samples' not in config:
    raise UserError(
      "this is not a generator's config: give an experiment such as "
      'experiments/digits_gaussian.py'
    )
  name = config.generator.name
  registries.GENERATORS.check(name, 'config.generator.name')
  dataset_info.check(config.dataset)
  if lacking := set(GENERATORS.get(name, {})) - set(config.generator):
    raise UserError(
      f'config.generator.name = {name!r} in the config of another generator (it has no '
      f'{", ".join(sorted(lacking))}): start from an experiment of {name}, or from '
      f'config.generator.get_config({name!r})'
    )
  fields.check(config, of(name))
