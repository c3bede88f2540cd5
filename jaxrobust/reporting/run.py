"""A run, read from its workdir for a notebook: metrics, results, figures."""

import functools
import html
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust.attacks import suites
from jaxrobust.config import registries
from jaxrobust.errors import UserError
from jaxrobust.models import classifier
from jaxrobust.runs import metrics
from jaxrobust.runs import workdir as workdirs


class Series(NamedTuple):
  """A figure over the steps of training: `plt.plot(*series)` draws it.

  Attributes:
    steps: int64 [n], completed updates.
    values: float64 [n]; NaN where it was not finite.
  """

  steps: np.ndarray
  values: np.ndarray


class Metrics(dict[str, Series]):
  """The figures of a run by name; the KeyError of a wrong one has the nearest."""

  def __missing__(self, name: str) -> Series:
    near = registries.did_you_mean(name, self)
    raise KeyError(f'{name}: use one of {", ".join(sorted(self))}{near}')


class Run:
  """What a workdir holds, read once when it is first asked for.

  Attributes:
    folder: the workdir.
    config: of the run.
    name: of its experiment.
  """

  def __init__(self, workdir: str | os.PathLike[str]):
    """Opens a workdir; see `read_run`."""
    self.folder = epath.Path(workdir).expanduser()
    self.config: config_dict.ConfigDict = workdirs.read_config(self.folder)
    self.name: str = configs.experiment_name(self.config)

  @functools.cached_property
  def metrics(self) -> Metrics:
    """The figures of metrics.jsonl by name, such as 'train/loss'; {} if absent."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in metrics.read(self.folder):
      step = line.pop('step')
      for name, value in line.items():
        point = (step, np.nan if value is None else value)
        found.setdefault(name, []).append(point)
    return Metrics(
      {
        name: Series(
          np.array([step for step, _ in points], np.int64),
          np.array([value for _, value in points], np.float64),
        )
        for name, points in found.items()
      }
    )

  @functools.cached_property
  def results(self) -> list[dict[str, Any]]:
    """The entries of results.json, one an evaluation; [] if absent."""
    return workdirs.read_results(self.folder)

  @functools.cached_property
  def figures(self) -> dict[str, pathlib.PurePath]:
    """Pictures in the folder figures, and their paths, by name without the ending."""
    folder = self.folder / workdirs.FIGURES
    found = folder.iterdir() if folder.exists() else ()
    return {path.stem: path for path in sorted(found) if path.suffix == '.png'}

  @property
  def status(self) -> str:
    """How far it is: 'running', 'done', …; as of now, '' where nothing says so."""
    return workdirs.read_status(self.folder).get('state', '')

  def load(self) -> classifier.Classifier:
    """Its final classifier; UserError if it has none."""
    if not (self.folder / workdirs.CHECKPOINT).exists():
      raise UserError(
        f'{self.folder} has no checkpoint.npy: finish training, by the same command'
      )
    return classifier.load(self.folder)

  def _lines(self) -> list[str]:
    """What it is and what it came to, a line each."""
    lines = [f'{self.name} in {self.folder}']
    if self.status:
      lines.append(f'status: {self.status}')
    if self.metrics:
      last = max(int(series.steps[-1]) for series in self.metrics.values())
      lines.append(f'metrics to step {last}: {", ".join(sorted(self.metrics))}')
    for entry in self.results:
      protocol = entry.get('protocol', {})
      suite = protocol.get('suite')
      figures = [
        f'{word} {entry[key]:.2%}'
        for word, key in (('clean', 'clean_accuracy'), ('robust', 'robust_accuracy'))
        if key in entry and (word == 'clean' or suite != suites.CLEAN)
      ]
      judge = [] if suite == suites.CLEAN else [str(suite)]
      count = f'{protocol.get("num_images")} {protocol.get("split")} images'
      line = ', '.join([*figures, *judge, count])
      lines.append(line if figures else 'an analysis')
    if self.figures:
      lines.append(f'figures: {", ".join(self.figures)}')
    return lines

  def __repr__(self) -> str:
    return '\n  '.join(self._lines())

  def _repr_html_(self) -> str:
    return '<br>'.join(map(html.escape, self._lines()))


def read_run(workdir: str | os.PathLike[str]) -> Run:
  """Reads a run.

  Args:
    workdir: its folder, local or `gs://`.

  Returns:
    The run. What its files hold is read when it is asked for: damaged files raise
    UserError then.

  Raises:
    UserError: if the folder holds no run, or a broken config.
  """
  return Run(workdir)
