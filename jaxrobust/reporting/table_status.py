"""How far the runs of a table are, and the commands that would fill it."""

from collections.abc import Iterator

from jaxrobust.config.tables import Table
from jaxrobust.reporting import planned_runs
from jaxrobust.runs import workdir as workdirs


def has_run(table: Table, maker: planned_runs.Maker) -> bool:
  """Whether any row of a table has a workdir."""
  return any(
    workdirs.has_run(point.workdir)
    for row in table.rows
    for point in maker.of_row(table, row)
  )


def lines(table: Table, maker: planned_runs.Maker) -> Iterator[str]:
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
    yield from _remarks(point, *states[point.name])
    for command, finished in point.commands():
      if not finished or states[point.name][0] == 'other':
        yield planned_runs.command_line(command)


def _remarks(point: planned_runs.Point, state: str, message: str) -> Iterator[str]:
  """Yields, as comments of a shell, what to know before a point is run."""
  if state == 'running':
    host = workdirs.read_status(point.workdir)['host']
    yield f'# running on {host}, do not start it twice:'
  if state == 'other':
    yield f'# {point.workdir} holds another config ({message}), move it away first:'
  if remark := point.remark_on_samples():
    yield f'# {remark}'
