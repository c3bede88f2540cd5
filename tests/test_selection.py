"""Selections by hand, and the confidences that they need."""

import json

import numpy as np
import pytest

from jaxrobust.data import __main__ as command_line
from jaxrobust.errors import UserError
from jaxrobust.samples import sample_sets, selection

LABELS = np.array([0, 1, 0, 0, 1, 0, 2, 2, 0, 0])  # 6, 2 and 2 of the classes
CONFIDENCE = np.array([0.5, 0.9, 1, 0.5, 0.2, 0.75, 0.3, 0.6, 1, 0.25], np.float32)


def pool(path, confidence=CONFIDENCE):
  """A set of 10 images, of which image i is grey i."""
  images = np.arange(10, dtype=np.uint8).repeat(12).reshape(10, 2, 2, 3)
  rest = [] if confidence is None else [confidence]
  batches = [
    tuple(array[part] for array in (images, LABELS, *rest))
    for part in (slice(0, 4), slice(4, 10))
  ]
  metadata = {'generator': 'grey', 'labeller': 'me', 'note': 1}
  return sample_sets.write(
    path, batches, metadata=metadata, num_classes=3, shard_size=4
  )


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_confidences_are_part_of_the_set(tmp_path, dtype):
  found = pool(tmp_path / 'set', CONFIDENCE.astype(dtype))
  np.testing.assert_array_equal(found.confidence(), CONFIDENCE.astype(dtype))
  shard = np.load(tmp_path / 'set' / 'confidence-00001-of-00003.npy')
  np.testing.assert_array_equal(shard, CONFIDENCE[4:8].astype(dtype))
  assert shard.dtype == dtype and found.metadata['confidence'] == np.dtype(dtype).name
  assert 'confidence-00001-of-00003.npy' in found.metadata['sha256']
  assert pool(tmp_path / 'without', None).confidence() is None
  (tmp_path / 'set' / 'confidence-00001-of-00003.npy').unlink()
  with pytest.raises(UserError, match='confidence-00001-of-00003.npy is missing'):
    sample_sets.SampleSet.open(tmp_path / 'set')


@pytest.mark.parametrize(
  'confidences, message',
  [
    ([CONFIDENCE.astype(float)], 'float64'),
    ([CONFIDENCE[1:]], r'\[9\] with 10 labels'),
    ([CONFIDENCE + 0.5], r'outside \[0, 1\]'),
    ([CONFIDENCE * np.float32(np.nan)], r'outside \[0, 1\]'),
    ([CONFIDENCE, None], 'or none'),
    ([None, CONFIDENCE], 'or none'),
  ],
)
def test_confidences_that_are_refused(tmp_path, confidences, message):
  images = np.zeros((10, 2, 2, 3), np.uint8)
  batches = [(images, LABELS, *([] if c is None else [c])) for c in confidences]
  with pytest.raises(UserError, match=message):
    sample_sets.write(tmp_path / 'set', batches, metadata={}, num_classes=3)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'options, kept',
  [
    # Half of each class: 3, 1 and 1.
    ({'top_fraction': 0.5}, [1, 2, 5, 7, 8]),
    # 7 of 10: 4, 1.33 and 1.33, of which the first is rounded up.
    ({'top_fraction': 2 / 3}, [0, 1, 2, 4, 5, 7, 8]),
    # 4 and one more of class 0; of class 0 the two of confidence 1.
    ({'top_fraction': 0.4, 'balanced': True}, [1, 2, 7, 8]),
    ({'top_fraction': 1.0}, range(10)),
    ({'count': 10}, range(10)),
    # Of the others all; of class 0 those with the greatest of the draws
    # 0.5488 0.6028 0.5449 0.6459 0.9637 0.3834.
    ({'count': 6, 'balanced': True}, [1, 4, 5, 6, 7, 8]),
  ],
)
def test_selections_by_hand(tmp_path, options, kept):
  source = pool(tmp_path / 'pool')
  found = selection.subset(source, tmp_path / 'set', shard_size=2, **options)
  kept = np.array(kept)
  everything = np.arange(len(kept))
  np.testing.assert_array_equal(found.gather(everything)[:, 0, 0, 0], kept)
  np.testing.assert_array_equal(found.gather_labels(everything), LABELS[kept])
  np.testing.assert_array_equal(found.confidence(), CONFIDENCE[kept])
  counts = found.metadata['counts']
  assert counts['per_class'] == np.bincount(LABELS[kept], minlength=3).tolist()
  assert found.metadata['generator'] == 'grey' and found.metadata['note'] == 1
  said = found.metadata['selection']
  assert said['top_fraction'] == options.get('top_fraction')
  assert said['seed'] == (0 if 'count' in options else None)
  assert said['pool']['total'] == 10 and said['pool']['per_class'] == [6, 2, 2]


def test_a_count_takes_the_same_share_of_each_class(tmp_path):
  """A set sorted by class; each image is kept as often as any other."""
  source = sample_sets.write(
    tmp_path / 'pool',
    [(np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1), np.arange(40) // 10)],
    metadata={},
    num_classes=4,
  )
  kept = np.zeros(40)
  for seed in range(20):
    found = selection.subset(source, tmp_path / f'set{seed}', count=8, seed=seed)
    assert found.metadata['counts']['per_class'] == [2, 2, 2, 2]
    kept[found.gather(np.arange(8)).ravel()] += 1
  # Binomial, 20 of 0.2: mean 4, deviation 1.8; five of them are allowed.
  assert abs(kept - 4).max() < 9
  found = selection.subset(source, tmp_path / 'again', count=8, seed=19)
  assert sorted(found.gather(np.arange(8)).ravel()) == sorted(
    sample_sets.SampleSet.open(tmp_path / 'set19').gather(np.arange(8)).ravel()
  )


@pytest.mark.parametrize(
  'options, message',
  [
    ({}, 'one of --top_fraction and --count'),
    ({'count': 3, 'seed': -1}, 'seed = -1: give a number from 0'),
    ({'count': 3, 'top_fraction': 0.5}, 'one of'),
    ({'top_fraction': 0}, 'above 0'),
    ({'count': 11}, '--count=11: .* has 10 samples; choose 1 to 10'),
    ({'top_fraction': 1.5}, 'up to 1'),
    # 3, 3 and 2 of classes with 6, 2 and 2.
    ({'top_fraction': 0.8, 'balanced': True}, r'\[1\] for 3 of each: keep at most 6'),
  ],
)
def test_selections_that_are_refused(tmp_path, options, message):
  source = pool(tmp_path / 'pool')
  with pytest.raises(UserError, match=message):
    selection.subset(source, tmp_path / 'set', **options)
  with pytest.raises(UserError, match='no confidences.*--count=N'):
    selection.subset(pool(tmp_path / 'old', None), tmp_path / 'set', top_fraction=0.5)


@pytest.mark.parametrize(
  'rule, kept',
  [
    # The first ones; the first of each class, one more of classes 0 and 1.
    (selection.Rule(4, balanced=False), [0, 1, 2, 3]),
    (selection.Rule(5, balanced=True), [0, 1, 2, 4, 6]),
    # Of the first 8, in which classes are 4, 2 and 2: 2, 1 and 1, by confidence.
    (selection.Rule(4, balanced=False, top_fraction=0.5), [1, 2, 5, 7]),
    # Of the first 2 of each class.
    (selection.Rule(3, balanced=True, top_fraction=0.5), [1, 2, 7]),
  ],
)
def test_rules_by_hand(rule, kept):
  for drawn in (slice(8), slice(None)):  # What is drawn beyond changes nothing.
    labels = LABELS[drawn]
    assert not rule.shortfall(np.bincount(labels))[0].any()
    positions, described = rule.choose(labels, CONFIDENCE[drawn], 3)
    np.testing.assert_array_equal(positions, kept)
    assert described['drawn'] == len(labels)
  per_class = [2, 2, 2] if rule.balanced else [4, 2, 2]
  if rule.top_fraction < 1:
    assert described['pool'] == {'total': sum(per_class), 'per_class': per_class}


def test_what_a_rule_still_needs():
  short, times = selection.Rule(12, True, 0.5).shortfall(np.array([10, 4, 8]))
  assert short.tolist() == [0, 4, 0] and times == 2
  short, times = selection.Rule(12, True).shortfall(np.array([10, 0, 8]))
  assert short.tolist() == [0, 4, 0] and times == np.inf
  short, times = selection.Rule(3, False, 0.3).shortfall(np.array([4, 1, 3]))
  assert short.tolist() == [2] and times == 10 / 8


def test_shares_of_classes_sum_to_the_whole():
  """Largest remainders: 10 of 30, 30 and 39 are 3.03, 3.03 and 3.94."""
  assert selection.class_quotas([30, 30, 39], 10, False).tolist() == [3, 3, 4]
  rng = np.random.RandomState(0)
  for _ in range(100):
    per_class = rng.randint(0, 50, 7)
    count = rng.randint(0, per_class.sum() + 1)
    quotas = selection.class_quotas(per_class, count, False)
    assert quotas.sum() == count and (quotas <= per_class).all()
    exact = per_class * count / per_class.sum()
    assert (np.abs(quotas - exact) < 1).all()


def test_command_line(tmp_path, capsys):
  pool(tmp_path / 'pool')
  command = ['select', str(tmp_path / 'pool'), str(tmp_path / 'set')]
  assert command_line.main([*command, '--top_fraction=0.4', '--balanced']) == 0
  assert '4 of 10 images' in capsys.readouterr().out
  metadata = json.loads((tmp_path / 'set' / 'metadata.json').read_text())
  assert metadata['counts']['per_class'] == [2, 1, 1]
  assert command_line.main(command) == 1
