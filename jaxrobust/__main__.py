"""The command `jaxrobust VERB …`, which runs the program `jaxrobust.VERB`."""

import ast
import difflib
import importlib
import pathlib
import sys

from jaxrobust.runs.version import __version__

# In the order in which they are met.
_VERBS = {
  'data': 'jaxrobust.data.__main__',
  'download': 'jaxrobust.models.download',
  'train': 'jaxrobust.train',
  'evaluate': 'jaxrobust.evaluate',
  'generate': 'jaxrobust.generate',
  'analyze': 'jaxrobust.analyze',
  'convert': 'jaxrobust.convert',
  'sweep': 'jaxrobust.sweep',
  'report': 'jaxrobust.report',
  'plan': 'jaxrobust.plan',
}


def main() -> None:
  """Runs the program that the first argument names, and exits with its code."""
  verb, *arguments = sys.argv[1:] or ['--help']
  if verb in ('--help', '-h', 'help'):
    print(_map())
    sys.exit(0)
  if verb == '--version':
    print(__version__)
    sys.exit(0)
  if verb not in _VERBS:
    near = difflib.get_close_matches(verb, _VERBS, n=1)
    hint = f'did you mean {near[0]}?' if near else f'use one of {", ".join(_VERBS)}'
    print(f'error: {verb!r} is not a program of jaxrobust: {hint}', file=sys.stderr)
    sys.exit(1)
  module = importlib.import_module(_VERBS[verb])
  if hasattr(module, 'PROGRAM'):
    from jaxrobust.runs import cli

    cli.run(module.PROGRAM, arguments)
  from jaxrobust.runs import exits

  exits.exit_with(lambda: module.main(arguments))


def _map() -> str:
  """The programs, a line each, from the first lines of their modules."""
  lines = ['Robust training with generated data. Usage: jaxrobust VERB …', '']
  package = pathlib.Path(__file__).parent
  for verb, module in _VERBS.items():
    file = package.joinpath(*module.split('.')[1:]).with_suffix('.py')
    first = (ast.get_docstring(ast.parse(file.read_text())) or '').partition('\n')[0]
    lines.append(f'  {verb:<10}{first.partition(": `")[0].rstrip(".")}')
  lines += [
    '',
    'jaxrobust VERB --help is a page about one of them. First steps:',
    '  jaxrobust train --workdir=runs/digits --config=digits',
    '  jaxrobust evaluate --workdir=runs/digits --suite=autoattack',
    '  jaxrobust report --workdir=runs',
  ]
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
