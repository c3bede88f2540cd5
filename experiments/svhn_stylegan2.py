r"""StyleGAN2 samples for SVHN, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=svhn_stylegan2 --config.labeller=LABELLER

Published: figures with samples of a diffusion model only
(experiments/svhn_ddpm.py).

Uncertain: how good such networks are on SVHN, which was not tried. Here all is as
for CIFAR-10, with classes, but augmentation neither mirrors nor turns digits, which are
other signs then.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples."""
  c = generator.get_config('stylegan2', 'svhn')
  c.generator.training.fid.interval_steps = 50_000
  c.generator.network.conditional = True
  c.generator.training.augmentation.kind = 'upright'
  return c.lock()
