"""Settings of BigGAN: the recipe for CIFAR-10 of its authors' PyTorch code.

What the paper does for ImageNet is in the comments where it differs.
"""

from jaxrobust.config.fields import field
from jaxrobust.config.generator_fields import adversarial

_KIND = adversarial.AUGMENTATION['kind']._replace(default='none', meant='none')

FIELDS = {
  'name': field('biggan', 'BigGAN'),
  'network': {
    'channels': field(64, 'that multipliers multiply', above=0),  # 96
    'multipliers': field(
      (4, 4, 4, 4),
      'on the channels of the generator, from the smallest maps to the image: each has '
      'double the height and width of the one before',
      above=0,
    ),
    'discriminator_multipliers': field(
      (4, 4, 4, 4), 'on the channels, a block each', above=0
    ),
    'discriminator_halvings': field(
      2, 'how many of the first blocks halve height and width', least=0
    ),
    'attention_sizes': field(
      (), 'heights, in pixels, of maps with attention, of both networks', above=0
    ),  # (64,)
    'latent_size': field(
      128, 'normal numbers that an image begins with', above=0
    ),  # 120
    'hierarchical': field(
      False, 'whether each block has a part of them to itself'
    ),  # True
    'shared_size': field(
      0,
      'numbers of an embedding of the class, of which linear layers make what each '
      'BatchNorm takes; 0 for an embedding in each',
      least=0,
    ),  # 128
    'initialisation': field(
      'normal',
      'of weights: normal, with deviation 0.02',
      choices=('normal', 'orthogonal'),
    ),  # orthogonal
  },
  'training': {
    'num_steps': field(125_000, 'updates of the generator', above=0),
    'batch_size': field(
      200, 'images in a global batch, which discriminator_steps share', above=0
    ),
    'discriminator_steps': field(
      4, 'updates of the discriminator before each of the generator', above=0
    ),  # 2
    'loss': field('hinge', 'of both networks', choices=('hinge', 'non-saturating')),
    'generator_learning_rate': field(2e-4, 'of Adam', above=0),  # 5e-5
    'discriminator_learning_rate': field(2e-4, 'of Adam', above=0),
    'b1': field(0.0, "decay of Adam's mean of gradients, an update", least=0, below=1),
    'b2': field(
      0.999, "decay of Adam's mean of their squares, an update", least=0, below=1
    ),
    'epsilon': field(1e-8, "beside Adam's root of these", above=0),
    'spectral_epsilon': field(
      1e-8, 'least norm that a power iteration divides by', above=0
    ),
    'batch_norm_group': field(
      25,
      'consecutive images of a part of the batch that share BatchNorm statistics; one '
      'must divide the other, of this and the images of a device in a part',
      above=0,
    ),
    'batch_norm_momentum': field(
      0.1, 'how far running statistics move at once', above=0, most=1
    ),
    'standing_batches': field(
      16,
      'of generated images, with keys of their own, whose mean statistics samples are '
      'drawn with; 0 for the average of the running ones',
      least=0,
    ),
    'orthogonal_weight': field(
      0.0, "of the penalty of the generator's weights that are not orthogonal", least=0
    ),  # 1e-4
    'ema_decay': field(
      0.9999, 'of the average of the generator, an update', least=0, below=1
    ),
    'ema_start_steps': field(
      1_000, 'updates before which the average is the generator itself', least=0
    ),  # 20,000
    'flip': field(False, 'mirrors half of the training images'),
    'augmentation': {**adversarial.AUGMENTATION, 'kind': _KIND},
    'fid': adversarial.FID,
    'checkpoint_interval_steps': field(2_500, 'updates of the generator', above=0),
    'checkpoint_keep': field(2, 'last ones kept', above=0),
    'log_interval_steps': field(250, 'updates of the generator', above=0),
  },
  'sampling': {
    'truncation': field(
      0.0,
      'latent numbers beyond it are drawn anew, for less variety; 0 for none',
      least=0,
    ),
  },
}

BATCH_SIZE = 250  # of samples, on a device
