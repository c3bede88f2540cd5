"""A loss: half the cross-entropy of clean images, half that of adversarial ones.

Train with it by

  jaxrobust train --workdir=runs/half --config=my_loss.py
"""

from jaxrobust.config import experiments
from jaxrobust.training import losses


@losses.register('half-adversarial')
def half_adversarial(passes: losses.Passes, settings):
  """A mean over the images; `settings` is config.loss."""
  del settings
  both = (passes.clean_logits, passes.adv_logits)
  return sum(losses.cross_entropy(x, passes.targets).mean() for x in both) / 2


def get_config(arg: str = ''):
  """The digits, by this loss, attacked by cross-entropy."""
  c = experiments.load(f'digits:{arg}').unlock()
  c.loss.name = 'half-adversarial'
  c.attack.objective = 'cross_entropy'
  return c.lock()
