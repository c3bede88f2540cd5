r"""StyleGAN2 samples for CIFAR-10: Karras et al. 2020 with adaptive augmentation.

  jaxrobust generate --workdir=DIR \
      --config=cifar10_stylegan2 --config.labeller=LABELLER

With the argument `conditional` (experiments/cifar10_stylegan2.py:conditional) networks
know classes. Published, by the configuration `cifar` of the authors: FID 2.42 with
classes and 2.92 without, of networks trained on two V100. In place of a fit, NVIDIA's
weights of both can be read into a workdir (`jaxrobust convert`).

Uncertain: which of both, and whose weights, the paper's samples were drawn with. Its
table of complementarity has 28.13 / 27.22 / 44.65 for them. The generator sees the
images that the classifier trains on: the first 1,024 are held out, as there, where
NVIDIA's weights have seen all.
"""

from jaxrobust.config import generator


def get_config(arg: str = ''):
  """1M samples.

  Args:
    arg: 'conditional', or '' for networks without classes.
  """
  if arg not in ('', 'conditional'):
    raise ValueError(f'config argument {arg!r}: use conditional, or none')
  c = generator.get_config('stylegan2')
  c.generator.network.conditional = arg == 'conditional'
  c.generator.training.fid.interval_steps = 50_000
  return c.lock()
