"""What the networks share around their residual blocks: memory and number types."""

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp


def apply_block(
  block: Callable[[jax.Array, bool], jax.Array],
  x: jax.Array,
  batch_stats: bool,
  remat: bool,
) -> jax.Array:
  """`block(x, batch_stats)`.

  Args:
    block: a Haiku module.
    x: [B, H, W, C].
    batch_stats: as in BatchNorm.
    remat: whether its gradient computes the block again from `x`, so that only `x`
      is kept.
  """
  if not remat or hk.running_init():
    return block(x, batch_stats)
  return hk.remat(lambda x: block(x, batch_stats))(x)


def mean_of_pixels(x: jax.Array) -> jax.Array:
  """Means [B, C] of maps [B, H, W, C], in single precision or better."""
  return jnp.mean(x.astype(parameter_dtype(x)), (1, 2))


def parameter_dtype(x: jax.Array) -> jnp.dtype:
  """The type of parameters and sums that go with activations `x`."""
  return jnp.promote_types(x.dtype, jnp.float32)
