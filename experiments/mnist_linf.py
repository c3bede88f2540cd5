"""MNIST, l-inf 0.3.

  jaxrobust train --workdir=DIR --config=mnist_linf:MODEL,DATA

Published (Gowal et al. 2020, arXiv 2010.03593), clean / robust accuracy in percent:
  wrn-28-10,real  99.26 / 96.34

Images are padded from 28 to 32 pixels and scaled to [-1, 1] inside the network, as
the released checkpoint expects. Uncertain: the other hyper-parameters; here they are
those of CIFAR-10, without augmentation, so each image occurs once in a batch.
"""

from jaxrobust.config import classifier


def get_config(arg: str = ''):
  """MNIST l-inf."""
  c = classifier.get_config('mnist')
  c.threat.epsilon = 0.3
  c.data.real_repeats = 1  # Without augmentation, repeats would be copies.
  c.augment.pad = 0
  c.augment.flip = False
  c.model.padding = 2
  return classifier.with_arg(c, arg, 'wrn-28-10,real')
