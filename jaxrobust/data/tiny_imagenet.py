"""TinyImageNet-200 as a tensorflow-datasets builder over the official archive.

Importing this module imports tensorflow-datasets and registers `tiny_imagenet`.
Class k is the k-th WordNet id of `wnids.txt` in sorted order, not in the order of
the file: that is the numbering of every loader that sorts the training folders
(torchvision's `ImageFolder`), hence of the checkpoints trained with one.
"""

import io
import pathlib
import zipfile

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

_URL = 'https://cs231n.stanford.edu/tiny-imagenet-200.zip'
_ROOT = 'tiny-imagenet-200'


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
  """The 200-class subset of ImageNet at 64x64 (Stanford CS231n).

  Splits `train` (100,000 images) and `validation` (10,000). The official test
  split has no labels and is left out.
  """

  VERSION = tfds.core.Version('1.0.0')

  # tfds looks for these files in its manual folder before it downloads them, and
  # refuses a file with another checksum.
  url_infos = {
    _URL: checksums.UrlInfo(
      size=248_100_043,
      checksum='6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821',
      filename='tiny-imagenet-200.zip',
    )
  }

  def _info(self) -> tfds.core.DatasetInfo:
    """Features of an example; the class names come from the archive."""
    return tfds.core.DatasetInfo(
      builder=self,
      description='200 classes of ImageNet, 500 training images each, at 64x64.',
      features=tfds.features.FeaturesDict(
        {
          'id': tfds.features.Text(),
          'image': tfds.features.Image(shape=(64, 64, 3), encoding_format='jpeg'),
          'label': tfds.features.ClassLabel(num_classes=200),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://cs231n.stanford.edu/',
    )

  def _split_generators(self, dl_manager):
    """The two labelled splits."""
    # Read in place: unpacking would write 110,000 small files.
    archive = dl_manager.download(_URL)
    with archive.open('rb') as file, zipfile.ZipFile(file) as files:
      wnids = files.read(f'{_ROOT}/wnids.txt').decode().split()
    self.info.features['label'].names = sorted(wnids)
    return {
      'train': self._generate_examples(archive, _train_images),
      'validation': self._generate_examples(archive, _validation_images),
    }

  def _generate_examples(self, archive, list_images):
    """Yields (file name, example), the JPEG bytes kept as they are."""
    with archive.open('rb') as file, zipfile.ZipFile(file) as files:
      for path, wnid in list_images(files):
        image = io.BytesIO(files.read(str(path)))
        yield path.name, {'id': path.name, 'image': image, 'label': wnid}


def _train_images(files: zipfile.ZipFile):
  """Yields (path, wnid): the class is the folder `train/<wnid>/images`."""
  for name in files.namelist():
    path = pathlib.PurePosixPath(name)
    if path.match(f'{_ROOT}/train/*/images/*.JPEG'):
      yield path, path.parent.parent.name


def _validation_images(files: zipfile.ZipFile):
  """Yields (path, wnid): the class stands in `val_annotations.txt`."""
  annotations = files.read(f'{_ROOT}/val/val_annotations.txt').decode()
  for line in annotations.splitlines():
    image, wnid = line.split('\t')[:2]
    yield pathlib.PurePosixPath(_ROOT, 'val', 'images', image), wnid
