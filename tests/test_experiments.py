"""Every experiment and model builds: config, checks and the shapes of a whole step."""

import functools
import importlib
import pathlib

import jax
import numpy as np
import pytest

from jaxrobust import config as configs
from jaxrobust import generators, models, optimizer, update
from jaxrobust.data import datasets, pipeline

FILES = sorted(
  p.stem
  for p in (pathlib.Path(__file__).parent.parent / 'experiments').glob('*.py')
  if not p.stem.startswith(('base', 'paper', '__'))
  and not p.stem.endswith(('_gaussian', '_ddpm', '_mixup', '_analysis'))
)
GENERATORS = sorted(
  p.stem
  for p in (pathlib.Path(__file__).parent.parent / 'experiments').glob('*.py')
  if p.stem.endswith(('_gaussian', '_ddpm', '_mixup'))
)
MODELS = [
  'wrn-28-10',
  'wrn-70-16',
  'wrn-34-10',
  'wrn-106-16',
  'wrn-10-1',
  'preact-resnet-18',
]
CASES = [(file, 'wrn-10-1') for file in FILES]
CASES += [('cifar10_linf', model) for model in MODELS]


def load(file, arg):
  return importlib.import_module(f'experiments.{file}').get_config(arg)


def step_shapes(config):
  """Shapes of state and metrics of one step, without computing anything."""
  derived = configs.resolve(config)
  info = datasets.INFO[config.dataset.name]
  model = models.from_config(config.model, info)
  sgd = optimizer.make(config.optimizer, derived)
  step = update.make_step(config, model, sgd, info.num_classes)
  state = jax.eval_shape(functools.partial(update.init_state, config, model, sgd))
  devices = 4
  size = config.data.batch_size // devices
  lead = lambda x: jax.ShapeDtypeStruct((devices, *x.shape), x.dtype)
  batch = update.Batch(
    jax.ShapeDtypeStruct((devices, size, *info.image_shape), np.uint8),
    jax.ShapeDtypeStruct((devices, size), np.int32),
    jax.ShapeDtypeStruct((devices, size), np.bool_),
    jax.ShapeDtypeStruct((devices, size), np.int32),
  )
  state = jax.tree.map(lead, state)
  return state, *jax.eval_shape(jax.pmap(step, axis_name='devices'), state, batch)


@pytest.mark.parametrize('file, model', CASES)
def test_the_whole_step_builds(file, model):
  config = load(file, f'{model},ddpm')
  before, after, metrics = step_shapes(config)
  assert jax.tree.structure(before) == jax.tree.structure(after)
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
  assert set(metrics) == {'train/loss', 'train/clean_accuracy', 'train/adv_accuracy'}


@pytest.mark.parametrize(
  'override',
  [
    {'augment.cutmix': True},
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
  assert f'experiments/{file}.py' in page
  if dataset != 'digits':
    assert 'Published' in page
    assert 'Uncertain' in page
  assert len(config.model.mean) == datasets.INFO[dataset].image_shape[-1]


@pytest.mark.parametrize('file', GENERATORS)
def test_generator_experiments(file):
  config = importlib.import_module(f'experiments.{file}').get_config()
  dataset, name = file.rsplit('_', 1)
  assert (config.dataset.name, config.generator.name) == (dataset, name)
  generators.get(name).check(config.generator, datasets.INFO[dataset])
  page = importlib.import_module(f'experiments.{file}').__doc__
  assert f'experiments/{file}.py' in page
  assert ('Published' in page and 'Uncertain' in page) == (dataset != 'digits')
