"""Settings of StyleGAN2 with ADA: the configuration `cifar` of its authors.

Their configuration F, for larger images, is in the comments where it differs.
"""

from jaxrobust.config.fields import field
from jaxrobust.config.generator_fields import adversarial

FIELDS = {
  'name': field('stylegan2', 'StyleGAN2 with adaptive augmentation'),
  'network': {
    'latent_size': field(512, 'normal numbers that an image begins with', above=0),
    'style_size': field(512, 'numbers of a style', above=0),
    'mapping_layers': field(2, 'from the former to the latter', above=0),  # F: 8
    'mapping_multiplier': field(0.01, 'on the learning rate of the mapping', above=0),
    'channels_base': field(
      32_768, 'over the height of a map are its channels, but for:', above=0
    ),
    'channels_max': field(512, 'at most', above=0),
    'conditional': field(
      False, 'whether the networks know classes; those of samples then take turns'
    ),
    'discriminator': field(
      'plain', 'its blocks', choices=('plain', 'residual')
    ),  # F: residual
    'discriminator_mapping_layers': field(8, 'of its view of the class', above=0),
    'stddev_group': field(
      32,
      'consecutive images of a batch of which the discriminator sees the deviation; '
      'one must divide the other, of this and the images of a device',
      above=0,
    ),  # F: 4
  },
  'training': {
    'num_steps': field(1_562_500, 'updates of each network', above=0),
    'batch_size': field(64, 'images in a global batch', above=0),  # F: 32
    'learning_rate': field(
      2.5e-3,
      'of Adam, before the correction for penalties that come seldom',
      above=0,
    ),  # F: 2e-3
    'b1': field(0.0, "decay of Adam's mean of gradients, an update", least=0, below=1),
    'b2': field(
      0.99, "decay of Adam's mean of their squares, an update", least=0, below=1
    ),
    'epsilon': field(1e-8, "beside Adam's root of these", above=0),
    'r1_gamma': field(
      0.01, "twice the weight of the squared gradient of D's logits", least=0
    ),  # F: 10, or by the resolution
    'r1_interval_steps': field(16, 'iterations between two updates by it', above=0),
    'path_length_weight': field(
      0.0, 'of the penalty that makes all styles move an image alike', least=0
    ),  # F: 2
    'path_length_interval_steps': field(
      4,
      'iterations between two updates by it, on half of the batch. (The correction of '
      "Adam's settings counts them at weight 0 too, as the published code does)",
      above=0,
    ),
    'path_length_decay': field(
      0.01, 'how far the running mean of lengths moves at once', above=0, most=1
    ),
    'style_mixing': field(
      0.0, 'share of images whose fine layers have another style', least=0, most=1
    ),  # F: 0.9
    'style_mean_decay': field(
      0.995, 'of the mean style, for truncation', least=0, below=1
    ),
    'ema_halflife_images': field(
      500_000, 'half-life of the average of parameters, in images', above=0
    ),  # F: 10,000
    'ema_ramp': field(
      0.05,
      'half-life at most, as a share of the images so far; 0 for no limit',
      least=0,
    ),  # F: 0
    'flip': field(False, 'mirrors half of the training images'),
    'augmentation': adversarial.AUGMENTATION,
    'fid': adversarial.FID,
    'checkpoint_interval_steps': field(5_000, 'updates', above=0),
    'checkpoint_keep': field(2, 'last ones kept', above=0),
    'log_interval_steps': field(500, 'updates', above=0),
  },
  'sampling': {
    'truncation': field(
      1.0, 'distance of styles from their mean; below 1 for less variety', least=0
    ),
  },
}

BATCH_SIZE = 250  # of samples, on a device
