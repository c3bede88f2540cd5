r"""BigGAN samples for CIFAR-10: Brock et al. 2019, pseudo-labelled and balanced.

  jaxrobust generate --workdir=DIR \
      --config=cifar10_biggan --config.labeller=LABELLER

Published: FID 9.59 for this recipe, that of its authors' PyTorch code, as Zhao et al.
2020 trained it, and 8.70 with the argument `diff-augment`
(experiments/cifar10_biggan.py:diff-augment), which mirrors images and trains for twice
as long; both of 10,000 samples from 10,000 images. Weights of such networks can be read
into a workdir in place of a fit (`jaxrobust convert`).

The 50 images of an update and their two groups of BatchNorm are for one or two devices.
On eight, such as v5e:2x4, add
  --config.generator.training.batch_size=192 \
  --config.generator.training.batch_norm_group=24

Uncertain: which BigGAN the paper's samples were drawn with. Its table of
complementarity has 14.97 / 14.81 / 70.22 for them. The generator sees the images that
the classifier trains on: the first 1,024 are held out, as there.
"""

from jaxrobust.config import generator


def get_config(arg: str = ''):
  """1M samples.

  Args:
    arg: 'diff-augment', or '' for no augmentation.
  """
  if arg not in ('', 'diff-augment'):
    raise ValueError(f'config argument {arg!r}: use diff-augment, or none')
  c = generator.get_config('biggan')
  c.generator.training.fid.interval_steps = 5_000
  if arg:
    c.generator.training.augmentation.kind = arg
    c.generator.training.flip = True
    c.generator.training.num_steps = 250_000
  return c.lock()
