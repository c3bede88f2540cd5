r"""StyleGAN2 samples for TinyImageNet, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=tiny_imagenet_stylegan2 --config.labeller=LABELLER

Published: figures with samples of a diffusion model only
(experiments/tiny_imagenet_ddpm.py).

Uncertain: how good such networks are on TinyImageNet, which was not tried. Here the
networks are those of the authors' configuration F for larger images: 8 layers of
mapping, a residual discriminator, path length and mixing of styles, with R1 by their
rule for the resolution (0.0002 of the pixels, over the batch).
"""

from jaxrobust.config import generator


def get_config():
  """1M samples."""
  c = generator.get_config('stylegan2', 'tiny_imagenet')
  c.generator.training.fid.interval_steps = 50_000
  c.generator.network.conditional = True
  c.generator.network.mapping_layers = 8
  c.generator.network.discriminator = 'residual'
  c.generator.network.stddev_group = 4
  c.generator.training.num_steps = 781_250  # 25M images
  c.generator.training.batch_size = 32
  c.generator.training.learning_rate = 2e-3
  c.generator.training.r1_gamma = 2e-4 * 64**2 / 32
  c.generator.training.path_length_weight = 2.0
  c.generator.training.style_mixing = 0.9
  c.generator.training.ema_halflife_images = 10_000
  c.generator.training.ema_ramp = 0.0
  c.samples.batch_size = 64
  return c.lock()
