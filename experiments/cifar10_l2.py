"""CIFAR-10, l2 128/255.

  jaxrobust train --workdir=DIR --config=cifar10_l2:MODEL,DATA

Published, clean / robust accuracy under AA+MT in percent (paper, table of results):
  wrn-28-10,ddpm  90.24 / 77.37
  wrn-70-16,ddpm  90.83 / 78.31

Uncertain: the attacks of the l2 runs were not published. Here: the most common ones,
10 normalised-gradient steps of 15/255 in training and 40 of 30/255 in evaluation.
Everything else is as for l-inf.
"""

from jaxrobust.config import classifier


def get_config(arg: str = ''):
  """CIFAR-10 l2."""
  c = classifier.get_config()
  c.threat.norm = 'l2'
  c.threat.epsilon = 128 / 255
  c.attack.step_rule = 'normalized'
  c.attack.step_sizes = (15 / 255,)
  c.attack.step_boundaries = ()
  c.evaluation.attack.step_rule = 'normalized'
  c.evaluation.attack.step_sizes = (30 / 255,)
  c.evaluation.attack.step_boundaries = ()
  return classifier.with_arg(c, arg, 'wrn-28-10,ddpm')
