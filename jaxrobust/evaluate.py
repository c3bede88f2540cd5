"""Judges a checkpoint: clean and robust accuracy, every image once.

Usage:
  python -m jaxrobust.evaluate --workdir=DIR [--config=experiments/FILE.py[:ARG]]

Examples:
  The final checkpoint of a training run, on its test images:
    python -m jaxrobust.evaluate --workdir=runs/digits
  A checkpoint from elsewhere, with a workdir of its own for the result:
    python -m jaxrobust.evaluate --workdir=runs/released \\
        --config=experiments/cifar10_linf.py:wrn-28-10 \\
        --config.evaluation.checkpoint=cifar10_linf_wrn28-10_ddpm_v2.npy

Without --config the workdir's own is used; overrides need --config. The fields of
config.evaluation say what is judged: suite (pgd, clean), split, num_images (the
first so many), checkpoint, attack.

Writes to the workdir: results.json (one entry an evaluation: protocol, counts,
accuracies as fractions, versions) and figures/examples.npz (the first images, their
adversarial versions, labels and predictions). An evaluation that is there already is
shown, not repeated.
"""

import hashlib
import io

import numpy as np
from absl import logging
from etils import epath

from jaxrobust import checkpoint, cli, metrics, models, parallel
from jaxrobust import config as configs
from jaxrobust import workdir as workdirs
from jaxrobust.attacks import norms, suites
from jaxrobust.data import datasets
from jaxrobust.errors import UserError

_NUM_EXAMPLES = 16


def main(config, workdir):
  """Evaluates and prints one line of result."""
  if config is None:
    config = workdirs.read_config(workdir)
  configs.check(config)
  settings = config.evaluation
  if settings.suite not in suites.SUITES:
    raise UserError(
      f'config.evaluation.suite = {settings.suite!r}: use one of '
      f'{", ".join(suites.SUITES)}'
    )
  info = datasets.INFO[config.dataset.name]
  model = models.from_config(config.model, info)
  attack, suite = None, settings.suite
  if suite == 'pgd':
    attack = suites.attack_from_config(
      settings.attack, norms.get(config.threat.norm, config.threat.epsilon)
    )
    suite = f'pgd-{attack.num_steps}'
  path = epath.Path(settings.checkpoint or workdir)
  variables = checkpoint.load(path, model)
  images, labels = datasets.load(
    config.dataset.name,
    settings.split,
    data_dir=config.dataset.data_dir,
    train_images=config.dataset.train_images,
    validation_images=config.dataset.validation_images,
  )
  if settings.split == 'test' and len(images) != info.test_size:
    raise UserError(
      f'{info.name} has {info.test_size} test images, {len(images)} are prepared: '
      'prepare it again (python -m jaxrobust.data prepare --help)'
    )
  if settings.num_images is not None:
    if settings.num_images > len(images):
      raise UserError(
        f'config.evaluation.num_images = {settings.num_images}: the '
        f'{settings.split} split has {len(images)} images'
      )
    images, labels = images[: settings.num_images], labels[: settings.num_images]
  folder = workdirs.claim(workdir, config)
  protocol = {
    'suite': suite,
    'dataset': config.dataset.name,
    'split': settings.split,
    'num_images': len(images),
    'norm': config.threat.norm,
    'epsilon': config.threat.epsilon,
    'seed': config.seed,
    'attack': settings.attack.to_dict() if attack else None,
    'checkpoint_sha256': _sha256(path),
  }
  entry = workdirs.find_result(folder, protocol)
  if entry is None:
    outcome = _judge(config, suite, model, attack, variables, images, labels)
    if parallel.is_writer():
      entry = _write(folder, protocol, outcome, images, labels)
    parallel.barrier('evaluated')
  if parallel.is_writer():
    print(
      f'{configs.experiment_name(config)}: clean {entry["clean_accuracy"]:.2%}, '
      f'{suite} {entry["robust_accuracy"]:.2%} of {len(images)} '
      f'{settings.split} images'
    )


def _judge(config, suite, model, attack, variables, images, labels) -> suites.Outcome:
  """Runs the attack over the images, with progress."""
  evaluator = suites.Evaluator(
    lambda v, x: model.apply(*v, x, batch_stats=False)[0],
    attack,
    batch_size=min(config.evaluation.batch_size, len(images)),
    seed=config.seed,
  )
  progress = metrics.Progress(suite, len(images), 'images')
  try:
    return evaluator(
      parallel.replicate(variables),
      images,
      labels,
      keep=_NUM_EXAMPLES,
      progress=progress.advance,
    )
  finally:
    progress.close()


def _write(folder, protocol, outcome: suites.Outcome, images, labels) -> dict:
  """Adds the entry to results.json and writes the examples; returns the entry."""
  (folder / 'figures').mkdir(parents=True, exist_ok=True)
  buffer = io.BytesIO()
  shown = len(outcome.adversarial)
  np.savez(
    buffer,
    images=images[:shown],
    adversarial=outcome.adversarial,
    labels=labels[:shown],
    predictions=outcome.predictions,
  )
  workdirs.write(folder / 'figures' / 'examples.npz', buffer.getvalue())
  count = len(outcome.clean)
  entry = workdirs.add_result(
    folder,
    protocol,
    {
      'clean_correct': int(outcome.clean.sum()),
      'robust_correct': int(outcome.robust.sum()),
      'clean_accuracy': float(outcome.clean.sum() / count),
      'robust_accuracy': float(outcome.robust.sum() / count),
    },
  )
  logging.info('wrote %s', folder / 'results.json')
  return entry


def _sha256(path: epath.Path) -> str:
  """Checksum of the checkpoint's file."""
  file = path / 'checkpoint.npy' if path.is_dir() else path
  return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == '__main__':
  cli.run(main)
