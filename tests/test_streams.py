"""Streams of a sample set: the same batches on any hosts, each of which holds its part.

The set has 101 images in 7 shards; 4 streams of 25, 25, 25 and 26 images do not end
where shards do. Of a batch of 16 images 12 are generated: 3 of each stream.
"""

import json
import shutil
import zlib

import numpy as np
import pytest

from experiments import digits
from jaxrobust.config import resolve
from jaxrobust.data import pipeline, training_images
from jaxrobust.data.datasets import Split
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.runs import checksums, process_group
from jaxrobust.samples import sample_sets, shards, streams
from jaxrobust.training import classifier
from tests.helpers.mutations import mutations

K, N, COUNT, BATCH = 3, 101, 4, 16
OFFSET = 1_000_000  # The numbers of generated images start here.
LATER = [(0.25, 0), (0.5, 5)]
EDGES = [0, 25, 50, 75, 101]


def numbered(n, offset=0):
  """Images whose bytes hold their own number, [n, 2, 2, 1]."""
  return np.arange(offset, offset + n, dtype='<u4').view(np.uint8).reshape(n, 2, 2, 1)


def numbers(batch):
  """The numbers in a batch of such images."""
  return np.ascontiguousarray(batch.images).reshape(-1, 4).view('<u4')[:, 0]


@pytest.fixture(scope='module')
def real():
  return Split(numbered(25), (np.arange(25) % K).astype(np.int32))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('streams') / 'set'
  batch = (numbered(N, OFFSET), (np.arange(N) + 1) % K)
  sample_sets.write(path, [batch], metadata={}, num_classes=K, shard_size=16)
  return path


@pytest.fixture(scope='module')
def whole(folder):
  return sample_sets.SampleSet.open(folder)


def batches(real, sample_set, share=0.25, start=0, steps=1, **kwargs):
  """Of one share of real images, or of a list of them and the steps they start at."""
  mix = share if isinstance(share, list) else [(share, 0)]
  settings = {'batch_size': BATCH, 'streams': COUNT, 'seed': 1, **kwargs}
  return list(
    pipeline.train_batches(
      real,
      sample_set,
      [pipeline.Share(*x) for x in mix],
      steps=range(start, start + steps),
      **settings,
    )
  )


def test_each_stream_has_its_images_once_an_epoch(real, whole):
  run = batches(real, whole, steps=180)
  number = np.stack([numbers(batch) for batch in run])
  generated = run[0].is_generated
  np.testing.assert_array_equal(generated.reshape(COUNT, -1).sum(1), 3)
  labels = np.stack([batch.labels for batch in run])
  np.testing.assert_array_equal(
    labels[:, generated], (number[:, generated] - OFFSET + 1) % K
  )
  for k in range(COUNT):
    mine = slice(k * BATCH // COUNT, (k + 1) * BATCH // COUNT)
    stream = number[:, mine][:, generated[mine]].ravel() - OFFSET
    size = EDGES[k + 1] - EDGES[k]
    epochs = stream[: len(stream) // size * size].reshape(-1, size)
    assert len(epochs) >= 20
    assert (np.sort(epochs) == np.arange(*EDGES[k : k + 2])).all()
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
  # Over all of it no image occurs more often than another by more than one a stream's
  # epoch of 26 in the place of 25.
  count = np.bincount(number[:, generated].ravel() - OFFSET, minlength=N)
  assert count.sum() == 180 * 12 and count.min() >= 180 * 3 // 26
  assert count.max() <= -(-180 * 3 // 25)


def test_real_images_are_shuffled_as_with_one_stream(real, whole):
  """And so is the whole set, with one."""
  shown = lambda count: [
    numbers(b)[~b.is_generated] for b in batches(real, whole, steps=9, streams=count)
  ]
  np.testing.assert_array_equal(shown(COUNT), shown(1))


@pytest.mark.parametrize('count, expected', [(1, 4164912395), (4, 3264713664)])
def test_golden_batches_so_that_old_runs_resume(real, whole, count, expected):
  # The first is of the version before there were streams.
  run = batches(real, whole, LATER, start=3, steps=40, streams=count, real_repeats=4)
  shown = np.concatenate([numbers(batch) for batch in run]).astype('<u4')
  assert zlib.crc32(shown.tobytes()) == expected


def test_resume_continues_every_stream(real, whole):
  run = [numbers(batch) for batch in batches(real, whole, LATER, steps=30)]
  for start in (2, 5, 17):  # Before, at and after the change of the mix.
    rest = batches(real, whole, LATER, start=start, steps=30 - start)
    np.testing.assert_array_equal([numbers(x) for x in rest], run[start:])


def test_a_later_share_goes_on_where_each_stream_is(real, whole):
  run = batches(real, whole, LATER, steps=60)
  for k in range(COUNT):
    mine = slice(k * BATCH // COUNT, (k + 1) * BATCH // COUNT)
    shown = [numbers(b)[mine][b.is_generated[mine]] - OFFSET for b in run]
    stream, size = np.concatenate(shown), EDGES[k + 1] - EDGES[k]
    epochs = stream[: len(stream) // size * size].reshape(-1, size)
    assert len(epochs) >= 4
    assert (np.sort(epochs) == np.arange(*EDGES[k : k + 2])).all()


def copy_part(folder, target, images):
  """A folder with the files only that some images need."""
  metadata = shards.read_metadata(folder)
  names = [*shards.label_names(metadata), *shards.image_names(metadata, images)]
  target.mkdir()
  for name in [*names, shards.METADATA]:
    shutil.copy(folder / name, target / name)
  return len(names) - len(metadata['counts']['per_shard'])


@pytest.mark.parametrize('hosts, most', [(1, 7), (2, 4), (4, 3), (8, 3)])
def test_a_host_needs_only_the_files_of_its_streams(
  real, whole, folder, tmp_path, hosts, most
):
  expected = batches(real, whole, LATER, steps=30)
  for host in range(hosts):
    slots = (host * BATCH // hosts, (host + 1) * BATCH // hosts)
    part = streams.of_slots(COUNT, slots, BATCH)
    own = tmp_path / f'host-{host}'
    assert copy_part(folder, own, part.images(N)) <= most
    held = sample_sets.SampleSet.open(own, part)
    held.verify()
    assert held.is_verified() and held.checksum() == whole.checksum()
    found = batches(real, held, LATER, steps=30, slots=slots)
    for ours, theirs in zip(found, expected, strict=True):
      for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, y[slice(*slots)])
    if len(held.images) < N:
      with pytest.raises(IndexError):
        held.gather(np.array([held.images.start - 1 if host else held.images.stop]))


def test_hosts_that_do_not_divide_the_streams_share_one():
  part = lambda host: streams.of_slots(COUNT, (16 * host, 16 * host + 16), 48)
  assert [part(host)[1:] for host in range(3)] == [(0, 2), (1, 3), (2, 4)]


def test_missing_and_corrupt_files_of_its_streams_are_named(folder, tmp_path):
  part = streams.Streams(COUNT, 0, 1)
  copy_part(folder, tmp_path / 'set', part.images(N))
  with pytest.raises(UserError, match='images-00002-of-00007.npy is missing'):
    sample_sets.SampleSet.open(tmp_path / 'set', streams.Streams(COUNT, 0, 2))
  first = tmp_path / 'set/images-00000-of-00007.npy'
  content = bytearray(first.read_bytes())
  content[-1] ^= 1
  first.write_bytes(content)
  with pytest.raises(UserError, match='corrupt .*images-00000-of-00007.npy'):
    sample_sets.SampleSet.open(tmp_path / 'set', part).verify()


def test_a_part_is_verified_once_and_others_after_it(folder, tmp_path, monkeypatch):
  shutil.copytree(folder, tmp_path / 'set')
  read, digest = [], checksums.sha256
  monkeypatch.setattr(checksums, 'sha256', lambda f: read.append(f.name) or digest(f))
  for first, number in ((0, 7 + 2), (0, 0), (1, 3 - 1), (0, 0)):
    del read[:]
    part = streams.Streams(COUNT, first, first + 1)
    sample_sets.SampleSet.open(tmp_path / 'set', part).verify()
    assert len(read) == number
  # Other metadata say that other bytes are right.
  assert sample_sets.SampleSet.open(tmp_path / 'set', part).is_verified()
  path = tmp_path / 'set' / shards.METADATA
  path.write_text(json.dumps(json.loads(path.read_text()) | {'seed': 3}))
  assert not sample_sets.SampleSet.open(tmp_path / 'set', part).is_verified()


def test_damaged_records_of_verifications_say_nothing(folder, tmp_path):
  """They are written anew."""
  shutil.copytree(folder, tmp_path / 'set')
  found = sample_sets.SampleSet.open(tmp_path / 'set')
  found.verify()
  stamp = tmp_path / 'set/verified.json'
  content = stamp.read_bytes()
  for damaged in (b'[' * 100_000, b'[]', b'', *mutations(content, 200, seed=3)):
    stamp.write_bytes(damaged)
    found.is_verified()  # It reads or refuses.
  stamp.write_bytes(content[:-9])
  assert not found.is_verified()
  found.verify()
  assert found.is_verified()


def test_a_run_opens_the_streams_of_its_slots(folder, tmp_path, monkeypatch):
  """And without a sample set it has one."""
  config = digits.get_config().unlock()
  config.data.update(samples=str(folder), streams=COUNT)
  monkeypatch.setattr(parallel, 'process_slots', lambda batch: (batch // 2, batch))
  arrays = np.zeros((600, 2, 2, 1), np.uint8), np.arange(600) % K
  loaded, load = [], training_images.load
  monkeypatch.setattr(
    training_images, 'load', lambda *given: loaded.append(load(*given)) or 1 / 0
  )
  with pytest.raises(ZeroDivisionError):
    classifier.train(config.lock(), tmp_path / 'run', train=arrays)
  assert loaded[0].generated.images == range(50, 101)
  config.unlock()
  assert resolve(config).streams == COUNT
  assert classifier.check_batch(config, resolve(config)) == [(32, 32)]
  config.data.streams = 64
  with pytest.raises(UserError, match='which 64 streams cannot share equally'):
    classifier.check_batch(config, resolve(config))
  config.data.samples = ''
  assert resolve(config).streams == 1
  assert classifier.check_batch(config, resolve(config)) == [(64, 0)]


def test_hosts_with_other_parts_agree_and_with_another_set_do_not(folder, tmp_path):
  facts = []
  for host, seed in enumerate((None, None, 3)):
    part = streams.Streams(COUNT, host, host + 1)
    own = tmp_path / f'host-{host}'
    copy_part(folder, own, part.images(N))
    if seed:  # Others that were made alike: their files have other checksums.
      metadata = json.loads((own / shards.METADATA).read_text())
      metadata['sha256'][shards.label_names(metadata)[0]] = 'another'
      (own / shards.METADATA).write_text(json.dumps(metadata))
    found = sample_sets.SampleSet.open(own, part)
    facts.append({'generated images': found.checksum()})
  assert not process_group.compare(facts[0], {1: facts[1]})
  assert 'generated images' in process_group.compare(facts[0], {1: facts[2]})


def test_streams_are_independent_of_each_other():
  # At equal positions, and one apart. Each of 100 pairs of deciles has 200 of 20,000
  # cases, with a deviation of 14: six of them bound 600 cells with certainty in
  # practice.
  n, size = 20_000, 3_125_000
  keys = [pipeline._stream_key(0, 1, k) for k in range(3)]
  shown = [
    pipeline._shuffled(np.arange(n + 1), np.full(n + 1, size), np.full(n + 1, key))
    for key in keys
  ]
  deciles = [x.numpy() * 10 // size for x in shown]
  for a, b, lag in ((0, 1, 0), (0, 2, 0), (1, 2, 0), (0, 1, 1), (1, 0, 1), (2, 1, 1)):
    cells = np.bincount(deciles[a][:n] * 10 + deciles[b][lag : n + lag], minlength=100)
    assert np.abs(cells - n / 100).max() < 6 * 14
  assert len(set(keys)) == 3 and keys[0] == pipeline._stream_key(0, 1)


def test_a_slot_draws_from_all_of_its_stream(real, whole):
  # Each image of a stream of 25 or 26 is in a slot once in so many draws: by chance 20
  # times of 500, with a deviation of 4.4, which six of bound in practice.
  run = np.stack([numbers(x) for x in batches(real, whole, share=0.0, steps=500)])
  for slot in (0, 5, 10, 15):
    first, stop = EDGES[slot // 4 : slot // 4 + 2]
    counts = np.bincount(run[:, slot] - OFFSET, minlength=N)
    assert counts[first:stop].sum() == 500
    assert np.abs(counts[first:stop] - 500 / (stop - first)).max() < 6 * 4.4


@pytest.mark.parametrize(
  'settings, words',
  [
    ({'streams': 8, 'share': 0.25}, 'gives 4 real .* which 8 streams .* use 0 .0. or'),
    ({'streams': 5}, 'batch_size = 16 is not a multiple of 5 streams; use 15 or 20'),
    ({'streams': 32}, 'batch_size = 16 is not a multiple of 32 streams; use 32'),
    ({'share': [(0.25, 0), (0.375, 5)]}, 'gives 6 real images .* which 4 streams'),
  ],
)
def test_streams_that_cannot_share_a_batch(real, whole, settings, words):
  with pytest.raises(UserError, match=words):
    batches(real, whole, steps=9, **settings)


def test_a_set_in_the_order_of_its_classes(tmp_path):
  """With one stream it does no harm; streams would be of one class each."""
  labels = np.sort(np.arange(400) % 4)
  options = {'metadata': {}, 'num_classes': 4}
  images = numbered(400)
  sample_sets.write(tmp_path / 'sorted', [(images, labels)], **options)
  with pytest.raises(
    UserError, match='sorted is not in random order.*data.streams = 1'
  ):
    sample_sets.SampleSet.open(tmp_path / 'sorted', streams.Streams(4, 0, 4))
  shuffled = np.random.default_rng(0).permutation(labels)
  sample_sets.write(tmp_path / 'random', [(images, shuffled)], **options)
  sample_sets.SampleSet.open(tmp_path / 'random', streams.Streams(4, 0, 4))
  with pytest.raises(UserError, match='400 images for data.streams = 512'):
    sample_sets.SampleSet.open(tmp_path / 'random', streams.Streams(512, 0, 1))


def test_chance_is_no_reason_to_refuse():
  """Nor are few images of many classes."""
  rng = np.random.default_rng(0)
  for n, classes, count in ((300, 10, 32), (2_000, 100, 16), (100_000, 10, 64)):
    for _ in range(20):
      streams.check_classes('set', rng.integers(0, classes, n), classes, count)
