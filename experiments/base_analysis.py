"""Every field of an analysis of a sample set, with its unit: CIFAR-10, l-inf 8/255."""

from ml_collections import config_dict

from experiments import base


def get_config():
  """The base config, unlocked: 10,000 images of each of train, test and generated."""
  c = config_dict.ConfigDict()
  c.seed = 0  # of the choice of images, the attack and the two-sample test

  c.dataset = config_dict.ConfigDict()
  c.dataset.name = 'cifar10'  # digits cifar10 cifar100 svhn mnist tiny_imagenet
  c.dataset.data_dir = ''  # folder of tensorflow-datasets; '' is its default
  # The training images that the generator saw.
  c.dataset.validation_images = 1024  # held out, the first ones
  c.dataset.train_images = config_dict.placeholder(int)  # None is all the others

  c.samples = ''  # folder of the sample set
  # The non-robust classifier that pseudo-labels: workdir, file with its card, or
  # released name.
  c.labeller = ''
  # Where images are near to each other: '' is the labeller's penultimate layer; or
  # another classifier; or lpips:FILE, see jaxrobust/models/lpips.py; or FILE.npz with
  # `network` (a name) and features [num_images, F] `train`, `test` and `generated`,
  # computed elsewhere of the workdir's images.npz.
  c.features = ''

  # Images of each of train, test and generated whose features are compared; equally
  # many, spread at random over each.
  c.num_images = 10_000
  # Images of each of test and generated that are labelled and attacked.
  c.num_attacked = 10_000
  c.batch_size = 256  # images on a device at a time

  c.threat = config_dict.ConfigDict()
  c.threat.norm = 'linf'  # linf l2 l1
  c.threat.epsilon = 8 / 255  # pixel values in [0, 1]
  # On the labeller's predictions; PGD-40, with the fields of experiments/base.py.
  c.attack = base.get_config().evaluation.attack

  # When a condition counts as met: rules of this program, the paper gives no numbers.
  c.rules = config_dict.ConfigDict()
  # (a) least share of right labels: of the labeller on test images, and of labels of
  # the set that it agrees with.
  c.rules.least_accuracy = 0.9
  # (b) greatest accuracy of the two-sample test, where 0.5 means no difference, or ...
  c.rules.most_two_sample_accuracy = 0.6
  # ... greatest share of generated images whose label the attack flips.
  c.rules.most_flips = 0.5
  # (c) least coverage of the test images; 0.5 is ideal.
  c.rules.least_coverage = 0.25
  return c


def with_samples(c, samples: str, default: str, named: str):
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
