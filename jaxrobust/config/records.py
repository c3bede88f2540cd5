"""Configs on disk: as JSON, read again, and compared."""

import json
from collections.abc import Collection

from ml_collections import config_dict

from jaxrobust.config import analysis, classifier, dataset_info, fields, generator
from jaxrobust.files import json_files


def fields_of(tree: dict | config_dict.ConfigDict) -> dict:
  """The declared fields of a config, by the parts that it has; {} for no whole one."""
  if 'loss' in tree:  # A generator's own settings have a part 'training', too.
    return classifier.FIELDS
  if 'rules' in tree:
    return analysis.FIELDS
  if 'generator' in tree:
    return generator.of(_name_in(tree['generator']))
  return generator.GENERATORS.get(_name_in(tree), {})


def _name_in(settings) -> str:
  """The name of a generator in its settings, if there is one."""
  name = settings.get('name') if hasattr(settings, 'get') else None
  return name if isinstance(name, str) else ''


_KINDS = {
  'a classifier (train, evaluate, plan)': classifier.FIELDS,
  'a generator (generate)': generator.of(''),
  'an analysis (analyze)': analysis.FIELDS,
}
_FREE = {
  path
  for kind in _KINDS.values()
  for path, known in fields.flatten(kind).items()
  if known.free
}


def describe() -> str:
  """The page of all fields of all kinds of configs."""
  kinds = _KINDS | {
    f"config.generator of '{name}'": {'generator': own}
    for name, own in generator.GENERATORS.items()
  }
  return '\n'.join(
    f'Fields of {kind}:\n{fields.describe(known)}' for kind, known in kinds.items()
  )


def to_json(config: config_dict.ConfigDict) -> str:
  """The config as JSON, in a stable order."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def from_json(text: str | bytes, name: str = 'the config') -> config_dict.ConfigDict:
  """The locked config that `to_json` wrote, of this version or an earlier one.

  Args:
    text: of the file.
    name: of the file, for messages.

  Raises:
    UserError: for what is no config: no JSON object, or fields of other types.
  """
  tree = json_files.parse(text, name)
  return fields.restore(tree, fields_of(tree)).lock()


def differences(
  old: config_dict.ConfigDict,
  new: config_dict.ConfigDict,
  ignore: Collection[str] = _FREE,
) -> list[str]:
  """Fields whose values differ, each as `field: old → new`.

  Where one is None, it is said what that comes to by the other fields.

  Args:
    old: the config of a run.
    new: a config that may be continued with it, see `continued`.
    ignore: fields that may differ; () compares any two trees as they are.
  """
  if ignore:
    new = continued(new, old)
  unset_old, unset_new = unset(old), unset(new)
  old, new = (fields.flatten(json.loads(to_json(c))) for c in (old, new))
  absent = '(absent)'
  value = lambda f, known, follows: (
    f'None ({follows[f]} by the other fields)' if f in follows else known.get(f, absent)
  )
  return [
    f'{f}: {value(f, old, unset_old)} → {value(f, new, unset_new)}'
    for f in sorted(old | new)
    if f not in ignore and old.get(f, absent) != new.get(f, absent)
  ]


def unset(config: config_dict.ConfigDict) -> dict[str, str]:
  """Fields of a classifier that are None, with what that comes to, as text."""
  if fields_of(config) is not classifier.FIELDS:
    return {}
  try:
    found = classifier.follows(config)
  except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError):
    return {}  # Of a config that is not checked yet.
  flat = fields.flatten(config)
  text = lambda x: f'{x:,}' if isinstance(x, int) else f'{x:g}'
  return {
    path: text(value) for path, value in found.items() if flat.get(path, '') is None
  }


def continued(
  config: config_dict.ConfigDict, begun: config_dict.ConfigDict
) -> config_dict.ConfigDict:
  """A config, locked, with what a run that has begun keeps where it says nothing else.

  That is a field whose default has changed since, and what was read of own images.

  Args:
    config: of the command that continues the run.
    begun: the config of the run.
  """
  changed = {}
  old, new = fields.flatten(begun), fields.flatten(config)
  for path, known in fields.flatten(fields_of(config)).items():
    was, now = old.get(path), new.get(path)
    if known.meant != known.default and (was, now) == (known.meant, known.default):
      changed[path] = known.meant
  return fields.replace(config, changed | _read_before(config, begun))


def _read_before(config, begun) -> dict:
  """What was read of own images when a run began: dotted path → value."""
  dataset, theirs = config.get('dataset'), begun.get('dataset')
  if not dataset or not theirs or not dataset_info.is_own(dataset):
    return {}
  held_out = theirs.validation_images
  usual = dataset_info.held_out(dataset.validation_images, theirs.train_size or 0)
  if held_out not in (dataset.validation_images, theirs.train_size and usual):
    return {}
  if any(dataset[x] != theirs[x] for x in ('name', 'path', 'train_images')):
    return {}
  found = {'dataset.validation_images': held_out} | {
    f'dataset.{name}': theirs[name]
    for name in dataset_info.RECORDED
    if dataset[name] is None
  }
  if 'model' in config and dataset_info.has_others_normalisation(config):
    found |= {f'model.{name}': begun.model[name] for name in ('mean', 'std')}
  return found
