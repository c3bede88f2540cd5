"""Our docstrings, which are plain text with Args and Returns, as reStructuredText."""

import re

_SECTIONS = ('Args:', 'Attributes:', 'Raises:', 'Returns:', 'Yields:')


def setup(app):
  """Comes before napoleon, which takes the sections."""
  app.connect('autodoc-process-docstring', _convert, priority=400)
  return {'parallel_read_safe': True}


def _convert(app, what, name, obj, options, lines):
  """Changes the lines of a docstring in place."""
  lines[:] = convert(lines)


def convert(lines: list[str]) -> list[str]:
  """Escapes what reStructuredText would obey, and keeps indented parts as they stand.

  Args:
    lines: of a docstring, without the indentation that all have.
  """
  found, section, block = [], False, False
  for line in lines:
    if line.strip() and not line.startswith(' '):
      if block:
        found.append('')
      section, block = line in _SECTIONS, False
    elif line.strip() and not section and not block:
      found += ['', '::', '']
      block = True
    found.append(line if block or line.startswith(('>>>', '...')) else _escaped(line))
  return found


def _escaped(line: str) -> str:
  """A line of prose, in which text between backticks is left alone."""
  parts = re.split('(`[^`]*`)', line)
  parts[::2] = [re.sub(r'([*|\\])|(?<=\w)(_)(?!\w)', r'\\\1\2', x) for x in parts[::2]]
  return ''.join(parts)
