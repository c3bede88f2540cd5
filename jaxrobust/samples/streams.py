"""Streams of a sample set, so that a host of a pod holds only the images that it reads.

Slot s of a batch of B images belongs to stream s · count // B. Of a set of N images
stream k has those from N · k // count to N · (k + 1) // count, in an order of its own.
What is in a slot depends on the count but not on the hosts, each of which feeds
consecutive slots, hence reads consecutive streams, hence consecutive images. One stream
is the shuffle of the whole set.
"""

import os
from typing import NamedTuple

import numpy as np

from jaxrobust.errors import UserError

# Distance of a stream's classes from the set's, beside what chance brings about.
_MOST_DISTANCE = 0.1


class Streams(NamedTuple):
  """Consecutive streams of those that a set is divided into: all of one by default.

  Attributes:
    count: of the streams of the set.
    first: of these.
    stop: the one after the last of these.
  """

  count: int = 1
  first: int = 0
  stop: int = 1

  def images(self, num_images: int) -> range:
    """The images of these streams, in a set of so many."""
    return range(
      *(num_images * stream // self.count for stream in (self.first, self.stop))
    )


ALL = Streams()


def of_slots(count: int, slots: tuple[int, int], batch_size: int) -> Streams:
  """The streams that a process reads.

  Args:
    count: of the streams of the set.
    slots: (start, stop), those of the batch that the process feeds.
    batch_size: images in a global batch.

  Returns:
    The streams of these slots. Where the processes do not divide the streams, one that
    is cut is read by two processes.
  """
  start, stop = slots
  return Streams(count, start * count // batch_size, -(-stop * count // batch_size))


def check_classes(
  path: str | os.PathLike, labels: np.ndarray, num_classes: int, count: int
) -> None:
  """Refuses streams of which each would be another mixture of classes.

  Devices normalise the images of one or a few streams together, and a set that was
  written class by class would give them but one or a few classes.

  Args:
    path: of the set, for the message.
    labels: int [n] of all images of the set, in [0, num_classes).
    num_classes: K.
    count: of the streams.

  Raises:
    UserError: there are fewer images than streams; or the total variation distance of a
      stream's classes from the set's is more than 0.1 beyond what chance may bring
      about in n images, sqrt(K / n), twice the bound of its mean.
  """
  if len(labels) < count:
    raise UserError(
      f'{path} has {len(labels)} images for data.streams = {count}: use fewer streams'
    )
  parts = [Streams(count, k, k + 1).images(len(labels)) for k in range(count)]
  counts = np.array(
    [np.bincount(labels[p.start : p.stop], minlength=num_classes) for p in parts]
  )
  sizes = counts.sum(1)
  shares = counts.sum(0) / len(labels)
  distances = np.abs(counts / sizes[:, None] - shares).sum(1) / 2
  worst = int(np.argmax(distances - np.sqrt(num_classes / sizes)))
  if distances[worst] > _MOST_DISTANCE + np.sqrt(num_classes / sizes[worst]):
    raise UserError(
      f'{path} is not in random order: the classes of stream {worst} of data.streams = '
      f'{count} (images {parts[worst].start} to {parts[worst].stop - 1}) are '
      f'{distances[worst]:.0%} other than those of the set; use data.streams = 1, or '
      'write the set in random order'
    )
