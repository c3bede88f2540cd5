"""Imports: files as others publish them become sample sets, in bounded memory."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import PIL.Image
import pytest

from jaxrobust.data import __main__ as command_line
from jaxrobust.errors import UserError
from jaxrobust.samples import imports, sample_sets, shards
from tests.helpers.mutations import mutations

SHAPE = (4, 6, 3)


def arrays(n, num_classes=5, seed=0):
  """Random images, sorted by class."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (n, *SHAPE), np.uint8), np.arange(n) * num_classes // n


def take(*paths, out, **kwargs):
  return imports.import_samples(paths, out, metadata={}, shard_size=10, **kwargs)


def check(found, images, labels):
  everything = np.arange(len(labels))
  np.testing.assert_array_equal(found.gather(everything), images)
  np.testing.assert_array_equal(found.gather_labels(everything), labels)


def test_parts_become_one_set_in_order(tmp_path):
  first, second = arrays(13), arrays(9, num_classes=7, seed=1)
  np.savez_compressed(tmp_path / 'part1.npz', image=first[0], label=first[1])
  np.savez(tmp_path / 'part2.npz', image=second[0], label=second[1].astype('>i2'))
  totals = []
  found = take(
    tmp_path / 'part1.npz',
    tmp_path / 'part2.npz',
    out=tmp_path / 'set',
    progress=lambda batches, total: totals.append(total) or batches,
  )
  assert totals == [22] and found.num_classes == 7
  check(found, *(np.concatenate(pair) for pair in zip(first, second, strict=True)))


def test_200_megabytes_stream_through_a_few(tmp_path):
  """Zeros deflate to a small file; 2e8 bytes of images and 1.6e6 of labels."""
  n, shape = 200_000, (10, 100, 1)
  with zipfile.ZipFile(tmp_path / 'in.npz', 'w', zipfile.ZIP_DEFLATED, 1) as archive:
    with archive.open('image.npy', 'w') as member:
      shards.write_header(member, (n, *shape))
      for _ in range(n // 10_000):
        member.write(bytes(10_000_000))
    with archive.open('label.npy', 'w') as member:
      np.lib.format.write_array(member, np.zeros(n, np.int64))

  def counted(batches, total):
    assert total == n
    tracemalloc.start()
    yield from batches
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()

  peaks = []
  imports.import_samples(
    [tmp_path / 'in.npz'], tmp_path / 'set', metadata={}, progress=counted
  )
  # Two chunks of 8,192 images at a time with their copies, and a shard's labels.
  assert peaks[0] < 50e6


@pytest.mark.parametrize('keys', [('data', 'extrapolated_targets'), None])
@pytest.mark.parametrize('protocol', [2, 5])
def test_pickles(tmp_path, keys, protocol):
  images, labels = arrays(12)
  content = (
    dict(zip(keys, (images, list(labels)), strict=True))
    if keys
    else [
      images,
      labels,
    ]
  )
  if keys:
    content['prediction_model'] = 'a name'
  (tmp_path / 'in.pickle').write_bytes(pickle.dumps(content, protocol))
  check(take(tmp_path / 'in.pickle', out=tmp_path / 'set'), images, labels)


class Bomb:
  """Creates a folder when it is unpickled."""

  def __init__(self, path):
    self._path = str(path)

  def __reduce__(self):
    return os.mkdir, (self._path,)


@pytest.mark.parametrize(
  'content, message',
  [
    (lambda p: pickle.dumps({'data': Bomb(p / 'ran')}), 'mkdir, which is refused'),
    (lambda p: pickle.dumps({'data': arrays(3)[0]}), 'extrapolated_targets'),
    (lambda p: pickle.dumps({1: arrays(3)[0], 2: 2}), 'holds 1, 2; it needs'),
    (lambda p: pickle.dumps({(): arrays(3)[0]}), 'not taken .* keys that are no text'),
    (lambda p: pickle.dumps((arrays(3)[0][..., [0, 0]], np.zeros(3, int))), 'C = 1 or'),
    (lambda p: pickle.dumps((arrays(3)[0], np.array([0, -1, 1]))), 'has the label -1'),
    (lambda p: pickle.dumps(arrays(12))[:-20], 'not taken'),
    (lambda p: pickle.dumps((arrays(3)[0], np.zeros(2, int))), 'integers'),
    (lambda p: b'', 'not taken'),
  ],
)
def test_pickles_that_are_refused(tmp_path, content, message):
  (tmp_path / 'in.pickle').write_bytes(content(tmp_path))
  with pytest.raises(UserError, match=f'in.pickle .*{message}'):
    take(tmp_path / 'in.pickle', out=tmp_path / 'set')
  assert [file.name for file in tmp_path.iterdir()] == ['in.pickle']


def test_a_pickle_larger_than_memory_is_refused(tmp_path, monkeypatch):
  (tmp_path / 'in.pickle').write_bytes(pickle.dumps(arrays(12)))
  monkeypatch.setattr(imports, '_available_memory', lambda: 100)
  with pytest.raises(UserError, match='in.pickle has .* GiB are free: .*npz'):
    take(tmp_path / 'in.pickle', out=tmp_path / 'set')


def save_png(path, image):
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)


@pytest.mark.parametrize('names', [['0', '2', '10'], ['cat', 'ant', 'dog']])
def test_folders_of_png(tmp_path, names):
  images, _ = arrays(6)
  for i, image in enumerate(images):
    save_png(tmp_path / 'in' / names[i // 2] / f'{i}.png', image)
  number = {'num_classes': 11} if names[0] == '0' else {}  # There are gaps.
  found = take(tmp_path / 'in', out=tmp_path / 'set', **number)
  # Folders in sorted order, as text: 0, 10, 2 and ant, cat, dog.
  if names[0] == '0':
    order, labels, count = [0, 1, 4, 5, 2, 3], [0, 0, 10, 10, 2, 2], 11
  else:
    order, labels, count = [2, 3, 0, 1, 4, 5], [0, 0, 1, 1, 2, 2], 3
    assert found.metadata['class_names'] == ['ant', 'cat', 'dog']
  check(found, images[order], labels)
  assert found.num_classes == count


def make_folders(path, names):
  """A folder for each name, with one PNG of the shade of its place; returns images."""
  images = [np.full(SHAPE, 10 * i, np.uint8) for i in range(len(names))]
  for name, image in zip(names, images, strict=True):
    save_png(path / name / '0.png', image)
  return images


def test_classes_of_several_folders_are_those_of_their_names(tmp_path):
  first = make_folders(tmp_path / 'a', ['cat', 'dog'])
  second = make_folders(tmp_path / 'b', ['dog', 'ant'])
  for part in ('.hidden', 'cat'):  # A folder without PNG files is no class of b.
    (tmp_path / 'b' / part).mkdir()
  save_png(tmp_path / 'a' / '.thumbnails' / '0.png', first[0])
  (tmp_path / 'a' / 'cat' / '._0.png').write_bytes(b'not a picture')
  found = take(tmp_path / 'a', tmp_path / 'b', out=tmp_path / 'set')
  check(found, np.stack([*first, *second[::-1]]), [1, 2, 0, 2])
  assert found.metadata['class_names'] == ['ant', 'cat', 'dog']


@pytest.mark.parametrize(
  'names, options, message',
  [
    (['000000', '001000'], {}, '2 folders have numbers up to 1000, none 1;'),
    (['000000', '001000'], {'num_classes': 10}, 'labels up to 1000; num_classes = 10'),
    (['1', '2'], {}, 'numbers up to 2, none 0'),
    (['0', '1', 'new'], {}, 'folders 0 and new are classes by number and by name'),
    (['0', '1', '2'], {'num_classes': 2}, 'num_classes = 2 allows 0..1: give 3'),
    (['0'], {'num_classes': -1}, 'num_classes = -1: give'),
    (['0'], {'num_classes': 0}, 'num_classes = 0: give'),
  ],
)
def test_classes_in_doubt_are_refused(tmp_path, names, options, message):
  make_folders(tmp_path / 'in', names)
  with pytest.raises(UserError, match=message):
    take(tmp_path / 'in', out=tmp_path / 'set', **options)
  assert not (tmp_path / 'set').exists()


def test_names_of_classes_beside_numbers_are_refused(tmp_path):
  make_folders(tmp_path / 'in', ['cat', 'dog'])
  np.savez(tmp_path / 'in.npz', image=arrays(5)[0], label=arrays(5)[1])
  with pytest.raises(UserError, match='in names its classes and .*in.npz numbers them'):
    take(tmp_path / 'in', tmp_path / 'in.npz', out=tmp_path / 'set')


@pytest.mark.parametrize('kind', ['text', 'json'])
def test_png_with_a_file_of_labels(tmp_path, kind):
  images = arrays(3)[0][..., :1]
  names = [f'00000/img {i}.png' for i in range(3)]
  for name, image in zip(names, images, strict=True):
    save_png(tmp_path / 'in' / name, image)
  pairs = [[names[2], 4], [names[0], 1]]
  if kind == 'json':
    (tmp_path / 'labels.json').write_text(json.dumps({'labels': pairs}))
  else:
    text = ''.join(f'{name},{label}\n' for name, label in pairs)
    (tmp_path / 'labels.txt').write_text(text)
  labels = tmp_path / ('labels.json' if kind == 'json' else 'labels.txt')
  found = take(tmp_path / 'in', out=tmp_path / 'set', labels=labels)
  check(found, images[[2, 0]], [4, 1])


@pytest.mark.parametrize(
  'damage, message',
  [
    (lambda p: (p / '0' / '1.png').write_bytes(b'x'), '1.png is no readable PNG'),
    (lambda p: save_png(p / '0' / '1.png', np.zeros((4, 5, 3), np.uint8)), 'one shape'),
    (
      lambda p: PIL.Image.new('RGBA', (6, 4)).save(p / '0' / '1.png'),
      'mode RGBA',
    ),
    (lambda p: (p / '0' / '0.png').unlink(), 'holds no folders'),
  ],
)
def test_folders_that_are_refused(tmp_path, damage, message):
  save_png(tmp_path / 'in' / '0' / '0.png', arrays(1)[0][0])
  damage(tmp_path / 'in')
  with pytest.raises(UserError, match=message):
    take(tmp_path / 'in', out=tmp_path / 'set')
  assert [file.name for file in tmp_path.iterdir()] == ['in']


@pytest.mark.parametrize('name', ['in.npz', 'in.npy', 'in.pickle', 'in.zip'])
def test_a_pipe_is_not_waited_for(tmp_path, name):
  os.mkfifo(tmp_path / name)
  paths = [tmp_path / name] * (1 + name.endswith('npy'))
  with pytest.raises(UserError, match=f'{name} is no file'):
    take(*paths, out=tmp_path / 'set')


@pytest.mark.parametrize(
  'name',
  ['in.tar', 'absent.npz', 'absent.npy', 'absent.pickle', 'absent.zip', 'absent'],
)
def test_other_files_are_named(tmp_path, name):
  with pytest.raises(UserError, match=name):
    take(tmp_path / name, out=tmp_path / 'set')


KILLED = """
import os, signal, sys
import numpy as np
from jaxrobust.samples import sample_sets
def batches():
  yield np.zeros((9, 4, 6, 3), np.uint8), np.zeros(9, int)
  os.kill(os.getpid(), signal.SIGKILL)
sample_sets.write(sys.argv[1], batches(), metadata={}, num_classes=2, shard_size=5)
"""


def test_a_killed_write_is_no_set_and_the_next_one_starts_over(tmp_path):
  path, (images, labels) = tmp_path / 'set', arrays(12)
  code = subprocess.run([sys.executable, '-c', KILLED, path], check=False).returncode
  assert code == -signal.SIGKILL
  assert [file.name for file in tmp_path.iterdir()] == ['.set.partial']
  with pytest.raises(UserError, match='run the same command again'):
    sample_sets.SampleSet.open(path)
  found = sample_sets.write(path, [(images, labels)], metadata={}, num_classes=5)
  check(found, images, labels)
  assert [file.name for file in tmp_path.iterdir()] == ['set']


def test_two_writers_of_one_set(tmp_path):
  def batches():
    yield arrays(12)
    with pytest.raises(UserError, match='another process'):
      sample_sets.write(tmp_path / 'set', [arrays(12)], metadata={}, num_classes=5)

  found = sample_sets.write(tmp_path / 'set', batches(), metadata={}, num_classes=5)
  assert len(found) == 12


def test_a_disk_without_locks_is_told_as_such(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', flock)
  with pytest.raises(UserError, match='cannot be locked .*No locks available'):
    sample_sets.write(tmp_path / 'set', [arrays(12)], metadata={}, num_classes=5)


def test_interrupted_command(tmp_path, capsys, monkeypatch):
  def interrupted(batches, total):
    yield next(iter(batches))
    raise KeyboardInterrupt

  np.savez(tmp_path / 'in.npz', image=arrays(5)[0], label=arrays(5)[1])
  monkeypatch.setattr(command_line, '_progress', interrupted)
  command = ['import', str(tmp_path / 'in.npz'), str(tmp_path / 'set')]
  assert command_line.main(command) == 130
  assert 'run it again' in capsys.readouterr().err
  assert [file.name for file in tmp_path.iterdir()] == ['in.npz']


def npz_of(path, **members):
  np.savez(path, **members)
  return path


@pytest.mark.parametrize(
  'names', [('x', 'y'), ('arr_0', 'arr_1'), ('images', 'labels'), ('data', 'label')]
)
def test_names_of_arrays(tmp_path, names):
  content = dict(zip(names, arrays(12), strict=True))
  path = npz_of(tmp_path / 'in.npz', **content, other=np.zeros(3), arr_2=np.zeros(1))
  check(take(path, out=tmp_path / 'set'), *arrays(12))


@pytest.mark.parametrize(
  'members, message',
  [
    (['image', 'images', 'label'], 'holds image, images, label; it needs'),
    (['x', 'label'], 'holds x, label; it needs'),
    (['image', 'x', 'y'], 'holds image, x, y; it needs'),
    (['arr_0'], 'holds arr_0; it needs'),
    ([], 'holds no arrays; it needs'),
  ],
)
def test_names_in_doubt_are_listed(tmp_path, members, message):
  path = npz_of(tmp_path / 'in.npz', **dict.fromkeys(members, arrays(5)[0]))
  with pytest.raises(UserError, match=f'in.npz {message}'):
    take(path, out=tmp_path / 'set')


def test_pairs_of_npy(tmp_path):
  first, second = arrays(13), arrays(9, seed=1)
  paths = [tmp_path / f'{i}.npy' for i in range(4)]
  for path, array in zip(paths, (*first, *second), strict=True):
    np.save(path, array)
  joined = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
  check(take(*paths, out=tmp_path / 'set'), *joined)
  for given, message in (
    (paths[:1], '0.npy holds one array: .* labels after it'),
    (paths[1::-1], r'1.npy with .*0.npy holds images int64 \[13\]'),
    (paths[:2] + paths[:1] + paths[3:], r'labels int64 \[9\]'),
  ):
    with pytest.raises(UserError, match=message):
      take(*given, out=tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize(
  'labels, message',
  [
    (np.array([0, -1, 2], np.int64), 'label -1'),
    (np.array([0, -1, 2]).astype(np.uint32), 'label 4294967295.*unsigned'),
    (np.array([0, -1, 2]).astype(np.uint64), 'label 18446744073709551615'),
    (np.array([0, 2**28, 2]), 'label 268435456'),
    (np.array([0, 3 * 10**8, 2]), 'label 300000000'),
    (np.array([0, 2**16, 2]), 'label 65536.*up to 65535'),
  ],
)
def test_labels_that_cannot_be_meant(tmp_path, labels, message):
  images = arrays(3)[0]
  np.save(tmp_path / 'images.npy', images)
  np.save(tmp_path / 'labels.npy', labels)
  (tmp_path / 'in.pickle').write_bytes(pickle.dumps((images, labels)))
  npz_of(tmp_path / 'in.npz', image=images, label=labels)
  for names in (['in.npz'], ['in.pickle'], ['images.npy', 'labels.npy']):
    with pytest.raises(UserError, match=message):
      take(*(tmp_path / name for name in names), out=tmp_path / 'set')
  assert not list(tmp_path.glob('*set*'))


@pytest.mark.parametrize('count', [2**16 + 1, 10**12])
def test_numbers_of_classes_that_cannot_be_meant(tmp_path, count):
  path = npz_of(tmp_path / 'in.npz', image=arrays(5)[0], label=arrays(5)[1])
  with pytest.raises(UserError, match=f'num_classes = {count}: give .* 65536'):
    take(path, out=tmp_path / 'set', num_classes=count)
  with pytest.raises(UserError, match=f'num_classes = {count}: give .* 65536'):
    sample_sets.write(tmp_path / 'set', [arrays(5)], metadata={}, num_classes=count)


@pytest.mark.parametrize(
  'shape', [(0, 6, 3), (4, 0, 3), (4, 6, 0), (2**13, 2**13, 3), (2**31, 2**31, 1)]
)
def test_images_that_cannot_be_meant(tmp_path, shape):
  """Of which no unusable set is left."""
  with zipfile.ZipFile(tmp_path / 'in.npz', 'w', zipfile.ZIP_DEFLATED) as archive:
    with archive.open('image.npy', 'w') as member:
      shards.write_header(member, (2, *shape))
      member.write(bytes(min(2 * int(np.prod(shape, dtype=object)), 2**20)))
    with archive.open('label.npy', 'w') as member:
      np.lib.format.write_array(member, np.array([0, 1]))
  with pytest.raises(UserError, match='in.npz'):
    take(tmp_path / 'in.npz', out=tmp_path / 'set')
  assert [file.name for file in tmp_path.iterdir()] == ['in.npz']


def test_large_images_stream_too(tmp_path):
  """A chunk is bounded by its bytes: 200 images of 1 MB here."""
  with zipfile.ZipFile(tmp_path / 'in.npz', 'w', zipfile.ZIP_DEFLATED, True, 1) as file:
    with file.open('image.npy', 'w') as member:
      shards.write_header(member, (200, 1_000, 1_000, 1))
      for _ in range(200):
        member.write(bytes(1_000_000))
    with file.open('label.npy', 'w') as member:
      np.lib.format.write_array(member, np.zeros(200, np.int64))
  tracemalloc.start()
  take(tmp_path / 'in.npz', out=tmp_path / 'set')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 80e6


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path, save):
  """A set, or a line, and nothing left behind."""
  path = tmp_path / 'in.npz'
  save(path, image=arrays(4)[0], label=arrays(4)[1])
  taken = 0
  for damaged in mutations(path.read_bytes(), 200, seed=7):
    path.write_bytes(damaged)
    try:
      found = take(path, out=tmp_path / 'set')
    except UserError as error:
      line = str(error)
      assert str(path) in line and '\n' not in line and len(line) < len(str(path)) + 350
      assert [file.name for file in tmp_path.iterdir()] == ['in.npz']
    else:
      taken += 1
      check(found, *arrays(4))
      shutil.rmtree(tmp_path / 'set')
  assert taken < 100
