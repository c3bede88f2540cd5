r"""Diffusion samples for CIFAR-100, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=cifar100_ddpm --config.labeller=LABELLER

Published: the authors' own network has FID 5.58 and inception score 10.82; its 1M
samples raise the robust accuracy of a WRN-28-10 to 30.81 % (l-inf 8/255).

Uncertain: its size, training and sampling are not published. Here all is as for
CIFAR-10, without class condition.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples."""
  c = generator.get_config('ddpm', 'cifar100')
  return c.lock()
