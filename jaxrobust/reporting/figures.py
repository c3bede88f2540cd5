"""Figures of runs and of tables, in one style."""

import contextlib
import io
import itertools
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import matplotlib
import numpy as np
from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust.config import dataset_info
from jaxrobust.config.tables import Table
from jaxrobust.data import datasets
from jaxrobust.files import arrays
from jaxrobust.reporting import runs_table
from jaxrobust.runs import metrics
from jaxrobust.runs import workdir as workdirs
from jaxrobust.samples import sample_sets, shards

if TYPE_CHECKING:  # Help pages should not wait for it.
  from matplotlib.figure import Figure

_SHOWN = 10  # images in a row, and groups in an overview
_STYLE = {
  'figure.constrained_layout.use': True,
  'axes.grid': True,
  'axes.axisbelow': True,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.titlesize': 'medium',
  'grid.alpha': 0.3,
  'legend.fontsize': 8,
  'legend.frameon': False,
  'lines.markersize': 5,
  'errorbar.capsize': 3,
  'savefig.dpi': 110,
  'svg.hashsalt': 'jaxrobust',  # The same figure is the same file.
}
# Kinds and axes of the arrays of examples.npz.
_EXAMPLES = {
  'images': ('u', 4),
  'adversarial': ('f', 4),
  'predictions': ('iu', 1),
  'labels': ('iu', 1),
}
_PUBLISHED = {'marker': 'D', 'mfc': 'white', 'ls': 'none', 'zorder': 4}


@contextlib.contextmanager
def style() -> Iterator[types.ModuleType]:
  """matplotlib.pyplot in the style of all figures, without a screen."""
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  with plt.rc_context(_STYLE):
    yield plt
    plt.close('all')


def render(figure: 'Figure', kind: str = 'png') -> bytes:
  """A figure as a file of its kind."""
  buffer = io.BytesIO()
  metadata = {'Date': None} if kind == 'svg' else None
  figure.savefig(buffer, format=kind, metadata=metadata)
  return buffer.getvalue()


def write(figure: 'Figure', path: epath.Path) -> None:
  """Writes a figure as path.png and path.svg."""
  for kind in ('png', 'svg'):
    workdirs.write(path.with_name(f'{path.name}.{kind}'), render(figure, kind))


def draw_table(plt: types.ModuleType, table: Table, lines: list) -> 'Figure | None':
  """The figure of a table; None for a kind that has none.

  Args:
    plt: of `style`.
    table: with its title and kind.
    lines: `tables.Line` of its rows.
  """
  draw = {
    'accuracies': draw_bars,
    'fractions': draw_fractions,
    'neighbours': draw_shares,
  }.get(table.kind)
  return draw and draw(plt, table, lines)


def draw_fractions(plt: types.ModuleType, table: Table, lines: list) -> 'Figure':
  """Robust accuracy against the share of real images, a curve a generator."""
  figure, axis = plt.subplots(figsize=(6.4, 4.2))
  common = [x for x in lines if not x.row.curve]
  curves = list(dict.fromkeys(x.row.curve for x in lines if x.row.curve))
  for number, curve in enumerate(curves):
    own = [x for x in lines if x.row.curve == curve] + common
    own = sorted(own, key=lambda line: line.row.fraction)
    ours = [x for x in own if x.cells['robust'].values]
    if ours:
      axis.errorbar(
        [100 * x.row.fraction for x in ours],
        [x.cells['robust'].mean for x in ours],
        [_bar(x.cells['robust']) for x in ours],
        color=f'C{number}',
        marker='o',
        label=curve,
      )
    known = [x for x in own if x.cells['robust'].published is not None]
    if known:
      axis.plot(
        [100 * x.row.fraction for x in known],
        [x.cells['robust'].published for x in known],
        color=f'C{number}',
        label=f'{curve}, published',
        **_PUBLISHED,
      )
  for line in lines:  # What is missing has no place but here.
    if not line.cells['robust'].values and line.points:
      axis.plot([], [], ' ', label=_name(line))
  for line in common:
    if line.cells['robust'].values:
      axis.axhline(line.cells['robust'].mean, ls=':', color='0.3', label=line.row.name)
  axis.set(title=table.title, xlabel='real images in a batch, %', xlim=(-3, 103))
  axis.set_ylabel(f'robust accuracy ({table.suite}), %')
  if axis.get_legend_handles_labels()[0]:
    axis.legend()
  return figure


def _bar(cell) -> float:
  """Length of an error bar; none is drawn for one seed."""
  return np.nan if cell.deviation is None else cell.deviation


def _name(line) -> str:
  """A row's name, and its state if it has no result."""
  if line.points and not any(cell.values for cell in line.cells.values()):
    return f'{line.row.name} ({line.word()})'
  return line.row.name


def draw_bars(plt: types.ModuleType, table: Table, lines: list) -> 'Figure':
  """Clean and robust accuracy, a bar a row, with the published as diamonds."""
  figure, axes = plt.subplots(
    1, 2, sharey=True, figsize=(9, 1.2 + 0.36 * max(len(lines), 3))
  )
  places = np.arange(len(lines))
  for axis, name in zip(axes, ('clean', 'robust'), strict=True):
    cells = [line.cells[name] for line in lines]
    ours = [i for i in places if cells[i].values]
    axis.barh(
      ours,
      [cells[i].mean for i in ours],
      height=0.6,
      xerr=[_bar(cells[i]) for i in ours],
      color='C0' if name == 'robust' else '0.7',
      label='ours' if ours else None,
    )
    known = [i for i in places if cells[i].published is not None]
    axis.plot(
      [cells[i].published for i in known],
      known,
      color='k',
      label='published',
      **_PUBLISHED,
    )
    _zoom(axis, [x for c in cells for x in (*c.values, c.published) if x is not None])
    judged = f' ({table.suite})' if name == 'robust' else ''
    axis.set(xlabel=f'{name} accuracy{judged}, %; from {axis.get_xlim()[0]:.0f}')
    axis.grid(axis='y', visible=False)
  axes[0].set_yticks(places, [_name(line) for line in lines])
  axes[0].invert_yaxis()
  figure.suptitle(table.title, fontsize='medium')
  if any(cell.published is not None for line in lines for cell in line.cells.values()):
    axes[1].legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2)
  return figure


def _zoom(axis, values: list[float]):
  """Cuts off what all bars have in common."""
  if values:
    low, high = min(values), max(values)
    room = max(high - low, 2)
    axis.set_xlim(max(np.floor(low - room), 0), min(np.ceil(high + room / 4), 100))


def draw_shares(plt: types.ModuleType, table: Table, lines: list) -> 'Figure':
  """Where nearest neighbours are, as stacked shares; beside them the coverage."""
  figure, (shares, coverage) = plt.subplots(
    1, 2, sharey=True, width_ratios=(2, 1), figsize=(9, 1.6 + 0.6 * max(len(lines), 3))
  )
  nearest = ('nearest_train', 'nearest_test', 'nearest_itself')
  height = 0.36
  for place, line in enumerate(lines):
    for offset, of, alpha in (
      (-height / 2, lambda cell: cell.mean, 1.0),
      (height / 2, lambda cell: cell.published, 0.45),
    ):
      values = [of(line.cells[name]) for name in nearest]
      left = 0.0
      for number, value in enumerate(values):
        if None in values:  # Shares of an incomplete row would stand in wrong places.
          continue
        shares.barh(
          place + offset, value, height, left, color=f'C{number}', alpha=alpha
        )
        left += value
    for number, name in enumerate(('coverage_train', 'coverage_test')):
      cell, color = line.cells[name], f'C{number}'
      if cell.values:
        coverage.plot(cell.mean, place - height / 2, 'o', color=color)
      if cell.published is not None:
        coverage.plot(cell.published, place + height / 2, color=color, **_PUBLISHED)
  for third in (100 / 3, 200 / 3):
    shares.axvline(third, ls=':', color='k')
  coverage.axvline(50, ls=':', color='k')
  shares.set(xlim=(0, 100), xlabel='nearest neighbour of generated images, %')
  coverage.set(xlim=(0, 100), xlabel='coverage, %')
  shares.set_yticks(range(len(lines)), [_name(line) for line in lines])
  shares.invert_yaxis()
  for axis in (shares, coverage):
    axis.grid(axis='y', visible=False)
  patches = [
    plt.Rectangle((0, 0), 1, 1, color=f'C{number}', label=label)
    for number, label in enumerate(('in train', 'in test', 'generated'))
  ]
  published = any(
    all(x.cells[name].published is not None for name in nearest) for x in lines
  )
  upper = 'upper bar: ours, pale: published; ' if published else ''
  figure.legend(handles=patches, loc='outside lower center', ncols=3)
  figure.suptitle(f'{table.title}\n({upper}dotted: ideal)', fontsize='medium')
  return figure


def draw_overview(plt: types.ModuleType, groups: dict) -> 'Figure':
  """Accuracies against step, above rows of images.

  Args:
    plt: of `style`.
    groups: name → (workdir, config) of each of its runs.
  """
  rows = image_rows(dict(itertools.islice(groups.items(), _SHOWN)))
  height = max(1.05 * len(rows), 0.1)
  figure = plt.figure(figsize=(11, 4.2 + height))
  curves, images = figure.subfigures(2, 1, height_ratios=(4.2, height))
  _curves(curves, groups)
  if rows:
    _images(images, rows)
  return figure


def draw_training(plt: types.ModuleType, groups: dict) -> 'Figure':
  """Accuracies against step; `groups` as in `draw_overview`."""
  figure = plt.figure(figsize=(11, max(4.2, 1 + 0.18 * len(groups))))
  _curves(figure, groups)
  return figure


def draw_examples(plt: types.ModuleType, groups: dict) -> 'Figure | None':
  """Images that the runs saw and met; None without any."""
  rows = image_rows(groups)
  if not rows:
    return None
  figure = plt.figure(figsize=(11, 1.05 * len(rows)))
  _images(figure, rows)
  return figure


def _curves(figure, groups: dict):
  clean_axis, robust_axis = figure.subplots(1, 2, sharex=True)
  shades = matplotlib.colormaps['viridis'](np.linspace(0, 0.95, len(groups)))
  for number, (name, runs) in enumerate(groups.items()):
    color = f'C{number}' if len(groups) <= 10 else shades[number]
    for place, (folder, _) in enumerate(runs):
      label = name if place == 0 else None  # Once for all its seeds.
      _draw_run(clean_axis, robust_axis, folder, color, label)
  for axis, title in ((clean_axis, 'clean accuracy'), (robust_axis, 'robust accuracy')):
    axis.set(title=f'{title}, averaged parameters', xlabel='step')
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
  if robust_axis.lines:
    title = 'validation images\n(dotted: training batches)'
    named = robust_axis.get_legend_handles_labels()  # The other axis has them too.
    figure.legend(*named, title=title, title_fontsize=8, loc='outside right upper')


def _draw_run(clean_axis, robust_axis, folder: epath.Path, color, name):
  """Validation accuracy of a run, and the accuracy on its training batches, dotted."""
  lines, clean = metrics.read(folder), metrics.eval_accuracy(metrics.EVAL_EMA)
  attack = next(
    (
      k
      for line in lines
      for k in line
      if k.startswith(f'{metrics.EVAL_EMA}/') and k != clean
    ),
    None,
  )
  for axis, validation, training in (
    (clean_axis, clean, metrics.TRAIN_CLEAN),
    (robust_axis, attack, metrics.TRAIN_ADV),
  ):
    for key, line_style, label in ((validation, '-', name), (training, ':', None)):
      points = [(x['step'], x[key]) for x in lines if x.get(key) is not None]
      if points:
        axis.plot(*zip(*points, strict=True), line_style, color=color, label=label)


def _images(figure, rows: list['Strip']):
  axes = figure.subplots(len(rows), squeeze=False)[:, 0]
  for axis, strip in zip(axes, rows, strict=True):
    height, width, channels = strip.images.shape[1:]
    gap = max(width // 16, 1)
    between = np.ones((height, gap, channels))
    parts = [part for image in strip.images for part in (image, between)]
    axis.imshow(
      np.concatenate(parts, 1), cmap='gray', vmin=0, vmax=1, interpolation='nearest'
    )
    for place, marked in enumerate(strip.marks):
      if marked is None:
        continue
      left = place * (width + gap) - 0.5
      axis.add_patch(
        matplotlib.patches.Rectangle(
          (left, -0.5), width, height, fill=False, color='C3', lw=2, clip_on=False
        )
      )
      axis.text(
        left + width / 2,
        height,
        f'seen as {marked}',
        ha='center',
        va='top',
        color='C3',
        fontsize=7,
      )
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_ylabel(strip.title, rotation=0, ha='right', va='center', fontsize=8)


class Strip(NamedTuple):
  """A row of images in a figure.

  Attributes:
    title: beside it.
    images: [_SHOWN, H, W, C] in [0, 1].
    marks: of each image the class that it is framed with, None for no frame.
  """

  title: str
  images: np.ndarray
  marks: tuple = (None,) * _SHOWN


def image_rows(groups: dict) -> list[Strip]:
  """What the runs saw and met, images that fool their network framed.

  Args:
    groups: as in `draw_overview`; of each group the first run is shown.
  """
  rows = []
  first = {name: runs[0] for name, runs in groups.items()}
  for name, (folder, _) in first.items():
    path = folder / workdirs.FIGURES / 'examples.npz'
    if path.exists():
      file = arrays.read_npz(path, _EXAMPLES, {'suite': ('U', 0)})
      if not rows:
        rows.append(Strip('test images', file['images'][:_SHOWN] / 255))
      predictions, labels = file['predictions'][:_SHOWN], file['labels'][:_SHOWN]
      suite = f', {file["suite"]}' if 'suite' in file else ''  # Older ones lack it.
      stand = (predictions == labels).sum()
      title = f'adversarial for\n{name}\n({stand} of {_SHOWN} stand{suite})'
      marks = tuple(
        int(seen) if seen != label else None
        for seen, label in zip(predictions, labels, strict=True)
      )
      rows.append(Strip(title, file['adversarial'][:_SHOWN], marks))
  sources = {c.data.samples for _, c in first.values() if c.data.samples}
  for source in sorted(sources):
    if epath.Path(source).exists() and not shards.is_remote(source):
      sample_set = sample_sets.SampleSet.open(source)
      generated = sample_set.gather(np.arange(min(_SHOWN, len(sample_set)))) / 255
      rows.append(Strip(f'generated\n{epath.Path(source).parent.name}', generated))
  # What evaluates another run's checkpoint has no training images of its own.
  trained = (c for _, c in first.values() if not c.evaluation.checkpoint)
  dataset = next((c.dataset for c in trained), None)
  named = dataset is not None and dataset.name in dataset_info.INFO
  if named and dataset_info.of(dataset).is_bundled:
    real = datasets.of(dataset, 'train').images[:_SHOWN]
    rows.insert(0, Strip('real, training', real / 255))
  return [strip for strip in rows if len(strip.images) == _SHOWN]


def groups_by_experiment(runs: list[tuple[epath.Path, config_dict.ConfigDict]]) -> dict:
  """Adversarially trained runs by the names of the table of runs, seeds together.

  Args:
    runs: (workdir, config) of each.
  """
  lines = runs_table.lines(runs)
  names = {
    configs.to_json(line.config): name
    for name, line in zip(runs_table.names_of(lines), lines, strict=True)
  }
  groups = {}
  for folder, config in runs:
    if config.loss.name != 'standard':
      name = names[configs.to_json(configs.without_seed(config))]
      groups.setdefault(name, []).append((folder, config))
  return groups
