r"""CIFAR-100, l-inf 8/255.

  python -m jaxrobust.train --workdir=DIR \
      --config=experiments/cifar100_linf.py:MODEL,DATA

Published, clean / robust accuracy under AA+MT in percent (paper, table of results):
  wrn-28-10,ddpm  59.18 / 30.81
  wrn-70-16,ddpm  60.46 / 33.49

The recipe is that of CIFAR-10; the samples are of a DDPM trained on CIFAR-100 (file
cifar100_ddpm.npz). Uncertain: as for CIFAR-10.
"""

from experiments import base


def get_config(arg: str = ''):
  """CIFAR-100 l-inf."""
  c = base.get_config()
  c.dataset.name = 'cifar100'
  c.model.mean = (0.5071, 0.4865, 0.4409)
  c.model.std = (0.2673, 0.2564, 0.2762)
  return base.with_arg(c, arg, 'wrn-28-10,ddpm')
