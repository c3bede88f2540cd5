"""Runs of the very deep VAE: its fit, its evaluation, its samples, its plan."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from etils import epath

from experiments import cifar10_vdvae, digits_vdvae
from jaxrobust import generate
from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError, UserError
from jaxrobust.generators import checks, trained, vdvae
from jaxrobust.planning import device_programs
from jaxrobust.runs import checkpoints
from tests.helpers import fits, labellers, tiny_gan
from tests.helpers.programs import FAST, ends

pytestmark = pytest.mark.usefixtures('compiled_once')
INFO = dataset_info.INFO['digits']

# A network that compiles in seconds, in the experiment's place.
TINY = {
  'generator.network.width': 8,
  'generator.network.bottleneck': 4,
  'generator.network.latent_channels': 2,
  'generator.network.num_mixtures': 2,
  'generator.network.encoder': '8x1,8d8',
  'generator.network.decoder': '1x1,8m1,8x1',
  'generator.training.num_steps': 6,
  'generator.training.batch_size': 8,
  'generator.training.warmup_steps': 2,
  'generator.training.learning_rate': 0.1,  # So that the last are not the best.
  'generator.training.log_interval_steps': 1,
  'generator.training.checkpoint_interval_steps': 3,
  'generator.training.evaluation_interval_steps': 2,
  'samples.count': 20,
  'samples.draw_size': 8,
  'samples.batch_size': 2,
  'samples.shard_size': 16,
  'samples.selection': 'none',
}


def make_config(**fields):
  """The digits' config, TINY and with these fields."""
  config = digits_vdvae.get_config().unlock()
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


def restore(folder, **fields):
  return vdvae.VDVAE.restore(
    epath.Path(folder) / 'generator.npz', make_config(**fields).generator, INFO
  )


def test_the_program_writes_what_it_says(finished):
  lines = fits.lines_of(finished)
  trained_on = [x for x in lines if 'train/loss' in x]
  assert [x['step'] for x in trained_on] == [1, 2, 3, 4, 5, 6]
  rates = [0, 0.05, *[0.1] * 4]
  assert [x['train/learning_rate'] for x in trained_on] == pytest.approx(rates)
  for x in trained_on:
    assert x['train/bits_per_dim'] == pytest.approx(x['train/loss'] / np.log(2))
    assert 0 <= x['train/bits_per_dim_rate'] < x['train/bits_per_dim']
    assert x['train/loss_skipped'] in (0, 1)
  # Before training the mixture is wide: near 8 bits, as if all levels were as likely.
  assert 4 < trained_on[0]['train/bits_per_dim'] < 12
  assert len(list((finished / 'figures').glob('samples-*.png'))) == 2
  images = np.load(sorted((finished / 'samples').glob('images-*'))[0])
  assert images.shape == (16, 8, 8, 1) and images.std() > 10


def test_the_best_by_validation_is_what_samples_come_from(finished):
  lines = [x for x in fits.lines_of(finished) if 'validation/bits_per_dim' in x]
  assert [x['step'] for x in lines] == [2, 4, 6]
  assert all(x['test/bits_per_dim'] > 0 for x in lines)
  best = min(lines, key=lambda x: x['validation/bits_per_dim'])
  assert best['step'] != 6  # Or the test would not see that the best is taken.
  saved = checkpoints.read_step(epath.Path(finished), best['step'])
  found = restore(finished).variables
  jax.tree.map(np.testing.assert_array_equal, found, saved['averaged'])
  # The stage after the fit finds the same bits again, and writes them once.
  results = json.loads((finished / 'results.json').read_text())
  assert [x['protocol']['split'] for x in results] == ['validation', 'test']
  for entry, count in zip(results, (400, 797), strict=True):
    split = entry['protocol']['split']
    assert entry['protocol']['num_images'] == count
    assert entry['bits_per_dim'] == best[f'{split}/bits_per_dim']
    parts = entry['bits_per_dim_rate'] + entry['bits_per_dim_distortion']
    assert parts == pytest.approx(entry['bits_per_dim'])


def test_likelihoods_by_a_command(finished, tmp_path):
  """In a finished run nothing changes; of another run's fit they are the same."""
  config = make_config(fitted=str(finished))
  before = (finished / 'results.json').read_text()
  generate.main(config, tmp_path / 'x', stage='evaluate')
  found = json.loads((tmp_path / 'x/results.json').read_text())
  expected = json.loads(before)
  assert found == expected
  generate.main(config, tmp_path / 'x', stage='evaluate')
  assert json.loads((tmp_path / 'x/results.json').read_text()) == expected


def test_only_a_likelihood_can_be_evaluated(tmp_path):
  with pytest.raises(UserError, match="'tiny-gan' has no likelihood: .* analyze"):
    generate.main(tiny_gan.make_config(), tmp_path / 'x', stage='evaluate')
  with pytest.raises(UserError, match='absent: run --stage=fit first'):
    generate.main(make_config(), tmp_path / 'y', stage='evaluate')


def test_every_image_counts_once_and_devices_change_nothing(finished):
  """Against one device without padding, in float32 of other sums."""
  generator, images = restore(finished), datasets.load('digits', 'test').images[:21]
  found = generator.evaluate(images, 5)['bits_per_dim']
  network = vdvae.make_network(generator.settings, INFO)
  rngs = parallel.key_per_slot(jax.random.key(5), np.arange(21))
  parts = jax.jit(
    lambda params: vdvae.terms(network, params, images, vdvae._drawn(rngs))
  )(generator.variables)
  expected = np.float64(parts).sum(0).mean() / 64 / np.log(2)
  assert found == pytest.approx(expected, rel=1e-5)
  assert generator.evaluate(images, 6)['bits_per_dim'] != found


def test_interrupted_anywhere_it_ends_the_same(
  finished, labeller, tmp_path, monkeypatch
):
  config = make_config(labeller=labeller)
  run = lambda: generate.main(config, tmp_path)
  for stop in (1, 3):  # Before the best evaluation, and after it.
    with monkeypatch.context() as patch, pytest.raises(PreemptedError):
      answers = iter([False] * (stop - 1) + [True])
      patch.setattr(parallel.Preemption, 'reached', lambda self, a=answers: next(a))
      run()
  calls, sample = [], vdvae.VDVAE.sample

  def interrupted(self, rng, indices, batch_size):
    if batch_size == 2:  # Else it is for a picture.
      calls.append(indices[0])
      if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return sample(self, rng, indices, batch_size)

  monkeypatch.setattr(vdvae.VDVAE, 'sample', interrupted)
  with pytest.raises(PreemptedError, match='run the same command again'):
    run()
  run()
  assert calls == [0, 8, 16]
  assert fits.sha256(tmp_path / 'samples') == fits.sha256(finished / 'samples')
  assert fits.lines_of(tmp_path) == fits.lines_of(finished)
  jax.tree.map(
    np.testing.assert_array_equal,
    restore(tmp_path).variables,
    restore(finished).variables,
  )


def test_sample_i_depends_on_seed_and_i_only(finished):
  generator, rng = restore(finished), jax.random.key(7)
  images, classes = generator.sample(rng, np.arange(20), 2)
  assert classes.tolist() == [-1] * 20
  some, _ = generator.sample(rng, np.array([13, 4, 19]), 2)
  np.testing.assert_array_equal(some, images[[13, 4, 19]])
  assert len(np.unique(images, axis=0)) == 20
  other, _ = generator.sample(jax.random.key(8), np.arange(8), 2)
  assert (other != images[:8]).any((1, 2, 3)).all()
  cold = restore(finished, **{'generator.sampling.temperature': 0.0})
  assert (cold.sample(rng, np.arange(20), 2)[0] != images).any()


def test_one_device_computes_the_same_loss(finished):
  """That of the fourth step, which four devices logged, after three updates."""
  settings = make_config().generator
  recipe = vdvae.VDVAE.recipe(settings, INFO)
  [phase] = recipe.phases
  real = datasets.load('digits', 'train', train_images=100, validation_images=400)
  batches = trained._batches(real, INFO, settings.training, 0, 0)
  batch = list(batches)[4]
  saved = checkpoints.read_step(epath.Path(finished), 4)
  stream = jax.random.fold_in(
    jax.random.fold_in(jax.random.key(0), 2**32 - 1), 1 + phase.streams.index('latent')
  )
  rngs = lambda name: parallel.key_per_slot(jax.random.fold_in(stream, 4), batch.slots)
  loss, _ = jax.jit(lambda params: phase.loss_fn(params, {}, batch, rngs))(
    saved['params']
  )
  [line] = [x for x in fits.lines_of(finished) if x['step'] == 5]
  # Float32 rounding of a mean of 8 sums.
  assert float(loss) == pytest.approx(line['train/loss'], rel=1e-5)


def test_a_plan_has_the_step_and_the_samples():
  """Of the published network, as far as tracing it."""
  config = cifar10_vdvae.get_config()
  [step] = device_programs.of(config, 'train', 8)
  assert (step.images, step.calls) == (4, 1_050_000)
  parallel.trace(step.fn, step.arguments, 8)
  [samples] = device_programs.of(config, 'sample', 8)
  parallel.trace(samples.fn, samples.arguments, 8)


def test_a_set_of_a_generator_without_classes_needs_a_labeller():
  with pytest.raises(UserError, match='generator without classes'):
    checks.check(make_config(labeller='condition'))


@pytest.mark.slow
def test_two_processes_do_all_that_one_does(labeller, pod, tmp_path):
  """Fit, evaluation and samples, bit for bit, by two devices in one and in two."""
  args = [
    '--config=experiments/digits_vdvae.py',
    f'--config.labeller={labeller}',
    *(f'--config.{name}={value}' for name, value in TINY.items()),
  ]
  for count in (1, 2):
    workdir = f'--workdir={tmp_path}/{count}'
    codes, texts = ends(
      pod(count, 'generate', workdir, *args, devices=2 // count, **FAST)
    )
    assert codes == [0] * count, texts
  one, two = (tmp_path / count for count in '12')
  jax.tree.map(
    np.testing.assert_array_equal, restore(one).variables, restore(two).variables
  )
  assert fits.sha256(one / 'samples') == fits.sha256(two / 'samples')
  bits = lambda folder: [
    x['bits_per_dim'] for x in json.loads((folder / 'results.json').read_text())
  ]
  assert len(bits(one)) == 2 and bits(one) == bits(two)
