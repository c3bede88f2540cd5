"""Selection: balance, exact counts, and giving up with the classes that lack."""

import itertools

import numpy as np
import pytest

from experiments import digits_gaussian
from jaxrobust import generate
from jaxrobust.errors import UserError


def make_config(**samples):
  config = digits_gaussian.get_config()
  for name, value in samples.items():
    config.samples[name] = value
  return config


def batches(labels_of):
  """Endless batches of 8; image i has value i."""
  for start in itertools.count(0, 8):
    index = np.arange(start, start + 8)
    images = np.broadcast_to(index[:, None, None, None], (8, 2, 2, 1))
    yield images, labels_of(index), index % 3


def select(config, labels_of):
  selection = generate.Selection(config, 3)
  kept = list(selection.select(batches(labels_of)))
  images = np.concatenate([x[0][:, 0, 0, 0] for x in kept])
  return selection, images, np.concatenate([x[1] for x in kept])


def test_balanced_takes_the_first_of_each_class():
  labels_of = lambda i: np.where(i % 6 < 4, 0, i % 6 - 3)  # 0 four times as often.
  selection, images, labels = select(make_config(count=12), labels_of)
  assert np.bincount(labels).tolist() == [4, 4, 4]
  for label in range(3):
    expected = [i for i in range(100) if labels_of(np.array(i)) == label][:4]
    assert images[labels == label].tolist() == expected
  assert selection.drawn == 24


def test_a_count_that_classes_do_not_divide():
  _, _, labels = select(make_config(count=8), lambda i: i % 3)
  assert np.bincount(labels).tolist() == [3, 3, 2]


def test_none_takes_the_first_samples_as_they_come():
  selection, images, _ = select(
    make_config(count=11, selection='none'), lambda i: np.zeros(len(i), int)
  )
  assert images.tolist() == list(range(11))
  assert selection.agreed == sum(i % 3 == 0 for i in range(16))


def test_gives_up_and_names_the_classes_that_are_short():
  with pytest.raises(UserError, match=r'too few of the classes \[2\] \(4 of 12'):
    select(make_config(count=12, max_draws_factor=4.0), lambda i: i % 2)


@pytest.mark.parametrize(
  'field, value', [('count', 0), ('selection', 'best'), ('batch_size', -1)]
)
def test_refuses_values(field, value):
  with pytest.raises(UserError, match=f'samples.{field}'):
    generate.check(make_config(**{field: value}))
