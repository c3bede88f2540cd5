"""An attack: random points of the ball, as many as its restarts.

Judge a run with it by

  jaxrobust evaluate --workdir=runs/digits --register=my_attack.py \\
      --suite=random-points:restarts=100,square
"""

import dataclasses

from jaxrobust.attacks import norms, suites
from jaxrobust.attacks.attack import Attack


@suites.register('random-points')
@dataclasses.dataclass(frozen=True)
class RandomPoints(Attack):
  """Numbers with a default are options of the attack."""

  ball: norms.Ball
  restarts: int = 20

  def num_attempts(self, num_classes):
    """Each attempt runs on the images that still stand."""
    return self.restarts

  def attempt(self, logits_fn, rngs, images, labels, index):
    """Images in the ball and in [0, 1]."""
    return self.ball.initialize(rngs, images)
