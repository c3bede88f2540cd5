"""What all generators share: files, pictures, and one from outside the package."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from etils import epath
from ml_collections import config_dict
from tensorboard.backend.event_processing import event_accumulator

from jaxrobust import generate
from jaxrobust.config import dataset_info, experiments, registries
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError, UserError
from jaxrobust.files import arrays
from jaxrobust.generators import checks, generator, trained
from jaxrobust.generators import recipe as recipes
from jaxrobust.planning import device_programs
from jaxrobust.runs import checkpoints
from jaxrobust.samples import sample_sets
from tests.helpers import fits, labellers, tiny_gan
from tests.helpers.mutations import mutations
from tests.helpers.programs import ROOT

pytestmark = pytest.mark.usefixtures('compiled_once')
INFO = dataset_info.INFO['digits']


def fit(folder, **fields):
  config = tiny_gan.make_config(**fields)
  generate.main(config, folder, stage='fit')
  return config


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
  """The workdir of an uninterrupted fit of 6 iterations."""
  folder = tmp_path_factory.mktemp('fitted')
  fit(folder)
  return folder


def test_its_own_metrics_and_learning_rates_are_written(fitted):
  lines = fits.lines_of(fitted)
  assert [x['step'] for x in lines] == [1, 2, 3, 4, 5, 6]
  always = {'step', 'train/discriminator_loss', 'train/discriminator_loss_skipped'}
  always |= {'train/generator_loss', 'train/real_sign'}
  always |= {f'train/learning_rate_{x}' for x in ('generator', 'discriminator')}
  for line in lines:
    seldom = {'train/penalty'} if line['step'] in (1, 4) else set()
    assert set(line) == always | seldom
  assert lines[0]['train/learning_rate_generator'] == 2e-3
  assert lines[0]['train/learning_rate_discriminator'] == 1e-3


def draws(*shape, value=0.0):
  """A generator whose draws have such a shape and are all one value."""

  class Flat(generator.Generator):
    conditional = classmethod(lambda cls, settings: False)

    @classmethod
    def make_draw(cls, settings, info):
      return lambda v, rngs, classes: jnp.full((len(rngs), *shape), value)

  return Flat({}, config_dict.ConfigDict(), INFO)


def test_draws_of_another_shape_are_refused_before_anything_is_written():
  with pytest.raises(UserError, match=r'Flat draws \[3, 64\], .* are \[3, 8, 8, 1\]'):
    draws(64).sample(jax.random.key(0), np.arange(3), 3)


def test_draws_of_nan_are_pointed_out(caplog):
  draws(8, 8, 1, value=np.nan).sample(jax.random.key(0), np.arange(3), 3)
  assert 'Flat drew 3 images whose pixels are all 0' in caplog.text


def test_pictures_show_what_is_learned(fitted):
  """At each checkpoint: the first samples of the seed, as the set will have them."""
  pictures = sorted((fitted / 'figures').iterdir())
  assert [x.name for x in pictures] == ['samples-00000004.png', 'samples-00000006.png']
  shown = np.asarray(PIL.Image.open(pictures[-1]))
  config = tiny_gan.make_config()
  restored = tiny_gan.TinyGAN.restore(
    epath.Path(fitted) / 'generator.npz', config.generator, INFO
  )
  images, classes = restored.sample(jax.random.key(0), np.arange(100), 25)
  assert (classes == -1).all() and len(np.unique(images, axis=0)) == 100
  # Ten in a row, each enlarged four times, 2 pixels between them.
  found = shown[2:, 2:, 0].reshape(10, 34, 10, 34).swapaxes(1, 2)[..., :32:4, :32:4]
  np.testing.assert_array_equal(found.reshape(100, 8, 8), images[..., 0])
  events = event_accumulator.EventAccumulator(str(fitted), {'images': 0})
  events.Reload()
  assert [x.step for x in events.Images('samples')] == [4, 6]
  assert events.Images('samples')[-1].encoded_image_string == pictures[-1].read_bytes()


class Constant(generator.Generator):
  """Class k has one grey level."""

  @classmethod
  def conditional(cls, settings):
    return settings.conditional

  @classmethod
  def make_draw(cls, settings, info):
    levels = lambda levels, rngs, classes: levels[classes].reshape(-1, 1, 1, 1)
    return lambda *given: jnp.broadcast_to(levels(*given), (2, *info.image_shape))


def test_samples_are_clipped_and_rounded_to_the_nearest_level():
  levels = np.float32([-5, 0.4, 0.6, 1.5, 99.5, 200.2, 254.4, 254.6, 300, 7])
  settings = config_dict.ConfigDict({'conditional': True})
  sample = Constant(levels, settings, INFO).sample
  images, classes = sample(jax.random.key(0), np.arange(10, 21), 2)
  assert classes.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
  assert images.shape == (11, 8, 8, 1) and images.dtype == np.uint8
  # Halves go to the even neighbour.
  wanted = [0, 0, 1, 2, 100, 200, 254, 255, 255, 7, 0]
  assert images[:, 0, 0, 0].tolist() == images[:, -1, -1, 0].tolist() == wanted
  # Without classes each is -1, here the last level.
  settings.conditional = False
  images, classes = Constant(levels, settings, INFO).sample(
    jax.random.key(0), np.arange(3), 2
  )
  assert classes.tolist() == [-1] * 3 and images[:, 0, 0, 0].tolist() == [7] * 3


@pytest.mark.parametrize('stop', [1, 4, 5])
def test_a_fit_that_is_stopped_ends_the_same(fitted, tmp_path, monkeypatch, stop):
  """Also before an iteration in which the phase that comes seldom does."""
  with monkeypatch.context() as patch, pytest.raises(PreemptedError):
    answers = iter([False] * (stop - 1) + [True])
    patch.setattr(parallel.Preemption, 'reached', lambda self: next(answers))
    fit(tmp_path)
  fit(tmp_path)
  fits.assert_same_fit(tmp_path, fitted)


@pytest.mark.parametrize('count', [1, 2])
def test_devices_change_no_number(fitted, use_devices, count):
  """The losses of four devices by one and by two."""
  use_devices(count)
  config = tiny_gan.make_config()
  recipe = tiny_gan.TinyGAN.recipe(config.generator, INFO)
  state = parallel.replicate(recipes.init_state(recipe, config.seed))
  step = recipes.make_step(recipe, config.seed, 0)
  batches = trained_batches(config)
  for batch, expected in zip(batches, fits.lines_of(fitted), strict=True):
    state, metrics = step(state, parallel.shard(batch))
    for name, values in parallel.unreplicate(metrics).items():
      # Means over 16 images, in another order.
      assert np.mean(values) == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def trained_batches(config):
  real = datasets.load('digits', 'train', train_images=100, validation_images=400)
  return trained._batches(real, INFO, config.generator.training, config.seed, 0)


@pytest.fixture(scope='module')
def judged(tmp_path_factory):
  """The config and the workdir of a fit that is judged in every second iteration."""
  folder = tmp_path_factory.mktemp('judged')
  fields = {'evaluation_interval_steps': 2, 'early_stopping': True}
  config = fit(folder, **{f'generator.training.{k}': v for k, v in fields.items()})
  return config, folder


def errors_of(folder):
  lines = fits.lines_of(folder)
  return {
    x['step']: x['validation/brightness_error']
    for x in lines
    if 'validation/brightness_error' in x
  }


def test_the_best_of_the_evaluations_is_taken(judged, fitted):
  """Which change nothing else: the last state is that of a fit without them."""
  config, folder = judged
  errors = errors_of(folder)
  assert list(errors) == [2, 4, 6]
  best = max(errors, key=errors.get)
  assert best != 6  # Or the test would not see it taken.
  saved = checkpoints.read_step(epath.Path(folder), best)
  recipe = tiny_gan.TinyGAN.recipe(config.generator, INFO)
  expected = recipe.variables_fn(saved['averaged'], saved['net_state'])
  found = tiny_gan.TinyGAN.restore(
    epath.Path(folder) / 'generator.npz', config.generator, INFO
  )
  for a, b in zip(*map(jax.tree.leaves, (found.variables, expected)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert [x for x in fits.lines_of(folder) if 'train/penalty' in x] == [
    x for x in fits.lines_of(fitted) if 'train/penalty' in x
  ]
  # The images of the split's name, and the samples of that step.
  test = datasets.load('digits', 'test').images.mean()
  images, _ = found.sample(jax.random.key(0), np.arange(8), 2)
  line = next(x for x in fits.lines_of(folder) if x['step'] == best and len(x) == 3)
  assert line['test/brightness_error'] == pytest.approx(abs(images.mean() - test))


def test_stopped_before_an_evaluation_it_ends_the_same(judged, tmp_path, monkeypatch):
  config, folder = judged
  with monkeypatch.context() as patch, pytest.raises(PreemptedError):
    answers = iter([False] * 2 + [True])
    patch.setattr(parallel.Preemption, 'reached', lambda self: next(answers))
    generate.main(config, tmp_path, stage='fit')
  generate.main(config, tmp_path, stage='fit')
  fits.assert_same_fit(tmp_path, folder)


def test_early_stopping_needs_validation_images():
  with pytest.raises(UserError, match='early_stopping = True .*validation_images = 0'):
    checks.check(
      tiny_gan.make_config(
        **{
          'generator.training.early_stopping': True,
          'dataset.validation_images': 0,
        }
      )
    )


def test_updates_are_skipped_where_the_generator_says_so(fitted, tmp_path):
  fit(tmp_path, **{'generator.training.skip': 0.0})
  assert all(
    x['train/discriminator_loss_skipped'] == 1 for x in fits.lines_of(tmp_path)
  )
  assert not any(x['train/discriminator_loss_skipped'] for x in fits.lines_of(fitted))


def test_it_learns(tmp_path):
  """The mean of its samples comes nearer to that of the images."""
  fields = {
    'generator.training.num_steps': 150,
    'generator.training.checkpoint_interval_steps': 150,
    'generator.training.log_interval_steps': 50,
  }
  config = fit(tmp_path, **fields)
  recipe = tiny_gan.TinyGAN.recipe(config.generator, INFO)
  fresh = recipes.init_state(recipe, 0)
  fresh = recipe.variables_fn(fresh.averaged, fresh.net_state)
  after = tiny_gan.TinyGAN.restore(
    epath.Path(tmp_path) / 'generator.npz', config.generator, INFO
  )
  mean = np.concatenate([x.images for x in trained_batches(config)][:4]).mean(0)
  errors = [
    np.abs(x.sample(jax.random.key(0), np.arange(400), 100)[0].mean(0) - mean).mean()
    for x in (after.having(fresh), after)
  ]
  assert errors[1] < 0.7 * errors[0]


def test_one_file_adds_a_generator(tmp_path):
  """That of the documentation: its class, its settings, and an experiment."""
  config = experiments.load(str(ROOT / 'docs/extending/my_generator.py')).unlock()
  (tmp_path / 'labeller').mkdir()
  config.labeller = labellers.write(tmp_path / 'labeller')
  config.samples.update(count=60, batch_size=8, selection='none')
  config.generator.scale = 0.05
  generate.main(config.lock(), tmp_path / 'run')
  images = sample_sets.SampleSet.open(tmp_path / 'run/samples').gather(np.arange(60))
  real = datasets.load('digits', 'train', train_images=100, validation_images=400)
  away = (np.float32(images)[:, None] - real.images[None]).reshape(60, 100, -1)
  # Of 64 pixels, half of which are black: clipped noise of 0.05 * 255 at the others.
  assert (np.abs(away).mean(-1).min(1) < 13).all() and away.any(-1).all()
  config.unlock().generator.scale = -1.0
  with pytest.raises(UserError, match='generator.scale = -1.0: use a number above 0'):
    checks.check(config)


def test_a_generator_from_outside_goes_all_the_way(fitted, tmp_path):
  (tmp_path / 'labeller').mkdir()
  labeller = labellers.write(tmp_path / 'labeller')
  assert registries.GENERATORS.get('tiny-gan') is tiny_gan.TinyGAN
  config = tiny_gan.make_config(labeller=labeller, fitted=str(fitted))
  generate.main(config, tmp_path / 'run')
  found = sample_sets.SampleSet.open(tmp_path / 'run/samples')
  assert len(found) == 20 and found.metadata['generator']['name'] == 'tiny-gan'
  with pytest.raises(UserError, match='generator without classes'):
    checks.check(tiny_gan.make_config(labeller='condition'))


def test_a_plan_has_each_program_as_often_as_it_runs():
  config = tiny_gan.make_config(**{'generator.training.num_steps': 7})
  found = device_programs.of(config, 'train', 4)
  # Images of a device: 16 / 4, of which the discriminator sees a half twice.
  assert [(x.name, x.images, x.calls) for x in found] == [
    ('discriminator by discriminator_loss', 2, 14),
    ('generator by generator_loss', 2, 7),
    ('discriminator by penalty', 4, 3),
    ('end of iteration', 4, 7),
  ]
  for program in found:
    parallel.trace(program.fn, program.arguments, 4)
  [samples] = device_programs.of(config, 'sample', 4)
  assert (samples.images, samples.calls) == (4, 2)
  parallel.trace(samples.fn, samples.arguments, 4)


def test_devices_must_share_the_parts():
  config = tiny_gan.make_config(**{'generator.training.batch_size': 12})
  with pytest.raises(
    UserError, match='batch of 12 .* over 4 devices, in 2 parts .* of 8'
  ):
    tiny_gan.TinyGAN.check_devices(config.generator, INFO, 4)


@contextlib.contextmanager
def one_line(path):
  """Whatever is raised is a UserError of one line that names the file."""
  try:
    yield
  except UserError as e:
    assert str(path) in str(e) and '\n' not in str(e)


def test_damaged_files_are_refused_in_one_line(fitted, tmp_path):
  content = (fitted / 'generator.npz').read_bytes()
  config, path = tiny_gan.make_config(), epath.Path(tmp_path) / 'generator.npz'
  read = lambda: tiny_gan.TinyGAN.restore(path, config.generator, INFO)
  good = 0
  for damaged in [*mutations(content, 300, seed=5), b'', b'junk', content[:-1]]:
    path.write_bytes(damaged)
    with one_line(path):
      read()
      good += 1
  assert good < 100  # Dates and comments may be anything.


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda x: x.pop('features'), 'lacks features'),
    (lambda x: x.update(features=np.zeros(16, int)), 'floats of 1 axis are expected'),
    (
      lambda x: x.update(features=np.zeros(17, np.float32)),
      r'features has shape \[17\], .* \[16\]',
    ),
    (
      lambda x: x.update(settings=np.array('{"name": "gaussian"}')),
      'name: gaussian → tiny-gan',
    ),
    (lambda x: x.update(settings=np.array('[' * 500 + ']' * 500)), 'too deeply'),
    (lambda x: x.update(settings=np.array('{"a": [1]}')), 'absent'),
    (lambda x: x.update(settings=np.array('junk')), 'not JSON'),
  ],
  ids=range(7),
)
def test_files_of_something_else_are_refused(fitted, tmp_path, change, words):
  path = epath.Path(tmp_path) / 'generator.npz'
  with np.load(fitted / 'generator.npz') as file:
    found = dict(file)
  change(found)
  path.write_bytes(arrays.npz_bytes(**found))
  with pytest.raises(UserError, match=words) as e:
    tiny_gan.TinyGAN.restore(path, tiny_gan.make_config().generator, INFO)
  assert str(path) in str(e.value) and '\n' not in str(e.value)


def test_training_and_sampling_may_differ_from_the_fit(fitted):
  path = epath.Path(fitted) / 'generator.npz'
  settings = tiny_gan.make_config(
    **{'generator.training.skip': 1.0, 'generator.sampling.shift': 0.5}
  ).generator
  tiny_gan.TinyGAN.restore(path, settings, INFO)
