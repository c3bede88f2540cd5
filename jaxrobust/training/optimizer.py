"""The learning rate's schedule, and SGD with momentum."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from jaxrobust import config as configs


def schedule(
  name: str,
  *,
  learning_rate: float,
  num_steps: int,
  warmup_steps: int,
  drop_fractions: tuple[float, ...] = (2 / 3,),
) -> optax.Schedule:
  """Learning rate as a function of the number of completed updates.

  A linear warm-up from 0, then: `cosine`, half a cosine to 0 at the last step;
  `step`, a drop to a tenth at each of `drop_fractions`; `constant`. Source: the
  released recipe (cosine); Rice et al. 2020 and Gowal et al. 2020 (step).

  Args:
    name: of the schedule.
    learning_rate: at the end of the warm-up.
    num_steps: updates of the run, warm-up included.
    warmup_steps: updates of the warm-up; longer than the run leaves only the warm-up.
    drop_fractions: of the run, in (0, 1); two thirds in the papers above.

  Returns:
    A function of the step (int) to the learning rate (float).
  """
  warmup = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
  if warmup_steps >= num_steps:
    return warmup
  if name == 'cosine':
    main = optax.cosine_decay_schedule(learning_rate, num_steps - warmup_steps)
  elif name == 'step':
    # Deviation: the released code counts the drop from the end of the warm-up, by its
    # use of joined schedules; the papers say two thirds of the run.
    scales = {}
    for fraction in drop_fractions:
      drop = max(int(fraction * num_steps) - warmup_steps, 0)
      scales[drop] = 0.1 * scales.get(drop, 1.0)
    main = optax.piecewise_constant_schedule(learning_rate, scales)
  else:
    main = optax.constant_schedule(learning_rate)
  return optax.join_schedules([warmup, main], [warmup_steps])


def make(
  config: config_dict.ConfigDict, derived: configs.Derived
) -> optax.GradientTransformation:
  """SGD with momentum; weight decay is part of the loss (the released recipe)."""
  learning_rate = schedule(
    config.schedule,
    learning_rate=derived.learning_rate,
    num_steps=derived.num_steps,
    warmup_steps=derived.warmup_steps,
    drop_fractions=config.drop_fractions,
  )
  return optax.sgd(learning_rate, config.momentum, nesterov=config.nesterov)


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
  """Decay of the averaged parameters at `step`, small at first so that they warm up."""
  return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def halflife_decay(
  step: jax.Array | float, *, batch_size: int, halflife: float, ramp: float
) -> jax.Array:
  """Decay of averaged parameters at `step`, by a half-life in images.

  Source: Karras et al. 2020 and 2022, the released code of StyleGAN2 and EDM.

  Args:
    step: completed updates.
    batch_size: images an update.
    halflife: images in which the average forgets half of what it was.
    ramp: the half-life is at most this share of the images seen so far; 0 for any.

  Returns:
    In [0, 1); 0 at step 0 of a ramp.
  """
  if ramp:
    seen = jnp.float32(batch_size) * step
    halflife = jnp.minimum(halflife, ramp * seen)
  return 0.5 ** (batch_size / jnp.maximum(halflife, 1e-8))
