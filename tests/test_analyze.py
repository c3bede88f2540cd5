"""The analysis: neighbours across sets, rules, and the program in small."""

import importlib
import json
import pathlib
import signal
import time

import jax
import numpy as np
import pytest
import sklearn.neighbors
from etils import epath

from jaxrobust import analyze
from jaxrobust import config as configs
from jaxrobust.analysis import complementarity, conditions, image_features, predictions
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.models import card, feature_networks, parameter_files
from jaxrobust.runs import cli
from jaxrobust.samples import sample_sets, stratified
from tests.helpers.programs import ends


def clouds(count, shift=0.0):
  """Three sets of one distribution, the generated one moved by `shift`."""
  rng = np.random.default_rng(0)
  found = {name: rng.normal(size=(count, 3)) for name in complementarity.SETS}
  found['generated'] += shift
  return found


def shares(features):
  """Those of the generated images, and coverage of train and test."""
  found = complementarity.neighbours(features, 'generated').shares()
  return [*found, *(complementarity.coverage(features, x) for x in ('train', 'test'))]


def test_sets_of_one_distribution_share_equally():
  """2,000 images: standard errors of about 1 point; four of them are allowed."""
  features = clouds(2_000)
  found = shares(features)
  assert sum(found[:3]) == pytest.approx(1)
  np.testing.assert_allclose(found[:3], 1 / 3, atol=0.045)
  np.testing.assert_allclose(found[3:], 1 / 2, atol=0.045)
  told = complementarity.two_sample_test(features['test'], features['generated'])
  assert told.standard_error == pytest.approx(0.5 / 2_000**0.5, rel=0.01)
  assert abs(told.accuracy - 0.5) < 4 * told.standard_error


def test_a_copy_of_the_training_set_and_one_far_away():
  features = clouds(200)
  copied = features | {'generated': features['train'][::-1]}
  found = shares(copied)
  assert found[:4] == [1, 0, 0, 1]
  assert 0.3 < found[4] < 0.7  # It is one more sample of the distribution.
  far = clouds(200, shift=100.0)
  assert shares(far) == [0, 0, 1, 0, 0]
  told = complementarity.two_sample_test(far['test'], far['generated'])
  assert told == (1, 0)


def test_neighbours_are_those_of_sklearn():
  """Of all three sets at once, repeated images among them."""
  features = clouds(120)
  features['generated'][50:62] = features['generated'][7]
  features['generated'][99] = features['test'][3]
  found = complementarity.neighbours(features, 'generated')
  together = np.concatenate(list(features.values()))
  trees = sklearn.neighbors.NearestNeighbors(algorithm='kd_tree').fit(together)
  distances, indices = trees.kneighbors(features['generated'], 15)
  own = np.arange(240, 360)[:, None]
  first = np.argmax(indices != own, 1)[:, None]
  nearest = np.take_along_axis(distances, first, 1)[:, 0]
  np.testing.assert_allclose(found.distances.min(1), nearest, rtol=1e-12)
  chosen = found.distances.argmin(1)
  row = 120 * chosen + found.indices[np.arange(120), chosen]
  wanted = np.take_along_axis(indices, first, 1)[:, 0]
  np.testing.assert_array_equal(together[row], together[wanted])  # Or a repeated one.
  assert (found.indices[:, 2] != np.arange(120)).all()
  assert not found.distances[[7, 50, 61], 2].any()
  with pytest.raises(UserError, match=r'\[120, 60, 120\] images: compare equally'):
    complementarity.neighbours(features | {'test': features['test'][:60]}, 'test')


FIGURES = {
  'labeller_test_accuracy': 0.95,
  'label_agreement': 0.91,
  'agreement_with_condition': None,
  'two_sample_accuracy': 0.7,
  'two_sample_standard_error': 0.02,
  'flip_rate_generated': 0.4,
  'coverage_test': 0.3,
}
RULES = {
  'least_accuracy': 0.9,
  'most_two_sample_accuracy': 0.6,
  'most_flips': 0.5,
  'least_coverage': 0.25,
}


@pytest.mark.parametrize(
  'changed, unmet',
  [
    ({}, set()),
    ({'label_agreement': 0.89}, {'labels'}),
    ({'labeller_test_accuracy': 0.89}, {'labels'}),
    ({'agreement_with_condition': 0.89}, {'labels'}),
    ({'flip_rate_generated': 0.51}, {'distribution'}),
    ({'flip_rate_generated': 0.51, 'two_sample_accuracy': 0.55}, set()),
    ({'coverage_test': 0.24}, {'coverage'}),
  ],
  ids=str,
)
def test_rules(changed, unmet):
  found = conditions.verdicts(FIGURES | changed, RULES)
  assert {name for name, met in found.items() if not met} == unmet


@pytest.mark.parametrize('accuracy', [0.57, 0.6, 0.63])
def test_too_few_images_decide_nothing(accuracy):
  """Within two standard errors, unless labels are hard to flip."""
  figures = FIGURES | {'two_sample_accuracy': accuracy}
  assert conditions.verdicts(figures, RULES)['distribution'] is True
  figures['flip_rate_generated'] = 0.51
  assert conditions.verdicts(figures, RULES)['distribution'] is None


def test_memorisation_by_two_standard_errors():
  """Of 100 images 64 are nearest to a real one: 32 ± 4 of each, a lead of 0 ± 8."""
  memorises = lambda train, test: conditions.memorises(
    {'nearest_train': train, 'nearest_test': test}, 100
  )
  assert memorises(0.56, 0.12) and memorises(0.41, 0.23)
  assert not memorises(0.39, 0.25) and not memorises(0.12, 0.56)
  assert not memorises(0.0, 0.0)


@pytest.fixture(scope='module')
def labeller(tmp_path_factory):
  """A tiny network of random parameters, in a file with a card."""
  described = card.Card(
    name='tiny',
    dataset='digits',
    norm='linf',
    epsilon=0.2,
    model={
      'name': 'wrn-10-1',
      'activation': 'swish',
      'mean': (0.5,),
      'std': (0.5,),
      'padding': 0,
    },
  )
  model = described.build()
  rng = np.random.default_rng(0)
  params, net_state = jax.eval_shape(model.init, jax.random.key(0))
  params = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), params)
  net_state = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), net_state)
  path = epath.Path(tmp_path_factory.mktemp('labeller')) / 'tiny.npy'
  parameter_files.export_npy(path, params, net_state)
  card.path_of(path).write_text(described.to_json())
  logits = jax.jit(lambda x: model.apply(params, net_state, x, batch_stats=False)[0])
  return path, lambda images: np.asarray(logits(np.float32(images) / 255)).argmax(-1)


@pytest.fixture(scope='module')
def sample_set(tmp_path_factory):
  """60 training images, slightly changed; every third label is wrong."""
  real = datasets.load('digits', 'train', validation_images=400, train_images=60)
  images = real.images ^ np.uint8(3)
  labels = (real.labels + (np.arange(60) % 3 == 0)) % 10
  metadata = {'selection': {'agreement_with_condition': 0.875}}
  path = tmp_path_factory.mktemp('samples') / 'set'
  return sample_sets.write(path, [(images, labels)], metadata=metadata, num_classes=10)


@pytest.fixture
def flags(labeller, sample_set):
  """Of a small analysis, but for its workdir."""
  return [
    f'--config=experiments/digits_analysis.py:{sample_set.path}',
    f'--config.labeller={labeller[0]}',
    '--config.dataset.train_images=60',
    '--config.num_images=60',
    '--config.num_attacked=30',
    '--config.batch_size=8',
    '--config.attack.num_steps=2',
    '--config.attack.step_sizes=(0.1,)',
    '--config.attack.step_boundaries=()',
  ]


@pytest.fixture
def run(flags, tmp_path, monkeypatch, capsys):
  """Runs the program in this process: (exit code, stdout, stderr)."""

  def call(*more):
    arguments = [f'--workdir={tmp_path}/run', *flags, *more]
    code = cli._run(analyze.PROGRAM, arguments)
    return code, *capsys.readouterr()

  return call


@pytest.mark.slow
def test_the_program_resumes_and_refuses(
  run, labeller, sample_set, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:  # Interrupted when all is measured.
    patch.setattr(conditions, 'draw', lambda *_: signal.raise_signal(signal.SIGINT))
    assert run()[0] == 130
  assert not (tmp_path / 'run/results.json').exists()
  with monkeypatch.context() as patch:  # Nothing is measured again.
    network = feature_networks.Network('tiny (penultimate layer)', None)
    patch.setattr(feature_networks, 'network', lambda *_: network)
    patch.setattr(
      predictions.Evaluator, '_attempt_shard', lambda *_: pytest.fail('again')
    )
    code, page, err = run()
  assert code == 0, err
  [entry] = json.loads((tmp_path / 'run/results.json').read_text())
  test = datasets.load('digits', 'test')
  chosen = stratified.one_of_each_part(797, 30, seed=0)
  predict = labeller[1]
  right = (predict(test.images[chosen]) == test.labels[chosen]).mean()
  assert entry['labeller_test_accuracy'] == pytest.approx(right)
  chosen = stratified.one_of_each_part(60, 30, seed=0)
  agreed = predict(sample_set.gather(chosen)) == sample_set.gather_labels(chosen)
  assert entry['label_agreement'] == pytest.approx(agreed.mean())
  assert entry['agreement_with_condition'] == 0.875
  assert 'samples were drawn for: 87.50%' in page
  assert not entry['labelled_by_labeller']
  assert 0 < entry['flip_rate_test'] <= 1
  nearest = [entry[f'nearest_{x}'] for x in ('train', 'test', 'itself')]
  assert sum(nearest) == pytest.approx(1)
  assert f'nearest to generated images: train {nearest[0]:.2%}' in page
  assert entry['nearest_train'] > 0.5  # They nearly are training images.
  assert set(entry['verdicts']) == {'labels', 'distribution', 'coverage'}
  for name in ('conditions', 'neighbours'):
    png = (tmp_path / f'run/figures/{name}.png').read_bytes()
    assert png.startswith(b'\x89PNG')

  with monkeypatch.context() as patch:
    patch.setattr(analyze, 'analyze', None)  # Must not be called.
    again = run('--config.batch_size=4')  # Which is no part of what is measured.
    assert again[:2] == (0, page) and 'is finished' in again[2]

  code, _, err = run('--config.seed=1')
  assert code == 1 and 'seed: 0 → 1' in err and err.count('\n') == 1


@pytest.mark.slow
def test_two_processes_stop_together_and_find_the_same(run, pod, flags, tmp_path):
  assert run()[0] == 0
  command = ['analyze', f'--workdir={tmp_path}/two', *flags]
  processes = pod(2, *command, devices=2)
  deadline = time.monotonic() + 120
  while not (tmp_path / 'two' / 'parts').exists() and time.monotonic() < deadline:
    time.sleep(0.01)
  processes[1].send_signal(signal.SIGTERM)
  codes, texts = ends(processes)
  assert codes == [42, 42], texts
  processes = pod(2, *command, devices=2)
  told = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], told
  assert ['nearest to generated images' in out for out, _ in told] == [True, False]
  assert not (tmp_path / 'two' / 'parts').exists()
  results = []
  for name in ('run', 'two'):
    [entry] = json.loads((tmp_path / name / 'results.json').read_text())
    results.append(entry)
  assert results[0] == results[1]


@pytest.mark.parametrize(
  'override, words',
  [
    ('samples=', 'config.samples is not set'),
    ('samples=nowhere', 'nowhere is no sample set'),
    ('labeller=', 'config.labeller is not set'),
    ('labeller=nowhere', 'nowhere: it does not exist; give a file'),
    ('dataset.name=mnist', r'holds images [8, 8, 1] of 10 classes, mnist [28, 28, 1]'),
    ('rules.most_flips=50.0', 'config.rules.most_flips = 50.0: use a number from 0'),
    ('num_images=2', 'config.num_images = 2: use 4 or more'),
    ('attack.num_steps=0', 'attack.num_steps = 0'),
    ('features=nowhere', 'nowhere: it does not exist; give a file'),
  ],
)
def test_mistakes_are_told_in_one_line(run, tmp_path, override, words):
  code, _, err = run(f'--config.{override}')
  assert code == 1 and err.startswith('error: ') and err.count('\n') == 1, err
  assert words in err
  assert not (tmp_path / 'run').exists()


def test_too_few_images(run):
  code, _, err = run('--config.num_images=61')
  assert code == 1
  assert 'num_images = 61: there are 60 train images; use at most 60' in err


def test_features_of_another_program(run, tmp_path):
  """The first call writes the images, in the order in which features are read."""
  file = tmp_path / 'pixels.npz'
  code, _, err = run(f'--config.features={file}')
  assert code == 1
  assert f'features [60, F] of train, test and generated in {tmp_path}' in err
  with np.load(tmp_path / 'run/images.npz') as images:
    flat = {name: images[name].reshape(60, -1) / 255 for name in images}
  np.savez(file, network='pixels', **flat)
  config = importlib.import_module('experiments.digits_analysis').get_config().unlock()
  config.features, config.num_images = str(file), 60
  network, found = image_features.of_sets(config, tmp_path, {}, tmp_path, None)
  assert network == 'pixels'
  np.testing.assert_array_equal(found['test'], flat['test'])
  figures, neighbours = complementarity.compare(found, config.seed)
  assert figures['nearest_train'] > 0.9  # The lowest bits of grey differ.
  assert neighbours.indices.shape == (60, 3)
  config.num_images = 59
  with pytest.raises(UserError, match=r'of \[60, 60, 60\] images: config.num_images'):
    image_features.of_sets(config, tmp_path, {}, tmp_path, None)


@pytest.mark.parametrize('file', ['digits_analysis', 'cifar10_analysis'])
def test_experiments(file):
  module = importlib.import_module(f'experiments.{file}')
  dataset = file.removesuffix('_analysis')
  config = module.get_config('ddpm').unlock()
  assert config.samples.startswith(('runs/paper/', 'data/'))
  assert f'{dataset}_ddpm' in config.samples
  assert module.get_config('some/where').samples == 'some/where'
  config.labeller = 'some/where'
  analyze.check(config)
  assert config.dataset.name == dataset
  # What is on disk is read as what it is.
  assert not configs.differences(configs.from_json(configs.to_json(config)), config)
  assert f'--config={pathlib.Path(module.__file__).stem}' in module.__doc__
