"""Registries: names without imports, things on demand, refusals."""

import sys
import types

import pytest

from jaxrobust.config import registries
from jaxrobust.errors import UserError


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
