"""Tables of results: ours beside the published, as Markdown, CSV and LaTeX."""

import collections
import csv
import io
import math
import statistics
from typing import Any, NamedTuple

from jaxrobust.config.tables import Row, Table
from jaxrobust.files import json_files

_ACCURACIES = {
  'clean': ('clean', 'clean_accuracy', 100),
  'robust': ('robust', 'robust_accuracy', 100),
}
# By kind of table, for each figure: its title, its field in results.json and what makes
# it percent. The keys are those of a row's published figures.
COLUMNS = {
  'accuracies': _ACCURACIES,
  'fractions': _ACCURACIES,
  'neighbours': {
    'nearest_train': ('nearest in train', 'nearest_train', 100),
    'nearest_test': ('in test', 'nearest_test', 100),
    'nearest_itself': ('in itself', 'nearest_itself', 100),
    'coverage_train': ('coverage of train', 'coverage_train', 100),
    'coverage_test': ('of test', 'coverage_test', 100),
  },
  'conditions': {
    'labeller_test_accuracy': ('labeller on test', 'labeller_test_accuracy', 100),
    'label_agreement': ('labels agreed', 'label_agreement', 100),
    'mean_confidence': ('confidence', 'mean_confidence', 100),
    'fid': ('FID', 'fid', 1),
    'two_sample_accuracy': ('distinguished', 'two_sample_accuracy', 100),
    'flip_rate_generated': ('flipped, generated', 'flip_rate_generated', 100),
    'flip_rate_test': ('flipped, test', 'flip_rate_test', 100),
    'coverage_test': ('coverage of test', 'coverage_test', 100),
  },
}
_AGREEMENT = 'agreement_with_condition'
_WORDS = {'other': 'another config'}
_ANALYSES = ('neighbours', 'conditions')  # of samples of the sets, and of one seed


class Cell(NamedTuple):
  """A figure of a row: in percent, but for the FID.

  Attributes:
    published: None if it is not, or not known.
    values: one of each run that is done.
  """

  published: float | None
  values: list[float]

  @property
  def mean(self) -> float | None:
    """Over the seeds."""
    return statistics.mean(self.values) if self.values else None

  @property
  def deviation(self) -> float | None:
    """The sample standard deviation over seeds; None for less than two."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None

  @property
  def difference(self) -> float | None:
    """Ours less the published."""
    ours, published = self.mean, self.published
    return None if ours is None or published is None else ours - published


class Line(NamedTuple):
  """A row of a table with what there is of it.

  Attributes:
    row: as the table has it.
    points: `points.Point` of its runs, one a seed; none if it is published only.
    states: of these, with a line on each.
    cells: figure → Cell.
    warnings: of the evaluations.
    num_images: that an analysis compared of each set; None without one.
  """

  row: Row
  points: list
  states: list[tuple[str, str]]
  cells: dict[str, Cell]
  warnings: list[str]
  num_images: int | None = None

  def word(self) -> str:
    """What stands in the place of a figure that is not there."""
    states = dict.fromkeys(state for state, _ in self.states if state != 'done')
    return ', '.join(_WORDS.get(state, state) for state in states) or '–'

  def remarks(self) -> list[str]:
    """What is known of the runs that are not done."""
    return [
      f'{point.name}: {_WORDS.get(state, state)} ({message})'
      for point, (state, message) in zip(self.points, self.states, strict=True)
      if message
    ]

  def seeds(self) -> str:
    """How many runs are done; if not all, what became of the others."""
    states = collections.Counter(_WORDS.get(state, state) for state, _ in self.states)
    done = states.pop('done', 0)
    if not states:
      return str(done or '–')
    others = ', '.join(f'{n} {state}' for state, n in states.items())
    return f'{done} of {len(self.points)}: {others}'


def read(table: Table, maker: Any) -> list[Line]:
  """The lines of a table, from the workdirs of its rows.

  Args:
    table: with rows, of `config.tables`.
    maker: `points.Maker` of the folder that the workdirs are in.
  """
  return [_line(table, row, maker.of_row(table, row)) for row in table.rows]


def _line(table, row, points: list) -> Line:
  states = [point.state() for point in points]
  known = zip(points, states, strict=True)
  results = [_result(table, point) for point, (state, _) in known if state == 'done']
  cells = {
    name: Cell(
      row.published.get(name),
      [factor * y for x in results if (y := _figure(x, field)) is not None],
    )
    for name, (_, field, factor) in COLUMNS[table.kind].items()
  }
  warnings = [str(w) for x in results for w in x.get('warnings', [])]
  sizes = [x['protocol']['num_images'] for x in results if table.kind in _ANALYSES]
  warnings = list(dict.fromkeys(warnings))
  return Line(row, points, states, cells, warnings, min(sizes, default=None))


def _result(table, point) -> dict:
  """The entry that answers for a point; UserError for one that cannot be shown."""
  result, file = point.result(), f'{point.workdir}/results.json'
  fields = [field for _, field, _ in COLUMNS[table.kind].values()]
  figures = {f'{field}?': (float, type(None)) for field in (*fields, _AGREEMENT)}
  json_files.check(result, file, figures)
  if table.kind in _ANALYSES:
    json_files.check(result['protocol'], file, {'num_images': int})
  return result


def _figure(result: dict, field: str) -> float | None:
  """A figure of an entry of results.json; None if it has none."""
  if field == 'label_agreement' and result.get('labelled_by_labeller'):
    field = _AGREEMENT  # It always agrees with itself.
  return result.get(field)


def caption(table: Table, lines: list[Line]) -> str:
  """What the figures are."""
  if table.kind not in _ANALYSES:
    judged = f', robust under {table.suite}' if table.suite else ''
    several = any(
      x.deviation is not None for line in lines for x in line.cells.values()
    )
    over = '; mean ± standard deviation over seeds' if several else ''
    return f'Accuracy in percent{judged}{over}.'
  other = ', but for the FID' if 'fid' in COLUMNS[table.kind] else ''
  sizes = sorted({line.num_images for line in lines if line.num_images})
  compared = ' or '.join(f'{size:,}' for size in sizes)
  of = f', of {compared} images of each set' if sizes else ''
  return f'Shares in percent{other}{of}.'


def grid(table: Table, lines: list[Line]) -> tuple[list[list[str]], list[str]]:
  """The cells as text, header first, and footnotes by number.

  Of a figure there are three columns if any row has published it, else one; the
  difference is left out where features differ. Shares of ours have no more decimals
  than their number of images allows.
  """
  columns = COLUMNS[table.kind]
  parts = 2 if table.kind == 'neighbours' else 3
  published = {n for n in columns if any(n in line.row.published for line in lines)}
  header, notes = ['row'], []
  for name, (title, _, _) in columns.items():
    header += [f'{title}, published', 'ours', 'difference'][
      : parts * (name in published)
    ]
    header += [title] * (name not in published)
  rows = [[*header, 'seeds']]
  for line in lines:
    marks = []
    for note in filter(None, [line.row.uncertain, *line.warnings, *line.remarks()]):
      if note not in notes:
        notes.append(note)
      marks.append(f'[{notes.index(note) + 1}]')
    cells = [' '.join([line.row.name, *marks])]
    for name, cell in line.cells.items():
      share = columns[name][2] == 100
      ours = _ours(cell, line.num_images if share else None) or line.word()
      if name in published:
        difference = _number(cell.difference, '+')
        cells += [_number(cell.published), ours, difference][:parts]
      else:
        cells.append(ours)
    rows.append([*cells, line.seeds()])
  return rows, notes


def _number(value: float | None, sign: str = '') -> str:
  return '–' if value is None else f'{value:{sign}.2f}'.replace('-', '−')


def _ours(cell: Cell, num_images: int | None) -> str:
  """Mean with its deviation if it has one; shares of 100 images in whole percents."""
  decimals = min(max(int(math.log10(num_images or 10_000)) - 2, 0), 2)
  deviation = '' if cell.deviation is None else f' ± {cell.deviation:.{decimals}f}'
  return f'{cell.mean:.{decimals}f}{deviation}' if cell.values else ''


def markdown(table: Table, lines: list[Line]) -> str:
  """The table as a section of Markdown, with its notes."""
  (header, *rows), notes = grid(table, lines)
  text = [f'### {table.title}', '', caption(table, lines), '']
  text += [f'| {" | ".join(x)} |' for x in (header, ['---'] * len(header), *rows)]
  text += ['', table.note] if table.note else []
  text += ['', *(f'{i}. {note}' for i, note in enumerate(notes, 1))] if notes else []
  return '\n'.join(text) + '\n'


def comma_separated(table: Table, lines: list[Line]) -> str:
  """The table as CSV: a line a row; a number that is not there is left out."""
  columns = COLUMNS[table.kind]
  parts = ('published', 'mean', 'deviation', 'difference')
  parts = parts[:3] if table.kind == 'neighbours' else parts
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  names = [f'{name}_{part}' for name in columns for part in parts]
  writer.writerow(
    ['row', *names, 'seeds_done', 'seeds', 'states', 'remarks', 'uncertain']
  )
  for line in lines:
    states = [state for state, _ in line.states]
    writer.writerow(
      [
        line.row.name,
        *(getattr(line.cells[name], part) for name in columns for part in parts),
        states.count('done'),
        len(states),
        ' '.join(states),
        '; '.join(line.remarks()),
        line.row.uncertain,
      ]
    )
  return file.getvalue()


def latex(name: str, table: Table, lines: list[Line]) -> str:
  """The table as LaTeX, to be \\input; needs booktabs."""
  (header, *rows), notes = grid(table, lines)
  row = lambda cells: f'    {" & ".join(map(_escape, cells))} \\\\'
  said = _escape(f'{table.title}. {caption(table, lines)} {table.note}'.strip())
  text = [
    '\\begin{table}',
    '  \\centering',
    f'  \\caption{{{said}}}',
    f'  \\label{{tab:{name}}}',
    f'  \\begin{{tabular}}{{l{"r" * (len(header) - 1)}}}',
    '    \\toprule',
    row(header),
    '    \\midrule',
    *map(row, rows),
    '    \\bottomrule',
    '  \\end{tabular}',
    *(f'  \\par [{i}] {_escape(note)}' for i, note in enumerate(notes, 1)),
    '\\end{table}',
  ]
  return '\n'.join(text) + '\n'


_ESCAPES = str.maketrans(
  {
    **{c: f'\\{c}' for c in '&%$#_{}'},
    '\\': r'\textbackslash{}',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    '±': r'$\pm$',
    '–': '--',
    '−': '$-$',
    '<': r'$<$',
    '>': r'$>$',
  }
)


def _escape(text: str) -> str:
  return text.translate(_ESCAPES)
