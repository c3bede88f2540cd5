"""Projected gradient ascent, with any objective, step rule and ball."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import config_dict

from jaxrobust.attacks import attack, norms, objectives
from jaxrobust.config import attack as attack_configs
from jaxrobust.config import registries

STEP_RULES, INITIALIZATIONS = registries.STEP_RULES, registries.INITIALIZATIONS


def _steepest(ball: type[norms.Ball]) -> optax.GradientTransformation:
  """Steps as long as the step size in the norm of a kind of ball."""
  return optax.stateless(lambda gradient, _: ball.steepest(gradient))


# A gradient's way to a step, before the step size. The published attacks use Adam
# with these constants (released code).
STEP_RULES.register('adam', optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-9))
STEP_RULES.register('sign', _steepest(norms.Linf))
STEP_RULES.register('normalized', _steepest(norms.L2))
STEP_RULES.register('sparse', _steepest(norms.L1))

# (ball, rngs [B], images [B, H, W, C]) → where an attack starts, [B, H, W, C].
INITIALIZATIONS.register(
  'uniform', lambda ball, rngs, images: ball.initialize(rngs, images)
)
INITIALIZATIONS.register('zero', lambda ball, rngs, images: images)


@dataclasses.dataclass(frozen=True)
class PGD(attack.Attack):
  """Climbs an objective inside a ball; each image by itself.

  Attributes:
    ball: where images may go.
    objective: (logits [B, K], reference) → [B], to be maximised.
    step_rule: from gradients [B, H, W, C] to steps of the same shape, element by
      element or image by image; one of STEP_RULES or another such transformation.
    num_steps: gradients of a restart.
    step_sizes: in pixel values, used in turn.
    step_boundaries: steps at which the next size starts, one fewer than the sizes.
    initialization: 'uniform', at a random point of the ball, or 'zero', at the
      images. The KL divergence from the network's own prediction has no gradient
      there.
    restarts: random starts, of which the one with the highest objective is kept for
      each image.
  """

  ball: norms.Ball
  objective: objectives.Objective
  step_rule: optax.GradientTransformation
  num_steps: int
  step_sizes: tuple[float, ...]
  step_boundaries: tuple[int, ...] = ()
  initialization: str = 'uniform'
  restarts: int = 1

  def __call__(
    self,
    logits_fn: attack.LogitsFn,
    rngs: jax.Array,
    images: jax.Array,
    reference: jax.Array,
  ) -> jax.Array:
    """Attacks a batch.

    The first restart is the attack without restarts. No gradient flows through the
    result; `logits_fn` should close over parameters that are held fixed, or else
    their unused derivatives are traced too.

    Args:
      logits_fn: images [B, H, W, C] in [0, 1] → logits [B, K].
      rngs: keys [B], one an image, so that no start depends on the batch.
      images: [B, H, W, C] in [0, 1], float.
      reference: what the objective takes, [B] or [B, K].

    Returns:
      Adversarial images [B, H, W, C], in the ball and in [0, 1].
    """
    images, reference = jax.lax.stop_gradient((images, reference))
    score = lambda x: self.objective(logits_fn(x), reference)
    keys = lambda index: jax.vmap(lambda rng: jax.random.fold_in(rng, index))(rngs)
    if self.restarts == 1:
      return jax.lax.stop_gradient(self._climb(score, keys(0), images))

    def restart(index, best):
      kept, highest = best
      found = self._climb(score, keys(index), images)
      scores = score(found).astype(highest.dtype)
      better = scores > highest
      return (
        jnp.where(better[:, None, None, None], found, kept),
        jnp.where(better, scores, highest),
      )

    nothing = (images, jnp.full(len(images), -jnp.inf, images.dtype))
    found, _ = jax.lax.fori_loop(0, self.restarts, restart, nothing)
    return jax.lax.stop_gradient(found)

  def num_attempts(self, num_classes: int) -> int:
    del num_classes
    return 1  # Restarts are within.

  def attempt(
    self,
    logits_fn: attack.LogitsFn,
    rngs: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    index: int | jax.Array,
  ) -> jax.Array:
    del index
    return self(logits_fn, rngs, images, labels)

  def _climb(self, score, rngs, images):
    """One restart: from its start to its last iterate."""
    # Summed over the batch, so that each image gets the gradient of its own score.
    gradient_of = jax.grad(lambda x: jnp.sum(score(x)))
    sizes = self._sizes(images.dtype)

    def step(index, carry):
      iterate, state = carry
      update, state = self.step_rule.update(gradient_of(iterate), state)
      return self.ball.project(iterate + sizes[index] * update, images), state

    start = INITIALIZATIONS[self.initialization](self.ball, rngs, images)
    start = (start, self.step_rule.init(images))
    return jax.lax.fori_loop(0, self.num_steps, step, start)[0]

  def _sizes(self, dtype) -> jax.Array:
    """The step size of each step, [num_steps]."""
    stage = np.searchsorted(
      np.asarray(self.step_boundaries, int), np.arange(self.num_steps), 'right'
    )
    return jnp.asarray(self.step_sizes, dtype)[stage]


def from_config(config: config_dict.ConfigDict, ball: norms.Ball) -> PGD:
  """The attack of a config.

  Args:
    config: has the fields that `config.attack` declares.
    ball: where images may go.

  Raises:
    UserError: for an unknown name, or numbers that do not describe an attack.
  """
  attack_configs.check(config)
  return PGD(
    ball=ball,
    objective=objectives.OBJECTIVES[config.objective],
    step_rule=STEP_RULES[config.step_rule],
    num_steps=config.num_steps,
    step_sizes=tuple(config.step_sizes),
    step_boundaries=tuple(config.step_boundaries),
    initialization=config.initialization,
    restarts=config.restarts,
  )
