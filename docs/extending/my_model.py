"""A model: two convolutions and a linear layer.

Train it by

  jaxrobust train --workdir=runs/small --config=my_model.py
"""

import haiku as hk
import jax.numpy as jnp

from jaxrobust import models
from jaxrobust.config import experiments
from jaxrobust.models.batch_norm import BatchNorm
from jaxrobust.models.convolution import Conv2D


class SmallNet(hk.Module):
  """Classifies normalised images [B, H, W, C]."""

  def __init__(self, num_classes, activation, group_size):
    super().__init__(name='small_net')
    self._activation = activation
    self._convolutions = [Conv2D(16, 3, name='first'), Conv2D(32, 3, name='second')]
    self._batch_norm = BatchNorm(group_size, name='batchnorm')
    self._logits = hk.Linear(num_classes, w_init=jnp.zeros, name='logits')

  def __call__(self, images, batch_stats):
    return self._logits(self.features(images, batch_stats))

  def features(self, images, batch_stats):
    for convolution in self._convolutions:
      images = self._activation(convolution(images))
    return self._batch_norm(images, batch_stats).mean(axis=(1, 2))


@models.register('small-net')
def small_net(num_classes, activation, group_size, remat):
  """A network this small has no use for `remat`, which saves memory."""
  del remat
  return SmallNet(num_classes, activation, group_size)


def get_config(arg: str = ''):
  """The digits, by this network."""
  c = experiments.load(f'digits:{arg}').unlock()
  c.model.name = 'small-net'
  return c.lock()
