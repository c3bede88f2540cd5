r"""EDM samples of the digits, pseudo-labelled and balanced.

  jaxrobust generate --workdir=runs/edm \
      --config=digits_edm --config.labeller=runs/labeller

A small network for 8x8 images, without augmentation: 600 updates, about a minute of
processor time with compilation. One run: of 3,000 samples the Frechet distance in
pixels to 1,697 images that it did not see is 0.27 (of its 100 training images 0.30);
a classifier of those images sees the right class in 97.6 %. Heun's method with 35
evaluations in place of 12 gave 0.26 and 97.3 %. No number of the paper belongs to this
data set.
"""

from jaxrobust.config import generator


def get_config():
  """10,000 samples from 100 training images."""
  c = generator.get_config('edm', 'digits')
  c.dataset.validation_images = 400
  c.dataset.train_images = 100
  c.generator.network.channels = 32
  c.generator.network.multipliers = (1, 2)
  c.generator.network.num_blocks = 1
  c.generator.network.attention_sizes = (4,)
  c.generator.network.dropout = 0.1
  c.generator.training.num_steps = 600
  c.generator.training.batch_size = 32
  c.generator.training.learning_rate = 2e-3
  c.generator.training.warmup_images = 1_600
  c.generator.training.ema_halflife_images = 4_400
  c.generator.training.ema_ramp = 0.1
  c.generator.training.augmentation = 0.0
  c.generator.training.flip = False  # a mirrored digit is another sign
  c.generator.training.checkpoint_interval_steps = 300
  c.generator.training.log_interval_steps = 50
  c.generator.sampling.sampler = 'dpm-solver++'
  c.generator.sampling.num_steps = 12
  c.samples.count = 10_000
  c.samples.draw_size = 1_000
  return c.lock()
