"""Attacks: what they may do to an image, what they climb and how, and the checks."""

import math

from ml_collections import config_dict

from jaxrobust.config import fields, registries
from jaxrobust.config.fields import field
from jaxrobust.errors import UserError

# Radii from which on a ball cannot be meant, in pixel values from 0 to 1.
_LIMITS = {'linf': 1, 'l2': 100, 'l1': 10_000}

# The fields of what an attack may do.
THREAT = {
  'norm': field('linf', 'of the perturbation', choices=tuple(_LIMITS)),
  'epsilon': field(
    8 / 255, 'greatest norm, in pixel values from 0 to 1, such as 8/255', above=0
  ),
}


def fields_of(
  objective: str, num_steps: int, step_sizes: tuple, step_boundaries: tuple
) -> dict:
  """The fields of an attack by projected gradients, with these defaults."""
  return {
    'objective': field(
      objective,
      'kl_divergence or squared_distance (to the clean prediction; with CutMix or '
      'mixup to the targets), margin, or cross_entropy (plain adversarial training: '
      'loss.name adversarial)',
      choices=registries.OBJECTIVES,
    ),
    'step_rule': field(
      'adam',
      "a gradient's way to a step: by Adam, or the steepest in l-inf (sign), l2 "
      '(normalized) or l1 (sparse)',
      choices=registries.STEP_RULES,
    ),
    'num_steps': field(num_steps, 'of the attack', above=0),
    'step_sizes': field(
      step_sizes, 'pixel values; one more than boundaries', type=tuple, above=0
    ),
    'step_boundaries': field(
      step_boundaries, 'attack steps at which the next size starts', least=0
    ),
    'initialization': field(
      'uniform',
      'at a random point of the ball, or at the image (zero)',
      choices=registries.INITIALIZATIONS,
    ),
    'restarts': field(1, 'of the attack', above=0),
  }


_FIELDS = fields_of('', 1, (), ())


def check(config: config_dict.ConfigDict) -> None:
  """Checks the fields of `fields_of`.

  Raises:
    UserError: for an unknown name, or numbers that do not describe an attack.
  """
  fields.check(config, _FIELDS, 'attack.')
  sizes, boundaries = tuple(config.step_sizes), tuple(config.step_boundaries)
  if len(sizes) != len(boundaries) + 1:
    raise UserError(
      f'attack.step_sizes = {sizes} with attack.step_boundaries = {boundaries}: '
      'give one size more than boundaries'
    )
  if any(b <= a for a, b in zip((0, *boundaries), boundaries, strict=False)):
    raise UserError(
      f'attack.step_boundaries = {boundaries}: use steps above 0, in rising order'
    )
  if config.initialization == 'zero' and config.restarts > 1:
    raise UserError(
      f"attack.restarts = {config.restarts} with attack.initialization = 'zero' "
      "would repeat one attack: use 1 restart, or initialization = 'uniform'"
    )


def check_epsilon(
  norm: str, epsilon: float, given: str = 'config.threat.epsilon'
) -> None:
  """Refuses a ball that was meant in pixel values from 0 to 255, or cannot be meant.

  Args:
    norm: 'linf', 'l2' or 'l1'.
    epsilon: radius, in pixel values from 0 to 1.
    given: what it was given as, for the message.

  Raises:
    UserError: for an l-inf of 1 or more, with which any image becomes any other; for an
      l2 of 100 or more (the published ones are 0.25 to 5), an l1 of 10,000 or more (12
      to 255, on images of up to 224x224), and for what is not above 0.
  """
  if isinstance(epsilon, str):
    raise UserError(f'{given} = {epsilon!r} is text: give a number, such as 8 / 255')
  if not 0 < epsilon < _LIMITS[norm]:
    meant = ''
    if _LIMITS[norm] <= epsilon < math.inf:
      levels = epsilon if epsilon / 255 < _LIMITS[norm] else 8
      meant = f'; did you mean {levels:g}/255?'
    raise UserError(
      f'{given} = {epsilon} in {norm}: use a number above 0 and below '
      f'{_LIMITS[norm]}, in pixel values from 0 to 1{meant}'
    )
