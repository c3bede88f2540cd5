r"""EDM samples for CIFAR-100, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=cifar100_edm --config.labeller=LABELLER

Published: 1M and 50M samples of such a network, for robust training (Wang et al. 2023);
Karras et al. 2022 have no CIFAR-100. Cost: that of experiments/cifar10_edm.py.

Uncertain: network, training and FID of the published samples. Here all is as for
CIFAR-10, with 100 classes.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples."""
  return generator.get_config('edm', 'cifar100').lock()
