"""Class-conditional Gaussian over pixels, the paper's simplest generator.

One multivariate normal distribution for each class, fitted to the training images of
that class; samples are clipped to the pixel range. Even these samples improve robust
accuracy on CIFAR-10 (paper, sections 4 and 6). The paper does not say how the
covariance was estimated, so it is a setting:
  empirical: as it is, singular where a class has fewer images than pixels;
  ledoit-wolf, oas: shrunk to a multiple of the identity, by two estimates of how much;
  low-rank: the `rank` largest principal components, and the mean of the other
    variances in all other directions (probabilistic PCA, Tipping and Bishop 1999).

Memory: the first three keep D * D numbers of 4 bytes a class, D = H * W * C: 0.4 GB for
CIFAR-10, 3.8 GB for CIFAR-100, 121 GB for TinyImageNet. Low rank keeps rank * D: with
64, 79 MB for CIFAR-100 and 0.6 GB for TinyImageNet.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from sklearn import covariance, decomposition

from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.runs import workdir

ESTIMATORS = {
  'empirical': covariance.EmpiricalCovariance,
  'ledoit-wolf': covariance.LedoitWolf,
  'oas': covariance.OAS,
}


class Gaussian:
  """A fitted generator: pixels are mean + noise @ factor + residual * more noise.

  Attributes:
    means: float32 [K, H, W, C], in [0, 1].
    factors: float32 [K, R, D], with R = D, or the rank.
    residuals: float32 [K], deviation in directions outside the factor; not None for
      low rank only.
  """

  def __init__(
    self, means: np.ndarray, factors: np.ndarray, residuals: np.ndarray | None = None
  ):
    self.means, self.factors, self.residuals = means, factors, residuals
    self._mapped = parallel.pmap(_draw, local=True)
    self._replicated = parallel.replicate((means, factors, residuals))

  @staticmethod
  def check(settings, info: dataset_info.DatasetInfo, fits: bool = False):
    """Raises UserError for an unknown estimator, or a rank that images cannot have."""
    del fits
    if not hasattr(settings, 'covariance'):
      raise UserError(
        "config.generator.name = 'gaussian' in another generator's config: start from "
        "experiments/digits_gaussian.py or base_generator.get_config('gaussian')"
      )
    known = (*ESTIMATORS, 'low-rank')
    if settings.covariance not in known:
      raise UserError(
        f'config.generator.covariance = {settings.covariance!r}: use one '
        f'of {", ".join(known)}'
      )
    size = np.prod(info.image_shape)
    if settings.covariance == 'low-rank' and not 0 < settings.rank < size:
      raise UserError(
        f'config.generator.rank = {settings.rank}: images of {size} values allow 1 to '
        f'{size - 1}'
      )

  @staticmethod
  def conditional(settings) -> bool:
    """Whether samples are drawn for classes, by these settings."""
    del settings
    return True

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
    """Fits mean and covariance of each class.

    Args:
      real: training images, uint8 [n, H, W, C], and labels.
      info: of their data set.
      settings: with `covariance` and `rank`.
      folder, seed: not used; nothing is random and nothing takes long.

    Raises:
      UserError: as `check`, or for a class with fewer images than it needs: two, or
        two more than the rank.
    """
    del folder, seed
    cls.check(settings, info)
    low_rank = settings.covariance == 'low-rank'
    least = settings.rank + 2 if low_rank else 2
    means, factors, residuals = [], [], []
    for label in range(info.num_classes):
      images = real.images[real.labels == label]
      if len(images) < least:
        raise UserError(
          f'class {label} has {len(images)} training images, too few for '
          f'a covariance, which needs {least}: use more (config.dataset.train_images)'
          + low_rank
          * ' or a lower config.generator.rank'
        )
      pixels = images.reshape((len(images), -1)) / 255.0
      if low_rank:
        fitted = decomposition.PCA(settings.rank, svd_solver='full').fit(pixels)
        mean, values = fitted.mean_, fitted.explained_variance_
        residuals.append(np.sqrt(fitted.noise_variance_))
        # Directions inside the factor get the residual too: it is part of theirs.
        inside = np.maximum(values - fitted.noise_variance_, 0)
        factor = np.sqrt(inside)[:, None] * fitted.components_
      else:
        fitted = ESTIMATORS[settings.covariance]().fit(pixels)
        mean = fitted.location_
        # The symmetric square root exists for a singular covariance too.
        values, vectors = np.linalg.eigh(fitted.covariance_)
        factor = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
      means.append(np.float32(mean.reshape(info.image_shape)))
      factors.append(np.float32(factor))
    return cls(
      np.stack(means), np.stack(factors), np.float32(residuals) if low_rank else None
    )

  def sample(self, rng: jax.Array, indices: np.ndarray, batch_size: int):
    """Draws samples; classes take turns.

    Args:
      rng: key.
      indices: int [n], numbers of the samples.
      batch_size: images on a device at a time.

    Returns:
      (images uint8 [n, H, W, C], classes int32 [n]).
    """
    variables = (self._replicated, parallel.replicate(jax.random.key_data(rng)))
    images = parallel.map_in_batches(
      self._mapped, variables, np.int32(indices), batch_size
    )
    return images, np.int32(indices % len(self.means))

  def save(self, path: epath.Path):
    """Writes the fitted distribution to a `.npz` file."""
    arrays = {'means': self.means, 'factors': self.factors}
    if self.residuals is not None:
      arrays['residuals'] = self.residuals
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    workdir.write(path, buffer.getvalue())

  @classmethod
  def restore(cls, path: epath.Path, settings=None, info=None):
    """Reads what `save` wrote, which says all: settings and info are not used."""
    del settings, info
    with np.load(io.BytesIO(path.read_bytes())) as file:
      return cls(file['means'], file['factors'], file.get('residuals'))


def _draw(variables, indices):
  """Samples uint8 [n, H, W, C] of the given numbers, on a device."""
  (means, factors, residuals), data = variables
  rngs = parallel.key_per_slot(jax.random.wrap_key_data(data), indices)
  classes = indices % len(means)
  noise = jax.vmap(lambda rng: jax.random.normal(rng, factors.shape[1:2]))(rngs)
  outside = jnp.zeros((len(indices), factors.shape[2]))
  if residuals is not None:
    outside = jax.vmap(
      lambda rng: jax.random.normal(jax.random.fold_in(rng, 1), outside.shape[1:])
    )(rngs)
    outside *= residuals[classes][:, None]

  def add_class(deviations, label_and_factor):
    # One product for each class: gathering a factor for each sample would not fit in
    # memory for images of CIFAR's size.
    label, factor = label_and_factor
    drawn = jnp.dot(noise, factor, precision=jax.lax.Precision.HIGHEST)
    return jnp.where((classes == label)[:, None], drawn, deviations), None

  deviations, _ = jax.lax.scan(
    add_class, jnp.zeros_like(outside), (jnp.arange(len(means)), factors)
  )
  pixels = (deviations + outside).reshape((-1, *means.shape[1:])) + means[classes]
  return jnp.asarray(jnp.round(jnp.clip(pixels, 0, 1) * 255), jnp.uint8)
