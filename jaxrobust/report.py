"""Shows the runs of a folder: side by side, or as the tables of the paper.

Usage:
  python -m jaxrobust.report --workdir=FOLDER_OF_WORKDIRS
  python -m jaxrobust.report --workdir=FOLDER_OF_WORKDIRS --table=NAME [--status]
      [--tables=FILE]

Examples:
  python -m jaxrobust.report --workdir=runs/quickstart
  A table of the paper, as far as it is filled; and what would fill the rest:
    python -m jaxrobust.report --workdir=runs/paper --table=digits-linf
    python -m jaxrobust.report --workdir=runs/paper --table=digits-linf --status

Without --table: prints a table of the evaluations in the folder's workdirs and writes
it to report.md: a line an experiment, mean ± standard deviation over its seeds. Draws
report.png: accuracy against step of the adversarially trained runs, and test,
adversarial and generated images. Then every table that has any run.

A row is the run whose workdir has its experiment's name. A workdir that holds another
config is reported, and does not count. A run is taken for running if its workdir says
so and it is on another host, or its process is there.
"""

import statistics
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust.config import fields
from jaxrobust.config.tables import Table
from jaxrobust.errors import UserError
from jaxrobust.files import json_files
from jaxrobust.reporting import figures, planned_runs
from jaxrobust.reporting import tables as texts
from jaxrobust.runs import cli, metrics
from jaxrobust.runs import workdir as workdirs

# More differences than these are no name.
_MAX_FIELDS = 4
# What a line shows of an entry of results.json.
_JUDGED = {
  'protocol': {
    'suite': str,
    'norm': str,
    'epsilon': float,
    'split': str,
    'num_images': int,
  },
  'clean_accuracy': float,
  'robust_accuracy': float,
}


def main(
  config: config_dict.ConfigDict | None,
  workdir: str,
  table: str = '',
  tables: str = '',
  status: bool = False,
) -> None:
  """Writes tables and figures of the workdirs below `workdir`."""
  if status and not table:
    raise UserError('--status is of a table: give --table=NAME')
  if not epath.Path(workdir).is_dir() and not status:
    raise UserError(
      f'{workdir}: no such folder; give the one with the workdirs of runs, or that of '
      'one run'
    )
  folder, known, preparations = epath.Path(workdir), {}, {}
  if table or tables or epath.Path(planned_runs.TABLES).exists():
    known, preparations = planned_runs.read_tables(tables)
  maker = planned_runs.Maker(workdir, preparations)
  if table:
    found = planned_runs.find_table(table, known)
    if status:
      print('\n'.join(status_lines(found, maker)))
    else:
      lines = texts.read(found, maker)
      write_table(folder, table, found, lines)
      draw_table(folder, table, found, lines)
    return
  runs = find_runs(folder)
  if runs:
    text = table_of_runs(runs)
    print(text, end='')
    workdirs.write(folder / 'report.md', text)
  filled = {
    name: texts.read(x, maker) for name, x in known.items() if has_run(x, maker)
  }
  if not runs and not filled:
    raise UserError(
      f'{folder} holds no workdir of a training run: give the folder in '
      'which the workdirs are'
    )
  for name, lines in filled.items():
    print()
    write_table(folder, name, known[name], lines)
  # Figures take their time, which nobody should spend before the numbers.
  if runs:
    draw_runs(folder, runs)
  progress = metrics.Progress('figures', len(filled), 'tables')
  for name, lines in filled.items():
    draw_table(folder, name, known[name], lines)
    progress.advance()
  progress.close()


def draw_runs(
  folder: epath.Path, runs: list[tuple[epath.Path, config_dict.ConfigDict]]
) -> None:
  """All classifiers side by side: report.png."""
  with figures.style() as plt:
    overview = figures.draw_overview(plt, figures.groups_by_experiment(runs))
    workdirs.write(folder / 'report.png', figures.render(overview))
  print(f'figure: {folder / "report.png"}')


def write_table(
  folder: epath.Path, name: str, table: Table, lines: list[texts.Line]
) -> None:
  """The texts of a table of the paper."""
  home = folder / 'report'
  home.mkdir(parents=True, exist_ok=True)
  text = texts.markdown(table, lines)
  print(text, end='')
  workdirs.write(home / f'{name}.md', text)
  workdirs.write(home / f'{name}.csv', texts.comma_separated(table, lines))
  workdirs.write(home / f'{name}.tex', texts.latex(name, table, lines))


def draw_table(
  folder: epath.Path, name: str, table: Table, lines: list[texts.Line]
) -> None:
  """The figures of a table of the paper, as far as there are runs."""
  groups, examples = {}, {}
  for line in lines:
    if found := trained(line):
      groups[line.row.name] = found
      examples.setdefault(line.row.curve or line.row.name, found)
  home = folder / 'report' / name
  with figures.style() as plt:
    drawn = {'': figures.draw_table(plt, table, lines)}
    if groups:
      drawn['_training'] = figures.draw_training(plt, groups)
      drawn['_examples'] = figures.draw_examples(plt, examples)
    for ending, figure in drawn.items():
      if figure is not None:
        figures.write(figure, home.with_name(f'{name}{ending}'))
  print(f'files: {home}*')


def trained(line: texts.Line) -> list[tuple[epath.Path, config_dict.ConfigDict]]:
  """(workdir, config) of a row's runs that have begun to train."""
  return [
    (point.workdir, point.config)
    for point, (state, _) in zip(line.points, line.states, strict=True)
    if state != 'other' and (point.workdir / 'metrics.jsonl').exists()
  ]


def has_run(table: Table, maker: planned_runs.Maker) -> bool:
  """Whether any row of a table has a workdir."""
  return any(
    (point.workdir / 'config.json').exists()
    for row in table.rows
    for point in maker.of_row(table, row)
  )


def status_lines(table: Table, maker: planned_runs.Maker) -> Iterator[str]:
  """Yields the state of each run of a table, then what would fill it."""
  needed = maker.of_table(table)
  made = {name for point in needed for name in point.needs}
  rows = [('preparations', [p for p in needed if p.name in made])]
  rows += [(row.name, maker.of_row(table, row)) for row in table.rows]
  states = {point.name: point.state() for point in needed}
  for name, found in rows:
    if found:
      yield name
    for point in found:
      state, message = states[point.name]
      yield f'  {state:<12} {point.name}{f" ({message})" if message else ""}'
  yield ''
  left = {name for name, (state, _) in states.items() if state != 'done'}
  of_rows = {point.name for _, found in rows[1:] for point in found}
  for point in planned_runs.with_needs(left & of_rows, needed):
    if point.name not in left:
      continue
    yield from remarks(point, *states[point.name])
    for command, finished in point.commands():
      if not finished or states[point.name][0] == 'other':
        yield planned_runs.command_line(command)


def remarks(point: planned_runs.Point, state: str, message: str) -> Iterator[str]:
  """Yields, as comments of a shell, what to know before a point is run."""
  if state == 'running':
    host = workdirs.read_status(point.workdir)['host']
    yield f'# running on {host}, do not start it twice:'
  if state == 'other':
    yield f'# {point.workdir} holds another config ({message}), move it away first:'
  if source := point.absent_samples():
    yield f'# {source} is absent: python -m jaxrobust.data import FILES {source}'


def find_runs(folder: epath.Path) -> list[tuple[epath.Path, object]]:
  """(workdir, config) of the classifier's run that a folder is, or of those in it."""
  found = []
  for child in [folder, *sorted(folder.iterdir())]:
    path = child / 'config.json'
    if path.exists() and 'training' in (config := workdirs.read_config(child)):
      found.append((child, config))
  return found


class Line(NamedTuple):
  """A line of the table of runs: one experiment by one protocol, over its seeds.

  Attributes:
    config: without its seed.
    folder: of one of its runs.
    protocol: of the evaluation, without what differs from seed to seed; None where it
      was not evaluated.
    entries: of results.json, by seed; the last one of a workdir counts.
  """

  config: config_dict.ConfigDict
  folder: epath.Path
  protocol: dict | None
  entries: dict[int, dict]


def lines_of_runs(runs: list[tuple[epath.Path, config_dict.ConfigDict]]) -> list[Line]:
  """The lines of a table of runs, those with results first.

  Runs are seeds of one experiment if their configs differ in nothing else.
  """
  lines = {}
  for folder, config in runs:
    for entry in workdirs.read_results(folder) or [None]:
      if entry:
        json_files.check(entry, str(folder / 'results.json'), _JUDGED)
      protocol = dict(entry['protocol']) if entry else None
      if protocol:
        protocol |= {'seed': None, 'checkpoint_sha256': None}
      same = configs.without_seed(config)
      line = lines.setdefault(
        (configs.to_json(same), str(protocol)), Line(same, folder, protocol, {})
      )
      line.entries[config.seed] = entry
  return sorted(lines.values(), key=lambda line: line.protocol is None)


def names_of(lines: list[Line]) -> list[str]:
  """Of each line the name of its experiment, and what tells apart those that share it.

  That is the fields in which their configs differ, or where these are many the folder.
  """
  same_name = {}
  for line in lines:
    same_name.setdefault(configs.experiment_name(line.config), []).append(line)
  names = {}
  for name, group in same_name.items():
    flat = [fields.flatten(line.config) for line in group]
    differing = [x for x in sorted(flat[0]) if len({str(f.get(x)) for f in flat}) > 1]
    for line, values in zip(group, flat, strict=True):
      told = ', '.join(f'{x}={values[x]}' for x in differing if x in values)
      if len(differing) > _MAX_FIELDS:
        told = line.folder.name
      names[id(line)] = f'{name} ({told})' if told else name
  return [names[id(line)] for line in lines]


def table_of_runs(runs: list[tuple[epath.Path, config_dict.ConfigDict]]) -> str:
  """Markdown: a line an experiment and protocol, over its seeds; percent."""
  text = [
    '| experiment | data | seeds | clean | robust | suite | images |',
    '|---|---|---|---|---|---|---|',
  ]
  lines = lines_of_runs(runs)
  for name, line in zip(names_of(lines), lines, strict=True):
    data, protocol = line.config.data, line.protocol
    cells = ['–', '–', 'not evaluated', '–']
    if protocol:
      cells = [
        _percent(line.entries.values(), 'clean_accuracy'),
        _percent(line.entries.values(), 'robust_accuracy'),
        f'{protocol["suite"]}, {protocol["norm"]} {protocol["epsilon"]:.4g}',
        f'{protocol["num_images"]} {protocol["split"]}',
      ]
    if protocol and 'checkpoint_step' in protocol:
      name += f' at step {protocol["checkpoint_step"]}'
    share = f'{data.real_fraction:.0%} real' if data.samples else 'real'
    text.append(f'| {" | ".join([name, share, str(len(line.entries)), *cells])} |')
  return '\n'.join(text) + '\n'


def _percent(entries, field: str) -> str:
  """Mean over seeds in percent, with the sample standard deviation."""
  values = [100 * entry[field] for entry in entries]
  mean = f'{statistics.mean(values):.2f}'
  return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


PROGRAM = cli.Program(
  'report',
  main,
  (
    cli.Flag(
      'table',
      'A table of experiments/paper.py, or of --tables: ours beside the published. '
      'Writes report/NAME.md, .csv and .tex (which needs booktabs); the figure NAME, '
      'training curves NAME_training and images NAME_examples, as .png and .svg.',
    ),
    cli.Flag('tables', 'A file with tables of your own.', cli.PATH),
    cli.Flag(
      'status',
      'Prints for each run of the table whether it is done, running, interrupted, '
      'preempted, failed, unfinished, missing or other (of another config), and the '
      'commands that would fill the table; writes nothing.',
      bool,
      False,
    ),
  ),
  config='none',
  alone=True,
)

if __name__ == '__main__':
  cli.run(PROGRAM)
