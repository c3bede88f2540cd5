r"""Runs the points of a sweep, or whatever fills a table of the paper.

Usage:
  jaxrobust sweep --workdir=RUNS --config=EXPERIMENT[:ARG] \
      [--list] [--only=REGEX] [--shard=I/N] [--config.a.b=VALUE …]
  jaxrobust sweep --workdir=RUNS --table=NAME [--tables=FILE] …

Examples:
  What there is to do, each line a command to copy:
    jaxrobust sweep --workdir=runs --config=digits --list
  All of it, here, one after the other:
    jaxrobust sweep --workdir=runs --config=digits
  The second quarter of it:
    … --shard=1/4
  The seeds only:
    … --only='real-seed-\d+'
  A table of the paper in handwritten digits, on a laptop:
    jaxrobust sweep --workdir=runs/paper --table=digits-linf

The experiment's file defines sweep(), which yields pairs of a name and overrides, such
as ('seed-1', {'seed': 1, 'variant': 'seed-1'}). A point is trained, then evaluated, in
RUNS/EXPERIMENT, where EXPERIMENT is its experiment's name; `variant` tells apart points
that would share one. Other flags are passed on: --config.a.b=VALUE applies to every
point, and with --coordinator=HOST:PORT and its companions all processes that are given
the same sweep take part in each run (on a TPU pod they do so without these flags). The
rows of a table take no --config.a.b: they have their own.

What is finished is skipped, what was begun is resumed; a workdir that holds another
config is refused. The first point that does not end with 0 ends the sweep with its exit
code, so 42 means: run me again.
"""

import re
import signal
import subprocess
import sys

from absl import logging
from ml_collections import config_dict

from jaxrobust.errors import UserError
from jaxrobust.reporting.planned_runs import (
  Maker,
  Point,
  command_line,
  find_table,
  of_sweep,
  read_tables,
  with_needs,
)
from jaxrobust.runs import cli, stop_requests
from jaxrobust.runs.flags import Given


def main(
  config: config_dict.ConfigDict | None,
  workdir: str,
  list_: bool,
  only: str,
  shard: str,
  table: str,
  tables: str,
  given: Given,
) -> int:
  """Lists or runs the points."""
  if table and (given.config or given.overrides):
    own = f'--config.{next(iter(given.overrides))}' if given.overrides else '--config'
    raise UserError(
      f'{own} has no use with --table=: its rows have their own configs; write '
      'others to a file of tables of your own, for --tables=FILE'
    )
  if table:
    known, preparations = read_tables(tables)
    maker = Maker(workdir, preparations, given.to_pass_on())
    found = maker.of_table(find_table(table, known))
  elif given.config:
    found = of_sweep(config, given.config, workdir, given.to_pass_on())
  else:
    raise UserError('give --config= of an experiment that has a sweep(), or --table=')
  if not found:
    raise UserError(f'--table={table} has no row to run: its rows are published only')
  chosen = points_to_run(found, only, shard)
  refuse_others(chosen)
  if not list_:
    return run(chosen)
  for point in chosen:
    if remark := point.remark_on_samples():
      print(f'# {remark}')
    for command, finished in point.commands():
      print('# finished: ' * finished + command_line(command))
  return cli.DONE


def points_to_run(found: list[Point], only: str = '', shard: str = '') -> list[Point]:
  """Points by name, those of a shard 'I/N', and what they need.

  Args:
    found: all points; what a point needs stands before it.
    only: matches the whole names of the chosen ones; '' is all.
    shard: which of these, by their number; '' is all.

  Raises:
    UserError: if no point matches, for what is no shard, or if something that a shard
      needs is not finished: shards that made it would do so at the same time.
  """
  try:
    chosen = [p for p in found if re.fullmatch(only or '.*', p.name)]
  except re.error as e:
    raise UserError(f'--only={only}: {e}; give a regular expression') from e
  if not chosen:
    raise UserError(f'--only={only} matches none of {", ".join(p.name for p in found)}')
  if shard:
    parts = re.fullmatch(r'(\d+)/(\d+)', shard)
    if not parts or int(parts[1]) >= int(parts[2]):
      raise UserError(f'--shard={shard}: write I/N with I from 0 to N - 1')
    needed = {name for p in found for name in p.needs}
    chosen = [p for p in chosen if p.name not in needed]
    if int(parts[1]) >= len(chosen):
      logging.warning('--shard=%s is empty: there are %d points', shard, len(chosen))
    chosen = chosen[int(parts[1]) :: int(parts[2])]
  wanted = with_needs({p.name for p in chosen}, found)
  if shard:
    missing = [p.name for p in wanted if p.name in needed and not p.is_finished()]
    if missing:
      raise UserError(
        f'--shard={shard} needs what is not finished: run it once, '
        f"with --only='{'|'.join(missing)}'"
      )
  return wanted


def refuse_others(chosen: list[Point]) -> None:
  """Raises UserError if the workdir of a point holds another config."""
  for point in chosen:
    state, message = point.state()
    if state == 'other':
      raise UserError(
        f'{point.workdir} holds a run with another config ({message}): move it away, '
        'or use another --workdir'
      )


def run(chosen: list[Point]) -> int:
  """Runs what is not finished; returns the exit code of the first that fails, or 0.

  Raises:
    UserError: before the first run, if a sample set is absent that none of them makes.
  """
  for point in chosen:  # A set that is not there should not wait for its turn.
    remark = point.remark_on_samples()
    if remark and not point.is_finished(point.programs[0]):
      raise UserError(f'{point.name}: {remark}, or leave it out (--only)')
  runner = _Runner()
  for point in chosen:
    for command, finished in point.commands():
      line = command_line(command)
      if finished:
        logging.info('finished: %s', line)
        continue
      if runner.asked:
        raise cli.PreemptedError('asked to stop: the same command goes on')
      logging.info('%s', line)
      if code := runner(command):
        logging.info('exit code %d: %s', code, line)
        return code
  return cli.DONE


class _Runner:
  """Runs one program at a time and passes signals on to it."""

  def __init__(self):
    self.asked, self._process = False, None
    for number in stop_requests.SIGNALS:
      if signal.getsignal(number) != signal.SIG_IGN:  # As nohup leaves SIGHUP.
        signal.signal(number, self._forward)

  def _forward(self, signum, frame):
    del frame
    self.asked = True
    if self._process:
      self._process.send_signal(signum)

  def __call__(self, command: list[str]) -> int:
    # In a session of its own, so that a Ctrl-C reaches it once, from here.
    self._process = subprocess.Popen(
      [sys.executable, '-m', f'jaxrobust.{command[0]}', *command[1:]],
      start_new_session=True,
    )
    if self.asked:  # While it was made.
      self._process.terminate()
    code = self._process.wait()
    return 128 - code if code < 0 else code


PROGRAM = cli.Program(
  'sweep',
  main,
  (
    cli.Flag(
      'table',
      'A table of experiments/paper.py, or of --tables. Labellers and sample sets that '
      'its rows need are made first; tables share runs.',
    ),
    cli.Flag('tables', 'A file with tables of your own.', cli.PATH),
    cli.Flag(
      'list',
      'Prints the commands instead of running them; finished ones as comments.',
      bool,
      False,
    ),
    cli.Flag(
      'only',
      'A regular expression: the points whose whole name it matches, and what they '
      "need. The name of a table's run is that of its workdir.",
    ),
    cli.Flag(
      'shard',
      'I/N: every N-th point from the I-th, counted from 0. What the rows of a table '
      'need is not shared out, and must be finished.',
    ),
  ),
  alone=True,
  passes_on=True,
)

if __name__ == '__main__':
  cli.run(PROGRAM)
