"""Handwritten digits, l-inf: the paper's experiment in minutes on a laptop.

scikit-learn ships 1,797 real 8x8 digits, so nothing is downloaded. No number of the
paper belongs to this data set; it shows the method from end to end.

  python -m jaxrobust.train --workdir=runs/digits --config=experiments/digits.py

The argument is MODEL,DATA as elsewhere, or `labeller`: the non-robust classifier that
gives generated images their labels, trained without attacks on the same images.
"""

from experiments import base


def get_config(arg: str = 'wrn-10-1,real'):
  """Digits: 200 training images, 400 to choose the checkpoint, 797 to test."""
  labeller = arg == 'labeller'
  c = base.get_config().unlock()
  c.dataset.name = 'digits'
  c.dataset.validation_images = 400
  c.dataset.train_images = 200
  c.model.name = 'wrn-10-1'
  c.model.mean = (0.5,)
  c.model.std = (0.5,)
  c.threat.epsilon = 0.2
  c.data.batch_size = 128
  c.data.real_repeats = 1
  c.data.real_fraction = 0.5
  c.augment.pad = 0  # 8x8 leaves no room to shift
  c.augment.flip = False  # a mirrored digit is another sign
  c.training.epoch_examples = 1_000
  c.training.num_steps = 1_500
  c.optimizer.warmup_epochs = 10.0
  c.evaluation.interval_epochs = 40.0
  c.evaluation.batch_size = 400
  c.checkpoint.interval_epochs = 40.0
  c.log.interval_epochs = 10.0
  if labeller:
    c.loss.name = 'standard'
    c.training.num_steps = 600
    arg = ''
  return base.with_arg(c, arg)
