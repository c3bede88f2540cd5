r"""CIFAR-100, l-inf 8/255.

  jaxrobust train --workdir=DIR \
      --config=cifar100_linf:MODEL,DATA

Published, clean / robust accuracy under AA+MT in percent (paper, table of results):
  wrn-28-10,ddpm  59.18 / 30.81
  wrn-70-16,ddpm  60.46 / 33.49

The recipe is that of CIFAR-10; the samples are of a DDPM trained on CIFAR-100 (file
cifar100_ddpm.npz). Uncertain: as for CIFAR-10.
"""

from jaxrobust.config import classifier


def get_config(arg: str = ''):
  """CIFAR-100 l-inf."""
  c = classifier.get_config('cifar100')
  return classifier.with_arg(c, arg, 'wrn-28-10,ddpm')
