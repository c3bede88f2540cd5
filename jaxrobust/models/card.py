"""The model card: what a file of parameters does not say of its network.

It stands beside the file, under the same name with the ending `.json`, and inside
`.safetensors` files.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable

from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust import models
from jaxrobust.config import dataset_info
from jaxrobust.errors import UserError
from jaxrobust.files import arrays, json_files
from jaxrobust.models.architecture import Architecture
from jaxrobust.runs import checksums
from jaxrobust.runs import workdir as workdirs

_MODEL_FIELDS = ('name', 'activation', 'mean', 'std', 'padding')
_NORMS = ('linf', 'l2', 'l1')
_MAX_PADDING = 64  # pixels on each side
_MAX_FORMATS, _ENDING = 16, r'\.\w{1,16}'
_LARGEST = 1e6  # of any number in it
_REMEDY = 'remove it and say what the network is, by --config'


@dataclasses.dataclass(frozen=True)
class Card:
  """Enough to build a network with its normalisation, and to attack it.

  Attributes:
    name: of the checkpoint.
    dataset: name of the data set.
    norm: 'linf', 'l2' or 'l1', that it was trained against.
    epsilon: radius, pixels in [0, 1].
    model: name, activation, mean, std and padding as in a config's `model`.
    accuracies: each a dict with 'protocol', 'clean_accuracy' and 'robust_accuracy'
      (fractions); published ones also have 'published': where.
    source: where the parameters come from.
    config_sha256: of the training run's config.json; None where it is not known.
    num_classes: of images of one's own; None for those of a known data set.
    image_shape: (H, W, C) of these; None likewise.
    formats: endings of the files that the card beside them is of; () for any, as of a
      card that says none.
  """

  name: str
  dataset: str
  norm: str
  epsilon: float
  model: dict
  accuracies: tuple[dict, ...] = ()
  source: str = ''
  config_sha256: str | None = None
  num_classes: int | None = None
  image_shape: tuple[int, int, int] | None = None
  formats: tuple[str, ...] = ()

  @property
  def info(self) -> dataset_info.DatasetInfo:
    """What is known of its images; of one's own not how many there are."""
    if self.image_shape is None or self.num_classes is None:
      return dataset_info.INFO.get(self.dataset, 'dataset of a model card')
    return dataset_info.DatasetInfo(
      self.dataset, self.image_shape, self.num_classes, train_size=0, test_size=0
    )

  def build(self, group_size: int | None = None) -> models.Model:
    """The network; `group_size` as in `models.build`."""
    info = self.info
    return models.build(
      **self.model,
      num_classes=info.num_classes,
      image_shape=info.image_shape,
      group_size=group_size,
    )

  @property
  def architecture(self) -> Architecture:
    """What must follow from the parameters."""
    info = self.info
    return Architecture(self.model['name'], info.num_classes, info.image_shape[-1])

  def to_json(self) -> str:
    """The card's file; it also has the sizes that follow from the data set."""
    info = self.info
    sizes = {'num_classes': info.num_classes, 'image_shape': info.image_shape}
    values = dataclasses.asdict(self) | sizes
    if not self.formats:
      del values['formats']
    return json.dumps(values, indent=2) + '\n'

  def says_the_same(self, other: 'Card') -> bool:
    """Whether both are of one checkpoint, in whatever formats."""
    texts = [dataclasses.replace(x, formats=()).to_json() for x in (self, other)]
    return texts[0] == texts[1]


def from_json(text: bytes | str, source: str) -> Card:
  """Reads a card.

  Args:
    text: of `to_json`.
    source: its path, for messages.

  Raises:
    UserError: if it is not a card.
  """
  try:
    values = json_files.parse(text, source)
  except UserError as e:
    raise UserError(f'{e}: {_REMEDY}') from e
  try:
    needed = {f.name for f in dataclasses.fields(Card)} - {'formats'}
    if missing := sorted(needed - values.keys()):
      raise ValueError(f'it lacks {", ".join(missing)}')
    card = Card(
      name=_text(values, 'name'),
      dataset=_text(values, 'dataset'),
      norm=_text(values, 'norm'),
      epsilon=_number(values['epsilon'], 'epsilon'),
      model=_checked_model(values['model']),
      accuracies=_dictionaries(values['accuracies']),
      source=_text(values, 'source', 2**12),
      config_sha256=values['config_sha256'] and _text(values, 'config_sha256'),
      formats=_formats(values.get('formats', [])),
      **_own_images(values),
    )
    if card.norm not in _NORMS:
      raise ValueError(f'the norm {_shown(card.norm)} is none of {", ".join(_NORMS)}')
    if card.epsilon < 0:
      raise ValueError('epsilon must not be negative')
    channels = card.info.image_shape[-1]
    if {len(card.model[field]) for field in ('mean', 'std')} != {channels}:
      plural = 's' * (channels > 1)
      raise ValueError(f'mean and std need {channels} value{plural}, one a channel')
    card.build()  # A network of that name exists.
  except ValueError as e:
    raise UserError(f'{source} is not a model card ({e}): {_REMEDY}') from e
  return card


def from_config(
  config: config_dict.ConfigDict,
  source: str,
  accuracies: tuple[dict, ...] = (),
  name: str = '',
) -> Card:
  """The card of a run.

  Args:
    config: of a classifier.
    source: where its parameters come from.
    accuracies: see Card.
    name: of the checkpoint; '' for the experiment's.

  Raises:
    UserError: if the config has a value that cannot be meant.
  """
  configs.check(config)
  info, is_own = dataset_info.of(config.dataset), dataset_info.is_own(config.dataset)
  return Card(
    num_classes=info.num_classes if is_own else None,
    image_shape=info.image_shape if is_own else None,
    name=name or configs.experiment_name(config),
    dataset=info.name,
    norm=config.threat.norm,
    epsilon=config.threat.epsilon,
    model=_model(config.model),
    accuracies=accuracies,
    source=source,
    config_sha256=hashlib.sha256(configs.to_json(config).encode()).hexdigest(),
  )


def from_workdir(folder: str | epath.Path) -> Card:
  """The card of a finished run: its config, and what its checkpoint was judged to be.

  Args:
    folder: a workdir. Entries of its results.json about other checkpoints are left out.

  Raises:
    UserError: if it holds no run of a classifier.
  """
  folder = epath.Path(folder)
  config = workdirs.read_config(folder)
  file = folder / workdirs.CHECKPOINT
  sha256 = checksums.sha256(file) if file.exists() else None
  return from_config(
    config,
    source=folder.name,
    accuracies=tuple(
      entry
      for entry in workdirs.read_results(folder)
      if entry.get('protocol', {}).get('checkpoint_sha256') == sha256
    ),
  )


def has_attack(entry: dict) -> bool:
  """Whether one of a card's accuracies is of attacks; published ones are."""
  return entry.get('attacks') != []


def path_of(checkpoint: str | epath.Path) -> epath.Path:
  """Where the card of a file of parameters stands."""
  return epath.Path(checkpoint).with_suffix('.json')


def read(path: epath.Path) -> Card:
  """The card in a file; UserError if it is none."""
  with arrays.open_file(path) as file:
    text = file.read(json_files.MAX_BYTES + 1)
  return from_json(text, str(path))


def beside(checkpoint: str | epath.Path) -> Card | None:
  """The card beside a file of parameters, if there is one and it is of that file.

  Args:
    checkpoint: path of the file.

  Raises:
    UserError: if what is there is not a card.
  """
  path, ending = path_of(checkpoint), epath.Path(checkpoint).suffix
  if not ending or not path.exists():
    return None
  card = read(path)
  if card.formats and ending not in card.formats:
    return None
  return dataclasses.replace(card, formats=())


def of_others(checkpoint: str | epath.Path) -> str:
  """' (… describes … files only)' if the card beside a file is not its own, else ''."""
  path, ending = path_of(checkpoint), epath.Path(checkpoint).suffix
  if not ending or not path.exists() or not (formats := read(path).formats):
    return ''
  return f' ({path} describes {", ".join(formats)} files only)'


def _own_images(values) -> dict:
  """Classes and shape of a card's images, where its data set is not a known one."""
  if _text(values, 'dataset') in dataset_info.INFO:
    return {}
  classes, shape = values['num_classes'], values['image_shape']
  sizes = [classes, *shape] if type(shape) is list else []
  if not re.fullmatch(r'[\w.-]+', values['dataset']):
    sizes = []  # It is in the names of runs, which are names of folders.
  if len(sizes) != 4 or not all(type(x) is int and 0 < x <= 2**15 for x in sizes):
    raise ValueError(
      f'the data set {_shown(values["dataset"])} is unknown, and num_classes and '
      'image_shape do not say what its images are'
    )
  return {'num_classes': classes, 'image_shape': tuple(shape)}


def _model(values) -> dict:
  """The fields that make a network, from a config's `model` or JSON."""
  numbers = lambda x: tuple(float(v) for v in x)
  read: dict[str, Callable] = {'mean': numbers, 'std': numbers, 'padding': int}
  return {field: read.get(field, str)(values[field]) for field in _MODEL_FIELDS}


def _checked_model(values) -> dict:
  """The same from JSON of others; ValueError for what cannot be meant."""
  if type(values) is not dict or not values.keys() >= set(_MODEL_FIELDS):
    raise ValueError(f'its model is none: {", ".join(_MODEL_FIELDS)} are needed')
  numbers = {}
  for field in ('mean', 'std'):
    if type(values[field]) is not list or len(values[field]) > 4:
      raise ValueError(f'model.{field} is no list of a number a channel')
    numbers[field] = tuple(_number(x, f'model.{field}') for x in values[field])
  if min(numbers['std'], default=0) <= 0:
    raise ValueError('model.std must be above 0')
  padding = values['padding']
  if type(padding) is not int or not 0 <= padding <= _MAX_PADDING:
    raise ValueError(f'model.padding must be a number of pixels, 0 to {_MAX_PADDING}')
  words = {field: _text(values, field) for field in ('name', 'activation')}
  return {
    field: (words | numbers | {'padding': padding})[field] for field in _MODEL_FIELDS
  }


def _text(values, field, most=200) -> str:
  if type(text := values[field]) is not str or len(text) > most:
    raise ValueError(f'{field} must be text of at most {most} letters')
  return text


def _number(value, field) -> float:
  if type(value) not in (int, float) or not -_LARGEST <= value <= _LARGEST:
    raise ValueError(f'{field} must be a number, up to {_LARGEST:g}')
  return float(value)


def _formats(values) -> tuple[str, ...]:
  known = type(values) is list and len(values) <= _MAX_FORMATS
  if not known or not all(type(x) is str and re.fullmatch(_ENDING, x) for x in values):
    raise ValueError('formats must be a list of endings, such as .npy')
  return tuple(values)


def _dictionaries(values) -> tuple[dict, ...]:
  if type(values) is not list or not all(type(x) is dict for x in values):
    raise ValueError('accuracies must be a list of objects')
  return tuple(values)


def _shown(text) -> str:
  return arrays.printable(text)[:40]
