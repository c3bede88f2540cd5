r"""EDM samples for TinyImageNet, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=tiny_imagenet_edm --config.labeller=LABELLER

Published: nothing for this data set by Karras et al. 2022. Network, batch, learning
rate and augmentation are those of their FFHQ at 64x64: about 4 days on 8 V100.

Uncertain: whether they suit 200 classes. Dropout is that of CIFAR-10, 0.13; theirs is
0.05 for 70,000 faces and 0.25 for 16,000 animals, and here are 500 images a class.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples."""
  c = generator.get_config('edm', 'tiny_imagenet')
  c.generator.network.multipliers = (1, 2, 2, 2)
  c.generator.training.num_steps = 781_250  # 200M images
  c.generator.training.batch_size = 256
  c.generator.training.learning_rate = 2e-4
  c.generator.training.augmentation = 0.15
  c.samples.batch_size = 64
  return c.lock()
