r"""BigGAN samples for CIFAR-100, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=cifar100_biggan --config.labeller=LABELLER

Published: FID 12.87 for the recipe of CIFAR-10, as Zhao et al. 2020 trained it, of
10,000 samples from 10,000 images. The paper has samples of a diffusion model only
(experiments/cifar100_ddpm.py).

Uncertain: whether robust training gains from such samples; it was not tried.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples."""
  c = generator.get_config('biggan', 'cifar100')
  c.generator.training.fid.interval_steps = 5_000
  return c.lock()
