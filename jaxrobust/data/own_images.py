"""Images of one's own: a folder of pictures, or an `.npz` of arrays.

  DIR/train/CLASS/*.png     pictures of one size, PNG or JPEG, all grey or in colour;
  DIR/test/CLASS/*.jpg      classes are numbered in sorted order of the training folders
  FILE.npz                  train_images uint8 [n, H, W] or [n, H, W, C], train_labels
                            int [n] or [n, 1], test_images and test_labels; or x_train,
                            y_train, x_test, y_test

Order. Both come class by class as a rule, so training images are shuffled once, for
good: pictures by a hash of their names, arrays by a fixed permutation. "The first n
training images" means that order.
"""

import concurrent.futures
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable

import numpy as np
import PIL.Image
from absl import logging

from jaxrobust.errors import UserError
from jaxrobust.files import arrays

_MAX_SIDE = 2**10  # pixels
_MAX_BYTES = 2**26  # of a file
_MAX_IMAGES_BYTES = 2**37  # of all images of a split
_MAX_CLASSES = 2**15
_ENDINGS = ('.png', '.jpg', '.jpeg')
_MODES = {'L': 1, 'RGB': 3, 'P': 3, 'RGBA': 3}  # of Pillow, and channels they become
_KEYS = (
  ('train_images', 'train_labels', 'test_images', 'test_labels'),
  ('x_train', 'y_train', 'x_test', 'y_test'),
)

Reader = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


def open_folder(path: str, split: str) -> tuple[int, int, Reader]:
  """Opens a split of a folder of pictures.

  Args:
    path: with folders train/CLASS and test/CLASS.
    split: 'train' or 'test'.

  Returns:
    Its size, the number of classes, and `read(start, stop)`: images uint8 [n, H, W, C]
    and labels int32 [n].

  Raises:
    UserError: if there are none, or, when they are read, for a file that is no picture
      of the size of the others.
  """
  root = pathlib.Path(path).expanduser()
  classes = _folders(root / 'train')
  folders = _folders(root / split)
  if unknown := set(folders) - set(classes):
    raise UserError(f'{root} has test images of {min(unknown)!r}, but none to train on')
  if split == 'test' and (unjudged := set(classes) - set(folders)):
    logging.warning('%s has no test images of %s', root, ', '.join(sorted(unjudged)))
  files = [
    (file, classes.index(folder))
    for folder in folders
    for file in _pictures(root / split / folder)
  ]
  if not files:
    raise UserError(f'{root / split} has no PNG or JPEG file in its folders')
  key = lambda x: hashlib.sha256('/'.join(x[0].parts[-2:]).encode()).digest()
  files.sort(key=key)
  first = _decode(_first_training_picture(root, classes))
  is_grey = first.shape[-1] == 1

  def read(start, stop):
    chosen = files[start:stop]
    if (size := first.nbytes * len(chosen)) > _MAX_IMAGES_BYTES:
      raise UserError(f'{root / split} would take {size / 2**30:.0f} GiB of memory')
    images = np.empty((len(chosen), *first.shape), np.uint8)
    decode = functools.partial(_decode, is_grey=is_grey)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for i, image in enumerate(pool.map(decode, (file for file, _ in chosen))):
        if image.shape != first.shape:
          raise UserError(
            f'{chosen[i][0]} is {_size(image)}, and the first picture {_size(first)}: '
            'bring all to one size'
          )
        images[i] = image
    return images, np.array([label for _, label in chosen], np.int32)

  return len(files), len(classes), read


def _folders(path: pathlib.Path) -> list[str]:
  """Names of the classes in the folder of a split."""
  if not path.is_dir():
    raise UserError(f'{path} is no folder: it should have a folder for each class')
  found = [x.name for x in path.iterdir() if x.is_dir() and not x.name.startswith('.')]
  if not 0 < len(found) <= _MAX_CLASSES:
    raise UserError(f'{path} has {len(found)} folders: it should have one a class')
  return sorted(found)


def _pictures(path: pathlib.Path) -> list[pathlib.Path]:
  """The files of a class that should be pictures."""
  return [
    x for x in path.iterdir() if x.suffix.lower() in _ENDINGS and x.name[0] != '.'
  ]


def _first_training_picture(root: pathlib.Path, classes: list[str]) -> pathlib.Path:
  """Whose size and channels all have."""
  for name in classes:
    if found := _pictures(root / 'train' / name):
      return min(found)
  raise UserError(f'{root / "train"} has no PNG or JPEG file in its folders')


def _decode(path: pathlib.Path, is_grey: bool | None = None) -> np.ndarray:
  """A picture as uint8 [H, W, C]; in colour if it is not known to be grey."""
  with arrays.open_file(path) as file:  # No pipe or device, which might block.
    if os.fstat(file.fileno()).st_size > _MAX_BYTES:
      raise UserError(f'{path} has more than {_MAX_BYTES >> 20} MiB: make it smaller')
    try:
      with PIL.Image.open(file, formats=('PNG', 'JPEG')) as image:
        if max(image.size) > _MAX_SIDE:
          raise UserError(
            f'{path} is {image.size[1]}x{image.size[0]}: use at most {_MAX_SIDE} '
            'pixels a side'
          )
        if image.mode not in _MODES:
          raise UserError(f'{path} is a picture of mode {image.mode}: save it as RGB')
        if is_grey is None:
          is_grey = _MODES[image.mode] == 1
        elif is_grey and image.mode != 'L':
          raise UserError(f'{path} is in colour, and the first picture is grey')
        found = np.asarray(image.convert('L' if is_grey else 'RGB'))
    except UserError:
      raise
    except Exception as e:  # Whatever Pillow meets in a damaged file.
      raise UserError(f'{path} is no PNG or JPEG file, or damaged: {e!r:.80}') from None
  return found.reshape(*found.shape[:2], -1)


def _size(image: np.ndarray) -> str:
  return 'x'.join(map(str, image.shape))


def open_npz(path: str, split: str) -> tuple[int, int, Reader]:
  """Opens a split of an `.npz`; arguments, result and errors as of `open_folder`."""
  path = os.path.expanduser(path)
  with arrays.open_npz(path) as archive:
    keys = next((x for x in _KEYS if set(x) <= set(archive.keys)), None)
    if keys is None:
      raise UserError(
        f'{path} holds {arrays.listed(archive.keys)}; it needs {", ".join(_KEYS[0])} '
        f'(or {", ".join(_KEYS[1])})'
      )
    for images in keys[::2]:
      with archive.open(images) as stream:
        if stream.dtype != np.uint8 or len(stream.shape) not in (3, 4):
          raise UserError(
            f'{stream.name} is {stream.dtype} {list(stream.shape)}: images are uint8 '
            '[n, H, W] or [n, H, W, C]'
          )
  chosen = keys[:2] if split == 'train' else keys[2:]
  found = arrays.read_npz(path, {chosen[0]: ('u', None), keys[1]: ('iu', None)})
  images = found[chosen[0]]
  images = images[..., None] if images.ndim == 3 else images
  train_labels = _labels(found[keys[1]], f'{keys[1]} in {path}')
  num_classes = 1 + int(train_labels.max())
  labels = train_labels
  if split == 'test':
    labels = arrays.read_npz(path, {keys[3]: ('iu', None)})[keys[3]]
    labels = _labels(labels, f'{keys[3]} in {path}')
    if labels.max() >= num_classes:
      raise UserError(
        f'{keys[3]} in {path} has label {labels.max()}, of which there are no training '
        'images'
      )
  if len(labels) != len(images) or min(images.shape) < 1:
    raise UserError(
      f'{path} has {len(labels)} labels for {chosen[0]} {list(images.shape)}: give one '
      'an image'
    )
  if images.shape[-1] not in (1, 3) or max(images.shape[1:3]) > _MAX_SIDE:
    raise UserError(
      f'{chosen[0]} in {path} is {list(images.shape)}: images [n, H, W, C] have 1 or 3 '
      f'channels and at most {_MAX_SIDE} pixels a side'
    )
  order = np.arange(len(images))
  if split == 'train':  # RandomState: numpy promises its stream for ever.
    order = np.random.RandomState(0).permutation(len(images))
  read = lambda start, stop: (images[order[start:stop]], labels[order[start:stop]])
  return len(images), num_classes, read


def _labels(found: np.ndarray, name: str) -> np.ndarray:
  """Labels int32 [n] of an array [n] or [n, 1]; UserError for what are none."""
  if found.ndim == 2 and found.shape[1] == 1:
    found = found[:, 0]
  if found.ndim != 1 or not len(found):
    raise UserError(f'{name} is {list(found.shape)}: labels are int [n]')
  if not 0 <= found.min() <= found.max() < _MAX_CLASSES:
    raise UserError(
      f'{name} has labels from {found.min()} to {found.max()}: they are numbers from '
      f'0 to {_MAX_CLASSES - 1}'
    )
  return found.astype(np.int32)
