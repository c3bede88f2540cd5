"""Class-conditional Gaussian over pixels, the paper's simplest generator.

One multivariate normal distribution for each class, fitted to the training images of
that class; samples are clipped to the pixel range. Even these samples improve robust
accuracy on CIFAR-10 (paper, sections 4 and 6). The paper does not say how the
covariance was estimated, so it is a setting.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from sklearn import covariance

from jaxrobust import workdir
from jaxrobust.errors import UserError

ESTIMATORS = {
  'empirical': covariance.EmpiricalCovariance,  # singular below H*W*C images
  'ledoit-wolf': covariance.LedoitWolf,  # shrunk to a multiple of the identity
  'oas': covariance.OAS,  # likewise, by another estimate of how much
}


class Gaussian:
  """A fitted generator.

  Attributes:
    means: float32 [K, H, W, C], in [0, 1].
    factors: float32 [K, D, D], square roots of the covariances, D = H * W * C.
  """

  def __init__(self, means: np.ndarray, factors: np.ndarray):
    self.means, self.factors = means, factors

  @staticmethod
  def check(settings):
    """Raises UserError for an unknown estimator."""
    if settings.covariance not in ESTIMATORS:
      raise UserError(
        f'config.generator.covariance = {settings.covariance!r}: use one '
        f'of {", ".join(ESTIMATORS)}'
      )

  @classmethod
  def fit(cls, images: np.ndarray, labels: np.ndarray, num_classes: int, settings):
    """Fits mean and covariance of each class.

    Args:
      images: uint8 [n, H, W, C].
      labels: int [n].
      num_classes: K.
      settings: with `covariance`, one of ESTIMATORS.

    Raises:
      UserError: for an unknown estimator, or a class with fewer than two images.
    """
    cls.check(settings)
    means, factors = [], []
    for label in range(num_classes):
      pixels = images[labels == label].reshape((-1, images[0].size)) / 255.0
      if len(pixels) < 2:
        raise UserError(
          f'class {label} has {len(pixels)} training images, too few for '
          'a covariance: use more (config.dataset.train_images)'
        )
      fitted = ESTIMATORS[settings.covariance]().fit(pixels)
      # The symmetric square root exists for a singular covariance too.
      values, vectors = np.linalg.eigh(fitted.covariance_)
      means.append(fitted.location_.reshape(images.shape[1:]))
      factors.append(vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T)
    return cls(np.float32(means), np.float32(factors))

  def sample(self, rng: jax.Array, indices: np.ndarray):
    """Draws samples; classes take turns.

    Args:
      rng: key.
      indices: int [n], numbers of the samples.

    Returns:
      (images uint8 [n, H, W, C], classes int32 [n]).
    """
    images, classes = _draw(self.means, self.factors, rng, jnp.asarray(indices))
    return np.asarray(images), np.asarray(classes)

  def save(self, path: epath.Path):
    """Writes the fitted distribution to a `.npz` file."""
    buffer = io.BytesIO()
    np.savez(buffer, means=self.means, factors=self.factors)
    workdir.write(path, buffer.getvalue())

  @classmethod
  def restore(cls, path: epath.Path):
    """Reads what `save` wrote."""
    with np.load(io.BytesIO(path.read_bytes())) as file:
      return cls(file['means'], file['factors'])


@jax.jit
def _draw(means, factors, rng, indices):
  """Samples [n, H, W, C] and classes [n] of the given numbers."""
  classes = jnp.asarray(indices % means.shape[0], jnp.int32)
  noise = jax.vmap(
    lambda i: jax.random.normal(jax.random.fold_in(rng, i), factors.shape[1:2])
  )(indices)
  # One product for each class: gathering a factor [D, D] for each sample would not
  # fit in memory for images of CIFAR's size.
  deviations = jax.lax.map(lambda factor: noise @ factor, factors)
  chosen = deviations[classes, jnp.arange(len(indices))]
  pixels = means[classes] + chosen.reshape((-1, *means.shape[1:]))
  return jnp.asarray(jnp.round(jnp.clip(pixels, 0, 1) * 255), jnp.uint8), classes
