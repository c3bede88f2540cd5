"""The programs that devices run, with the shapes of what they are given."""

import functools
import json
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust import models
from jaxrobust.attacks import norms, suites
from jaxrobust.attacks.evaluation import Evaluator
from jaxrobust.config import dataset_info, generator, registries
from jaxrobust.errors import UserError
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators.trained import Trained
from jaxrobust.models import companions
from jaxrobust.training import optimizer, update

KINDS = ('train', 'evaluate', 'sample')


class Program(NamedTuple):
  """What is compiled.

  Attributes:
    fn: for one device.
    arguments: its shapes.
    donated: arguments that give their memory to results.
    images: of a device.
    calls: of it in the whole run, at most.
    rounds: of a loop in it that stops by itself, at most.
    name: which of several it is.
  """

  fn: Callable
  arguments: tuple
  donated: tuple[int, ...]
  images: int
  calls: int
  rounds: int = 1
  name: str = ''


def name(config: config_dict.ConfigDict) -> str:
  """The run's name: the experiment's, or that of a generator."""
  if 'generator' in config:
    return f'{config.dataset.name}_{config.generator.name}'
  return configs.experiment_name(config)


def batch(config: config_dict.ConfigDict, what: str) -> tuple[str, int]:
  """The field with the batch size of a program, and its value.

  Of samples it is a device's, else that of the whole run.

  Raises:
    UserError: if the config has no such program.
  """
  fields = {'train': 'data.batch_size', 'evaluate': 'evaluation.batch_size'}
  if 'generator' in config:
    if not issubclass(_generator_of(config), Trained):
      raise UserError(
        f'config.generator.name = {config.generator.name!r} has no network, and asks '
        'nothing of the devices worth a plan: give a generator that is trained, such '
        'as cifar10_ddpm'
      )
    fields = {
      'train': 'generator.training.batch_size',
      'sample': 'samples.batch_size',
    }
  if what not in fields:
    raise UserError(
      f'--what={what}: {name(config)} has no such program; use {" or ".join(fields)}'
    )
  if 'generator' not in config and 'data' not in config:
    raise UserError(
      'this config has no program worth a plan: give the experiment of a classifier or '
      'of a generator that is trained'
    )
  value = config
  for part in fields[what].split('.'):
    value = value[part]
  return fields[what], value


def of(config: config_dict.ConfigDict, what: str, num_devices: int) -> list[Program]:
  """The programs of a config on so many devices.

  Args:
    config: a classifier's or a generator's, after all overrides.
    what: one of `KINDS`.
    num_devices: of the slice.

  Returns:
    In the order in which they run: one, but for the training of generators whose
    phases do not come equally often, and for a suite, which has one an attack.

  Raises:
    UserError: if the batch does not divide over the devices, or the config has no
      such program.
  """
  field, size = batch(config, what)
  if 'generator' in config:
    generator.check(config)
    _generator_of(config).check(config.generator, dataset_info.of(config.dataset))
  if what == 'evaluate':
    found = judging(config, num_devices)
    if not found:
      raise UserError(
        f'config.evaluation.suite = {config.evaluation.suite!r} has no attack to plan: '
        'use another suite, such as autoattack'
      )
    return found
  info = dataset_info.of(config.dataset)
  if what == 'sample':
    return [_sampling(config, info, size, num_devices)]
  images, left = divmod(size, num_devices)
  if left:
    raise UserError(
      f'config.{field}: a batch of {size} does not divide over {num_devices} devices: '
      'use a multiple of that number, or another --topology'
    )
  if 'generator' in config:
    _generator_of(config).check_devices(config.generator, info, num_devices)
    return _training_of_generator(config, info, images)
  return [_training(config, info, images)]


def _generator_of(config):
  """The class of a config's generator."""
  return registries.GENERATORS.get(config.generator.name, 'config.generator.name')


def _training(config, info, images):
  """The step of a classifier."""
  derived = configs.resolve(config)
  model = companions.for_training(config, info)
  sgd = optimizer.make(config.optimizer, derived)
  state = jax.eval_shape(lambda: update.init_state(config, model, sgd))
  step = update.make_step(config, model, sgd, info.num_classes)
  root = jax.ShapeDtypeStruct((2,), jnp.uint32)
  arguments = state, update.batch_like(info, images), root
  return Program(step, arguments, (0,), images, derived.num_steps)


def _training_of_generator(config, info, images):
  """What an iteration of a generator's training runs, each as often as it does."""
  settings, seed = config.generator, config.seed
  recipe = _generator_of(config).recipe(settings, info)
  state = jax.eval_shape(lambda: recipes.init_state(recipe, seed))
  part = jax.ShapeDtypeStruct((), jnp.int32)
  num_steps = settings.training.num_steps
  return [
    Program(
      program.fn,
      (state, update.batch_like(info, images), part),
      (0,),
      images // program.num_parts,
      math.ceil(num_steps / program.interval) * len(program.parts),
      name=program.name,
    )
    for program in recipes.make_programs(recipe, seed)
  ]


def _sampling(config, info, images, num_devices):
  """A batch of samples; the run draws at least as many as the set will hold."""
  settings, kind = config.generator, _generator_of(config)
  key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(config.seed)))
  variables = kind.variables_like(settings, info), key
  return Program(
    kind.make_sampler(settings, info),
    (variables, jax.ShapeDtypeStruct((images,), jnp.int32)),
    (),
    images,
    math.ceil(config.samples.count / (images * num_devices)),
  )


def judging(config: config_dict.ConfigDict, num_devices: int) -> list[Program]:
  """An attempt of each attack of config.evaluation.suite, as `evaluate` runs them.

  Args:
    config: a classifier's, after all overrides.
    num_devices: of the slice; they share the batch, the last of them with padding.

  Returns:
    A Program an attack, as if every image stood until its last attempt.
  """
  configs.check(config)
  settings, info = config.evaluation, dataset_info.of(config.dataset)
  model = models.from_config(config.model, info)
  ball = norms.get(config.threat.norm, config.threat.epsilon)
  _, attacks = suites.from_config(settings, ball)
  count = settings.num_images or info.test_size
  size = min(settings.batch_size, count)
  evaluator = Evaluator(
    lambda variables, x: model.apply(*variables, x, batch_stats=False)[0],
    attacks,
    batch_size=size,
    seed=config.seed,
  )
  images = -(-size // num_devices)
  pixels, labels, *_ = update.batch_like(info, images)
  pixels = jax.ShapeDtypeStruct(pixels.shape, jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0))
  index = jax.ShapeDtypeStruct((), jnp.int32)
  root = jax.ShapeDtypeStruct((2,), jnp.uint32)
  return [
    Program(
      functools.partial(evaluator._attempt_shard, name, attack),
      (variables, pixels, labels, labels, root, index),
      (),
      images,
      attack.num_attempts(info.num_classes) * -(-count // size),
      attack.turns,
      name=name,
    )
    for name, attack in attacks
  ]


def cost_key(config: config_dict.ConfigDict, part: str) -> str:
  """What the cost of a run's 'training' or 'evaluation' follows from.

  Points of a sweep often share it.
  """
  tree = json.loads(configs.to_json(config))
  fields = {
    'training': ('augment', 'loss', 'attack', 'ema', 'training'),
    'evaluation': ('evaluation', 'threat'),
  }[part]
  kept = [tree[field] for field in ('model', *fields)]
  return json.dumps([part, tree['dataset']['name'], tree['data']['batch_size'], *kept])
