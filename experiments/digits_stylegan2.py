r"""StyleGAN2 samples of the digits, pseudo-labelled and balanced.

  jaxrobust generate --workdir=runs/stylegan2 \
      --config=digits_stylegan2 --config.labeller=runs/labeller

A small network for 8x8 images. No number of the paper belongs to this data set.
"""

from jaxrobust.config import generator


def get_config():
  """10,000 samples from 100 training images."""
  c = generator.get_config('stylegan2', 'digits')
  c.dataset.validation_images = 400
  c.dataset.train_images = 100
  c.generator.network.latent_size = 32
  c.generator.network.style_size = 32
  c.generator.network.channels_max = 32
  c.generator.network.conditional = True
  c.generator.network.discriminator_mapping_layers = 2
  c.generator.network.stddev_group = 8
  c.generator.training.num_steps = 3_000
  c.generator.training.batch_size = 32
  c.generator.training.r1_gamma = 30.0  # below, samples of a class become one image
  c.generator.training.r1_interval_steps = 8
  c.generator.training.ema_halflife_images = 3_000
  c.generator.training.augmentation.kind = 'upright'
  c.generator.training.fid.interval_steps = 1_000
  c.generator.training.fid.samples = 1_000
  c.generator.training.checkpoint_interval_steps = 1_000
  c.generator.training.log_interval_steps = 100
  c.samples.count = 10_000
  return c.lock()
