"""Every field of a generator's run: fit, sample, pseudo-label, select, write."""

from ml_collections import config_dict


def get_config():
  """The base config, unlocked: Gaussian for CIFAR-10, 1M balanced samples."""
  c = config_dict.ConfigDict()
  c.seed = 0  # of the samples

  # The training images that the generator sees: those the classifier trains on.
  c.dataset = config_dict.ConfigDict()
  c.dataset.name = 'cifar10'  # digits cifar10 cifar100 svhn mnist tiny_imagenet
  c.dataset.data_dir = ''  # folder of tensorflow-datasets; '' is its default
  c.dataset.validation_images = 1024  # held out, the first ones
  c.dataset.train_images = config_dict.placeholder(int)  # None is all the others

  c.generator = config_dict.ConfigDict()
  c.generator.name = 'gaussian'
  c.generator.covariance = 'empirical'  # empirical ledoit-wolf oas

  # The non-robust classifier that gives the pseudo-labels: the workdir of its run.
  c.labeller = ''

  c.samples = config_dict.ConfigDict()
  c.samples.count = 1_000_000  # in the set, after selection
  # 'balanced': the same number for each pseudo-label, the paper's way; 'none'.
  c.samples.selection = 'balanced'
  # Give up when so many times `count` were drawn and a class is still short.
  c.samples.max_draws_factor = 20.0
  c.samples.shard_size = 100_000  # images in a file
  c.samples.batch_size = 1_000  # images sampled and labelled at a time
  return c
