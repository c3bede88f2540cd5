"""SVHN, l-inf 8/255.

  jaxrobust train --workdir=DIR --config=svhn_linf:MODEL,DATA

Published, clean / robust accuracy under AA+MT in percent (paper, table of results):
  wrn-28-10,real  92.87 / 56.83
  wrn-28-10,ddpm  94.15 / 60.90

Uncertain: the paper does not give the hyper-parameters of SVHN. Here: the recipe of
CIFAR-10 (an epoch counts 50,000 images there too) without augmentation and with mean
and standard deviation 0.5, as is common for this data set, so each real image occurs
once in a batch. The `extra` images are not
used. The samples are in the file svhn_ddpm.npz.
"""

from jaxrobust.config import classifier


def get_config(arg: str = ''):
  """SVHN l-inf."""
  c = classifier.get_config('svhn')
  c.data.real_repeats = 1  # Without augmentation, repeats would be copies.
  c.augment.pad = 0
  c.augment.flip = False
  return classifier.with_arg(c, arg, 'wrn-28-10,ddpm')
