"""The classifiers' experiments, and the shapes of a whole step of one."""

import functools
import importlib
import pathlib

import jax
import numpy as np

from jaxrobust import config as configs
from jaxrobust.config import dataset_info, registries
from jaxrobust.models import companions
from jaxrobust.training import optimizer, update

GENERATORS = tuple(f'_{name}' for name in registries.GENERATORS)
FILES = sorted(
  p.stem
  for p in (pathlib.Path(__file__).parents[2] / 'experiments').glob('*.py')
  if not p.stem.startswith(('base', 'follow_up', 'paper', '__'))
  and not p.stem.endswith((*GENERATORS, '_analysis'))
)
CASES = [(file, 'wrn-10-1') for file in FILES]
CASES += [('cifar10_linf', model) for model in ('wrn-28-10', 'preact-resnet-18')]
# More of the same blocks.
DEEPER = ['wrn-34-10', 'wrn-70-16', 'wrn-106-16']
MODELS = [*dict.fromkeys(model for _, model in CASES), *DEEPER]


def load(file, arg):
  return importlib.import_module(f'experiments.{file}').get_config(arg)


def step_shapes(config):
  """Shapes of state and metrics of one step, without computing anything."""
  derived = configs.resolve(config)
  info = dataset_info.INFO[config.dataset.name]
  model = companions.for_training(config, info)
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
