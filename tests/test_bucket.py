"""Sample sets and workdirs in a bucket, of which a folder plays the part."""

import json
import pathlib

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
from jaxrobust.samples import sample_sets, shards


class Bucket:
  """epath's way to files of gs://, as files below a root.

  Attributes:
    copied: names of the files that were copied, from it or to it.
  """

  def __init__(self, root):
    self._root, self.copied = root, []

  def __getattr__(self, name):
    call = getattr(backend.os_backend, name)

    def forwarded(*args, **kwargs):
      if name == 'copy':
        self.copied.append(pathlib.PurePath(args[0]).name)
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
