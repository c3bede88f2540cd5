"""Training from Python, with images and a loss that the package does not know."""

import json
import queue
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import jaxrobust
from experiments import digits
from jaxrobust import evaluate, train
from jaxrobust.config import experiments, fields, registries
from jaxrobust.data import training_images
from jaxrobust.errors import UserError
from jaxrobust.models import parameter_files
from jaxrobust.runs import cli, flags, waiting
from jaxrobust.runs import workdir as workdirs
from jaxrobust.training import classifier, step_loss

STEPS, HELD_OUT = 2, 24
MINE = """
from jaxrobust.config import registries
from jaxrobust.training import losses

@registries.LOSSES.register('clean-and-adversarial')
def loss(passes, settings):
  both = passes.clean_logits, passes.adv_logits
  return sum(losses.cross_entropy(x, passes.targets).mean() for x in both) / 2

def get_config(arg=''):
  from experiments import digits

  c = digits.get_config('wrn-10-1').unlock()
  c.loss.name = 'clean-and-adversarial'
  return c
"""


@pytest.fixture(scope='module')
def images():
  """Seven classes of noise, 10x10, which no data set of the package has."""
  rng = np.random.RandomState(0)
  images = rng.randint(0, 256, (64, 10, 10, 1)).astype(np.uint8)
  return images, np.arange(64) % 7


def small(config):
  """The config with two steps that compile fast."""
  config.unlock()
  config.update_from_flattened_dict(
    {
      'dataset.validation_images': HELD_OUT,
      'dataset.train_images': 40,
      'data.batch_size': 16,
      'model.batch_norm_group': 4,
      'attack.num_steps': 1,
      'attack.step_sizes': (0.1,),
      'attack.step_boundaries': (),
      'training.num_steps': STEPS,
      'training.epoch_examples': 16,
      'loss.weight_decay': 0.0,
      'optimizer.warmup_epochs': 0.0,
      'log.interval_epochs': 1.0,
      'evaluation.attack.num_steps': 1,
      'evaluation.attack.step_sizes': (0.1,),
      'evaluation.attack.step_boundaries': (),
    }
  )
  return config.lock()


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  file = tmp_path_factory.mktemp('mine') / 'mine.py'
  file.write_text(MINE)
  yield small(experiments.load(str(file)))
  registries.LOSSES._items.pop('clean-and-adversarial')


@pytest.fixture(scope='module')
def batches():
  """How many images the evaluations of a run had at a time."""
  return []


@pytest.fixture(scope='module')
def run(config, images, batches, tmp_path_factory):
  """A finished run: its workdir, and what `train` returned."""
  folder = tmp_path_factory.mktemp('run')
  with pytest.MonkeyPatch.context() as patch:
    ask = classifier.Evaluator.__call__

    def evaluate(self, *arguments, **options):
      batches.append(self._size(HELD_OUT))
      return ask(self, *arguments, **options)

    patch.setattr(classifier.Evaluator, '__call__', evaluate)
    return folder, classifier.train(config, folder, train=images)


def of_command_line(folder):
  """The config of `jaxrobust train --workdir=folder`."""
  return cli._config(train.PROGRAM, flags.parse(train.PROGRAM, [f'--workdir={folder}']))


def lines(folder):
  return [json.loads(x) for x in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_a_loss_in_a_file_outside_the_package_trains(run):
  """Two steps by it, of which the first has the value that it must have."""
  folder, path = run
  first, *_ = lines(folder)
  assert first['step'] == 1
  # The last layer begins at zero, so that all logits are 0: log 7 of seven classes, of
  # the clean and of the adversarial images alike.
  np.testing.assert_allclose(first['train/loss'], np.log(7), rtol=1e-5)
  params, _ = parameter_files.import_npy(path)
  [last] = [v for k, v in params.items() if k.endswith('logits')]
  assert last['w'].shape[1] == 7 and np.abs(last['w']).max() > 0


def test_a_run_from_python_is_a_run_of_the_program(run, config, images):
  folder, path = run
  assert path == folder / 'checkpoint.npy' and path.exists()
  assert {'config.json', 'metrics.jsonl', 'checkpoints'} <= {
    x.name for x in folder.iterdir()
  }
  before = path.read_bytes()
  assert classifier.train(config, folder, train=images) == path  # It is finished.
  train.main(of_command_line(folder), str(folder))  # Also by the workdir's own config.
  assert path.read_bytes() == before


def test_validation_is_no_larger_than_its_images(run, batches, config):
  """All are judged, in one batch of them alone: no padding up to the config's size."""
  folder, _ = run
  assert config.evaluation.batch_size == 400
  assert batches and set(batches) == {HELD_OUT}
  shares = [
    v for line in lines(folder) for k, v in line.items() if k.startswith('eval')
  ]
  assert shares
  counts = np.array(shares) * HELD_OUT
  np.testing.assert_allclose(counts, np.rint(counts), atol=1e-4)


def test_a_word_that_names_no_sample_set_says_what_it_could_be():
  with pytest.raises(UserError, match="digits_foo is no .*'foo'.*wrn-DEPTH-WIDTH") as e:
    training_images.load(digits.get_config('foo'), (0, 64))
  for other in ("'real'", "'labeller'"):
    assert other in str(e.value)
  with pytest.raises(UserError) as e:
    training_images.load(digits.get_config('no/foo'), (0, 64))
  assert 'wrn-DEPTH' not in str(e.value)


def test_a_run_goes_on_with_its_own_images_only(run, config, images, tmp_path):
  folder, _ = run
  for name in ('config.json', 'images.json'):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  other = images[0].copy()
  other[-1] ^= 1
  with pytest.raises(UserError, match='holds a run with other images'):
    classifier.train(config, tmp_path, train=(other, images[1]))
  with pytest.raises(UserError, match='holds a run with other images'):
    classifier.train(config, folder, train=(other, images[1]))  # It is finished.
  (tmp_path / 'images.json').write_text('[')
  with pytest.raises(UserError, match='images.json is not JSON'):
    classifier.train(config, tmp_path, train=images)


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda x, y: (x / 255, y), r'float64 \[64, 10, 10, 1\]; give uint8'),
    (lambda x, y: (x[..., 0], y), r'uint8 \[64, 10, 10\]; give uint8'),
    (lambda x, y: (x, y[1:]), r'labels are int64 \[63\] for 64 images'),
    (lambda x, y: (x, y - 1), 'from -1 to 5; number the classes from 0'),
    (lambda x, y: (x, y.astype(np.uint64) - 1), 'number the classes from 0'),
    (lambda x, y: (x[:30], y[:30]), 'train has 30 images, of which .* = 24 are held'),
    (lambda x, y: x, 'not a pair of images and labels'),
  ],
)
def test_images_that_cannot_be_meant_are_refused(
  change, message, config, images, tmp_path
):
  with pytest.raises(UserError, match=message):
    classifier.train(config, tmp_path / 'run', train=change(*images))
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('evaluation.suite', 'autoattak', "suite 'autoattak': .* autoattack"),
    ('evaluation.suite', 'autoattack-rand', 'is for randomised networks'),
    ('evaluation.attack.objective', 'kl_divergence', 'use margin'),
    ('loss.name', 'tradez', "loss.name = 'tradez': use one of .*trades"),
  ],
)
def test_what_would_fail_after_training_is_refused_before(
  field, value, message, tmp_path
):
  config = digits.get_config('wrn-10-1').unlock()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(UserError, match=message):
    train.main(config, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_the_best_is_not_replaced_by_the_last_where_no_score_is_left(
  run, config, images, tmp_path
):
  """Its files are there, as after a run that was interrupted before its export."""
  folder, _ = run
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  (tmp_path / 'checkpoint.npy').unlink()
  for step in (tmp_path / 'checkpoints').iterdir():
    shutil.rmtree(step / 'metrics')
  with pytest.raises(UserError, match=r"no checkpoint .* has a score, .* write 'last'"):
    classifier.train(config, tmp_path, train=images)
  assert not (tmp_path / 'checkpoint.npy').exists()


def test_a_workdir_alone_must_hold_a_run(tmp_path):
  with pytest.raises(UserError, match='--config is missing: give an experiment'):
    of_command_line(tmp_path)


def test_losses_of_all_names_are_functions_of_the_passes():
  """With companions where a loss asks for them, and finite at any logits."""
  logits = jnp.array([[1e3, -1e3, 0.0]])
  passes = classifier.update.step_loss.losses.Passes(
    logits, -logits, jnp.eye(3)[:1], jnp.array([True]), logits, jnp.full((1, 3), 1 / 3)
  )
  for name in ('standard', 'adversarial', 'trades', 'lbgat', 'uat'):
    loss = registries.LOSSES.get(name)(passes, digits.get_config('wrn-10-1').loss)
    assert loss.shape == () and jnp.isfinite(loss), name
  assert jax.tree.structure(passes).num_leaves == 6


@pytest.fixture
def said(monkeypatch):
  """The lines that waits log, each taken when it is said."""
  lines = queue.Queue()
  monkeypatch.setattr(waiting.metrics, 'log_line', lines.put)
  return lines


def test_a_long_wait_is_said_again_and_again_with_how_far_it_is(said):
  with waiting.waiting('folding', hint='minutes', first=0.001, every=0.001) as note:
    assert said.get(timeout=60) == 'folding: 0:00 so far, minutes'
    note('3 of 7')
    while said.get(timeout=60) != 'folding: 0:00 so far, 3 of 7':
      pass
  while said.qsize() > 1:
    said.get()
  assert said.get() == 'folding took 0:00'


def test_a_wait_that_is_short_is_not_said(said):
  with waiting.waiting('folding'):
    pass
  assert said.empty()


def test_what_is_returned_takes_the_images_that_it_was_trained_on(run, config, images):
  """They are of no data set: the run records what they are, and normalises by them."""
  folder, path = run
  found = jaxrobust.train_classifier(config, folder, train=images)
  assert found(images[0]).shape == (64, 7)
  assert jaxrobust.read_run(folder).status == 'done'
  assert not workdirs._program  # The next run of this process begins anew.
  assert found.card.dataset == 'arrays'
  recorded = json.loads((folder / 'config.json').read_text())
  assert recorded['dataset']['image_shape'] == [10, 10, 1]
  pixels = images[0][HELD_OUT:] / 255
  np.testing.assert_allclose(recorded['model']['mean'], [pixels.mean()], atol=1e-4)
  np.testing.assert_allclose(recorded['model']['std'], [pixels.std()], atol=1e-4)
  with pytest.raises(UserError, match="'arrays': its images are only in the Python"):
    evaluate.main(workdirs.read_config(folder), str(folder))


def test_images_as_those_of_the_data_set_take_their_place(config):
  images = np.zeros((64, 8, 8, 1), np.uint8), np.arange(64) % 10
  assert training_images.record(config, images) is config


def test_a_run_from_python_that_fails_says_so(config, images, tmp_path, monkeypatch):
  def fail(self):
    assert jaxrobust.read_run(tmp_path).status == 'running'
    raise UserError('the loss is not finite')

  monkeypatch.setattr(classifier.Run, '__init__', lambda self, *_: None)
  monkeypatch.setattr(classifier.Run, 'train', fail)
  with pytest.raises(UserError, match='not finite'):
    jaxrobust.train_classifier(config, tmp_path, train=images)
  status = workdirs.read_status(epath.Path(tmp_path))
  assert (status['state'], status['message']) == ('failed', 'the loss is not finite')


def test_a_loss_that_is_no_mean_is_refused_in_one_line(config):
  class Model(NamedTuple):
    natural: None = None

    def apply(self, params, state, images, batch_stats):
      return images.reshape(len(images), -1)[:, :7] * params, state

  config = fields.replace(config, {'loss.name': 'scaled'})
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(registries.LOSSES._items, 'scaled', lambda p, _: p.adv_logits.sum(1))
    loss_fn = step_loss.make(config, Model())
    inputs = step_loss.Inputs(
      jnp.zeros((6, 4, 4, 1)),
      jnp.ones((6, 7)) / 7,
      jnp.zeros(6, bool),
      jax.random.split(jax.random.key(0), 6),
    )
    with pytest.raises(UserError, match=r"loss 'scaled' gave shape \[6\].*mean"):
      jax.eval_shape(loss_fn, 1.0, {}, inputs)


def test_validation_images_must_be_of_the_same_kind(config, images, tmp_path):
  pixels, labels = images
  give = lambda *split: classifier.train(
    config, tmp_path / 'run', train=images, validation=split
  )
  with pytest.raises(UserError, match=r'validation has images \[8, 8, 1\], train \[10'):
    give(pixels[:, :8, :8], labels)
  assert not (tmp_path / 'run').exists()


def test_values_of_a_config_are_replaced_by_path():
  config = jaxrobust.load_config('digits:wrn-10-2', {'threat.epsilon': 0.1})
  assert (config.model.name, config.threat.epsilon) == ('wrn-10-2', 0.1)
  with pytest.raises(UserError, match=r'digits: treat.epsilon=0.1.*mean threat'):
    jaxrobust.load_config('digits', {'treat.epsilon': 0.1})
  texts = {'threat.epsilon': '8/255', 'training.num_steps': '30', 'variant': '1'}
  config = jaxrobust.load_config('digits', texts)
  assert (config.threat.epsilon, config.training.num_steps) == (8 / 255, 30)
  assert config.variant == '1'
  for wrong, words in (('big', 'big: .*8/255'), ([1], r'\[1\] is a list: .* 0.2$')):
    with pytest.raises(UserError, match=f'^digits: threat.epsilon={words}'):
      jaxrobust.load_config('digits', {'threat.epsilon': wrong})
