"""The plan for a pod, against sizes by hand and files on disk."""

import functools

import numpy as np
import pytest

from jaxrobust.data import __main__ as command_line
from jaxrobust.errors import UserError
from jaxrobust.samples import host_footprint, sample_sets, shards, streams

estimate = functools.partial(
  host_footprint.estimate, batch_size=1_024, real_fraction=0.3125
)


def test_100_million_cifar_images_by_hand():
  found = estimate(10**8, (32, 32, 3), hosts=4, cache_bytes=76.8e9, real_fraction=0.25)
  assert found.num_shards == found.of_shards == 382  # 381.47 of 2**18
  assert found.disk_bytes == 307_200_000_000 + 400_000_000 + 382 * 2 * 128
  assert found.label_bytes == 10**8
  assert found.images_per_step == 192  # 768 of 1,024, over 4 hosts
  assert found.steps_per_epoch == pytest.approx(10**8 / 768)
  assert found.cached_fraction == 0.25
  # 3,072 bytes lie on 1 + 3,071 / 4,096 pages on average.
  assert found.reads_per_step == pytest.approx(192 * 0.75 * (1 + 3071 / 4096))


def test_pages_of_an_image_counted_one_by_one():
  starts = 128 + 192 * np.arange(4096)
  pages = (starts + 191) // 4096 - starts // 4096 + 1
  found = estimate(4096, (8, 8, 3), hosts=1, cache_bytes=0, real_fraction=0)
  # Starts are multiples of 64, which touch fewer pages than starts anywhere: by 63
  # bytes of 4,096 at most.
  assert found.reads_per_step / 1024 == pytest.approx(pages.mean(), abs=64 / 4096)


@pytest.mark.parametrize('hosts, images', [(4, 77e9), (32, 10.1e9)])
def test_100_million_images_in_32_streams(hosts, images):
  """Parts end inside shards of 0.8 GB, of which two more are held at most."""
  whole = estimate(10**8, (32, 32, 3), hosts=hosts, cache_bytes=16e9)
  found = estimate(10**8, (32, 32, 3), hosts=hosts, num_streams=32, cache_bytes=16e9)
  shard = 2**18 * 3_072
  assert found.image_fraction == 1 / hosts
  assert images - 1e9 < found.disk_bytes - 4e8 < 3.072e11 / hosts + 2 * shard
  assert found.cached_fraction == pytest.approx(min(1, 16e9 * hosts / 3.072e11))
  # The speed of training is the same.
  assert found.images_per_step == whole.images_per_step
  assert found.steps_per_epoch == whole.steps_per_epoch
  # Two hosts read what they cut: of three hosts the middle one has the most streams.
  three = estimate(3_200, (8, 8, 3), hosts=3, num_streams=32, cache_bytes=0)
  assert three.image_fraction == 12 / 32


def test_what_the_files_of_a_part_take(tmp_path):
  """Of the host that holds the most."""
  n, hosts = 101, 4
  batch = (np.zeros((n, 8, 8, 3), np.uint8), np.arange(n) % 3, np.ones(n, np.float16))
  sample_sets.write(
    tmp_path / 'set', [batch], metadata={}, num_classes=3, shard_size=10
  )
  metadata = shards.read_metadata(tmp_path / 'set')
  sizes = []
  for host in range(hosts):
    part = streams.of_slots(8, (host, host + 1), hosts).images(n)
    names = shards.label_names(metadata) + shards.image_names(metadata, part)
    sizes.append(sum((tmp_path / 'set' / name).stat().st_size for name in names))
  found = estimate(
    n,
    (8, 8, 3),
    hosts=hosts,
    num_streams=8,
    cache_bytes=0,
    num_shards=11,
    confidence_bytes=2,
  )
  assert found.disk_bytes == max(sizes)


@pytest.mark.parametrize('confidence', [None, np.float16])
def test_disk_is_what_the_files_take(tmp_path, capsys, confidence):
  n = 25
  rest = [] if confidence is None else [np.ones(n, confidence)]
  batch = (np.zeros((n, 8, 8, 3), np.uint8), np.zeros(n, int), *rest)
  sample_sets.write(
    tmp_path / 'set', [batch], metadata={}, num_classes=3, shard_size=10
  )
  size = sum(file.stat().st_size for file in (tmp_path / 'set').glob('*.npy'))
  found = estimate(
    n,
    (8, 8, 3),
    hosts=2,
    cache_bytes=1e9,
    num_shards=3,
    confidence_bytes=0 if confidence is None else 2,
  )
  assert found.disk_bytes == size and found.cached_fraction == 1
  assert found.reads_per_step == 0
  assert command_line.main(['plan', str(tmp_path / 'set'), '--hosts=2']) == 0
  assert 'all 3 shards (images-00000 … 00002-of-00003)' in capsys.readouterr().out


def test_command_line(capsys):
  assert command_line.main(['plan', '100_000_000', '--hosts=4', '--cache=300']) == 0
  shown = capsys.readouterr().out
  whole, parts = shown.split('data.streams=32')
  assert 'disk of a host: 307.6 GB' in whole
  assert 'holds 97 of 382 shards, and the labels of all, and reads 25 %' in parts
  assert 'disk of a host: 78.4 GB' in parts
  assert 'each of 4 hosts holds all 382 shards' in shown
  assert command_line.main(['plan', '100M', '--hosts=4', '--cache=300']) == 0
  assert capsys.readouterr().out == shown
  # 1,024 images, of which 0.3125 are real, as in the config of a run.
  assert 'a step: 176.0 generated images a host' in shown
  assert command_line.main(['plan', '100k', '--hosts=1']) == 0
  shown = capsys.readouterr().out
  assert 'the one host holds the one shard (images-00' in shown
  assert shown.count('data.streams=') == 1
  assert command_line.main(['plan', '1k', '--hosts=1', '--steps_per_second=-1']) == 1
  assert 'steps_per_second = -1: give 0 or more' in capsys.readouterr().err
  assert command_line.main(['plan', '100', '--hosts=0']) == 1
  assert command_line.main(['plan', '100', '--hosts=2', '--streams=101']) == 1
  assert '101 streams of 100 images' in capsys.readouterr().err
  with pytest.raises(UserError, match='0 images'):
    estimate(0, (8, 8, 3), hosts=1, cache_bytes=0)
