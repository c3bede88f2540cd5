r"""CIFAR-10, l-inf 8/255: the paper's main setting, with the released recipe.

  jaxrobust train --workdir=DIR \
      --config=cifar10_linf:MODEL,DATA

Published, clean / robust accuracy under AA+MT in percent (paper, table of results):
  wrn-28-10,ddpm              85.97 / 60.73
  wrn-70-16,ddpm              86.94 / 63.58
  wrn-28-10,ddpm-100m         87.50 / 63.38
  preact-resnet-18,ddpm-100m  87.35 / 58.50
  wrn-70-16,ddpm-100m         88.74 / 66.10   with --config.augment.cutmix=True

DATA is `real`, a name NAME for the sample set data/cifar10_NAME, a folder, or
`labeller`: real images without attacks, for pseudo-labels, as in every *_linf file. The
authors' file cifar10_ddpm.npz becomes data/cifar10_ddpm by
  jaxrobust data import cifar10_ddpm.npz data/cifar10_ddpm

The 100M samples were not released: bring your own as data/cifar10_ddpm-100m.

Uncertain: steps and real fraction of the runs with 100M samples were not published;
here they are those of 1M samples. The papers hold out 1,024 training images to choose
the checkpoint and report the better of two runs; the released code trains on all
50,000 for the whole schedule: --config.dataset.validation_images=0
--config.checkpoint.export=last.
"""

from jaxrobust.config import classifier


def get_config(arg: str = ''):
  """CIFAR-10 l-inf; every value is the base's."""
  return classifier.with_arg(classifier.get_config(), arg, 'wrn-28-10,ddpm')


def sweep():
  """Seeds of the paper's recipe, shares of real images and models.

  The two runs of which the papers report the better one are seed-0 and seed-1. Shares
  are those that 32 devices and four occurrences of each image divide; 0.3125 is seed-0.
  """
  for seed in range(3):
    yield f'seed-{seed}', {'seed': seed, 'variant': f'seed-{seed}'}
  for fraction in (0.0, 0.125, 0.5, 0.6875, 0.875):
    name = f'real-{fraction}'
    yield name, {'data.real_fraction': fraction, 'variant': name}
  yield 'real-1', {'data.samples': ''}
  for model in ('preact-resnet-18', 'wrn-34-10', 'wrn-70-16'):
    yield model, {'model.name': model}
