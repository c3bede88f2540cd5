"""Runs programs: command line, exit code, status, log lines."""

import contextlib
import os
import pathlib
import shlex
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from typing import NoReturn

from absl import logging

from jaxrobust import config as configs
from jaxrobust.config import experiments, overrides
from jaxrobust.errors import PreemptedError, UnknownNameError, UserError, one_line
from jaxrobust.runs import exits, flags
from jaxrobust.runs.exits import CRASHED, DONE, ERROR, INTERRUPTED, PREEMPTED, UNREAD
from jaxrobust.runs.flags import PATH, Flag, Program

__all__ = ['PATH', 'Flag', 'Program', 'run']

_PACKAGE = f'{pathlib.Path(__file__).parents[1]}{os.sep}'


def run(program: Program, arguments: Sequence[str] | None = None) -> NoReturn:
  """Parses the command line, runs the program and exits with its code.

  Args:
    program: what to run.
    arguments: without the program's name; None for those of this process.
  """
  arguments = sys.argv[1:] if arguments is None else list(arguments)
  if {'--help', '-h', '-help', '--helpfull'} & set(arguments):
    with contextlib.suppress(BrokenPipeError):
      print(flags.page(program))
      if '--helpfull' in arguments:
        print(f'\n{configs.describe()}', end='')
      sys.stdout.flush()
    sys.exit(DONE)
  exits.exit_with(lambda: _run(program, arguments))


def check(program: Program, arguments: Sequence[str]) -> None:
  """Checks a command line before it is run elsewhere: reads no workdir.

  Args:
    program: that is to run.
    arguments: without its name.

  Raises:
    UserError: for what is no flag, no experiment or no field of it.
  """
  given = flags.parse(program, arguments)
  if given.config:
    _config(program, given)


def _run(program: Program, arguments: list[str]) -> int:
  """The exit code of a program, after all that it does."""
  _quiet_logs()
  try:
    _refuse_other_encodings(arguments)
    given = flags.parse(program, arguments)
    config = _config(program, given)
  except UserError as e:
    exits.say(f'error: {e}')
    return ERROR
  # Only now: a mistake on the command line should not wait for jax.
  from jaxrobust.runs import process_group
  from jaxrobust.runs import workdir as workdirs

  _keep_compiled(given.workdir)
  more = {'given': given} if program.passes_on else {}
  code, state, line = DONE, 'done', ''
  try:
    if not program.passes_on:  # The runs that it starts join the others themselves.
      process_group.join(
        given.coordinator, given.num_processes, given.process_id, program.alone
      )
    command = {'program': program.name, 'workdir': given.workdir, **given.flags}
    process_group.start(command, config)
    workdirs.begin([program.name, *arguments], given.config_flags())
    if not (program.alone and process_group.leave_to_first()):
      code = program.main(config, given.workdir, **given.flags, **more) or DONE
  except PreemptedError as e:
    logging.info('%s', e)
    code, state, line = PREEMPTED, 'preempted', str(e)
  except KeyboardInterrupt:  # One process alone saves first, several do not.
    process_group.take_last_word()
    code, state, line = INTERRUPTED, 'preempted', 'interrupted from the keyboard'
  except Exception as e:
    process_group.take_last_word()
    code, line = _code_and_line(e, given)
    state = 'failed'
  workdirs.write_status(state, line)
  if code in (DONE, PREEMPTED):
    process_group.finish()
  else:  # Others may wait for this process, which will not come.
    process_group.end(code, state, line)
  return code


def _code_and_line(e: Exception, given: flags.Given) -> tuple[int, str]:
  """Reports what ends a program: its exit code, and the line for its status."""
  from jaxrobust.distributed import parallel
  from jaxrobust.runs import process_group
  from jaxrobust.runs import workdir as workdirs

  if isinstance(e, BrokenPipeError) and exits.is_unread():
    return UNREAD, 'its output was closed'
  if gone := workdirs.removed(e):
    workdirs.clear_remains()
  for code, known in (
    (ERROR, gone),
    (ERROR, f'{e}{_hint(e, given)}' if isinstance(e, UserError) else None),
    (ERROR, workdirs.disk_error(e, given.workdir)),
    (ERROR, parallel.memory_error(e)),
    (CRASHED, process_group.lost(e)),
  ):
    if known:
      exits.say(f'error: {known}')
      return code, str(known)
  exits.say(traceback.format_exc().rstrip())
  if place := _own_place(e):  # It would come again, however often it is started.
    line = f'{place}: {type(e).__name__}: {one_line(e)}'
    exits.say(f'error: {line}')
    return ERROR, line
  # A fault of the machine or of this code: start it again.
  return CRASHED, f'{type(e).__name__}: {e}'


def _own_place(e: Exception) -> str:
  """The line of the user's own code that an error came through last, '' for none.

  Such as a loss or a network that an experiment's file registers. What a device, a disk
  or a connection raises on the way is no fault of that code.
  """
  import jax

  if isinstance(e, OSError | MemoryError | jax.errors.JaxRuntimeError):
    return ''
  others = (_PACKAGE, f'{sysconfig.get_path("stdlib")}{os.sep}', '<')
  for frame in reversed(traceback.extract_tb(e.__traceback__)):
    installed = {'site-packages', 'dist-packages'} & set(frame.filename.split(os.sep))
    if not frame.filename.startswith(others) and not installed:
      return f'{frame.filename}:{frame.lineno}'
  return ''


def _hint(e: UserError, given: flags.Given) -> str:
  """What to add where a name is unknown, which a file of the user's may register.

  A file of the run's own is not loaded unasked: a workdir may come from somebody else.
  """
  from jaxrobust.runs import workdir as workdirs

  if not isinstance(e, UnknownNameError):
    return ''
  known = workdirs.config_flags(given.workdir) if given.workdir else []
  files = []
  for flag, _, value in (x.partition('=') for x in known):
    path = value.split(':')[0] if flag == '--config' else value
    own = path.endswith('.py') and not path.startswith(str(experiments.folder()))
    if flag in ('--register', '--config') and own:
      files.append(f'--register={path}')
  if given.register:
    return f'; {", ".join(given.register)} registers nothing of that name'
  if given.config or not files:
    return '; one of your own needs --register=FILE.py, which registers it'
  return (
    f'; {given.workdir} was made with a file that may register that name, which is not '
    f'loaded unasked: add {shlex.join(files)}'
  )


def _refuse_other_encodings(arguments: list[str]):
  """Raises UserError for an argument, such as a folder's name, that is not UTF-8."""
  for argument in arguments:
    try:
      argument.encode()
    except UnicodeEncodeError as e:
      raise UserError(f'{argument!a} is not UTF-8: rename the file or folder') from e


def _config(program: Program, given: flags.Given):
  """The config with its overrides, or None where there is none.

  Raises:
    UserError: for an experiment that is absent or fails, or what is no field of it.
  """
  config = None
  for file in given.register:
    if not os.path.isfile(file):
      raise UserError(
        f'--register={file}: no such file; give the Python file that registers your '
        'loss, attack, generator, model or data set'
      )
    experiments.load_file(file)
  if given.config:
    config = experiments.load(given.config)
  elif program.default_config:
    config = program.default_config(given.workdir, **given.flags)
  elif program.config != 'none' and os.path.exists(f'{given.workdir}/config.json'):
    from jaxrobust.runs import workdir as workdirs

    config = workdirs.read_config(given.workdir)
  if config is not None:
    before = config.get('threat', {}).get('norm')
    overrides.apply(config, given.overrides)
    is_kept = before and 'threat.epsilon' not in given.overrides
    if is_kept and before != config.threat.norm and not program.passes_on:
      logging.warning(
        'config.threat.epsilon stays %.4g, which was meant for %s: give '
        '--config.threat.epsilon with --config.threat.norm=%s',
        config.threat.epsilon,
        before,
        config.threat.norm,
      )
    ignored = configs.ignored(config)
    for path, text in given.overrides.items():
      if path in ignored and not program.passes_on:  # A sweep's points may use it.
        logging.warning(
          '--config.%s=%s has no effect: without config.data.samples all images are '
          'real',
          path,
          text,
        )
    return config.lock()
  if program.config == 'needed':
    raise UserError(
      f'--config is missing: give an experiment, such as --config={program.example}'
    )
  if given.overrides and not program.passes_on:
    raise UserError(
      f'--config.{next(iter(given.overrides))} overrides a field of no config: give '
      '--config, too'
    )
  return None


def _keep_compiled(workdir: str):
  """Keeps compiled programs, so that the second of two equal runs starts at once.

  They are in $JAX_COMPILATION_CACHE_DIR if it is set; beside a workdir in a bucket,
  where a machine made anew finds them; or else in this machine's cache.
  """
  import jax

  from jaxrobust.runs import workdir as workdirs

  if jax.config.jax_compilation_cache_dir:
    return
  place = workdirs.cache_folder('compiled')
  if '://' in workdir:
    folder = workdir.rstrip('/')
    beside = folder.rpartition('/')[0]
    place = (
      f'{beside if "://" in beside else folder}/compiled'  # It may be a whole bucket.
    )
    # XLA itself, which tunes GPUs' kernels, would write below a local folder `gs:`.
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
  jax.config.update('jax_compilation_cache_dir', str(place))


def _is_ours(record: logging.logging.LogRecord) -> bool:
  """Whether a log line is of this package; others may lie in a folder of its name."""
  return record.pathname.startswith(_PACKAGE)


def _quiet_logs():
  """Our log lines on stderr, without the chatter of the libraries."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # It says so at any level.
  logging.use_absl_handler()
  logging._warn_preinit_stderr = False  # We parse flags ourselves.
  logging.get_absl_handler().setFormatter(
    logging.logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S')
  )
  logging.set_verbosity(logging.INFO)
  for library in ('orbax', 'jax', 'tensorflow'):
    logging.logging.getLogger(library).setLevel('ERROR')
  logging.get_absl_handler().addFilter(_is_ours)
  # Once a write of a checkpoint has failed, tensorstore reports all the others to an
  # event loop that orbax has closed, which prints a traceback for each.
  show = sys.unraisablehook
  sys.unraisablehook = lambda raised: (
    None if str(raised.exc_value) == 'Event loop is closed' else show(raised)
  )
