"""Batch normalisation over groups of images that the hardware does not choose."""

import haiku as hk
import jax
import jax.numpy as jnp

from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.models.block import parameter_dtype

DECAY = 0.99
_EPSILON = 1e-5


class BatchNorm(hk.Module):
  """Batch normalisation; parameters and state are those of hk.BatchNorm.

  A group is `group_size` consecutive images of the global batch, which may be a part
  of a device's batch or span several devices. (The published runs take the device's
  batch: 32 of 1024 images.)
  """

  def __init__(self, group_size: int | None, name: str | None = None):
    """Makes the layer.

    Args:
      group_size: images that share batch statistics; None for running ones only.
      name: of the module.
    """
    super().__init__(name=name)
    self._group_size = group_size
    self._mean_ema = hk.ExponentialMovingAverage(DECAY, name='mean_ema')
    self._var_ema = hk.ExponentialMovingAverage(DECAY, name='var_ema')

  def __call__(self, images: jax.Array, batch_stats: bool) -> jax.Array:
    """Normalises images, then scales and shifts each channel.

    Args:
      images: [B, H, W, C], this device's share of the global batch.
      batch_stats: normalise by the statistics of each group, and move the running
        statistics towards the mean of those of this device's groups; otherwise
        normalise by the running statistics.

    Returns:
      [B, H, W, C], of the images' type; statistics are float32 or finer.

    Raises:
      UserError: if groups do not divide the batch, or the batch the groups.
    """
    shape = (1, 1, 1, images.shape[-1])
    dtype = parameter_dtype(images)
    scale = hk.get_parameter('scale', shape, dtype, jnp.ones)
    offset = hk.get_parameter('offset', shape, dtype, jnp.zeros)
    if not batch_stats:
      return _normalize(
        images, self._mean_ema.average, self._var_ema.average, scale, offset
      )
    # One image initialises a network of any group size.
    groups, devices = (
      (1, 1) if hk.running_init() else layout(len(images), self._group_size)
    )
    grouped = images.reshape(groups, -1, *images.shape[1:])
    exact = grouped.astype(dtype)
    mean = jnp.mean(exact, (1, 2, 3), keepdims=True)
    mean_of_squares = jnp.mean(jnp.square(exact), (1, 2, 3), keepdims=True)
    if devices > 1:
      mean, mean_of_squares = parallel.mean_in_group(
        jnp.stack([mean, mean_of_squares]), devices
      )
    var = mean_of_squares - jnp.square(mean)
    self._mean_ema(jnp.mean(mean, 0))
    self._var_ema(jnp.mean(var, 0))
    outputs = _normalize(grouped, mean, var, scale[None], offset[None])
    return outputs.reshape(images.shape)


def _normalize(images, mean, var, scale, offset):
  """One product and one sum, of which the gradient needs only the images."""
  slope = scale * jax.lax.rsqrt(var + _EPSILON)
  return (images * slope + (offset - mean * slope)).astype(images.dtype)


def layout(batch_size: int, group_size: int | None) -> tuple[int, int]:
  """Groups in a device's batch, and devices in a group; one of them is 1.

  Args:
    batch_size: images of a device's batch.
    group_size: images that share statistics.

  Raises:
    UserError: if neither divides the other, or group_size is None.
  """
  if group_size is None:
    raise UserError(
      'BatchNorm has no group_size, so it can only use running statistics: build '
      'the model with group_size to train it'
    )
  if batch_size % group_size == 0:
    return batch_size // group_size, 1
  if group_size % batch_size == 0:
    return 1, group_size // batch_size
  raise UserError(
    f'a BatchNorm group of {group_size} images and a device batch of {batch_size}: '
    'one must be a multiple of the other; change model.batch_norm_group, the batch '
    'size or the number of devices'
  )
