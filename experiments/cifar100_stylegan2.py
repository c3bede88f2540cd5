r"""StyleGAN2 samples for CIFAR-100, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=cifar100_stylegan2 --config.labeller=LABELLER

Published: figures with samples of a diffusion model only
(experiments/cifar100_ddpm.py).

Uncertain: how good such networks are on CIFAR-100, which was not tried. Here all is as
for CIFAR-10, with classes.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples."""
  c = generator.get_config('stylegan2', 'cifar100')
  c.generator.training.fid.interval_steps = 50_000
  c.generator.network.conditional = True
  return c.lock()
