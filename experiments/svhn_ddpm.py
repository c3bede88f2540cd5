r"""Diffusion samples for SVHN, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=svhn_ddpm --config.labeller=LABELLER

Published: the samples raise the robust accuracy of a WRN-28-10 to 60.90 % (l-inf
8/255).

Uncertain: network, training and sampling are not published. Here all is as for
CIFAR-10 but for the flips: a mirrored digit is another sign.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples."""
  c = generator.get_config('ddpm', 'svhn')
  c.generator.training.flip = False
  return c.lock()
