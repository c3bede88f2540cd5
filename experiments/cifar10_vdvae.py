r"""VD-VAE samples for CIFAR-10: Child 2021, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=cifar10_vdvae --config.labeller=LABELLER

Published: 2.87 bits a dimension on the test images, the mean of four seeds (2.84 to
2.90), each under a week on two V100. No FID is published; samples of the released
weights were reported at about 36 to 40, where Ho et al.'s diffusion has 3.17. The paper
compares samples of this model with those of others, and gains less from them. For the
released weights, in the place of a fit of one's own:
  jaxrobust convert --from=cifar10-seed0-iter-900000-model-ema.th \
      --to=DIR/generator.npz --config=cifar10_vdvae

Uncertain: which weights the paper's authors sampled, and at which temperature; here it
is 1. Child holds 5,000 random training images out to choose a checkpoint by, and this
the 1,024 that the classifier is chosen by, too. The released weights have seen most of
these. Others who ported the model report that few updates must be skipped: watch
train/loss_skipped, and raise gradient_skip to 1,000 where it stays near 1.
"""

from jaxrobust.config import generator


def get_config():
  """1M samples; every value is the base's."""
  return generator.get_config('vdvae').lock()
