r"""EDM samples for SVHN, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=svhn_edm --config.labeller=LABELLER

Published: nothing by Karras et al. 2022. Cost: that of experiments/cifar10_edm.py.

Uncertain: all of it. Here all is as for CIFAR-10 but for the horizontal flips of half
of the images: a mirrored digit is another sign. The other changes, which come seldom,
stay, as the network is shown them.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples."""
  c = generator.get_config('edm', 'svhn')
  c.generator.training.flip = False
  return c.lock()
