"""A generator: training images, each with noise of a strength that is a setting.

Make a sample set with it by

  jaxrobust generate --workdir=runs/noise --config=my_generator.py \
      --config.labeller=runs/labeller
"""

import jax
import numpy as np

from jaxrobust.config import generator, registries
from jaxrobust.config.fields import field
from jaxrobust.generators.generator import Generator

generator.register('noise', {'scale': field(0.1, 'of the noise, in [0, 1]', above=0)})


@registries.GENERATORS.register('noise')
class Noise(Generator):
  """What it learns is the training images."""

  @classmethod
  def conditional(cls, settings):
    """Samples are drawn for no class: a labeller gives them theirs."""
    return False

  @classmethod
  def fit(cls, real, info, settings, *, held_out, folder, seed):
    """Keeps the images."""
    return cls({'images': real.images}, settings, info)

  @classmethod
  def variables_like(cls, settings, info):
    """Any number of images."""
    return {'images': jax.ShapeDtypeStruct((-1, *info.image_shape), np.uint8)}

  @classmethod
  def make_draw(cls, settings, info):
    """One image a key, and noise."""

    def draw(variables, rngs, classes):
      del classes
      images = variables['images']

      def one(rng):
        which, noise = jax.random.split(rng)
        image = images[jax.random.randint(which, (), 0, len(images))]
        return image + 255 * settings.scale * jax.random.normal(noise, image.shape)

      return jax.vmap(one)(rngs)

    return draw


def get_config():
  """A thousand noisy digits."""
  c = generator.get_config('noise', 'digits')
  c.dataset.train_images, c.dataset.validation_images = 100, 400
  c.samples.count = 1_000
  return c.lock()
