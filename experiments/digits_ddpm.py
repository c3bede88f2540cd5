r"""Diffusion samples of the digits, pseudo-labelled and balanced.

  jaxrobust generate --workdir=runs/ddpm \
      --config=digits_ddpm --config.labeller=runs/labeller

A small network for 8x8 images: about 13 minutes of training at the 2.6 updates a second
that two busy cores made. Its settings were not searched. No number of the paper belongs
to this data set.
"""

from jaxrobust.config import generator


def get_config():
  """10,000 samples from 100 training images."""
  c = generator.get_config('ddpm', 'digits')
  c.dataset.validation_images = 400
  c.dataset.train_images = 100
  c.generator.network.channels = 32
  c.generator.network.multipliers = (1, 2)
  c.generator.network.num_blocks = 1
  c.generator.network.attention_sizes = (4,)
  c.generator.training.num_steps = 2_000
  c.generator.training.batch_size = 64
  c.generator.training.learning_rate = 1e-3
  c.generator.training.warmup_steps = 100
  c.generator.training.ema_decay = 0.999
  c.generator.training.flip = False  # a mirrored digit is another sign
  c.generator.training.checkpoint_interval_steps = 500
  c.generator.training.log_interval_steps = 100
  c.samples.count = 10_000
  return c.lock()
