"""How Sphinx builds this site; `bash launch/docs.sh` runs it."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jaxrobust  # noqa: E402

project = 'jaxrobust'
author = 'the jaxrobust authors'
release = jaxrobust.__version__
extensions = [
  'myst_parser',
  'sphinx.ext.apidoc',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'from_code',
  'plain_docstrings',
]
exclude_patterns = ['api/modules.rst', 'build']
html_theme = 'furo'
html_title = f'jaxrobust {release}'
html_copy_source = False
html_theme_options = {'top_of_page_buttons': []}

myst_heading_anchors = 3
myst_enable_extensions = ['colon_fence']

# A page for each room of the package. What the programs at its top do is on the page
# of the programs.
PACKAGE = HERE.parent / 'jaxrobust'
apidoc_modules = [
  {
    'path': '../jaxrobust',
    'destination': 'api',
    'exclude_patterns': [
      f'../{path.relative_to(HERE.parent)}'
      for path in [*PACKAGE.glob('*.py'), *PACKAGE.rglob('__main__.py')]
      if path.stem not in ('__init__', 'errors')
    ],
    'module_first': True,
  }
]
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = 'literal'
highlight_language = 'text'
# Attributes of one name in several classes, which a docstring names without theirs.
suppress_warnings = ['ref.python']
