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

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from sklearn import covariance, decomposition

from jaxrobust.config import dataset_info, registries
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.generators.generator import Generator

ESTIMATORS = {
  'empirical': covariance.EmpiricalCovariance,
  'ledoit-wolf': covariance.LedoitWolf,
  'oas': covariance.OAS,
}


@registries.GENERATORS.register('gaussian')
class Gaussian(Generator):
  """A fitted generator: pixels are mean + noise @ factor + residual * more noise.

  Its variables are a dict of
    means: float32 [K, H, W, C], in [0, 1];
    factors: float32 [K, R, D], with R = D, or the rank;
    residuals: float32 [K], deviation in directions outside the factor; for low rank
      only.
  """

  @classmethod
  def check(cls, settings, info: dataset_info.DatasetInfo):
    """Raises UserError for a rank that images cannot have."""
    size = np.prod(info.image_shape)
    if settings.covariance == 'low-rank' and not 0 < settings.rank < size:
      raise UserError(
        f'config.generator.rank = {settings.rank}: images of {size} values allow 1 to '
        f'{size - 1}'
      )

  @classmethod
  def conditional(cls, settings) -> bool:
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
    held_out: dict[str, datasets.Split] | None = None,
    folder: epath.Path | None = None,
    seed: int = 0,
  ):
    """Fits mean and covariance of each class.

    Args:
      real: training images, uint8 [n, H, W, C], and labels.
      info: of their data set.
      settings: with `covariance` and `rank`.
      held_out, folder, seed: not used; nothing is random and nothing takes long.

    Raises:
      UserError: for a class with fewer images than it needs: two, or two more than the
        rank.
    """
    del folder, seed
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
    variables = {'means': np.stack(means), 'factors': np.stack(factors)}
    if low_rank:
      variables['residuals'] = np.float32(residuals)
    return cls(variables, settings, info)

  @classmethod
  def variables_like(cls, settings, info: dataset_info.DatasetInfo):
    """Shapes of the variables; see Generator."""
    shape = lambda *axes: jax.ShapeDtypeStruct((info.num_classes, *axes), np.float32)
    size = int(np.prod(info.image_shape))
    low_rank = settings.covariance == 'low-rank'
    like = {
      'means': shape(*info.image_shape),
      'factors': shape(settings.rank if low_rank else size, size),
    }
    return like | ({'residuals': shape()} if low_rank else {})

  @classmethod
  def make_draw(cls, settings, info: dataset_info.DatasetInfo):
    """Builds the function that draws samples; see Generator."""
    del settings, info
    return _draw


def _draw(variables, rngs, classes):
  """Draws samples, on a device."""
  means, factors = variables['means'], variables['factors']
  noise = jax.vmap(lambda rng: jax.random.normal(rng, factors.shape[1:2]))(rngs)
  outside = jnp.zeros((len(rngs), factors.shape[2]))
  if 'residuals' in variables:
    outside = jax.vmap(
      lambda rng: jax.random.normal(jax.random.fold_in(rng, 1), outside.shape[1:])
    )(rngs)
    outside *= variables['residuals'][classes][:, None]

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
  return 255 * pixels
