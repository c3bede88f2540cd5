"""Every experiment and model builds: config, checks and the shapes of a whole step."""

import functools
import importlib
import pathlib
import re

import jax
import numpy as np
import pytest

from experiments import baselines, follow_up
from jaxrobust import config as configs
from jaxrobust.config import dataset_info, experiments, registries
from jaxrobust.data import pipeline
from jaxrobust.errors import UserError
from jaxrobust.models import companions
from jaxrobust.training import classifier
from tests.helpers import experiment_steps
from tests.helpers.experiment_steps import CASES, DEEPER, FILES, load, step_shapes

GENERATORS = sorted(
  p.stem
  for p in (pathlib.Path(__file__).parent.parent / 'experiments').glob('*.py')
  if p.stem.endswith(experiment_steps.GENERATORS)
)
BY_NAME = [
  (file, name)
  for file, names in {
    'baselines': baselines._NAMES,
    'follow_up': follow_up._RUNS,
  }.items()
  for name in names
]


@pytest.mark.parametrize('file, model', CASES)
def test_the_whole_step_builds(file, model):
  config = load(file, f'{model},ddpm')
  before, after, metrics = step_shapes(config)
  assert jax.tree.structure(before) == jax.tree.structure(after)
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
  assert set(metrics) == {'train/loss', 'train/clean_accuracy', 'train/adv_accuracy'}


@pytest.mark.parametrize('model', DEEPER)
def test_deeper_networks_build(model):
  config = load('cifar10_linf', model)
  network = companions.for_training(config, dataset_info.INFO['cifar10'])
  variables = jax.eval_shape(network.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((32, 32, 32, 3), np.float32)
  apply = functools.partial(network.apply, batch_stats=True)
  logits, net_state = jax.eval_shape(apply, *variables, images)
  assert (logits.shape, logits.dtype) == ((32, 10), np.float32)
  assert net_state == variables[1]


@pytest.mark.parametrize(
  'override',
  [
    {'loss.name': 'standard'},
    {'loss.name': 'adversarial'},
    {'ema.batch_norm': 'own'},
    {'attack.objective': 'cross_entropy'},
    {'attack.objective': 'margin'},
    {'model.batch_norm_group': 1024},
    {'threat.norm': 'l2', 'attack.step_rule': 'normalized'},
    {'attack.restarts': 2},
  ],
  ids=str,
)
def test_every_choice_builds(override):
  """Those of augmentation are rows of the paper's tables: see test_paper."""
  config = load('cifar10_linf', 'wrn-10-1,ddpm').unlock()
  config.update_from_flattened_dict(override)
  step_shapes(config)


@pytest.mark.parametrize('file', FILES)
@pytest.mark.parametrize('data', ['real', 'ddpm'])
def test_counts_are_shared_equally(file, data):
  """Of 32 TPU cores, of 8 and of one device, and of the BatchNorm groups."""
  config = load(file, data)
  size = config.data.batch_size
  groups = size // config.model.batch_norm_group
  for devices in (1, 8, 32 if size == 1024 else 2):
    real, generated = pipeline.mix_counts(
      size,
      configs.resolve(config).real_fraction,
      config.data.real_repeats,
      {'devices': devices, 'BatchNorm groups': groups},
    )
    assert real + generated == size


def test_published_counts():
  config = load('cifar10_linf', 'wrn-28-10,ddpm')
  assert pipeline.mix_counts(1024, config.data.real_fraction, 4) == (320, 704)


@pytest.mark.parametrize('file', FILES)
def test_what_the_argument_leaves_out_is_the_default(file):
  """Naming a model does not drop the generated images, nor the other way round."""
  usual = load(file, '')
  assert load(file, 'wrn-16-1').data.samples == usual.data.samples
  assert load(file, 'real').model.name == usual.model.name
  assert load(file, 'real').data.samples == ''
  assert bool(usual.data.samples) == (file not in ('digits', 'mnist_linf'))


@pytest.mark.parametrize('file', FILES)
def test_names_and_docstrings(file):
  config = load(file, 'wrn-28-10,ddpm')
  dataset = config.dataset.name
  assert configs.experiment_name(config) == (
    f'{dataset}_{config.threat.norm}_wrn-28-10_ddpm'
  )
  page = importlib.import_module(f'experiments.{file}').__doc__
  assert f'--config={file}' in page
  if dataset != 'digits':
    assert 'Published' in page
    assert 'Uncertain' in page
  assert len(config.model.mean) == dataset_info.INFO[dataset].image_shape[-1]


@pytest.mark.parametrize('file', GENERATORS)
def test_generator_experiments(file):
  config = importlib.import_module(f'experiments.{file}').get_config()
  dataset, name = file.rsplit('_', 1)
  assert (config.dataset.name, config.generator.name) == (dataset, name)
  generator = registries.GENERATORS.get(name)
  generator.check(config.generator, dataset_info.INFO[dataset])
  page = importlib.import_module(f'experiments.{file}').__doc__
  assert f'--config={file}' in page
  assert ('Published' in page and 'Uncertain' in page) == (dataset != 'digits')


@pytest.mark.parametrize('file, name', BY_NAME)
def test_published_recipes_by_name(file, name):
  """Counts that devices and groups share, a network that is, the numbers told."""
  config = load(file, name)
  derived = configs.resolve(config)
  size = config.data.batch_size
  assert derived.later_from_step < derived.num_steps
  for share in (derived.real_fraction, derived.later_real_fraction):
    for devices in (1, 8, 32):
      parts = {'devices': devices, 'groups': size // config.model.batch_norm_group}
      pipeline.mix_counts(size, 0.0 if share is None else share, 1, parts)
  companions.for_training(config, dataset_info.INFO[config.dataset.name])
  page = importlib.import_module(f'experiments.{file}').__doc__
  assert re.search(rf'^  {name} +\d\d\.\d\d / \d\d\.\d\d  ', page, re.MULTILINE)
  assert f'--config={file}:NAME' in page and 'Uncertain' in page


@pytest.mark.parametrize(
  'file, name',
  [
    ('baselines', 'awp-l2'),
    ('baselines', 'lbgat'),
    ('baselines', 'uat'),
    ('follow_up', 'improved-kl'),
    ('follow_up', 'score'),
  ],
)
def test_the_steps_of_published_recipes_build(file, name):
  """Each on a small network: their own are those of the paper, but for the depth."""
  config = load(file, name).unlock()
  config.model.name = config.loss.natural_model = 'wrn-10-1'
  before, after, metrics = step_shapes(config)
  assert jax.tree.structure(before) == jax.tree.structure(after)
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
  assert ('train/natural_accuracy' in metrics) == (name == 'lbgat')


@pytest.mark.parametrize('experiment', [baselines, follow_up])
def test_unknown_recipes_are_refused(experiment):
  with pytest.raises(ValueError, match='use one of'):
    experiment.get_config('trades')


def test_both_mixes_are_checked_before_a_run():
  config = load('follow_up', 'wrn-94-16').unlock()
  counts = lambda: classifier.check_batch(config, configs.resolve(config))
  assert counts() == [(0, 2048), (256, 1792)]
  config.data.later_real_fraction = 0.13
  with pytest.raises(UserError, match=r'data.later_real_fraction = 0.13 gives 266'):
    counts()


def test_recipes_have_names_of_their_own():
  names = [configs.experiment_name(load(file, name)) for file, name in BY_NAME]
  assert len(set(names)) == len(names)


def test_experiments_are_found_by_name_and_by_path_from_any_folder(
  tmp_path, monkeypatch
):
  by_name = experiments.load('cifar10_linf:wrn-16-1,real')
  monkeypatch.chdir(tmp_path)
  for same in ('cifar10_linf', 'cifar10_linf.py', 'experiments/cifar10_linf.py'):
    found = experiments.load(f'{same}:wrn-16-1,real')
    assert configs.differences(by_name, found, ignore=()) == []
  # A file of one's own comes first.
  (tmp_path / 'digits.py').write_text(
    'from jaxrobust.config import classifier\n'
    "def get_config(): return classifier.get_config('svhn')\n"
  )
  assert experiments.load('digits.py').dataset.name == 'svhn'
  assert experiments.load('digits').dataset.name == 'digits'
  with pytest.raises(UserError, match='did you mean cifar10_linf'):
    experiments.find('cifar10_lin')
  with pytest.raises(UserError, match='one of baselines, .*digits'):
    experiments.find('zzz')
  with pytest.raises(UserError, match='no such file'):
    experiments.find('elsewhere/digits.py')


def test_experiments_of_earlier_versions_find_what_they_import(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(
    'from experiments import base, base_analysis, base_generator\n'
    'def get_config(arg=""):\n'
    '  assert base_analysis.with_samples and base_generator.get_config("ddpm")\n'
    '  return base.with_arg(base.get_config(), arg, "wrn-28-10,ddpm")\n'
  )
  same = experiments.load(f'{file}:real'), experiments.load('cifar10_linf:real')
  assert configs.differences(*same, ignore=()) == []
  assert experiments.load('base_generator:gaussian').generator.name == 'gaussian'
