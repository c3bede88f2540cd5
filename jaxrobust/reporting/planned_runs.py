"""Runs as sweeps and tables name them: their commands, and how far each is."""

import functools
import json
import os
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust.attacks import norms, suites
from jaxrobust.config import dataset_info, experiments, fields, registries
from jaxrobust.config.tables import Preparation, Row, Table
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.reporting.tables import COLUMNS
from jaxrobust.runs import checksums
from jaxrobust.runs import workdir as workdirs
from jaxrobust.samples import shards

TABLES = 'paper'  # the experiments' file with the tables of the paper


class Point(NamedTuple):
  """A run of a sweep or a table.

  Attributes:
    name: as the experiment's sweep() calls it, or the workdir's.
    config: with the point's overrides.
    workdir: its folder.
    flags: of its programs, without their names.
    programs: that make it, in order.
    suite: that judges it; '' for the config's.
    preparations: the points to run before it.
  """

  name: str
  config: config_dict.ConfigDict
  workdir: epath.Path
  flags: list[str]
  programs: tuple[str, ...] = ('train', 'evaluate')
  suite: str = ''
  preparations: tuple['Point', ...] = ()

  @property
  def needs(self) -> tuple[str, ...]:
    """Names of the points to run before it."""
    return tuple(point.name for point in self.preparations)

  def commands(self) -> list[tuple[list[str], bool]]:
    """Its programs with their flags, and whether each is finished."""
    return [
      ([program, *self.flags, *self._suite_flag(program)], self.is_finished(program))
      for program in self.programs
    ]

  def is_finished(self, program: str = '') -> bool:
    """Whether a program of it, or all of them, left what they should."""
    if not program:
      return all(map(self.is_finished, self.programs))
    if program == 'train':
      return (self.workdir / workdirs.CHECKPOINT).exists()
    if program == 'generate':
      return shards.is_whole(self.workdir / workdirs.SAMPLES)
    return self.result() is not None

  def result(self) -> dict | None:
    """The last entry of results.json that answers for the point.

    It is of its own checkpoint, by the attacks of the suite that judges it, on all the
    images that the config asks for, as they are now; any one if it is not evaluated but
    analysed.
    """
    found = workdirs.read_results(self.workdir)
    if found and 'evaluate' in self.programs:
      config = workdirs.continued(self.workdir, self.config)
      wanted = self._protocol(config)
      found = [x for x in found if wanted.items() <= x['protocol'].items()]
      if found and (images := _own_images(config, wanted['num_images'])):
        # An earlier version did not write which images it judged.
        found = [x for x in found if x['protocol'].get('images', images) == images]
    return found[-1] if found else None

  def _protocol(self, config: config_dict.ConfigDict) -> dict:
    """What an evaluation that answers for the point says of itself."""
    settings = config.evaluation
    size = dataset_info.size_of(config.dataset, settings.split)
    ball = norms.get(self.config.threat.norm, self.config.threat.epsilon)
    path = self.workdir / workdirs.CHECKPOINT
    return {
      **suites.protocol(settings, ball, self.suite),
      'split': settings.split,
      'num_images': settings.num_images or size,
      'checkpoint_sha256': _sha256(path, path.stat().mtime) if path.exists() else '',
    }

  def absent_samples(self) -> str:
    """The sample set that it needs, if it is not there and no point makes it."""
    settings = self.config.to_dict()
    source = settings.get('samples') or settings.get('data', {}).get('samples')
    if not source or not isinstance(source, str) or epath.Path(source).exists():
      return ''
    return '' if any(f'/{name}/' in source for name in self.needs) else source

  def remark_on_samples(self) -> str:
    """A line on a sample set that is absent and how to make it, or ''."""
    if not (source := self.absent_samples()):
      return ''
    home, name = os.path.split(source.rstrip('/'))
    made = f' --workdir={home}' if name == workdirs.SAMPLES else ''
    return (
      f'{source} is absent: make it (jaxrobust generate{made} --config=…) or import it '
      f'(jaxrobust data import FILES {source})'
    )

  def state(self) -> tuple[str, str]:
    """How far it is, and a line on it.

    Returns:
      'done', 'other' (another config lives in its workdir), 'running', 'interrupted',
      'preempted', 'failed', 'unfinished' or 'missing'.
    """
    if not workdirs.has_run(self.workdir):
      return 'missing', ''
    # The set's folder is in the workdir's name; its spelling depends on --workdir.
    changed = [
      line
      for line in configs.differences(workdirs.read_config(self.workdir), self.config)
      if not line.startswith(('data.samples:', 'labeller:', 'samples:'))
    ]
    if changed:
      return 'other', f'its value → the planned one, {"; ".join(changed)}'
    for point in self.preparations:  # What was made of another is of another, too.
      state, message = point.state()
      if state == 'other':
        return 'other', f'of {point.name}: {message}'
    unfinished = [p for p in self.programs if not self.is_finished(p)]
    if not unfinished:
      return 'done', ''
    status = workdirs.read_status(self.workdir)
    program, *flags = status.get('command') or ['']
    wanted = self._suite_flag(program)
    is_this = program == unfinished[0] and set(wanted) <= set(flags)
    if is_this and status['state'] != 'done':
      return status['state'], f'{program}: {status["message"]}'.rstrip(': ')
    return 'unfinished', f'{unfinished[0]} is missing'

  def _suite_flag(self, program: str) -> list[str]:
    return [f'--suite={self.suite}'] if self.suite and program == 'evaluate' else []


def _own_images(config: config_dict.ConfigDict, num_images: int) -> str:
  """Checksum of the images of one's own that an evaluation judges; '' without any.

  Where they are not what the run had, by number or shape, it is no evaluation's, and
  where they are absent it is '', too.
  """
  if not dataset_info.is_own(config.dataset):
    return ''
  return _checksum(config.dataset.to_json(), config.evaluation.split, num_images)


@functools.cache
def _checksum(dataset: str, split: str, num_images: int) -> str:
  """Of the first images of a split, as they are when a process asks first."""
  config = config_dict.ConfigDict(json.loads(dataset))
  try:
    images, labels = datasets.of(config, split)
  except (UserError, OSError) as e:
    logging.warning('results are not compared with their images: %s', e)
    is_here = config.path and os.path.exists(os.path.expanduser(config.path))
    return 'others' if is_here else ''
  return datasets.Split(images[:num_images], labels[:num_images]).checksum()


@functools.cache
def _sha256(path: epath.Path, time: float) -> str:
  """Checksum of a file as it was written at a time."""
  del time
  return checksums.sha256(path)


def command_line(command: list[str]) -> str:
  """A command to copy into a shell."""
  return shlex.join(['jaxrobust', *command])


def with_needs(names: set[str], found: list[Point]) -> list[Point]:
  """The points of these names and what they need, in the order of `found`.

  Args:
    names: of the points.
    found: all points; what a point needs stands before it.
  """
  wanted = set(names)
  for point in reversed(found):
    if point.name in wanted:
      wanted |= set(point.needs)
  return [point for point in found if point.name in wanted]


def of_sweep(
  config: config_dict.ConfigDict, path: str, workdir: str, common: Sequence[str] = ()
) -> list[Point]:
  """The points that the sweep() of an experiment's file yields.

  Args:
    config: the experiment's, with the overrides common to all points.
    path: the experiment's file, with its argument after a colon if it has one.
    workdir: the folder of all runs.
    common: flags to pass on to every run.

  Returns:
    The points, in order.

  Raises:
    UserError: without a sweep(), for an override that is no field or has another type,
      or if two points have the same experiment's name.
  """
  found = []
  for name, overrides, point in experiments.sweep_points(config, path.split(':')[0]):
    folder = configs.experiment_name(point)
    home = epath.Path(workdir) / folder
    own = [f'--config.{field}={value}' for field, value in overrides.items()]
    for flag in common:
      if flag.partition('=')[0].removeprefix('--config.') in overrides:
        logging.warning('%s does not hold for %s, which sets that field', flag, name)
    flags = [f'--workdir={home}', f'--config={path}', *common, *own]
    found.append(Point(name, point, home, flags))
  return found


def read_tables(file: str = '') -> tuple[dict, dict]:
  """The tables and the preparations of a file such as experiments/paper.py.

  Args:
    file: its path; '' for the package's.

  Raises:
    UserError: if there is no such file, or it defines no tables, or wrong ones.
  """
  file = file or TABLES
  try:
    experiments.find(file)
  except UserError as e:
    raise UserError(
      f'{file}: no such file; leave out --tables for the tables of the paper, or give '
      '--tables=FILE'
    ) from e
  module = experiments.load_file(file)
  if not hasattr(module, 'TABLES'):
    raise UserError(f'{file} defines no TABLES: experiments/paper.py shows how')
  found, preparations = module.TABLES, getattr(module, 'PREPARATIONS', {})
  for name, table in _items(found, f'{file}: TABLES', Table):
    where = f'{file}: table {name}'
    if table.kind not in COLUMNS:
      raise UserError(f'{where}: kind {table.kind!r}; use one of {", ".join(COLUMNS)}')
    rows = dict(enumerate(table.rows) if isinstance(table.rows, list) else [])
    if not rows:
      raise UserError(f'{where}: rows is no list with a Row')
    list(_items(rows, f'{where}: rows', Row))
    try:
      suites.parse(table.suite)
    except UserError as e:
      raise UserError(f'{where}: {e}') from e
  list(_items(preparations, f'{file}: PREPARATIONS', Preparation))
  return found, preparations


def _items(found, where: str, kind: type):
  """Yields names and values; UserError for one that is not of a class of `tables`."""
  if not isinstance(found, dict):
    raise UserError(f'{where} is no dict of {kind.__name__}')
  for name, value in found.items():
    if not isinstance(value, kind):
      raise UserError(
        f'{where}: {name} is {value!r:.40}, not a {kind.__name__} of '
        'jaxrobust.config.tables'
      )
    yield name, value


def find_table(name: str, tables: dict) -> Table:
  """The table of a name; UserError with the names if there is none."""
  if name not in tables:
    raise UserError(
      f'--table={name}: there is none; use one of {", ".join(tables)}'
      f'{registries.did_you_mean(name, tables)}'
    )
  return tables[name]


class Maker:
  """Makes the points of tables' rows below a folder."""

  def __init__(self, workdir: str, preparations: dict, common: Sequence[str] = ()):
    """Every run's `workdir` is below this one and gets the `common` flags."""
    self._workdir, self._preparations = workdir, preparations
    self._common, self._configs = list(common), {}

  def of_table(self, table: Table) -> list[Point]:
    """What the rows need, then the rows, each run once."""
    found = {}
    for row in table.rows:
      for point in self.of_row(table, row):
        self._add(point, found)
    is_row = lambda point: point.name not in self._preparations
    return sorted(found.values(), key=is_row)

  def of_row(self, table: Table, row: Row) -> list[Point]:
    """A point for each seed of a row; none if it is published only."""
    if not row.config:
      return []
    if row.analysis:
      return [self._make(row.analysis, ('analyze',), row.config, row.overrides)]
    points, overrides = [], dict(row.overrides)
    # Experiments that share a network and data tell their runs apart by it, too.
    variant = overrides.pop('variant', self._config(row.config).variant)
    for seed in table.seeds:
      own = {'seed': seed, 'variant': f'{variant}_seed-{seed}'.lstrip('_')}
      point = self._make('', ('train', 'evaluate'), row.config, overrides | own)
      points.append(point._replace(suite=table.suite))
    return points

  def _add(self, point: Point, found: dict):
    """Adds a point after what it needs."""
    for needed in point.preparations:
      if needed.name not in found:
        self._add(needed, found)
    known = found.setdefault(point.name, point)
    if changed := configs.differences(known.config, point.config, ignore=()):
      raise UserError(
        f'two rows are both named {point.name} ({"; ".join(changed)}): give each '
        'a name of its own by the field variant'
      )

  def _make(self, name: str, programs, path: str, overrides: dict) -> Point:
    """A point; without a name it has its experiment's."""
    needs, values = [], {}
    for field, value in overrides.items():
      values[field] = value
      if isinstance(value, str) and value.startswith('{workdir}/'):
        needs.append(self._prepare(value.split('/')[1], path))
        values[field] = value.replace('{workdir}', self._workdir.rstrip('/'))
    flags = [f'--config.{field}={value}' for field, value in values.items()]
    config = fields.override(self._config(path), values, path)
    name = name or configs.experiment_name(config)
    folder = epath.Path(self._workdir) / name
    flags = [f'--workdir={folder}', f'--config={path}', *self._common, *flags]
    return Point(name, config, folder, flags, programs, preparations=tuple(needs))

  def _prepare(self, name: str, path: str) -> Point:
    """The point of a preparation that an experiment needs."""
    if name not in self._preparations:
      raise UserError(f'{path}: no preparation is named {name}')
    made = self._preparations[name]
    return self._make(name, (made.program,), made.config, made.overrides)

  def _config(self, path: str):
    """The config of an experiment, without overrides."""
    if path not in self._configs:
      self._configs[path] = experiments.load(path)
    return self._configs[path]
