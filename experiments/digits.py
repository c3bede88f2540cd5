"""Handwritten digits, l-inf: the paper's experiment in minutes on a laptop.

scikit-learn ships 1,797 real 8x8 digits, so nothing is downloaded. No number of the
paper belongs to this data set; it shows the method from end to end.

  jaxrobust train --workdir=runs/digits --config=digits

The argument is MODEL,DATA as elsewhere, or `labeller`: the non-robust classifier that
gives generated images their labels, trained without attacks on the same images.

Only 100 training images are used, because that is where generated images help here:
docs/results.md has the search on the validation images that led to this setting.
"""

from jaxrobust.config import classifier


def get_config(arg: str = ''):
  """Digits: 100 training images, 400 to choose the checkpoint, 797 to test."""
  labeller = arg == 'labeller'
  c = classifier.get_config('digits')
  c.dataset.validation_images = 400
  c.dataset.train_images = 100
  c.data.batch_size = 64
  c.data.real_fraction = 0.5
  c.data.real_repeats = 1
  c.augment.pad = 0  # 8x8 leaves no room to shift
  c.augment.flip = False  # a mirrored digit is another sign
  c.model.name = 'wrn-10-1'
  c.threat.epsilon = 0.2
  c.optimizer.warmup_epochs = 5.0
  c.training.epoch_examples = 640  # 10 steps
  c.training.num_epochs = 100.0
  c.evaluation.interval_epochs = 20.0
  c.evaluation.batch_size = 400
  c.checkpoint.interval_epochs = 10.0
  c.log.interval_epochs = 5.0
  if labeller:
    c.loss.name = 'standard'
    c.training.num_epochs = 40.0
    c.evaluation.interval_epochs = 10.0
    arg = ''
  return classifier.with_arg(c, arg, 'wrn-10-1,real')


def sweep():
  """Three seeds on real images, and with the samples that launch/local.sh makes."""
  for data, samples in (('real', ''), ('gaussian', 'runs/quickstart/gaussian/samples')):
    for seed in range(3):
      name = f'seed-{seed}'
      yield f'{data}-{name}', {'data.samples': samples, 'seed': seed, 'variant': name}
