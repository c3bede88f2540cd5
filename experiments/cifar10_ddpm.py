r"""Diffusion samples for CIFAR-10: Ho et al. 2020, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=cifar10_ddpm --config.labeller=LABELLER

Published: FID 3.17 for this network with 1,000-step ancestral sampling (Ho et al.); the
paper's 1M samples are of such a network and raise the robust accuracy of a WRN-28-10 to
60.73 % (l-inf 8/255). For ancestral sampling add
  --config.generator.sampling.sampler=ancestral \
  --config.generator.sampling.num_steps=1000

Uncertain: whether the paper's authors changed anything in training or sampling. The
sampler here is DPM-Solver++ with 20 evaluations, 50 times fewer. The generator sees the
images that the classifier trains on: the first 1,024 are held out, as there.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples; every value is the base's."""
  return generator.get_config('ddpm').lock()
