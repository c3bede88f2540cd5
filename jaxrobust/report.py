"""Shows the runs of a folder side by side: one table, one figure.

Usage:
  python -m jaxrobust.report --workdir=FOLDER_OF_WORKDIRS

Example:
  python -m jaxrobust.report --workdir=runs/quickstart

Prints a table of the evaluations in the folder's workdirs and writes it to report.md:
a line an experiment, mean ± standard deviation over its seeds. Draws report.png:
accuracy against step of the adversarially trained runs, and test, adversarial and
generated images.
"""

import io
import statistics

import matplotlib
import numpy as np
from etils import epath

from jaxrobust import cli, metrics
from jaxrobust import config as configs
from jaxrobust import workdir as workdirs
from jaxrobust.data import datasets, samples
from jaxrobust.errors import UserError

_SHOWN = 10  # images in a row of the figure


def main(config, workdir):
  """Writes table and figure of the workdirs below `workdir`."""
  if config is not None:
    raise UserError('--config has no use here: a report shows runs as they were made')
  folder = epath.Path(workdir)
  runs = find_runs(folder)
  if not runs:
    raise UserError(
      f'{folder} holds no workdir of a training run: give the folder in '
      'which the workdirs are'
    )
  text = table(runs)
  print(text, end='')
  workdirs.write(folder / 'report.md', text)
  workdirs.write(folder / 'report.png', figure(runs))
  print(f'figure: {folder / "report.png"}')


def find_runs(folder: epath.Path) -> list[tuple[epath.Path, object]]:
  """(workdir, config) of each classifier's run directly below `folder`, by name."""
  found = []
  children = sorted(folder.iterdir()) if folder.is_dir() else []
  for child in children:
    path = child / 'config.json'
    if path.exists() and 'training' in (config := workdirs.read_config(child)):
      found.append((child, config))
  return found


def table(runs) -> str:
  """Markdown: a line an experiment and protocol, over its seeds; percent.

  Runs are seeds of one experiment if their configs differ in nothing else.
  """
  rows = {}
  for folder, config in runs:
    data = f'{config.data.real_fraction:.0%} real' if config.data.samples else 'real'
    for entry in workdirs.read_results(folder) or [None]:
      protocol = dict(entry['protocol']) if entry else None
      if protocol:  # What differs from seed to seed.
        protocol |= {'seed': None, 'checkpoint_sha256': None}
      same = configs.from_json(configs.to_json(config)).unlock()
      if same.variant == f'seed-{config.seed}':  # Sweeps tell their workdirs apart.
        same.variant = ''
      same.seed = None
      key = (configs.to_json(same), str(protocol))
      _, entries = rows.setdefault(
        key, ((configs.experiment_name(same), data, protocol), {})
      )
      entries[config.seed] = entry  # The last one of a workdir counts.
  lines = [
    '| experiment | data | seeds | clean | robust | suite | images |',
    '|---|---|---|---|---|---|---|',
  ]
  for (name, data, protocol), entries in rows.values():
    cells = ['–', '–', 'not evaluated', '–']
    if protocol:
      cells = [
        _percent(entries.values(), 'clean_accuracy'),
        _percent(entries.values(), 'robust_accuracy'),
        f'{protocol["suite"]}, {protocol["norm"]} {protocol["epsilon"]:.4g}',
        f'{protocol["num_images"]} {protocol["split"]}',
      ]
    lines.append(f'| {" | ".join([name, data, str(len(entries)), *cells])} |')
  return '\n'.join(lines) + '\n'


def _percent(entries, field: str) -> str:
  """Mean over seeds in percent, with the sample standard deviation."""
  values = [100 * entry[field] for entry in entries]
  mean = f'{statistics.mean(values):.2f}'
  return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


def figure(runs) -> bytes:
  """A PNG: accuracies against step, then rows of images."""
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  robust = [(f, c) for f, c in runs if c.loss.name != 'standard']
  by_name = {}
  for folder, config in robust:
    by_name.setdefault(configs.experiment_name(config), (folder, config))
  rows = image_rows(by_name)
  fig = plt.figure(figsize=(11, 4.2 + 1.05 * len(rows)), layout='constrained')
  curves, images = fig.subfigures(2, 1, height_ratios=(4.2, max(1.05 * len(rows), 0.1)))
  clean_axis, robust_axis = curves.subplots(1, 2, sharex=True)
  names = list(by_name)
  for folder, config in robust:
    name = configs.experiment_name(config)
    label = name if folder == by_name[name][0] else None  # Once for all its seeds.
    _draw_curves(clean_axis, robust_axis, folder, f'C{names.index(name)}', label)
  for axis, title in ((clean_axis, 'clean accuracy'), (robust_axis, 'robust accuracy')):
    axis.set(title=f'{title}, averaged parameters', xlabel='step')
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axis.grid(alpha=0.3)
  if robust_axis.lines:
    robust_axis.legend(fontsize=8)
  if rows:
    grid = images.subplots(len(rows), _SHOWN, squeeze=False)
    for axes, (title, row) in zip(grid, rows, strict=True):
      for axis, image in zip(axes, row, strict=True):
        axis.imshow(image, cmap='gray', vmin=0, vmax=1, interpolation='nearest')
        axis.set(xticks=[], yticks=[])
      axes[0].set_ylabel(title, rotation=0, ha='right', va='center', fontsize=8)
  buffer = io.BytesIO()
  fig.savefig(buffer, format='png', dpi=110)
  plt.close(fig)
  return buffer.getvalue()


def _draw_curves(clean_axis, robust_axis, folder: epath.Path, color: str, name):
  """Validation accuracy of a run, and the accuracy on its training batches, dotted."""
  lines = metrics.read(folder)
  attack = next(
    (
      k
      for line in lines
      for k in line
      if k.startswith('eval_ema/') and 'clean' not in k
    ),
    None,
  )
  for axis, validation, training in (
    (clean_axis, 'eval_ema/clean_accuracy', 'train/clean_accuracy'),
    (robust_axis, attack, 'train/adv_accuracy'),
  ):
    for key, style, what in (
      (validation, '-', 'validation'),
      (training, ':', 'training batches'),
    ):
      label = f'{name}: {what}' if name else None
      points = [(x['step'], x[key]) for x in lines if x.get(key) is not None]
      if points:
        axis.plot(*zip(*points, strict=True), style, color=color, label=label)


def image_rows(runs) -> list[tuple[str, np.ndarray]]:
  """(title, images [_SHOWN, H, W, C] in [0, 1]) of what the runs saw and met.

  Args:
    runs: experiment name → (workdir, config) of one of its runs.
  """
  rows = []
  for name, (folder, _) in runs.items():
    path = folder / 'figures' / 'examples.npz'
    if path.exists():
      with np.load(io.BytesIO(path.read_bytes())) as file:
        if not rows:
          rows.append(('test images', file['images'][:_SHOWN] / 255))
        rows.append((f'adversarial for\n{name}', file['adversarial'][:_SHOWN]))
  sources = {c.data.samples for _, c in runs.values() if c.data.samples}
  for source in sorted(sources):
    if epath.Path(source).exists():
      sample_set = samples.SampleSet.open(source)
      rows.append(
        (
          f'generated\n{epath.Path(source).parent.name}',
          sample_set.gather(np.arange(min(_SHOWN, len(sample_set)))) / 255,
        )
      )
  config = next((c.dataset for _, c in runs.values()), None)
  if config is not None and config.name == 'digits':
    real = datasets.load(
      'digits', 'train', train_images=_SHOWN, validation_images=config.validation_images
    )
    rows.insert(0, ('real, training', real.images / 255))
  return [(title, row) for title, row in rows if len(row) == _SHOWN]


if __name__ == '__main__':
  cli.run(main)
