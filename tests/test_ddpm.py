"""The diffusion generator: its fit, its file, and the program that samples it."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from experiments import base_generator, digits_ddpm
from jaxrobust import generate
from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError, UserError
from jaxrobust.generators import checks, ddpm, trained
from jaxrobust.generators import recipe as recipes
from jaxrobust.models import card as cards
from jaxrobust.models import labeller as labelling
from jaxrobust.models import parameter_files
from jaxrobust.runs import checkpoints
from jaxrobust.samples import sample_sets, selection
from tests.helpers import fits, labellers

pytestmark = pytest.mark.usefixtures('compiled_once')
INFO = dataset_info.INFO['digits']


# A network that compiles in seconds, in the experiment's place.
TINY = {
  'generator.network.channels': 4,
  'generator.network.multipliers': (1,),
  'generator.network.attention_sizes': (),
  'generator.network.conditional': True,
  'generator.process.num_steps': 50,
  'generator.process.last_beta': 0.3,
  'generator.training.num_steps': 4,
  'generator.training.batch_size': 8,
  'generator.training.warmup_steps': 0,
  'generator.training.log_interval_steps': 1,
  'generator.training.checkpoint_interval_steps': 3,
  'generator.sampling.num_steps': 3,
  'generator.sampling.guidance': 0.5,
  'samples.count': 20,
  'samples.draw_size': 8,
  'samples.batch_size': 2,
  'samples.shard_size': 16,
  'samples.selection': 'none',
}


def make_config(**fields):
  """The digits' config, TINY and with these fields."""
  config = digits_ddpm.get_config().unlock()
  config.update_from_flattened_dict({**TINY, **fields})
  return config.lock()


@pytest.fixture(scope='module')
def labeller(tmp_path_factory):
  """The workdir of a classifier that nobody trained."""
  return labellers.write(tmp_path_factory.mktemp('labeller'))


@pytest.fixture(scope='module')
def finished(labeller, tmp_path_factory):
  """The workdir of an uninterrupted run of the program."""
  folder = tmp_path_factory.mktemp('finished')
  generate.main(make_config(labeller=labeller), folder)
  return folder


def test_the_program_writes_what_it_says(finished):
  lines = [json.loads(x) for x in (finished / 'metrics.jsonl').read_text().splitlines()]
  assert [x['step'] for x in lines] == [1, 2, 3, 4]
  # A network that predicts nothing errs by the noise's variance: 1, with a deviation
  # of sqrt(2 / 512).
  assert abs(lines[0]['train/loss'] - 1) < 0.25
  assert [x['train/learning_rate'] for x in lines] == pytest.approx([1e-3] * 4)
  metadata = json.loads((finished / 'samples/metadata.json').read_text())
  fitted = hashlib.sha256((finished / 'generator.npz').read_bytes()).hexdigest()
  assert metadata['fit'] == {'seed': 0, 'generator_sha256': fitted}
  assert metadata['counts']['per_shard'] == [16, 4]
  assert metadata['generator']['network']['channels'] == 4
  assert not (finished / 'drawn').exists()
  images = np.load(sorted((finished / 'samples').glob('images-*'))[0])
  assert images.shape == (16, 8, 8, 1)
  assert images.std() > 10


def test_interrupted_anywhere_it_ends_the_same(
  finished, labeller, tmp_path, monkeypatch
):
  config = make_config(labeller=labeller)
  run = lambda: generate.main(config, tmp_path)
  with monkeypatch.context() as patch, pytest.raises(PreemptedError):
    answers = iter((False, True))
    patch.setattr(parallel.Preemption, 'reached', lambda self: next(answers))
    run()
  assert not (tmp_path / 'generator.npz').exists()

  calls, sample = [], ddpm.DDPM.sample

  def interrupted(self, rng, indices, batch_size):
    if batch_size == 2:  # Else it is for a picture.
      calls.append(indices[0])
      if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return sample(self, rng, indices, batch_size)

  monkeypatch.setattr(ddpm.DDPM, 'sample', interrupted)
  with pytest.raises(PreemptedError, match='run the same command again'):
    run()
  run()
  # The batch that was being drawn is finished, and none is drawn twice.
  assert calls == [0, 8, 16]
  assert fits.sha256(tmp_path / 'samples') == fits.sha256(finished / 'samples')
  found, expected = (np.load(x / 'generator.npz') for x in (tmp_path, finished))
  for name in expected.files:
    np.testing.assert_array_equal(found[name], expected[name])


def fresh_state(recipe):
  """A state of the right shapes."""
  like = jax.eval_shape(lambda: recipes.init_state(recipe, 0))
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)


class OlderState(NamedTuple):
  """The state as the first versions saved it: their parts, in their order."""

  params: Any
  net_state: Any
  opt_state: Any
  ema_params: Any
  ema_net_state: Any
  step: Any


def test_a_fit_that_an_earlier_version_began(finished, tmp_path, caplog):
  """It ends with the same parameters."""
  config, old = make_config(), epath.Path(tmp_path) / 'old'
  recipe = ddpm.DDPM.recipe(config.generator, INFO)
  state = checkpoints.Checkpoints(finished, keep=2).restore(fresh_state(recipe), 3)
  older = OlderState(
    params=state.params['unet'],
    net_state={},
    opt_state=state.opt_state['unet'],
    ema_params=state.averaged,
    ema_net_state={},
    step=state.step,
  )
  old.mkdir()
  began = checkpoints.Checkpoints(old, keep=1)
  began.save(3, older)
  began.close()
  with caplog.at_level('INFO', logger='absl'):
    generate.main(config, old, stage='fit')
  assert 'resuming after step 3' in caplog.text
  found, expected = (np.load(x / 'generator.npz') for x in (old, finished))
  for name in expected.files:
    np.testing.assert_array_equal(found[name], expected[name])


def arguments(finished, labeller, workdir):
  return [
    f'--workdir={workdir}',
    '--config=experiments/digits_ddpm.py',
    f'--config.labeller={labeller}',
    f'--config.fitted={finished}',
    *(f'--config.{name}={value}' for name, value in TINY.items()),
  ]


@pytest.mark.slow
def test_devices_change_no_bit_of_the_samples(finished, labeller, call, tmp_path):
  """Two against the four of this process; below, two processes of one each."""
  code, _, err = call('generate', *arguments(finished, labeller, tmp_path), devices=2)
  assert code == 0, err
  assert fits.sha256(tmp_path / 'samples') == fits.sha256(finished / 'samples')


KILLED = """
import os, signal
from jaxrobust import generate
from jaxrobust.runs import cli, workdir
write = workdir.write
def dying(path, content):
  if path.name == '000001.npz':
    path.with_name('000001.npz.tmp').write_bytes(content[:100])
    os.kill(os.getpid(), signal.SIGKILL)
  write(path, content)
workdir.write = dying
cli.run(generate.PROGRAM)
"""


@pytest.mark.slow
def test_killed_then_continued_by_two_processes(
  finished, labeller, start, compiled, tmp_path
):
  """Each draws one of the two files that are left."""
  args = arguments(finished, labeller, tmp_path)
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': compiled}
  killed = subprocess.run([sys.executable, '-c', KILLED, *args], env=environment)
  assert killed.returncode == -signal.SIGKILL
  drawn = sorted(path.name for path in (tmp_path / 'drawn').iterdir())
  assert drawn == ['000000.npz', '000001.npz.tmp']
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  flags = [f'--coordinator=localhost:{port}', '--num_processes=2']
  processes = [
    start('generate', *args, *flags, f'--process_id={i}', devices=1) for i in range(2)
  ]
  for process in processes:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
  assert fits.sha256(tmp_path / 'samples') == fits.sha256(finished / 'samples')
  assert not (tmp_path / 'drawn').exists()


def test_stages_alone_and_the_surest_samples(finished, labeller, tmp_path):
  """The 20 samples of the finished run are the candidates here."""
  config = make_config(
    labeller=labeller,
    fitted=str(finished),
    **{'samples.count': 10, 'samples.top_fraction': 0.5},
  )
  run = lambda stage: generate.main(config, tmp_path / 'run', stage=stage)
  with pytest.raises(UserError, match='000000.npz is absent .*--stage=sample'):
    run('label')
  for stage, made in (('sample', 'drawn'), ('label', 'labelled')):
    with pytest.raises(UserError, match='--stage=sample and --stage=label'):
      run('select')
    run(stage)
    assert (tmp_path / 'run' / made).exists()
  run('select')
  pool = sample_sets.SampleSet.open(finished / 'samples')
  selection.subset(pool, tmp_path / 'set', top_fraction=0.5, shard_size=16)
  assert fits.sha256(tmp_path / 'run/samples') == fits.sha256(tmp_path / 'set')
  found = sample_sets.SampleSet.open(tmp_path / 'run/samples')
  assert found.confidence().min() > 0.1
  per_class = pool.metadata['counts']['per_class']
  assert found.metadata['selection']['pool'] == {'total': 20, 'per_class': per_class}


def test_the_class_drawn_for_may_be_the_label(finished, tmp_path, monkeypatch):
  """Also where a signal comes while the set is written, which then starts over."""
  config = make_config(labeller='condition', fitted=str(finished))
  with monkeypatch.context() as patch, pytest.raises(PreemptedError, match='selecting'):
    write = sample_sets.write

    def interrupted(*args, **kwargs):
      os.kill(os.getpid(), signal.SIGTERM)
      return write(*args, **kwargs)

    patch.setattr(sample_sets, 'write', interrupted)
    generate.main(config, tmp_path)
  assert {x.name for x in tmp_path.iterdir()} == {'config.json', 'drawn', 'labelled'}
  generate.main(config, tmp_path)
  found = sample_sets.SampleSet.open(tmp_path / 'samples')
  np.testing.assert_array_equal(found.gather_labels(slice(None)), np.arange(20) % 10)
  assert found.confidence() is None
  assert found.metadata['labeller'] == 'condition'
  everything = sample_sets.SampleSet.open(finished / 'samples').gather(np.arange(20))
  np.testing.assert_array_equal(found.gather(np.arange(20)), everything)


def test_a_file_with_its_card_labels_alike(finished, labeller, tmp_path):
  """And so sure as float64 says: the greatest of exp(logits), over their sum."""
  file = epath.Path(tmp_path) / 'other.npy'
  (epath.Path(labeller) / 'checkpoint.npy').copy(file)
  cards.path_of(file).write_text(cards.from_workdir(labeller).to_json())
  found = sample_sets.SampleSet.open(finished / 'samples')
  images = found.gather(np.arange(20))
  said = labelling.labeller_of(str(file), INFO, 2)
  labels = said.label_fn(images, None)
  np.testing.assert_array_equal(labels['labels'], found.gather_labels(slice(None)))
  np.testing.assert_array_equal(labels['confidence'], found.confidence())
  assert (
    said.described['checkpoint_sha256']
    == (found.metadata['labeller']['checkpoint_sha256'])
  )
  model = cards.from_workdir(labeller).build()
  variables = parameter_files.load(labeller, model)
  logits = jax.jit(lambda x: model.apply(*variables, x, batch_stats=False)[0])(
    images / np.float32(255)
  )
  exponentials = np.exp(np.float64(logits) - np.float64(logits).max(1, keepdims=True))
  expected = exponentials.max(1) / exponentials.sum(1)
  # Float32 rounding of logits of another batch size.
  np.testing.assert_allclose(labels['confidence'], expected, rtol=1e-4)


def test_sample_i_depends_on_seed_and_i_only(finished):
  config = make_config()
  generator = ddpm.DDPM.restore(
    epath.Path(finished) / 'generator.npz', config.generator, INFO
  )
  rng = jax.random.key(7)
  images, classes = generator.sample(rng, np.arange(20), 2)
  np.testing.assert_array_equal(classes, np.arange(20) % 10)
  some, _ = generator.sample(rng, np.array([13, 4, 19]), 2)
  np.testing.assert_array_equal(some, images[[13, 4, 19]])
  assert len(np.unique(images, axis=0)) == 20
  other, _ = generator.sample(jax.random.key(8), np.arange(8), 2)
  assert (other != images[:8]).any((1, 2, 3)).all()


def test_one_device_computes_the_same_loss(finished):
  """That of the last step, which four devices logged, after three updates."""
  settings = make_config().generator
  recipe = ddpm.DDPM.recipe(settings, INFO)
  [phase] = recipe.phases
  real = datasets.load('digits', 'train', train_images=100, validation_images=400)
  *_, batch = trained._batches(real, INFO, settings.training, 0, 0)
  state = checkpoints.Checkpoints(finished, keep=2).restore(fresh_state(recipe), 3)
  training = jax.random.fold_in(jax.random.key(0), 2**32 - 1)
  streams = ('init', 'flip', 'time', 'noise', 'condition', 'dropout')

  def rngs(name):
    stream = jax.random.fold_in(training, streams.index(name))
    return parallel.key_per_slot(jax.random.fold_in(stream, 3), batch.slots)

  loss, _ = jax.jit(lambda params: phase.loss_fn(params, {}, batch, rngs))(state.params)
  lines = [json.loads(x) for x in (finished / 'metrics.jsonl').read_text().splitlines()]
  # Float32 rounding of a mean of 512 squares.
  assert float(loss) == pytest.approx(lines[3]['train/loss'], rel=1e-5)


def test_the_optimizer_is_adam_with_warm_up_and_a_clipped_gradient():
  """Kingma and Ba's algorithm 1, in float64."""
  training = make_config(**{'generator.training.warmup_steps': 3}).generator.training
  training.unlock().update(b1=0.8, b2=0.95, epsilon=1e-3, gradient_clip=2.0)
  adam, learning_rate_fn = ddpm.make_optimizer(training)
  params = {'w': jnp.array([1.0, -2.0])}
  state, expected = adam.init(params), np.array([1.0, -2.0])
  mean = square = np.zeros(2)
  for step, gradient in enumerate([[3.0, 4.0], [0.5, -0.1], [-6.0, 8.0], [1.0, 1.0]]):
    updates, state = adam.update({'w': jnp.array(gradient)}, state, params)
    params = optax.apply_updates(params, updates)
    gradient = np.array(gradient) * min(1, 2 / np.hypot(*gradient))
    mean = 0.8 * mean + 0.2 * gradient
    square = 0.95 * square + 0.05 * gradient**2
    rate = 1e-3 * min(step / 3, 1)
    assert learning_rate_fn(step) == pytest.approx(rate)
    corrected = mean / (1 - 0.8 ** (step + 1)), square / (1 - 0.95 ** (step + 1))
    expected = expected - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-3)
    np.testing.assert_allclose(params['w'], expected, rtol=1e-6)


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'generator.network.multipliers': (1,) * 5}, 'halve images 4 times'),
    ({'generator.network.channels': 6}, 'channels = 6: use a multiple of 4'),
    ({'generator.network.dropout': 1.0}, 'dropout = 1.0: use 0 to below 1'),
    ({'generator.training.learning_rate': 0.0}, 'use a number above 0'),
    ({'generator.sampling.sampler': 'euler'}, "'euler': use one of ancestral"),
    ({'generator.sampling.sampler': 'ancestral'}, "all of the process's 50 steps"),
    ({'generator.sampling.guidance': -1.0}, 'guidance = -1.0: use 0 or more'),
    ({'generator.network.conditional': False}, 'network without classes'),
    ({'generator.training.condition_dropout': 0.0}, 'never learns to do without'),
    ({'generator.network.attention_sizes': (4,)}, r'\(4,\): the maps have heights 8;'),
    # The product of 1 - beta is about exp(-sum of beta): 0.60 of 50 steps of 0.01.
    ({'generator.process.last_beta': 0.02}, 'process leaves 0.603 of'),
    ({'generator.process.num_steps': 20_000}, 'noise alone: leave 1e-38 to 0.01'),
  ],
  ids=str,
)
def test_refusals(fields, words):
  with pytest.raises(UserError, match=words):
    checks.check(make_config(labeller='condition', **fields))


def test_only_a_fit_needs_a_batch_that_devices_share(labeller, tmp_path):
  config = make_config(labeller=labeller, **{'generator.training.batch_size': 6})
  checks.check(config)
  for stage in ('', 'fit'):
    with pytest.raises(UserError, match='batch of 6 does not divide over 4'):
      generate.main(config, tmp_path / 'x', stage=stage)
  assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('name', ['gaussian', 'ddpm', 'mixup', 'edm'])
@pytest.mark.parametrize('other', ['gaussian', 'ddpm', 'mixup', 'edm'])
def test_the_fields_of_another_generator_are_refused(name, other):
  config = base_generator.get_config(other).unlock()
  config.labeller, config.generator.name = 'condition', name
  if name != other:
    with pytest.raises(UserError, match=f"get_config\\('{name}'\\)"):
      checks.check(config)


def test_a_fit_of_another_config_is_refused(finished, labeller, tmp_path):
  for name, value in {
    'generator.network.channels': 8,
    'dataset.train_images': 50,
  }.items():
    config = make_config(labeller=labeller, fitted=str(finished), **{name: value})
    with pytest.raises(UserError, match=f'fitted by another config .*{name}: '):
      generate.main(config, tmp_path / 'x')
  assert not (tmp_path / 'x').exists()
