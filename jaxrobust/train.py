"""Trains a classifier on real and generated images, by TRADES or another loss.

Usage:
  jaxrobust train --workdir=DIR --config=EXPERIMENT[:MODEL,DATA]

Examples:
  Digits that ship with scikit-learn, on a laptop:
    jaxrobust train --workdir=runs/digits --config=digits
  The paper's WRN-28-10 with 1M DDPM samples (data/cifar10_ddpm is a sample set):
    jaxrobust train --workdir=gs://BUCKET/cifar10_linf_wrn-28-10_ddpm \\
        --config=cifar10_linf:wrn-28-10,ddpm
  The same with another share of real images:
    … --config.data.real_fraction=0.5 --config.variant=half

Writes to the workdir: config.json, metrics.jsonl (a line a log step), events.*
(TensorBoard), checkpoints/ (to resume from) and, at the end, checkpoint.npy (averaged
parameters and BatchNorm state, in the authors' format). Interrupted, the same command
(or `--workdir=DIR` alone) goes on where it was and ends with the same parameters, bit
for bit.
"""

from ml_collections import config_dict

from jaxrobust.runs import cli
from jaxrobust.training import classifier


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Trains the run of `config` in `workdir`."""
  classifier.train(config, workdir)


PROGRAM = cli.Program('train', main, config='needed')

if __name__ == '__main__':
  cli.run(PROGRAM)
