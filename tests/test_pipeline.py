"""The mix: exact counts, whole epochs, and the same batches on any layout."""

import collections

import numpy as np
import pytest

from jaxrobust.data import datasets, pipeline
from jaxrobust.data.datasets import Split
from jaxrobust.errors import UserError
from jaxrobust.samples import sample_sets

K = 3


def numbered(n, offset=0):
  """Images whose bytes hold their own number, [n, 2, 2, 1]."""
  number = np.arange(offset, offset + n, dtype='<u4')
  return number.view(np.uint8).reshape(n, 2, 2, 1)


def numbers(batch):
  """The numbers in a batch of such images."""
  return np.ascontiguousarray(batch.images).reshape(-1, 4).view('<u4')[:, 0]


OFFSET = 1_000_000  # the numbers of generated images start here


@pytest.fixture
def sources(tmp_path):
  def make(num_real, num_generated):
    real = Split(numbered(num_real), (np.arange(num_real) % K).astype(np.int32))
    sample_set = sample_sets.write(
      tmp_path / f'set-{num_real}-{num_generated}',
      [(numbered(num_generated, OFFSET), (np.arange(num_generated) + 1) % K)],
      metadata={},
      num_classes=K,
      shard_size=37,
    )
    return real, sample_set

  return make


def batches(real, sample_set, share=0.25, start=0, steps=1, **kwargs):
  """Of one share of real images, or of a list of them and the steps they start at."""
  mix = share if isinstance(share, list) else [(share, 0)]
  settings = {'batch_size': 16, 'real_repeats': 4, 'seed': 1, **kwargs}
  steps = range(start, start + steps)
  return list(
    pipeline.train_batches(
      real, sample_set, [pipeline.Share(*x) for x in mix], steps=steps, **settings
    )
  )


def test_counts_labels_and_interleaving(sources):
  real, sample_set = sources(50, 100)
  for batch in batches(real, sample_set, steps=5, share=0.5):
    number = numbers(batch)
    assert batch.images.shape == (16, 2, 2, 1) and batch.images.dtype == np.uint8
    assert batch.labels.dtype == np.int32 and batch.is_generated.dtype == bool
    np.testing.assert_array_equal(batch.is_generated, number >= OFFSET)
    expected = np.where(number >= OFFSET, number - OFFSET + 1, number) % K
    np.testing.assert_array_equal(batch.labels, expected)
    for parts in (1, 2, 4, 8):
      assert set(batch.is_generated.reshape(parts, -1).sum(1)) == {8 // parts}


def test_uneven_share_differs_by_at_most_one_a_part(sources):
  (batch,) = batches(*sources(50, 100), share=5 / 16, real_repeats=1)
  shares = (~batch.is_generated).reshape(4, 4).sum(1)
  assert shares.sum() == 5 and set(shares) == {1, 2}


def test_repeats_are_in_different_quarters(sources):
  # 8 real slots of 16 hold 2 images, 4 times each.
  for batch in batches(*sources(50, 100), steps=4, share=0.5):
    quarters = [sorted(part[part < OFFSET]) for part in numbers(batch).reshape(4, 4)]
    assert all(len(set(part)) == 2 and part == quarters[0] for part in quarters)


def test_each_image_once_an_epoch_of_its_own_source(sources):
  # 6 distinct real of 25 and 10 generated of 33 a step: epochs end inside batches.
  run = batches(*sources(25, 33), steps=99, share=6 / 16, real_repeats=1)
  number = np.stack([numbers(b) for b in run])
  generated = run[0].is_generated
  for columns, size in ((number[:, ~generated], 25), (number[:, generated], 33)):
    stream = columns.ravel() % OFFSET
    epochs = stream[: len(stream) // size * size].reshape(-1, size)
    assert len(epochs) >= 20
    assert (np.sort(epochs) == np.arange(size)).all()
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_small_source_wraps_inside_one_batch(sources):
  (batch,) = batches(*sources(3, 5), share=0.5, real_repeats=1)
  real, generated = np.split(np.sort(numbers(batch)), 2)
  assert set(collections.Counter(real.tolist()).values()) == {2, 3}
  assert set(collections.Counter(generated.tolist()).values()) == {1, 2}


def assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)


def test_resume_continues_the_stream(sources):
  pair = sources(25, 33)
  whole = batches(*pair, LATER, steps=12)
  for start in (2, 5, 7):  # Before, at and after the change of the mix.
    assert_equal(batches(*pair, LATER, start=start, steps=12 - start), whole[start:])
  assert_equal(batches(*pair, start=7, steps=5), batches(*pair, steps=12)[7:])


LATER = [(0.0, 0), (0.5, 5)]


def test_a_later_share_goes_on_where_each_source_is(sources):
  """Exact counts on both sides; no image skipped or repeated in an epoch."""
  pair = sources(25, 33)
  for first, later in ((0.0, 0.5), (0.75, 0.25)):
    run = batches(*pair, [(first, 0), (later, 5)], steps=60, real_repeats=1)
    counts = [int((~batch.is_generated).sum()) for batch in run]
    assert counts == [16 * first] * 5 + [16 * later] * 55
    for generated, size in ((False, 25), (True, 33)):
      stream = np.concatenate(
        [numbers(b)[b.is_generated == generated] % OFFSET for b in run]
      )
      epochs = stream[: len(stream) // size * size].reshape(-1, size)
      assert len(epochs) >= 8
      assert (np.sort(epochs) == np.arange(size)).all()


@pytest.mark.parametrize('processes', [2, 4, 16])
def test_processes_concatenate_to_the_whole_batch(sources, processes):
  pair = sources(25, 33)
  n = 16 // processes
  parts = [
    batches(*pair, start=2, steps=4, slots=(p * n, p * n + n)) for p in range(processes)
  ]
  joined = [
    pipeline.Batch(*map(np.concatenate, zip(*step, strict=True)))
    for step in zip(*parts, strict=True)
  ]
  assert_equal(joined, batches(*pair, start=2, steps=4))


def test_seeds_sources_and_epochs_shuffle_differently(sources):
  real, sample_set = sources(64, 64)
  settings = {'share': 0.5, 'real_repeats': 1, 'batch_size': 128}
  streams = []
  for seed in (1, 2):
    for batch in batches(real, sample_set, steps=2, seed=seed, **settings):
      number = numbers(batch)
      streams += [number[~batch.is_generated], number[batch.is_generated] - OFFSET]
  # Two random permutations of 64 agree in one place on average.
  for i, a in enumerate(streams):
    assert sorted(a) == list(range(64))
    assert all(np.sum(a == b) < 10 for b in streams[:i])


def test_shuffle_is_a_bijection_of_any_size():
  for size in (1, 2, 3, 10, 255, 256, 257, 1797, 70_001):
    keys = np.full(size, pipeline._stream_key(3, 1))
    for epoch in (0, 1, 10**9):
      positions = np.arange(size) + epoch * size
      found = pipeline._shuffled(positions, np.full(size, size), keys).numpy()
      np.testing.assert_array_equal(np.sort(found), np.arange(size))


def test_neighbours_are_independent():
  # A weak cipher keeps neighbours at nearly constant distance. Each decile of the
  # distance has probability 0.1, so counts of 20,000 have a deviation of 42; 6 of
  # them bound the ten deciles, over 3 lags and sizes, with certainty in practice.
  n = 20_000
  for size in (50_000, 1_000_000, 10_000_000):
    keys = np.full(n + 64, pipeline._stream_key(0, 1))
    found = pipeline._shuffled(np.arange(n + 64), np.full(n + 64, size), keys).numpy()
    for lag in (1, 2, 64):
      distance = (found[lag : lag + n] - found[:n]) % size
      counts = np.bincount(distance * 10 // size, minlength=10)
      assert np.abs(counts - n / 10).max() < 6 * 42


def test_positions_beyond_32_bits():
  size = 5_000_000_000
  positions = np.arange(1000) + 3 * size - 500
  keys = np.full(1000, pipeline._stream_key(0, 1))
  found = pipeline._shuffled(positions, np.full(1000, size), keys).numpy()
  assert found.min() >= 0 and found.max() < size and found.max() > 2**32
  assert len(set(found.tolist())) >= 999  # two epochs: a coincidence is unlikely


def test_golden_order_so_that_old_runs_resume():
  # Golden values: an update of tensorflow must not change the order of a run.
  keys = np.full(6, pipeline._stream_key(0, 1))
  positions = np.arange(6) + 999_997
  found = pipeline._shuffled(positions, np.full(6, 1_000_000), keys).numpy()
  assert found.tolist() == [353847, 366555, 508853, 356466, 448713, 597827]


def test_one_source_alone(sources):
  real, sample_set = sources(25, 33)
  (batch,) = batches(real, None, share=1.0)
  assert not batch.is_generated.any() and numbers(batch).max() < OFFSET
  (batch,) = batches(None, sample_set, share=0.0)
  assert batch.is_generated.all() and numbers(batch).min() >= OFFSET
  assert_equal([batch], batches(real, sample_set, share=0.0))


def test_mix_counts():
  assert pipeline.mix_counts(1024, 0.3125, 4) == (320, 704)
  assert pipeline.mix_counts(1024, 0.0, 4) == (0, 1024)
  assert pipeline.mix_counts(1024, 1.0, 4) == (1024, 0)
  assert pipeline.mix_counts(1024, 0.3, 1) == (307, 717)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ((1024, 0.3, 4), r'gives 307 .* use 0.296875 \(304\) or 0.30078125 \(308\)'),
    ((6, 1.0, 4), r'use 0.6666666667 \(4\)$'),
    ((1024, 1.5, 1), 'real_fraction = 1.5'),
    ((1024, float('nan'), 1), 'real_fraction = nan'),
    ((0, 0.5, 1), 'batch_size = 0'),
    ((16, 0.5, 0), 'real_repeats = 0'),
  ],
)
def test_mix_counts_refuses(arguments, message):
  with pytest.raises(UserError, match=message):
    pipeline.mix_counts(*arguments)


def test_suggested_fractions_are_accepted():
  assert pipeline.mix_counts(6, 0.6666666667, 4) == (4, 2)
  assert pipeline.mix_counts(1024, 0.30078125, 4) == (308, 716)


def test_parts_share_the_real_images_equally():
  counts = lambda fraction, **parts: pipeline.mix_counts(1024, fraction, 1, parts)
  assert counts(0.3125, devices=32, groups=8) == (320, 704)
  assert counts(0.0, devices=8) == (0, 1024)
  message = (
    r'gives 307 real images in a batch of 1024, which 8 devices cannot share '
    r'equally; use 0.296875 \(304\) or 0.3046875 \(312\)'
  )
  with pytest.raises(UserError, match=message):
    counts(0.3, devices=8)
  with pytest.raises(UserError, match='1020 is not a multiple of 8 devices; use 1016'):
    pipeline.mix_counts(1020, 0.0, 1, {'devices': 8})


def test_the_remedy_suits_all_parts_and_repeats():
  """What the message suggests is accepted, not refused by the next check."""
  parts = {'devices': 8, 'groups': 32}
  with pytest.raises(UserError, match=r'use 0.28125 \(288\) or 0.3125 \(320\)'):
    pipeline.mix_counts(1024, 0.3, 4, parts)
  for fraction in (0.28125, 0.3125):
    pipeline.mix_counts(1024, fraction, 4, parts)


def test_train_batches_refuses(sources):
  real, sample_set = sources(25, 33)
  with pytest.raises(UserError, match='no sample set'):
    batches(real, None)
  with pytest.raises(UserError, match='4 real images a batch, but there are none'):
    batches(None, sample_set)
  with pytest.raises(UserError, match='4 real images a batch, but there are none'):
    batches(Split(real.images[:0], real.labels[:0]), sample_set)
  with pytest.raises(UserError, match=r'set-25-33 holds images \[2, 2, 1\]'):
    batches(Split(real.images[:, :1], real.labels), sample_set)
  with pytest.raises(UserError, match='set-25-33 has 3 classes, the dataset 4'):
    batches(Split(real.images, real.labels + 1), sample_set)
  with pytest.raises(UserError, match='set-25-33 has 3 classes, the dataset 10'):
    batches(real, sample_set, num_classes=10)
  with pytest.raises(UserError, match='slots 8..17'):
    batches(real, sample_set, slots=(8, 17))


def test_the_end_waits_for_no_thread_that_tunes(sources, monkeypatch):
  """It may sleep for a minute, which nothing but chance shows."""
  tf = datasets.import_tensorflow()
  iterate, seen = tf.data.Dataset.as_numpy_iterator, []

  def watched(dataset):
    seen.append(dataset.options().autotune.enabled)
    return iterate(dataset)

  monkeypatch.setattr(tf.data.Dataset, 'as_numpy_iterator', watched)
  batches(*sources(50, 100))
  assert seen == [False]
