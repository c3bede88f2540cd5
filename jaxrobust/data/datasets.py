"""The real datasets: whole splits as uint8 arrays, in one fixed order.

Order. The digits come in an order of our own (see `_open_digits`); every other
dataset in the order in which tensorflow-datasets stores it, which is a hash of each
example's key: the same on every machine, whatever the number of shards, and mixed
in the classes. "The first n training images" always means this order.

Own images. `own_images` says what a folder or a file holds; `tfds:NAME[/CONFIG]` is any
data set of tensorflow-datasets with images of one size and integer labels.

Splits. `train` and `validation` are cut from the official training images, `test`
is the official test split, whole. SVHN's `extra` images are not read. The official
test labels of TinyImageNet are not public, so its official validation split is the
test split here.

Importing this module imports neither tensorflow nor scikit-learn.
"""

import importlib
import os
import pathlib
import re
import tempfile
import types
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import config_dict

from jaxrobust.config import dataset_info, fields, registries
from jaxrobust.data import cifar_archives, own_images
from jaxrobust.errors import UserError


class Split(NamedTuple):
  """Images uint8 [n, H, W, C] in 0..255 and labels int32 [n] in 0..K-1."""

  images: np.ndarray
  labels: np.ndarray

  def checksum(self) -> str:
    """A checksum, by which machines find out whether they hold the same images."""
    images, labels = (np.ascontiguousarray(x).data for x in self)
    return f'{zlib.crc32(labels, zlib.crc32(images)):08x}'


class Opened(NamedTuple):
  """An official split: size, classes, and `read(start, stop)` of its examples."""

  size: int
  num_classes: int
  read: Callable[[int, int], tuple[np.ndarray, np.ndarray]]


SPLITS = ('train', 'validation', 'test')

_READ_BATCH = 1_000


def load(
  name: str,
  split: str,
  *,
  data_dir: str = '',
  path: str = '',
  train_images: int | None = None,
  validation_images: int = 0,
) -> Split:
  """Loads one split of a real dataset into memory.

  Args:
    name: of a data set, as a config's `dataset.name`.
    split: 'train', 'validation' or 'test'.
    data_dir: folder of the prepared tensorflow-datasets, local or `gs://`; '' for
      their default (`$TFDS_DATA_DIR` or `~/tensorflow_datasets`). Digits need none.
    path: of one's own images.
    train_images: how many images 'train' keeps, the first ones after those held
      out; None for all.
    validation_images: how many training images are held out, the first ones: they
      are 'validation', and 'train' starts after them. The papers hold
      out 1,024.

  Returns:
    images uint8 [n, H, W, C] in 0..255 and labels int32 [n].

  Raises:
    UserError: unknown name or split, a number of images out of range, 'validation'
      with nothing held out, or a dataset that is absent or damaged.
  """
  _check_split(split)
  opened = _open(name, _official(split), data_dir, path)
  return _cut(opened, name, split, train_images, validation_images)


def of(dataset: config_dict.ConfigDict, split: str) -> Split:
  """Loads one split of a config's data set, whole or not at all.

  Args:
    dataset: a config's `dataset`.
    split: 'train', 'validation' or 'test'.

  Returns:
    images uint8 [n, H, W, C] in 0..255 and labels int32 [n].

  Raises:
    UserError: as `load`, or if there are other images than its DatasetInfo says.
  """
  info = dataset_info.of(dataset)
  _check_split(split)
  official = _official(split)
  opened = _open(dataset.name, official, dataset.data_dir, dataset.path)
  expected = info.test_size if official == 'test' else info.train_size
  if opened.size != expected:
    remedy = 'prepare it again (jaxrobust data prepare --help)'
    if dataset_info.is_own(dataset):
      remedy = 'they changed since the run began: use another --workdir'
    raise UserError(
      f'{info.name} has {expected} {official} images, {opened.size} are here: {remedy}'
    )
  found = _cut(
    opened, info.name, split, dataset.train_images, dataset.validation_images
  )
  if found.images.shape[1:] != tuple(info.image_shape):
    raise UserError(
      f'{info.name} has images {list(found.images.shape[1:])}, and not '
      f'{list(info.image_shape)}: correct what is known of it'
    )
  return found


def record(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """The config with what is known of one's own images, which are read for it once.

  Args:
    config: of any kind, of a run that has begun as `workdirs.continued` gives it. Of
      the data sets that are known without being opened, it is returned as it is.

  Returns:
    The config, locked, with `dataset.image_shape` and what follows it, and fewer
    validation images where the default of them is too many; a classifier's with mean
    and standard deviation of the training images, unless it sets others than those of
    a known data set.

  Raises:
    UserError: if the images are absent or damaged.
  """
  dataset = config.dataset
  found: dict[str, object] = {}
  if not dataset_info.is_own(dataset):
    return config
  dataset_info.check(dataset)
  normalises = 'model' in config and dataset_info.has_others_normalisation(config)
  if None not in [dataset[x] for x in dataset_info.RECORDED] and not normalises:
    return config
  where = dataset.name, dataset.data_dir, dataset.path
  train, test = (_open(where[0], split, *where[1:]) for split in ('train', 'test'))
  held_out = dataset_info.held_out(dataset.validation_images, train.size)
  if not 0 <= held_out <= train.size - (dataset.train_images or 1):
    # Both, as an experiment for another data set may set both.
    used = dataset.train_images or 'the rest'
    raise UserError(
      f'{dataset.path or dataset.name} has {train.size} training images, and the '
      f'config holds out {held_out} and trains on {used}: '
      'to hold out a tenth, give --config.dataset.validation_images='
      f'{train.size // 10} --config.dataset.train_images=None'
    )
  images, _ = _cut(train, dataset.name, 'train', dataset.train_images, held_out)
  if held_out != dataset.validation_images:
    found['dataset.validation_images'] = held_out
  found |= {
    'dataset.image_shape': images.shape[1:],
    'dataset.num_classes': train.num_classes,
    'dataset.train_size': train.size,
    'dataset.test_size': test.size,
  }
  if normalises:
    found['model.mean'], found['model.std'] = normalisation(images)
  said = ', '.join(f'{path} {value}' for path, value in found.items())
  logging.info('recorded of %s: %s', dataset.path or dataset.name, said)
  return fields.replace(config, found)


def normalisation(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation of each channel of uint8 images, in [0, 1]."""
  levels = np.arange(256) / 255
  means, deviations = [], []
  for channel in range(images.shape[-1]):
    shares = np.bincount(images[..., channel].reshape(-1), minlength=256)
    shares = shares / shares.sum()
    mean = shares @ levels
    means.append(round(float(mean), 4))
    # A constant channel is left as it is.
    deviation = float(np.sqrt(shares @ np.square(levels - mean)))
    deviations.append(round(deviation, 4) or 1.0)
  return tuple(means), tuple(deviations)


def _check_split(split: str) -> None:
  if split not in SPLITS:
    raise UserError(f'unknown split {split!r}: choose one of {", ".join(SPLITS)}')


def _official(split: str) -> str:
  return 'test' if split == 'test' else 'train'


def _cut(
  opened: 'Opened',
  name: str,
  split: str,
  train_images: int | None,
  validation_images: int,
) -> Split:
  """The part of an official split that `load` describes."""
  size, _, read = opened
  if split == 'test':
    return Split(*read(0, size))
  if not 0 <= validation_images < size:
    raise UserError(
      f'config.dataset.validation_images = {validation_images}: {name} has {size} '
      f'training images, of which 0 to {size - 1} can be held out'
    )
  if split == 'validation':
    if validation_images == 0:
      raise UserError(
        f'config.dataset.validation_images = 0 leaves {name} without a validation '
        f'split: hold out 1 to {size - 1} training images'
      )
    return Split(*read(0, validation_images))

  available = size - validation_images
  if train_images is None:
    train_images = available
  if not 1 <= train_images <= available:
    raise UserError(
      f'train_images={train_images}: {name} has {available} training images when '
      f'{validation_images} are held out; choose 1 to {available}, or None for all'
    )
  return Split(*read(validation_images, validation_images + train_images))


def prepare(name: str, *, data_dir: str = '', archives: str = '') -> None:
  """Writes a dataset where `load` finds it; `jaxrobust data prepare`.

  Runs the tensorflow-datasets builder, which checks every archive's checksum. A
  dataset that is already there is left as it is.

  Args:
    name: of a data set; for the digits, which are part of scikit-learn, and for one's
      own images nothing happens.
    data_dir: as in `load`.
    archives: folder with the official archives under their official names (of CIFAR
      the binary ones, or those for Python); then nothing is downloaded. '' downloads
      them.

  Raises:
    UserError: unknown name, an archive that is missing or not the official one, or
      a download that failed.
  """
  if name in dataset_info.OWN:
    return
  if not name.startswith('tfds:') and name not in dataset_info.INFO:
    raise UserError(
      f'unknown data set {name!r}: give one of {", ".join(dataset_info.INFO)}, '
      'tfds:NAME, or one of your own with the --register=FILE.py that registers it'
      f'{registries.did_you_mean(name, dataset_info.INFO)}'
    )
  if _find(name) is None:
    return
  builder = _builder(name, data_dir)
  if _is_prepared(builder):
    return
  tfds = _import_tfds()
  from tensorflow_datasets.core.download import download_manager

  if unused := _unused(name):
    _leave_out(builder, unused)
  config = tfds.download.DownloadConfig(
    manual_dir=archives or None,
    # By default tfds takes any folder in the dataset's place for the dataset.
    download_mode=tfds.download.GenerateMode.REUSE_CACHE_IF_EXISTS,
  )
  files = _archive_names(name, builder)
  try:
    with tempfile.TemporaryDirectory() as unpacked:
      if archives:
        _check_archives(name, builder, archives, unpacked)
      builder.download_and_prepare(download_config=config)
  except download_manager.NonMatchingChecksumError as error:
    raise UserError(
      f'{_first_line(error)}: it is not the official archive of {name}; fetch it again'
    ) from error
  except (tfds.download.DownloadError, OSError) as error:
    raise UserError(
      f'cannot prepare {name} in {builder.data_dir}: {_first_line(error)}; without a '
      f'network, pass as archives a folder that holds {", ".join(files)}'
    ) from error


def _check_archives(name: str, builder, archives: str, unpacked: str) -> None:
  """Refuses a folder without the archives; unpacks those of CIFAR for Python."""
  files = _archive_names(name, builder)
  missing = [f for f in files if not os.path.exists(os.path.join(archives, f))]
  if not missing:
    return
  if name in cifar_archives.ARCHIVES:
    path = pathlib.Path(archives) / cifar_archives.ARCHIVES[name].file
    files.append(f'or {path.name}')
    if path.exists():
      cifar_archives.write_binary(name, path, pathlib.Path(unpacked))
      _use_unpacked(builder, unpacked)
      return
  raise UserError(
    f"--archives={archives} lacks {', '.join(missing)}: put {name}'s official archives "
    f'there ({", ".join(files)}), or leave --archives out to download them'
  )


def import_tensorflow() -> types.ModuleType:
  """Imports and returns tensorflow, quiet and on the CPU alone."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  # It computes nothing here, and on some processors says that it would use oneDNN.
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  import tensorflow as tf

  # Else tensorflow would take the memory of the GPU that jax computes on.
  tf.config.set_visible_devices([], 'GPU')
  return tf


def _open(name: str, official_split: str, data_dir: str, path: str) -> Opened:
  """Opens an official split of any data set."""
  if name == dataset_info.ARRAYS:
    raise UserError(
      "config.dataset.name = 'arrays': its images are only in the Python program that "
      'trained on them; give them there, to train_classifier or evaluate_robustness'
    )
  if name == 'folder':
    return Opened(*own_images.open_folder(path, official_split))
  if name == 'npz':
    return Opened(*own_images.open_npz(path, official_split))
  if _find(name) is None:
    return Opened(*_open_digits(official_split))
  return Opened(*_open_prepared(name, official_split, data_dir))


def _find(name: str) -> str | None:
  """What tensorflow-datasets calls a data set; None for one that it does not read.

  Imports the module that registers its builder, if there is one.
  """
  if name.startswith('tfds:'):
    return name.removeprefix('tfds:')
  if name not in dataset_info.INFO:
    raise UserError(
      f'unknown dataset {name!r}: choose one of {", ".join(dataset_info.INFO)}, '
      f'folder, npz or tfds:NAME{registries.did_you_mean(name, dataset_info.INFO)}'
    )
  info = dataset_info.INFO.get(name)
  if info.tfds_name is None:
    return None
  if info.builder:
    import_tensorflow()
    importlib.import_module(info.builder)
  return info.tfds_name or name


def _open_digits(official_split: str):
  """Size, classes and reader of a split of scikit-learn's digits, 8x8 in 17 greys.

  The images are shuffled once, for good, and then dealt out class by class: 0, 1,
  …, 9, 0, 1, …. So in any prefix of the first 1,000 (train) the classes differ by
  one image at most; the other 797 are the test split.
  """
  from sklearn.datasets import load_digits

  greys, labels = load_digits(return_X_y=True)
  # RandomState and not default_rng: numpy promises its stream for ever.
  shuffled = np.random.RandomState(0).permutation(len(labels))
  rank_in_class = np.empty(len(labels), int)
  for label in range(10):
    members = shuffled[labels[shuffled] == label]
    rank_in_class[members] = np.arange(len(members))
  order = np.lexsort((labels, rank_in_class))

  train_size = dataset_info.INFO['digits'].train_size
  order = order[:train_size] if official_split == 'train' else order[train_size:]
  images = np.rint(greys[order] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
  labels = labels[order].astype(np.int32)
  read = lambda start, stop: (images[start:stop], labels[start:stop])
  return len(labels), 10, read


def _open_prepared(name: str, official_split: str, data_dir: str):
  """Size, classes and reader of a split that tensorflow-datasets has prepared."""
  builder = _builder(name, data_dir)
  if not _is_prepared(builder):
    place = f' --data_dir={data_dir}' if data_dir else ''
    wanted = name
    if not name.startswith('tfds:') and name not in dataset_info.PACKAGED:
      # A command that needs the user's file only where it has the builder.
      own = dataset_info.INFO.get(name).builder
      wanted = f'{name} --register=FILE.py' if own else f'tfds:{_find(name)}'
    raise UserError(
      f'{name} is not prepared in {builder.data_dir}: run `jaxrobust data prepare '
      f'{wanted}{place}`, which downloads it; without a network '
      f'add --archives=FOLDER, a folder with {", ".join(_archive_names(name, builder))}'
    )
  names = dict(zip(('train', 'test'), _splits(name, builder), strict=True))
  split = names[official_split]
  _, label = _features(name, builder)
  num_classes = getattr(label, 'num_classes', None)
  read = lambda start, stop: _read(builder, f'{split}[{start}:{stop}]', stop - start)
  size = builder.info.splits[split].num_examples
  if num_classes is None:  # Plain integers.
    num_classes = 1 + int(read(0, size)[1].max())
  return size, num_classes, read


def _splits(name: str, builder) -> tuple[str, str]:
  """The builder's names of the official training and test splits."""
  if not name.startswith('tfds:'):
    return dataset_info.INFO.get(name).splits
  found = builder.info.splits
  test = 'test' if 'test' in found else 'validation'
  if not {'train', test} <= set(found):
    raise UserError(
      f'{name} has the splits {", ".join(found)}: train, and test or validation, are '
      'needed'
    )
  return 'train', test


def _features(name: str, builder):
  """The features of its images and labels; UserError if these cannot be trained on."""
  features, keys = builder.info.features, builder.info.supervised_keys
  try:
    image, label = (features[key] for key in keys)
    shape = tuple(image.shape)
    fits = len(shape) == 3 and None not in shape and shape[-1] in (1, 3)
    fits &= np.dtype(image.np_dtype) == np.uint8
    fits &= not label.shape and np.dtype(label.np_dtype).kind in 'iu'
  except (TypeError, ValueError, KeyError, AttributeError):
    raise UserError(f'{name} has no pairs of an image and a label') from None
  if not fits:
    raise UserError(
      f'{name} has images {list(shape)} and labels {label}: uint8 images of one size, '
      'of 1 or 3 channels, and integer labels are needed'
    )
  return image, label


def _read(builder, instruction: str, size: int):
  """Decodes `size` examples in stored order."""
  tf, tfds = import_tensorflow(), _import_tfds()

  # One file after the other: by default tfds reads 16 files in turns, which would
  # make the order depend on the number of files. Its cache would hold every
  # image a second time.
  config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
  examples = builder.as_dataset(
    split=instruction, shuffle_files=False, as_supervised=True, read_config=config
  ).batch(_READ_BATCH)
  shape = builder.info.features[builder.info.supervised_keys[0]].shape
  images, labels = np.empty((size, *shape), np.uint8), np.empty(size, np.int32)
  start = 0
  try:
    for image_batch, label_batch in examples.as_numpy_iterator():
      stop = start + len(label_batch)
      images[start:stop], labels[start:stop] = image_batch, label_batch
      start = stop
  except tf.errors.OpError as error:
    raise UserError(
      f'cannot read {instruction} in {builder.data_dir} ({_first_line(error)}): '
      'delete this folder and prepare the dataset again'
    ) from error
  return images, labels


def _builder(name: str, data_dir: str):
  """The tensorflow-datasets builder of a dataset, prepared or not."""
  official_name, tfds = _find(name), _import_tfds()
  try:
    return tfds.builder(official_name, data_dir=data_dir or None)
  except (tfds.core.DatasetNotFoundError, ValueError, TypeError) as error:
    known = tfds.list_builders(with_community_datasets=False)
    near = registries.did_you_mean(re.split('[/:]', str(official_name))[0], known)
    raise UserError(
      f'tensorflow-datasets cannot open {official_name!r}: {_first_line(error)}{near}'
    ) from error


def _is_prepared(builder) -> bool:
  """Whether the dataset is there; tfds alone would warn when its folder is not."""
  return builder.data_path.exists() and builder.is_prepared()


def _archive_names(name: str, builder) -> list[str]:
  """File names of the official archives that are needed."""
  found = (info.filename for info in builder.url_infos.values())
  return sorted(x for x in found if not x.startswith(_unused(name)))


def _unused(name: str) -> tuple[str, ...]:
  """The parts of a data set that are not read."""
  return dataset_info.INFO.get(name).unused if name in dataset_info.INFO else ()


class _Downloads:
  """A download manager that leaves out parts of a data set."""

  def __init__(self, manager, unused: tuple[str, ...]):
    self._manager, self._unused = manager, unused

  def download(self, urls: dict) -> dict:
    """Paths of the parts; None of one that is left out."""
    wanted = {k: url for k, url in urls.items() if k not in self._unused}
    return dict.fromkeys(urls) | self._manager.download(wanted)


def _use_unpacked(builder, folder: str) -> None:
  """Makes a builder read an archive that was unpacked into a folder."""
  make = builder._split_generators
  manager = types.SimpleNamespace(download_and_extract=lambda url: folder)
  builder._split_generators = lambda _: make(manager)


def _leave_out(builder, unused: tuple[str, ...]) -> None:
  """Makes a builder prepare no split of these names."""
  make = builder._split_generators
  builder._split_generators = lambda manager: [
    split for split in make(_Downloads(manager, unused)) if split.name not in unused
  ]


def _first_line(error: Exception) -> str:
  """What an exception of others says, cut to one line."""
  return str(error).partition('\n')[0].rstrip('.:')


def _import_tfds():
  """Imports tensorflow-datasets, after tensorflow."""
  import_tensorflow()
  import tensorflow_datasets as tfds

  return tfds
