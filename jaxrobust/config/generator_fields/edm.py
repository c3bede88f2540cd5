"""Settings of EDM: those of Karras et al. 2022 for CIFAR-10."""

from jaxrobust.config.fields import field

FIELDS = {
  'name': field('edm', 'the diffusion of Karras et al. 2022'),
  'network': {
    'architecture': field(
      'ddpm++',
      "their 'vp' and 've' networks: ddpm++, or ncsn++ with random frequencies for the "
      'noise level, the input at each resolution and smoother resampling',
      choices=('ddpm++', 'ncsn++'),
    ),
    'channels': field(128, 'at full resolution, before the multiplier'),
    'multipliers': field((2, 2, 2), 'on the channels, a resolution each', above=0),
    'num_blocks': field(4, 'residual blocks at each resolution', above=0),
    'attention_sizes': field((16,), 'heights, in pixels, of maps with attention'),
    'dropout': field(0.13, 'share of values dropped in training', least=0, below=1),
    'conditional': field(
      True, 'whether the network knows classes; classes of samples then take turns'
    ),
    'data_sigma': field(
      0.5, 'standard deviation of pixels in [-1, 1], by which it is scaled', above=0
    ),
  },
  'training': {
    'num_steps': field(390_625, 'updates; 200M images of the batch size', above=0),
    'batch_size': field(512, 'images in a global batch', above=0),
    'learning_rate': field(1e-3, 'of Adam, constant after the warm-up', above=0),
    'warmup_images': field(10_000_000, 'of the warm-up, linear from 0', least=0),
    'b1': field(0.9, "decay of Adam's mean of gradients, an update", least=0, below=1),
    'b2': field(
      0.999, "decay of Adam's mean of their squares, an update", least=0, below=1
    ),
    'epsilon': field(1e-8, "beside Adam's root of these", above=0),
    'ema_halflife_images': field(
      500_000, 'in which the average of parameters forgets half of what it was', above=0
    ),
    'ema_ramp': field(
      0.05, 'its half-life is at most this share of the images seen; 0 for any', least=0
    ),
    'log_sigma_mean': field(-1.2, 'of the logarithm of the noise in training'),
    'log_sigma_deviation': field(1.2, 'standard deviation of the same', above=0),
    'augmentation': field(
      0.12,
      'probability of each change of an image, of which the network learns: a flip '
      'upside down (in half of them), scaling, rotation, stretching and shifts',
      least=0,
      most=1,
    ),
    'flip': field(True, 'horizontal, with probability 1/2; the network learns of it'),
    'condition_dropout': field(
      0.0,
      'share of images whose class a conditional network does not see, for guidance',
      least=0,
      below=1,
    ),
    'checkpoint_interval_steps': field(5_000, 'updates', above=0),
    'checkpoint_keep': field(2, 'last ones kept', above=0),
    'log_interval_steps': field(100, 'updates', above=0),
  },
  'sampling': {
    'sampler': field(
      'heun',
      'how noise is taken away: heun, theirs, or dpm-solver++, that of ddpm',
      choices=('heun', 'dpm-solver++'),
    ),
    'num_steps': field(
      18, 'of which heun evaluates the network twice in each but the last', least=2
    ),
    'least_sigma': field(0.002, 'noise before the last step', above=0),
    'greatest_sigma': field(80.0, 'noise that sampling starts from', above=0),
    'exponent': field(
      7.0, 'the greater, the closer together small noise levels of heun are', above=0
    ),
    'churn': field(
      0.0,
      'noise that heun adds in all its steps, as a multiple of what is there; 0 for '
      'none, which makes it deterministic',
      least=0,
    ),
    'churn_least_sigma': field(0.0, 'noise from which on it adds some', least=0),
    'churn_greatest_sigma': field(80.0, 'noise up to which it adds some', least=0),
    'churn_noise': field(
      1.0,
      'standard deviation of what is added, as a multiple of the right one',
      least=0,
    ),
    'guidance': field(
      0.0,
      'weight w of (1 + w) D(class) - w D(no class); 0 is no guidance',
      least=0,
    ),
  },
}

BATCH_SIZE = 250  # of samples, on a device
