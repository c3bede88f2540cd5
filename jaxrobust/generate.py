"""Makes a sample set: fits a generator, samples it, pseudo-labels and selects.

Usage:
  python -m jaxrobust.generate --workdir=DIR --config=experiments/FILE.py \\
      --config.labeller=LABELLER [--stage=STAGE]

Example:
  python -m jaxrobust.train --workdir=runs/labeller \\
      --config=experiments/digits.py:labeller
  python -m jaxrobust.generate --workdir=runs/gaussian \\
      --config=experiments/digits_gaussian.py --config.labeller=runs/labeller
  python -m jaxrobust.train --workdir=runs/robust --config=experiments/digits.py \\
      --config.data.samples=runs/gaussian/samples

The generator sees the training images only. LABELLER gives each sample its class, and
how sure it is of it, which is kept in the set: a workdir, a file of parameters with its
card, the name of a released checkpoint, or `condition`, the class that the sample was
drawn for (without confidences). config.samples.selection says which samples are kept:
balanced, the same number of each class, the authors' way; or none, the first ones.
With config.samples.top_fraction=0.2 five times as many are candidates, and the surest
fifth of each class is kept.

Stages, each of which --stage runs alone, where those before it are done; without it
all run that are not done yet:
  fit      generator.npz, the fitted generator; one that trains writes metrics.jsonl,
           events.* and checkpoints/ too. --config.fitted=DIR takes that of another run
  sample   drawn/, the samples that are likely to be enough
  label    labelled/, their classes and confidences. Where a class turns out short, this
           and the stage before run again: without --stage by themselves
  select   samples/, the sample set: images-*.npy, labels-*.npy, confidence-*.npy and
           metadata.json, which has the rule, the pool's and the set's counts. Then
           drawn/ and labelled/, which took the pool's size on disk, are removed

Interrupted anywhere, the same command goes on from the last checkpoint of the fit, the
last file of draws or of labels. Sample i depends on (seed, i) only: the set has the
same checksums from any number of devices and processes. Several processes fit together,
then share out the files of draws; they need one workdir that all of them see. Sample
sets are read at random, so the workdir is a local folder; it may be gs:// for
--stage=fit, whose result --config.fitted=gs://… takes.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust import generators
from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError, UserError
from jaxrobust.models import parameter_files, zoo
from jaxrobust.runs import cli, metrics, process_group, stop_requests
from jaxrobust.runs import workdir as workdirs
from jaxrobust.samples import candidates, sample_sets, selection, shards

STAGES = ('fit', 'sample', 'label', 'select')
_WITHOUT_LABELLER = STAGES[:2]
_CONDITION = 'condition'  # in the place of a labeller


def main(config, workdir, stage=''):
  """Runs the stages that are not there yet, or one of them."""
  config = datasets.record(workdirs.continued(workdir, config))
  check(config, stage)
  info = dataset_info.of(config.dataset)
  finished = shards.is_whole(epath.Path(workdir) / 'samples')
  parallel.require_agreement(int(finished))
  if finished:
    folder = workdirs.claim(workdir, config)
    found = shards.read_metadata(folder / 'samples')['counts']['total']
    if parallel.is_writer():
      _draws(config, folder).remove()  # A run killed before it did so.
    logging.info('%s is finished: %d samples', folder / 'samples', found)
    return
  if config.fitted:
    check_fitted(config)
  elif stage in ('', 'fit') and not (epath.Path(workdir) / 'generator.npz').exists():
    generators.get(config.generator.name).check(config.generator, info, fits=True)
  elif stage == 'select' and not (epath.Path(workdir) / 'generator.npz').exists():
    raise UserError(
      f'{workdir} has no generator.npz, whose checksum the set names: restore it, or '
      'begin with --stage=fit'
    )
  labeller = None
  if stage not in _WITHOUT_LABELLER:
    labeller = load_labeller(config.labeller, info, config.samples.batch_size)
  elif config.labeller not in ('', _CONDITION):
    find_labeller(config.labeller, info)  # A mistake should not wait for days.
  process_group.require_alike(
    {
      'labeller': labeller and labeller.described,
      'fit': _described_fit(config, config.fitted) if config.fitted else None,
    }
  )
  labelled = _draws(config, epath.Path(workdir)).has_labels()
  folder = workdirs.claim(workdir, config, free=() if labelled else ('labeller',))
  if stage in ('', 'fit', 'sample'):
    generator = fitted_generator(config, folder, info, may_fit=stage != 'sample')
  if stage == 'fit':
    return
  settings, files = config.samples, _draws(config, folder)
  at_once = settings.batch_size * parallel.num_local_devices()
  rng = jax.random.key(config.seed)
  kept = 'whole files of draws and labels are kept'
  with stop_requests.StopRequests(kept) as stops:
    stop = stops.check
    while True:
      num_files, complete = files.num_needed(
        info.num_classes, settings.max_draws_factor
      )
      if complete or stage == 'select':
        break
      if stage != 'label':
        draw_fn = lambda i: generator.sample(rng, i, settings.batch_size)
        files.draw(num_files, draw_fn, at_once, stop)
      if stage != 'sample':
        files.label(num_files, labeller.label_fn, at_once, stop)
      if stage:
        break
    if stage in ('', 'select'):
      if not complete:
        raise UserError(
          f'{folder} has too few samples that are drawn and labelled: run '
          '--stage=sample and --stage=label (again), or leave out --stage'
        )
      select(config, folder, files, num_files, labeller, info.num_classes, stop)


def check(config, stage=''):
  """Raises UserError for a value that cannot be meant, or one that the stage lacks."""
  if 'generator' not in config:
    raise UserError(
      "this is not a generator's config: give an experiment such as "
      'experiments/digits_gaussian.py'
    )
  dataset_info.check(config.dataset)
  generators.get(config.generator.name).check(
    config.generator, dataset_info.of(config.dataset)
  )
  settings = config.samples
  for name in ('count', 'max_draws_factor', 'shard_size', 'draw_size', 'batch_size'):
    if settings[name] <= 0:
      raise UserError(f'config.samples.{name} = {settings[name]}: use a number above 0')
  if settings.selection not in ('balanced', 'none'):
    raise UserError(
      f'config.samples.selection = {settings.selection!r}: use balanced or none'
    )
  if not 0 < settings.top_fraction <= 1:
    raise UserError(
      f'config.samples.top_fraction = {settings.top_fraction}: use a number above 0 '
      'and up to 1'
    )
  if not config.labeller and stage not in _WITHOUT_LABELLER:
    raise UserError(
      'config.labeller is not set: give the workdir of a non-robust '
      'classifier (train with config.loss.name=standard)'
    )
  if config.labeller == _CONDITION:
    if settings.top_fraction < 1:
      raise UserError(
        f"config.labeller = 'condition' is sure of every label, so that "
        f'config.samples.top_fraction = {settings.top_fraction} has nothing to rank '
        'by: use 1, or a classifier'
      )
    if not generators.get(config.generator.name).conditional(config.generator):
      raise UserError(
        "config.labeller = 'condition' for a generator without classes: give a "
        'classifier'
        + (config.generator.name == 'ddpm')
        * ', or set config.generator.network.conditional=True'
      )


def check_fitted(config):
  """Raises UserError unless config.fitted has a generator of the same fit."""
  folder = epath.Path(config.fitted)
  theirs = workdirs.read_config(folder)
  same = lambda c: {
    'dataset': c.dataset.to_dict() | {'data_dir': ''},
    'generator': c.generator.to_dict() | {'sampling': None},
  }
  if 'generator' not in theirs:
    raise UserError(
      f"config.fitted = {folder} is no generator's run: give one that was fitted, or "
      'leave it out'
    )
  changed = configs.differences(
    *map(config_dict.ConfigDict, map(same, (theirs, config)))
  )
  if changed:
    raise UserError(
      f'config.fitted = {folder} was fitted by another config ({"; ".join(changed)}): '
      'use the same dataset and generator, or fit anew'
    )
  if not (folder / 'generator.npz').exists():
    raise UserError(f'config.fitted = {folder} has no generator.npz: finish its fit')


def fitted_generator(config, folder: epath.Path, info, may_fit: bool):
  """The run's generator: that of config.fitted, its own, or one fitted now."""
  generator_class = generators.get(config.generator.name)
  path = epath.Path(config.fitted or folder) / 'generator.npz'
  found = path.exists()
  parallel.require_agreement(int(found))
  if not found:
    if not may_fit:
      raise UserError(f'{path} is absent: run --stage=fit first')
    real = datasets.of(config.dataset, 'train')
    process_group.require_alike({'training images': real.checksum()})
    logging.info(
      'fitting %s to %d training images', config.generator.name, len(real.images)
    )
    generator = generator_class.fit(
      real, info, config.generator, folder=folder, seed=config.seed
    )
    if parallel.is_writer():
      generator.save(path)
      logging.info('wrote %s', path)
    parallel.barrier('fitted')
    if not path.exists():
      raise UserError(
        f'{path} was written by another process and is not here: give all of them one '
        'workdir that they share'
      )
  # What all processes read is the same to the last bit.
  return generator_class.restore(path, config.generator, info)


class Labeller(NamedTuple):
  """Gives samples their classes.

  Attributes:
    described: for metadata.json.
    label_fn: see `Draws.label`.
  """

  described: dict | str
  label_fn: Callable


def find_labeller(path: str, info: dataset_info.DatasetInfo) -> zoo.Found:
  """What is known of a classifier that labels samples; raises as `load_labeller`."""
  found = zoo.find(path)
  if found is None:
    raise UserError(
      f'config.labeller = {path}: nothing says what network that is; give a workdir '
      'that finished training, a file with its card, or the name of a released '
      'checkpoint'
    )
  theirs = found.card.info
  if (theirs.image_shape, theirs.num_classes) != (info.image_shape, info.num_classes):
    raise UserError(
      f'config.labeller = {path} was trained on {theirs.name}, which has '
      f'other images or classes than {info.name}'
    )
  return found


def load_labeller(
  path: str, info: dataset_info.DatasetInfo, batch_size: int
) -> Labeller:
  """A classifier that labels samples, or none.

  Args:
    path: of a workdir or a file with a card, the name of a released checkpoint, or
      'condition' for the classes that samples are drawn for.
    info: of the data set that is generated.
    batch_size: images on a device at a time.

  Raises:
    UserError: if nothing is there, nothing says what it is, or it is of another kind
      of images.
  """
  if path == _CONDITION:
    return Labeller(_CONDITION, lambda images, classes: {'labels': classes})
  found = find_labeller(path, info)
  model = found.card.build()
  variables = parallel.replicate(parameter_files.load(found.path, model))

  def predict(variables, images):
    logits, _ = model.apply(*variables, images / 255, batch_stats=False)
    sure = jax.nn.softmax(logits).max(-1)
    return {'labels': logits.argmax(-1), 'confidence': sure}

  mapped = parallel.pmap(predict, local=True)
  digest = hashlib.sha256(found.path.read_bytes()).hexdigest()
  return Labeller(
    {'experiment': found.card.name, 'checkpoint_sha256': digest},
    lambda images, _: parallel.map_in_batches(mapped, variables, images, batch_size),
  )


def select(config, folder, files: candidates.Draws, num_files, labeller, k, stop):
  """One process writes the sample set, then removes what it was selected from."""
  finished = True
  parallel.barrier('select')  # The others have read what is removed at its end.
  if parallel.is_writer():
    try:
      _write(config, folder, files, num_files, labeller.described, k, stop)
    except PreemptedError:
      finished = False
  if not parallel.everywhere(finished):  # The others have waited here.
    raise PreemptedError(
      'stopped while selecting, which starts over: run the same command again'
    )


def _write(config, folder, files, num_files, labeller, k, stop):
  """Writes the sample set, or nothing where `stop` raises."""
  batches, described = files.choose(num_files, k)
  sample_sets.write(
    str(folder / 'samples'),
    _shown(batches, config.samples.count, stop),
    metadata={
      'generator': config.generator.to_dict(),
      'fit': _described_fit(config, folder),
      'dataset': config.dataset.to_dict(),
      'seed': config.seed,
      'labeller': labeller,
      'selection': described,
    },
    num_classes=k,
    shard_size=config.samples.shard_size,
  )
  files.remove()
  agreement = described.get('agreement_with_condition')
  logging.info(
    'wrote %s: %d of %d samples drawn%s',
    folder / 'samples',
    config.samples.count,
    described['drawn'],
    ''
    if agreement is None
    else f'; the labeller agrees with the class that a sample was drawn for in '
    f'{agreement:.1%}',
  )


def _described_fit(config, folder: epath.Path) -> dict:
  """Which generator made the samples, for metadata.json."""
  home = epath.Path(config.fitted or folder)
  content = (home / 'generator.npz').read_bytes()
  return {
    'seed': workdirs.read_config(home).seed,
    'generator_sha256': hashlib.sha256(content).hexdigest(),
  }


def _shown(batches, count: int, stop: Callable):
  """Shows the samples of the set go by; calls `stop` before each batch."""
  progress = metrics.Progress('select', count, 'samples')
  for batch in batches:
    stop()
    yield batch
    progress.advance(len(batch[0]))
  progress.close()


def _draws(config, folder: epath.Path) -> candidates.Draws:
  """The run's files of draws."""
  settings = config.samples
  rule = selection.Rule(
    settings.count, settings.selection == 'balanced', settings.top_fraction
  )
  return candidates.Draws(folder, rule, settings.draw_size)


PROGRAM = cli.Program(
  'generate',
  main,
  (cli.Flag('stage', 'Runs one stage alone.', STAGES),),
  config='needed',
  example='digits_gaussian',
)

if __name__ == '__main__':
  cli.run(PROGRAM)
