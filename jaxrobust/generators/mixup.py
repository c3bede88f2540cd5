"""Mixup of two training images, the simplest of the paper's comparisons.

A sample is ratio * one image + (1 - ratio) * another (Zhang et al. 2018), with a ratio
from Beta(alpha, alpha). It is no density of the data, but shows what sets near the
training images look like in the tables of complementarity and coverage. Samples get
pseudo-labels as those of all generators do, not the mixed labels of mixup training.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.runs import workdir


class Mixup:
  """Keeps the training images and mixes them.

  Attributes:
    images: uint8 [n, H, W, C], n at least 2.
    alpha: of the ratio's distribution.
  """

  def __init__(self, images: np.ndarray, alpha: float):
    self.images, self.alpha = images, alpha
    self._mapped = parallel.pmap(_mix, local=True)
    self._replicated = parallel.replicate((images, np.float32(alpha)))

  @staticmethod
  def conditional(settings) -> bool:
    """Whether samples are drawn for classes, by these settings."""
    del settings
    return False

  @staticmethod
  def check(settings, info: dataset_info.DatasetInfo, fits: bool = False):
    """Raises UserError for an alpha that is no parameter of a Beta distribution."""
    del info, fits
    if not hasattr(settings, 'alpha'):
      raise UserError(
        "config.generator.name = 'mixup' in another generator's config: start from "
        "experiments/digits_mixup.py or base_generator.get_config('mixup')"
      )
    if not 0 < settings.alpha < np.inf:
      raise UserError(
        f'config.generator.alpha = {settings.alpha}: use a number above 0'
      )

  @classmethod
  def fit(
    cls,
    real: datasets.Split,
    info: dataset_info.DatasetInfo,
    settings,
    *,
    folder: epath.Path | None = None,
    seed: int = 0,
  ):
    """Takes the training images as they are; `folder` and `seed` are not used."""
    del folder, seed
    cls.check(settings, info)
    if len(real.images) < 2:
      raise UserError(
        f'{len(real.images)} training images cannot be mixed: use at least 2 '
        '(config.dataset.train_images)'
      )
    return cls(real.images, settings.alpha)

  def sample(self, rng: jax.Array, indices: np.ndarray, batch_size: int):
    """Draws mixes.

    Args:
      rng: key.
      indices: int [n], numbers of the samples.
      batch_size: images on a device at a time.

    Returns:
      (images uint8 [n, H, W, C], classes int32 [n]: -1, drawn for none).
    """
    variables = (self._replicated, parallel.replicate(jax.random.key_data(rng)))
    images = parallel.map_in_batches(
      self._mapped, variables, np.int32(indices), batch_size
    )
    return images, np.full(len(indices), -1, np.int32)

  def save(self, path: epath.Path):
    """Writes the images and alpha to a `.npz` file."""
    buffer = io.BytesIO()
    np.savez(buffer, images=self.images, alpha=self.alpha)
    workdir.write(path, buffer.getvalue())

  @classmethod
  def restore(cls, path: epath.Path, settings=None, info=None):
    """Reads what `save` wrote, which says all: settings and info are not used."""
    del settings, info
    with np.load(io.BytesIO(path.read_bytes())) as file:
      return cls(file['images'], float(file['alpha']))


def _mix(variables, indices):
  """Samples uint8 [n, H, W, C] of the given numbers, on a device."""
  (images, alpha), data = variables

  def one(rng):
    first, shift, ratio = jax.random.split(rng, 3)
    i = jax.random.randint(first, (), 0, len(images))
    j = (i + jax.random.randint(shift, (), 1, len(images))) % len(images)
    ratio = jax.random.beta(ratio, alpha, alpha)
    return ratio * images[i] + (1 - ratio) * images[j]

  mixed = jax.vmap(one)(parallel.key_per_slot(jax.random.wrap_key_data(data), indices))
  return jnp.asarray(jnp.round(mixed), jnp.uint8)
