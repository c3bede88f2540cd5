r"""Mixed training images of the digits, pseudo-labelled and balanced.

  jaxrobust generate --workdir=runs/mixup \
      --config=digits_mixup --config.labeller=runs/labeller
"""

from jaxrobust.config import generator


def get_config():
  """10,000 mixes of 100 training images."""
  c = generator.get_config('mixup', 'digits')
  c.dataset.validation_images = 400
  c.dataset.train_images = 100
  c.samples.count = 10_000
  return c.lock()
