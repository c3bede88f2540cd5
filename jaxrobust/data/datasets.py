"""The real datasets: whole splits as uint8 arrays, in one fixed order.

Order. The digits come in an order of our own (see `_open_digits`); every other
dataset in the order in which tensorflow-datasets stores it, which is a hash of each
example's key: the same on every machine, whatever the number of shards, and mixed
in the classes. "The first n training images" always means this order.

Splits. `train` and `validation` are cut from the official training images, `test`
is the official test split, whole. SVHN's `extra` images are not used. The official
test labels of TinyImageNet are not public, so its official validation split is the
test split here.

Importing this module imports neither tensorflow nor scikit-learn.
"""

import os
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxrobust.config import dataset_info
from jaxrobust.errors import UserError


class Split(NamedTuple):
  """Images uint8 [n, H, W, C] in 0..255 and labels int32 [n] in 0..K-1."""

  images: np.ndarray
  labels: np.ndarray

  def checksum(self) -> str:
    """Of all of it, by which machines tell whether they hold the same."""
    images, labels = map(np.ascontiguousarray, self)
    return f'{zlib.crc32(labels, zlib.crc32(images)):08x}'


SPLITS = ('train', 'validation', 'test')

_READ_BATCH = 1_000


def load(
  name: str,
  split: str,
  *,
  data_dir: str = '',
  train_images: int | None = None,
  validation_images: int = 0,
) -> Split:
  """Loads one split of a real dataset into memory.

  Args:
    name: a key of `dataset_info.INFO`.
    split: 'train', 'validation' or 'test'.
    data_dir: folder of the prepared tensorflow-datasets, local or `gs://`; '' for
      their default (`$TFDS_DATA_DIR` or `~/tensorflow_datasets`). Digits need none.
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
  _check_name(name)
  if split not in SPLITS:
    raise UserError(f'unknown split {split!r}: choose one of {", ".join(SPLITS)}')
  official_split = 'test' if split == 'test' else 'train'
  if name == 'digits':
    size, read = _open_digits(official_split)
  else:
    size, read = _open_prepared(name, official_split, data_dir)
  if split == 'test':
    return read(0, size)

  if not 0 <= validation_images < size:
    raise UserError(
      f'validation_images={validation_images}: {name} has {size} training images, '
      f'of which 0 to {size - 1} can be held out'
    )
  if split == 'validation':
    if validation_images == 0:
      raise UserError(
        f'validation_images=0 leaves {name} without a validation split: hold out 1 '
        f'to {size - 1} training images'
      )
    return read(0, validation_images)

  available = size - validation_images
  if train_images is None:
    train_images = available
  if not 1 <= train_images <= available:
    raise UserError(
      f'train_images={train_images}: {name} has {available} training images when '
      f'{validation_images} are held out; choose 1 to {available}, or None for all'
    )
  return read(validation_images, validation_images + train_images)


def prepare(name: str, *, data_dir: str = '', archives: str = '') -> None:
  """Writes a dataset where `load` finds it; `python -m jaxrobust.data prepare`.

  Runs the tensorflow-datasets builder, which checks every archive's checksum. A
  dataset that is already there is left as it is.

  Args:
    name: a key of `dataset_info.INFO`; for the digits, which are part of scikit-learn,
      nothing happens.
    data_dir: as in `load`.
    archives: folder with the official archives under their official names; then
      nothing is downloaded. '' downloads them.

  Raises:
    UserError: unknown name, an archive that is missing or not the official one, or
      a download that failed.
  """
  _check_name(name)
  if name == 'digits':
    return
  builder = _builder(name, data_dir)
  if _is_prepared(builder):
    return
  tfds = _import_tfds()
  from tensorflow_datasets.core.download import download_manager

  files = _archive_names(builder)
  if archives:
    missing = [f for f in files if not os.path.exists(os.path.join(archives, f))]
    if missing:
      raise UserError(
        f"archives={archives} lacks {', '.join(missing)}: put {name}'s official "
        f'archives there ({", ".join(files)}), or leave archives out to download them'
      )
  config = tfds.download.DownloadConfig(
    manual_dir=archives or None,
    # By default tfds takes any folder in the dataset's place for the dataset.
    download_mode=tfds.download.GenerateMode.REUSE_CACHE_IF_EXISTS,
  )
  try:
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


def import_tensorflow():
  """Imports and returns tensorflow, quiet and on the CPU alone."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  # It computes nothing here, and on some processors says that it would use oneDNN.
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  import tensorflow as tf

  # Else tensorflow would take the memory of the GPU that jax computes on.
  tf.config.set_visible_devices([], 'GPU')
  return tf


def _check_name(name: str) -> None:
  """Refuses a name that is not in `dataset_info.INFO`."""
  if name not in dataset_info.INFO:
    raise UserError(
      f'unknown dataset {name!r}: choose one of {", ".join(dataset_info.INFO)}'
    )


def _open_digits(official_split: str) -> tuple[int, Callable[[int, int], Split]]:
  """Size and reader of a split of scikit-learn's digits, 8x8 in 17 greys.

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
  return len(labels), lambda start, stop: Split(images[start:stop], labels[start:stop])


def _open_prepared(
  name: str, official_split: str, data_dir: str
) -> tuple[int, Callable[[int, int], Split]]:
  """Size and reader of a split that tensorflow-datasets has prepared."""
  builder = _builder(name, data_dir)
  if not _is_prepared(builder):
    place = f' --data_dir={data_dir}' if data_dir else ''
    raise UserError(
      f'{name} is not prepared in {builder.data_dir}: run `python -m '
      f'jaxrobust.data prepare {name}{place}`, which downloads it; without a network '
      f'add --archives=FOLDER, a folder with {", ".join(_archive_names(builder))}'
    )
  if name == 'tiny_imagenet' and official_split == 'test':
    official_split = 'validation'
  size = builder.info.splits[official_split].num_examples

  def read(start: int, stop: int) -> Split:
    return _read(builder, f'{official_split}[{start}:{stop}]', stop - start)

  return size, read


def _read(builder, instruction: str, size: int) -> Split:
  """Decodes `size` examples in stored order."""
  tf, tfds = import_tensorflow(), _import_tfds()

  # One file after the other: by default tfds reads 16 files in turns, which would
  # make the order depend on the number of files. Its cache would hold every
  # image a second time.
  config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
  examples = builder.as_dataset(
    split=instruction, shuffle_files=False, as_supervised=True, read_config=config
  ).batch(_READ_BATCH)
  shape = builder.info.features['image'].shape
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
  return Split(images, labels)


def _builder(name: str, data_dir: str):
  """The tensorflow-datasets builder of a dataset, prepared or not."""
  tfds = _import_tfds()
  if name == 'tiny_imagenet':
    from jaxrobust.data import tiny_imagenet  # noqa: F401 (registers the builder)
  official_name = 'svhn_cropped' if name == 'svhn' else name
  return tfds.builder(official_name, data_dir=data_dir or None)


def _is_prepared(builder) -> bool:
  """Whether the dataset is there; tfds alone would warn when its folder is not."""
  return builder.data_path.exists() and builder.is_prepared()


def _archive_names(builder) -> list[str]:
  """File names of the official archives."""
  return sorted(info.filename for info in builder.url_infos.values())


def _first_line(error: Exception) -> str:
  """What an exception of others says, cut to one line."""
  return str(error).partition('\n')[0].rstrip('.:')


def _import_tfds():
  """Imports tensorflow-datasets, after tensorflow."""
  import_tensorflow()
  import tensorflow_datasets as tfds

  return tfds
