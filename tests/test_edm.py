"""EDM as a generator: its fit, its samples, and weights that others published."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import digits_ddpm, digits_edm
from jaxrobust import convert, generate
from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError, UserError
from jaxrobust.generators import checks, ddpm, edm, trained
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators.edm import augmentation
from jaxrobust.planning import device_programs
from jaxrobust.runs import cli
from jaxrobust.samples import sample_sets
from jaxrobust.training import optimizer
from tests.helpers import fits, nvidia_files
from tests.helpers.programs import FAST, ends

pytestmark = pytest.mark.usefixtures('compiled_once')
INFO = dataset_info.INFO['digits']
# A network that compiles in seconds, in the experiment's place.
TINY = {
  'generator.network.channels': 4,
  'generator.network.multipliers': (1,),
  'generator.network.attention_sizes': (),
  'generator.training.num_steps': 4,
  'generator.training.batch_size': 8,
  'generator.training.warmup_images': 0,
  'generator.training.augmentation': 0.5,
  'generator.training.condition_dropout': 0.1,
  'generator.training.log_interval_steps': 1,
  'generator.training.checkpoint_interval_steps': 3,
  'generator.sampling.sampler': 'heun',
  'generator.sampling.num_steps': 3,
  'generator.sampling.guidance': 0.5,
  'generator.sampling.churn': 1.0,
  'labeller': 'condition',
  'samples.count': 20,
  'samples.draw_size': 8,
  'samples.batch_size': 2,
  'samples.shard_size': 16,
  'samples.selection': 'none',
}


def make_config(**fields):
  """The digits' config, TINY and with these fields."""
  config = digits_edm.get_config().unlock()
  config.update_from_flattened_dict({**TINY, **fields})
  return config.lock()


def flags(**fields):
  """The same as a command line."""
  values = {**TINY, **fields}
  config = ['--config=experiments/digits_edm.py']
  return [*config, *(f'--config.{name}={value}' for name, value in values.items())]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The workdir of an uninterrupted run of the program."""
  folder = tmp_path_factory.mktemp('finished')
  generate.main(make_config(), folder)
  return folder


def test_the_program_writes_what_it_says(finished):
  lines = [json.loads(x) for x in (finished / 'metrics.jsonl').read_text().splitlines()]
  assert [x['step'] for x in lines] == [1, 2, 3, 4]
  assert [x['train/learning_rate'] for x in lines] == pytest.approx([2e-3] * 4)
  metadata = json.loads((finished / 'samples/metadata.json').read_text())
  assert metadata['generator']['name'] == 'edm'
  found = sample_sets.SampleSet.open(finished / 'samples')
  np.testing.assert_array_equal(found.gather_labels(slice(None)), np.arange(20) % 10)
  images = found.gather(np.arange(20))
  assert images.shape == (20, 8, 8, 1)
  assert images.std() > 10 and len(np.unique(images, axis=0)) == 20
  assert (finished / 'figures/samples-00000004.png').exists()


def test_the_first_loss_is_that_of_a_network_of_zeros(finished):
  """In float64, by the numbers that the step drew."""
  training = make_config().generator.training
  batch = next(iter(trained._batches(real(), INFO, training, 0, 0)))
  root = jax.random.fold_in(jax.random.key(0), 2**32 - 1)

  def rngs(name):
    names = ('init', 'augment', 'sigma', 'noise', 'condition', 'dropout')
    stream = jax.random.fold_in(root, names.index(name))
    return parallel.key_per_slot(jax.random.fold_in(stream, 0), batch.slots)

  images = jnp.float32(batch.images) / 127.5 - 1
  y, _ = augmentation.augment(images, rngs('augment'), probability=0.5, flip=False)
  draws = np.float64(jax.vmap(jax.random.normal)(rngs('sigma')))
  sigmas = np.exp(-1.2 + 1.2 * draws)[:, None, None, None]
  noise = jax.vmap(lambda rng: jax.random.normal(rng, (8, 8, 1)))(rngs('noise'))
  skip = 0.25 / (sigmas**2 + 0.25)
  errors = (skip * (np.float64(y) + sigmas * np.float64(noise)) - np.float64(y)) ** 2
  expected = ((sigmas**2 + 0.25) / (0.5 * sigmas) ** 2 * errors).mean()
  line = json.loads((finished / 'metrics.jsonl').read_text().splitlines()[0])
  # The last layer starts at 1e-5 of what it could be, and weights are up to 10^4.
  assert line['train/loss'] == pytest.approx(expected, rel=1e-3)


def real():
  return datasets.load('digits', 'train', train_images=100, validation_images=400)


def test_a_fit_that_is_stopped_ends_the_same(finished, tmp_path, monkeypatch):
  run = lambda: generate.main(make_config(), tmp_path)
  with monkeypatch.context() as patch, pytest.raises(PreemptedError):
    answers = iter((False, True))
    patch.setattr(parallel.Preemption, 'reached', lambda self: next(answers))
    run()
  assert not (tmp_path / 'generator.npz').exists()
  run()
  fits.assert_same_fit(tmp_path, finished)
  assert fits.sha256(tmp_path / 'samples') == fits.sha256(finished / 'samples')


def test_devices_change_no_number(finished, use_devices):
  """The losses of four devices by one, with augmentation and dropout."""
  use_devices(1)
  config = make_config()
  recipe = edm.EDM.recipe(config.generator, INFO)
  state = parallel.replicate(recipes.init_state(recipe, config.seed))
  step = recipes.make_step(recipe, config.seed, 0)
  lines = [json.loads(x) for x in (finished / 'metrics.jsonl').read_text().splitlines()]
  batches = trained._batches(real(), INFO, config.generator.training, 0, 0)
  for batch, expected in zip(batches, lines, strict=True):
    state, metrics = step(state, parallel.shard(batch))
    [loss] = parallel.unreplicate(metrics)['train/loss']
    # Means over 8 images, in another order, after updates by Adam.
    assert loss == pytest.approx(expected['train/loss'], rel=1e-3)


@pytest.mark.slow
def test_two_processes_do_all_that_one_does(pod, tmp_path):
  """Fit and samples, bit for bit, by two devices in one and in two."""
  for count in (1, 2):
    args = [f'--workdir={tmp_path}/{count}', *flags()]
    codes, texts = ends(pod(count, 'generate', *args, devices=2 // count, **FAST))
    assert codes == [0] * count, texts
  one, two = (tmp_path / count for count in '12')
  fits.assert_same_fit(one, two)
  assert fits.sha256(one / 'samples') == fits.sha256(two / 'samples')


def test_our_sampler_and_no_classes(finished, tmp_path):
  """Of the same fit, by another solver: other samples; a network without classes."""
  fields = {'generator.sampling.sampler': 'dpm-solver++', 'fitted': str(finished)}
  config = make_config(**fields, **{'generator.sampling.churn': 0.0})
  generate.main(config, tmp_path)
  assert fits.sha256(tmp_path / 'samples') != fits.sha256(finished / 'samples')
  settings = make_config(
    **{'generator.network.conditional': False, 'generator.sampling.guidance': 0.0}
  ).generator
  like = edm.EDM.variables_like(settings, INFO)
  assert 'unet/map_label' not in like and not edm.EDM.conditional(settings)
  images = jax.eval_shape(
    edm.EDM.make_draw(settings, INFO),
    *(like, jax.random.split(jax.random.key(0), 2), jnp.zeros(2, int)),
  )
  assert images.shape == (2, 8, 8, 1)


def test_plans():
  for name, count in (('train', 4), ('sample', 20 // 8 + 1)):
    [program] = device_programs.of(make_config(), name, 4)
    assert (program.images, program.calls) == (2, count)
    parallel.trace(program.fn, program.arguments, 4)


def test_the_optimizer_is_adam_with_warm_up_and_finite_gradients():
  """Kingma and Ba's algorithm 1, in float64."""
  training = make_config(**{'generator.training.warmup_images': 24}).generator.training
  adam, learning_rate_fn = edm.make_optimizer(training)
  params = {'w': jnp.array([1.0, -2.0])}
  state, expected = adam.init(params), np.array([1.0, -2.0])
  mean = square = np.zeros(2)
  for step, gradient in enumerate([[3.0, 4.0], [0.5, -0.1], [np.nan, np.inf], [1, 1]]):
    updates, state = adam.update({'w': jnp.array(gradient)}, state, params)
    params = optax.apply_updates(params, updates)
    gradient = np.nan_to_num(gradient, nan=0.0, posinf=1e5)
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.999 * square + 0.001 * gradient**2
    rate = 2e-3 * min(step / 3, 1)  # 24 images are 3 updates of 8.
    assert float(learning_rate_fn(step)) == pytest.approx(rate)
    corrected = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
    expected = expected - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    np.testing.assert_allclose(params['w'], expected, rtol=1e-5)


@pytest.mark.parametrize(
  'images, decay',
  [(0, 0.0), (512, 9.5367e-7), (10**6, 0.9929273), (10**7, 0.99929049)],
)
def test_the_decay_of_the_average_by_the_reference(images, decay):
  found = optimizer.halflife_decay(
    images / 512, batch_size=512, halflife=500_000, ramp=0.05
  )
  assert float(found) == pytest.approx(decay, rel=1e-4, abs=1e-12)


def released_file(path, seed=0, **fields):
  """A file as NVIDIA releases a network, of a config; its arrays, by our names."""
  like = edm.EDM.variables_like(make_config(**fields).generator, INFO)
  rng, network, ours = np.random.default_rng(seed), {}, {}
  for module, parts in like.items():
    for name, shape in parts.items():
      array = np.float32(rng.normal(size=shape.shape))
      ours[f'{module}/{name}'] = array
      _, *layers = module.split('/')
      if layers[0].startswith(('enc_', 'dec_')):
        layers[0] = layers[0].replace('_', '.', 1)
      weight = {'w': 'weight', 'b': 'bias', 'scale': 'weight', 'offset': 'bias'}[name]
      if layers[-1] == 'qkv':  # A channel's q, k and v stand together there.
        array = array.reshape(-1, 3, array.shape[-1] // 3).swapaxes(1, 2)
        array = array.reshape(*shape.shape)
      if name == 'w':
        array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
        if layers[-1] in ('skip', 'qkv', 'proj'):
          array = array[:, :, None, None]
      network['.'.join(['model', *layers, weight])] = array
  path.write_bytes(nvidia_files.dump({'ema': network}, ('model.enc', 'model.dec')))
  return ours


@pytest.fixture
def run(capsys):
  """Runs `convert` in this process: (exit code, stdout, stderr)."""

  def call(source, target, **fields):
    args = [f'--from={source}', f'--to={target}', *flags(**fields)]
    code = cli._run(convert.PROGRAM, args)
    return code, *capsys.readouterr()

  return call


def test_released_weights_are_sampled(run, finished, tmp_path):
  """Every parameter to the bit, and a folder that generate takes as it is."""
  source, folder = tmp_path / 'edm.pkl', tmp_path / 'edm'
  ours = released_file(source)
  code, out, err = run(source, folder / 'generator.npz')
  assert code == 0, err
  assert hashlib.sha256(source.read_bytes()).hexdigest() in out
  assert 'CC BY-NC-SA 4.0' in out and str(folder / 'generator.npz') in out
  with np.load(folder / 'generator.npz') as found:
    assert set(found.files) == {*ours, 'settings'}
    for name, array in ours.items():
      assert found[name].tobytes() == array.tobytes(), name
  generate.main(make_config(fitted=str(folder)), tmp_path / 'samples')
  generate.main(make_config(), folder)
  assert fits.sha256(tmp_path / 'samples/samples') == fits.sha256(folder / 'samples')
  code, _, err = run(source, folder / 'generator.npz')
  assert code == 1 and 'exists' in err


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'generator.network.channels': 8}, 'unet/.* has shape'),
    ({'generator.network.num_blocks': 2}, 'of another network .* only the network of'),
    ({'generator.network.conditional': False}, 'only the file has unet/map_label'),
    ({'generator.network.architecture': 'ncsn++'}, 'has unet/frequencies|has shape'),
  ],
  ids=str,
)
def test_released_weights_of_another_network(run, tmp_path, fields, words):
  source, folder = tmp_path / 'edm.pkl', tmp_path / 'edm'
  released_file(source)
  fields = {**fields, 'generator.sampling.guidance': 0.0, 'labeller': ''}
  code, _, err = run(source, folder / 'generator.npz', **fields)
  assert code == 1 and len(err.splitlines()) == 1 and str(source) in err
  assert not folder.exists()
  with pytest.raises(UserError, match=words):
    raise UserError(err)


def test_a_hostile_file_writes_nothing(run, tmp_path):
  source, folder = tmp_path / 'edm.pkl', tmp_path / 'edm'
  source.write_bytes(
    nvidia_files.named('os', 'system') + nvidia_files.value('true') + b'\x85R.'
  )
  code, _, err = run(source, folder / 'generator.npz')
  assert code == 1 and 'wants to run os.system' in err and str(source) in err
  assert not folder.exists()


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'generator.network.multipliers': (1,) * 5}, 'halve images 4 times'),
    ({'generator.network.channels': 6}, 'channels = 6: use a multiple of 4'),
    ({'generator.network.attention_sizes': (4,)}, r'\(4,\): the maps have heights 8;'),
    ({'generator.network.architecture': 'adm'}, "'adm': use one of ddpm"),
    ({'generator.network.conditional': False}, 'network without classes'),
    ({'generator.training.condition_dropout': 0.0}, 'never learns to do without'),
    ({'generator.training.augmentation': 1.5}, 'augmentation = 1.5: use a number from'),
    ({'generator.sampling.sampler': 'ddim'}, "'ddim': use one of heun"),
    ({'generator.sampling.sampler': 'dpm-solver++'}, 'churn = 1.0 for the sampler'),
    ({'generator.sampling.num_steps': 1}, 'num_steps = 1: use 2 or more'),
    ({'generator.sampling.least_sigma': 90.0}, 'use less than greatest_sigma = 80.0'),
  ],
  ids=str,
)
def test_refusals(fields, words):
  with pytest.raises(UserError, match=words):
    checks.check(make_config(**fields))


def test_ddpm_takes_the_same_solver():
  config = digits_ddpm.get_config().unlock()
  config.labeller, config.generator.sampling.sampler = 'condition', 'heun'
  config.generator.network.conditional = True
  checks.check(config)
  info, settings = INFO, config.generator
  like = ddpm.DDPM.variables_like(settings, info)
  rngs = jax.random.split(jax.random.key(0), 2)
  images = jax.eval_shape(
    ddpm.DDPM.make_draw(settings, info), like, rngs, jnp.zeros(2, int)
  )
  assert images.shape == (2, 8, 8, 1)
  config.generator.sampling.num_steps = 1
  with pytest.raises(UserError, match='num_steps = 1: heun takes 2 or more'):
    checks.check(config)
