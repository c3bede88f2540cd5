"""What a sample set asks of each host of a pod, computed before it is copied there.

Training shuffles a set as a whole, so that a run does not depend on its hosts: an image
may be the next one of any host, hence each host holds every shard. With several streams
(data.streams) it holds the shards with the images of its streams. Each image is read
once in an epoch of the set, at random: only images that stay in the page cache from one
epoch to the next save a read, so the share of reads that reach the disk is the share of
a host's images that the cache cannot hold.
"""

import math
from typing import NamedTuple

from jaxrobust.errors import UserError
from jaxrobust.samples import sample_sets, shards, streams

_PAGE = 4_096


class Footprint(NamedTuple):
  """The needs of one host; where hosts differ, by a shard, the most of each.

  Attributes:
    num_shards: shards of images it holds.
    of_shards: shards of the set.
    image_fraction: share of the images that it reads.
    disk_bytes: size of the files it holds.
    label_bytes: memory for the labels of the set, a byte or two each.
    images_per_step: generated images that it reads in a step.
    steps_per_epoch: steps until every image was read once, by some host.
    cached_fraction: share of the images it reads that the page cache can hold.
    reads_per_step: pages of 4 KiB that come from disk in a step.
  """

  num_shards: int
  of_shards: int
  image_fraction: float
  disk_bytes: int
  label_bytes: int
  images_per_step: float
  steps_per_epoch: float
  cached_fraction: float
  reads_per_step: float


def estimate(
  num_images: int,
  image_shape: tuple[int, int, int],
  *,
  hosts: int,
  num_streams: int = 1,
  cache_bytes: float,
  num_shards: int | None = None,
  num_classes: int = 10,
  confidence_bytes: int = 0,
  batch_size: int,
  real_fraction: float,
) -> Footprint:
  """Computes what each host needs.

  Args:
    num_images: images of the set, at least 1.
    image_shape: (H, W, C).
    hosts: number of hosts, at least 1.
    num_streams: streams of the set, at least 1.
    cache_bytes: memory of a host that is left for the page cache.
    num_shards: shards; by default those that `sample_sets.write` makes.
    num_classes: number of classes K.
    confidence_bytes: bytes of a confidence, 0 for a set without them.
    batch_size: images in a global batch.
    real_fraction: share of real images in it, below 1.

  Returns:
    The needs of one host.

  Raises:
    UserError: A number is out of range.
  """
  counts = (num_images, hosts, num_streams, batch_size, *image_shape)
  if min(counts) < 1 or not 0 <= real_fraction < 1:
    raise UserError(
      f'{num_images} images {list(image_shape)}, {hosts} hosts, {num_streams} streams, '
      f'batches of {batch_size} with {real_fraction:g} real ones: give numbers from 1, '
      'and a share of real images from 0 to below 1'
    )
  if num_streams > num_images:
    raise UserError(f'{num_streams} streams of {num_images} images: use fewer streams')
  of_shards = num_shards or math.ceil(num_images / sample_sets.SHARD_SIZE)
  shard_size = math.ceil(num_images / of_shards)
  parts = [
    streams.of_slots(num_streams, (host, host + 1), hosts).images(num_images)
    for host in range(hosts)
  ]
  own = [
    range(part.start // shard_size, (part.stop - 1) // shard_size + 1) for part in parts
  ]
  num_shards = max(map(len, own))
  read, size = max(map(len, parts)), math.prod(image_shape)
  image_bytes = size * max(
    min(x.stop * shard_size, num_images) - x.start * shard_size for x in own
  )
  columns = num_images * shards.LABEL + shards.HEADER * (of_shards + num_shards)
  if num_streams == 1:
    columns += num_images * confidence_bytes
    columns += shards.HEADER * of_shards * bool(confidence_bytes)
  generated = batch_size * (1 - real_fraction)
  cached = min(1.0, max(0.0, cache_bytes) / (read * size))
  # An image that starts anywhere touches this many pages on average.
  pages = (size - 1) / _PAGE + 1
  return Footprint(
    num_shards=num_shards,
    of_shards=of_shards,
    image_fraction=read / num_images,
    disk_bytes=image_bytes + columns,
    label_bytes=num_images * (1 if num_classes <= 256 else 2),
    images_per_step=generated / hosts,
    steps_per_epoch=num_images / generated,
    cached_fraction=cached,
    reads_per_step=generated / hosts * pages * (1 - cached),
  )


def lines(found: Footprint, hosts: int, steps_per_second: float) -> list[str]:
  """The needs in words, for training at a given speed; UserError for one below 0."""
  if not steps_per_second >= 0:
    raise UserError(f'steps_per_second = {steps_per_second:g}: give 0 or more')
  last = f'{found.of_shards - 1:05d}-of-{found.of_shards:05d}'
  reads = found.reads_per_step * steps_per_second
  form = ',.0f' if found.steps_per_epoch >= 10 else '.3g'
  held = f'all {found.of_shards} shards (images-00000 … {last})'
  if found.of_shards == 1:
    held = f'the one shard (images-{last})'
  elif found.num_shards < found.of_shards:
    held = f'{found.num_shards} of {found.of_shards} shards, and the labels of all'
  return [
    f'{f"each of {hosts} hosts" if hosts > 1 else "the one host"} holds {held}, and '
    f'reads {100 * found.image_fraction:.3g} % of the images',
    f'disk of a host: {found.disk_bytes / 1e9:,.1f} GB; all hosts: '
    f'{found.disk_bytes * hosts / 1e9:,.1f} GB, or one read-only disk attached to all',
    f'open files: {found.num_shards} of a process (`ulimit -n`)',
    f'memory of a process: {found.label_bytes / 1e9:.2f} GB of labels (twice that '
    'while it opens the set)',
    f'page cache: holds {100 * found.cached_fraction:.0f} % of these images; '
    f'{100 * (1 - found.cached_fraction):.0f} % of reads reach the disk',
    f'a step: {found.images_per_step:,.1f} generated images a host, '
    f'{found.reads_per_step:,.1f} reads of 4 KiB from disk; at {steps_per_second:g} '
    f'steps/s: {reads:,.0f} reads/s, {reads * _PAGE / 1e6:,.1f} MB/s',
    f'every image is used once in {found.steps_per_epoch:{form}} steps',
  ]
