r"""EDM samples for CIFAR-10: Karras et al. 2022, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=cifar10_edm --config.labeller=LABELLER

Published: FID 1.79 with classes and 1.97 without (the least of three draws of 50,000),
with 35 evaluations of the network an image; about 2 days on 8 V100. Later work trains
robust classifiers on 1M to 50M samples of this generator (Wang et al. 2023). For the
network without classes add --config.generator.network.conditional=False, for their
other one --config.generator.network.architecture=ncsn++.

Their weights can be sampled in place of a fit of 200M images. Fetch
edm-cifar10-32x32-cond-vp.pkl from NVIDIA (CC BY-NC-SA 4.0: not for commercial use, and
what is made with them falls under the same licence), and
  jaxrobust convert --from=edm-cifar10-32x32-cond-vp.pkl \
      --to=runs/edm/generator.npz --config=cifar10_edm
  jaxrobust generate --workdir=DIR --config=cifar10_edm \
      --config.fitted=runs/edm --config.labeller=LABELLER
They saw all 50,000 training images.

Uncertain: no FID was measured here. A fit here sees the images that the classifier
trains on: the first 1,024 are held out, as there.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples; every value is the base's."""
  return generator.get_config('edm').lock()
