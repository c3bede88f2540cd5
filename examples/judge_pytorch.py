"""Judges a WideResNet or PreActResNet of PyTorch by AutoAttack, here on all devices.

  python examples/judge_pytorch.py theirs.pt --config=cifar10_linf:wrn-28-10 \
      [--activation=relu] [--num_images=1000] [--suite=autoattack]

The file is a state dict; in a program of yours, give `from_torch` the module itself,
which is then compared with the network here on random images.
"""

import argparse

import torch

import jaxrobust
from jaxrobust.data import datasets


def main():
  """Loads the network with PyTorch, takes it over, and prints what it is judged."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('file')
  parser.add_argument('--config', required=True, help='what the network is')
  parser.add_argument('--activation', default='swish')
  parser.add_argument('--num_images', type=int, default=None)
  parser.add_argument('--suite', default='autoattack')
  args = parser.parse_args()

  config = jaxrobust.load_config(args.config, {'model.activation': args.activation})
  state = torch.load(args.file, map_location='cpu', weights_only=True)
  classifier = jaxrobust.from_torch(state, config, name=args.file)
  images, labels = datasets.of(config.dataset, 'test')
  outcome = jaxrobust.evaluate_robustness(
    classifier,
    images[: args.num_images],
    labels[: args.num_images],
    config.threat.norm,
    config.threat.epsilon,
    args.suite,
  )
  print(outcome)


if __name__ == '__main__':
  main()
