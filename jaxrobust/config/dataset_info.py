"""What is known of each data set without opening it."""

from typing import NamedTuple


class DatasetInfo(NamedTuple):
  """What is known of a dataset without opening it; sizes of the official splits."""

  name: str
  image_shape: tuple[int, int, int]
  num_classes: int
  train_size: int
  test_size: int


INFO = {
  info.name: info
  for info in (
    DatasetInfo('digits', (8, 8, 1), 10, 1_000, 797),
    DatasetInfo('cifar10', (32, 32, 3), 10, 50_000, 10_000),
    DatasetInfo('cifar100', (32, 32, 3), 100, 50_000, 10_000),
    DatasetInfo('svhn', (32, 32, 3), 10, 73_257, 26_032),
    DatasetInfo('mnist', (28, 28, 1), 10, 60_000, 10_000),
    DatasetInfo('tiny_imagenet', (64, 64, 3), 200, 100_000, 10_000),
  )
}
