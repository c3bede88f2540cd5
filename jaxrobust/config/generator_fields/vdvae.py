"""Settings of the very deep VAE: those of Child 2021 for CIFAR-10."""

from jaxrobust.config.fields import field

FIELDS = {
  'name': field('vdvae', 'very deep variational autoencoder'),
  'network': {
    'width': field(384, 'channels of maps', above=0),
    'bottleneck': field(96, 'channels inside a block', above=0),
    'latent_channels': field(16, 'of the random numbers of a layer', above=0),
    'encoder': field(
      '32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3',
      'blocks: 32x11 are eleven at 32x32, 32d2 one more whose map is pooled by 2',
    ),
    'decoder': field(
      '1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21',
      'random layers: 4m1 is one at 4x4 that first adds the map of 1x1',
    ),
    'num_mixtures': field(10, 'logistics, of the distribution of a pixel', above=0),
    'pixel_mean': field(120.63838, 'of training images, in grey levels of 0 to 255'),
    'pixel_std': field(64.16736, 'of training images, in grey levels', above=0),
  },
  'training': {
    # Those of the published checkpoints came to 650,000 to 1,050,000, by validation.
    'num_steps': field(1_050_000, 'updates', above=0),
    'batch_size': field(32, 'images in a global batch', above=0),
    'learning_rate': field(2e-4, 'of AdamW, constant after the warm-up', above=0),
    'warmup_steps': field(100, 'updates, linear from 0', least=0),
    'weight_decay': field(0.01, 'of all parameters, times the learning rate', least=0),
    'b1': field(0.9, "decay of Adam's mean of gradients, an update", least=0, below=1),
    'b2': field(
      0.9, "decay of Adam's mean of their squares, an update", least=0, below=1
    ),
    'epsilon': field(1e-8, "beside Adam's root of these", above=0),
    'gradient_clip': field(200.0, 'greatest norm of the whole gradient', above=0),
    'gradient_skip': field(
      400.0, 'norm from which on an update is skipped, before the clip', above=0
    ),
    # Deviation: at update t at most (1 + t) / (10 + t); theirs is constant.
    'ema_decay': field(
      0.9999, 'of the average of parameters, an update', least=0, below=1
    ),
    'evaluation_interval_steps': field(
      10_000, 'updates between two evaluations on held-out images; 0 for none', least=0
    ),
    'early_stopping': field(
      True, 'whether the best evaluation on validation images is taken, or the last'
    ),
    'checkpoint_interval_steps': field(5_000, 'updates', above=0),
    'checkpoint_keep': field(2, 'last ones kept, beside the best', above=0),
    'log_interval_steps': field(500, 'updates', above=0),
  },
  'sampling': {
    'temperature': field(
      1.0, 'factor on the standard deviations of the prior; 1 is the model', least=0
    ),
  },
}

BATCH_SIZE = 250  # of samples, on a device
