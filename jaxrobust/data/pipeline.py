"""Batches of real and generated images, a pure function of seed, step and slot.

Slot s of the global batch is the same image at step t whatever the number of
devices and processes, and wherever the run was resumed: nothing is stored.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrobust.data import datasets
from jaxrobust.data.datasets import Split
from jaxrobust.errors import UserError
from jaxrobust.samples.sample_sets import SampleSet
from jaxrobust.samples.streams import Streams

_REAL, _GENERATED = 0, 1  # the two sources, part of the key of a shuffle
_PARALLEL_CALLS = 4  # They overlap disk reads; cached reads gain nothing from 2 on.


class Batch(NamedTuple):
  """The images of one step that a process feeds, or a device's shard of them.

  Attributes:
    images: uint8 [n, H, W, C].
    labels: int32 [n].
    is_generated: bool [n].
    slots: int32 [n], positions in the global batch.
  """

  images: Any
  labels: Any
  is_generated: Any
  slots: Any


class Share(NamedTuple):
  """A part of a mix: the share of real images from a step on.

  Attributes:
    real_fraction: in [0, 1]; see `mix_counts`.
    from_step: first step with it.
  """

  real_fraction: float
  from_step: int = 0


def mix_counts(
  batch_size: int,
  real_fraction: float,
  real_repeats: int,
  parts: Mapping[str, int] | None = None,
  field: str = 'data.real_fraction',
) -> tuple[int, int]:
  """Resolves the share of real images into counts of a global batch.

  Args:
    batch_size: images in a global batch, at least 1.
    real_fraction: share of real images in [0, 1].
    real_repeats: how often each real image occurs in a batch, at least 1. The
      published runs had 4 workers that read the real images in the same order.
    parts: into how many equal contiguous parts the batch is divided, by what they
      are ('devices', 'BatchNorm groups', 'streams'). Each part must hold as many real
      images as the others.
    field: where the share comes from, for the message.

  Returns:
    (num_real, num_generated), which sum to batch_size.

  Raises:
    UserError: if a value is out of range, the batch is not a multiple of its parts, or
      its real images are not a multiple of them or of real_repeats.
  """
  parts = parts or {}
  if batch_size < 1:
    raise UserError(f'data.batch_size = {batch_size}; it must be at least 1')
  if not 0 <= real_fraction <= 1:
    raise UserError(f'{field} = {real_fraction}; it must be in [0, 1]')
  if real_repeats < 1:
    raise UserError(f'data.real_repeats = {real_repeats}; it must be at least 1')
  for what, count in parts.items():
    if batch_size % count:
      low = batch_size // count * count
      choices = f'{low} or {low + count}' if low else f'{count}'
      raise UserError(
        f'data.batch_size = {batch_size} is not a multiple of '
        f'{count} {what}; use {choices}'
      )
  num_real = math.floor(real_fraction * batch_size + 0.5)
  multiple = math.lcm(real_repeats, *parts.values())
  if num_real % multiple:
    reason = next(
      (
        f'which {count} {what} cannot share equally'
        for what, count in parts.items()
        if num_real % count
      ),
      f'not a multiple of data.real_repeats = {real_repeats}'
      if num_real % real_repeats
      else f'which its parts and {real_repeats} repeats cannot share equally',
    )
    raise UserError(
      f'{field} = {real_fraction} gives {num_real} real images in a '
      f'batch of {batch_size}, {reason}; use '
      f'{_nearest_fractions(num_real, batch_size, multiple)}'
    )
  return num_real, batch_size - num_real


def train_batches(
  real: Split | None,
  samples: SampleSet | None,
  mix: Sequence[Share],
  *,
  batch_size: int,
  steps: range,
  seed: int,
  real_repeats: int = 1,
  streams: int = 1,
  slots: tuple[int, int] | None = None,
  num_classes: int | None = None,
) -> Iterator[Batch]:
  """Returns the training batches of consecutive steps, read ahead by threads.

  Each source is shuffled as a whole, anew in each of its epochs, and each of its
  images occurs once (a real one real_repeats times) in an epoch. Of several streams
  (see `samples.streams`) this holds for the part of the sample set of each. Any
  contiguous part of the batch holds its share of real images, rounded. Where the share
  changes, each source goes on with its next image.

  Args:
    real: the real images; None only where the mix takes none.
    samples: the generated images, those of the streams of these slots at least; None
      only where the mix takes none. Where a bucket still gives them, the first batch
      that takes some waits for all.
    mix: the share of real images, the first from step 0 on, then those of later steps
      in their order.
    batch_size: images in a global batch.
    steps: to yield, of all steps of the run.
    seed: of the shuffles, at least 0.
    real_repeats: how often each real image occurs in a batch, each time in
      another part of it (paper: 4 workers with the same real images).
    streams: of the sample set. They share the generated images of a batch equally.
    slots: (start, stop) of the part of the global batch to yield, for the
      processes of a pod; all of it by default.
    num_classes: number of classes; by default the largest real label plus 1.

  Returns:
    An iterator of batches of stop - start images.

  Raises:
    UserError: if a source is missing or empty, or sources do not fit together.
  """
  start, stop = slots or (0, batch_size)
  if not 0 <= start < stop <= batch_size:
    raise UserError(
      f'slots {start}..{stop} in a batch of {batch_size}; a process '
      'feeds a part of the batch'
    )
  ends = [from_step for _, from_step in mix[1:]] + [steps.stop]
  parts, used = [], (0, 0)
  for (share, since), end in zip(mix, ends, strict=True):
    counts = mix_counts(batch_size, share, real_repeats, {'streams': streams})
    check_sources(real, samples, *counts, num_classes)
    parts.append(
      _batches_of_one_share(
        real,
        samples,
        counts,
        real_repeats=real_repeats,
        streams=streams,
        seed=seed,
        steps=range(max(steps.start, since), min(steps.stop, end)),
        since=since,
        used=used,
        slots=(start, stop),
      )
    )
    passed = end - since
    used = used[0] + passed * (counts[0] // real_repeats), used[1] + passed * counts[1]
  return itertools.chain(*parts)


def _batches_of_one_share(
  real, samples, counts, *, real_repeats, streams, seed, steps, since, used, slots
):
  """Batches of consecutive steps with the same numbers of real and generated images.

  `used` counts the real and generated images that earlier steps took, those before
  step `since`, from which on the share is this.
  """
  num_real, num_generated = counts
  batch_size = sum(counts)
  if not steps:
    return
  if num_generated:
    samples.wait()
  tf = datasets.import_tensorflow()
  part = lambda x: x[slice(*slots)]
  slot = np.arange(batch_size, dtype=np.int64)
  is_real = (slot + 1) * num_real // batch_size > slot * num_real // batch_size
  # Each stream has as many real and generated images as the others.
  per_step = np.where(is_real, num_real // real_repeats, num_generated // streams)
  order = np.where(is_real, np.cumsum(is_real), np.cumsum(~is_real)) - 1
  order %= per_step
  order += np.where(is_real, used[0], used[1] // streams)
  ranges = [range(len(real.images) if num_real else 0)]
  ranges += [
    Streams(streams, k, k + 1).images(len(samples) if num_generated else 0)
    for k in range(streams)
  ]
  sources = [(_REAL, 0), *((_GENERATED, k) for k in range(streams))]
  source = part(np.where(is_real, 0, 1 + slot * streams // batch_size))
  starts, sizes = np.array([(x.start, len(x)) for x in ranges]).T[:, source]
  keys = np.array([_stream_key(seed, *x) for x in sources])[source]
  slot = part(slot).astype(np.int32)
  is_real, per_step, order = part(is_real), part(per_step), part(order)
  shape = real.images.shape[1:] if num_real else samples.image_shape
  generated_slots = np.flatnonzero(~is_real)

  def gather(indices):
    images = _aligned_empty((len(slot), *shape))
    labels = np.empty(len(slot), np.int32)
    if num_real:
      images[is_real] = real.images[indices[is_real]]
      labels[is_real] = real.labels[indices[is_real]]
    if num_generated:
      chosen = indices[~is_real]
      samples.gather(chosen, out=images, rows=generated_slots)
      labels[~is_real] = samples.gather_labels(chosen)
    return images, labels

  @tf.autograph.experimental.do_not_convert
  def load(step):
    indices = _shuffled((step - since) * per_step + order, sizes, keys) + starts
    return tf.numpy_function(gather, [indices], (tf.uint8, tf.int32), stateful=False)

  dataset = (
    tf.data.Dataset.range(steps.start, steps.stop)
    .map(load, num_parallel_calls=_PARALLEL_CALLS, deterministic=True)
    .prefetch(2)
  )
  # There is nothing to tune, and its thread may sleep on at the end, for as long as
  # it did between two of its rounds, up to a minute: it is woken before it may leave.
  options = tf.data.Options()
  options.autotune.enabled = False
  for images, labels in dataset.with_options(options).as_numpy_iterator():
    yield Batch(images, labels, ~is_real, slot)


def _nearest_fractions(num_real, batch_size, multiple):
  """Names the real fractions next to num_real whose count is a multiple."""
  low = num_real // multiple * multiple
  counts = [n for n in (low, low + multiple) if n <= batch_size]
  return ' or '.join(f'{n / batch_size:.10g} ({n})' for n in counts)


def check_sources(
  real: Split | None,
  samples: SampleSet | None,
  num_real: int,
  num_generated: int,
  num_classes: int | None = None,
) -> None:
  """Refuses sources that are missing, empty or do not fit together.

  Args:
    real: the real images.
    samples: the generated images.
    num_real: real images in a batch.
    num_generated: generated images in a batch.
    num_classes: number of classes; by default the largest real label plus 1.

  Raises:
    UserError: As said.
  """
  if num_real and (real is None or not len(real.images)):
    raise UserError(
      f'the mix takes {num_real} real images a batch, but there are '
      'none; set data.real_fraction = 0 or name a dataset'
    )
  if not num_generated:
    return
  if samples is None:
    raise UserError(
      f'the mix takes {num_generated} generated images a batch, but '
      'no sample set is given; name one or set data.real_fraction = 1'
    )
  if real is None:
    return
  if real.images.shape[1:] != samples.image_shape:
    raise UserError(
      f'{samples.path} holds images {list(samples.image_shape)}, the dataset '
      f'{list(real.images.shape[1:])}; use a sample set made for this dataset'
    )
  num_classes = num_classes or int(real.labels.max()) + 1
  if num_classes != samples.num_classes:
    raise UserError(
      f'{samples.path} has {samples.num_classes} classes, the dataset '
      f'{num_classes}; use a sample set made for this dataset'
    )


def _stream_key(seed, source, stream=0):
  """Returns the 64-bit key of the shuffles of a source, or of a stream of it."""
  # The first stream has the key of the source as a whole.
  words = [seed, source, stream] if stream else [seed, source]
  return np.random.SeedSequence(words).generate_state(1, np.uint64)[0]


def _shuffled(positions, sizes, keys):
  """Maps positions [n] in endless streams to image indices, a bijection an epoch."""
  import tensorflow as tf

  epochs = tf.cast(positions // sizes, tf.uint64)
  # The public `index_shuffle` fixes 4 rounds of this cipher, after which neighbours
  # keep nearly constant distances; tests of uniformity pass from 12 rounds on. Of
  # a key word it may take a few bits only, so the words must be hashed: they are
  # outputs 3 epoch + (1, 2, 3) of SplitMix64 (Steele et al., 2014).
  count = 3 * epochs[:, None] + np.arange(1, 4, dtype=np.uint64)
  words = keys[:, None] + count * np.uint64(0x9E3779B97F4A7C15)
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
    shifted = tf.bitwise.right_shift(words, np.uint64(shift))
    words = tf.bitwise.bitwise_xor(words, shifted) * np.uint64(factor)
  return tf.raw_ops.RandomIndexShuffle(
    index=positions % sizes,
    seed=tf.cast(tf.bitwise.right_shift(words, np.uint64(32)), tf.uint32),
    max_index=tf.constant(sizes - 1),
    rounds=24,
  )


def _aligned_empty(shape):
  """Returns uint8 memory at a 64-byte boundary, which tensorflow takes uncopied."""
  size = math.prod(shape)
  memory = np.empty(size + 64, np.uint8)
  offset = -memory.ctypes.data % 64
  return memory[offset : offset + size].reshape(shape)
