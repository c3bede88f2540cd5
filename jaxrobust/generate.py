"""Makes a sample set: fits a generator, samples it, pseudo-labels and selects.

Usage:
  jaxrobust generate --workdir=DIR --config=EXPERIMENT \\
      --config.labeller=LABELLER [--stage=STAGE]

Example:
  jaxrobust train --workdir=runs/labeller --config=digits:labeller
  jaxrobust generate --workdir=runs/gaussian \\
      --config=digits_gaussian --config.labeller=runs/labeller
  jaxrobust train --workdir=runs/robust --config=digits \\
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
  evaluate results.json, how likely held-out and test images are to the generator, in
           bits a dimension: of vdvae, which alone has a likelihood
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

import contextlib
from collections.abc import Callable

import jax
from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust.config import dataset_info
from jaxrobust.config.generator import CONDITION
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError, UserError
from jaxrobust.generators import candidates, checks, trained
from jaxrobust.generators.generator import Generator
from jaxrobust.models import named_classifiers
from jaxrobust.models.labeller import Labeller, labeller_of
from jaxrobust.runs import (
  checksums,
  cli,
  metrics,
  process_group,
  stop_requests,
  waiting,
)
from jaxrobust.runs import workdir as workdirs
from jaxrobust.samples import sample_sets, selection, shards

STAGES = ('fit', 'evaluate', 'sample', 'label', 'select')
_WITHOUT_LABELLER = STAGES[:3]


def main(config: config_dict.ConfigDict, workdir: str, stage: str = '') -> None:
  """Runs the stages that are not there yet, or one of them."""
  config = datasets.record(workdirs.continued(workdir, config))
  checks.check(config, is_labelled=stage not in _WITHOUT_LABELLER)
  if stage != 'evaluate' and is_finished(config, workdir):
    return
  run = open_run(config, workdir, stage)
  if stage in ('', 'fit'):
    fit(run)
  if stage in ('', 'evaluate'):
    evaluate(run, required=bool(stage))
  kept = 'whole files of draws and labels are kept'
  with stop_requests.StopRequests(kept) as stops:
    if not stage:
      drawn = None
      while not (needed := run.needed())[1]:
        if drawn not in (None, needed[0]):
          logging.info(
            'some classes have too few samples: drawing on, to %d in all',
            needed[0] * run.files.size,
          )
        drawn = needed[0]
        sample(run, stops.check)
        label(run, stops.check)
      select(run, stops.check)
    elif stage not in STAGES[:2]:
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

  def __init__(
    self,
    config: config_dict.ConfigDict,
    folder: epath.Path,
    labeller: Labeller | None,
  ):
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
    return epath.Path(self.config.fitted or self.folder) / workdirs.GENERATOR

  @property
  def generator(self) -> Generator:
    """The fitted generator; what all processes read is the same to the last bit."""
    if self._generator is None:
      settings = self.config.generator
      generator_class = checks.generator_of(self.config)
      self._generator = generator_class.restore(
        self.generator_path, settings, self.info
      )
    return self._generator

  def needed(self) -> tuple[int, bool]:
    """How many files of draws are likely to be enough; whether there are, and are."""
    factor = self.config.samples.max_draws_factor
    return self.files.num_needed(self.info.num_classes, factor)


def open_run(config: config_dict.ConfigDict, workdir: str, stage: str) -> Run:
  """Checks what the stages will need, then claims the workdir."""
  info, folder = dataset_info.of(config.dataset), epath.Path(workdir)
  has_generator = (folder / workdirs.GENERATOR).exists()
  if config.fitted:
    checks.check_fitted(config)
  elif stage in ('', 'fit') and not has_generator:
    checks.generator_of(config).check_devices(
      config.generator, info, parallel.num_devices()
    )
  elif stage == 'select' and not has_generator:
    raise UserError(
      f'{workdir} has no {workdirs.GENERATOR}, whose checksum the set names: restore '
      'it, or begin with --stage=fit'
    )
  labeller = None
  if stage not in _WITHOUT_LABELLER:
    labeller = labeller_of(config.labeller, info, config.samples.batch_size)
  elif config.labeller not in ('', CONDITION):  # A mistake should not wait for days.
    named_classifiers.find(config.labeller, 'config.labeller', info)
  process_group.require_alike(
    {
      'labeller': labeller and labeller.described,
      'fit': _described_fit(config, config.fitted) if config.fitted else None,
    }
  )
  # Until the set is written, another selection reads the same draws and labels.
  free: tuple[str, ...] = ('samples.selection',)
  if not _draws(config, folder).has_labels():
    free += ('labeller',)
  return Run(config, workdirs.claim(workdir, config, free=free), labeller)


def fit(run: Run) -> None:
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
  generator_class = checks.generator_of(config)
  aloud = contextlib.nullcontext()  # A loop says itself how far it is.
  if not issubclass(generator_class, trained.Trained):
    aloud = waiting.waiting(f'fitting {name}')
  with aloud:
    generator = generator_class.fit(
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


def evaluate(run: Run, required: bool) -> None:
  """The second stage: what a generator with a likelihood gives to images unseen.

  Args:
    run: of the program.
    required: whether one without is an error.
  """
  if checks.generator_of(run.config).evaluate is Generator.evaluate:
    if required:
      raise UserError(
        f'config.generator.name = {run.config.generator.name!r} has no likelihood: '
        'compare its samples with real images, by jaxrobust analyze'
      )
    return
  _require_fitted(run)
  config, fitted = run.config, _described_fit(run.config, run.folder)
  for split, images in held_out_images(config).items():
    protocol = {
      'measure': 'likelihood',
      'dataset': dataset_info.identity(config.dataset),
      'split': split,
      'num_images': len(images.labels),
      'seed': config.seed,
      'generator_sha256': fitted['generator_sha256'],
    }
    found = workdirs.find_result(run.folder, protocol)
    parallel.require_agreement(int(found is not None))
    if found is None:
      figures = run.generator.evaluate(images.images, config.seed)
      if parallel.is_writer():
        found = workdirs.add_result(run.folder, protocol, figures)
      parallel.barrier('evaluated')
    if found is not None:
      names = ', '.join(f'{k} {v:.4f}' for k, v in found.items() if type(v) is float)
      logging.info('%d %s images: %s', protocol['num_images'], split, names)


def held_out_images(config: config_dict.ConfigDict) -> dict[str, datasets.Split]:
  """Images that no generator learns from, by the name of their split."""
  names = ('validation', 'test') if config.dataset.validation_images else ('test',)
  return {name: datasets.of(config.dataset, name) for name in names}


def sample(run: Run, stop: Callable) -> None:
  """The third stage: files of draws, as many as are likely to be enough.

  Args:
    run: of the program.
    stop: called before each batch; raises PreemptedError if asked to stop.
  """
  _require_fitted(run)
  generator, rng = run.generator, jax.random.key(run.config.seed)
  batch_size = run.config.samples.batch_size
  draw_fn = lambda indices: generator.sample(rng, indices, batch_size)
  num_files, _ = run.needed()
  run.files.draw(num_files, draw_fn, run.at_once, stop)


def _require_fitted(run: Run):
  """Raises UserError unless the first stage is done."""
  found = run.generator_path.exists()
  parallel.require_agreement(int(found))
  if not found:
    raise UserError(f'{run.generator_path} is absent: run --stage=fit first')


def label(run: Run, stop: Callable) -> None:
  """The fourth stage: classes of the draws, and how sure they are; see `sample`."""
  num_files, _ = run.needed()
  run.files.label(num_files, run.labeller.label_fn, run.at_once, stop)


def select(run: Run, stop: Callable) -> None:
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


def is_finished(config: config_dict.ConfigDict, workdir: str) -> bool:
  """Whether the set is there; then what is left of its making is removed."""
  finished = shards.is_whole(epath.Path(workdir) / workdirs.SAMPLES)
  parallel.require_agreement(int(finished))
  if finished:
    folder = workdirs.claim(workdir, config)
    found = shards.read_metadata(folder / workdirs.SAMPLES)['counts']['total']
    if parallel.is_writer():
      _draws(config, folder).remove()  # A run killed before it did so.
    logging.info('%s is finished: %d samples', folder / workdirs.SAMPLES, found)
  return finished


def _write(run: Run, num_files: int, stop: Callable):
  """Writes the sample set, or nothing where `stop` raises."""
  config, folder = run.config, run.folder
  batches, described = run.files.choose(num_files, run.info.num_classes)
  sample_sets.write(
    str(folder / workdirs.SAMPLES),
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
    folder / workdirs.SAMPLES,
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
  return {
    'seed': workdirs.read_config(home).seed,
    'generator_sha256': checksums.sha256(home / workdirs.GENERATOR),
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
