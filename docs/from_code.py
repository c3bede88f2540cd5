"""Parts of pages that are made from the code that holds them.

In a page, a fenced block `{from-code} NAME` is replaced by what the function NAME of
`PARTS` writes.
"""

import ast
import contextlib
import importlib
import io
import os
import re
import textwrap

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from jaxrobust import __main__ as command
from jaxrobust import config as configs
from jaxrobust.config import experiments
from jaxrobust.models import zoo
from jaxrobust.runs import flags


def setup(app):
  """Adds the directive."""
  app.add_directive('from-code', _FromCode)
  return {'parallel_read_safe': True}


class _FromCode(SphinxDirective):
  required_arguments = 1
  optional_arguments = 2

  def run(self):
    name, *arguments = self.arguments
    found = PARTS[name](*arguments)
    if name == 'help':
      return [nodes.literal_block(found, found, language='text')]
    return self.parse_text_to_nodes(found, allow_section_headings=True)


def help_page(verb: str, *subcommand: str) -> str:
  """What `jaxrobust VERB --help` prints."""
  module = importlib.import_module(command._VERBS[verb])
  if hasattr(module, 'PROGRAM'):
    return flags.page(module.PROGRAM)
  os.environ['COLUMNS'] = '88'  # argparse would look at the terminal.
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
    module.main([*subcommand, '--help'])
  return printed.getvalue()


def list_experiments() -> str:
  """Names of the experiments, with the first line of each."""
  lines = []
  for name in experiments.names():
    text = (experiments.folder() / f'{name}.py').read_text()
    lines.append((f'`{name}`', ast.get_docstring(ast.parse(text)).partition('\n')[0]))
  return _table(('name', 'what it is'), lines)


def all_fields() -> str:
  """Fields of all kinds of configs, a section each."""
  found = re.split(r'^Fields of (.*):\n', configs.describe(), flags=re.M)[1:]
  return '\n'.join(
    f'## Of {kind}\n\n```text\n{textwrap.dedent(text).strip()}\n```\n'
    for kind, text in zip(found[::2], found[1::2], strict=True)
  )


def released_checkpoints() -> str:
  """Released checkpoints by paper, with the published accuracies."""
  lines = []
  for name, card in zoo.ENTRIES.items():
    [entry] = card.accuracies
    lines.append(
      (
        f'`{name}`',
        f'{card.norm} {_epsilon(card.epsilon)}',
        f'{100 * entry["clean_accuracy"]:.2f}',
        f'{100 * entry["robust_accuracy"]:.2f}',
        entry['published'],
      )
    )
  return _table(('name', 'threat', 'clean', 'robust', 'published in'), lines)


def _epsilon(epsilon: float) -> str:
  whole = round(255 * epsilon, 6)
  return f'{whole:g}/255' if whole == int(whole) else f'{epsilon:g}'


def tables_of_the_paper() -> str:
  """Tables of published rows: what was published, and the command of each row."""
  tables = experiments.load_file('paper').TABLES
  return '\n'.join(
    f'### {table.title}: `{name}`\n\n{_published(table)}\n'
    for name, table in tables.items()
    if any(row.published for row in table.rows)
  )


def other_tables() -> str:
  """Tables without a published number: names, titles, suites and seeds."""
  tables = experiments.load_file('paper').TABLES
  lines = [
    (f'`{name}`', table.title, str(len(table.rows)), table.suite or '–')
    for name, table in tables.items()
    if not any(row.published for row in table.rows)
  ]
  return _table(('`NAME`', 'title', 'rows', 'evaluated by'), lines)


def _published(table) -> str:
  """The rows of a table, then its note and what is uncertain."""
  columns = list(dict.fromkeys(key for row in table.rows for key in row.published))
  remarks = list(dict.fromkeys(row.uncertain for row in table.rows if row.uncertain))
  lines = []
  for row in table.rows:
    mark = f' [{remarks.index(row.uncertain) + 1}]' if row.uncertain else ''
    figures = [
      f'{row.published[c]:.2f}' if c in row.published else '–' for c in columns
    ]
    lines.append((f'{row.name}{mark}', *figures, _flags(row)))
  heads = [column.replace('_', ' in ', 1) for column in columns]
  parts = [_table(('row', *heads, 'flags of the run'), lines), table.note]
  parts += [f'[{i}] {_sentence(remark)}' for i, remark in enumerate(remarks, 1)]
  return '\n\n'.join(filter(None, parts))


def _flags(row) -> str:
  """The config of a row, as it is given to its program."""
  if not row.config:
    return 'not run here'
  name = row.config.removeprefix('experiments/').replace('.py', '', 1)
  shown = {k: str(v).replace('{workdir}', 'RUNS') for k, v in row.overrides.items()}
  return ' '.join(
    [f'`--config={name}`', *(f'`--config.{k}={v}`' for k, v in shown.items())]
  )


def _sentence(text: str) -> str:
  return f'{text[0].upper()}{text[1:]}.'


def _table(head: tuple[str, ...], lines) -> str:
  """A table in Markdown."""
  rows = [head, ['---'] * len(head), *lines]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


PARTS = {
  'experiments': list_experiments,
  'fields': all_fields,
  'help': help_page,
  'other-tables': other_tables,
  'released-checkpoints': released_checkpoints,
  'tables-of-the-paper': tables_of_the_paper,
}
