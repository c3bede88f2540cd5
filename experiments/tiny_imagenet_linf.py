r"""TinyImageNet-200 (64x64), l-inf 8/255.

  jaxrobust train --workdir=DIR \
      --config=tiny_imagenet_linf:MODEL,DATA

Published, clean / robust accuracy under AA+MT in percent (paper, table of results):
  wrn-28-10,real  51.56 / 21.56
  wrn-28-10,ddpm  60.95 / 26.66

Uncertain: the paper does not give the hyper-parameters of TinyImageNet, nor were its
samples released. Here: the recipe of CIFAR-10 (an epoch counts 50,000 images), pad 4
and flip, and the usual mean and standard deviation. The official validation images
are the test images.
"""

from jaxrobust.config import classifier


def get_config(arg: str = ''):
  """TinyImageNet l-inf."""
  c = classifier.get_config('tiny_imagenet')
  return classifier.with_arg(c, arg, 'wrn-28-10,ddpm')
