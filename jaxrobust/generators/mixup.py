"""Mixup of two training images, the simplest of the paper's comparisons.

A sample is ratio * one image + (1 - ratio) * another (Zhang et al. 2018), with a ratio
from Beta(alpha, alpha). It is no density of the data, but shows what sets near the
training images look like in the tables of complementarity and coverage. Samples get
pseudo-labels as those of all generators do, not the mixed labels of mixup training.
"""

import jax
import numpy as np
from etils import epath

from jaxrobust.config import dataset_info, registries
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.generators.generator import Generator


@registries.GENERATORS.register('mixup')
class Mixup(Generator):
  """Keeps the training images and mixes them.

  Its variables are a dict of
    images: uint8 [n, H, W, C], n at least 2;
    alpha: float [], of the ratio's distribution.
  """

  @classmethod
  def conditional(cls, settings) -> bool:
    """Whether samples are drawn for classes, by these settings."""
    del settings
    return False

  @classmethod
  def fit(
    cls,
    real: datasets.Split,
    info: dataset_info.DatasetInfo,
    settings,
    *,
    held_out: dict[str, datasets.Split] | None = None,
    folder: epath.Path | None = None,
    seed: int = 0,
  ):
    """Takes the training images as they are; nothing else is used."""
    del held_out, folder, seed
    if len(real.images) < 2:
      raise UserError(
        f'{len(real.images)} training images cannot be mixed: use at least 2 '
        '(config.dataset.train_images)'
      )
    variables = {'images': real.images, 'alpha': np.float64(settings.alpha)}
    return cls(variables, settings, info)

  @classmethod
  def variables_like(cls, settings, info: dataset_info.DatasetInfo):
    """Shapes of the variables; see Generator."""
    del settings
    return {
      'images': jax.ShapeDtypeStruct((-1, *info.image_shape), np.uint8),
      'alpha': jax.ShapeDtypeStruct((), np.float32),
    }

  @classmethod
  def make_draw(cls, settings, info: dataset_info.DatasetInfo):
    """Builds the function that draws samples; see Generator."""
    del settings, info
    return _draw


def _draw(variables, rngs, classes):
  """Draws mixes, on a device."""
  del classes
  images, alpha = variables['images'], variables['alpha']

  def one(rng):
    first, shift, ratio = jax.random.split(rng, 3)
    i = jax.random.randint(first, (), 0, len(images))
    j = (i + jax.random.randint(shift, (), 1, len(images))) % len(images)
    ratio = jax.random.beta(ratio, alpha, alpha)
    return ratio * images[i] + (1 - ratio) * images[j]

  return jax.vmap(one)(rngs)
