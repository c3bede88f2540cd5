"""Settings of denoising diffusion: those of Ho et al. 2020 for CIFAR-10."""

from jaxrobust.config.fields import field

FIELDS = {
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
      choices=('ancestral', 'ddim', 'dpm-solver++', 'heun'),
    ),
    'num_steps': field(
      20,
      "evaluations of the network; ancestral takes all of the process's; heun, that of "
      'edm, makes two in each step but the last',
    ),
    'guidance': field(
      0.0,
      'weight w of (1 + w) noise(class) - w noise(no class); 0 is no guidance',
      least=0,
    ),
  },
}

BATCH_SIZE = 250  # of samples, on a device
