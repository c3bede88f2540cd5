"""The rules of the layout, enforced by parsing imports and names."""

import ast
import graphlib
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
  # It stands in the room whose parts it calls.
  'data.__main__',
}
# The floors of the house, from the top. A room imports from the floors below its own
# only; rooms of one floor do not know each other.
FLOORS = (
  {'programs'},  # verbs, alone at the top of the package
  {'planning', 'reporting'},  # what runs would cost; what they came to
  {'analysis'},  # sample sets against real images
  {'generators'},  # where samples come from
  {'training'},  # the step, its losses, the loop
  {'models'},  # networks and their files
  {'attacks'},  # on any function from images to logits
  {'data'},  # real images, and the mix
  {'samples'},  # generated images on disk
  {'runs'},  # command line, workdir, checkpoints, metrics, processes
  {'distributed'},  # devices: pmap, shards, collectives
  {'config'},  # fields and what follows from them
  {'files'},  # files that are not trusted
  {'errors'},
)
FLOOR_OF = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
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


def room_of(module: str) -> str | None:
  """The room of a dotted name inside the package; None for the package itself."""
  if module in PROGRAMS:
    return 'programs'
  first = module.split('.')[0]
  return first if first in FLOOR_OF else None


def name_of(path: pathlib.Path) -> str:
  """Dotted, inside the package."""
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def public_functions(path: pathlib.Path) -> list[ast.FunctionDef]:
  """Those of a module and of its public classes, whose calls are public, too."""
  tree = ast.parse(path.read_text())
  classes = [x for x in tree.body if isinstance(x, ast.ClassDef) and x.name[0] != '_']
  return [
    node
    for scope in (tree, *classes)
    for node in scope.body
    if isinstance(node, ast.FunctionDef)
    and (node.name[0] != '_' or node.name in ('__init__', '__call__'))
  ]


def arguments(function: ast.FunctionDef) -> list[ast.arg]:
  """What callers give it."""
  own = function.args
  found = [*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg]
  return [x for x in found if x and x.arg not in ('self', 'cls')]


def test_every_module_is_in_a_room():
  assert [p for p in MODULES if not room_of(name_of(p)) and p.parent != PACKAGE] == []
  at_the_top = {name_of(p) for p in PACKAGE.glob('*.py')}
  assert at_the_top <= PROGRAMS | {'', '__main__', 'errors'}


def test_no_modules_import_each_other():
  """Not even inside functions."""
  known = {f'jaxrobust.{name_of(p)}'.rstrip('.') for p in MODULES}
  used = {}
  for path in MODULES:
    found = imports(path) & known
    # `from jaxrobust.models import card` does not use what `models` itself defines.
    rooms = {m for m in found if any(x.startswith(f'{m}.') for x in found)}
    used[f'jaxrobust.{name_of(path)}'.rstrip('.')] = found - rooms
  graphlib.TopologicalSorter(used).prepare()  # Raises CycleError, which names them.


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
class TestHouse:
  def test_imports_run_down(self, path):
    here = room_of(name_of(path))
    if here is None:
      return
    used = {m.removeprefix('jaxrobust.') for m in imports(path) if 'jaxrobust.' in m}
    rooms = {room_of(m) for m in used} - {None, here}
    up = {room for room in rooms if FLOOR_OF[room] <= FLOOR_OF[here]}
    assert not up, f'{here} imports {up}, which stand above it or beside it'

  def test_nothing_imports_experiments(self, path):
    used = imports(path)
    assert not {m for m in used if m.split('.')[0] == 'experiments'}

  def test_only_data_and_samples_import_tensorflow(self, path):
    used = {m.split('.')[0] for m in imports(path)}
    if path.parent.name not in ('data', 'samples'):
      assert not used & {'tensorflow', 'tensorflow_datasets'}

  def test_pytorch_is_optional(self, path):
    assert 'torch' not in {m.split('.')[0] for m in top_level_imports(path)}
    if path != PACKAGE / 'models' / 'pytorch.py':
      assert 'torch' not in {m.split('.')[0] for m in imports(path)}

  def test_only_distributed_names_devices(self, path):
    if path.parent != PACKAGE / 'distributed':
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
    if path != PACKAGE / 'runs' / 'cli.py':
      assert not {m for m in imports(path) if m in ('absl.flags', 'absl.app')}

  def test_attacks_know_no_model_and_no_dataset(self, path):
    if path.parent == PACKAGE / 'attacks':
      used = {m for m in imports(path) if m.startswith('jaxrobust')}
      assert not {m for m in used if '.models' in m or '.data' in m}

  def test_has_a_docstring(self, path):
    assert ast.get_docstring(ast.parse(path.read_text()))

  def test_what_is_public_is_annotated(self, path):
    """The type checker does not ask for it."""
    bare = [
      f'{function.name}, line {function.lineno}'
      for function in public_functions(path)
      if any(x.annotation is None for x in arguments(function))
      or (function.returns is None and function.name != '__init__')
    ]
    assert bare == []


def reached(*names: str) -> dict[str, set[str]]:
  """Imports of modules, and of all that these import as soon as they are."""
  found, queue = {}, list(names)
  while queue:
    name = queue.pop()
    path = PACKAGE / f'{name.replace(".", "/")}.py'
    path = path if path.exists() else PACKAGE / name.replace('.', '/') / '__init__.py'
    if name in found or not path.exists():
      continue
    found[name] = top_level_imports(path)
    own = {m for m in found[name] if m.startswith('jaxrobust.')}
    queue += [m.removeprefix('jaxrobust.') for m in own]
    queue += [name.rpartition('.')[0]] * ('.' in name)
  return found


def test_the_step_imports_without_tensorflow():
  found = reached('training.update', 'models', 'attacks.suites')
  for name, used in found.items():
    assert not {m for m in used if m.split('.')[0].startswith('tensorflow')}, name
  assert 'data.augment' in found


def test_generators_reach_no_attack():
  modules = [f'generators.{p.stem}' for p in (PACKAGE / 'generators').glob('*.py')]
  found = reached(*modules)
  assert not {m for m in found if m.startswith('attacks')}
  assert 'training.loop' in found


def test_experiments_import_the_fields_alone():
  for path in (ROOT / 'experiments').glob('*.py'):
    assert all(m.startswith('jaxrobust.config') for m in imports(path)), path


def house_of(module: str) -> str:
  """The folder or program at the top of the repository that a dotted name lies in."""
  parts = module.split('.')
  return '.'.join(parts[: 2 if parts[0] == PACKAGE.name else 1])


def test_few_rooms_know_each_other():
  """A top-level module or a folder is a room; an arrow leads to one that it imports."""
  folders = [ROOT / name for name in ('benchmarks', 'experiments', 'launch')]
  paths = [*MODULES, *(path for folder in folders for path in folder.glob('*.py'))]
  modules = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    for path in paths
  }
  arrows = set()
  for path in paths:
    here = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    used = imports(path) & modules
    # As above: a package is not used by who names a module in it.
    used -= {m for m in used if any(x.startswith(f'{m}.') for x in used)}
    arrows |= {(house_of(here), house_of(there)) for there in used}
  arrows = {(here, there) for here, there in arrows if here != there}
  assert len({room for arrow in arrows for room in arrow}) <= 30
  assert 100 < len(arrows) <= 125, sorted(arrows)
  below = {here: {b for a, b in arrows if a == here} for here, _ in arrows}
  graphlib.TopologicalSorter(below).prepare()  # No circle, of which one runs up.


TESTS = sorted((ROOT / 'tests').rglob('*.py'))
# Functions of numpy and of the standard library that draw from a state of all.
DRAWS = {
  *('rand', 'randn', 'randint', 'randrange', 'random', 'random_sample', 'normal'),
  *('uniform', 'choice', 'choices', 'sample', 'permutation', 'shuffle', 'getrandbits'),
}

SEEDED = ('default_rng', 'RandomState', 'Random')


def test_tests_import_helpers_and_not_each_other():
  for path in TESTS:
    used = {m for m in imports(path) if m.startswith('tests.')}
    assert not {m for m in used if not m.startswith('tests.helpers')}, path


def test_tests_draw_from_seeds():
  for path in TESTS:
    for node in ast.walk(ast.parse(path.read_text())):
      if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        continue
      called, where = ast.unparse(node.func), f'{path}, line {node.lineno}'
      owner, _, name = called.rpartition('.')
      assert not (owner in ('random', 'np.random') and name in DRAWS), where
      assert node.args or node.keywords or name not in SEEDED, where
