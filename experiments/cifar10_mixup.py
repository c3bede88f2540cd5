r"""Mixed training images of CIFAR-10, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=cifar10_mixup --config.labeller=LABELLER

Published: mixup is the first row of the tables of complementarity and coverage (see
experiments/cifar10_analysis.py).

Uncertain: how the mixes of that row were drawn. Here each is of two different training
images, with a ratio from Beta(1, 1), which is uniform.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples; every value is the base's."""
  return generator.get_config('mixup').lock()
