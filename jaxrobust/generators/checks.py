"""Checks of a generator's run before anything is written."""

from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust.config import dataset_info, generator, registries
from jaxrobust.errors import UserError
from jaxrobust.generators.generator import Generator
from jaxrobust.runs import workdir as workdirs


def generator_of(config: config_dict.ConfigDict) -> type[Generator]:
  """The class of a config's generator; UserError for an unknown name."""
  return registries.GENERATORS.get(config.generator.name, 'config.generator.name')


def check(config: config_dict.ConfigDict, is_labelled: bool = True) -> None:
  """Raises UserError for a value that cannot be meant, or one that is lacking.

  Args:
    config: of a generator's run.
    is_labelled: whether samples are to be labelled.
  """
  generator.check(config)
  generator_class = generator_of(config)
  generator_class.check(config.generator, dataset_info.of(config.dataset))
  if is_labelled and not config.labeller:
    raise UserError(
      'config.labeller is not set: give the workdir of a non-robust classifier (train '
      'one with --config=EXPERIMENT:labeller, such as cifar10_linf:labeller)'
    )
  if config.labeller == generator.CONDITION:
    if config.samples.top_fraction < 1:
      raise UserError(
        "config.labeller = 'condition' is sure of every label, so that "
        f'config.samples.top_fraction = {config.samples.top_fraction} has nothing to '
        'rank by: use 1, or a classifier'
      )
    if not generator_class.conditional(config.generator):
      raise UserError(
        "config.labeller = 'condition' for a generator without classes: give a "
        'classifier, or settings with which it knows them, such as '
        'config.generator.network.conditional=True of ddpm'
      )


def check_fitted(config: config_dict.ConfigDict) -> None:
  """Raises UserError unless config.fitted has a generator of the same fit."""
  folder = epath.Path(config.fitted)
  theirs = workdirs.read_config(folder)
  same = lambda c: {
    'dataset': c.dataset.to_dict() | {'data_dir': ''},
    'generator': c.generator.to_dict() | {'sampling': None},
  }
  if 'generator' not in theirs:
    raise UserError(
      f"config.fitted = {folder} is no generator's run: give one that was fitted, or "
      'leave it out'
    )
  changed = configs.differences(
    *map(config_dict.ConfigDict, map(same, (theirs, config)))
  )
  if changed:
    raise UserError(
      f'config.fitted = {folder} was fitted by another config ({"; ".join(changed)}): '
      'use the same dataset and generator, or fit anew'
    )
  if not (folder / workdirs.GENERATOR).exists():
    raise UserError(
      f'config.fitted = {folder} has no {workdirs.GENERATOR}: finish its fit'
    )
