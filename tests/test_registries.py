"""Registries: names without imports, things on demand, refusals."""

import json
import pathlib
import sys
import types

import pytest

from jaxrobust import config as configs
from jaxrobust import train
from jaxrobust.config import experiments, registries
from jaxrobust.errors import UserError
from jaxrobust.runs import cli, workdir

PACKAGE = str(pathlib.Path(registries.__file__).parent.parent)


@pytest.fixture
def room(monkeypatch):
  """A module that registers `inside` when it is imported."""
  found = registries.Registry('toy', {'inside': 'toys'})

  def register():
    module = types.ModuleType('toys')
    module.registry = found
    exec("@registry.register('inside')\ndef inside(): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, 'toys', module)

  return found, register


def test_names_are_known_before_their_module_is_imported(room):
  registry, register = room
  assert registry.names() == ('inside',) and 'inside' in registry
  register()
  assert registry.get('inside').__name__ == 'inside'


def test_own_things_are_added_by_a_decorator_or_a_call(room):
  registry, _ = room

  @registry.register('mine')
  def mine():
    pass

  assert registry.register('number', 3) == 3
  assert registry.names() == ('inside', 'mine', 'number')
  assert registry.get('mine') is mine and registry.get('number') == 3
  registry.register('number', 4)  # The same file runs again.
  assert registry.get('number') == 4


@pytest.mark.parametrize(
  'registry',
  [
    registries.LOSSES,
    registries.DIVERGENCES,
    registries.OBJECTIVES,
    registries.STEP_RULES,
    registries.INITIALIZATIONS,
    registries.ATTACKS,
    registries.GENERATORS,
  ],
  ids=lambda registry: registry.kind,
)
def test_what_the_package_names_it_brings(registry):
  """Where a config's choices stand, nothing else is known of them."""
  for name in registry:
    assert callable(registry[name]) or registry.kind == 'step rule'
  brought = {x for x in registry._items if registry._homes[x].startswith(PACKAGE)}
  assert brought == set(registry._builtin)


def test_names_of_the_package_and_of_other_files_are_taken(room):
  registry, register = room
  register()
  with pytest.raises(UserError, match="toy 'inside' is registered already, by toys"):
    registry.register('inside', 3)
  registry.register('mine', 3)
  other = {'registry': registry, '__name__': 'other', '__file__': 'other.py'}
  with pytest.raises(UserError, match="'mine' is registered already, by .*test_regis"):
    exec("registry.register('mine', 4)", other)
  assert registry.get('mine') == 3


def test_an_unknown_name_is_told_with_those_that_are():
  with pytest.raises(UserError) as e:
    registries.LOSSES.get('trade', 'config.loss.name')
  assert "config.loss.name = 'trade'" in str(e.value)
  assert 'adversarial, trades' in str(e.value)
  assert 'did you mean trades?' in str(e.value)


def test_the_names_of_the_package_are_those_that_its_modules_know():
  from jaxrobust.attacks import suites

  assert registries.ATTACKS.names() == tuple(suites.ATTACKS)
  for name in ('gaussian', 'ddpm', 'mixup'):
    assert registries.GENERATORS.get(name).__module__ == f'jaxrobust.generators.{name}'


@pytest.fixture
def own_loss(tmp_path, monkeypatch):
  """An experiment's file that registers its loss, and the workdir of its run.

  It has an objective of its own, too.
  """
  kinds = registries.LOSSES, registries.OBJECTIVES
  for kind in kinds:
    for name in ('_items', '_homes'):
      monkeypatch.setattr(kind, name, dict(getattr(kind, name)))
  file = tmp_path / 'mine.py'
  file.write_text(
    'from jaxrobust.config import experiments, registries\n'
    "registries.LOSSES.register('mine', print)\n"
    "registries.OBJECTIVES.register('mine', print)\n"
    'def get_config(arg=""):\n'
    "  c = experiments.load('digits').unlock()\n"
    "  c.loss.name = c.attack.objective = 'mine'\n"
    '  return c.lock()\n'
  )

  def main(config, folder):
    configs.check(config)
    workdir.claim(folder, config)

  command = [f'--workdir={tmp_path}/run', f'--config={file}', '--config.seed=3']
  program = cli.Program('train', main)
  assert cli._run(program, command) == 0
  for kind in kinds:
    forgotten = {k: x for k, x in kind._items.items() if k != 'mine'}
    monkeypatch.setattr(kind, '_items', forgotten)
  return program, file, tmp_path / 'run'


def test_what_was_trained_by_a_loss_of_ones_own_is_judged_without_its_file(own_loss):
  program, _, run = own_loss
  assert cli._run(program, [f'--workdir={run}']) == 0
  assert 'mine' not in registries.LOSSES


def test_a_name_that_the_file_of_a_run_registers_is_told_with_that_file(
  own_loss, capsys
):
  """Also after other commands; the file is not loaded unasked."""
  program, file, run = own_loss
  cli._run(program, [f'--workdir={run}'])
  file.write_text(f'open({str(run)!r} + "/loaded", "w")\n{file.read_text()}')
  capsys.readouterr()
  assert cli._run(train.PROGRAM, [f'--workdir={run}']) == cli.ERROR
  [line] = capsys.readouterr().err.splitlines()
  assert "config.loss.name = 'mine': use one of standard" in line
  assert line.endswith(f'add --register={file}')
  assert not (run / 'loaded').exists()
  # Of the package's own experiments a file has nothing to add.
  status = json.loads((run / 'status.json').read_text())
  digits = experiments.folder() / 'digits.py'
  for flags in ([f'--config={digits}'], [f'--config={file}\n'], []):
    (run / 'status.json').write_text(json.dumps(status | {'config': flags}))
    assert cli._run(train.PROGRAM, [f'--workdir={run}']) == cli.ERROR
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(
      'uat; one of your own needs --register=FILE.py, which registers it'
    )


def test_a_file_that_registers_something_else_is_not_asked_for_again(own_loss, capsys):
  _, file, run = own_loss
  given = [f'--register={file}', f'--workdir={run}-2', '--config=digits']
  assert cli._run(train.PROGRAM, [*given, '--config.loss.name=yours']) == cli.ERROR
  [line] = capsys.readouterr().err.splitlines()
  assert line.endswith(f'; {file} registers nothing of that name')
  given[0] = f'--register={file}x'
  assert cli._run(train.PROGRAM, given) == cli.ERROR
  [line] = capsys.readouterr().err.splitlines()
  assert f'{file}x: no such file' in line and 'digits' not in line


def test_an_epsilon_of_another_norm_is_pointed_out(own_loss, capsys, monkeypatch):
  said = []
  monkeypatch.setattr(
    cli.logging, 'warning', lambda text, *args: said.append(text % args)
  )
  program = cli.Program('train', lambda config, workdir: None)
  given = ['--config=digits', '--config.threat.norm=l2']
  for more in ([], ['--config.threat.epsilon=1']):
    cli._config(program, cli.flags.parse(program, ['--workdir=x', *given, *more]))
  [line] = said
  assert 'epsilon stays 0.2, which was meant for linf' in line


def test_files_are_run_for_what_they_register_alone(own_loss):
  """With another config; who judges a run does not change what it was made with."""
  _, file, run = own_loss
  made = json.loads((run / 'status.json').read_text())['config']
  more = run.parent / 'more.py'
  more.write_text(
    'from jaxrobust.config import registries\n'
    "registries.OBJECTIVES.register('more', print)\n"
  )

  def main(config, folder):
    configs.check(config)
    assert 'more' in registries.OBJECTIVES
    workdir.claim(folder, config)

  given = [f'--register={file}', f'--register={more}', '--config=digits']
  fields = ['loss.name=mine', 'attack.objective=mine', 'seed=3']
  given += [f'--config.{x}' for x in fields]
  for name, flags in (('evaluate', made), ('train', given)):
    assert cli._run(cli.Program(name, main), [f'--workdir={run}', *given]) == 0
    assert json.loads((run / 'status.json').read_text())['config'] == flags
  with pytest.raises(UserError, match='none.py: no such file'):
    cli.check(train.PROGRAM, ['--workdir=x', '--config=digits', '--register=none.py'])
