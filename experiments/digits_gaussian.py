r"""Class-conditional Gaussian samples of the digits, pseudo-labelled and balanced.

  jaxrobust generate --workdir=runs/gaussian \
      --config=digits_gaussian --config.labeller=runs/labeller

The covariance of 10 images a class in 64 dimensions is singular, so it is shrunk
(Ledoit and Wolf 2004).
"""

from jaxrobust.config import generator


def get_config():
  """10,000 samples from 100 training images."""
  c = generator.get_config('gaussian', 'digits')
  c.dataset.validation_images = 400
  c.dataset.train_images = 100
  c.generator.covariance = 'ledoit-wolf'
  c.samples.count = 10_000
  return c.lock()
