"""What training with a discriminator has, whatever the networks: losses, augmentation.

The state of the augmentation is a tree of numbers beside the networks' states; see
`ada` for what moves it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.generators import ada, diff_augment, fid
from jaxrobust.generators.trained import Evaluation, Trained


class Adversarial(Trained):
  """A generator that a discriminator trains; their losses do not say how good it is."""

  @classmethod
  def evaluation(
    cls,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
    real: datasets.Split,
    held_out: dict[str, datasets.Split],
    seed: int,
  ) -> Evaluation | None:
    """By the distance from the training images; see Trained and `fid`."""
    del held_out
    return fid.evaluation(settings.training, info, real, seed)


class Loss(NamedTuple):
  """Of logits [b], which are high for what looks real.

  Attributes:
    real: `logits of real images -> []`, the discriminator's part.
    fake: `logits of generated images -> []`, the discriminator's part.
    generator: `logits of generated images -> []`.
  """

  real: Callable
  fake: Callable
  generator: Callable


LOSSES = {
  'hinge': Loss(
    lambda logits: jnp.mean(jax.nn.relu(1 - logits)),
    lambda logits: jnp.mean(jax.nn.relu(1 + logits)),
    lambda logits: -jnp.mean(logits),
  ),
  'non-saturating': Loss(
    lambda logits: jnp.mean(jax.nn.softplus(-logits)),
    lambda logits: jnp.mean(jax.nn.softplus(logits)),
    lambda logits: jnp.mean(jax.nn.softplus(-logits)),
  ),
}


class Augmentation:
  """What the discriminator sees changed, by a probability that may adapt."""

  def __init__(self, fields: config_dict.ConfigDict):
    """Makes it from `config.generator.training.augmentation`."""
    self._fields = fields

  @property
  def adapts(self) -> bool:
    """Whether the probability moves."""
    return bool(ada.KINDS.get(self._fields.kind) and self._fields.target)

  def init(self) -> dict[str, jax.Array]:
    """The state at first."""
    state = {'probability': self._fields.probability, 'signs': 0.0, 'counted': 0.0}
    return jax.tree.map(jnp.float32, state)

  def __call__(self, images: jax.Array, state: dict, rngs: jax.Array) -> jax.Array:
    """Images [b, H, W, C] as the discriminator sees them, by an image's own key."""
    kind = self._fields.kind
    if kind in diff_augment.KINDS:
      return diff_augment.augment(images, rngs, kind)
    if not ada.KINDS[kind]:
      return images
    return ada.augment(images, state['probability'], rngs, ada.KINDS[kind])

  def count(self, state: dict, logits: jax.Array) -> dict:
    """The state with the signs of these logits, of augmented real images."""
    sign = jax.lax.stop_gradient(jnp.mean(jnp.sign(logits)))
    return {
      **state,
      'signs': state['signs'] + sign,
      'counted': state['counted'] + 1,
    }

  def control(self, state: dict, step: jax.Array, batch_size: int) -> dict:
    """The state after an iteration: the probability follows the signs.

    Args:
      state: before.
      step: iterations completed before this one.
      batch_size: images in an iteration.
    """
    fields = self._fields
    found = ada.adapted(
      state['probability'],
      state['signs'] / jnp.maximum(state['counted'], 1),
      fields.target,
      batch_size * fields.interval_steps / fields.ramp_images,
    )
    changed = {'probability': found, 'signs': 0.0, 'counted': 0.0}
    due = (step + 1) % fields.interval_steps == 0
    return {k: jnp.where(due, v, state[k]) for k, v in changed.items()}
