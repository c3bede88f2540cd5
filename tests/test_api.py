"""What `import jaxrobust` offers: lazily, and what it loads."""

import dataclasses
import importlib.util
import json
import pathlib
import pkgutil
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import jaxrobust
from jaxrobust import config as configs
from jaxrobust.config import experiments
from jaxrobust.errors import UserError
from jaxrobust.models import card as cards
from jaxrobust.models import parameter_files, pytorch, zoo
from tests.helpers.random_variables import random_variables

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = 'experiments/digits.py:wrn-10-2'
needs_torch = pytest.mark.skipif(
  importlib.util.find_spec('torch') is None,
  reason="PyTorch is not installed (pip install '.[torch]')",
)


@pytest.fixture(scope='module')
def variables():
  return random_variables('wrn-10-2', 10, 1)


@pytest.fixture(scope='module')
def classifier(variables, tmp_path_factory):
  path = epath.Path(tmp_path_factory.mktemp('api') / 'x.npy')
  parameter_files.export_npy(path, *variables)
  return jaxrobust.load(path, DIGITS)


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(1).integers(0, 256, (6, 8, 8, 1), np.uint8)


def test_importing_it_imports_nothing_heavy():
  code = (
    'import sys, jaxrobust; dir(jaxrobust); jaxrobust.__version__; '
    'print(sorted(m for m in sys.modules if "." not in m))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True
  )
  assert done.returncode == 0, done.stderr
  assert "'jaxrobust'" in done.stdout
  for heavy in ('jax', 'numpy', 'tensorflow', 'haiku', 'matplotlib', 'torch', 'absl'):
    assert f"'{heavy}'" not in done.stdout


def test_every_public_name_is_there_and_hides_no_module():
  modules = {m.name for m in pkgutil.iter_modules(jaxrobust.__path__)}
  assert set(jaxrobust.__all__) == set(jaxrobust._PUBLIC)
  assert set(jaxrobust.__all__) <= set(dir(jaxrobust))
  assert not set(jaxrobust.__all__) & modules
  for name in jaxrobust.__all__:
    assert getattr(jaxrobust, name).__doc__, name
  assert jaxrobust.attacks.__name__ == 'jaxrobust.attacks'
  with pytest.raises(AttributeError, match='none'):
    _ = jaxrobust.none


def test_a_classifier_gives_the_logits_of_its_network(classifier, variables, images):
  model = classifier.card.build()
  pixels = images.astype(np.float32) / 255
  wanted = model.apply(*variables, pixels, False)[0]
  # One program may sum in another order than the other.
  for given in (images, pixels, jnp.asarray(pixels, jnp.float16).astype(jnp.float32)):
    np.testing.assert_allclose(classifier(given), wanted, rtol=0, atol=2e-3)
  np.testing.assert_allclose(classifier(images), wanted, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(classifier.predict(images), wanted.argmax(axis=1))
  features = np.asarray(classifier.features(images))
  assert features.shape == (6, 128)
  logits = variables[0]['wide_res_net/~/logits']
  np.testing.assert_allclose(features @ logits['w'] + logits['b'], wanted, atol=1e-4)


def test_it_works_inside_jit_and_grad_and_is_compiled_once(
  classifier, variables, images
):
  pixels = jnp.asarray(images, jnp.float32) / 255
  gradient = jax.jit(jax.grad(lambda x: classifier(x)[:, 3].sum()))(pixels)
  assert gradient.shape == pixels.shape
  # Towards the gradient the logit grows.
  step = 1e-3 * jnp.sign(gradient)
  assert (classifier(pixels + step)[:, 3] > classifier(pixels)[:, 3]).all()
  compiled = classifier._logits._cache_size()
  classifier(images)  # uint8 becomes float before.
  jaxrobust.Classifier(classifier.card, *variables)(pixels)  # of the same kind
  assert classifier._logits._cache_size() == compiled
  # The parameters are no constants of programs that it is part of.
  closed = jax.make_jaxpr(classifier)(pixels)
  assert len(closed.consts) == len(jax.tree.leaves(variables))


def test_it_is_judged_as_any_function_is(classifier, images):
  labels = classifier.predict(images)
  outcome = jaxrobust.evaluate_robustness(
    classifier, images, labels, 'linf', 0.3, 'apgd-ce:num_steps=3', progress=None
  )
  assert outcome.clean.all()
  assert not outcome.robust.all()


def test_images_that_it_does_not_take(classifier, images):
  wide, labels = np.zeros((6, 8, 8, 3), np.uint8), np.zeros(6, int)
  with pytest.raises(UserError, match=r'shape \[B, 8, 8, 3\].*\[B, 8, 8, 1\]'):
    jaxrobust.evaluate_robustness(classifier, wide, labels, 'linf', 0.3, 'clean')
  with pytest.raises(UserError, match=r'\[6, 8, 8, 3\].*\[B, 8, 8, 1\]'):
    classifier(np.repeat(images, 3, axis=-1))
  with pytest.raises(UserError, match=r'\[8, 8, 1\]'):
    classifier(images[0])
  with pytest.raises(UserError, match='int32.*uint8, or float'):
    classifier(images.astype(np.int32))


def make_run(folder, variables, results=()):
  """A workdir of a finished run."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(configs.to_json(experiments.load(DIGITS)))
  parameter_files.export_npy(folder / 'checkpoint.npy', *variables)
  (folder / 'results.json').write_text(json.dumps(list(results)))
  return folder


def test_load_from_a_run_and_a_file_and_by_name(
  classifier, variables, images, tmp_path, monkeypatch
):
  wanted = classifier(images)
  same = lambda found: np.testing.assert_array_equal(found(images), wanted)
  run = make_run(tmp_path / 'run', variables)
  loaded = jaxrobust.load(run)
  same(loaded)
  assert loaded.card.name == 'digits_linf_wrn-10-2_real'
  monkeypatch.setenv('HOME', str(tmp_path))
  same(jaxrobust.load('~/run'))
  # A file with its card inside, one with its card beside, one with neither.
  text = {'card': loaded.card.to_json()}
  for file in ('a.safetensors', 'b.npy'):
    parameter_files.export(epath.Path(tmp_path / file), *variables, text)
  (tmp_path / 'b.json').write_text(loaded.card.to_json())
  same(jaxrobust.load(tmp_path / 'a.safetensors'))
  same(jaxrobust.load(str(tmp_path / 'b.npy')))
  same(jaxrobust.load(run / 'checkpoint.npy', experiments.load(DIGITS)))
  # A released name.
  (tmp_path / 'models').mkdir()
  monkeypatch.setitem(zoo.ENTRIES, 'released', loaded.card)
  monkeypatch.setenv('JAXROBUST_MODELS', str(tmp_path / 'models'))
  with pytest.raises(UserError, match='put released.npy there'):
    jaxrobust.load('released')
  parameter_files.export_npy(
    epath.Path(tmp_path / 'models' / 'released.npy'), *variables
  )
  same(jaxrobust.load('released'))


def test_what_cannot_be_loaded(tmp_path, variables):
  (tmp_path / 'there.npy').touch()
  with pytest.raises(UserError, match='there.npy: nothing says what its network is'):
    jaxrobust.load(tmp_path / 'there.npy')
  with pytest.raises(UserError, match='x.npy: it does not exist'):
    jaxrobust.load(tmp_path / 'x.npy')
  with pytest.raises(UserError, match='no checkpoint at'):
    jaxrobust.load(tmp_path / 'x.npy', DIGITS)
  with pytest.raises(UserError, match='no such file|no experiment'):
    jaxrobust.load(tmp_path / 'x.npy', 'nothing.py')


def test_it_prints_what_it_is_and_was_judged_to_be(variables):
  protocol = {'suite': 'autoattack', 'num_images': 797}
  accuracies = (
    {'protocol': protocol, 'clean_accuracy': 0.9, 'robust_accuracy': 0.5},
    {
      'protocol': protocol | {'suite': '<b>'},
      'clean_accuracy': 0.8,
      'robust_accuracy': 0.25,
      'published': 'A paper',
    },
  )
  card = cards.Card(
    name='mine',
    dataset='digits',
    norm='linf',
    epsilon=0.2,
    model={
      'name': 'wrn-10-2',
      'activation': 'swish',
      'mean': (0.5,),
      'std': (0.5,),
      'padding': 0,
    },
    accuracies=accuracies,
  )
  unattacked = {'protocol': {'suite': 'clean'}, 'attacks': []}
  more = (
    *accuracies,
    unattacked | {'clean_accuracy': 0.7, 'robust_accuracy': 0.7},
  )
  card = dataclasses.replace(card, accuracies=more)
  classifier = jaxrobust.Classifier(card, *variables)
  assert repr(classifier).splitlines() == [
    'mine: wrn-10-2 of digits, linf 0.2',
    '  clean 90.00%, robust 50.00% by autoattack',
    '  clean 80.00%, robust 25.00% by <b> (published)',
    '  clean 70.00%',
  ]
  assert '&lt;b&gt;' in classifier._repr_html_()


def test_from_a_state_dict(classifier, variables, images):
  state = pytorch.to_state_dict(*variables)
  wrapped = {f'module.{name}': value for name, value in state.items()}
  for given in (state, wrapped):
    found = jaxrobust.from_torch(given, DIGITS, name='theirs')
    np.testing.assert_array_equal(found(images), classifier(images))
  assert found.card.name == 'theirs'


def test_what_is_no_network_of_ours(variables):
  state = pytorch.to_state_dict(*variables)
  with pytest.raises(UserError, match='theirs.*conv1.weight'):
    jaxrobust.from_torch({'conv1.weight': np.ones((3, 3))}, DIGITS, name='theirs')
  with pytest.raises(UserError, match='wrn-10-2.*wrn-16-2'):
    jaxrobust.from_torch(state, 'experiments/digits.py:wrn-16-2')
  with pytest.raises(UserError, match='list is neither a module'):
    jaxrobust.from_torch([], DIGITS)


@needs_torch
def test_a_module_must_answer_as_the_network_here(classifier, variables, images):
  import torch

  from tests.helpers import torch_networks

  settings = {
    'num_classes': 10,
    'channels': 1,
    'mean': (0.5,),
    'std': (0.5,),
    'padding': 0,
  }
  state = {
    name: torch.tensor(value)
    for name, value in pytorch.to_state_dict(*variables).items()
  }
  module = torch_networks.build('wrn-10-2', activation=torch.nn.SiLU(), **settings)
  module.load_state_dict(state)
  module.train()
  found = jaxrobust.from_torch(module, DIGITS)
  assert module.training
  assert found.card.name == 'WideResNet'
  np.testing.assert_array_equal(found(images), classifier(images))
  for change in ({'activation': torch.nn.ReLU()}, {'std': (0.25,)}):
    other = torch_networks.build(
      'wrn-10-2', **{'activation': torch.nn.SiLU()} | settings | change
    )
    other.load_state_dict(state)
    with pytest.raises(UserError, match='other logits.*model.activation = swish'):
      jaxrobust.from_torch(other, DIGITS)


@needs_torch
def test_the_example_judges_a_file_of_pytorch(variables, tmp_path, monkeypatch, capsys):
  (tmp_path / 'theirs.pt').write_bytes(pytorch.write(*variables))
  arguments = '--config=digits:wrn-10-2 --num_images=16 --suite=apgd-ce:num_steps=2'
  monkeypatch.setattr(sys, 'argv', ['x', f'{tmp_path}/theirs.pt', *arguments.split()])
  runpy.run_path(str(ROOT / 'examples' / 'judge_pytorch.py'), run_name='__main__')
  assert capsys.readouterr().out.startswith('Outcome of 16 images\n')
