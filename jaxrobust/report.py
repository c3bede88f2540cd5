"""Shows the runs of a folder: side by side, or as the tables of the paper.

Usage:
  jaxrobust report --workdir=FOLDER_OF_WORKDIRS
  jaxrobust report --workdir=FOLDER_OF_WORKDIRS --table=NAME [--status]
      [--tables=FILE]

Examples:
  jaxrobust report --workdir=runs/quickstart
  A table of the paper, as far as it is filled; and what would fill the rest:
    jaxrobust report --workdir=runs/paper --table=digits-linf
    jaxrobust report --workdir=runs/paper --table=digits-linf --status

Without --table: prints a table of the evaluations in the folder's workdirs and writes
it to report.md: a line an experiment, mean ± standard deviation over its seeds. The
workdirs are the folder itself and those right inside it: it looks no deeper. Draws
report.png: accuracy against step of the adversarially trained runs, and test,
adversarial and generated images. Then every table that has any run.

A row is the run whose workdir has its experiment's name. A workdir that holds another
config is reported, and does not count. A run is taken for running if its workdir says
so and it is on another host, or its process is there.
"""

from etils import epath
from ml_collections import config_dict

from jaxrobust.errors import UserError
from jaxrobust.reporting import figures, planned_runs, runs_table, table_status
from jaxrobust.reporting import tables as texts
from jaxrobust.runs import cli, metrics
from jaxrobust.runs import workdir as workdirs


def main(
  config: config_dict.ConfigDict | None,
  workdir: str,
  table: str = '',
  tables: str = '',
  status: bool = False,
) -> None:
  """Writes tables and figures of the workdirs below `workdir`."""
  if status and not table:
    known, _ = planned_runs.read_tables(tables)
    raise UserError(
      f'--status is of a table: give --table=NAME, with one of {", ".join(known)}'
    )
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
      if not folder.is_dir():
        print(f'# {folder} is no folder: none of its runs has begun')
      print('\n'.join(table_status.lines(found, maker)))
    else:
      lines = texts.read(found, maker)
      write_table(folder, table, found, lines)
      draw_table(folder, table, found, lines)
    return
  runs = runs_table.find(folder)
  if runs:
    text = runs_table.markdown(runs)
    print(text, end='')
    workdirs.write(folder / 'report.md', text)
  filled = {
    name: texts.read(x, maker)
    for name, x in known.items()
    if table_status.has_run(x, maker)
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
  folder: epath.Path, name: str, table: texts.Table, lines: list[texts.Line]
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
  folder: epath.Path, name: str, table: texts.Table, lines: list[texts.Line]
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
    if state != 'other' and (point.workdir / metrics.FILE).exists()
  ]


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
