"""StyleGAN2: its networks by the reference's numbers, its losses by closed forms."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments import digits_stylegan2
from jaxrobust import generate
from jaxrobust.config import dataset_info, generator
from jaxrobust.data import datasets, pipeline
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.generators import checks, fid
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators.stylegan2 import StyleGAN2, layers, networks, training
from jaxrobust.models import feature_networks
from jaxrobust.planning import device_programs
from tests.helpers import fits, nvidia_files, ring
from tests.helpers.programs import ROOT

pytestmark = pytest.mark.usefixtures('compiled_once')
INFO = dataset_info.INFO['digits']

# Everything that the networks and the losses have, on 8x8 images.
TINY = {
  'generator.network.latent_size': 6,
  'generator.network.style_size': 5,
  'generator.network.channels_max': 4,
  'generator.network.discriminator': 'residual',
  'generator.network.stddev_group': 8,
  'generator.training.num_steps': 6,
  'generator.training.batch_size': 16,
  'generator.training.r1_interval_steps': 3,
  'generator.training.path_length_weight': 2.0,
  'generator.training.path_length_interval_steps': 2,
  'generator.training.style_mixing': 0.5,
  'generator.training.flip': True,
  'generator.training.augmentation.kind': 'bgc',
  'generator.training.augmentation.probability': 0.3,
  'generator.training.augmentation.ramp_images': 640,
  'generator.training.fid.interval_steps': 3,
  'generator.training.fid.samples': 40,
  'generator.training.log_interval_steps': 1,
  'generator.training.checkpoint_interval_steps': 2,
  'samples.count': 20,
  'samples.batch_size': 4,
}


def make_config(**fields):
  """The digits' config, TINY and with these fields."""
  config = digits_stylegan2.get_config().unlock()
  config.update_from_flattened_dict({**TINY, 'labeller': 'condition', **fields})
  return config.lock()


# The reference.


@pytest.fixture(scope='module')
def fixture():
  with np.load(ROOT / 'tests/fixtures/stylegan2.npz') as file:
    return dict(file)


def parts(fixture, network):
  """The arrays of a network by NVIDIA's names."""
  prefix = f'p/{network}.'
  return {name.removeprefix(prefix): x for name, x in fixture.items() if prefix in name}


def discriminator_of(fixture, dtype):
  """The parameters of the reference's D as ours."""
  found = {}
  for name, x in parts(fixture, 'D').items():
    *path, leaf = name.split('.')
    if leaf == 'resample_filter':
      continue
    if x.ndim == 4:
      x = x.transpose(2, 3, 1, 0)
    elif x.ndim == 2:
      if path == ['b4', 'fc']:
        x = x.reshape(len(x), -1, 4, 4).transpose(0, 2, 3, 1).reshape(len(x), -1)
      x = x.T
    module = '_'.join(x for x in path if x != 'mapping')
    found.setdefault(module, {})[{'weight': 'w', 'bias': 'b'}[leaf]] = x.astype(dtype)
  return found


@pytest.mark.parametrize('dtype', [np.float64, np.float32])
def test_networks_are_those_of_the_reference(fixture, tmp_path, dtype):
  """Of G by a file as NVIDIA's code writes it."""
  tolerance = {np.float64: 1e-6, np.float32: 1e-4}[dtype]
  close = lambda found, expected: np.testing.assert_allclose(
    found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
  )
  settings = generator.get_config('stylegan2').generator.network
  settings.update(latent_size=6, style_size=5, channels_max=4, conditional=True)
  settings.discriminator_mapping_layers = 2
  info = types.SimpleNamespace(num_classes=2, image_shape=(8, 8, 3))
  path = epath.Path(tmp_path) / 'theirs.pkl'
  path.write_bytes(nvidia_files.dump({'G_ema': parts(fixture, 'G')}))
  found = StyleGAN2.read_released(path, None, None)
  with jax.enable_x64(dtype is np.float64):
    mapping, synthesis, discriminator = networks.make(settings, info, 2)
    given = {k: x.astype(dtype) for k, x in fixture.items()}
    found = jax.tree.map(lambda x: x.astype(dtype), found)
    styles = mapping.apply(found['mapping'], given['z'], fixture['c'].argmax(1))
    close(styles, fixture['w'])
    mean = found['style_mean'][None]
    for psi, name in ((1, 'image_none'), (0.5, 'image_psi')):
      truncated = jnp.repeat((mean + psi * (styles - mean))[:, None], 4, 1)
      images = synthesis.apply(found['synthesis'], truncated, None)
      assert images.dtype == dtype
      close(images, fixture[name].transpose(0, 2, 3, 1))
    # Groups of theirs are every second image, of ours neighbours.
    order = np.array([0, 2, 1, 3])
    images = given['x'].transpose(0, 2, 3, 1)[order]
    params, classes = discriminator_of(fixture, dtype), fixture['cx'].argmax(1)[order]

    def total(x):
      logits = discriminator.apply(params, x, classes)
      return logits.sum(), logits

    gradients, logits = jax.grad(total, has_aux=True)(images)
    close(logits, fixture['logits'][order, 0])
    close((gradients**2).sum((1, 2, 3)), fixture['r1'][order])


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda x: x.pop('mapping.w_avg'), 'lacks mapping.w_avg'),
    (
      lambda x: x.update({'synthesis.b8.skip.weight': np.zeros(3, np.float32)}),
      'another network .*b8.skip.weight',
    ),
    (
      lambda x: x.update({'synthesis.b8.conv0.weight': np.zeros(3, np.float32)}),
      r'b8.conv0.weight has shape \[3\]',
    ),
  ],
  ids=range(3),
)
def test_files_of_other_networks_are_refused(fixture, tmp_path, change, words):
  content, path = parts(fixture, 'G'), epath.Path(tmp_path) / 'theirs.pkl'
  change(content)
  path.write_bytes(nvidia_files.dump({'G_ema': content}))
  with pytest.raises(UserError, match=words) as e:
    StyleGAN2.read_released(path, None, None)
  assert str(path) in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize(
  'dataset, conditional, counts',
  [
    ('cifar10', True, (20_215_315, 23_089_664)),
    ('cifar10', False, (19_947_539, 20_720_641)),
    ('cifar100', True, (20_261_395, 23_135_744)),
  ],
)
def test_numbers_of_parameters(dataset, conditional, counts):
  settings = generator.get_config('stylegan2', dataset).generator
  settings.network.conditional = conditional
  recipe = StyleGAN2.recipe(settings, dataset_info.INFO[dataset])
  params, _ = jax.eval_shape(recipe.init_fn, jax.random.key(0))
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  assert (count(params['generator']), count(params['discriminator'])) == counts


# Layers, by numbers of the reference.


def image(rows):
  return jnp.asarray(rows, jnp.float32)[None, ..., None]


KERNEL = jnp.arange(1.0, 10).reshape(3, 3, 1, 1)
SIXTEEN = image(np.arange(16).reshape(4, 4))


def test_resampling():
  delta = image([[1, 0], [0, 0]])
  wanted = [[9, 9, 3, 0], [9, 9, 3, 0], [3, 3, 1, 0], [0, 0, 0, 0]]
  np.testing.assert_allclose(16 * layers.upsample(delta)[0, ..., 0], wanted, atol=1e-6)
  ones = layers.upsample(jnp.ones((1, 4, 4, 1)))[0, ..., 0]
  assert ones[0, 0] == 0.5625 and ones[0, 3] == 0.75 and (ones[1:-1, 1:-1] == 1).all()
  found = layers.downsample(SIXTEEN)[0, ..., 0]
  np.testing.assert_allclose(found, [[2.734375, 3.9375], [7.546875, 8.75]])
  delta = jnp.zeros((1, 4, 4, 1)).at[0, 1, 1].set(64)
  np.testing.assert_allclose(layers.downsample(delta)[0, ..., 0], [[9, 3], [3, 1]])


def test_convolution_that_halves():
  found = layers.convolve(SIXTEEN, KERNEL, 'down')[0, ..., 0]
  wanted = [[183.921875, 206.46875], [264.359375, 268.53125]]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_modulated_convolutions():
  x = jnp.float32([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]).transpose(1, 2, 0)[None]
  kernel = jnp.float32([[1, -1], [2, 0.5]]).T[None, None]
  found = layers.modulated(x, kernel, jnp.float32([[2, 3]]))[0]
  wanted = [
    [[-3.6055515, -3.8829015], [-4.1602516, -4.4376020]],
    [[2.6919465, 3.9793992], [5.2668519, 6.5543041]],
  ]
  np.testing.assert_allclose(found.transpose(2, 0, 1), wanted, rtol=1e-6)
  x, scales = image([[1, 2], [3, 4]]), jnp.float32([[2]])
  found = layers.modulated(x, KERNEL, scales)[0, ..., 0]
  wanted = [[4.5610862, 3.9687374], [2.7840397, 2.1916909]]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  # Any factor of all scales or weights is taken out again.
  same = layers.modulated(x, 3 * KERNEL, 5 * scales)[0, ..., 0]
  np.testing.assert_allclose(same, wanted, rtol=1e-6)
  found = layers.modulated(x, KERNEL, scales, 'up')[0, ..., 0]
  wanted = [
    [2.2472237, 3.4985604, 3.9391201, 3.0246813],
    [3.9020982, 5.7754016, 6.2381740, 4.6462364],
    [4.4796386, 6.4417939, 6.7935014, 4.9572197],
    [3.0246813, 4.2538052, 4.4055948, 3.1357470],
  ]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_activation_and_normalisation():
  found = layers.activate(jnp.array([-1, 2]) + 0.5)
  np.testing.assert_allclose(found, [-0.1414214, 3.5355339], rtol=1e-6)
  found = layers.normalise(jnp.array([[3.0, 4.0]]))
  np.testing.assert_allclose(found, [[0.84852815, 1.13137090]], rtol=1e-6)


def test_deviation_in_groups():
  """Of consecutive images; the reference's of every n-th, so that its order is ours."""
  channel = lambda x, group: networks._with_deviation(x, group)[:, 0, 0, -1]
  scalars = jnp.float32([0, 2, 1, 5]).reshape(4, 1, 1, 1)
  np.testing.assert_allclose(channel(scalars, 2), [1, 1, 2, 2], rtol=1e-6)
  np.testing.assert_allclose(channel(scalars, 4), [1.8708287] * 4, rtol=1e-6)
  values = jnp.arange(16.0).reshape(4, 2, 2, 1)[np.array([0, 2, 1, 3])] ** 1.5
  wanted = [13.5885611, 13.5885611, 18.3152256, 18.3152256]
  np.testing.assert_allclose(channel(values, 2), wanted, rtol=1e-6)


def test_convolutions_keep_a_variance_of_one():
  """At the beginning, of independent inputs: 1,024 images of 64 values that count."""
  rngs = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(rngs[0], (64, 4, 4, 256))
  kernel = jax.random.normal(rngs[1], (3, 3, 256, 64))
  scales = 1 + jax.random.normal(rngs[2], (64, 256))
  found = layers.modulated(x, kernel, scales)[:, 1:-1, 1:-1]
  assert float(found.var()) == pytest.approx(1, abs=0.03)


# Losses, by closed forms.


def make_training(**fields):
  c = generator.get_config('stylegan2').generator.training
  c.augmentation.kind = 'none'
  c.update(fields)
  return c


def functions_with(logit_fn):
  """Functions in which only D matters: G makes black images of one pixel."""
  return training.Functions(
    init_fn=lambda rng: {'generator': {}, 'discriminator': {}},
    style_fn=lambda params, latents, classes: latents,
    image_fn=lambda params, styles, rngs: jnp.zeros((len(styles), 1, 1, 3)),
    logit_fn=lambda params, images, classes: logit_fn(images.reshape(-1, 3)),
    latent_size=2,
    style_size=2,
    num_styles=2,
  )


def loss_of(name, logit_fn, images, **fields):
  losses = training.Losses(functions_with(logit_fn), make_training(**fields))
  slots = np.arange(len(images), dtype=np.int32)
  batch = pipeline.Batch(images.reshape(-1, 1, 1, 3), 0 * slots, slots < 0, slots)
  params, state = losses.init(jax.random.key(0))
  rngs = lambda stream: parallel.key_per_slot(jax.random.key(1), slots)
  loss, (state, metrics) = getattr(losses, name)(params, state, batch, rngs)
  return float(loss), state, metrics


PIXELS = np.random.RandomState(0).randint(0, 256, (8, 3)).astype(np.uint8)


def test_losses_of_a_discriminator_that_knows_nothing():
  zero = lambda x: 0 * x[:, 0]
  assert loss_of('generator', zero, PIXELS)[0] == pytest.approx(math.log(2))
  assert loss_of('discriminator', zero, PIXELS)[0] == pytest.approx(2 * math.log(2))


def test_losses_by_hand():
  """Fakes are black, so that D there is its bias, 0.5."""
  logits = lambda x: x @ jnp.array([1.0, 2.0, 3.0]) + 0.5
  plus = lambda x: np.log1p(np.exp(x))
  real = (PIXELS / 127.5 - 1) @ [1, 2, 3] + 0.5
  assert loss_of('generator', logits, PIXELS)[0] == pytest.approx(plus(-0.5))
  loss, state, found = loss_of('discriminator', logits, PIXELS)
  assert loss == pytest.approx(plus(0.5) + plus(-real).mean(), rel=1e-5)
  assert float(found['train/real_sign']) == pytest.approx(np.sign(real).mean())
  assert float(state['augmentation']['signs']) == pytest.approx(np.sign(real).mean())
  assert state['augmentation']['counted'] == 1


def test_r1_of_linear_and_quadratic_discriminators():
  """0.07 is that of gamma 0.01; an update by it is as many times larger as rarer."""
  linear = lambda x: x @ jnp.array([1.0, 2.0, 3.0])
  loss, state, found = loss_of('r1', linear, PIXELS, r1_interval_steps=16)
  assert loss == pytest.approx(16 * 0.07, rel=1e-5)
  assert float(found['train/r1']) == pytest.approx(14, rel=1e-5)
  assert state['augmentation']['counted'] == 1
  matrix = np.array([[2.0, 1, 0], [1, 3, -1], [0, -1, 0.5]])
  quadratic = lambda x: jnp.sum(x @ matrix * x, -1) / 2
  wanted = np.square((PIXELS / 127.5 - 1) @ matrix).sum(-1).mean()
  _, _, found = loss_of('r1', quadratic, PIXELS)
  assert float(found['train/r1']) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize('kind', ['plain', 'residual'])
def test_the_gradient_of_r1_is_that_of_finite_differences(float64, monkeypatch, kind):
  """By a second derivative through every kind of layer, and through augmentation."""
  exact = lambda images, rngs, **_: images / 255
  monkeypatch.setattr(training.augment, 'augment', exact)
  settings = make_config(**{'generator.network.discriminator': kind}).generator
  recipe = StyleGAN2.recipe(settings, INFO)
  phase = next(x for x in recipe.phases if x.metric == 'train/r1_loss')
  to_double = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
  params, state = map(to_double, recipe.init_fn(jax.random.key(0)))
  slots = np.arange(8, dtype=np.int32)
  images = np.random.RandomState(1).randint(0, 256, (8, 8, 8, 1)).astype(np.uint8)
  batch = pipeline.Batch(images, slots, slots < 0, slots)
  rngs = lambda stream: parallel.key_per_slot(jax.random.key(2), slots)

  @jax.jit
  @jax.value_and_grad
  def loss(own):
    return phase.loss_fn({**params, 'discriminator': own}, state, batch, rngs)[0]

  own = params['discriminator']
  flat, unravel = jax.flatten_util.ravel_pytree(own)
  direction = unravel(jnp.asarray(np.random.RandomState(3).standard_normal(len(flat))))
  found = sum(
    jnp.vdot(a, b)
    for a, b in zip(
      jax.tree.leaves(loss(own)[1]), jax.tree.leaves(direction), strict=True
    )
  )
  step = 1e-7  # Small, since the penalty jumps where a leaky ReLU has its kink.
  moved = lambda by: loss(jax.tree.map(lambda x, d: x + by * d, own, direction))[0]
  wanted = (moved(step) - moved(-step)) / (2 * step)
  assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_the_average_of_parameters():
  fields = make_training()
  wanted = {
    0: 0,
    1: 9.5367432e-7,
    100: 0.8705505633,
    10**6 // 64: 0.9991131651,
    10**7 // 64: 0.9999112811,
    1_562_500: 0.9999112811,
  }
  for step, decay in wanted.items():
    found = float(training.ema_decay(fields, jnp.int32(step)))
    assert found == pytest.approx(decay, rel=2e-6)
  fields = make_training(ema_ramp=0.0, ema_halflife_images=640, batch_size=64)
  decay = float(training.ema_decay(fields, jnp.int32(0)))
  assert 1 - decay**30 == pytest.approx(1 - 2 ** (-30 * 64 / 640))


def test_the_optimizers_are_corrected_for_lazy_penalties():
  fields = make_training()
  for interval, rate, b2 in (
    (4, 0.002, 0.9919919678),
    (16, 0.00235294118, 0.9905854573),
  ):
    found, rate_fn = training.make_optimizer(fields, interval)
    assert rate_fn(0) == pytest.approx(rate)
    params = {'w': jnp.zeros(3)}
    first = {'w': jnp.array([0.5, jnp.nan, -jnp.inf])}
    updates, state = found.update(first, found.init(params), params)
    # The first step of Adam is of the rate, 0 where there is no gradient.
    np.testing.assert_allclose(updates['w'], [-rate, 0, rate], rtol=1e-5)
    updates, _ = found.update({'w': jnp.array([1.0, 0, 0])}, state, params)
    square = (b2 * 0.25 + 1) * (1 - b2) / (1 - b2**2)
    assert float(updates['w'][0]) == pytest.approx(-rate / square**0.5, rel=1e-4)


def test_the_controller_follows_signs():
  """Up by 1 in 500,000 images at most, by steps of 4 iterations."""
  fields = make_training()
  fields.augmentation.kind = 'bgc'
  losses = training.Losses(functions_with(None), fields)
  _, known = losses.init(jax.random.key(0))

  def after(signs, step):
    seen = known['augmentation'] | {'signs': signs, 'counted': 4.0}
    state = recipes.State(None, known | {'augmentation': seen}, None, None, step)
    return losses.control(state)['augmentation']

  assert after(3.0, 2)['probability'] == 0
  found = after(3.0, 3)
  assert float(found['probability']) == pytest.approx(5.12e-4)
  assert found['signs'] == found['counted'] == 0
  assert after(2.0, 3)['probability'] == 0  # Not below.


# A fit.


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
  """The workdir of an uninterrupted fit of 6 iterations."""
  folder = tmp_path_factory.mktemp('fitted')
  generate.main(make_config(), folder, stage='fit')
  return folder


def restored(folder, **fields):
  path, settings = epath.Path(folder) / 'generator.npz', make_config(**fields).generator
  return StyleGAN2.restore(path, settings, INFO)


def test_metrics_say_how_it_goes(fitted):
  lines = [x for x in fits.lines_of(fitted) if fid.METRIC not in x]
  always = {'step'} | {
    f'train/{name}'
    for name in (
      *('generator_loss', 'discriminator_loss'),
      *('generator_gradient_norm', 'discriminator_gradient_norm'),
      *('learning_rate_generator', 'learning_rate_discriminator'),
      *('real_logit', 'fake_logit', 'real_sign', 'augmentation_probability'),
    )
  }
  seldom = {3: {'train/r1', 'train/r1_loss'}}
  seldom[2] = {'train/path_length', 'train/path_length_loss'}
  for line in lines:
    wanted = always.copy()
    for interval, names in seldom.items():
      if (line['step'] - 1) % interval == 0:
        wanted |= names
    assert set(line) == wanted
    # 4 iterations of 16 images, of 640 for 1.
    moved = line['train/augmentation_probability'] - 0.3
    assert abs(moved) == pytest.approx(0.1 if line['step'] > 4 else 0, abs=1e-6)
  # D's logits are near 0 at first.
  assert lines[0]['train/generator_loss'] == pytest.approx(math.log(2), abs=0.2)


def test_the_distance_of_samples_is_measured_while_it_trains(fitted):
  """Of the average, in pixels; the last one is that of the file."""
  measured = {
    x['step']: x[fid.METRIC] for x in fits.lines_of(fitted) if fid.METRIC in x
  }
  assert list(measured) == [3, 6]
  images, _ = restored(fitted).sample(jax.random.key(0), np.arange(40), 4)
  real = datasets.load('digits', 'train', train_images=100, validation_images=400)
  pixels = lambda x: x.reshape(len(x), -1) / 255
  wanted = feature_networks.fid(pixels(real.images), pixels(images))
  assert measured[6] == pytest.approx(wanted, rel=1e-4)


def test_stopped_between_lazy_updates_it_ends_the_same(fitted, tmp_path, monkeypatch):
  for count in (3, 2):  # Iterations until it is stopped: after the third and fifth.
    fits.stop(monkeypatch, make_config(), tmp_path, count)
  generate.main(make_config(), tmp_path, stage='fit')
  fits.assert_same_fit(tmp_path, fitted)


@pytest.mark.slow
def test_killed_between_lazy_updates_it_ends_the_same(fitted, compiled, tmp_path):
  """Killed after 3 iterations, it goes on from the second.

  There R1's and the controller's intervals, of 3 and 4 iterations, are under way.
  """
  fields = {**TINY, 'labeller': 'condition'}
  fits.kill(tmp_path, compiled, 3, 'digits_stylegan2.py', fields)
  assert [x.name for x in (tmp_path / 'checkpoints').iterdir()] == ['2']
  generate.main(make_config(), tmp_path, stage='fit')
  fits.assert_same_fit(tmp_path, fitted)


def test_one_device_gives_the_numbers_of_four(fitted, use_devices):
  """Of which each has half of a group, here there are two groups."""
  use_devices(1)
  config = make_config()
  recipe = StyleGAN2.recipe(config.generator, INFO)
  found = fits.iterations(recipe, config.seed, fits.batches_of(config, INFO))
  lines = [x for x in fits.lines_of(fitted) if fid.METRIC not in x]
  for (_, metrics), expected in zip(found, lines, strict=True):
    for name, value in metrics.items():
      # Means over 16 images, in another order.
      assert value == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


def test_sample_i_depends_on_seed_and_i_only(fitted):
  rng = jax.random.key(7)
  found = restored(fitted)
  images, classes = found.sample(rng, np.arange(20), 4)
  np.testing.assert_array_equal(classes, np.arange(20) % 10)
  some, _ = found.sample(rng, np.array([13, 4, 19]), 4)
  np.testing.assert_array_equal(some, images[[13, 4, 19]])
  assert len(np.unique(images, axis=0)) == 20


def test_truncation_takes_variety(fitted):
  spread = lambda **fields: np.float32(
    restored(fitted, **fields).sample(jax.random.key(0), np.arange(20), 4)[0]
  ).std(0)
  mean = np.abs(restored(fitted).variables['style_mean'])
  assert mean.shape == (5,) and (mean > 0).all()
  # What is left of it is of the noise, whose strength is near 0 still.
  truncated = spread(**{'generator.sampling.truncation': 0.0})
  assert truncated.mean() < 0.3 * spread().mean()


def test_a_plan_has_each_program_as_often_as_it_runs():
  config = make_config(**{'generator.training.num_steps': 7})
  found = device_programs.of(config, 'train', 4)
  assert [(x.name, x.images, x.calls) for x in found] == [
    ('generator by generator_loss', 4, 7),
    ('generator by path_length_loss', 2, 4),
    ('discriminator by discriminator_loss', 4, 7),
    ('discriminator by r1_loss', 4, 3),
    ('end of iteration', 4, 7),
  ]
  for program in found:
    parallel.trace(program.fn, program.arguments, 4)
  [samples] = device_programs.of(config, 'sample', 4)
  parallel.trace(samples.fn, samples.arguments, 4)


def test_without_path_length_two_updates_are_one_program():
  config = make_config(**{'generator.training.path_length_weight': 0.0})
  names = [x.name for x in device_programs.of(config, 'train', 4)]
  assert names[0] == (
    'generator by generator_loss, discriminator by discriminator_loss'
  )


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'generator.network.channels_base': 7}, 'channels_base = 7 .* use 8 or more'),
    (
      {'generator.network.stddev_group': 6},
      'stddev_group = 6 .*batch_size = 16: use a divisor',
    ),
    ({'generator.network.discriminator': 'deep'}, "'deep': use one of plain, resid"),
    ({'generator.training.augmentation.kind': 'all'}, "'all': use one of none, bgc"),
  ],
  ids=str,
)
def test_refusals(fields, words):
  with pytest.raises(UserError, match=words):
    checks.check(make_config(**fields))


def test_images_must_be_squares_of_a_power_of_two():
  config = generator.get_config('stylegan2', 'mnist')
  config.labeller = 'x'
  with pytest.raises(UserError, match='images of 28x28 .*8, 16, 32'):
    checks.check(config)


def test_devices_must_share_groups():
  fields = {'network.stddev_group': 6, 'training.batch_size': 24 * 2}
  config = make_config(**{f'generator.{k}': v for k, v in fields.items()})
  StyleGAN2.check(config.generator, INFO)
  StyleGAN2.check_devices(config.generator, INFO, 4)  # 12 images, two groups.
  config.unlock().generator.training.update(batch_size=36, path_length_weight=0.0)
  with pytest.raises(UserError, match='stddev_group = 6 and 9 images on each of 4'):
    StyleGAN2.check_devices(config.generator, INFO, 4)


# A mixture in the plane.


def ring_functions():
  """MLPs with two hidden layers: 8 normal numbers to a point, a point to a logit."""

  def init(rng, sizes):
    return [
      {
        'w': jax.random.normal(jax.random.fold_in(rng, i), shape)
        * (2 / shape[0]) ** 0.5,
        'b': jnp.zeros(shape[1]),
      }
      for i, shape in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    ]

  def mlp(params, x):
    for i, layer in enumerate(params):
      x = x @ layer['w'] + layer['b'][None]
      x = jax.nn.leaky_relu(x, 0.2) if i < len(params) - 1 else x
    return x

  return training.Functions(
    init_fn=lambda rng: {
      'generator': {'mlp': init(jax.random.fold_in(rng, 9), (8, 64, 64, 2))},
      'discriminator': init(rng, (2, 64, 64, 1)),
    },
    style_fn=lambda params, latents, classes: latents,
    image_fn=lambda params, styles, rngs: mlp(params['mlp'], styles[:, 0]).reshape(
      -1, 1, 1, 2
    ),
    logit_fn=lambda params, images, classes: mlp(params, images.reshape(-1, 2))[:, 0],
    latent_size=8,
    style_size=8,
    num_styles=2,
  )


def test_devices_change_no_number(use_devices):
  """One, two and four of them, by what an iteration with both penalties leaves.

  The networks are small, groups of deviations are of 8 of the 32 images, and R1 moves
  D after its other loss.
  """
  fields = make_training(
    **{'batch_size': 32, 'r1_gamma': 0.1},
    **{'path_length_weight': 2.0, 'style_mixing': 0.5},
  )
  functions = ring_functions()

  def logit_fn(params, images, classes):
    deviation = networks._with_deviation(images, 8)[..., -1:]
    return functions.logit_fn(params, images * (1 + deviation), classes)

  recipe = training.make_recipe(functions._replace(logit_fn=logit_fn), fields)
  recipe = fits.with_descent(recipe)
  batch = ring.batches(np.random.RandomState(0), (32,))
  found = {}
  for count in (1, 2, 4):
    use_devices(count)
    [found[count]] = fits.iterations(recipe, 0, [batch])
  state, metrics = found.pop(1)
  assert {'train/r1', 'train/path_length'} < set(metrics)
  for others, figures in found.values():
    # Float32 sums of 32 images in another order.
    assert figures == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, others, state)


@pytest.mark.slow
def test_a_ring_of_eight_gaussians_is_covered():
  """70 % of samples within 5 deviations of a mode, none with less than half its share.

  The losses, R1 and the average are those of StyleGAN2, the networks small. The whole
  run is one program.
  """
  fields = make_training(
    **{'batch_size': 256, 'learning_rate': 2e-3, 'r1_gamma': 0.1},
    **{'r1_interval_steps': 1, 'path_length_interval_steps': 1},
    **{'ema_halflife_images': 256 * 70, 'ema_ramp': 0.0},
  )
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
    one(recipes.init_state(recipe, 0)), one(ring.batches(rng, (3_000, 256)))
  )
  params = jax.tree.map(lambda x: x[0], state.averaged)
  latents = jnp.asarray(rng.standard_normal((4_000, 2, 8)), jnp.float32)
  points = functions.image_fn(params, latents, None)
  modes, good = ring.judge(np.asarray(points).reshape(-1, 2))
  assert good.mean() >= 0.7, good.mean()
  counts = np.bincount(modes[good], minlength=ring.NUM_MODES)
  assert counts.min() > 4_000 / 8 / 2, counts
