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
           events.* and checkpoints/ too, and at each checkpoint a picture of samples,
           figures/samples-STEP.png. --config.fitted=DIR takes that of another run
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
from jaxrobust.config import dataset_info, registries
from jaxrobust.config import generator as generator_configs
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError, UserError
from jaxrobust.generators.generator import Generator
from jaxrobust.models import classifiers
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
  if is_finished(config, workdir):
    return
  run = open_run(config, workdir, stage)
  if stage in ('', 'fit'):
    fit(run)
  kept = 'whole files of draws and labels are kept'
  with stop_requests.StopRequests(kept) as stops:
    if not stage:
      while not run.needed()[1]:
        sample(run, stops.check)
        label(run, stops.check)
      select(run, stops.check)
    elif stage != 'fit':
      {'sample': sample, 'label': label, 'select': select}[stage](run, stops.check)


class Run:
  """A run in its workdir, as its stages share it.

  Attributes:
    config: of the run.
    folder: the workdir.
    info: of the data set.
    labeller: None for stages that need none.
    files: of draws and of labels.
  """

  def __init__(self, config, folder: epath.Path, labeller):
    self.config, self.folder, self.labeller = config, folder, labeller
    self.info = dataset_info.of(config.dataset)
    self.files = _draws(config, folder)
    self._generator = None

  @property
  def at_once(self) -> int:
    """Samples that this process draws or labels at a time."""
    return self.config.samples.batch_size * parallel.num_local_devices()

  @property
  def generator_path(self) -> epath.Path:
    """Where the fitted generator is, or will be."""
    return epath.Path(self.config.fitted or self.folder) / 'generator.npz'

  @property
  def generator(self) -> Generator:
    """The fitted generator; what all processes read is the same to the last bit."""
    if self._generator is None:
      settings = self.config.generator
      generator_class = generator_of(self.config)
      self._generator = generator_class.restore(
        self.generator_path, settings, self.info
      )
    return self._generator

  def needed(self) -> tuple[int, bool]:
    """How many files of draws are likely to be enough; whether there are, and are."""
    factor = self.config.samples.max_draws_factor
    return self.files.num_needed(self.info.num_classes, factor)


def open_run(config, workdir: str, stage: str) -> Run:
  """Checks what the stages will need, then claims the workdir."""
  info, folder = dataset_info.of(config.dataset), epath.Path(workdir)
  has_generator = (folder / 'generator.npz').exists()
  if config.fitted:
    check_fitted(config)
  elif stage in ('', 'fit') and not has_generator:
    generator_of(config).check_devices(config.generator, info, parallel.num_devices())
  elif stage == 'select' and not has_generator:
    raise UserError(
      f'{workdir} has no generator.npz, whose checksum the set names: restore it, or '
      'begin with --stage=fit'
    )
  labeller = None
  if stage not in _WITHOUT_LABELLER:
    labeller = load_labeller(config.labeller, info, config.samples.batch_size)
  elif config.labeller not in ('', _CONDITION):  # A mistake should not wait for days.
    classifiers.find(config.labeller, 'config.labeller', info)
  process_group.require_alike(
    {
      'labeller': labeller and labeller.described,
      'fit': _described_fit(config, config.fitted) if config.fitted else None,
    }
  )
  free = () if _draws(config, folder).has_labels() else ('labeller',)
  return Run(config, workdirs.claim(workdir, config, free=free), labeller)


def fit(run: Run):
  """The first stage: generator.npz, unless it is there."""
  config, path = run.config, run.generator_path
  found = path.exists()
  parallel.require_agreement(int(found))
  if found:
    return
  real = datasets.of(config.dataset, 'train')
  held_out = held_out_images(config)
  process_group.require_alike(
    {'training images': real.checksum()}
    | {f'{name} images': split.checksum() for name, split in held_out.items()}
  )
  name = config.generator.name
  logging.info('fitting %s to %d training images', name, len(real.images))
  generator = generator_of(config).fit(
    real,
    run.info,
    config.generator,
    held_out=held_out,
    folder=run.folder,
    seed=config.seed,
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


def held_out_images(config) -> dict[str, datasets.Split]:
  """Images that no generator learns from, by the name of their split."""
  names = ('validation', 'test') if config.dataset.validation_images else ('test',)
  return {name: datasets.of(config.dataset, name) for name in names}


def sample(run: Run, stop: Callable):
  """The second stage: files of draws, as many as are likely to be enough.

  Args:
    run: of the program.
    stop: called before each batch; raises PreemptedError if asked to stop.
  """
  found = run.generator_path.exists()
  parallel.require_agreement(int(found))
  if not found:
    raise UserError(f'{run.generator_path} is absent: run --stage=fit first')
  generator, rng = run.generator, jax.random.key(run.config.seed)
  batch_size = run.config.samples.batch_size
  draw_fn = lambda indices: generator.sample(rng, indices, batch_size)
  num_files, _ = run.needed()
  run.files.draw(num_files, draw_fn, run.at_once, stop)


def label(run: Run, stop: Callable):
  """The third stage: classes of the draws, and how sure they are; see `sample`."""
  num_files, _ = run.needed()
  run.files.label(num_files, run.labeller.label_fn, run.at_once, stop)


def select(run: Run, stop: Callable):
  """The last stage: one process writes the set, and removes the draws; see `sample`."""
  num_files, is_complete = run.needed()
  if not is_complete:
    raise UserError(
      f'{run.folder} has too few samples that are drawn and labelled: run '
      '--stage=sample and --stage=label (again), or leave out --stage'
    )
  finished = True
  parallel.barrier('select')  # The others have read what is removed at its end.
  if parallel.is_writer():
    try:
      _write(run, num_files, stop)
    except PreemptedError:
      finished = False
  if not parallel.everywhere(finished):  # The others have waited here.
    raise PreemptedError(
      'stopped while selecting, which starts over: run the same command again'
    )


def generator_of(config) -> type[Generator]:
  """The class of a config's generator; UserError for an unknown name."""
  return registries.GENERATORS.get(config.generator.name, 'config.generator.name')


def is_finished(config, workdir: str) -> bool:
  """Whether the set is there; then what is left of its making is removed."""
  finished = shards.is_whole(epath.Path(workdir) / 'samples')
  parallel.require_agreement(int(finished))
  if finished:
    folder = workdirs.claim(workdir, config)
    found = shards.read_metadata(folder / 'samples')['counts']['total']
    if parallel.is_writer():
      _draws(config, folder).remove()  # A run killed before it did so.
    logging.info('%s is finished: %d samples', folder / 'samples', found)
  return finished


def check(config, stage=''):
  """Raises UserError for a value that cannot be meant, or one that the stage lacks."""
  generator_configs.check(config)
  generator_class = generator_of(config)
  generator_class.check(config.generator, dataset_info.of(config.dataset))
  if not config.labeller and stage not in _WITHOUT_LABELLER:
    raise UserError(
      'config.labeller is not set: give the workdir of a non-robust '
      'classifier (train with config.loss.name=standard)'
    )
  if config.labeller == _CONDITION:
    if config.samples.top_fraction < 1:
      raise UserError(
        "config.labeller = 'condition' is sure of every label, so that "
        f'config.samples.top_fraction = {config.samples.top_fraction} has nothing to '
        'rank by: use 1, or a classifier'
      )
    if not generator_class.conditional(config.generator):
      raise UserError(
        "config.labeller = 'condition' for a generator without classes: give a "
        'classifier, or settings with which it knows them, such as '
        'config.generator.network.conditional=True of ddpm'
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


class Labeller(NamedTuple):
  """Gives samples their classes.

  Attributes:
    described: for metadata.json.
    label_fn: see `Draws.label`.
  """

  described: dict | str
  label_fn: Callable


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
  found, model, variables = classifiers.load(path, 'config.labeller', info)

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


def _write(run: Run, num_files: int, stop: Callable):
  """Writes the sample set, or nothing where `stop` raises."""
  config, folder = run.config, run.folder
  batches, described = run.files.choose(num_files, run.info.num_classes)
  sample_sets.write(
    str(folder / 'samples'),
    _shown(batches, config.samples.count, stop),
    metadata={
      'generator': config.generator.to_dict(),
      'fit': _described_fit(config, folder),
      'dataset': config.dataset.to_dict(),
      'seed': config.seed,
      'labeller': run.labeller.described,
      'selection': described,
    },
    num_classes=run.info.num_classes,
    shard_size=config.samples.shard_size,
  )
  run.files.remove()
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
