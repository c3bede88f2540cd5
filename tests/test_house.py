"""The rules of the layout, enforced by parsing imports and names."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'jaxrobust'
PROGRAMS = {
  'train',
  'evaluate',
  'generate',
  'analyze',
  'report',
  'sweep',
  'convert',
  'plan',
}
MODULES = sorted(PACKAGE.rglob('*.py'))


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names of all modules that a file imports, wherever it does."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {node.module} | {f'{node.module}.{a.name}' for a in node.names}
  return found


def top_level_imports(path: pathlib.Path) -> set[str]:
  """Those imported as soon as the module is."""
  tree = ast.parse(path.read_text())
  tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
  found = set()
  for node in tree.body:
    names = [a.name for a in node.names]
    if isinstance(node, ast.Import):
      found |= set(names)
    elif node.module:
      found |= {node.module} | {f'{node.module}.{name}' for name in names}
  return found


def names(path: pathlib.Path) -> set[str]:
  """Every variable and attribute that a file names, but for those of `parallel`."""
  nodes = list(ast.walk(ast.parse(path.read_text())))
  return {n.id for n in nodes if isinstance(n, ast.Name)} | {
    n.attr
    for n in nodes
    if isinstance(n, ast.Attribute)
    and not (isinstance(n.value, ast.Name) and n.value.id == 'parallel')
  }


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
class TestHouse:
  def test_parts_import_no_program_and_nothing_imports_experiments(self, path):
    used = imports(path)
    assert not {m for m in used if m.split('.')[0] == 'experiments'}
    programs = {m for m in used for p in PROGRAMS if m == f'jaxrobust.{p}'}
    assert not programs, 'programs import parts, never each other'

  def test_only_data_imports_tensorflow(self, path):
    used = {m.split('.')[0] for m in imports(path)}
    if path.parent != PACKAGE / 'data':
      assert not used & {'tensorflow', 'tensorflow_datasets'}

  def test_pytorch_is_optional(self, path):
    assert 'torch' not in {m.split('.')[0] for m in top_level_imports(path)}
    if path != PACKAGE / 'models' / 'pytorch.py':
      assert 'torch' not in {m.split('.')[0] for m in imports(path)}

  def test_only_parallel_names_devices(self, path):
    if path != PACKAGE / 'parallel.py':
      forbidden = {
        'pmap',
        'pmean',
        'psum',
        'axis_index',
        'process_index',
        'process_count',
        'device_count',
        'local_devices',
        'local_device_count',
        'shard_map',
        'axis_name',
      }
      assert not names(path) & forbidden

  def test_only_programs_read_flags(self, path):
    if path != PACKAGE / 'cli.py':
      assert not {m for m in imports(path) if m in ('absl.flags', 'absl.app')}

  def test_attacks_know_no_model_and_no_dataset(self, path):
    if path.parent == PACKAGE / 'attacks':
      used = {m for m in imports(path) if m.startswith('jaxrobust')}
      assert not {m for m in used if '.models' in m or '.data' in m}

  def test_is_not_too_long(self, path):
    assert len(path.read_text().splitlines()) <= 400

  def test_has_a_docstring(self, path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_step_imports_without_tensorflow():
  """Follows the imports of the step, the models and the attacks."""
  seen, queue = set(), ['update', 'losses', 'models', 'attacks.suites', 'optimizer']
  while queue:
    name = queue.pop()
    path = PACKAGE / f'{name.replace(".", "/")}.py'
    path = path if path.exists() else PACKAGE / name.replace('.', '/') / '__init__.py'
    if name in seen or not path.exists():
      continue
    seen.add(name)
    used = top_level_imports(path)
    assert not {m for m in used if m.split('.')[0].startswith('tensorflow')}, name
    queue += [m.removeprefix('jaxrobust.') for m in used if m.startswith('jaxrobust.')]
  assert 'data.augment' in seen


def test_experiments_import_no_jax():
  for path in (ROOT / 'experiments').glob('*.py'):
    used = {m.split('.')[0] for m in imports(path)}
    assert used <= {'re', 'typing', 'ml_collections', 'experiments'}, path
