"""What the programs share: their flags, their help page and their exit codes."""

import inspect
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from jaxrobust import config as configs
from jaxrobust.config import classifier, experiments
from jaxrobust.errors import PreemptedError, UserError

DONE, ERROR, PREEMPTED, INTERRUPTED, CRASHED = 0, 1, 42, 130, 134

_COMMON_HELP = """
Flags of every program:
  --workdir=DIR      the run's folder, local or gs://. The same command again resumes
                     it or shows its result; another config in it is refused.
  --config=NAME[:ARG]
                     an experiment, with its argument if it takes one: one of the
                     package's by its name, or a FILE.py by its path.
  --config.a.b=VALUE overrides a field of it, or without --config of the workdir's.
                     --helpfull has the page of all fields.
  --coordinator=HOST:PORT --num_processes=N --process_id=I
                     joins a run of N processes. On a TPU pod none of these is needed;
                     --coordinator=auto under Slurm or Open MPI.

Exit codes: 0 done; 42 preempted after a checkpoint, run it again; 1 error, told in
one line; 128 and above a crash.
"""


def run(
  main,
  extra_flags: Sequence[str] = (),
  needs_workdir: bool = True,
  default_config: Callable[..., Any] | None = None,
  alone: bool = False,
):
  """Parses the command line, runs `main(config, workdir)` and exits with its code.

  `main` takes a config and a workdir. A program that can take the config from the
  workdir gets None where --config is not given. The module's docstring is the page
  that --help prints.

  Args:
    main: the program.
    extra_flags: further flags with a string, which `main` gets as keyword arguments
      ('' where not given); one that is a word of Python ends in '_', as 'from_'.
    needs_workdir: whether --workdir must be given; else `main` may get None.
    default_config: makes the config that overrides apply to where --config is not
      given, from the workdir and the extra flags (all strings); else it is the one of
      the workdir.
    alone: whether one process does all the work, on the CPU; in a run of several the
      others wait for it.
  """
  page = inspect.getdoc(inspect.getmodule(main)).strip()
  if {'--help', '-h', '-help', '--helpfull'} & set(sys.argv[1:]):
    print(f'{page}\n{_COMMON_HELP}', end='')
    if '--helpfull' in sys.argv[1:]:
      print(f'\n{configs.describe()}', end='')
    sys.exit(DONE)
  sys.exit(_run(main, extra_flags, needs_workdir, default_config, alone))


def base_config():
  """The base experiment's config: every field at its default."""
  return classifier.get_config()


def _run(
  main, extra_flags=(), needs_workdir=True, default_config=None, alone=False
) -> int:
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, "the run's folder", flag_values=values)
  flags.DEFINE_string('coordinator', '', 'host:port, or auto', flag_values=values)
  flags.DEFINE_integer('num_processes', None, 'of the run', flag_values=values)
  flags.DEFINE_integer('process_id', None, 'of this process', flag_values=values)
  for name in extra_flags:
    flags.DEFINE_string(name.rstrip('_'), '', '', flag_values=values)
  _quiet_logs()
  try:
    config = _parse(values, extra_flags, needs_workdir, default_config)
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return ERROR
  # Only now: a mistake on the command line should not wait for jax.
  from jaxrobust.distributed import parallel
  from jaxrobust.runs import process_group
  from jaxrobust.runs import workdir as workdirs

  extra = {name: values[name.rstrip('_')].value for name in extra_flags}
  program = pathlib.Path(sys.argv[0]).stem
  try:
    process_group.join(
      values.coordinator, values.num_processes, values.process_id, alone
    )
    command = {'program': program, 'workdir': values.workdir or '', **extra}
    process_group.start(command, config)
    workdirs.begin([program, *sys.argv[1:]])
    if not (alone and process_group.leave_to_first()):
      main(config, values.workdir, **extra)
    code, state, line = DONE, 'done', ''
  except PreemptedError as e:
    logging.info('%s', e)
    code, state, line = PREEMPTED, 'preempted', str(e)
  except KeyboardInterrupt:  # One process alone saves first, several do not.
    process_group.take_last_word()
    code, state, line = INTERRUPTED, 'preempted', 'interrupted from the keyboard'
  except Exception as e:
    process_group.take_last_word()
    state = 'failed'
    known = workdirs.disk_error(e, values.workdir) or parallel.memory_error(e)
    if told := e if isinstance(e, UserError) else known:
      print(f'error: {told}', file=sys.stderr)
      code, line = ERROR, str(told)
    elif told := process_group.lost(e):
      print(f'error: {told}', file=sys.stderr)
      code, line = CRASHED, told
    else:  # A fault of the machine or of this code: start it again.
      traceback.print_exc()
      code, line = CRASHED, f'{type(e).__name__}: {e}'
  workdirs.write_status(state, line)
  if code in (DONE, PREEMPTED):
    process_group.finish()
  else:  # Others may wait for this process, which will not come.
    process_group.end(code, state, line)
  return code


def _define_config(values, extra_flags, default_config):
  """Defines --config: a file, or where none is given a default."""
  given, arguments = {}, sys.argv[1:]
  for argument, following in zip(arguments, [*arguments[1:], ''], strict=True):
    name, equals, value = argument.lstrip('-').partition('=')
    given[name] = value if equals else following
  config, workdir = None, given.get('workdir', '')
  if 'config' not in given:
    if default_config:
      extra = {name: given.get(name.rstrip('_'), '') for name in extra_flags}
      config = default_config(workdir, **extra)
    elif workdir and any(name.startswith('config.') for name in given):
      from jaxrobust.runs import workdir as workdirs

      config = workdirs.read_config(workdir)
  if config is None:
    config_flags.DEFINE_config_file('config', flag_values=values)
  else:
    config_flags.DEFINE_config_dict('config', config.lock(), flag_values=values)


def _parse(values, extra_flags, needs_workdir, default_config):
  """The config, or None where none is given; UserError for what is wrong."""
  arguments = []
  for argument in sys.argv:
    if argument.startswith('--config='):
      name, *arg = argument.removeprefix('--config=').split(':', 1)
      argument = '--config=' + ':'.join([experiments.find(name), *arg])
    arguments.append(argument)
  if needs_workdir and not any(a.lstrip('-').startswith('workdir') for a in sys.argv):
    raise UserError("--workdir is missing: give the run's folder")
  try:
    _define_config(values, extra_flags, default_config)
    rest = values(arguments)[1:]
    config = values.config
  except UserError:
    raise
  except Exception as e:  # Whatever an experiment's file or an override may raise.
    raise UserError(
      f'{_one_line(e)} (--help shows how to use this program, --helpfull every field '
      'of its config)'
    ) from e
  if rest:
    raise UserError(f'{rest[0]!r} is not a flag: write --name=value')
  if needs_workdir and not values.workdir:
    raise UserError("--workdir is missing: give the run's folder")
  if config is not None:
    config.lock()
  return config


def _one_line(error: Exception) -> str:
  """What a library says of a command line, without the traceback it may contain."""
  text = str(error.args[0] if isinstance(error, KeyError) else error)
  text = re.sub(r"\\(['\"])", r'\1', text.replace('\\n', '\n'))
  lines = [x.strip() for x in text.splitlines() if x.strip('\'"\\ ')]
  if any('Traceback' in x for x in lines):
    lines = [lines[0], lines[-1]]
  line = ' '.join(lines)
  # A message with quotes that was quoted once more.
  return line[1:-1] if re.match('[\'"]{2}', line) else line


def _quiet_logs():
  """Our log lines on stderr, without the chatter of the libraries."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # It tells of it at any level.
  logging.use_absl_handler()
  logging._warn_preinit_stderr = False  # We parse flags ourselves.
  logging.get_absl_handler().setFormatter(
    logging.logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S')
  )
  logging.set_verbosity(logging.INFO)
  for library in ('orbax', 'jax', 'tensorflow'):
    logging.logging.getLogger(library).setLevel('ERROR')
  only_ours = lambda record: 'jaxrobust' in record.pathname
  logging.get_absl_handler().addFilter(only_ours)
  # Once a write of a checkpoint has failed, tensorstore tells of all the others to an
  # event loop that orbax has closed, which prints a traceback for each.
  show = sys.unraisablehook
  sys.unraisablehook = lambda told: (
    None if str(told.exc_value) == 'Event loop is closed' else show(told)
  )
