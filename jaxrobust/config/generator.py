"""A generator's run: its fields and checks; fit, sample, pseudo-label, select, write.

`GENERATORS` has the fields of each generator's own settings, `config.generator`, which
`generator_fields` declares. A generator of your own adds its fields by `register`.
"""

from ml_collections import config_dict

from jaxrobust.config import dataset_info, fields, generator_fields, registries
from jaxrobust.config.fields import field
from jaxrobust.errors import UserError

GENERATORS = {x.FIELDS['name'].default: x.FIELDS for x in generator_fields.MODULES}
CONDITION = 'condition'  # in the place of a labeller
_BUILT_IN = tuple(GENERATORS)
_BATCH_SIZE = 1_000
_BATCH_SIZES = {
  x.FIELDS['name'].default: getattr(x, 'BATCH_SIZE', _BATCH_SIZE)
  for x in generator_fields.MODULES
}


def register(name: str, own: dict, batch_size: int = _BATCH_SIZE) -> None:
  """Declares the settings of a generator of your own.

  Args:
    name: as in `registries.GENERATORS`, where its class is.
    own: its fields by name, as `fields.field` declares them; 'name' is added.
    batch_size: default of config.samples.batch_size.

  Raises:
    UserError: for the name of a generator of the package.
  """
  if name in _BUILT_IN:
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
        _BATCH_SIZES.get(name, _BATCH_SIZE),
        'images sampled and labelled on a device at a time. Not to be changed for the '
        'number of devices: it keeps the rounding, and with it every bit, the same on '
        'all of them',
        above=0,
      ),
    },
  }


def get_config(
  generator: str = 'gaussian', dataset: str = 'cifar10'
) -> config_dict.ConfigDict:
  """The config of all defaults, unlocked: 1M balanced samples.

  Args:
    generator: a key of `GENERATORS`.
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


def check(config: config_dict.ConfigDict) -> None:
  """Raises UserError for the first field with a value that cannot be meant."""
  if 'generator' not in config or 'samples' not in config:
    raise UserError(
      "this is not a generator's config: give an experiment such as digits_gaussian"
    )
  name = config.generator.name
  registries.GENERATORS.check(name, 'config.generator.name')
  dataset_info.check(config.dataset)
  known = fields.flatten(GENERATORS.get(name, {}))
  if lacking := sorted(set(known) - set(fields.flatten(config.generator))):
    raise UserError(
      f'config.generator.name = {name!r} in the config of another generator (it has no '
      f'{", ".join(lacking[:5])}): start from an experiment of {name}, or from '
      f'config.generator.get_config({name!r})'
    )
  fields.check(config, of(name))
  training = config.generator.get('training', {})
  if training.get('early_stopping') and not config.dataset.validation_images:
    raise UserError(
      'config.generator.training.early_stopping = True chooses by validation images, '
      'and config.dataset.validation_images = 0: hold some out, or set it to False'
    )
