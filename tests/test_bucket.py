"""Sample sets and workdirs in a bucket, of which a folder plays the part."""

import json
import pathlib
import shutil
import threading

import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath

from experiments import digits_gaussian
from jaxrobust import generate
from jaxrobust.attacks.record import Record
from jaxrobust.data import datasets, pipeline
from jaxrobust.errors import UserError
from jaxrobust.reporting import planned_runs
from jaxrobust.runs import metrics, workdir
from jaxrobust.samples import bucket as bucket_module
from jaxrobust.samples import sample_sets, shards, streams


class Bucket:
  """epath's way to files of gs://, as files below a root.

  Attributes:
    copied: names of the files that were copied to it, or read as arrays.
    refuses: `path -> None`, called before one is read.
  """

  def __init__(self, root):
    self._root, self.copied, self.refuses = root, [], lambda path: None

  def __getattr__(self, name):
    call = getattr(backend.os_backend, name)

    def forwarded(*args, **kwargs):
      is_read = name == 'open' and str(args[0]).endswith('.npy')
      if name == 'copy' or is_read:
        self.copied.append(pathlib.PurePath(args[0]).name)
      if is_read:
        self.refuses(args[0])
      found = call(*(self._place(x) for x in args), **kwargs)
      if name == 'glob':
        return [x.replace(f'{self._root}/', 'gs://') for x in found]
      return found

    return forwarded

  def _place(self, x):
    return str(x).replace('gs://', f'{self._root}/', 1) if 'gs://' in str(x) else x


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  found = Bucket(tmp_path / 'buckets')
  local = gpath._GPath._backend.fget
  choose = lambda path: found if path._uri_scheme == 'gs' else local(path)
  monkeypatch.setattr(gpath._GPath, '_backend', property(choose))
  monkeypatch.setattr(gpath, '_GCS_BACKENDS', (*gpath._GCS_BACKENDS, found))
  monkeypatch.setenv('JAXROBUST_CACHE', str(tmp_path / 'cache'))
  return found


def write(path, seed=0, count=50):
  images = np.random.RandomState(seed).randint(0, 256, (count, 8, 8, 1), np.uint8)
  labels = np.arange(count) % 10
  options = {'metadata': {}, 'num_classes': 10, 'shard_size': 20}
  return images, sample_sets.write(path, [(images, labels)], **options)


def test_a_set_is_kept_once_on_disk_and_read_there(bucket, tmp_path):
  images, written = write('gs://b/runs/set')
  there = sorted(x.name for x in (tmp_path / 'buckets/b/runs/set').iterdir())
  assert there == sorted([*written.metadata['sha256'], 'metadata.json'])
  np.testing.assert_array_equal(written.gather(np.arange(50)), images)
  # Who wrote it has it; another host fetches it, once.
  del bucket.copied[:]
  sample_sets.SampleSet.open('gs://b/runs/set').verify()
  assert not bucket.copied
  (tmp_path / 'cache').rename(tmp_path / 'other')
  for _ in range(2):
    found = sample_sets.SampleSet.open('gs://b/runs/set')
    assert found.checksum() == written.checksum()
  assert sorted(bucket.copied) == sorted(written.metadata['sha256'])
  found.verify()
  np.testing.assert_array_equal(found.gather(np.arange(50)), images)
  with pytest.raises(UserError, match='gs://b/runs/set exists; a sample set is never'):
    write('gs://b/runs/set')


def test_a_set_that_was_made_again_is_fetched_again(bucket, tmp_path):
  write('gs://b/runs/set')
  (tmp_path / 'cache').rename(tmp_path / 'other')
  sample_sets.SampleSet.open('gs://b/runs/set')
  epath.Path('gs://b/runs/set').rmtree()
  images, _ = write('gs://b/runs/set', seed=1)
  found = sample_sets.SampleSet.open('gs://b/runs/set')
  np.testing.assert_array_equal(found.gather(np.arange(50)), images)


def test_what_was_cut_short_is_no_set(bucket, tmp_path, monkeypatch):
  with pytest.raises(UserError, match='gs://b/set is no sample set'):
    sample_sets.SampleSet.open('gs://b/set')
  # On the way there: metadata.json comes last.
  with monkeypatch.context() as patch:
    patch.setattr(workdir, 'write', lambda *_: (_ for _ in ()).throw(OSError('gone')))
    with pytest.raises(OSError, match='gone'):
      write('gs://b/set')
  assert not shards.is_whole('gs://b/set')
  images, _ = write('gs://b/set')
  # On the way back: a hidden folder, which the next one starts over.
  (tmp_path / 'cache').rename(tmp_path / 'other')
  lost = tmp_path / 'buckets/b/set/labels-00002-of-00003.npy'
  content = lost.read_bytes()
  lost.unlink()
  with pytest.raises(FileNotFoundError):
    sample_sets.SampleSet.open('gs://b/set')
  lost.write_bytes(content)
  found = sample_sets.SampleSet.open('gs://b/set')
  np.testing.assert_array_equal(found.gather(np.arange(50)), images)


class Killed(BaseException):
  """As by KILL: nothing is cleaned up after it."""


def elsewhere(tmp_path):
  """Another host: it has no copies."""
  (tmp_path / 'cache').rename(tmp_path / f'other-{len(list(tmp_path.iterdir()))}')


def test_a_host_fetches_the_images_of_its_streams_in_the_background(bucket, tmp_path):
  images, written = write('gs://b/set', count=100)
  elsewhere(tmp_path)
  del bucket.copied[:]
  may_go_on = threading.Event()
  bucket.refuses = lambda path: 'images' in str(path) and may_go_on.wait()
  part = streams.of_slots(4, (4, 8), 16)  # Images 25 to 49, in two of five shards.
  found = sample_sets.SampleSet.open('gs://b/set', part, in_background=True)
  assert found.checksum() == written.checksum()
  np.testing.assert_array_equal(
    found.gather_labels(np.arange(100)), np.arange(100) % 10
  )
  found.verify()  # Of what is here: the others are compared as they come.
  may_go_on.set()
  found.wait()
  assert found.is_verified()
  assert sorted(x for x in bucket.copied if 'images' in x) == [
    f'images-0000{k}-of-00005.npy' for k in (1, 2)
  ]
  assert sum('labels' in x for x in bucket.copied) == 5
  np.testing.assert_array_equal(found.gather(np.arange(25, 50)), images[25:50])
  # Fewer hosts: what is missing comes, and nothing twice.
  whole = sample_sets.SampleSet.open('gs://b/set')
  np.testing.assert_array_equal(whole.gather(np.arange(100)), images)
  assert len(bucket.copied) == len(set(bucket.copied)) == 10


def test_what_a_killed_process_fetched_is_not_fetched_again(
  bucket, tmp_path, monkeypatch
):
  images, _ = write('gs://b/set')
  elsewhere(tmp_path)
  monkeypatch.setattr(bucket_module, '_COPIES_AT_A_TIME', 1)
  monkeypatch.setattr(bucket_module, '_CHUNK', 500)
  sha256, hashed = bucket_module.hashlib.sha256, []

  class Fatal:
    """A sha256 that ends the process in the middle of the second file of images."""

    def __init__(self):
      self._digest, self.hexdigest = sha256(), lambda: self._digest.hexdigest()

    def update(self, chunk):
      # Three files of labels in one chunk each, then files of 128 + 1,280 bytes.
      hashed.append(chunk)
      if len(hashed) >= 3 + 3 + 3:  # What is read after it ends, too.
        raise Killed
      self._digest.update(chunk)

  with monkeypatch.context() as patch:
    patch.setattr(bucket_module.hashlib, 'sha256', Fatal)
    local, coming = bucket_module.fetch('gs://b/set')
    with pytest.raises(Killed):
      coming.result()
  assert (local / 'images-00000-of-00003.npy').stat().st_size == 1_408
  assert (local / '.images-00001-of-00003.npy.partial').stat().st_size == 1_000
  # What was here of the second file is not read there, or it would be corrupt.
  there = tmp_path / 'buckets/b/set/images-00001-of-00003.npy'
  there.write_bytes(bytes(1_000) + there.read_bytes()[1_000:])
  del bucket.copied[:]
  found = sample_sets.SampleSet.open('gs://b/set')
  np.testing.assert_array_equal(found.gather(np.arange(50)), images)
  assert sorted(bucket.copied) == [f'images-0000{k}-of-00003.npy' for k in (1, 2)]
  assert not list(local.glob('.*.partial'))


def test_files_that_are_corrupt_in_the_bucket(bucket, tmp_path):
  write('gs://b/set')
  elsewhere(tmp_path)
  file = tmp_path / 'buckets/b/set/images-00001-of-00003.npy'
  right, content = file.read_bytes(), bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  found = sample_sets.SampleSet.open('gs://b/set', in_background=True)
  for call in (found.wait, lambda: found.gather(np.arange(3))):
    with pytest.raises(UserError, match='gs://b/set/images-00001-of-00003.npy is corr'):
      call()
  (local,) = (tmp_path / 'cache/samples').glob('[!.]*')
  assert not [x for x in local.iterdir() if '00001' in x.name and 'images' in x.name]
  # A beginning that is damaged here is no reason to blame the bucket.
  file.write_bytes(right)
  (local / f'.{file.name}.partial').write_bytes(content[:-1] + b'xyz')
  sample_sets.SampleSet.open('gs://b/set').verify(anew=True)


def test_a_connection_that_breaks_goes_on_where_it_was(bucket, tmp_path):
  images, _ = write('gs://b/set')
  elsewhere(tmp_path)
  left = {'images-00001-of-00003.npy': 2, 'labels-00000-of-00003.npy': 2}

  def break_off(path):
    name = pathlib.PurePath(path).name
    left[name] = left.get(name, 0) - 1
    if left[name] >= 0:
      raise OSError('connection reset')

  bucket.refuses = break_off
  found = sample_sets.SampleSet.open('gs://b/set')
  np.testing.assert_array_equal(found.gather(np.arange(50)), images)


def test_a_disk_that_is_too_small(bucket, tmp_path, monkeypatch):
  write('gs://b/set', count=100)
  elsewhere(tmp_path)
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage._replace(free=2_000))
  words = 'gs://b/set takes 0.0 GB more .* has 0.0 GB free.*JAXROBUST_CACHE.*streams'
  with pytest.raises(UserError, match=words):
    sample_sets.SampleSet.open('gs://b/set')
  # A part has room.
  sample_sets.SampleSet.open('gs://b/set', streams.Streams(100, 0, 1))


def test_the_first_batch_waits_for_the_images(bucket, tmp_path):
  """One without generated images does not; an error says what is wrong in one line."""
  write('gs://b/set')
  elsewhere(tmp_path)
  may_go_on = threading.Event()

  def fail_later(path):
    if 'images' in str(path):
      may_go_on.wait()
      raise OSError('gone for good')

  bucket.refuses = fail_later
  found = sample_sets.SampleSet.open('gs://b/set', in_background=True)
  real = datasets.Split(np.zeros((8, 8, 8, 1), np.uint8), np.arange(8, dtype=np.int32))
  run = pipeline.train_batches(
    real,
    found,
    [pipeline.Share(1.0), pipeline.Share(0.0, 2)],
    batch_size=4,
    steps=range(4),
    seed=0,
    num_classes=10,
  )
  for _ in range(2):
    assert not next(run).is_generated.any()
  may_go_on.set()
  with pytest.raises(OSError, match='gone for good'):
    next(run)


def test_metadata_name_no_file_elsewhere(bucket):
  write('gs://b/set')
  folder = epath.Path('gs://b/set')
  metadata = json.loads((folder / 'metadata.json').read_text())
  for content, words in (
    (json.dumps(metadata | {'sha256': {'../../x': ''}}), 'contradicts itself'),
    ('{}', 'metadata.json is damaged'),
    ('[' * 10_000, 'metadata.json is not JSON'),
  ):
    (folder / 'metadata.json').write_text(content)
    with pytest.raises(UserError, match=words):
      sample_sets.SampleSet.open('gs://b/set')


@pytest.mark.slow
def test_a_generator_whose_workdir_is_in_a_bucket(bucket, tmp_path):
  """Its set is trained on from there."""
  config = digits_gaussian.get_config().unlock()
  config.labeller = 'condition'
  config.samples.update(count=60, batch_size=16, shard_size=40, draw_size=32)
  for _ in range(2):
    generate.main(config, 'gs://b/runs/gaussian')
  remote = epath.Path('gs://b/runs/gaussian')
  assert planned_runs.Point('', config, remote, [], ('generate',)).is_finished(
    'generate'
  )
  local = tmp_path / 'here'
  generate.main(config, local)
  found, wanted = (sample_sets.SampleSet.open(x / 'samples') for x in (remote, local))
  everything = np.arange(60)
  np.testing.assert_array_equal(found.gather(everything), wanted.gather(everything))
  assert sorted(x.name for x in remote.iterdir() if 'tmp' in x.name) == []
  real = datasets.load('digits', 'train', validation_images=400, train_images=60)
  batches = pipeline.train_batches(
    real,
    found,
    [pipeline.Share(0.5)],
    batch_size=8,
    steps=range(1),
    seed=0,
  )
  assert next(iter(batches)).is_generated.sum() == 4


def test_results_metrics_and_the_state_of_an_evaluation(bucket):
  folder = workdir.claim('gs://b/runs/x', digits_gaussian.get_config())
  assert workdir.claim('gs://b/runs/x', digits_gaussian.get_config()) == folder
  other = digits_gaussian.get_config()
  other.seed = 3
  with pytest.raises(UserError, match='gs://b/runs/x holds a run with another config'):
    workdir.claim('gs://b/runs/x', other)
  for step in (2, 4):
    workdir.write(folder / 'metrics.jsonl', json.dumps({'step': step}) + '\n')
  assert metrics.read(folder) == [{'step': 4}]
  workdir.add_result(folder, {'suite': 'clean'}, {'clean_accuracy': 0.5})
  assert workdir.find_result(folder, {'suite': 'clean'})['clean_accuracy'] == 0.5
  record = Record(4, folder / 'state', {})
  record.advance(np.arange(2), np.array([True, False]), keep=0, write=True)
  assert Record(4, folder / 'state', {}).done == 2
