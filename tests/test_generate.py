"""The files of draws, the rounds that make them, and what the program refuses."""

import jax
import numpy as np
import pytest
from etils import epath

from experiments import digits_ddpm, digits_gaussian, digits_mixup
from jaxrobust import config as configs
from jaxrobust import generate
from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError, UserError
from jaxrobust.generators import candidates, checks
from jaxrobust.samples import selection
from tests.helpers.mutations import mutations


def make_config(**samples):
  config = digits_gaussian.get_config().unlock()
  config.labeller = 'somewhere'
  for name, value in samples.items():
    config.samples[name] = value
  return config


class Run:
  """Makes files of 8 samples, 3 at a time; image i has value i, classes take turns."""

  def __init__(self, folder, rule, labels_of):
    self.files, self.drawn = candidates.Draws(epath.Path(folder), rule, 8), []
    self.labels_of = labels_of

  def sample(self, indices):
    self.drawn += indices.tolist()
    images = np.broadcast_to(
      np.uint8(indices)[:, None, None, None], (len(indices), 2, 2, 1)
    )
    return images, np.int32(indices % 3)

  def label(self, images, classes):
    labels = self.labels_of(np.int32(images[:, 0, 0, 0]))
    return {'labels': labels, 'confidence': np.float32(labels / 4)}

  def finish(self, max_draws_factor=20.0, stop=lambda: None):
    """Numbers of files by round, values and labels of the selected, the metadata."""
    rounds, complete = [], False
    while not complete:
      num_files, complete = self.files.num_needed(3, max_draws_factor)
      rounds.append(num_files)
      self.files.draw(num_files, self.sample, 3, stop)
      self.files.label(num_files, self.label, 3, stop)
    batches, described = self.files.choose(num_files, 3)
    images, labels, confidence = map(np.concatenate, zip(*batches, strict=True))
    np.testing.assert_array_equal(confidence, np.float32(labels / 4))
    return rounds, images[:, 0, 0, 0], labels, described


def common(index):
  """Class 0 four times as often as the others."""
  return np.where(index % 6 < 4, 0, index % 6 - 3)


def test_balanced_takes_the_first_of_each_class(tmp_path):
  run = Run(tmp_path, selection.Rule(12, True), common)
  rounds, images, labels, described = run.finish()
  # After 2 files classes 1 and 2 have 2 of their 4, so that twice as many are likely.
  assert rounds == [2, 4, 4]
  for label in range(3):
    assert (
      images[labels == label].tolist()
      == [i for i in range(100) if common(np.array(i)) == label][:4]
    )
  assert run.drawn == list(range(32)) and described['drawn'] == 32
  assert described['agreement_with_condition'] == np.mean(images % 3 == labels)
  drawn = np.bincount([common(np.array(i)) for i in range(32)]).tolist()
  assert described['drawn_per_class'] == drawn
  run.files.remove()
  assert not list(tmp_path.iterdir())


def test_rounds_are_the_same_wherever_it_stopped(tmp_path):
  rule = selection.Rule(12, True, 0.5)
  whole = Run(tmp_path / 'whole', rule, common).finish()
  times = 0

  def stop():
    nonlocal times
    times += 1
    if times % 7 == 0:
      raise PreemptedError

  run = Run(tmp_path / 'parts', rule, common)
  for _ in range(100):
    try:
      rounds, *found = run.finish(stop=stop)
      break
    except PreemptedError:
      assert not list(tmp_path.rglob('*.tmp'))
  assert times > 20
  for x, y in zip(found, whole[1:], strict=True):
    np.testing.assert_array_equal(x, y)


def test_processes_share_the_files(tmp_path, monkeypatch):
  """Five files by three processes."""
  for name in ('barrier', 'require_agreement'):
    monkeypatch.setattr(parallel, name, lambda _: None)
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  asked = []
  for process in range(3):
    monkeypatch.setattr(jax, 'process_index', lambda i=process: i)
    run = Run(tmp_path / f'{process}', selection.Rule(40, False), common)
    run.files.draw(5, run.sample, 3, lambda i=process: asked.append(i))
    assert {i // 8 for i in run.drawn} == {n for n in range(5) if n % 3 == process}
  # They agree on when to stop by counting.
  assert [asked.count(i) for i in range(3)] == [6, 6, 6]


def test_gives_up_and_names_the_classes_that_are_short(tmp_path):
  run = Run(tmp_path, selection.Rule(12, True), lambda i: i % 2)
  with pytest.raises(UserError, match=r'48 samples .* classes \[2\] \(4 cand') as e:
    run.finish(max_draws_factor=4.0)
  for remedy in ('selection=none', 'max_draws_factor', f'--config.fitted={tmp_path}'):
    assert remedy in str(e.value)


def test_labels_need_the_draws(tmp_path):
  run = Run(tmp_path, selection.Rule(12, False), common)
  run.files.draw(1, run.sample, 3, lambda: None)
  with pytest.raises(UserError, match=r'000001.npz is absent \(1 of 2 are\)'):
    run.files.label(2, run.label, 3, lambda: None)


@pytest.mark.parametrize(
  'field, value',
  [('count', 0), ('selection', 'best'), ('batch_size', -1), ('top_fraction', 1.5)],
)
def test_refuses_values(field, value):
  with pytest.raises(UserError, match=f'samples.{field}'):
    checks.check(make_config(**{field: value}))


@pytest.mark.parametrize(
  'file, field, value, words',
  [
    (
      digits_gaussian,
      'covariance',
      'full',
      'covariance = .full.: use one of empirical',
    ),
    (digits_mixup, 'alpha', 0.0, 'alpha = 0.0: use a number above 0'),
  ],
)
def test_refuses_settings_of_a_generator(file, field, value, words):
  config = file.get_config().unlock()
  config.generator[field] = value
  with pytest.raises(UserError, match=words):
    checks.check(config, is_labelled=False)


def test_refuses_a_condition_that_says_nothing():
  config = make_config(top_fraction=0.2)
  config.labeller = 'condition'
  with pytest.raises(UserError, match='nothing to rank by'):
    checks.check(config)
  config = digits_ddpm.get_config()
  config.labeller = 'condition'
  with pytest.raises(UserError, match='without classes'):
    checks.check(config)


def test_refuses_what_is_absent(tmp_path):
  with pytest.raises(UserError, match='no generator.npz.*begin with --stage=fit'):
    generate.main(make_config(), tmp_path / 'x', stage='select')
  with pytest.raises(UserError, match='somewhere: it does not exist; give a'):
    generate.main(make_config(), tmp_path / 'x')
  assert not (tmp_path / 'x').exists()


def test_stages_before_the_labels_need_no_labeller(tmp_path):
  """One that is given is looked for, and may change until it has labelled."""
  config = make_config()
  with pytest.raises(UserError, match='somewhere: it does not exist; give a'):
    generate.main(config, tmp_path / 'x', stage='fit')
  config.labeller = ''
  generate.main(config, tmp_path / 'x', stage='fit')
  config.labeller = 'condition'
  generate.main(config, tmp_path / 'x', stage='fit')
  (tmp_path / 'x/labelled').mkdir()
  (tmp_path / 'x/labelled/000001.npz').touch()
  config.labeller = ''
  with pytest.raises(UserError, match='labeller: condition → '):
    generate.main(config, tmp_path / 'x', stage='fit')
  with pytest.raises(UserError, match='config.labeller is not set'):
    generate.main(config, tmp_path / 'x', stage='label')


def test_the_selection_may_change_until_the_set_is_written(tmp_path):
  config = make_config()
  config.labeller = 'condition'
  generate.main(config, tmp_path, stage='fit')
  (tmp_path / 'labelled').mkdir()
  (tmp_path / 'labelled/000000.npz').touch()
  config.samples.selection, config.samples.max_draws_factor = 'none', 40.0
  generate.main(config, tmp_path, stage='fit')
  found = configs.from_json((tmp_path / 'config.json').read_text()).samples
  assert (found.selection, found.max_draws_factor) == ('none', 40.0)
  config.samples.draw_size = 7
  with pytest.raises(UserError, match='samples.draw_size'):
    generate.main(config, tmp_path, stage='fit')


def test_configs_on_disk_without_the_younger_field_mean_what_they_did():
  config, old = digits_ddpm.get_config(), digits_ddpm.get_config().unlock()
  del old.samples.top_fraction
  for name in ('b1', 'b2', 'epsilon'):
    del old.generator.training[name]
  assert not configs.differences(configs.from_json(configs.to_json(old)), config)


@pytest.mark.parametrize('module', [digits_ddpm, digits_gaussian])
def test_the_generator_alone_survives_its_file(module):
  """As a fitted one keeps its settings."""
  settings = module.get_config().generator
  assert not configs.differences(configs.from_json(configs.to_json(settings)), settings)


@pytest.mark.parametrize('kind', ['drawn', 'labelled'])
def test_damaged_files_of_draws(tmp_path, kind):
  """Each is as it was, or refused in a line that says what to do."""
  run = Run(tmp_path, selection.Rule(12, True), common)
  _, *whole = run.finish()
  path = tmp_path / kind / '000000.npz'
  taken = 0
  for damaged in mutations(path.read_bytes(), 200, seed=9):
    path.write_bytes(damaged)
    try:
      _, *found = run.finish()
    except UserError as error:
      line = str(error)
      assert str(path) in line and 'remove it' in line and '\n' not in line
    else:
      taken += 1
      for x, y in zip(found, whole, strict=True):
        np.testing.assert_array_equal(x, y)
  assert taken < 120


@pytest.mark.parametrize(
  'name, changed, message',
  [
    ('labels', np.int32([0, 1, 2, 3, 0, 0, 0, 0]), r'labels 0\.\.3'),
    ('labels', np.int32([0, 1, 2, -1, 0, 0, 0, 0]), 'labels -1'),
    ('labels', np.zeros(7, np.int32), 'does not hold 8 samples'),
    ('labels', np.zeros(8), 'integers of 1 axis'),
    ('confidence', np.zeros((8, 1), np.float32), 'floats of 1 axis'),
    ('confidence', None, 'confidence'),
    ('classes', None, 'lacks classes'),
  ],
)
def test_files_of_labels_that_are_refused(tmp_path, name, changed, message):
  run = Run(tmp_path, selection.Rule(12, True), common)
  run.finish()
  path = tmp_path / 'labelled' / '000001.npz'
  with np.load(path) as file:
    content = {**file, name: changed}
  np.savez(path, **{x: y for x, y in content.items() if y is not None})
  with pytest.raises(UserError, match=f'{path}.*{message}.*remove it'):
    run.finish()
