"""Real datasets: small archives in the official formats, through the real builders.

What differs from a real preparation: the archives are small, so their checksums are
registered in place of the official ones, and MNIST's builder is told their sizes.
"""

import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.image_classification import mnist

from jaxrobust.config import classifier, dataset_info, experiments, registries
from jaxrobust.data import __main__ as command
from jaxrobust.data import cifar_archives, datasets, tiny_imagenet
from jaxrobust.errors import UserError

TRAIN, TEST = 60, 20
WNIDS = [f'n{(7919 * i) % 100_000:08d}' for i in range(200)]


def random_split(shape, num_classes, size, seed):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (size, *shape), np.uint8)
  return images, rng.integers(0, num_classes, size)


def official_splits(name):
  info = dataset_info.INFO[name]
  return {
    split: random_split(info.image_shape, info.num_classes, size, size)
    for split, size in (('train', TRAIN), ('test', TEST))
  }


def cifar_binary(images, *label_bytes):
  """Label bytes, then the red, the green and the blue plane of each image."""
  planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
  return np.column_stack([*label_bytes, planes]).astype(np.uint8).tobytes()


def write_tar(path, files):
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))


def write_cifar10(folder, splits):
  images, labels = splits['train']
  files = {'batches.meta.txt': '\n'.join(f'c{k}' for k in range(10)).encode() + b'\n\n'}
  for i, part in enumerate(np.split(np.arange(TRAIN), 5)):
    files[f'data_batch_{i + 1}.bin'] = cifar_binary(images[part], labels[part])
  files['test_batch.bin'] = cifar_binary(*splits['test'])
  write_tar(
    folder / 'cifar-10-binary.tar.gz',
    {f'cifar-10-batches-bin/{name}': content for name, content in files.items()},
  )


def write_cifar100(folder, splits):
  files = {
    f'{kind}_label_names.txt': '\n'.join(f'{kind}{k}' for k in range(n)).encode()
    for kind, n in (('coarse', 20), ('fine', 100))
  }
  for split, (images, labels) in splits.items():
    files[f'{split}.bin'] = cifar_binary(images, labels // 5, labels)
  write_tar(
    folder / 'cifar-100-binary.tar.gz',
    {f'cifar-100-binary/{name}': content for name, content in files.items()},
  )


def write_svhn(folder, splits):
  # Without `extra`, which is not read.
  for split, (images, labels) in splits.items():
    # Images stand along the last axis; the digit 0 is labelled 10.
    content = {
      'X': images.transpose(1, 2, 3, 0),
      'y': np.where(labels == 0, 10, labels).astype(np.uint8)[:, None],
    }
    scipy.io.savemat(folder / f'{split}_32x32.mat', content)


def write_mnist(folder, splits):
  for split, prefix in (('train', 'train'), ('test', 't10k')):
    images, labels = splits[split]
    header = struct.pack('>IIII', 0x803, len(images), 28, 28)
    with gzip.open(folder / f'{prefix}-images-idx3-ubyte.gz', 'wb') as file:
      file.write(header + images.tobytes())
    with gzip.open(folder / f'{prefix}-labels-idx1-ubyte.gz', 'wb') as file:
      file.write(struct.pack('>II', 0x801, len(labels)))
      file.write(labels.astype(np.uint8).tobytes())


def jpeg(image, mode='RGB'):
  file = io.BytesIO()
  Image.fromarray(image).convert(mode).save(file, 'JPEG', quality=90)
  return file.getvalue()


def write_tiny_imagenet(folder, splits):
  """Also puts what PIL decodes in the place of the images in `splits`."""
  root = 'tiny-imagenet-200'
  with zipfile.ZipFile(folder / 'tiny-imagenet-200.zip', 'w') as archive:
    archive.writestr(f'{root}/wnids.txt', '\n'.join(WNIDS) + '\n')
    archive.writestr(f'{root}/words.txt', ''.join(f'{w}\ta word\n' for w in WNIDS))
    archive.writestr(f'{root}/test/images/test_0.JPEG', b'not a labelled image')
    for wnid in WNIDS:
      archive.writestr(f'{root}/train/{wnid}/{wnid}_boxes.txt', '')
    annotations = []
    for split, (images, labels) in splits.items():
      for i, label in enumerate(labels):
        wnid = sorted(WNIDS)[label]
        # Smooth, unlike noise: decoders differ where chroma is upsampled.
        smooth = np.asarray(Image.fromarray(images[i, :8, :8]).resize((64, 64)))
        # A few of the official images are grey.
        content = jpeg(smooth, 'L' if i % 10 == 0 else 'RGB')
        images[i] = np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))
        if split == 'train':
          name = f'train/{wnid}/images/{wnid}_{i}.JPEG'
        else:
          name = f'val/images/val_{i}.JPEG'
          annotations.append(f'val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n')
        archive.writestr(f'{root}/{name}', content)
    archive.writestr(f'{root}/val/val_annotations.txt', ''.join(annotations))


WRITERS = {
  'cifar10': write_cifar10,
  'cifar100': write_cifar100,
  'svhn': write_svhn,
  'mnist': write_mnist,
  'tiny_imagenet': write_tiny_imagenet,
}


BUILDERS = {
  name: tfds.builder_cls('svhn_cropped' if name == 'svhn' else name) for name in WRITERS
}
OFFICIAL_ARCHIVES = {name: cls.url_infos for name, cls in BUILDERS.items()}


def register_archives(patch, name, archives):
  """Registers the checksums of the small archives in place of the official ones."""
  infos = {
    url: checksums.compute_url_info(archives / info.filename)
    for url, info in OFFICIAL_ARCHIVES[name].items()
    if (archives / info.filename).exists()
  }
  patch.setattr(BUILDERS[name], 'url_infos', infos)


@pytest.fixture(scope='module')
def registry():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checksums, 'get_all_url_infos', dict)
    # CIFAR-100's builder derives from CIFAR-10's and would inherit its archives.
    for name, cls in BUILDERS.items():
      patch.setattr(cls, 'url_infos', OFFICIAL_ARCHIVES[name])
    patch.setattr(mnist, '_TRAIN_EXAMPLES', TRAIN)
    patch.setattr(mnist, '_TEST_EXAMPLES', TEST)
    yield patch


@pytest.fixture(scope='module')
def prepared(registry, tmp_path_factory):
  """Prepares a dataset on demand: name → (splits as written, data_dir)."""
  done = {}
  data_dir = tmp_path_factory.mktemp('data')

  def get(name):
    if name not in done:
      archives, splits = tmp_path_factory.mktemp(name), official_splits(name)
      WRITERS[name](archives, splits)
      register_archives(registry, name, archives)
      arguments = [name, f'--data_dir={data_dir}', f'--archives={archives}']
      assert command.main(['prepare', *arguments]) == 0
      done[name] = splits, str(data_dir), archives
    return done[name]

  return get


def written_index(written, image):
  """Index of the written image nearest to a loaded one."""
  distances = np.abs(written.astype(np.int32) - image).mean(axis=(1, 2, 3))
  return int(np.argmin(distances))


@pytest.mark.parametrize('name', WRITERS)
@pytest.mark.parametrize('split', ['train', 'test'])
def test_loads_what_the_archives_hold(prepared, name, split):
  splits, data_dir, _ = prepared(name)
  images, labels = splits[split]
  loaded = datasets.load(name, split, data_dir=data_dir)
  assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int32
  assert loaded.images.shape == images.shape
  order = [written_index(images, image) for image in loaded.images]
  assert sorted(order) == list(range(len(images)))
  np.testing.assert_array_equal(loaded.labels, labels[order])
  if name == 'tiny_imagenet':
    # Two JPEG decoders may round the inverse transform and the upsampled chroma
    # differently by a few grey levels; another image is 50 levels away on average.
    difference = np.abs(loaded.images.astype(int) - images[order])
    assert difference.max() <= 8 and difference.mean() <= 2
  else:
    np.testing.assert_array_equal(loaded.images, images[order])


def test_order_is_that_of_tfds(prepared):
  _, data_dir, _ = prepared('cifar10')
  reference = tfds.load('cifar10', split='train', data_dir=data_dir, download=False)
  reference = list(reference.as_numpy_iterator())
  loaded = datasets.load('cifar10', 'train', data_dir=data_dir)
  np.testing.assert_array_equal(loaded.images, [e['image'] for e in reference])
  np.testing.assert_array_equal(loaded.labels, [e['label'] for e in reference])


def test_order_does_not_depend_on_the_number_of_files(prepared, tmp_path):
  _, data_dir, archives = prepared('mnist')
  config = tfds.download.DownloadConfig(manual_dir=archives, num_shards=3)
  builder = tfds.builder('mnist', data_dir=tmp_path)
  builder.download_and_prepare(download_config=config)
  assert builder.info.splits['train'].num_shards == 3
  one = datasets.load('mnist', 'train', data_dir=data_dir)
  several = datasets.load('mnist', 'train', data_dir=str(tmp_path))
  np.testing.assert_array_equal(one.images, several.images)
  # Cuts must fall on the same images whatever the files.
  cut = datasets.load(
    'mnist', 'train', data_dir=str(tmp_path), train_images=30, validation_images=7
  )
  np.testing.assert_array_equal(cut.images, one.images[7:37])


@pytest.mark.parametrize('name', ['digits', 'cifar10'])
def test_hold_out(prepared, name):
  data_dir = prepared(name)[1] if name in WRITERS else ''
  whole = datasets.load(name, 'train', data_dir=data_dir)
  test = datasets.load(name, 'test', data_dir=data_dir)

  def load(split, train_images=None):
    return datasets.load(
      name,
      split,
      data_dir=data_dir,
      train_images=train_images,
      validation_images=13,
    )

  for loaded, expected in (
    (load('validation'), (whole.images[:13], whole.labels[:13])),
    (load('validation', 5), (whole.images[:13], whole.labels[:13])),
    (load('train'), (whole.images[13:], whole.labels[13:])),
    (load('train', 5), (whole.images[13:18], whole.labels[13:18])),
    (load('train', len(whole.labels) - 13), (whole.images[13:], whole.labels[13:])),
    (load('test', 5), test),
  ):
    np.testing.assert_array_equal(loaded.images, expected[0])
    np.testing.assert_array_equal(loaded.labels, expected[1])


@pytest.mark.parametrize(
  ('split', 'arguments', 'told'),
  [
    ('train', {'validation_images': -1}, '0 to 999'),
    ('train', {'validation_images': 1_000}, '0 to 999'),
    ('validation', {'validation_images': 1_000}, '0 to 999'),
    ('validation', {}, '1 to 999'),
    ('train', {'train_images': 0}, '1 to 1000'),
    ('train', {'train_images': 1_001}, '1 to 1000'),
    ('train', {'train_images': 801, 'validation_images': 200}, '1 to 800'),
    ('extra', {}, "'extra': choose one of train, validation, test"),
  ],
)
def test_refuses_numbers_out_of_range(split, arguments, told):
  with pytest.raises(UserError, match=told) as error:
    datasets.load('digits', split, **arguments)
  assert '\n' not in str(error.value)


def test_digits_are_those_of_scikit_learn():
  train, test = datasets.load('digits', 'train'), datasets.load('digits', 'test')
  for split, size in ((train, 1_000), (test, 797)):
    assert split.images.shape == (size, 8, 8, 1) and split.images.dtype == np.uint8
    assert split.labels.shape == (size,) and split.labels.dtype == np.int32
  greys, labels = load_digits(return_X_y=True)
  # 0..16 → 0..255, half a level up: floor(v * 255 / 16 + 1/2) in integers.
  levels = (greys.astype(int) * 510 + 16) // 32
  source = sorted((*row, label) for row, label in zip(levels, labels, strict=True))
  ours = sorted(
    (*image.ravel(), label)
    for split in (train, test)
    for image, label in zip(split.images, split.labels, strict=True)
  )
  # The same 1,797 pairs, each once: train and test cannot share one.
  np.testing.assert_array_equal(ours, source)
  assert train.images.min() == 0 and train.images.max() == 255


def test_digits_prefixes_are_balanced():
  train = datasets.load('digits', 'train')
  counts = np.cumsum(train.labels[:, None] == np.arange(10), axis=0)
  assert (np.ptp(counts, axis=1) <= 1).all()
  assert (counts[-1] == 100).all()
  # Shuffled: not the first hundred images of each class in scikit-learn's order.
  greys, labels = load_digits(return_X_y=True)
  zeros = greys[labels == 0][:100].reshape(-1, 8, 8, 1) * (255 / 16)
  assert np.abs(zeros - train.images[train.labels == 0]).mean() > 10


def test_digits_are_the_same_each_time():
  first, second = datasets.load('digits', 'test'), datasets.load('digits', 'test')
  np.testing.assert_array_equal(first.images, second.images)
  np.testing.assert_array_equal(first.labels, second.labels)


@pytest.mark.parametrize('name', WRITERS)
def test_absent_dataset_names_the_remedy(tmp_path, name):
  with pytest.raises(UserError) as error:
    datasets.load(name, 'test', data_dir=str(tmp_path))
  told = str(error.value)
  assert '\n' not in told and str(tmp_path) in told
  assert f'jaxrobust data prepare {name} --data_dir={tmp_path}' in told
  assert '--archives=' in told


def test_a_folder_without_the_dataset_is_absent_and_is_replaced(
  registry, prepared, tmp_path
):
  _, _, archives = prepared('cifar10')
  (tmp_path / 'cifar10' / '3.0.2').mkdir(parents=True)
  with pytest.raises(UserError, match='not prepared'):
    datasets.load('cifar10', 'train', data_dir=str(tmp_path))
  datasets.prepare('cifar10', data_dir=str(tmp_path), archives=str(archives))
  assert len(datasets.load('cifar10', 'train', data_dir=str(tmp_path)).labels) == TRAIN


def test_unknown_name():
  for function in (lambda name: datasets.load(name, 'train'), datasets.prepare):
    with pytest.raises(UserError, match="'cifar': .*one of digits, cifar10"):
      function('cifar')


def write_python(folder, name, splits):
  """CIFAR's archive for Python, in pickles of protocol 2."""
  known = cifar_archives.ARCHIVES[name]
  names = {key: [f'{key}{k}' for k in range(100)] for key in known.names}
  files = {known.meta: names}
  if name == 'cifar10':
    files[known.meta]['label_names'] = [f'c{k}' for k in range(10)]
    parts = np.split(np.arange(TRAIN), 5)
    batches = {f'data_batch_{i + 1}': ('train', part) for i, part in enumerate(parts)}
    batches['test_batch'] = ('test', np.arange(TEST))
  else:
    names['coarse_label_names'] = names['coarse_label_names'][:20]
    batches = {split: (split, np.arange(len(x[1]))) for split, x in splits.items()}
  for member, (split, part) in batches.items():
    images, labels = (x[part] for x in splits[split])
    batch = {b'data': images.transpose(0, 3, 1, 2).reshape(len(images), -1)}
    values = (labels,) if name == 'cifar10' else (labels // 5, labels)
    for key, x in zip(known.labels, values, strict=True):
      batch[key.encode()] = x.tolist()
    files[member] = batch
  content = {
    f'{known.folders[0]}/{member}': pickle.dumps(x, 2) for member, x in files.items()
  }
  write_tar(folder / known.file, content)
  return hashlib.sha256((folder / known.file).read_bytes()).hexdigest()


@pytest.mark.parametrize('name', cifar_archives.ARCHIVES)
def test_archives_for_python_prepare_the_same(prepared, name, tmp_path, monkeypatch):
  splits, data_dir, _ = prepared(name)
  (tmp_path / 'archives').mkdir()
  sha256 = write_python(tmp_path / 'archives', name, splits)
  arguments = {'data_dir': str(tmp_path), 'archives': str(tmp_path / 'archives')}
  with pytest.raises(UserError, match='python.tar.gz is not the official archive'):
    datasets.prepare(name, **arguments)
  known = cifar_archives.ARCHIVES[name]._replace(sha256=sha256)
  monkeypatch.setitem(cifar_archives.ARCHIVES, name, known)
  datasets.prepare(name, **arguments)
  for split in ('train', 'test'):
    binary = datasets.load(name, split, data_dir=data_dir)
    python = datasets.load(name, split, data_dir=str(tmp_path))
    np.testing.assert_array_equal(python.images, binary.images)
    np.testing.assert_array_equal(python.labels, binary.labels)


def test_any_builder_is_a_data_set_of_ones_own(prepared):
  _, data_dir, _ = prepared('mnist')
  for split in ('train', 'test'):
    own = datasets.load('tfds:mnist', split, data_dir=data_dir)
    known = datasets.load('mnist', split, data_dir=data_dir)
    np.testing.assert_array_equal(own.images, known.images)
    np.testing.assert_array_equal(own.labels, known.labels)
  config = classifier.get_config()
  config.dataset.name, config.dataset.data_dir = 'tfds:mnist', data_dir
  config.dataset.validation_images = 10
  config = datasets.record(config.lock())
  assert dataset_info.of(config.dataset)[:5] == (
    'own-mnist',
    (28, 28, 1),
    10,
    TRAIN,
    TEST,
  )
  assert len(config.model.mean) == 1


@pytest.mark.parametrize('name', ['tfds:no_such', 'tfds:', 'tfds:../x', 'tfds:a b'])
def test_an_unknown_builder_is_told(name):
  with pytest.raises(UserError, match='tensorflow-datasets cannot open') as error:
    datasets.load(name, 'train')
  assert '\n' not in str(error.value)


def test_a_data_set_smaller_than_its_official_size_is_refused(prepared):
  _, data_dir, _ = prepared('cifar10')
  config = classifier.get_config()
  config.dataset.data_dir = data_dir
  with pytest.raises(UserError, match=f'cifar10 has 50000 train images, {TRAIN} are'):
    datasets.of(config.dataset, 'train')


def test_a_registered_data_set_has_a_remedy_that_works(tmp_path, monkeypatch, capsys):
  kept = registries.DATASETS
  for name in ('_items', '_homes'):
    monkeypatch.setattr(kept, name, dict(getattr(kept, name)))
  file = 'docs/extending/my_data_set.py'
  assert command.main(['prepare', 'fashion_mnist']) == 1
  told = capsys.readouterr().err
  assert "'fashion_mnist'" in told and '--register=FILE.py' in told
  assert 'npz' not in told and 'folder' not in told
  asked = []
  monkeypatch.setattr(datasets, '_is_prepared', lambda builder: asked.append(builder))
  experiments.load_file(file)
  with pytest.raises(UserError, match='prepare tfds:fashion_mnist --data_dir'):
    datasets.load('fashion_mnist', 'train', data_dir=str(tmp_path))
  monkeypatch.setattr(datasets, '_is_prepared', lambda b: asked.append(b) or True)
  for arguments in (
    ['tfds:fashion_mnist'],
    ['fashion_mnist', f'--register={file}'],
  ):
    place = f'--data_dir={tmp_path}'
    assert command.main(['prepare', *arguments, place]) == 0
  assert len({str(builder.data_dir) for builder in asked}) == 1 and len(asked) == 3


def test_prepare_names_missing_archives(tmp_path, capsys):
  (tmp_path / 'train_32x32.mat').touch()
  arguments = ['svhn', f'--data_dir={tmp_path}', f'--archives={tmp_path}']
  assert command.main(['prepare', *arguments]) == 1
  told = capsys.readouterr().err
  assert told.startswith('error: ') and told.count('\n') == 1
  assert 'lacks test_32x32.mat:' in told


def test_prepare_refuses_another_archive(tmp_path, monkeypatch):
  (tmp_path / 'tiny-imagenet-200.zip').write_bytes(b'something else')
  official = OFFICIAL_ARCHIVES['tiny_imagenet']
  monkeypatch.setattr(tiny_imagenet.TinyImagenet, 'url_infos', official)
  with pytest.raises(UserError, match='not the official archive') as error:
    datasets.prepare('tiny_imagenet', data_dir=str(tmp_path), archives=str(tmp_path))
  assert '\n' not in str(error.value)


def test_damaged_file_is_refused(registry, prepared, tmp_path):
  _, _, archives = prepared('cifar10')
  datasets.prepare('cifar10', data_dir=str(tmp_path), archives=str(archives))
  (file,) = tmp_path.glob('cifar10/*/*-train.tfrecord-*')
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(UserError, match='prepare the dataset again') as error:
    datasets.load('cifar10', 'train', data_dir=str(tmp_path))
  assert '\n' not in str(error.value)


def test_tensorflow_leaves_the_gpu_alone(prepared, monkeypatch):
  _, data_dir, _ = prepared('cifar10')
  calls = []
  monkeypatch.setattr(tf.config, 'set_visible_devices', lambda *a: calls.append(a))
  datasets.load('cifar10', 'test', data_dir=data_dir)
  assert calls and set(map(repr, calls)) == {"([], 'GPU')"}


def test_import_is_light_and_loading_is_quiet(prepared):
  _, data_dir, _ = prepared('cifar10')
  program = (
    'import sys; from jaxrobust.config import dataset_info; '
    'from jaxrobust.data import datasets; '
    "heavy = {'tensorflow', 'tensorflow_datasets', 'sklearn'} & set(sys.modules); "
    "assert not heavy, heavy; assert dataset_info.INFO['svhn'].num_classes == 10; "
    f"datasets.load('cifar10', 'test', data_dir={data_dir!r})"
  )
  quiet = 'TF_CPP_MIN_LOG_LEVEL', 'TF_ENABLE_ONEDNN_OPTS'
  environment = {k: v for k, v in os.environ.items() if k not in quiet}
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, env=environment
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout + done.stderr == ''
