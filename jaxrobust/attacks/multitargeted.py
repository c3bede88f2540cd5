"""MultiTargeted: PGD that goes for one other class after another.

Gowal et al. 2019, "An Alternative Surrogate Loss for PGD-based Adversarial Testing"
(https://arxiv.org/abs/1910.09338): each restart climbs the difference of a target's
logit and the label's, and takes the next target. With AutoPGD it judges the networks of
"Improving Robustness using Generated Data" (AA+MT). The published attack is
`MultiTargeted(ball)`, 10 restarts of 200 steps:

>>> import jax
>>> from jaxrobust.attacks import multitargeted, norms
>>> logits_fn = lambda images: images.sum(axis=(1, 2))
>>> images = jax.random.uniform(jax.random.key(0), (8, 2, 2, 3))
>>> labels = logits_fn(images).argmax(axis=-1)
>>> attack = multitargeted.MultiTargeted(norms.L2(0.5), num_steps=20, restarts=2)
>>> rngs = jax.random.split(jax.random.key(1), 8)
>>> adversarial = attack(logits_fn, rngs, images, labels)
>>> bool((logits_fn(adversarial).argmax(axis=-1) != labels).any())
True
"""

import dataclasses

import jax

from jaxrobust.attacks import attack, norms, objectives, pgd


@dataclasses.dataclass(frozen=True)
class MultiTargeted(attack.Attack):
  """PGD on targeted margins; see the module.

  In l-inf it steps by Adam with sizes 0.1, 0.01 and 0.0001, those of the released
  code's PGD-40. The sizes in other norms are not published: here a quarter, a
  sixteenth and a 64th of epsilon along the steepest direction.

  Attributes:
    ball: where images may go.
    num_steps: gradients of an attempt; the sizes change after a half and three
      quarters of them.
    restarts: attempts; the i-th goes for target i, in the order of the logits on the
      clean image, and after the last target for the first again. What the paper
      counts as a restart is not certain: as here, or this many for each target.
    num_targets: classes beside the label that are gone for; at most all of them.
  """

  ball: norms.Ball
  num_steps: int = 200
  restarts: int = 10
  num_targets: int = 9

  def num_attempts(self, num_classes: int) -> int:
    del num_classes
    return self.restarts

  def remark(self, num_classes: int) -> str:
    if num_classes > self.num_targets:
      return ''
    return f'{num_classes - 1} targets in place of {self.num_targets}'

  def attempt(
    self,
    logits_fn: attack.LogitsFn,
    rngs: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    index: int | jax.Array,
  ) -> jax.Array:
    logits = logits_fn(images)
    rank = index % min(self.num_targets, logits.shape[-1] - 1)
    targets = objectives.ranked_class(logits, labels, rank)
    if isinstance(self.ball, norms.Linf):
      rule, sizes = 'adam', (0.1, 0.01, 0.0001)
    else:
      rule = 'normalized' if isinstance(self.ball, norms.L2) else 'sparse'
      sizes = tuple(self.ball.epsilon / n for n in (4, 16, 64))
    climb = pgd.PGD(
      self.ball,
      lambda logits, y: objectives.targeted_margin(logits, y, targets),
      pgd.STEP_RULES[rule],
      num_steps=self.num_steps,
      step_sizes=sizes,
      step_boundaries=(self.num_steps // 2, 3 * self.num_steps // 4),
    )
    return climb(logits_fn, rngs, images, labels)
