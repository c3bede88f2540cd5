"""Every field of a generator's run: fit, sample, pseudo-label, select, write."""

from ml_collections import config_dict


def get_config(generator: str = 'gaussian'):
  """The base config, unlocked: for CIFAR-10, 1M balanced samples.

  Args:
    generator: 'gaussian', 'ddpm' or 'mixup'; each has its own fields.
  """
  c = config_dict.ConfigDict()
  c.seed = 0  # of the samples, and of the fit where it is random

  # The training images that the generator sees: those the classifier trains on.
  c.dataset = config_dict.ConfigDict()
  c.dataset.name = 'cifar10'  # digits cifar10 cifar100 svhn mnist tiny_imagenet
  c.dataset.data_dir = ''  # folder of tensorflow-datasets; '' is its default
  c.dataset.validation_images = 1024  # held out, the first ones
  c.dataset.train_images = config_dict.placeholder(int)  # None is all the others

  c.generator = {'gaussian': _gaussian, 'ddpm': _ddpm, 'mixup': _mixup}[generator]()
  # Workdir of a run whose fitted generator is sampled; '' fits one.
  c.fitted = ''

  # The non-robust classifier that gives the pseudo-labels: a workdir, a file with its
  # card, or a released name; 'condition' takes the classes that samples are drawn for.
  c.labeller = ''

  c.samples = config_dict.ConfigDict()
  c.samples.count = 1_000_000  # in the set, after selection
  # 'balanced': the same number for each pseudo-label, the paper's way; 'none'.
  c.samples.selection = 'balanced'
  # Share of the candidates that is kept, of each class those with the surest labels; 1
  # is the paper's way, 0.2 that of later work, which draws five times as many.
  c.samples.top_fraction = 1.0
  # Give up when so many times the candidates (count / top_fraction) were drawn and a
  # class is still short.
  c.samples.max_draws_factor = 20.0
  c.samples.shard_size = 100_000  # images in a file
  # Images in a file of draws, of which samples are drawn in whole files: an interrupted
  # process repeats at most so many. (They are deleted when the set is written.)
  c.samples.draw_size = 10_000
  # Images sampled and labelled on a device at a time. Not to be changed for the number
  # of devices: it keeps the rounding, and with it every bit, the same on all of them.
  c.samples.batch_size = 250 if generator == 'ddpm' else 1_000
  return c


def _gaussian():
  """One normal distribution a class."""
  c = config_dict.ConfigDict()
  c.name = 'gaussian'
  c.covariance = 'empirical'  # empirical ledoit-wolf oas low-rank
  c.rank = 64  # principal components of low-rank, not used by the others
  return c


def _mixup():
  """Mixes of two training images."""
  c = config_dict.ConfigDict()
  c.name = 'mixup'
  c.alpha = 1.0  # of the ratio's Beta(alpha, alpha); 1 is uniform
  return c


def _ddpm():
  """Denoising diffusion; the values are those of Ho et al. 2020 for CIFAR-10."""
  c = config_dict.ConfigDict()
  c.name = 'ddpm'

  c.network = config_dict.ConfigDict()
  c.network.channels = 128  # at full resolution, before the multiplier
  c.network.multipliers = (1, 2, 2, 2)  # on the channels, a resolution each
  c.network.num_blocks = 2  # residual blocks at each resolution
  c.network.attention_sizes = (16,)  # heights, in pixels, of maps with attention
  c.network.dropout = 0.1  # share of values dropped in training
  # Whether the network knows classes; classes of samples then take turns.
  c.network.conditional = False

  c.process = config_dict.ConfigDict()
  c.process.num_steps = 1_000
  c.process.first_beta = 1e-4  # variance that a step adds, growing linearly
  c.process.last_beta = 0.02

  c.training = config_dict.ConfigDict()
  c.training.num_steps = 800_000  # updates
  c.training.batch_size = 128  # images in a global batch
  c.training.learning_rate = 2e-4  # of Adam, constant after the warm-up
  c.training.warmup_steps = 5_000  # updates, linear from 0
  c.training.b1 = 0.9  # decay of Adam's mean of gradients, an update
  c.training.b2 = 0.999  # of their squares'
  c.training.epsilon = 1e-8  # beside Adam's root of these
  # Greatest norm of the whole gradient. Deviation: of the mean over all devices; their
  # released code clips each device's before it takes the mean.
  c.training.gradient_clip = 1.0
  # An update. Deviation: at update t at most (1 + t) / (10 + t); theirs is constant.
  c.training.ema_decay = 0.9999
  c.training.flip = True  # horizontal, with probability 1/2
  # Share of images whose class a conditional network does not see, for guidance.
  c.training.condition_dropout = 0.1
  c.training.checkpoint_interval_steps = 5_000  # updates
  c.training.checkpoint_keep = 2  # last ones kept
  c.training.log_interval_steps = 500  # updates

  c.sampling = config_dict.ConfigDict()
  c.sampling.sampler = 'dpm-solver++'  # dpm-solver++ ddim ancestral
  c.sampling.num_steps = 20  # evaluations of the network; ancestral takes all 1,000
  # Weight w of (1 + w) noise(class) - w noise(no class); 0 is no guidance.
  c.sampling.guidance = 0.0
  return c
