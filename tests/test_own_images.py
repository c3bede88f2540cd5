"""Images of one's own: folders of pictures, arrays, and any builder."""

import io
import json
import os

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from jaxrobust import config as configs
from jaxrobust import evaluate, models
from jaxrobust.config import classifier, dataset_info, fields, generator, registries
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.models import card as cards
from jaxrobust.models import parameter_files
from tests.helpers import mutations

CLASSES = ('apple', 'bear', 'cat')


def picture(image, kind='png'):
  file = io.BytesIO()
  Image.fromarray(image.squeeze()).save(file, kind)
  return file.getvalue()


def random_images(count, shape=(6, 5, 3), seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


@pytest.fixture
def folder(tmp_path):
  """4 training images and 2 test images of each class, and what they should read as."""
  written = {}
  for split, count in (('train', 4), ('test', 2)):
    for label, name in enumerate(CLASSES):
      place = tmp_path / 'own' / split / name
      place.mkdir(parents=True)
      for i, image in enumerate(random_images(count, seed=label + 10 * count)):
        (place / f'{i}.png').write_bytes(picture(image))
        written[split, image.tobytes()] = label
      (place / 'notes.txt').write_text('no picture')
  return tmp_path / 'own', written


def own(path, name='folder', **changes):
  """A classifier's config for own images."""
  c = classifier.get_config()
  c.dataset.name, c.dataset.path = name, str(path)
  c.dataset.validation_images, c.checkpoint.export = 2, 'last'
  c.update_from_flattened_dict(changes)
  return c.lock()


def test_a_folder_is_read_whole_with_its_classes(folder):
  path, written = folder
  for split, count in (('train', 12), ('test', 6)):
    found = datasets.load('folder', split, path=str(path))
    assert found.images.shape == (count, 6, 5, 3) and found.labels.dtype == np.int32
    labels = [written[split, image.tobytes()] for image in found.images]
    assert labels == found.labels.tolist() and len(set(labels)) == 3
  train = datasets.load('folder', 'train', path=str(path))
  assert sorted(train.labels[:4]) != [0, 0, 0, 0], 'shuffled'
  held = datasets.load('folder', 'validation', path=str(path), validation_images=5)
  np.testing.assert_array_equal(held.images, train.images[:5])


def test_jpeg_grey_and_palette_pictures(tmp_path):
  for split in ('train', 'test'):
    (tmp_path / split / 'a').mkdir(parents=True)
    image = np.full((8, 8), 77, np.uint8)
    (tmp_path / split / 'a' / '0.JPG').write_bytes(picture(image, 'jpeg'))
  found = datasets.load('folder', 'train', path=str(tmp_path)).images
  assert found.shape == (1, 8, 8, 1)
  colour = np.zeros((8, 8, 3), np.uint8)
  (tmp_path / 'train' / 'a' / '1.png').write_bytes(picture(colour))
  with pytest.raises(
    UserError, match='1.png is in colour, and the first picture is gr'
  ):
    datasets.load('folder', 'train', path=str(tmp_path))
  (tmp_path / 'train' / 'a' / '+.png').write_bytes(picture(colour))  # Now the first.
  found = datasets.load('folder', 'train', path=str(tmp_path)).images
  assert found.shape == (3, 8, 8, 3) and (found == 77).all((1, 2, 3)).sum() == 1


def test_what_is_known_is_recorded_once(folder):
  path, _ = folder
  config = datasets.record(own(path))
  info = dataset_info.of(config.dataset)
  assert info[:5] == ('own', (6, 5, 3), 3, 12, 6)
  train = datasets.of(config.dataset, 'train').images / 255
  assert len(train) == 10
  np.testing.assert_allclose(config.model.mean, train.mean((0, 1, 2)), atol=5e-5)
  np.testing.assert_allclose(config.model.std, train.std((0, 1, 2)), atol=5e-5)
  assert configs.experiment_name(config) == 'own_linf_wrn-28-10_real'
  again = configs.from_json(configs.to_json(config))
  assert dataset_info.of(again.dataset)[:5] == info[:5]
  # The command does not say it again, and is of the same run.
  assert configs.differences(again, own(path)) == []
  assert configs.differences(again, datasets.record(own(path))) == []
  same = configs.continued(own(path), again)
  assert same.to_dict() == again.to_dict()
  # What the command sets, it keeps.
  mean = {'model.mean': (0.1, 0.2, 0.3), 'model.std': (1.0, 1.0, 1.0)}
  assert datasets.record(own(path, **mean)).model.mean == (0.1, 0.2, 0.3)
  # Other kinds of configs have no normalisation.
  c = generator.get_config()
  c.dataset.name, c.dataset.path, c.dataset.validation_images = 'folder', str(path), 2
  assert datasets.record(c).dataset.num_classes == 3


def test_few_images_hold_out_a_tenth_unless_it_is_set(folder):
  path, _ = folder
  usual = lambda: own(path, **{'dataset.validation_images': 1024})
  recorded = datasets.record(usual())
  assert recorded.dataset.validation_images == 1  # Of 12.
  # The command goes on with that run, and with one of an earlier version.
  assert configs.continued(usual(), recorded).to_dict() == recorded.to_dict()
  assert configs.differences(recorded, usual()) == []
  before = fields.replace(recorded, {'dataset.validation_images': 1024})
  assert configs.differences(before, usual()) == []
  assert configs.differences(recorded, own(path))[0].startswith('dataset.')
  assert dataset_info.held_out(1024, 2048) == 1024
  assert dataset_info.held_out(100, 120) == 100


def test_counts_of_another_data_set_are_told_together(folder):
  """As of an experiment for digits, which holds out 400 images and trains on 100."""
  path, _ = folder
  counts = {'dataset.validation_images': 400, 'dataset.train_images': 100}
  with pytest.raises(UserError) as e:
    datasets.record(own(path, **counts))
  assert '12 training images, and the config holds out 400 and trains on 100' in str(
    e.value
  )
  remedy = '--config.dataset.validation_images=1 --config.dataset.train_images=None'
  assert str(e.value).endswith(remedy)
  remedied = {'dataset.validation_images': 1, 'dataset.train_images': None}
  assert datasets.record(own(path, **remedied)).dataset.train_size == 12


def test_a_class_without_test_images_is_pointed_out(folder, caplog):
  path, _ = folder
  (path / 'test' / 'bear').rename(path / 'bear')
  found = datasets.load('folder', 'test', path=str(path))
  assert set(found.labels) == {0, 2}
  assert f'{path} has no test images of bear' in caplog.text


def test_known_data_sets_are_recorded_as_they_are():
  config = classifier.get_config('digits')
  assert datasets.record(config) is config


def test_images_that_changed_since_are_refused(folder):
  path, _ = folder
  config = datasets.record(own(path))
  (path / 'train' / 'cat' / '3.png').unlink()
  with pytest.raises(UserError, match='own has 12 train images, 11 are here'):
    datasets.of(config.dataset, 'train')


def test_own_images_that_were_not_read_are_told():
  with pytest.raises(UserError, match='nothing is known yet of .*folder'):
    dataset_info.of(own('somewhere').dataset)
  with pytest.raises(UserError, match='config.dataset.path is not set'):
    configs.check(own(''))


@pytest.mark.parametrize(
  'spoil, words',
  [
    (
      lambda p: (p / 'train' / 'bear' / '9.png').write_bytes(b''),
      'bear/9.png is no PNG',
    ),
    (lambda p: os.mkfifo(p / 'train' / 'bear' / '9.png'), 'bear/9.png'),
    (
      lambda p: (p / 'train' / 'cat' / '9.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0'),
      'no PNG or JPEG',
    ),
    (
      lambda p: (p / 'train' / 'cat' / '9.png').write_bytes(
        picture(np.zeros((7, 5, 3), np.uint8))
      ),
      'cat/9.png is 7x5x3, and the first picture 6x5x3',
    ),
    (
      lambda p: (p / 'train' / 'apple' / '0.png').write_bytes(
        picture(np.zeros((2, 3000), np.uint8))
      ),
      'at most 1024 pixels',
    ),
    (lambda p: (p / 'test' / 'dog').mkdir(), "test images of 'dog'"),
  ],
)
def test_wrong_folders_are_told_in_one_line(folder, spoil, words):
  path, _ = folder
  spoil(path)
  with pytest.raises(UserError) as e:
    for split in ('train', 'test'):
      datasets.load('folder', split, path=str(path))
  assert words in str(e.value) and '\n' not in str(e.value)
  for absent in (path / 'train' / 'bear', path / 'absent'):
    with pytest.raises(UserError, match='no folder|has 0 folders'):
      datasets.load('folder', 'train', path=str(absent))


def test_mutated_pictures_are_read_or_refused(folder):
  path, _ = folder
  file = path / 'train' / 'apple' / '1.png'
  good = file.read_bytes()
  for damaged in mutations.mutations(good, 200):
    file.write_bytes(damaged)
    try:
      found = datasets.load('folder', 'train', path=str(path))
      assert found.images.shape == (12, 6, 5, 3)
    except UserError as e:
      assert '1.png' in str(e) and '\n' not in str(e)


def arrays_of(**changes):
  return {
    'train_images': random_images(9, (4, 4)),
    'train_labels': np.arange(9)[:, None] % 3,
    'test_images': random_images(3, (4, 4), seed=1),
    'test_labels': np.arange(3)[:, None].astype(np.uint8),
  } | changes


def test_arrays_are_read_shuffled_with_columns_of_labels(tmp_path):
  path, given = tmp_path / 'mine.npz', arrays_of()
  np.savez(path, val_images=np.zeros(3), **given)
  train = datasets.load('npz', 'train', path=str(path))
  assert train.images.shape == (9, 4, 4, 1)
  order = [
    next(i for i, x in enumerate(given['train_images']) if (x == y[..., 0]).all())
    for y in train.images
  ]
  assert sorted(order) == list(range(9)) != order
  assert train.labels.tolist() == [i % 3 for i in order]
  test = datasets.load('npz', 'test', path=str(path))
  np.testing.assert_array_equal(test.images[..., 0], given['test_images'])
  assert test.labels.tolist() == [0, 1, 2]
  config = datasets.record(own(path, 'npz'))
  assert dataset_info.of(config.dataset)[:5] == ('mine', (4, 4, 1), 3, 9, 3)
  assert len(config.model.mean) == 1
  keras = dict(
    zip(('x_train', 'y_train', 'x_test', 'y_test'), given.values(), strict=True)
  )
  np.savez(path, **keras)
  again = datasets.load('npz', 'train', path=str(path))
  np.testing.assert_array_equal(again.images, train.images)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'train_images': np.zeros((9, 4, 4))}, 'images are uint8'),
    (
      {'train_images': random_images(8, (4, 4))},
      '9 labels for train_images [8, 4, 4, 1]',
    ),
    ({'train_images': random_images(9, (4, 4, 2))}, '1 or 3 channels'),
    ({'train_labels': np.full(9, 2**28)}, 'labels from 268435456'),
    ({'train_labels': np.arange(9) - 1}, 'labels from -1'),
    ({'train_labels': np.zeros((9, 3), int)}, 'labels are int [n]'),
    ({'train_labels': np.zeros(0, int)}, 'labels are int [n]'),
    ({'test_labels': np.full(3, 7)}, 'has label 7'),
  ],
)
def test_wrong_arrays_are_told_in_one_line(tmp_path, changes, words):
  np.savez(tmp_path / 'mine.npz', **arrays_of(**changes))
  with pytest.raises(UserError) as e:
    for split in ('train', 'test'):
      datasets.load('npz', split, path=str(tmp_path / 'mine.npz'))
  assert words in str(e.value) and '\n' not in str(e.value)


def test_an_npz_without_the_arrays_says_what_it_holds(tmp_path):
  np.savez(tmp_path / 'mine.npz', image=np.zeros(3))
  with pytest.raises(UserError, match='holds image; it needs train_images'):
    datasets.load('npz', 'train', path=str(tmp_path / 'mine.npz'))


def test_a_data_set_is_added_in_one_file(monkeypatch):
  """By what its file would say: everything that names data sets knows it then."""
  monkeypatch.setattr(registries.DATASETS, '_items', dict(registries.DATASETS._items))
  monkeypatch.setattr(registries.DATASETS, '_homes', dict(registries.DATASETS._homes))
  info = dataset_info.DatasetInfo(
    'clothes',
    (28, 28, 1),
    10,
    60_000,
    10_000,
    mean=(0.286,),
    std=(0.353,),
    tfds_name='fashion_mnist',
  )
  registries.DATASETS.register('clothes', info)
  config = classifier.get_config('clothes')
  configs.check(config)
  assert config.model.mean == (0.286,)
  assert dataset_info.of(config.dataset) is info
  assert configs.experiment_name(config).startswith('clothes_linf')
  with pytest.raises(UserError, match='prepare tfds:fashion_mnist'):
    datasets.of(config.dataset, 'train')


def test_a_card_of_a_network_for_own_images_says_what_they_are(folder):
  path, _ = folder
  config = datasets.record(own(path))
  card = cards.from_config(config, 'here')
  again = cards.from_json(card.to_json(), 'card.json')
  assert again == card and again.dataset == 'own'
  assert again.info[:3] == ('own', (6, 5, 3), 3)
  assert again.architecture.num_classes == 3


def test_protocols_say_of_known_data_sets_what_they_always_did(folder):
  found = dataset_info.identity(classifier.get_config('digits').dataset)
  assert set(found) == {'name', 'data_dir', 'validation_images', 'train_images'}
  mine = dataset_info.identity(datasets.record(own(folder[0])).dataset)
  assert mine['path'] == str(folder[0]) and mine['num_classes'] == 3


def test_a_result_is_of_the_images_that_were_judged(tmp_path):
  """Other test images in the place of as many are judged, not taken for the first."""
  path, file = tmp_path / 'mine.npz', tmp_path / 'network.npy'
  given, workdir = arrays_of(), tmp_path / 'judged'
  np.savez(path, **given)
  config = datasets.record(
    own(path, 'npz', **{'model.name': 'wrn-10-1', 'evaluation.suite': 'clean'})
  )
  model = models.from_config(config.model, dataset_info.of(config.dataset))
  parameter_files.export_npy(epath.Path(file), *model.init(jax.random.key(0)))
  judge = lambda: evaluate.main(config, str(workdir), checkpoint=str(file))
  results = lambda: json.loads((workdir / 'results.json').read_text())
  judge()
  judge()
  assert [x['clean_correct'] for x in results()] == [1]  # It says 0 of everything.
  np.savez(path, **given | {'test_labels': np.zeros((3, 1), np.uint8)})
  judge()
  assert [x['clean_correct'] for x in results()] == [1, 3]
