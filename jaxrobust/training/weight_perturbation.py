"""Adversarial weight perturbation: the weights too are moved against the network."""

import haiku as hk
import jax
import jax.numpy as jnp

_TINY = 1e-20  # of the published code: a gradient of 0 moves nothing.


def perturb(
  params: hk.Params, gradient: hk.Params, gamma: float | jax.Array
) -> hk.Params:
  """Moves the weights of each layer along a gradient, as far as their size allows.

  A layer's weights w move by gamma * |w| / |g| * g; biases, and BatchNorm's scale and
  offset, stay. Source: Wu et al. 2020, eq. 10, one step; which parameters move is
  their code's choice.

  Args:
    params: of Haiku, {module: {name: array}}; arrays named 'w' move.
    gradient: of the loss that is to rise, as `params`.
    gamma: length of the move relative to the weights, float [] or Python's.

  Returns:
    The perturbed parameters, as `params`.
  """

  def move(module, name, value):
    if name != 'w':
      return value
    direction = gradient[module][name]
    size = jnp.linalg.norm(value) / (jnp.linalg.norm(direction) + _TINY)
    return value + gamma * size * direction

  return hk.data_structures.map(move, params)
