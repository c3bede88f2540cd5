r"""The three conditions, complementarity and coverage of samples for CIFAR-10.

  jaxrobust analyze --workdir=DIR \
      --config=cifar10_analysis:ddpm --config.labeller=LABELLER

The argument is a folder, or NAME for the sample set data/cifar10_NAME.

Published (paper, tables of complementarity and coverage), percent of generated samples
whose nearest neighbour lies in train / in test / among the generated, and coverage of
train / of test:
  mixup                       90.34 /  3.91 /  5.75   90.43 / 45.61
  class-conditional Gaussian   0.13 /  0.22 / 99.65   12.36 / 12.24
  BigGAN                      14.97 / 14.81 / 70.22   38.86 / 39.06
  StyleGAN2                   28.13 / 27.22 / 44.65   50.16 / 48.29
  DDPM                        29.29 / 29.17 / 41.54   49.07 / 49.10

Uncertain: the definition of coverage, and how many images were compared (here 10,000 of
each set). Their features are those of LPIPS, of which network is not known; by default
the features here are the labeller's, with which figures are not comparable.
"""

from jaxrobust.config import analysis


def get_config(arg: str = ''):
  """CIFAR-10, l-inf 8/255; every value is the base's."""
  return analysis.with_samples(
    analysis.get_config(), arg, 'ddpm', named='data/cifar10_{}'
  )
