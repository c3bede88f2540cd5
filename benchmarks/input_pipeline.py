"""Images per second of the training input against a per-example tf.data pipeline.

  python -m benchmarks.input_pipeline [--repeats 7] [--folder DIR]

Batches of 1,024 images of 32x32x3, 31.25 % real, from 50,000 real images and a
sample set of 1M (a dense one, 3 GB, in the system's cache where memory allows) or
of 10M (a sparse one: nearly every page read is new to the cache). The rival is the
pipeline as commonly written: from_tensor_slices of 50,000 images in memory for each
source, a shuffle buffer, pad-crop, flip and float conversion of each example,
sample_from_datasets, batch, prefetch. Ours yields uint8, since augmentation runs on
the device. Both run in this process, in turns whose order alternates; ratios are of
neighbouring turns; figures are medians with their range.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import tempfile
import time

import numpy as np
import tensorflow as tf

from jaxrobust.data import pipeline
from jaxrobust.data.datasets import Split
from jaxrobust.samples import sample_sets, shards

BATCH, REAL_FRACTION, REPEATS = 1024, 0.3125, 4
SHAPE = (32, 32, 3)


def sparse_set(path, num_images, num_shards):
  """Makes a sample set whose images and labels are holes that read as zeros."""
  if path.exists():
    return sample_sets.SampleSet.open(path)
  path.mkdir(parents=True)
  per_shard = num_images // num_shards
  names = [f'{k:05d}-of-{num_shards:05d}.npy' for k in range(num_shards)]
  for name in names:
    for kind, shape, dtype in (
      ('images', (per_shard, *SHAPE), np.uint8),
      ('labels', (per_shard,), np.int32),
    ):
      np.lib.format.open_memmap(path / f'{kind}-{name}', 'w+', dtype, shape)
  metadata = {
    'format_version': shards.FORMAT_VERSION,
    'image_shape': SHAPE,
    'num_classes': 10,
    'counts': {
      'total': num_images,
      'per_class': [num_images] + [0] * 9,
      'per_shard': [per_shard] * num_shards,
    },
    'sha256': {f'{kind}-{n}': '' for n in names for kind in ('images', 'labels')},
  }
  (path / shards.METADATA).write_text(json.dumps(metadata))
  return sample_sets.SampleSet.open(path)


def dense_set(path, num_images):
  """Makes a sample set of random images."""
  if path.exists():
    return sample_sets.SampleSet.open(path)
  rng = np.random.default_rng(0)
  chunk = rng.integers(0, 256, (50_000, *SHAPE), np.uint8)
  batches = (
    (chunk, rng.integers(0, 10, len(chunk))) for _ in range(num_images // len(chunk))
  )
  return sample_sets.write(path, batches, metadata={}, num_classes=10)


def ours(real, sample_set, steps, batch_size=BATCH):
  """Our batches."""
  return pipeline.train_batches(
    real,
    sample_set,
    [pipeline.Share(REAL_FRACTION)],
    batch_size=batch_size,
    steps=steps,
    seed=0,
    real_repeats=REPEATS,
  )


def per_example(real, generated):
  """The rival's batches."""

  def augment(image, label):
    image = tf.pad(image, [[4, 4], [4, 4], [0, 0]])
    image = tf.image.random_flip_left_right(tf.image.random_crop(image, SHAPE))
    return tf.cast(image, tf.float32) / 255, label

  sources = [
    tf.data.Dataset.from_tensor_slices(tuple(split))
    .repeat()
    .shuffle(50_000)
    .map(augment, num_parallel_calls=tf.data.AUTOTUNE)
    for split in (real, generated)
  ]
  return (
    tf.data.Dataset.sample_from_datasets(sources, [REAL_FRACTION, 1 - REAL_FRACTION])
    .batch(BATCH)
    .prefetch(tf.data.AUTOTUNE)
    .as_numpy_iterator()
  )


def images_per_second(batches, num_steps):
  """Times num_steps batches after the first."""
  next(batches)
  start = time.perf_counter()
  for _ in range(num_steps):
    next(batches)
  return num_steps * BATCH / (time.perf_counter() - start)


def resident_mib():
  """Resident memory of this process in MiB."""
  status = pathlib.Path('/proc/self/status').read_text()
  return int(status.split('VmRSS:')[1].split()[0]) / 1024


def spread(values, unit=1.0, digits=0):
  """Median and range as text."""
  median, low, high = (
    f'{f(values) / unit:.{digits}f}' for f in (statistics.median, min, max)
  )
  return f'{median} ({low}..{high})'


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--steps', type=int, default=500, help='of ours, a turn')
  parser.add_argument('--rival_steps', type=int, default=40)
  parser.add_argument(
    '--folder', default=f'{tempfile.gettempdir()}/jaxrobust_input_benchmark'
  )
  parser.add_argument('--dense', type=int, default=1_000_000, help='0: leave it out')
  parser.add_argument('--keep', action='store_true', help='keep the folder')
  args = parser.parse_args()
  folder = pathlib.Path(args.folder)

  rng = np.random.default_rng(0)
  real = Split(
    rng.integers(0, 256, (50_000, *SHAPE), np.uint8),
    rng.integers(0, 10, 50_000).astype(np.int32),
  )
  sparse_set(folder / 'sparse', 10_000_000, 16)
  start = time.perf_counter()
  sparse = sample_sets.SampleSet.open(folder / 'sparse')
  print(f'open 10M: {time.perf_counter() - start:.3f} s')

  next(ours(real, sparse, range(1)))  # tensorflow's own start
  before = peak = resident_mib()
  for batch in ours(real, sparse, range(1000)):
    assert len(batch.images) == BATCH
    peak = max(peak, resident_mib())
  print(f'resident memory over 1,000 batches: +{peak - before:.0f} MiB at most')

  sets = {'10M sparse': sparse}
  if args.dense:
    # First: the pages of the other would push it out of the cache.
    dense = dense_set(folder / 'dense', args.dense)
    sets = {f'{args.dense / 1e6:g}M dense': dense, **sets}
  for name, sample_set in sets.items():
    rates, rival_rates = [], []
    for turn in range(args.repeats):
      first = 1000 + turn * (args.steps + 1)  # never the same images twice
      for which in ('ours', 'rival') if turn % 2 else ('rival', 'ours'):
        if which == 'ours':
          batches = ours(real, sample_set, range(first, first + args.steps + 1))
          rates.append(images_per_second(batches, args.steps))
        else:
          batches = per_example(real, real)
          rival_rates.append(images_per_second(batches, args.rival_steps))
    ratios = [a / b for a, b in zip(rates, rival_rates, strict=True)]
    print(
      f'{name}: ours {spread(rates, 1e3)} k images/s, per-example tf.data '
      f'{spread(rival_rates, 1e3, 1)} k images/s, ratio {spread(ratios, 1, 1)}'
    )
  if not args.keep:
    shutil.rmtree(folder)


if __name__ == '__main__':
  main()
