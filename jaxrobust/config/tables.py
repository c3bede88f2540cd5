"""What a table or a figure of a paper is made of: plain values.

`experiments/paper.py` has the tables of the paper; a file of your own with TABLES and
PREPARATIONS is read by --tables=FILE.
"""

from typing import NamedTuple


class Row(NamedTuple):
  """A line of a table, or a point or a bar of a figure: one experiment, over its seeds.

  Attributes:
    name: in the table.
    config: experiment, `NAME:ARG` or `FILE.py:ARG`; '' for a published row that is not
      run here.
    overrides: of its fields. A path `{workdir}/NAME` is in the workdir of the
      preparation NAME, which is made before the row. 'variant' tells apart the
      workdirs of rows that would share one.
    published: in percent; 'clean' and 'robust' accuracy, or columns of the analysis.
      Only what was read in a source: what is remembered or derived is left out.
    uncertain: what is not known of the published row, or how this one differs.
    curve: generator to whose curve a point of a figure belongs; '' for all of them.
    fraction: of real images; where on the curve it is.
    analysis: name of the workdir, if the row is analysed and not trained.
  """

  name: str
  config: str = ''
  overrides: dict = {}
  published: dict = {}
  uncertain: str = ''
  curve: str = ''
  fraction: float | None = None
  analysis: str = ''


class Table(NamedTuple):
  """A table or a figure.

  Attributes:
    title: with the data set and the threat.
    kind: 'accuracies' (bars in its figure), 'fractions' (curves), 'neighbours'
      (stacked shares) or 'conditions' (no figure).
    rows: in order.
    suite: that judges the rows.
    seeds: that every row is trained with.
    note: what the paper says of the outcome, and what is not known.
  """

  title: str
  kind: str
  rows: list[Row]
  suite: str = ''
  seeds: tuple[int, ...] = (0,)
  note: str = ''


class Preparation(NamedTuple):
  """A run whose result rows or other preparations need.

  Attributes:
    program: 'train' (a labeller) or 'generate' (a sample set).
    config: its experiment.
    overrides: of its fields, as in a row.
  """

  program: str
  config: str
  overrides: dict = {}
