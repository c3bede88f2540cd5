r"""The three conditions, complementarity and coverage of samples of the digits.

  jaxrobust analyze --workdir=runs/paper/digits_gaussian_analysis \
      --config=digits_analysis:gaussian

The argument is a folder, or NAME for runs/paper/digits_NAME/samples. The generators saw
100 images, so no more of each set can be compared: the shares carry standard errors of
up to 5 points. No number of the paper belongs to this data set.
"""

from jaxrobust.config import analysis


def get_config(arg: str = ''):
  """The threat and the training images of experiments/digits.py."""
  c = analysis.get_config('digits')
  c.dataset.validation_images = 400
  c.dataset.train_images = 100
  c.labeller = 'runs/paper/digits_labeller'
  c.num_images = 100
  c.num_attacked = 797  # all test images
  c.threat.epsilon = 0.2
  return analysis.with_samples(c, arg, 'gaussian', named='runs/paper/digits_{}/samples')
