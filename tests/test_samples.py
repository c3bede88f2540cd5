"""Sample sets: what is written is read, and what is damaged is refused by name."""

import errno
import json
import os
import re
import zipfile

import numpy as np
import PIL.Image
import pytest

from jaxrobust.data import __main__ as command_line
from jaxrobust.errors import UserError
from jaxrobust.runs import checksums
from jaxrobust.samples import (
  import_source,
  imports,
  npz,
  pictures,
  sample_sets,
)
from tests.helpers.mutations import mutations

N, SHAPE, K = 23, (4, 6, 3), 5
METADATA = {'generator': 'noise', 'seed': 7, 'labeller': None, 'selection': 'none'}


def make_arrays(n=N):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (n, *SHAPE), np.uint8)
  return images, rng.integers(0, K, n)


def write(path, batches=None, **kwargs):
  kwargs = {'metadata': METADATA, 'num_classes': K, 'shard_size': 10, **kwargs}
  return sample_sets.write(
    path, [make_arrays()] if batches is None else batches, **kwargs
  )


def edit_metadata(path, edit):
  metadata = json.loads((path / 'metadata.json').read_text())
  edit(metadata)
  (path / 'metadata.json').write_text(json.dumps(metadata))


def test_round_trip_in_shards_from_uneven_batches(tmp_path):
  images, labels = make_arrays()
  cuts = [0, 1, 8, 8, 20, N]
  batches = (
    (images[a:b], labels[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)
  )
  write(tmp_path / 'set', batches)
  found = sample_sets.SampleSet.open(tmp_path / 'set')
  assert (len(found), found.image_shape, found.num_classes) == (N, SHAPE, K)
  order = np.array([22, 0, 9, 10, 19, 20, 9, 1])
  np.testing.assert_array_equal(found.gather(order), images[order])
  np.testing.assert_array_equal(found.gather_labels(order), labels[order])
  assert found.gather(order).dtype == np.uint8
  assert found.gather_labels(order).dtype == np.int32
  assert found.gather(np.zeros(0, np.int64)).shape == (0, *SHAPE)


def test_contract_of_the_folder(tmp_path):
  images, labels = make_arrays()
  write(tmp_path / 'set', metadata={**METADATA, 'note': 'mine'})
  names = [f'{k}-0000{i}-of-00003.npy' for i in range(3) for k in ('images', 'labels')]
  found = sorted(file.name for file in (tmp_path / 'set').iterdir())
  assert found == sorted([*names, 'metadata.json'])
  last = np.load(tmp_path / 'set' / 'images-00002-of-00003.npy')
  np.testing.assert_array_equal(last, images[20:])
  last = np.load(tmp_path / 'set' / 'labels-00002-of-00003.npy')
  np.testing.assert_array_equal(last, labels[20:])
  assert last.dtype == np.int32
  metadata = json.loads((tmp_path / 'set' / 'metadata.json').read_text())
  assert metadata['counts'] == {
    'total': N,
    'per_class': [int((labels == k).sum()) for k in range(K)],
    'per_shard': [10, 10, 3],
  }
  assert sorted(metadata['sha256']) == sorted(names)
  assert metadata['image_shape'] == list(SHAPE) and metadata['num_classes'] == K
  assert metadata['generator'] == 'noise' and metadata['seed'] == 7
  assert metadata['note'] == 'mine' and metadata['format_version'] == 1


def test_gather_into_given_places_and_refuses_indices_outside(tmp_path):
  images, _ = make_arrays()
  found = write(tmp_path / 'set')
  out = np.zeros((4, *SHAPE), np.uint8)
  found.gather(np.array([12, 3]), out=out, rows=np.array([3, 1]))
  np.testing.assert_array_equal(out[[3, 1]], images[[12, 3]])
  assert not out[[0, 2]].any()
  for bad in (-1, N):
    with pytest.raises(IndexError):
      found.gather(np.array([0, bad]))


def test_crash_while_writing_leaves_nothing(tmp_path):
  images, labels = make_arrays()

  def broken():
    yield images, labels
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / 'set', broken())
  assert not list(tmp_path.iterdir())


def test_folder_appears_only_when_complete(tmp_path):
  images, labels = make_arrays()

  def batches():
    yield images, labels
    assert not (tmp_path / 'set').exists()

  write(tmp_path / 'set', batches())
  assert [file.name for file in tmp_path.iterdir()] == ['set']


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda x, y: [(x.astype(np.float32), y)], 'uint8'),
    (lambda x, y: [(x[0], y)], r'\[n, H, W, C\]'),
    (lambda x, y: [(x, y[1:])], 'labels'),
    (lambda x, y: [(x[..., [0, 0, 1, 2]], y)], r'\[4, 6, 4\]; .* 1 channel'),
    (lambda x, y: [(x, y * 0 + K)], f'{K}..{K}; 5 classes allow 0..4'),
    (lambda x, y: [(x, y - K)], '5 classes'),
    (lambda x, y: [(x, y.astype(float))], 'integers'),
    (lambda x, y: [(x, y), (x[:, 1:], y)], 'all must be equal'),
    (lambda x, y: [], 'at least one'),
  ],
)
def test_write_refuses(tmp_path, change, message):
  with pytest.raises(UserError, match=message):
    write(tmp_path / 'set', change(*make_arrays()))
  assert not list(tmp_path.iterdir())


def test_write_never_overwrites(tmp_path):
  write(tmp_path / 'set')
  with pytest.raises(UserError, match='never overwritten'):
    write(tmp_path / 'set')
  with pytest.raises(UserError, match="'counts'"):
    write(tmp_path / 'other', metadata={'counts': 1})
  with pytest.raises(UserError, match='shard_size = 0'):
    write(tmp_path / 'other', shard_size=0)


IMAGES, LABELS = 'images-00001-of-00003.npy', 'labels-00001-of-00003.npy'


def truncate(path, name, by=1):
  content = (path / name).read_bytes()
  (path / name).write_bytes(content[:-by])


def relabel(path, label):
  labels = np.load(path / LABELS)
  labels[0] = label(labels[0])
  np.save(path / LABELS, labels)


@pytest.mark.parametrize(
  'damage, message',
  [
    (lambda p: truncate(p, IMAGES), f'{IMAGES} has .* bytes'),
    (lambda p: truncate(p, LABELS), f'{LABELS} has .* bytes'),
    (lambda p: (p / IMAGES).write_bytes(b''), f'{IMAGES} is damaged .*no .npy file'),
    (
      lambda p: (p / IMAGES).write_bytes(b'x' * 999),
      f'{IMAGES} is damaged .*no .npy file',
    ),
    (lambda p: (p / IMAGES).unlink(), f'{IMAGES} is missing'),
    (lambda p: (p / LABELS).unlink(), f'{LABELS} is missing'),
    (
      lambda p: (p / IMAGES).rename(p / 'images-00001-of-00004.npy'),
      'images-00001-of-00004.npy does not belong',
    ),
    (lambda p: np.save(p / IMAGES, np.zeros((10, *SHAPE))), f'{IMAGES} holds float64'),
    (
      lambda p: np.save(p / IMAGES, np.asfortranarray(np.load(p / IMAGES))),
      f'{IMAGES} is in Fortran order',
    ),
    (
      lambda p: np.save(p / IMAGES, np.zeros((10, 5, 6, 3), np.uint8)),
      rf'{IMAGES} holds uint8 \[10, 5, 6, 3\]',
    ),
    (lambda p: np.save(p / LABELS, np.zeros(10, np.int64)), f'{LABELS} holds int64'),
    (lambda p: np.save(p / LABELS, np.zeros(9, np.int32)), rf'{LABELS} .* \[9\]'),
    (lambda p: relabel(p, lambda _: K), f'{LABELS} holds labels 0..5'),
    (lambda p: relabel(p, lambda _: -1), f'{LABELS} holds labels -1'),
    (lambda p: relabel(p, lambda y: (y + 1) % K), 'mislabelled'),
    (lambda p: (p / 'metadata.json').unlink(), 'no metadata.json'),
    (lambda p: (p / 'metadata.json').write_text('{'), 'metadata.json is not JSON'),
    (lambda p: edit_metadata(p, lambda m: m.pop('counts')), 'damaged: counts is None'),
    (
      lambda p: edit_metadata(p, lambda m: m.update(format_version=2)),
      'format_version 2',
    ),
    (
      lambda p: edit_metadata(p, lambda m: m['counts'].update(total=N + 1)),
      'contradicts itself',
    ),
    (
      lambda p: edit_metadata(p, lambda m: m.update(num_classes=K + 1)),
      'contradicts itself',
    ),
  ],
)
def test_open_refuses_by_name(tmp_path, damage, message):
  path = tmp_path / 'set'
  write(path)
  damage(path)
  with pytest.raises(UserError, match=message) as caught:
    sample_sets.SampleSet.open(path)
  assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_verify_names_every_corrupt_file(tmp_path):
  path = tmp_path / 'set'
  found = write(path)
  found.verify()
  for name in (IMAGES, 'images-00002-of-00003.npy'):
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
  with pytest.raises(UserError) as caught:
    sample_sets.SampleSet.open(path).verify()
  assert IMAGES in str(caught.value) and '00002-of-00003' in str(caught.value)
  assert '00000-of-00003' not in str(caught.value)


def test_verify_is_done_once(tmp_path, monkeypatch):
  found = write(tmp_path / 'set')
  calls = []
  digest = checksums.sha256
  monkeypatch.setattr(checksums, 'sha256', lambda f: calls.append(f) or digest(f))
  seen = []
  found.verify(lambda files: seen.extend(files) or files)
  assert len(calls) == len(seen) == 6
  sample_sets.SampleSet.open(tmp_path / 'set').verify()
  assert len(calls) == 6
  (tmp_path / 'set' / IMAGES).touch()
  found.verify()
  assert len(calls) == 7  # What has changed.
  assert command_line.main(['verify', str(tmp_path / 'set')]) == 0
  assert len(calls) == 13  # The command reads, whatever is known.


def test_the_command_finds_bits_lost_since_a_verification(tmp_path, capsys):
  write(tmp_path / 'set').verify()
  file = tmp_path / 'set' / IMAGES
  stat, content = file.stat(), bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert command_line.main(['verify', str(tmp_path / 'set')]) == 1
  assert f'{IMAGES};' in capsys.readouterr().err
  assert not sample_sets.SampleSet.open(tmp_path / 'set').is_verified()


def test_gather_notices_a_file_that_shrinks(tmp_path):
  found = write(tmp_path / 'set')
  truncate(tmp_path / 'set', IMAGES)
  with pytest.raises(UserError, match=f'{IMAGES} has been truncated'):
    found.gather(np.array([19]))


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('chunk', [7, 100])
def test_npz_import_and_export(tmp_path, save, chunk, monkeypatch):
  monkeypatch.setattr(import_source, '_CHUNK_BYTES', chunk * 72)
  images, labels = make_arrays()
  labels[0] = K - 1
  names = ('image', 'label') if chunk == 7 else ('images', 'labels')
  save(tmp_path / 'in.npz', **dict(zip(names, (images, labels), strict=True)))
  found = imports.import_samples(
    [tmp_path / 'in.npz'], tmp_path / 'set', metadata=METADATA, shard_size=10
  )
  assert found.num_classes == K
  np.testing.assert_array_equal(found.gather(np.arange(N)), images)
  npz.export_npz(found, tmp_path / 'out.npz')
  with np.load(tmp_path / 'out.npz') as out:
    assert sorted(out) == ['image', 'label']
    np.testing.assert_array_equal(out['image'], images)
    np.testing.assert_array_equal(out['label'], labels)
  with pytest.raises(UserError, match='out.npz exists'):
    npz.export_npz(found, tmp_path / 'out.npz')


def flip_a_byte(path):
  content = bytearray(path.read_bytes())
  with zipfile.ZipFile(path) as archive:
    content[archive.getinfo('image.npy').header_offset + 400] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  'arrays, message',
  [
    ({'image': make_arrays()[0]}, 'in.npz holds image; it needs image, .* with label,'),
    ({'image': make_arrays()[0], 'label': np.zeros(N - 1, int)}, r'int64 \[22\]'),
    ({'image': make_arrays()[0] / 1.0, 'label': np.zeros(N, int)}, 'images float64'),
    ({'image': make_arrays()[0], 'label': np.zeros(N)}, 'labels float64'),
    ({'image': make_arrays()[0], 'label': np.zeros((N, 2), int)}, r'int64 \[23, 2\]'),
    (
      {'image': make_arrays()[0], 'label': np.array([None] * N)},
      'no header of numbers.*O',
    ),
    ({'image': make_arrays()[0], 'label': np.arange(N) - 1}, 'has the label -1'),
    ({'image': make_arrays()[0][..., :2], 'label': np.zeros(N, int)}, 'C = 1 or 3'),
  ],
)
def test_import_refuses(tmp_path, arrays, message):
  np.savez(tmp_path / 'in.npz', **arrays)
  with pytest.raises(UserError, match=message) as caught:
    imports.import_samples([tmp_path / 'in.npz'], tmp_path / 'set', metadata=METADATA)
  assert 'in.npz' in str(caught.value)
  assert [file.name for file in tmp_path.iterdir()] == ['in.npz']


@pytest.mark.parametrize(
  'damage, message',
  [
    (flip_a_byte, 'in.npz is damaged.*CRC'),
    (lambda p: p.write_bytes(p.read_bytes()[:1000]), 'in.npz is damaged'),
    (lambda p: p.unlink(), 'in.npz does not exist'),
  ],
)
def test_import_refuses_damaged_files(tmp_path, damage, message):
  images, labels = make_arrays()
  np.savez(tmp_path / 'in.npz', image=images, label=labels)
  damage(tmp_path / 'in.npz')
  with pytest.raises(UserError, match=message):
    imports.import_samples([tmp_path / 'in.npz'], tmp_path / 'set', metadata=METADATA)
  assert not (tmp_path / 'set').exists()


def test_command_line(tmp_path, capsys):
  images, labels = make_arrays()
  np.savez(tmp_path / 'in.npz', image=images, label=labels)
  path = str(tmp_path / 'set')
  command = ['import', str(tmp_path / 'in.npz'), path, '--generator=ddpm']
  assert command_line.main([*command, f'--num_classes={K}']) == 0
  assert command_line.main(['verify', path]) == 0
  capsys.readouterr()
  assert command_line.main(['export', path, str(tmp_path / 'out.npz')]) == 0
  assert f'{tmp_path / "out.npz"}: ' in capsys.readouterr().out
  capsys.readouterr()
  assert command_line.main(['info', path]) == 0
  shown = capsys.readouterr().out
  assert f'{N} images in 1 shard\n' in shown and '2 files, verified' in shown
  assert 'generator: ddpm' in shown and 'imported_from: ["in.npz"]' in shown
  for label, count in enumerate(np.bincount(labels, minlength=K)):
    assert re.search(rf'class +{label} +{count} +{100 * count / N:.2f} % #', shown)
  assert command_line.main(['info', str(tmp_path)]) == 1
  assert capsys.readouterr().err.startswith('error: ')


def test_exit_codes(tmp_path, capsys, monkeypatch):
  """1 for what the user did, told in one line; 128 and above for a crash."""
  write(tmp_path / 'set')
  (tmp_path / 'file').write_text('')
  path, out = str(tmp_path / 'set'), tmp_path / 'some' / 'where' / 'out.npz'
  for command, message in (
    (['export', path], 'the following arguments are required: npz'),
    (['select', path, 'out', '--count=many'], 'invalid int value'),
    (['unknown'], 'invalid choice'),
    (['export', path, str(tmp_path / 'file' / 'out.npz')], 'file is no folder'),
    (['import', str(tmp_path), str(tmp_path / 'out')], 'holds no folders with PNG'),
  ):
    assert command_line.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and message in error
  assert command_line.main(['export', path, str(out)]) == 0
  assert out.exists()  # Its folders were made.

  def fail(error):
    def export(*_):
      raise error

    monkeypatch.setattr(npz, 'export_npz', export)
    return command_line.main(['export', path, 'out']), capsys.readouterr().err

  code, told = fail(OSError(errno.ENOSPC, 'No space left', 'a/file'))
  assert code == 1 and told.startswith('error: cannot write a/file: No space left')
  code, told = fail(RuntimeError('a fault'))
  assert code == 134 and 'Traceback' in told


def test_info_tells_sets_that_were_not_verified(tmp_path, capsys):
  write(tmp_path / 'set').verify()
  (tmp_path / 'set' / IMAGES).touch()
  sheet = tmp_path / 'sheet.png'
  path = str(tmp_path / 'set')
  assert command_line.main(['info', path, f'--sheet={sheet}']) == 0
  assert '6 files, not verified' in capsys.readouterr().out
  assert command_line.main(['info', path, f'--sheet={tmp_path}/no/sheet.png']) == 1
  assert 'cannot be written' in capsys.readouterr().err


def test_contact_sheet_has_a_row_for_each_class(tmp_path):
  """Images 4x6 are enlarged 8 times, with 2 pixels of white around each."""
  images, labels = make_arrays(200)
  labels = np.sort(labels) % (K - 1)  # The last class is empty.
  found = write(tmp_path / 'set', [(images, labels)])
  pictures.save(pictures.contact_sheet(found, 3), tmp_path / 'sheet.png')
  sheet = np.asarray(PIL.Image.open(tmp_path / 'sheet.png'))
  assert sheet.shape == (2 + K * 34, 2 + 3 * 50, 3)
  for row in range(K - 1):
    members = np.flatnonzero(labels == row)
    chosen = members[[0, len(members) // 3, 2 * len(members) // 3]]
    for column, index in enumerate(chosen):
      shown = sheet[2 + row * 34 :, 2 + column * 50 :][:32:8, :48:8]
      np.testing.assert_array_equal(shown, images[index])
  assert (sheet[2 + (K - 1) * 34 :] == 255).all()


@pytest.mark.parametrize(
  'edit',
  [
    lambda m: m.update(num_classes=10**9),
    lambda m: m.update(num_classes=5.0),
    lambda m: m.update(num_classes=True),
    lambda m: m.update(image_shape=[4, 0, 3]),
    lambda m: m.update(image_shape=[4, 6, 3, 1]),
    lambda m: m.update(image_shape=[2**20, 2**20, 3]),
    lambda m: m.update(image_shape='463'),
    lambda m: m.update(confidence='float64'),
    lambda m: m.update(confidence=[]),
    lambda m: m.update(sha256=[]),
    lambda m: m.update(sha256={}),
    lambda m: m.update(format_version='1'),
    lambda m: m['counts'].update(per_shard=[10, 10, -3]),
    lambda m: m['counts'].update(per_shard=[]),
    lambda m: m['counts'].update(per_shard=[10**400]),
    lambda m: m['counts'].update(per_class=None),
    lambda m: m['counts'].update(total=[N]),
    lambda m: m.update(counts=[1]),
  ],
  ids=range(18),
)
def test_metadata_of_wrong_types(tmp_path, edit):
  write(tmp_path / 'set')
  edit_metadata(tmp_path / 'set', edit)
  with pytest.raises(
    UserError, match='metadata.json (is damaged|contradicts|is not JSON)'
  ) as caught:
    sample_sets.SampleSet.open(tmp_path / 'set')
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize('name', ['metadata.json', IMAGES, LABELS])
def test_damaged_sets(tmp_path, name):
  """Each is the set, or refused in one line that names the file."""
  images, labels = make_arrays()
  path = tmp_path / 'set'
  write(path)
  content = (path / name).read_bytes()
  if name != 'metadata.json':  # Of the data `verify` says whether they are as written.
    content, data = content[:128], content[128:]
  for damaged in mutations(content, 250, seed=8):
    (path / name).write_bytes(damaged if name == 'metadata.json' else damaged + data)
    try:
      found = sample_sets.SampleSet.open(path)
    except UserError as error:
      line = str(error)
      assert str(path) in line and '\n' not in line and len(line) < len(str(path)) + 300
    else:
      np.testing.assert_array_equal(found.gather(np.arange(N)), images)
      np.testing.assert_array_equal(found.gather_labels(np.arange(N)), labels)


def test_metadata_that_could_not_be_read_again(tmp_path):
  """They are refused before the images are made."""
  for value in (float('nan'), '\udcff'):
    with pytest.raises(UserError, match='metadata of .*set'):
      write(tmp_path / 'set', iter(()), metadata={'generator': value})
  assert not list(tmp_path.iterdir())


def test_metadata_that_do_not_say_how_a_set_was_made(tmp_path):
  write(tmp_path / 'set')
  edit_metadata(tmp_path / 'set', lambda m: (m.pop('labeller'), m.pop('selection')))
  found = sample_sets.SampleSet.open(tmp_path / 'set')
  assert found.metadata['labeller'] is found.metadata['selection'] is None
