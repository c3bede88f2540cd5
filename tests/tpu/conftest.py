"""tpu.sh meets a gcloud that plays states and a sleep that only records itself."""

import shutil
import types

import pytest

from launch import babysit, code, gcloud, tpu
from tests.helpers.gcloud_play import Play, make_repository
from tests.helpers.programs import ROOT


@pytest.fixture(scope='module')
def repository(tmp_path_factory):
  """One that no test changes."""
  if not shutil.which('git'):
    pytest.skip('git is not installed')
  root = tmp_path_factory.mktemp('repository') / 'root'
  make_repository(root)
  return root


@pytest.fixture
def call(repository, monkeypatch, capfd):
  """Runs a command line of tpu.py in this process."""
  monkeypatch.setattr(shutil, 'which', lambda _: '/usr/bin/gcloud')

  def run(*args, wait='30', root=repository, **answers):
    play = Play(answers)
    for module in (babysit, code, gcloud, tpu):
      monkeypatch.setattr(module, 'ROOT', root)
    monkeypatch.setattr(gcloud, 'execute', play.execute)
    monkeypatch.setattr(babysit, 'time', types.SimpleNamespace(sleep=play.sleep))
    monkeypatch.setenv('JAXROBUST_WAIT', wait)
    if root != ROOT:  # It has no package that could check flags.
      monkeypatch.setattr(code, 'check_words', lambda _: None)
    shutil.rmtree(root / 'runs', ignore_errors=True)
    play.code = tpu.main(list(args))
    play.out, play.err = capfd.readouterr()
    return play

  run.repository = repository
  return run


@pytest.fixture
def copy(repository, tmp_path):
  """A repository that the test may change."""
  root = tmp_path / 'root'
  shutil.copytree(repository, root)
  return root
