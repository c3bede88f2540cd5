"""Command lines: what a program takes, declared with types, parsed, and explained."""

import argparse
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from jaxrobust.config import analysis, classifier, fields, generator, registries
from jaxrobust.config import overrides as config_overrides
from jaxrobust.errors import UserError

PATH = os.path.expanduser

_WIDTH = 88


class Flag(NamedTuple):
  """A flag of one program.

  Attributes:
    name: without dashes. `main` gets it as a keyword argument; one that is a word of
      Python or a builtin has an underscore there, as `from_` and `list_`.
    help: sentences for the page.
    kind: str, bool, int, float, PATH, or a tuple of the words to choose from. A float
      may be written as a fraction, a path may begin with ~.
    default: what `main` gets where the flag is not given.
  """

  name: str
  help: str
  kind: Callable | tuple[str, ...] = str
  default: Any = ''

  @property
  def argument(self) -> str:
    """Its name as an argument of `main`."""
    return f'{self.name}_' if self.name in ('from', 'list') else self.name


class Program(NamedTuple):
  """A program: what it runs and what its command line takes.

  Attributes:
    name: the verb of the command line.
    main: takes a config, a workdir and, as keyword arguments, the flags.
    flags: its own.
    workdir: 'needed', or 'none' where it takes none.
    config: 'needed', 'optional' or 'none'. Without --config it is that of the workdir,
      if there is one; else `main` gets None where it is optional.
    example: of an experiment, for the message where it is missing.
    default_config: makes the config where --config is not given, from the workdir and
      the flags.
    alone: whether one process does all the work, on the CPU; in a run of several the
      others wait for it.
    passes_on: whether `main` gets, as `given`, the flags of configs and processes as
      text, to pass them on; it joins no other process then.
  """

  name: str
  main: Callable
  flags: tuple[Flag, ...] = ()
  workdir: str = 'needed'
  config: str = 'optional'
  example: str = 'digits'
  default_config: Callable[..., Any] | None = None
  alone: bool = False
  passes_on: bool = False


class Given(NamedTuple):
  """A command line, parsed.

  Attributes:
    config: the experiment, `NAME[:ARG]` or `FILE.py[:ARG]`; '' where not given.
    overrides: text under the dotted paths of a config's fields.
    workdir: '' where not given.
    coordinator, num_processes, process_id: of a run of several processes.
    flags: values of the program's own flags under the names of `main`'s arguments.
    register: files of the user's that are run for what they register.
  """

  config: str
  overrides: dict[str, str]
  workdir: str
  coordinator: str
  num_processes: int | None
  process_id: int | None
  flags: dict[str, Any]
  register: tuple[str, ...] = ()

  def config_flags(self) -> list[str]:
    """What gave the config, as flags, files by the whole path; none without one."""
    file, colon, arg = self.config.partition(':')
    path = os.path.abspath(os.path.expanduser(file))
    file = path if os.path.isfile(path) else file
    registered = [f'--register={os.path.abspath(x)}' for x in self.register]
    given = [*registered, f'--config={file}{colon}{arg}', *self._overrides()]
    return given if file else []

  def _overrides(self) -> list[str]:
    return [f'--config.{path}={text}' for path, text in self.overrides.items()]

  def to_pass_on(self) -> list[str]:
    """The files to register, the overrides and the flags of processes, as flags."""
    processes = {
      name: value
      for name in ('coordinator', 'num_processes', 'process_id')
      if (value := getattr(self, name)) not in (None, '')
    }
    return [
      *(f'--register={file}' for file in self.register),
      *self._overrides(),
      *(f'--{name}={value}' for name, value in processes.items()),
    ]


class Parser(argparse.ArgumentParser):
  """Reports a mistake in one line, with the nearest of the names that there are."""

  def error(self, message: str) -> NoReturn:
    """Raises UserError with what argparse says."""
    line = re.sub(r'^argument (--\w+)/-\w+', r'\1', message)
    wrong = re.search(r"(unrecognized arguments: |invalid choice: ')(-*[\w.-]+)", line)
    near = registries.did_you_mean(wrong[2], _names(self)) if wrong else ''
    raise UserError(f'{line}{near} (--help shows the flags)')


def _names(parser: argparse.ArgumentParser) -> list[str]:
  """All flags and choices of a parser, and of the commands in it."""
  found = []
  for action in parser._actions:
    found += [*action.option_strings, *(action.choices or ())]
    if isinstance(action.choices, dict):
      found += [name for inside in action.choices.values() for name in _names(inside)]
  return found


def parse(program: Program, arguments: Sequence[str]) -> Given:
  """Parses a command line; loads no config.

  Args:
    program: whose.
    arguments: without the program's name.

  Raises:
    UserError: for what is no flag, or a value that is none of its kind.
  """
  overrides, rest = _split_overrides(arguments)
  parser = Parser(add_help=False, allow_abbrev=False)
  add = lambda name, **options: parser.add_argument(
    f'--{name}', f'-{name}', dest=f'{name}', **options
  )
  for flag in program.flags:
    options: dict[str, Any] = {'default': argparse.SUPPRESS}
    if flag.kind is bool:
      options |= {'nargs': '?', 'const': True, 'type': _boolean}
      no: dict[str, Any] = {'dest': flag.name, 'action': 'store_false'}
      parser.add_argument(f'--no{flag.name}', default=argparse.SUPPRESS, **no)
    elif isinstance(flag.kind, tuple):
      options |= {'type': _choice(flag.kind)}
    else:
      kinds: dict[Any, Any] = {float: number, int: _integer}
      options |= {'type': kinds.get(flag.kind, flag.kind)}
    add(flag.name, **options)
  for name in ('workdir', 'config', 'coordinator'):
    add(name, default='')
  add('register', default=[], type=PATH, action='append')
  for name in ('num_processes', 'process_id'):
    add(name, default=None, type=_integer)
  try:
    values, others = parser.parse_known_args(rest)
  except argparse.ArgumentTypeError as e:
    raise UserError(str(e)) from e
  if others:
    raise UserError(_unknown(others[0], program))
  if program.workdir == 'none' and values.workdir:
    raise UserError(f'--workdir={values.workdir}: this program takes no workdir')
  if program.config == 'none' and (values.config or overrides):
    raise UserError('--config has no use here: this program takes no config')
  if program.config == 'none' and values.register:
    raise UserError('--register has no use here: this program takes no config')
  if program.workdir == 'needed' and not values.workdir:
    raise UserError("--workdir is missing: give the run's folder")
  return Given(
    values.config,
    overrides,
    os.path.expanduser(values.workdir),
    values.coordinator,
    values.num_processes,
    values.process_id,
    {f.argument: getattr(values, f.name, f.default) for f in program.flags},
    tuple(values.register),
  )


def _split_overrides(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
  """The overrides of a config, as text under their paths, and the other arguments."""
  overrides, rest, arguments = {}, [], list(arguments)
  while arguments:
    argument = arguments.pop(0)
    name, equals, value = argument.partition('=')
    bare = name.lstrip('-')
    if bare == name or not bare.startswith(('config.', 'noconfig.')):
      rest.append(argument)
      continue
    if bare.startswith('noconfig.'):
      value = 'false'
    elif not equals:  # `--config.a.b VALUE`, or a boolean field's `--config.a.b`.
      follows = arguments and not arguments[0].startswith('--')
      value = arguments.pop(0) if follows else 'true'
    overrides[bare.partition('config.')[2]] = value
  return overrides, rest


def _unknown(argument: str, program: Program) -> str:
  """What to say of an argument that is no flag."""
  if not argument.startswith('-'):
    return f'{argument!r} is not a flag: write --name=value'
  names = [f'--{flag.name}' for flag in program.flags]
  names += ['--register'] * (program.config != 'none')
  names += ['--workdir'] * (program.workdir != 'none')
  names += ['--config', '--config.FIELD'] * (program.config != 'none')
  given = argument.partition('=')[0]
  return (
    f'{given} is not a flag of this program: it takes {", ".join(names)}'
    f'{_nearest(given, names, program)}'
  )


def _nearest(given: str, names: list[str], program: Program) -> str:
  """The field that a flag stands for without --config, or the flag that is nearest."""
  path, (head, dot, rest) = given.lstrip('-'), given.partition('.')
  kinds = {'generate': generator.of(''), 'analyze': analysis.FIELDS}
  if program.config != 'none':
    known = kinds.get(program.name, classifier.FIELDS)
    hint = fields.nearest(known, path).replace('mean config.', 'mean --config.')
    if hint.endswith((f'--config.{path}?', f'.{path}?')):
      return hint
  known = [name.lstrip('-') for name in (names[:-1] if dot else names)]
  near = registries.did_you_mean(head.lstrip('-'), known)  # The dashes are no likeness.
  near = near.replace('did you mean ', 'did you mean --')
  return near.replace('--config?', f'--config{dot}{rest}?')


def _boolean(text: str) -> bool:
  try:
    return config_overrides.parse_boolean(text)
  except ValueError as e:
    raise argparse.ArgumentTypeError(f'{text!r}: {e}') from e


def number(text: str) -> float:
  """The type of a flag that is a number; it may be written as a fraction."""
  try:
    return config_overrides.parse_float(text)
  except ValueError as e:
    raise argparse.ArgumentTypeError(f'{text!r}: {e}') from e


def _integer(text: str) -> int:
  try:
    return int(text)
  except ValueError as e:
    raise argparse.ArgumentTypeError(f'{text!r}: use an integer') from e


def _choice(words: tuple[str, ...]):
  """The type of a flag with words to choose from."""

  def parse_choice(text: str) -> str:
    if text not in words:
      raise argparse.ArgumentTypeError(f'{text!r}: use one of {", ".join(words)}')
    return text

  return parse_choice


def page(program: Program) -> str:
  """The page that --help prints: what the program's module says, then its flags."""
  text = (inspect.getdoc(sys.modules[program.main.__module__]) or '').strip()
  flags = [(_synopsis(flag), flag.help) for flag in program.flags]
  if program.workdir == 'needed':
    flags.append(('--workdir=DIR', _WORKDIR_HELP))
  if program.config != 'none':
    flags += [
      ('--config=EXPERIMENT[:ARG]', _CONFIG_HELP),
      ('--config.a.b=VALUE', _OVERRIDE_HELP),
      ('--register=FILE.py', _REGISTER_HELP),
    ]
  flags.append(('--coordinator=HOST:PORT --num_processes=N --process_id=I', _POD_HELP))
  return f'{text}\n\nFlags:\n{_listing(flags)}\n\n{_CODES_HELP}'


def _synopsis(flag: Flag) -> str:
  """How a flag is written, with its default."""
  if flag.kind is bool:
    return f'--{flag.name}'
  if isinstance(flag.kind, tuple):
    return f'--{flag.name}={"|".join(flag.kind)}'
  return f'--{flag.name}={"PATH" if flag.kind is PATH else flag.name.upper()}'


def _listing(flags: list[tuple[str, str]], indent: int = 21) -> str:
  """Names on the left, sentences on the right."""
  lines = []
  for name, sentences in flags:
    text = textwrap.wrap(sentences, _WIDTH - indent)
    head = f'  {name}'
    if len(head) + 1 > indent:
      lines.append(head)
    else:
      lines.append(f'{head:<{indent}}{text.pop(0)}')
    lines += [' ' * indent + line for line in text]
  return '\n'.join(lines)


_WORKDIR_HELP = (
  "The run's folder, local or gs://. The same command again resumes the run or shows "
  'its result; another config in it is refused, with the difference shown.'
)
_CONFIG_HELP = (
  'An experiment by its name, such as digits, or by the path of its file, with its '
  'argument if it takes one. Without it the config of the workdir is used, if it has '
  'one.'
)
_OVERRIDE_HELP = (
  'Overrides a field of the config; --helpfull has the page of all fields. Numbers may '
  'be fractions, such as 8/255.'
)
_REGISTER_HELP = (
  'A Python file of yours that registers a loss, an attack, a generator, a model or a '
  'data set by name. It is run before anything else; no config is taken from it. The '
  'flag may be given several times.'
)
_POD_HELP = (
  'Join a run of N processes. On a TPU pod none of these is needed; --coordinator=auto '
  'does it under Slurm or Open MPI.'
)
_CODES_HELP = """\
Exit codes: 0 done; 42 preempted after a checkpoint, run it again; 1 error, reported in
one line; 128 or more a crash, except 141, which means that its output was closed."""
