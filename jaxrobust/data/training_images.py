"""The images that a classifier learns from: a data set or arrays, and a sample set."""

import functools
from typing import NamedTuple

import numpy as np
import tqdm
from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust.config import classifier, dataset_info, fields
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.samples import sample_sets, streams

Arrays = tuple[np.ndarray, np.ndarray]  # images and labels


class TrainingImages(NamedTuple):
  """What a run learns from.

  Attributes:
    real: the training images.
    validation: images that are not trained on; None for none.
    generated: the sample set; None without one.
  """

  real: datasets.Split
  validation: datasets.Split | None
  generated: sample_sets.SampleSet | None

  def checksums(self) -> dict[str, str]:
    """The checksum of each source that there is, by what it is."""
    found = {'training images': self.real.checksum()}
    if self.validation is not None:
      found['validation images'] = self.validation.checksum()
    if self.generated is not None:
      found['generated images'] = self.generated.checksum()
    return found


def record(
  config: config_dict.ConfigDict,
  train: Arrays | None = None,
  validation: Arrays | None = None,
) -> config_dict.ConfigDict:
  """The config with what is known of the images that are not of a known data set.

  Args:
    config: a classifier's; of a run that has begun as `workdirs.continued` gives it.
    train, validation: as of `load`.

  Returns:
    The config, locked, as of `datasets.record`; or for arrays of other shape or classes
    than its data set's with their facts in the place of these.

  Raises:
    UserError: if images are absent, damaged, or no images.
  """
  if train is None:
    return datasets.record(config)
  return _recorded_of(config, *_given(config, train, validation))


def load(
  config: config_dict.ConfigDict,
  slots: tuple[int, int],
  train: Arrays | None = None,
  validation: Arrays | None = None,
) -> TrainingImages:
  """Loads the images that are not given, and opens the sample set.

  The set is compared with its checksums once. Of a set in a bucket the images come in
  the background.

  Args:
    config: a classifier's, as of `record`.
    slots: (start, stop) of the part of the batch that this process feeds.
    train: images uint8 [n, H, W, C] and labels int [n] in 0..K-1, in the place of the
      data set's; the first `config.dataset.validation_images` of them are held out
      unless `validation` is given.
    validation: images and labels that are not trained on, in the place of those.

  Raises:
    UserError: if images are absent, damaged or no images, or validation images are not
      like those of `config.dataset`.
  """
  generated = None
  if config.data.samples:
    part = streams.of_slots(config.data.streams, slots, config.data.batch_size)
    try:
      generated = sample_sets.SampleSet.open(
        config.data.samples, part, in_background=True
      )
    except UserError as e:
      if epath.Path(config.data.samples).exists():
        raise
      raise UserError(f'{e}{classifier.said_of_samples(config)}') from e
    if config.data.verify_samples:
      logging.info('comparing checksums of %s (once)', config.data.samples)
      generated.verify(functools.partial(tqdm.tqdm, desc='checksums', disable=None))
  if train is not None:
    found = TrainingImages(*_given(config, train, validation), generated)
  else:
    real = datasets.of(config.dataset, 'train')
    if validation is not None:
      validation = _split(validation, 'validation')
    elif config.dataset.validation_images:
      validation = datasets.of(config.dataset, 'validation')
    found = TrainingImages(real, validation, generated)
  _check_validation(found.validation, dataset_info.of(config.dataset))
  return found


def _given(config, train, validation) -> tuple[datasets.Split, datasets.Split | None]:
  """The images to train and to validate on, of arrays; UserError if they are none."""
  real, held_out = _split(train, 'train'), 0
  if validation is not None:
    validation = _split(validation, 'validation')
  elif held_out := config.dataset.validation_images:
    validation = datasets.Split(*(x[:held_out] for x in real))
  last = config.dataset.train_images and held_out + config.dataset.train_images
  if not 0 < (last or held_out + 1) <= len(real.labels):
    raise UserError(
      f'train has {len(real.labels)} images, of which '
      f'config.dataset.validation_images = {held_out} are held out and '
      f'config.dataset.train_images = {config.dataset.train_images} are trained on: '
      'give more images, or lower one of the two'
    )
  return datasets.Split(*(x[held_out:last] for x in real)), validation


def _recorded_of(config, real: datasets.Split, validation: datasets.Split | None):
  """The config with what is known of arrays, unless they are as its data set's."""
  dataset, shape = config.dataset, real.images.shape[1:]
  splits = [real] if validation is None else [real, validation]
  num_classes = 1 + max(int(x.labels.max()) for x in splits)
  if not dataset_info.is_own(dataset):
    info = dataset_info.of(dataset)
    if shape == info.image_shape and num_classes <= info.num_classes:
      return config
  config = fields.replace(
    config,
    {
      'dataset.name': dataset_info.ARRAYS,
      'dataset.path': '',
      'dataset.image_shape': shape,
      'dataset.num_classes': max(num_classes, dataset.num_classes or 2),
      'dataset.train_size': len(real.labels),
      'dataset.test_size': 0,
    },
  )
  if dataset_info.has_others_normalisation(config):
    mean, std = datasets.normalisation(real.images)
    config = fields.replace(config, {'model.mean': mean, 'model.std': std})
  return config


def _split(arrays, name: str) -> datasets.Split:
  """Images and labels of the caller's; UserError if they are none."""
  try:
    images, labels = (np.asarray(x) for x in arrays)
  except (TypeError, ValueError) as e:
    raise UserError(f'{name} is not a pair of images and labels: {e}') from e
  if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
    raise UserError(
      f'{name}: images are {images.dtype} {list(images.shape)}; give uint8 [n, H, W, C]'
      ' from 0 to 255, such as np.rint(255 * images).astype(np.uint8)'
    )
  if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
    raise UserError(
      f'{name}: labels are {labels.dtype} {list(labels.shape)} for {len(images)} '
      'images; give a whole number from 0 for each'
    )
  if not 0 <= labels.min() <= labels.max() < 2**15:
    raise UserError(
      f'{name}: labels are from {labels.min()} to {labels.max()}; number the classes '
      'from 0'
    )
  return datasets.Split(images, labels.astype(np.int32))


def _check_validation(split: datasets.Split | None, info: dataset_info.DatasetInfo):
  """Refuses validation images that the network does not take."""
  if split is None:
    return
  if (shape := split.images.shape[1:]) != tuple(info.image_shape):
    raise UserError(
      f'validation has images {list(shape)}, train {list(info.image_shape)}: give '
      'images of one shape'
    )
  if split.labels.max() >= info.num_classes:
    raise UserError(
      f'validation has the label {split.labels.max()}: {info.name} has '
      f'{info.num_classes} classes, from 0'
    )
