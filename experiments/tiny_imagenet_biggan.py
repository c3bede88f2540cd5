r"""BigGAN samples for TinyImageNet, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=tiny_imagenet_biggan --config.labeller=LABELLER

Published: nothing for this data set. The paper has samples of a diffusion model only
(experiments/tiny_imagenet_ddpm.py).
Networks are those of the authors' code for 64x64 pixels, with what Brock et al. 2019
use for ImageNet: a shared embedding, latent vectors in parts, attention, orthogonal
weights.

Uncertain: how good such networks are on TinyImageNet, which was not tried; length and
batch are neither published nor searched.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples."""
  c = generator.get_config('biggan', 'tiny_imagenet')
  c.generator.network.multipliers = (16, 16, 8, 4, 2)
  c.generator.network.discriminator_multipliers = (1, 2, 4, 8, 16)
  c.generator.network.discriminator_halvings = 4
  c.generator.network.attention_sizes = (32,)
  c.generator.network.latent_size = 120
  c.generator.network.hierarchical = True
  c.generator.network.shared_size = 128
  c.generator.network.initialisation = 'orthogonal'
  c.generator.training.num_steps = 100_000
  c.generator.training.batch_size = 512
  c.generator.training.discriminator_steps = 2
  c.generator.training.batch_norm_group = 256
  c.generator.training.generator_learning_rate = 5e-5
  c.generator.training.spectral_epsilon = 1e-6
  c.generator.training.orthogonal_weight = 1e-4
  c.generator.training.ema_start_steps = 20_000
  c.generator.training.fid.interval_steps = 5_000
  c.samples.batch_size = 64
  return c.lock()
