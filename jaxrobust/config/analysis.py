"""An analysis of a sample set: its fields and their checks."""

from ml_collections import config_dict

from jaxrobust.config import attack, classifier, dataset_info, fields
from jaxrobust.config.fields import field
from jaxrobust.errors import UserError

FIELDS = {
  'seed': field(
    0, 'of the choice of images, the attack and the two-sample test', least=0
  ),
  # The training images that the generator saw.
  'dataset': dataset_info.FIELDS,
  'samples': field('', 'folder of the sample set'),
  'labeller': field(
    '',
    'the non-robust classifier that pseudo-labels: a workdir, a file with its card, or '
    'a released name',
  ),
  'features': field(
    '',
    "where images are near to each other: '' is the labeller's penultimate layer; or "
    'another classifier; or lpips:FILE, see jaxrobust/models/lpips.py; or FILE.npz '
    'with `network` (a name) and features [num_images, F] `train`, `test` and '
    "`generated`, computed elsewhere of the workdir's images.npz",
  ),
  'num_images': field(
    10_000,
    'of each of train, test and generated whose features are compared; equally many, '
    'spread at random over each',
    least=4,
  ),
  'num_attacked': field(
    10_000, 'of each of test and generated that are labelled and attacked', least=1
  ),
  'batch_size': field(256, 'images on a device at a time', least=1, free=True),
  'threat': attack.THREAT,
  # On the labeller's predictions.
  'attack': classifier.FIELDS['evaluation']['attack'],
  # When a condition counts as met: rules of this program, the paper gives no numbers.
  'rules': {
    'least_accuracy': field(
      0.9,
      '(a) least share of right labels: of the labeller on test images, and of labels '
      'of the set that it agrees with',
      least=0,
      most=1,
    ),
    'most_two_sample_accuracy': field(
      0.6,
      '(b) greatest accuracy of the two-sample test, where 0.5 means no difference, or',
      least=0,
      most=1,
    ),
    'most_flips': field(
      0.5,
      'greatest share of generated images whose label the attack flips',
      least=0,
      most=1,
    ),
    'least_coverage': field(
      0.25, '(c) least coverage of the test images; 0.5 is ideal', least=0, most=1
    ),
  },
}


def get_config(dataset: str = 'cifar10') -> config_dict.ConfigDict:
  """The config of all defaults, unlocked: 10,000 images of each set.

  Args:
    dataset: a data set's name.
  """
  c = fields.make(FIELDS)
  c.dataset.name = dataset_info.INFO.get(dataset).name
  return c


def with_samples(
  c: config_dict.ConfigDict, samples: str, default: str, named: str
) -> config_dict.ConfigDict:
  """Sets the sample set, and locks the config.

  Args:
    c: the config.
    samples: a folder, which has a '/' in it, or a name; '' is the default.
    default: either, too.
    named: the folder of the set of a name, with {} in its place.
  """
  samples = samples or default
  c.samples = samples if '/' in samples else named.format(samples)
  return c.lock()


def check(config: config_dict.ConfigDict) -> None:
  """Raises UserError for the first field with a value that cannot be meant."""
  if 'rules' not in config:
    raise UserError(
      "this is not an analysis's config: give an experiment such as digits_analysis"
    )
  dataset_info.check(config.dataset)
  fields.check(config, FIELDS)
  attack.check_epsilon(config.threat.norm, config.threat.epsilon)
  for field_name, what in (
    ('samples', 'the folder of the sample set'),
    ('labeller', 'the workdir of a non-robust classifier'),
  ):
    if not config[field_name]:
      raise UserError(f'config.{field_name} is not set: give {what}')
