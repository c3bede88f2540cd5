r"""Diffusion samples for TinyImageNet, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=tiny_imagenet_ddpm --config.labeller=LABELLER

Published: the samples raise the robust accuracy of a WRN-28-10 to 26.66 % (l-inf
8/255).

Uncertain: network, training, sampling and the number of samples are not published.
Here all is as for CIFAR-10 with one more resolution, so that attention is at 16x16 and
the smallest map has 4x4 pixels as there.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples."""
  c = generator.get_config('ddpm', 'tiny_imagenet')
  c.generator.network.multipliers = (1, 1, 2, 2, 2)
  c.samples.batch_size = 64
  return c.lock()
