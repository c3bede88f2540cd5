"""README and docs: links resolve, commands parse, experiments exist, examples run."""

import ast
import importlib
import inspect
import pathlib
import re
import shlex
import sys

import numpy as np
import pytest

from jaxrobust.__main__ import _VERBS
from jaxrobust.config import experiments, fields, registries
from jaxrobust.errors import UserError
from jaxrobust.runs import flags
from launch import tpu

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(ROOT.glob('docs/*.md'))]
EXAMPLES = ROOT / 'docs' / 'extending'
MODULES = {module.removesuffix('.__main__'): verb for verb, module in _VERBS.items()}
LAUNCHERS = ('bash launch/worker.sh', 'bash launch/pod.sh', 'bash launch/tpu.sh')


def commands(text: str) -> list[str]:
  """The commands in blocks without a language and between backticks."""
  blocks = re.findall(r'^```\n(.*?)^```', text, re.M | re.S)
  lines = [x for block in blocks for x in block.replace('\\\n', ' ').splitlines()]
  prose = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
  lines += [' '.join(x.split()) for x in re.findall(r'`([^`]+)`', prose)]
  starts = ('jaxrobust ', 'python -m ', 'bash launch/')
  return [x.strip() for x in lines if x.strip().startswith(starts)]


def words_of(command: str) -> list[str]:
  """The words of a command, without comments, ellipses and what its output goes to."""
  words = shlex.split(command, comments=True)
  ends = [i for i, word in enumerate(words) if word in ('|', '>', ';')]
  words = words[: ends[0]] if ends else words
  return [word for word in words if word != '…']


ALL = [(page, x) for page in PAGES for x in commands(page.read_text())]


def program_of(words: list[str]) -> tuple[str, list[str]]:
  """The verb and the flags of a command of ours, by whichever way it is written."""
  if words[0] == 'jaxrobust':
    return words[1], words[2:]
  if words[:2] == ['python', '-m']:
    return MODULES.get(words[2], words[2]), words[3:]
  verbs = [i for i, word in enumerate(words) if word in _VERBS and i > 1]
  return (words[verbs[0]], words[verbs[0] + 1 :]) if verbs else ('', [])


def check(verb: str, arguments: list[str]):
  """Raises UserError or SystemExit unless the program takes these arguments."""
  if verb.startswith('--'):
    return
  module = importlib.import_module(_VERBS[verb])
  if hasattr(module, 'PROGRAM'):
    if arguments not in ([], ['--help']):
      given = flags.parse(module.PROGRAM, arguments)
      check_config(given.config, given.overrides)
  elif arguments != []:
    module._parser().parse_args(arguments)


def check_config(experiment: str, overrides: dict[str, str]):
  """Raises UserError unless it is one of ours with these fields, or no real name."""
  name = experiment.split(':')[0]
  if name in ('', '…', 'FILE.py', 'half.py') or (EXAMPLES / name).is_file():
    return
  known = fields.flatten(experiments.load(experiment))
  if unknown := set(overrides) - set(known):
    raise UserError(f'{experiment} has no fields {unknown}')


def test_the_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= 180


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_resolve(page):
  text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if target.startswith(('http://', 'https://')):
      continue
    file, _, anchor = target.partition('#')
    linked = (page.parent / file).resolve() if file else page
    assert linked.exists(), target
    if anchor:
      heads = re.findall(r'^#+ (.*)$', linked.read_text(), re.M)
      slug = lambda head: re.sub(r'[^\w -]', '', head.lower()).replace(' ', '-')
      assert anchor in map(slug, heads), target


def test_every_page_of_the_site_is_linked_from_the_readme():
  readme = (ROOT / 'README.md').read_text()
  missing = {f'docs/{page.name}' for page in PAGES[2:]} - set(
    re.findall(r'\((docs/\w+\.md)\)', readme)
  )
  # The first page is the site itself; these two are reached from others.
  assert missing == {'docs/index.md', 'docs/fields.md', 'docs/digits_tables.md'}


def test_there_are_commands_of_every_program():
  assert {program_of(words_of(x))[0] for _, x in ALL} >= set(_VERBS)


@pytest.mark.parametrize(
  ('page', 'command'), ALL, ids=[f'{page.stem}-{x[:50]}' for page, x in ALL]
)
def test_commands_are_taken(page, command):
  words = words_of(command)
  if command.startswith('python -m benchmarks'):
    source = (ROOT / f'{words[2].replace(".", "/")}.py').read_text()
    if 'rivals.parser(' in source:
      source += (ROOT / 'benchmarks/rivals.py').read_text()
    assert all(f"'{word}'" in source for word in words if word.startswith('--'))
    return
  if command.startswith('bash launch/'):
    assert (ROOT / words[1]).is_file()
    if not command.startswith(LAUNCHERS):
      return
    if 'tpu.sh' in command and len(words) > 3:
      tpu.parse(words[2:])
  verb, arguments = program_of(words)
  if verb:
    check(verb, arguments)


@pytest.mark.parametrize(
  'command',
  [
    'jaxrobust train --workdr=runs/x',
    'jaxrobust train --workdir=runs/x --config=digit',
    'jaxrobust train --workdir=runs/x --config=digits --config.data.batch=3',
    'jaxrobust data import --label=x a b',
    'python -m jaxrobust.report --workdir=runs --statu',
  ],
)
def test_commands_that_do_not_exist_are_found(command):
  with pytest.raises((UserError, SystemExit)):
    check(*program_of(words_of(command)))


def python_of(page: pathlib.Path) -> str:
  """The Python of a page: its blocks in turn, as a reader types them."""
  blocks = re.findall(r'^```python\n(.*?)^```', page.read_text(), re.M | re.S)
  return '\n'.join(blocks)


def names_imported(tree: ast.Module) -> dict[str, object]:
  """What a program imports of this package, by the names that it gives to it."""
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.split('.')[0] == 'jaxrobust':
          module = importlib.import_module(alias.name)
          found[alias.asname or 'jaxrobust'] = (
            module if alias.asname else importlib.import_module('jaxrobust')
          )
    elif isinstance(node, ast.ImportFrom) and node.module.startswith('jaxrobust'):
      for alias in node.names:
        try:
          thing = importlib.import_module(f'{node.module}.{alias.name}')
        except ModuleNotFoundError:
          thing = getattr(importlib.import_module(node.module), alias.name)
        found[alias.asname or alias.name] = thing
  return found


def resolved(node: ast.expr, names: dict[str, object]) -> object:
  """What dots after an imported name lead to; None where it is none of ours."""
  if isinstance(node, ast.Name):
    return names.get(node.id)
  if isinstance(node, ast.Attribute):
    inside = resolved(node.value, names)
    return None if inside is None else getattr(inside, node.attr)
  return None


def check_python(code: str) -> int:
  """Raises unless all that code takes from the package is there; counts its calls."""
  tree, calls = ast.parse(code), 0
  names = names_imported(tree)
  for node in ast.walk(tree):
    resolved(node, names)
    if isinstance(node, ast.Call) and callable(fn := resolved(node.func, names)):
      given = {x.arg: None for x in node.keywords if x.arg}
      inspect.signature(fn).bind(*[None] * len(node.args), **given)
      calls += 1
  return calls


WITH_PYTHON = [page for page in PAGES if python_of(page)]


@pytest.mark.parametrize('page', WITH_PYTHON, ids=lambda p: p.name)
def test_python_takes_what_is_there(page):
  assert check_python(python_of(page)) > 0


@pytest.mark.parametrize(
  'code',
  [
    'import jaxrobust\njaxrobust.lode(1)',
    'from jaxrobust import attacks\nattacks.run("apgd-ce")',
    'from jaxrobust.data import datasets\ndatasets.load("digits", "test", spilt=1)',
    'from jaxrobust.samples import sets',
  ],
)
def test_python_that_does_not_exist_is_found(code):
  with pytest.raises((AttributeError, TypeError)):
    check_python(code)


def test_the_experiment_of_the_docs():
  names = {}
  exec(python_of(ROOT / 'docs' / 'configs.md'), names)
  config = names['get_config']()
  assert config.variant == 'half-epsilon' and config.threat.epsilon == 4 / 255
  for _, overrides in names['sweep']():
    fields.override(config, overrides, 'sweep()')


def test_the_sample_set_of_the_docs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  arrays = {'images': np.zeros((20, 8, 8, 3), np.uint8), 'labels': np.arange(20) % 10}
  exec(python_of(ROOT / 'docs' / 'data.md'), arrays)
  assert len(arrays['sample_sets'].SampleSet.open('data/mine')) == 20


@pytest.fixture
def example(request, monkeypatch):
  """A file in docs/extending and its config, if it has one; forgotten afterwards."""
  for registry in vars(registries).values():
    if isinstance(registry, registries.Registry):
      monkeypatch.setattr(registry, '_items', dict(registry._items))
      monkeypatch.setattr(registry, '_homes', dict(registry._homes))
  file = str(EXAMPLES / f'{request.param}.py')
  module = experiments.load_file(file)
  return module, experiments.load(file) if hasattr(module, 'get_config') else None


@pytest.mark.parametrize('example', ['my_loss'], indirect=True)
def test_the_loss_of_the_docs(example):
  from jaxrobust import config as configs
  from jaxrobust.training import losses

  module, config = example
  configs.resolve(config)
  logits = np.float32([[0.0, 0.0], [0.0, 0.0]])
  passes = losses.Passes(logits, logits + np.float32([[0, 9]]), np.eye(2), None)
  found = module.half_adversarial(passes, config.loss)
  # Clean: log 2 of each; adversarial: 9 + of the first, about 0 of the second.
  expected = (np.log(2) + (9 + 2 * np.log1p(np.exp(-9))) / 2) / 2
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('example', ['my_model'], indirect=True)
def test_the_model_of_the_docs(example):
  import jax

  from jaxrobust import models
  from jaxrobust.config import dataset_info

  _, config = example
  model = models.from_config(config.model, dataset_info.of(config.dataset))
  variables = jax.jit(model.init)(jax.random.key(0))
  assert {x.rpartition('/')[2] for x in variables[0]} >= {'first', 'second', 'logits'}
  images = np.zeros((4, 8, 8, 1), np.float32)
  assert model.apply(*variables, images, False)[0].shape == (4, 10)
  assert model.features(*variables, images).shape == (4, 32)


@pytest.mark.parametrize('example', ['my_attack'], indirect=True)
def test_the_attack_of_the_docs(example):
  from jaxrobust import attacks

  logits_fn = lambda x: x.sum(axis=(1, 2))
  images = np.full((4, 2, 2, 2), 0.5, np.float32)
  found = attacks.run(
    'random-points:restarts=3', logits_fn, images, np.zeros(4, int), 'linf', 0.1
  )
  assert 0 < np.abs(found - images).max() <= 0.1 + 1e-6
  assert (logits_fn(found).argmax(axis=1) == 1).any()


@pytest.mark.parametrize('example', ['my_data_set'], indirect=True)
def test_the_data_set_of_the_docs(example):
  from jaxrobust import config as configs
  from jaxrobust.config import dataset_info

  _, config = example
  configs.resolve(config)
  assert dataset_info.of(config.dataset).train_size == 60_000
  assert configs.experiment_name(config) == 'fashion_mnist_linf_wrn-28-10_real'


def test_docstrings_become_restructured_text(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / 'docs'))
  import plain_docstrings

  text = (
    'Sums x* and |y|.\n\nAs in\n\n  b   two\n    c\n\n'
    'Args:\n  x: of *any* kind_, `a_*`.'
  )
  assert '\n'.join(plain_docstrings.convert(text.split('\n'))) == (
    'Sums x\\* and \\|y\\|.\n\nAs in\n\n\n::\n\n  b   two\n    c\n\n\n'
    'Args:\n  x: of \\*any\\* kind\\_, `a_*`.'
  )
  sys.modules.pop('plain_docstrings')
