"""What is known of data sets without opening them, and the fields that choose one.

To add a data set that tensorflow-datasets has, register what is known of it:

  registries.DATASETS.register(
    'fashion_mnist',
    dataset_info.DatasetInfo(
      'fashion_mnist', (28, 28, 1), 10, 60_000, 10_000, mean=(0.286,), std=(0.353,)
    ),
  )

Your own images need no registration: `--config.dataset.name=folder`, `npz` or
`tfds:NAME`, see `data/datasets.py`. What is read of them is recorded in the config.
"""

import os
import re
from typing import NamedTuple

from ml_collections import config_dict

from jaxrobust.config import registries
from jaxrobust.config.fields import field
from jaxrobust.errors import UnknownNameError, UserError

OWN = ('folder', 'npz')  # on disk; and tfds:NAME
ARRAYS = 'arrays'  # given to a function in Python


class DatasetInfo(NamedTuple):
  """What is known of a data set without opening it.

  Attributes:
    name: that configs, cards and folders have.
    image_shape: (H, W, C).
    num_classes: K.
    train_size: of the official training split.
    test_size: of the official test split.
    mean: subtracted from each channel of images in [0, 1].
    std: by which each channel is divided then.
    tfds_name: that tensorflow-datasets has for it; '' for the same. None if it is not
      read by it.
    splits: its names there of the official training and test splits.
    unused: parts of it that are not read, so that their archives are not asked for.
    builder: module that registers its builder; '' if tensorflow-datasets has it.
    is_bundled: whether it comes with the package's dependencies, so that it can be
      read anywhere at once.
  """

  name: str
  image_shape: tuple[int, int, int]
  num_classes: int
  train_size: int
  test_size: int
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()
  tfds_name: str | None = ''
  splits: tuple[str, str] = ('train', 'test')
  unused: tuple[str, ...] = ()
  builder: str = ''
  is_bundled: bool = False


INFO = registries.DATASETS
for _info in (
  DatasetInfo(
    'digits',
    (8, 8, 1),
    num_classes=10,
    train_size=1_000,
    test_size=797,
    mean=(0.5,),
    std=(0.5,),
    tfds_name=None,
    is_bundled=True,
  ),
  DatasetInfo(
    'cifar10',
    (32, 32, 3),
    num_classes=10,
    train_size=50_000,
    test_size=10_000,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
  ),
  DatasetInfo(
    'cifar100',
    (32, 32, 3),
    num_classes=100,
    train_size=50_000,
    test_size=10_000,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
  ),
  DatasetInfo(
    'svhn',
    (32, 32, 3),
    num_classes=10,
    train_size=73_257,
    test_size=26_032,
    mean=(0.5, 0.5, 0.5),  # as is common for it
    std=(0.5, 0.5, 0.5),
    tfds_name='svhn_cropped',
    unused=('extra',),
  ),
  DatasetInfo(
    'mnist',
    (28, 28, 1),
    num_classes=10,
    train_size=60_000,
    test_size=10_000,
    mean=(0.5,),  # as the released checkpoint expects
    std=(0.5,),
  ),
  DatasetInfo(
    'tiny_imagenet',
    (64, 64, 3),
    num_classes=200,
    train_size=100_000,
    test_size=10_000,
    mean=(0.4802, 0.4481, 0.3975),
    std=(0.2302, 0.2265, 0.2262),
    splits=('train', 'validation'),  # The official test labels are not public.
    builder='jaxrobust.data.tiny_imagenet',
  ),
):
  INFO.register(_info.name, _info)
PACKAGED = tuple(INFO)  # without those of the user's files

FIELDS = {
  'name': field(
    'cifar10',
    'digits cifar10 cifar100 svhn mnist tiny_imagenet; or your own images: folder or '
    'npz (with dataset.path), or tfds:NAME[/CONFIG], any of tensorflow-datasets with '
    'images of one size and integer labels',
  ),
  'path': field(
    '',
    'of your own images: the folder with train/CLASS/*.png (or .jpg) and test/CLASS/, '
    'or the file with the arrays train_images, train_labels, test_images, test_labels',
  ),
  'data_dir': field('', "folder of tensorflow-datasets; '' is its default", free=True),
  'validation_images': field(
    1024,
    'training images held out, the first ones; a tenth of images of your own of which '
    '1,024 are more than half. The papers hold out 1,024 to choose the '
    'checkpoint; the released code trains on all 50,000 (set 0, and checkpoint.export '
    "to 'last')",
    least=0,
  ),
  'train_images': field(
    None,
    'use only the first so many of the remaining training images; None is all',
    type=int,
    above=0,
  ),
  'image_shape': field(
    None,
    'height, width and channels of your own images; it and the next three are filled '
    'in when they are read first',
    type=tuple,
    above=0,
  ),
  'num_classes': field(None, 'of your own images', type=int, above=0),
  'train_size': field(None, 'training images of your own', type=int, above=0),
  'test_size': field(None, 'test images of your own', type=int, least=0),
}
RECORDED = ('image_shape', 'num_classes', 'train_size', 'test_size')


def held_out(validation_images: int, train_size: int) -> int:
  """Training images of one's own to hold out: a tenth of few where none are asked for.

  Args:
    validation_images: of the config. Its default is not asked for.
    train_size: training images there are.

  Returns:
    `validation_images`, unless that is the default and more than half of them.
  """
  usual = FIELDS['validation_images'].default
  is_too_many = validation_images == usual and 2 * usual > train_size
  return train_size // 10 if is_too_many else validation_images


def size_of(dataset: config_dict.ConfigDict, split: str) -> int:
  """Images of a split of a config's `dataset`: 'train', 'validation' or 'test'."""
  info, held_out = of(dataset), dataset.validation_images
  sizes = {
    'test': info.test_size,
    'validation': held_out,
    'train': dataset.train_images or info.train_size - held_out,
  }
  return sizes[split]


def is_own(dataset: config_dict.ConfigDict) -> bool:
  """Whether a config's `dataset` names the user's own images, or any builder."""
  return dataset.name in (*OWN, ARRAYS) or dataset.name.startswith('tfds:')


def check(dataset: config_dict.ConfigDict) -> None:
  """Raises UserError unless a config's `dataset` names one."""
  if not is_own(dataset):
    if dataset.name not in INFO:
      raise UnknownNameError(
        f'config.dataset.name = {dataset.name!r}: use one of {", ".join(INFO)}, '
        f'folder, npz or tfds:NAME{registries.did_you_mean(dataset.name, INFO)}'
      )
  elif dataset.name in OWN and not dataset.path:
    what = {'folder': 'the folder with train/ and test/', 'npz': 'the .npz file'}
    raise UserError(
      f'config.dataset.path is not set: give {what[dataset.name]} of '
      f'config.dataset.name={dataset.name}'
    )


def identity(dataset: config_dict.ConfigDict) -> dict:
  """What a config's `dataset` says of which images they are, for protocols of results.

  It has what protocols had before own images could be given, and no more where they are
  not.
  """
  found = dataset.to_dict() | {'data_dir': ''}
  younger = ('path', *RECORDED)
  return {k: x for k, x in found.items() if k not in younger or x not in (None, '')}


def label(dataset: config_dict.ConfigDict) -> str:
  """The name of a config's `dataset` in names of runs: of your own the file's."""
  if dataset.name in OWN:
    name = os.path.basename(dataset.path.rstrip('/')).removesuffix('.npz')
  else:
    name = dataset.name.removeprefix('tfds:')
  name = re.sub(r'[^\w.-]+', '-', name) or dataset.name
  return f'own-{name}' if is_own(dataset) and name in INFO else name


def of(dataset: config_dict.ConfigDict) -> DatasetInfo:
  """What is known of the data set of a config.

  Args:
    dataset: a config's `dataset`.

  Raises:
    UserError: for an unknown name, or own images that were not read yet.
  """
  check(dataset)
  if not is_own(dataset):
    return INFO.get(dataset.name)
  if None in (values := [dataset[name] for name in RECORDED]):
    raise UserError(
      f'nothing is known yet of config.dataset.name = {dataset.name!r}: train or '
      'generate from it first, or set config.dataset.'
      + ', config.dataset.'.join(RECORDED)
    )
  return DatasetInfo(label(dataset), *values)


def has_others_normalisation(config: config_dict.ConfigDict) -> bool:
  """Whether a classifier's config normalises own images as those of a known data set.

  So it does where nothing was set; mean and deviation of the images take their place.
  """
  here = (tuple(config.model.mean), tuple(config.model.std))
  known = [(info.mean, info.std) for info in map(INFO.get, INFO)]
  return is_own(config.dataset) and here in known
