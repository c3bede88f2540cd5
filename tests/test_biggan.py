"""BigGAN: its networks by the reference's numbers, its losses by closed forms."""

import math
import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments import digits_biggan
from jaxrobust import generate
from jaxrobust.config import dataset_info, generator
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.generators import adversarial, biggan, checks, fid, released
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators.biggan import BigGAN, layers, training
from jaxrobust.planning import device_programs
from jaxrobust.runs import checkpoints
from tests.helpers import fits, ring, torch_archives
from tests.helpers.mutations import mutations
from tests.helpers.programs import ROOT

pytestmark = pytest.mark.usefixtures('compiled_once')
INFO = dataset_info.INFO['digits']

# Everything that the networks and the losses have, on 8x8 images.
TINY = {
  'generator.network.channels': 8,
  'generator.network.multipliers': (1, 1),
  'generator.network.discriminator_multipliers': (1, 1),
  'generator.network.attention_sizes': (8,),
  'generator.network.latent_size': 6,
  'generator.network.shared_size': 3,
  'generator.network.hierarchical': True,
  'generator.training.num_steps': 4,
  'generator.training.batch_size': 32,
  'generator.training.discriminator_steps': 2,
  'generator.training.batch_norm_group': 8,
  'generator.training.generator_learning_rate': 1e-4,
  'generator.training.discriminator_learning_rate': 1e-4,
  'generator.training.standing_batches': 3,
  'generator.training.orthogonal_weight': 1e-4,
  'generator.training.ema_decay': 0.9,
  'generator.training.ema_start_steps': 2,
  'generator.training.flip': True,
  'generator.training.augmentation.kind': 'diff-augment',
  'generator.training.fid.interval_steps': 4,
  'generator.training.fid.samples': 40,
  'generator.training.log_interval_steps': 1,
  'generator.training.checkpoint_interval_steps': 2,
  'samples.count': 20,
  'samples.batch_size': 4,
}


def make_config(**fields):
  """The digits' config, TINY and with these fields."""
  config = digits_biggan.get_config().unlock()
  config.update_from_flattened_dict({**TINY, 'labeller': 'condition', **fields})
  return config.lock()


# The reference.


@pytest.fixture(scope='module')
def fixture():
  with np.load(ROOT / 'tests/fixtures/biggan.npz') as file:
    return dict(file)


REFERENCE = types.SimpleNamespace(num_classes=3, image_shape=(32, 32, 3))


def reference_settings():
  settings = generator.get_config('biggan').generator
  settings.network.update(channels=1, latent_size=6)
  settings.training.batch_norm_group = 4
  return settings


def read_released(folder, tensors, settings, info):
  path = epath.Path(folder) / 'G_ema.pth'
  path.write_bytes(torch_archives.archive(tensors))
  return BigGAN.read_released(path, settings, info)


def tensors_of(fixture, network):
  prefix = f'p/{network}.'
  return {k.removeprefix(prefix): x for k, x in fixture.items() if k.startswith(prefix)}


def discriminator_of(fixture):
  """(parameters, state) of the reference's D as ours."""
  params, state = {}, {}
  for name, x in tensors_of(fixture, 'D').items():
    place, _, leaf = name.rpartition('.')
    module = place.replace('blocks.', 'block').replace('.0.', '_')
    if leaf == 'u0':
      state[module] = {'u': x[0]}
    elif leaf == 'bias':
      params.setdefault(module, {})['b'] = x
    elif leaf == 'weight':
      axes = (2, 3, 1, 0) if x.ndim == 4 else (0, 1) if place == 'embed' else (1, 0)
      key = 'table' if place == 'embed' else 'w'
      params.setdefault(module, {})[key] = x.transpose(axes)
  return params, state


@pytest.mark.parametrize('dtype', [np.float64, np.float32])
def test_networks_are_those_of_the_reference(fixture, tmp_path, dtype):
  """Theirs are float32: 1e-5 where BatchNorm of four images magnifies its rounding."""
  exact = dtype is np.float64

  def close(found, expected, tolerance=1e-6):
    tolerance = tolerance if exact else 1e-4
    assert found.dtype == dtype
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=atol)

  settings = reference_settings()
  functions = biggan._functions(settings, REFERENCE)
  read = read_released(tmp_path, tensors_of(fixture, 'G'), settings, REFERENCE)
  to_dtype = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
  images = lambda name: fixture[name].transpose(0, 2, 3, 1)
  classes = jnp.asarray(fixture['y'], jnp.int32)
  with jax.enable_x64(exact):
    found = to_dtype(read)
    given = found['params'], found['state'], to_dtype(fixture['z']), classes
    run = jax.jit(functions.image_fn, static_argnums=4)
    made, same = run(*given, None)
    close(made, images('image_eval'))
    jax.tree.map(np.testing.assert_array_equal, same, found['state'])
    made, moved = run(*given, 0.1)
    close(made, images('image_train'), 1e-5)
    for name in tensors_of(fixture, 'G'):
      if name.endswith(('u0', 'stored_mean', 'stored_var')):
        place, _, leaf = name.rpartition('.')
        module = place.replace('blocks.', 'block').replace('.0.', '_')
        module = {'output_layer.0': 'output_bn', 'output_layer.2': 'output_conv'}.get(
          module, module
        )
        expected = fixture[f'after/G.{name}']
        if module == 'linear':  # (channel, row, column)
          expected = expected.reshape(4, 16).T.reshape(1, -1)
        key = {'u0': 'u', 'stored_mean': 'mean', 'stored_var': 'var'}[leaf]
        close(moved[module][key], expected.reshape(-1))
    params, state = map(to_dtype, discriminator_of(fixture))
    given = params, state, to_dtype(images('x')), classes
    for moves in (False, True):
      logits, after = jax.jit(functions.logit_fn, static_argnums=4)(*given, moves)
      close(logits, fixture['logits_eval'][:, 0])
      change = np.abs(after['embed']['u'] - state['embed']['u']).max()
      assert (change > 0.01) == moves


@pytest.mark.parametrize(
  'dataset, fields, counts',
  [
    ('cifar10', {}, (4_304_387, 4_207_361)),
    ('cifar100', {}, (4_580_867, 4_230_401)),
    ('cifar10', {'shared_size': 128}, (4_668_163, 4_207_361)),
    ('cifar10', {'shared_size': 128, 'hierarchical': True}, (4_373_251, 4_207_361)),
  ],
  ids=str,
)
def test_numbers_of_parameters(dataset, fields, counts):
  settings = generator.get_config('biggan', dataset).generator
  settings.network.update(fields)
  recipe = BigGAN.recipe(settings, dataset_info.INFO[dataset])
  params, _ = jax.eval_shape(recipe.init_fn, jax.random.key(0))
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  assert (count(params['generator']), count(params['discriminator'])) == counts


# Layers, by numbers of the reference and by closed forms.


def test_power_iteration():
  """The reference's W is [out, in]."""
  matrix, u = jnp.array([[3.0, 0], [4, 5]]).T, jnp.array([1.0, 0])
  values, us = [], []
  for _ in range(5):
    value, u = layers.spectral_norm(matrix, u, 1e-8)
    values.append(value)
    us.append(u)
  expected = [5, 6.6717460, 6.7077496, 6.7081983, 6.7082039]
  np.testing.assert_allclose(values, expected, rtol=1e-6)
  np.testing.assert_allclose(us[:2], [[0.6, 0.8], [0.3511234, 0.9363292]], rtol=1e-6)


def test_weights_have_a_spectral_norm_of_one(float64):
  matrix = np.random.RandomState(0).standard_normal((7, 5))
  u = jnp.ones(5)
  for _ in range(200):
    value, u = layers.spectral_norm(jnp.asarray(matrix), u, 1e-8)
  assert float(value) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-6)
  # The gradient flows to the matrix only, whatever the vectors are by then.
  matrix, u = jnp.asarray(matrix), jnp.ones(5)
  gradient = jax.grad(lambda x: layers.spectral_norm(x, u, 1e-8)[0])(matrix)
  v = matrix @ u / jnp.linalg.norm(matrix @ u)
  u = v @ matrix / jnp.linalg.norm(v @ matrix)
  np.testing.assert_allclose(gradient, jnp.outer(v, u), atol=1e-12)


def mode_of(**fields):
  fields = {'epsilon': 1e-8, 'moves': True, 'momentum': 0.1, 'group': 4, **fields}
  return layers.Mode(init=hk.initializers.RandomNormal(), **fields)


def run(layer_fn, *inputs, state=None):
  """(outputs, state) of a layer in a mode, from its first state where none is given."""
  layer = hk.without_apply_rng(hk.transform_with_state(layer_fn))
  params, fresh = layer.init(jax.random.key(0), *inputs)
  return layer.apply(params, fresh if state is None else state, *inputs)


def test_a_linear_discriminator_is_lipschitz():
  points = jnp.asarray(np.random.RandomState(0).standard_normal((50, 6)), jnp.float32)
  linear = lambda x: layers.Linear(3, mode_of(), name='linear')(x)
  state = None
  for _ in range(50):
    outputs, state = run(linear, points, state=state)
  distances = lambda x: np.linalg.norm(x[1:] - x[:-1], axis=-1)
  assert (distances(outputs) <= distances(points) * (1 + 1e-5)).all()
  assert (distances(outputs) / distances(points)).max() > 0.5


def batch_norm(mode):
  return lambda x, *given: layers.BatchNorm(mode, name='bn')(x, *given)


def test_batch_norm():
  x = jnp.array([1.0, 2, 3, 6]).reshape(4, 1, 1, 1)
  outputs, state = run(batch_norm(mode_of()), x)
  expected = [-1.0690434, -0.5345217, 0, 1.6035652]
  np.testing.assert_allclose(outputs.ravel(), expected, atol=1e-6)
  assert float(state['bn']['var'][0]) == pytest.approx(1.3666667)
  assert float(state['bn']['mean'][0]) == pytest.approx(0.3)
  # Groups are of neighbours, and the running statistics move by their mean.
  outputs, state = run(batch_norm(mode_of(group=2)), x)
  np.testing.assert_allclose(outputs.ravel(), [-1, 1, -1, 1], atol=1e-4)
  assert float(state['bn']['var'][0]) == pytest.approx(0.9 + 0.1 * (0.5 + 4.5) / 2)
  # Gain and bias may be those of each image.
  gain, bias = jnp.array([[1.0], [2], [1], [0]]), jnp.array([[0.0], [1], [0], [5]])
  outputs, _ = run(batch_norm(mode_of(group=2)), x, gain, bias)
  np.testing.assert_allclose(outputs.ravel(), [-1, 3, -1, 5], atol=1e-4)
  # By the running statistics, which stay, an image is by itself.
  outputs, same = run(batch_norm(mode_of(moves=False)), x, state=state)
  assert same == state
  mean, var = (float(state['bn'][name][0]) for name in ('mean', 'var'))
  expected = (x.ravel() - mean) / np.sqrt(var + 1e-5)
  np.testing.assert_allclose(outputs.ravel(), expected, rtol=1e-5)


def test_attention_by_hand():
  x = jnp.asarray(np.random.RandomState(0).standard_normal((2, 4, 4, 8)), jnp.float32)
  attention = lambda x: layers.Attention(mode_of(moves=False), name='a')(x)
  layer = hk.without_apply_rng(hk.transform_with_state(attention))
  params, state = jax.jit(layer.init)(jax.random.key(0), x)
  apply = jax.jit(layer.apply)
  np.testing.assert_array_equal(apply(params, state, x)[0], x)
  params['a']['gamma'] = jnp.float32(0.5)
  weights = {}
  for name in ('theta', 'phi', 'g', 'o'):
    matrix = np.asarray(params[f'a/{name}']['w'][0, 0])
    left = matrix @ np.asarray(state[f'a/{name}']['u'])
    right = left @ matrix
    value = np.linalg.norm(right) / np.linalg.norm(left)
    weights[name] = matrix / value
  expected = np.array(x)
  for index, image in enumerate(np.asarray(x)):
    greatest = lambda maps: maps.reshape(2, 2, 2, 2, -1).max((1, 3)).reshape(4, -1)
    keys, values = greatest(image @ weights['phi']), greatest(image @ weights['g'])
    for row in range(4):
      for column in range(4):
        scores = np.exp(keys @ (image[row, column] @ weights['theta']))
        found = (scores / scores.sum()) @ values @ weights['o']
        expected[index, row, column] += 0.5 * found
  np.testing.assert_allclose(apply(params, state, x)[0], expected, atol=1e-5)


# Losses, by closed forms.


def test_losses_by_hand():
  fake, real = jnp.array([-2, -0.5, 0.3]), jnp.array([2, 0.5, -0.3])
  parts = lambda loss: (loss.real(real), loss.fake(fake), loss.generator(fake))
  expected = {
    'hinge': (0.6, 0.6, 0.7333333),
    'non-saturating': (0.4851201, 0.4851201, 1.2184534),
  }
  for name, wanted in expected.items():
    found = parts(adversarial.LOSSES[name])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
  hinge = adversarial.LOSSES['hinge']
  np.testing.assert_allclose(
    [hinge.real(0 * real), hinge.fake(0 * real), hinge.generator(0 * real)], [1, 1, 0]
  )
  # What is told apart surely enough moves nothing.
  np.testing.assert_allclose(jax.grad(hinge.real)(real), [0, -1 / 3, -1 / 3])
  np.testing.assert_allclose(jax.grad(hinge.fake)(fake), [0, 1 / 3, 1 / 3])


def test_orthogonal_penalty():
  matrix = jnp.array([[1.0, 2], [3, 4]])
  assert training.orthogonal_penalty(matrix) == 242
  gradient = jax.grad(training.orthogonal_penalty)(matrix)
  np.testing.assert_allclose(gradient, [[132, 176], [44, 88]])
  # Kernels are by output, tables by class; the shared one and vectors are left out.
  rotated = jnp.array([[1.0, 1], [1, -1]])
  params = {
    'linear': {'w': matrix.T, 'b': jnp.ones(2)},
    'block0_bn1_gain': {'table': matrix},
    'block0_conv1': {'w': jnp.stack([rotated, rotated])[None]},
    'shared': {'table': matrix},
  }
  assert training._penalties(params) == 2 * 242


# A fit.


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
  """The workdir of an uninterrupted fit of 4 iterations."""
  folder = tmp_path_factory.mktemp('fitted')
  generate.main(make_config(), folder, stage='fit')
  return folder


def restored(folder, **fields):
  path, settings = epath.Path(folder) / 'generator.npz', make_config(**fields).generator
  return BigGAN.restore(path, settings, INFO)


def test_metrics_say_how_it_goes(fitted):
  *lines, judged = fits.lines_of(fitted)
  assert set(judged) == {'step', fid.METRIC} and judged['step'] == 4
  names = (
    *('generator_loss', 'discriminator_loss', 'real_loss', 'fake_loss'),
    *('generator_gradient_norm', 'discriminator_gradient_norm'),
    *('learning_rate_generator', 'learning_rate_discriminator'),
    *('real_logit', 'fake_logit', 'real_sign'),
  )
  for line in lines:
    assert set(line) == {'step', *(f'train/{name}' for name in names)}
    parts = line['train/real_loss'] + line['train/fake_loss']
    assert line['train/discriminator_loss'] == pytest.approx(parts, rel=1e-5)


def test_a_fit_that_is_stopped_ends_the_same(fitted, tmp_path, monkeypatch):
  """State of spectral norms, statistics and the average's late start included."""
  for count in (1, 2):  # Iterations until it is stopped: after the first and third.
    fits.stop(monkeypatch, make_config(), tmp_path, count)
  generate.main(make_config(), tmp_path, stage='fit')
  fits.assert_same_fit(tmp_path, fitted)


@pytest.mark.slow
def test_a_fit_that_is_killed_ends_the_same(fitted, compiled, tmp_path):
  """Killed after 3 iterations, it goes on from the second."""
  fields = {**TINY, 'labeller': 'condition'}
  fits.kill(tmp_path, compiled, 3, 'digits_biggan.py', fields)
  assert [x.name for x in (tmp_path / 'checkpoints').iterdir()] == ['2']
  generate.main(make_config(), tmp_path, stage='fit')
  fits.assert_same_fit(tmp_path, fitted)


def test_one_device_gives_the_numbers_of_four(fitted, use_devices):
  """Of which each has half of a group, here there are two groups."""
  use_devices(1)
  config = make_config()
  recipe = BigGAN.recipe(config.generator, INFO)
  found = fits.iterations(recipe, config.seed, fits.batches_of(config, INFO))
  for expected in fits.lines_of(fitted)[:-1]:
    state, metrics = next(found)
    for name, value in metrics.items():
      # Means over 16 images, in another order.
      assert value == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
  # Not the logs alone: what is averaged, with the state of norms and statistics. A step
  # of Adam is at most the rate, 1e-4, and by rounding's sign where a gradient is nil.
  of_four = checkpoints.read_step(epath.Path(fitted), 4)['averaged']
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
  jax.tree.map(close, state.averaged, of_four)


def test_the_average_starts_late():
  recipe = BigGAN.recipe(make_config().generator, INFO)
  decays = [float(recipe.phases[1].decay_fn(jnp.int32(step))) for step in range(3)]
  assert decays == pytest.approx([0, 0.9, 0.9])


def test_sample_i_depends_on_seed_and_i_only(fitted):
  rng = jax.random.key(7)
  found = restored(fitted)
  images, classes = found.sample(rng, np.arange(20), 4)
  np.testing.assert_array_equal(classes, np.arange(20) % 10)
  some, _ = found.sample(rng, np.array([13, 4, 19]), 4)
  np.testing.assert_array_equal(some, images[[13, 4, 19]])
  assert len(np.unique(images, axis=0)) == 20


def test_standing_statistics_are_means_over_batches():
  """Of batches that are all the same, since G gets the same numbers in each."""
  settings = make_config().generator
  functions = biggan._functions(settings, INFO)

  def image_fn(params, state, latents, classes, momentum):
    assert latents.shape == (16, 6) and classes.shape == (16,)
    latents = jnp.arange(96.0).reshape(16, 6) / 96
    return functions.image_fn(params, state, latents, 0 * classes, momentum)

  params, states = jax.jit(functions.init_fn)(jax.random.key(0))
  before = {'params': params['generator'], 'state': states['generator']}
  alike = functions._replace(image_fn=image_fn)
  found = training.make_standing(alike, settings.training)(before)
  _, moved = jax.jit(image_fn, static_argnums=4)(
    *before.values(), jnp.zeros((16, 6)), jnp.zeros(16, jnp.int32), 1.0
  )
  for module, leaves in found['state'].items():
    for name, x in leaves.items():
      wanted = before['state'] if name == 'u' else moved
      # Means of three equal numbers.
      np.testing.assert_allclose(x, wanted[module][name], rtol=1e-5, atol=1e-6)
  assert np.abs(found['state']['output_bn']['mean']).max() > 0.01
  settings = make_config(**{'generator.training.standing_batches': 0}).generator
  assert training.make_standing(functions, settings.training)(before) is before


def test_the_probability_adapts_where_the_augmentation_has_one():
  fields = {
    f'generator.training.augmentation.{k}': v
    for k, v in (
      ('kind', 'upright'),
      ('target', 0.6),
      ('ramp_images', 640),
      ('interval_steps', 2),
    )
  }
  recipe = lambda **more: BigGAN.recipe(
    make_config(**{**fields, **more}).generator, INFO
  )
  _, known = jax.eval_shape(recipe().init_fn, jax.random.key(0))
  known = known | {'augmentation': {'probability': 0.3, 'signs': 2.0, 'counted': 2.0}}
  after = lambda step: recipe().after_fn(recipes.State(None, known, None, None, step))[
    'augmentation'
  ]['probability']
  # Every second iteration, of 32 images, of 640 for 1.
  assert after(0) == 0.3 and float(after(1)) == pytest.approx(0.4)
  assert recipe(**{'generator.training.augmentation.target': 0.0}).after_fn is None
  assert recipe(**{'generator.training.augmentation.kind': 'none'}).after_fn is None


def test_truncation_bounds_latent_numbers(fitted, monkeypatch):
  """Seen by what a network makes of them that shows them."""
  shown = lambda params, state, latents, classes, momentum: (
    latents.reshape(-1, 1, 1, 6) / 4,
    state,
  )
  spy = lambda settings, info: types.SimpleNamespace(latent_size=6, image_fn=shown)
  monkeypatch.setattr(biggan, '_functions', spy)
  rngs = jax.random.split(jax.random.key(0), 200)
  for limit, least, most in ((0.0, 2.0, 6.0), (0.5, 0.45, 0.5)):
    settings = make_config(**{'generator.sampling.truncation': limit}).generator
    draw = BigGAN.make_draw(settings, INFO)
    images = draw({'params': None, 'state': None}, rngs, jnp.zeros(200, jnp.int32))
    assert least < 4 * float(jnp.abs(images / 127.5 - 1).max()) <= most + 1e-6


def test_a_plan_has_each_program_as_often_as_it_runs():
  config = make_config(**{'generator.training.num_steps': 7})
  found = device_programs.of(config, 'train', 4)
  # Images of a device: 32 / 4, of which each update sees a half.
  assert [(x.name, x.images, x.calls) for x in found] == [
    ('discriminator by discriminator_loss', 4, 14),
    ('generator by generator_loss, end of iteration', 4, 7),
  ]
  for program in found:
    parallel.trace(program.fn, program.arguments, 4)
  with pytest.raises(UserError, match='batch of 32 .* 32 devices, in 2 parts on each'):
    device_programs.of(config, 'train', 32)
  [samples] = device_programs.of(config, 'sample', 4)
  parallel.trace(samples.fn, samples.arguments, 4)


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'network.multipliers': (1, 1, 1, 1, 1)}, 'multipliers .* 8x8 pixels'),
    ({'network.multipliers': ()}, 'one multiplier at least'),
    ({'network.discriminator_halvings': 4}, 'discriminator_halvings = 4: images of'),
    ({'network.discriminator_halvings': 3}, r'discriminator_multipliers .* 3 at least'),
    ({'network.attention_sizes': (2,)}, r'attention_sizes = \(2,\): .* heights 4, 8'),
    ({'network.channels': 4}, 'channels = 4: .* multiple of 8'),
    ({'network.shared_size': 0}, 'hierarchical = True .*shared_size'),
    ({'network.latent_size': 7}, 'latent_size = 7 .* multiple of 2'),
    ({'training.batch_size': 24}, 'batch_size = 24 .* multiple of 16'),
    ({'training.augmentation.kind': 'all'}, "'all': use one of none, .*diff-augment"),
  ],
  ids=str,
)
def test_refusals(fields, words):
  with pytest.raises(UserError, match=words):
    checks.check(make_config(**{f'generator.{k}': v for k, v in fields.items()}))


def test_devices_must_share_parts_and_groups():
  config = make_config()
  BigGAN.check_devices(config.generator, INFO, 4)  # 4 images, half of a group.
  config.unlock().generator.training.update(batch_size=48, batch_norm_group=12)
  BigGAN.check_devices(config.generator, INFO, 4)  # 6 images, half of a group.
  config.generator.training.batch_norm_group = 8  # 6 images.
  with pytest.raises(UserError, match='batch_norm_group = 8 and parts of 6 .* of 4'):
    BigGAN.check_devices(config.generator, INFO, 4)
  config.generator.training.batch_size = 20  # 5 images, in 2 parts.
  with pytest.raises(UserError, match='2 parts'):
    BigGAN.check_devices(config.generator, INFO, 4)


# Published weights.


def released_names(config):
  """Tensors as the published code names those of G, of our variables' shapes."""
  like = BigGAN.variables_like(config.generator, INFO)
  rng = np.random.RandomState(0)
  tensors = {}
  for module, leaves in like['state'].items():
    place = released_place(module)
    for name, x in leaves.items():
      value = rng.standard_normal(x.shape).astype(np.float32)
      if name == 'u':
        tensors[f'{place}.u0'], tensors[f'{place}.sv0'] = value[None], value[:1]
      else:
        tensors[f'{place}.stored_{name}'] = value
  for module, leaves in like['params'].items():
    place = released_place(module)
    for name, x in leaves.items():
      axes = (3, 2, 0, 1) if len(x.shape) == 4 else tuple(range(len(x.shape)))
      axes = axes[::-1] if name == 'w' and len(x.shape) == 2 else axes
      shape = [x.shape[i] for i in axes]
      key = {'w': 'weight', 'table': 'weight', 'b': 'bias'}.get(name, name)
      tensors[f'{place}.{key}'] = rng.standard_normal(shape).astype(np.float32)
  return tensors


def released_place(module):
  fixed = {'output_bn': 'output_layer.0', 'output_conv': 'output_layer.2'}
  if module in fixed or '_' not in module:
    return fixed.get(module, module)
  block, _, rest = module.partition('_')
  number = block.removeprefix('block')
  if rest.startswith('attention'):
    return f'blocks.{number}.1' + rest.removeprefix('attention').replace('/', '.')
  if rest.startswith('bn'):
    rest = rest.replace('_', '.')
  return f'blocks.{number}.0.{rest}'


def test_published_names_of_all_kinds_are_known(tmp_path):
  config = make_config()
  tensors = released_names(config)
  found = read_released(tmp_path, tensors, config.generator, INFO)
  like = BigGAN.variables_like(config.generator, INFO)
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), found, like)
  params = found['params']
  wanted = tensors['blocks.0.0.bn2.gain.weight'].T
  np.testing.assert_array_equal(params['block0_bn2_gain']['w'], wanted)
  wanted = tensors['blocks.0.1.theta.weight'].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(params['block0_attention/theta']['w'], wanted)
  np.testing.assert_array_equal(params['shared']['table'], tensors['shared.weight'])
  # Outputs of the first layer are by channel there, by pixel here: maps of 4x4.
  wanted = tensors['linear.bias'].reshape(8, 4, 4).transpose(1, 2, 0).ravel()
  np.testing.assert_array_equal(params['linear']['b'], wanted)


def test_published_weights_become_a_run(tmp_path):
  config = make_config()
  source, folder = epath.Path(tmp_path) / 'G_ema.pth', epath.Path(tmp_path) / 'run'
  tensors = released_names(config)
  source.write_bytes(torch_archives.archive(tensors))
  said = released.convert(config, source, folder / 'generator.npz')
  assert 'MIT' in said and str(source) in said
  found = BigGAN.restore(folder / 'generator.npz', config.generator, INFO).variables
  wanted = tensors['output_layer.0.stored_var']
  np.testing.assert_array_equal(found['state']['output_bn']['var'], wanted)
  tensors.pop('blocks.0.0.conv_sc.u0')
  source.write_bytes(torch_archives.archive(tensors))
  with pytest.raises(UserError, match='another network .*block0_conv_sc'):
    released.convert(config, source, epath.Path(tmp_path) / 'other/generator.npz')
  assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize(
  'name, value, words',
  [
    ('blocks.0.0.conv9.weight', np.zeros((1, 1)), 'another network .*conv9.weight'),
    ('linear.weight', np.zeros((7, 2)), r'shape \[7, 2\], .* maps of 4x4'),
    ('linear.u0', np.zeros((2, 128)), 'another network .*linear.u0'),
    ('output_layer.0.gain', np.zeros((2, 2)), 'another network'),
    ('blocks.0.1.gamma', np.zeros(1), 'another network'),
  ],
)
def test_files_of_other_networks_are_refused(tmp_path, name, value, words):
  config = make_config()
  tensors = released_names(config) | {name: np.float32(value)}
  with pytest.raises(UserError, match=words) as e:
    read_released(tmp_path, tensors, config.generator, INFO)
  assert 'G_ema.pth' in str(e.value) and '\n' not in str(e.value)


def test_damaged_files_are_refused_in_one_line(tmp_path):
  content = torch_archives.archive({'shared.weight': np.ones((4, 4), np.float32)})
  path, settings = epath.Path(tmp_path) / 'G.pth', make_config().generator
  refused = 0
  for damaged in [*mutations(content, 300, seed=5), b'', b'junk', content[:-1]]:
    path.write_bytes(damaged)
    try:
      BigGAN.read_released(path, settings, INFO)
    except UserError as e:
      refused += 1
      assert str(path) in str(e) and '\n' not in str(e)
  assert refused > 150  # Dates and values may be anything.


# A mixture in the plane.


def ring_functions(group=0):
  """MLPs with two hidden layers: numbers and a class to a point, both to a logit.

  Points may be normalised in groups, by BatchNorm.
  """
  mode = lambda moves, **more: layers.Mode(
    layers.INITIALIZERS['orthogonal'], epsilon=1e-8, moves=moves, **more
  )
  activate = lambda x: jax.nn.leaky_relu(x, 0.2)

  def points(latents, classes):
    one_hot = jax.nn.one_hot(classes, ring.NUM_MODES)
    x = jnp.concatenate([latents, one_hot], -1)
    for size in (64, 64):
      x = activate(hk.Linear(size)(x))
    x = hk.Linear(2)(x).reshape(-1, 1, 1, 2)
    return layers.BatchNorm(mode(True, momentum=0.1, group=group))(x) if group else x

  def logits(images, classes, moves):
    x = images.reshape(-1, 2)
    for index in (0, 1):
      x = activate(layers.Linear(64, mode(moves), name=f'linear{index}')(x))
    table = layers.Embedding(ring.NUM_MODES, 64, mode(moves), True, name='embed')
    last = layers.Linear(1, mode(moves), name='last')(x)[:, 0]
    return last + jnp.sum(table(classes, x.dtype) * x, -1)

  points, logits = (
    hk.without_apply_rng(hk.transform_with_state(fn)) for fn in (points, logits)
  )

  def init(rng):
    classes = jnp.zeros(1, jnp.int32)
    made = {
      'generator': points.init(rng, jnp.zeros((1, 8)), classes),
      'discriminator': logits.init(rng, jnp.zeros((1, 1, 1, 2)), classes, True),
    }
    return tuple({k: pair[i] for k, pair in made.items()} for i in (0, 1))

  return training.Functions(
    init_fn=init,
    image_fn=lambda params, state, latents, classes, momentum: points.apply(
      params, state, latents, classes
    ),
    logit_fn=logits.apply,
    latent_size=8,
    num_classes=ring.NUM_MODES,
  )


def test_devices_change_no_number(use_devices):
  """One, two and four of them, by what an iteration with four updates of D leaves.

  The networks are small, and BatchNorm's groups are of 4 of the 8 images of an update.
  """
  fields = generator.get_config('biggan').generator.training
  fields.update(batch_size=32, discriminator_steps=4, standing_batches=0)
  recipe = fits.with_descent(training.make_recipe(ring_functions(group=4), fields))
  batch = ring.batches(np.random.RandomState(0), (32,))
  found = {}
  for count in (1, 2, 4):
    use_devices(count)
    [found[count]] = fits.iterations(recipe, 0, [batch])
  state, metrics = found.pop(1)
  for others, figures in found.values():
    # Float32 sums of 32 images in another order.
    assert figures == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, others, state)


def test_a_ring_of_eight_gaussians_is_learned_by_class():
  """95 % of samples are within 5 deviations of the mode of their class.

  Losses, spectral norms and the average are those of BigGAN, the networks small. A
  thousand updates of each; the whole run is one program.
  """
  fields = generator.get_config('biggan').generator.training
  fields.update(batch_size=256, discriminator_steps=1, standing_batches=0)
  fields.update(generator_learning_rate=1e-3, discriminator_learning_rate=1e-3)
  fields.update(b2=0.99, ema_decay=0.99, ema_start_steps=0)
  functions = ring_functions()
  recipe = training.make_recipe(functions, fields)
  programs = recipes.make_programs(recipe, 0)

  def step(state, batch):
    for program in programs:
      state, _ = program.fn(state, batch, 0)
    return state, None

  train = jax.pmap(
    lambda state, batches: jax.lax.scan(step, state, batches)[0],
    axis_name=parallel.AXIS,
    devices=jax.devices()[:1],
  )
  rng = np.random.RandomState(0)
  one = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[None], tree)
  state = train(
    one(recipes.init_state(recipe, 0)), one(ring.batches(rng, (1_000, 256)))
  )
  average = jax.tree.map(lambda x: x[0], state.averaged)
  classes = jnp.arange(4_000) % ring.NUM_MODES
  latents = jnp.asarray(rng.standard_normal((4_000, 8)), jnp.float32)
  images, _ = functions.image_fn(
    average['params'], average['state'], latents, classes, None
  )
  modes, good = ring.judge(np.asarray(images).reshape(-1, 2))
  assert ((modes == classes) & good).mean() >= 0.95
