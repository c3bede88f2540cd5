"""The very deep VAE: its network, its likelihood, its bound, and published weights."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from etils import epath

from experiments import cifar10_vdvae
from jaxrobust.config import dataset_info, registries
from jaxrobust.config import generator as generator_configs
from jaxrobust.data import pipeline
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators import released as convert_released
from jaxrobust.generators import vdvae
from jaxrobust.generators.vdvae import mixture, released, stages
from jaxrobust.generators.vdvae import network as networks
from tests.helpers import torch_archives
from tests.helpers.mutations import mutations

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'vdvae.npz'
CIFAR10 = dataset_info.INFO['cifar10']
SMALL = CIFAR10._replace(image_shape=(8, 8, 3))


def make_settings(**network):
  """The base's, with another network."""
  config = generator_configs.get_config('vdvae')
  config.generator.network.update(network)
  return config.generator


def fixture_settings():
  return make_settings(
    width=8,
    bottleneck=4,
    latent_channels=2,
    num_mixtures=2,
    encoder='8x1,8d2,4x1,4d4,1x1',
    decoder='1x1,4m1,4x1,8m4,8x1',
  )


@pytest.fixture(scope='module')
def reference():
  with np.load(FIXTURE) as file:
    return dict(file)


@pytest.fixture(scope='module')
def published(reference, tmp_path_factory):
  """The fixture's parameters in the format of the published weights."""
  path = epath.Path(tmp_path_factory.mktemp('released') / 'model-ema.th')
  path.write_bytes(torch_archives.archive(weights_of(reference)))
  return path


def weights_of(reference):
  return {k.removeprefix('p/'): x for k, x in reference.items() if k.startswith('p/')}


def read(path):
  return vdvae.VDVAE.read_released(path, fixture_settings(), SMALL)


# Of float64 against the reference's float32, which it was rounded to; and of float32.
TOLERANCES = [(np.float64, 1e-6), (np.float32, 1e-4)]


@pytest.mark.parametrize('dtype, tolerance', TOLERANCES, ids=['float64', 'float32'])
def test_forward_passes_are_those_of_the_reference(
  reference, published, dtype, tolerance
):
  """Of the bound, with the means for latent numbers, and of given latent numbers."""
  network = vdvae.make_network(fixture_settings(), SMALL)
  images = reference['pixels']
  given = {
    size: np.stack([reference[f'latent{i}'] for i in numbers]).transpose(0, 1, 3, 4, 2)
    for size, numbers in {1: (0,), 4: (1, 2), 8: (3, 4)}.items()
  }
  firsts = {1: 0, 4: 1, 8: 3}

  def latent(number, mean, log_std):
    size = mean.shape[1]
    return jnp.asarray(given[size], mean.dtype)[number - firsts[size]]

  with jax.enable_x64(dtype == np.float64):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), read(published))
    means = lambda number, mean, log_std: mean

    def everything(params):
      encoded = networks.encode(network, params, jnp.asarray(images, dtype))
      outputs, rates = networks.decode(network, params, means, 2, encoded)
      drawn, none = networks.decode(network, params, latent, 2)
      return outputs, rates, drawn, none, vdvae.terms(network, params, images, means)

    outputs, rates, drawn, none, (distortion, rate) = jax.jit(everything)(params)
  assert outputs.dtype == dtype
  outputs, rates, drawn, none, distortion, rate = map(
    np.asarray, (outputs, rates, drawn, none, distortion, rate)
  )
  close = lambda found, wanted: np.testing.assert_allclose(
    found, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max()
  )
  close(outputs, reference['mixture'])
  close(distortion / 192, reference['nll'])
  close(rates.sum(1), reference['kl'])
  np.testing.assert_array_equal(none, 0)
  weights = weights_of(reference)
  kernel = np.float64(weights['decoder.out_net.out_conv.weight'])[:, :, 0, 0]
  last = reference['px_z_latents'].transpose(0, 2, 3, 1) @ kernel.T
  close(drawn, last + weights['decoder.out_net.out_conv.bias'])
  assert np.mean((distortion + rate) / 192) == pytest.approx(7.0586834, rel=tolerance)
  assert np.mean(rate / 192) == pytest.approx(0.44476593, rel=tolerance)


def test_the_published_network_has_as_many_parameters():
  config = cifar10_vdvae.get_config()
  like = vdvae.VDVAE.variables_like(config.generator, CIFAR10)
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert count(like) == 39_145_700
  assert count((like['input'], like['encoder'])) == 7_497_888
  found = {stage.size: like['decoder'][str(i)] for i, stage in DECODER}
  assert count(found[1]) == 290_848
  assert count(found[32]) == 22 * 733_216
  assert count(like['maps']) == 522_624 and count(like['output']) == 38_500
  network = vdvae.make_network(config.generator, CIFAR10)
  numbers = sum(x.count * x.size**2 * network.latent for x in network.decoder)
  assert numbers == 412_432


DECODER = list(
  enumerate(
    stages.decoder(
      '1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21',
      stages.encoder('32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3', 32),
    )
  )
)


def test_blocks_of_one_size_are_one_stage():
  assert stages.encoder('32x11,32d2,16x6,16d16,1x3', 32) == [
    stages.Stage(32, 12, 2),
    stages.Stage(16, 7, 16),
    stages.Stage(1, 3),
  ]
  assert [stage for _, stage in DECODER] == [
    stages.Stage(1, 1),
    stages.Stage(4, 3, source=1),
    stages.Stage(8, 6, source=4),
    stages.Stage(16, 11, source=8),
    stages.Stage(32, 22, source=16),
  ]
  # A map that is added once more begins another.
  again = stages.decoder('1x1,8m1,8x1,8m1,8x2', stages.encoder('8x1,8d8', 8))
  assert again[1:] == [stages.Stage(8, 2, source=1), stages.Stage(8, 3, source=1)]


def test_the_first_parameters_are_as_published():
  """Uniform by the fan-in; the last kernels of blocks by the depth, of priors 0."""
  settings = make_settings(
    width=64, bottleneck=32, encoder='32x32,32d32', decoder='1x1,32m1,32x41'
  )
  network = vdvae.make_network(settings, CIFAR10)
  params = jax.jit(lambda rng: networks.init(network, rng))(jax.random.key(0))
  stage, last = params['encoder']['0'], params['decoder']['1']
  for kernel, limit in (
    (params['input']['w'], 27**-0.5),
    (stage['c1']['w'], 64**-0.5),
    (stage['c2']['w'], (9 * 32) ** -0.5),
    (stage['c4']['w'], 0.1740777 * 32**-0.5),
    (last['posterior']['c4']['w'], 32**-0.5),
    (last['residual']['c4']['w'], 0.1524986 * 32**-0.5),
    (last['latent']['w'], 0.1524986 * 16**-0.5),
  ):
    # Of a uniform distribution, by 864 numbers or more.
    assert float(jnp.abs(kernel).max()) == pytest.approx(limit, rel=0.01)
    assert float(jnp.abs(kernel).max()) <= limit * (1 + 1e-6)
    assert float(jnp.std(kernel)) == pytest.approx(limit / 3**0.5, rel=0.07)
  for zeros in (
    last['prior']['c4'],
    params['maps'],
    stage['c1']['b'],
    params['bias'],
  ):
    assert not any(np.any(x) for x in jax.tree.leaves(zeros))
  assert not np.array_equal(stage['c1']['w'][0], stage['c1']['w'][1])


def random_params(network, seed=0):
  """As before training, but with priors that are at work."""
  like = jax.eval_shape(lambda rng: networks.init(network, rng), jax.random.key(0))
  rng = np.random.RandomState(seed)
  draw = lambda x: np.float32(0.3 * rng.randn(*x.shape))
  return jax.tree.map(draw, like) | {'gain': np.ones(network.width, np.float32)}


def test_before_training_priors_are_normal_and_change_nothing():
  network = vdvae.make_network(fixture_settings(), SMALL)
  params = jax.jit(lambda rng: networks.init(network, rng))(jax.random.key(0))
  params['maps'] = jax.tree.map(lambda x: x + 0.5, params['maps'])
  decode = jax.jit(
    lambda params, factor: networks.decode(
      network, params, lambda number, mean, log_std: factor * (mean + log_std), 2
    )[0]
  )
  np.testing.assert_array_equal(decode(params, 1.0), decode(params, 0.0))
  # A posterior that sees nothing is the same then.
  for stage in params['decoder'].values():
    stage['posterior']['c4'] = jax.tree.map(jnp.zeros_like, stage['posterior']['c4'])
  images = np.random.RandomState(0).randint(0, 256, (2, 8, 8, 3))
  draw = vdvae._drawn(jax.random.split(jax.random.key(1), 2))
  _, rate = jax.jit(lambda p: vdvae.terms(network, p, images, draw))(params)
  np.testing.assert_array_equal(rate, 0)


# Logits, means and log-scales of each component; nats of grey levels. By an independent
# formula in float64.
LEVELS = (0, 1, 64, 127, 128, 200, 254, 255)
GREY = [
  (
    ((0.0, 0.0, -2.0),),
    (-7.36071535, -10.18038897, -6.57785458, -4.23469055)
    + (-4.23469055, -7.07932944, -10.18038897, -7.36071535),
  ),
  (
    ((0.0, 0.25, -3.0),),
    (-25.02815434, -26.79750390, -16.87288625, -6.95942561)
    + (-6.80396474, -8.25021727, -16.75473611, -14.98538619),
  ),
  (
    ((np.log(0.25), -0.5, -2.0), (np.log(0.75), 0.5, -4.0)),
    (-5.07711383, -7.92286933, -5.62082752, -7.95037880)
    + (-8.00551926, -4.92202905, -15.26007114, -12.44091731),
  ),
  (
    ((0.0, 1.2, -1.0),),
    (-5.97211220, -9.81215673, -8.48353994, -7.19511348)
    + (-7.17536714, -5.89494737, -5.31317830, -0.45391546),
  ),
]


def grey(components, levels):
  """log P of grey levels [n] by components (logit, mean, log-scale)."""
  outputs = jnp.array(np.transpose(components).ravel(), float)
  outputs = jnp.broadcast_to(outputs, (len(levels), 1, 1, outputs.size))
  images = jnp.array(levels, float).reshape(-1, 1, 1, 1)
  return np.asarray(mixture.log_likelihood(outputs, images))[:, 0, 0]


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('components, wanted', GREY, ids=range(4))
def test_likelihoods_of_grey_levels(components, wanted):
  np.testing.assert_allclose(
    grey(components, LEVELS), wanted, rtol=0, atol=6e-9
  )  # As printed.
  everything = grey(components, range(256))
  # Bins of less than 1e-5 have the density in their middle.
  assert np.exp(everything).sum() == pytest.approx(1, abs=1e-6)
  mirrored = [(logit, -mean, scale) for logit, mean, scale in components]
  np.testing.assert_allclose(grey(mirrored, range(256)), everything[::-1], rtol=1e-10)


@pytest.mark.usefixtures('float64')
def test_scales_have_a_least():
  levels = np.arange(120, 136)
  least = grey([(0.0, 0.01, -7.0)], levels)
  np.testing.assert_array_equal(grey([(0.0, 0.01, -9.0)], levels), least)
  assert (grey([(0.0, 0.01, -6.9)], levels) != least).all()


# A logit; for each channel mean, log-scale, coefficient.
RGB = np.array([0, 0.1, -2, 0.5, -0.2, -3, -0.3, 0.3, -1, 0.8])


def colour(pixels):
  """log P of pixels [n, 3] by the one component of RGB."""
  outputs = jnp.broadcast_to(jnp.array(RGB), (len(pixels), 1, 1, 10))
  images = jnp.array(np.float64(pixels)).reshape(-1, 1, 1, 3)
  return np.asarray(mixture.log_likelihood(outputs, images))[:, 0, 0]


@pytest.mark.usefixtures('float64')
def test_likelihoods_of_colours():
  pixels = [(0, 128, 255), (130, 100, 200), (255, 255, 255)]
  wanted = [-24.7073833, -13.1579531, -22.5907582]
  np.testing.assert_allclose(colour(pixels), wanted, rtol=1e-8)
  rest = np.exp(colour([(130, 100, blue) for blue in range(256)])).sum()
  assert rest == pytest.approx(4.918238696e-4, rel=1e-6)


def test_gradients_are_finite_where_bins_are_tiny():
  """Also of pixels that the mixture finds impossible, in float32."""
  images = jnp.array([0.0, 1.0, 128.0, 255.0]).reshape(-1, 1, 1, 1)
  outputs = jnp.broadcast_to(jnp.array([0.0, 40.0, -50.0]), (4, 1, 1, 3))
  total = lambda x: jnp.sum(mixture.log_likelihood(x, images))
  value, gradient = jax.value_and_grad(total)(outputs)
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_draws_have_the_probabilities_of_the_likelihood():
  """200,000 grey pixels, against five standard deviations of a count."""
  components, count = GREY[2][0], 200_000
  outputs = jnp.broadcast_to(
    jnp.array(np.float32(components).T.ravel()), (1, 1, count, 6)
  )
  drawn = mixture.sample(outputs, jax.random.split(jax.random.key(0), 1), 1)
  assert drawn.shape == (1, 1, count, 1)
  levels = np.round((np.asarray(drawn).ravel() + 1) * 127.5).astype(int)
  found = np.bincount(levels, minlength=256)
  expected = count * np.exp(grey(components, range(256)))
  assert (np.abs(found - expected) < 5 * np.sqrt(expected) + 5).all()


def test_channels_are_drawn_in_their_order():
  """Each mean follows the channels before it: a regression finds the coefficients."""
  first, second, third = np.tanh([0.5, -0.3, 0.8])
  outputs = RGB.copy()
  outputs[[2, 5, 8]] = -4  # So narrow that none is cut off.
  outputs = jnp.broadcast_to(jnp.float32(outputs), (1, 1, 50_000, 10))
  drawn = mixture.sample(outputs, jax.random.split(jax.random.key(0), 1), 3)
  red, green, blue = np.float64(drawn).reshape(-1, 3).T
  assert red.mean() == pytest.approx(0.1, abs=1e-3)
  # Deviations of exp(-4) * 1.8 over those of red, over 224: an error of 0.005.
  fit = np.polyfit(red, green, 1)
  assert fit == pytest.approx([first, -0.2], abs=0.02)
  design = np.stack([red, green, np.ones_like(red)], 1)
  fit, *_ = np.linalg.lstsq(design, blue, rcond=None)
  assert fit == pytest.approx([second, third, 0.3], abs=0.02)


def test_the_divergence_of_normal_distributions():
  for given, wanted in {
    (1, 0, 0, 0): 0.5,
    (0, 0, -1, 0): 0.5676676,
    (0.3, -0.2, -1, 0.5): 1.0708785,
  }.items():
    mean, other, log_std, other_log_std = map(jnp.float32, given)
    found = networks.divergence(mean, log_std, other, other_log_std)
    assert float(found) == pytest.approx(wanted, rel=1e-6)
    mirrored = networks.divergence(-mean, log_std, -other, other_log_std)
    assert float(mirrored) == float(found)
  draws = np.random.RandomState(0).randn(1_000_000) * np.exp(-1) + 0.3
  normal = scipy.stats.norm
  ratios = normal.logpdf(draws, 0.3, np.exp(-1)) - normal.logpdf(
    draws, -0.2, np.exp(0.5)
  )
  assert ratios.mean() == pytest.approx(wanted, abs=5 * ratios.std() / 1_000)


@pytest.mark.usefixtures('float64')
def test_the_bound_is_exact_for_a_linear_decoder():
  """x = W z + b + noise; columns of W at right angles make posteriors diagonal."""
  rng = np.random.RandomState(0)
  loadings = np.linalg.qr(rng.randn(5, 3))[0] * [2.0, 0.7, 0.1]
  bias, noise, x = rng.randn(5), 0.6, rng.randn(5)
  precision = 1 + (loadings**2).sum(0) / noise**2
  mean, std = loadings.T @ (x - bias) / noise**2 / precision, precision**-0.5
  rate = networks.divergence(mean, np.log(std), 0.0, 0.0).sum()
  normal = scipy.stats.multivariate_normal
  likelihood = normal.logpdf(x, loadings @ mean + bias, noise**2 * np.eye(5))
  likelihood -= ((loadings * std) ** 2).sum() / (2 * noise**2)
  total = loadings @ loadings.T + noise**2 * np.eye(5)
  assert likelihood - rate == pytest.approx(normal.logpdf(x, bias, total), rel=1e-12)


@pytest.mark.usefixtures('float64')
def test_the_bound_is_below_the_likelihood():
  """One pixel and one latent number: log P by quadrature, and by importance weights."""
  info = CIFAR10._replace(image_shape=(1, 1, 1))
  settings = make_settings(
    width=4,
    bottleneck=3,
    latent_channels=1,
    num_mixtures=2,
    encoder='1x1',
    decoder='1x1',
  )
  network = vdvae.make_network(settings, info)
  params = jax.tree.map(lambda x: x.astype(float), random_params(network))
  noise = np.random.RandomState(0).randn(10_000)
  image = np.full((len(noise), 1, 1, 1), 93)
  seen = {}

  def latent(number, mean, log_std):
    seen.update(mean=float(mean[0, 0, 0, 0]), std=float(np.exp(log_std[0, 0, 0, 0])))
    return mean + jnp.exp(log_std) * noise.reshape(mean.shape)

  with jax.disable_jit():  # So that loops show what they see.
    distortion, rate = vdvae.terms(network, params, image, latent)
    posterior = dict(seen)
    networks.decode(network, params, latent, len(noise))
    prior = dict(seen)
  # Quadrature: log P(pixel | z) at the nodes of the prior.
  nodes, weights = np.polynomial.hermite_e.hermegauss(120)
  at = lambda z: lambda number, mean, log_std: jnp.array(z).reshape(-1, 1, 1, 1)
  outputs, _ = networks.decode(
    network, params, at(prior['mean'] + prior['std'] * nodes), len(nodes)
  )
  log_p = mixture.log_likelihood(outputs, jnp.full((len(nodes), 1, 1, 1), 93.0))
  exact = scipy.special.logsumexp(
    log_p[:, 0, 0], b=weights / np.sqrt(2 * np.pi), axis=0
  )
  bound = -(distortion + rate)
  error = np.std(bound) / 100
  assert bound.mean() < exact - 3 * error
  drawn = posterior['mean'] + posterior['std'] * noise
  normal = scipy.stats.norm
  ratios = (
    -distortion
    + normal.logpdf(drawn, prior['mean'], prior['std'])
    - normal.logpdf(drawn, posterior['mean'], posterior['std'])
  )
  weighted = np.exp(ratios - exact)
  assert weighted.mean() == pytest.approx(1, abs=5 * np.std(weighted) / 100)
  # KL by the same draws.
  found = normal.logpdf(drawn, posterior['mean'], posterior['std']) - normal.logpdf(
    drawn, prior['mean'], prior['std']
  )
  assert rate[0] == pytest.approx(found.mean(), abs=5 * found.std() / 100)


@functools.cache
def skipping():
  """(recipe, its step) of two parameters, whose gradient has the norm in the labels."""
  settings = make_settings()
  settings.training.warmup_steps = 2
  recipe = vdvae.VDVAE.recipe(settings, CIFAR10)
  direction = jnp.array([0.6, -0.8])

  def loss(params, net_state, batch, rngs):
    value = jnp.sum(params['vae']['w'] * direction) * batch.labels[0]
    return value, (net_state, {})

  recipe = recipe._replace(
    init_fn=lambda rng: ({'vae': {'w': jnp.ones(2)}}, {}),
    phases=(recipe.phases[0]._replace(loss_fn=loss),),
  )
  return recipe, recipes.make_step(recipe, 0, 0)


def after(norms):
  """(state, metrics) after updates by gradients of these norms."""
  recipe, step = skipping()
  state = parallel.replicate(recipes.init_state(recipe, 0))
  slots = np.arange(4, dtype=np.int32)
  found = []
  for norm in norms:
    labels = np.full(4, norm, np.float32)
    batch = pipeline.Batch(np.zeros((4, 1, 1, 1), np.uint8), labels, slots < 0, slots)
    state, metrics = step(state, parallel.shard(batch))
    found.append(float(metrics['train/loss_skipped'][0][0]))
  return parallel.unreplicate(state), found


def test_too_great_a_gradient_changes_nothing_and_a_great_one_is_clipped():
  before, skipped = after([150, 20])
  assert skipped == [0, 0]
  for norm in (500, 400, np.nan):
    state, skipped = after([150, 20, norm])
    assert skipped == [0, 0, 1]
    # The step, and the schedule of the learning rate with it.
    (_, (moments, *_, schedule)), (_, (expected, *_, earlier)) = (
      x.opt_state['vae'] for x in (state, before)
    )
    assert (state.step, schedule.count) == (before.step + 1, earlier.count + 1)
    same = lambda x: (x.params, x.averaged)
    jax.tree.map(
      np.testing.assert_array_equal, (same(state), moments), (same(before), expected)
    )
  clipped, _ = after([150, 20, 300, 10])
  expected, _ = after([150, 20, 200, 10])
  np.testing.assert_allclose(
    clipped.params['vae']['w'], expected.params['vae']['w'], rtol=1e-6
  )
  other, _ = after([150, 20, 190, 10])
  assert np.abs(other.params['vae']['w'] - expected.params['vae']['w']).min() > 1e-7


def test_the_optimizer_is_adam_with_decoupled_weight_decay():
  """Loshchilov and Hutter's algorithm 2 in float64; the first update has rate 0."""
  settings = make_settings()
  settings.training.update(weight_decay=0.3, b2=0.8, learning_rate=0.01, warmup_steps=2)
  optimizer, learning_rate_fn = vdvae.make_optimizer(settings.training)
  params = jnp.array([1.0, -2.0])
  state, expected = optimizer.init(params), np.array([1.0, -2.0])
  mean = square = np.zeros(2)
  for step, gradient in enumerate([[3.0, 4.0], [0.5, -0.1], [-180.0, 240.0]]):
    updates, state = optimizer.update(jnp.array(gradient), state, params)
    params = params + updates
    gradient = np.array(gradient) * min(1, 200 / np.hypot(*gradient))
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.8 * square + 0.2 * gradient**2
    rate = 0.01 * min(step / 2, 1)
    assert learning_rate_fn(step) == pytest.approx(rate)
    adam = mean / (1 - 0.9 ** (step + 1)) / np.sqrt(square / (1 - 0.8 ** (step + 1)))
    expected = expected - rate * (adam + 0.3 * expected)
    np.testing.assert_allclose(params, expected, rtol=1e-5)


def test_without_temperature_latent_numbers_are_their_means():
  network = vdvae.make_network(fixture_settings(), SMALL)
  params = random_params(network)
  rngs = jax.random.split(jax.random.key(0), 3)

  @jax.jit
  def outputs(temperature):
    draw = vdvae._drawn(rngs, temperature)
    return networks.decode(network, params, draw, 3)[0]

  cold, hot = np.asarray(outputs(0.0)), np.asarray(outputs(1.0))
  np.testing.assert_array_equal(cold[0], cold[1])
  assert (np.abs(hot[0] - hot[1]) > 1e-3).mean() > 0.9


@pytest.mark.slow
def test_latent_numbers_learn_which_image_it_is():
  """Four of one grey each, for which a single logistic would need about 5 bits."""
  grey_info = CIFAR10._replace(image_shape=(8, 8, 1))
  settings = make_settings(
    width=16,
    bottleneck=8,
    latent_channels=4,
    num_mixtures=1,
    encoder='8x1,8d8,1x1',
    decoder='1x1,8m1,8x1',
  )
  settings.training.update(learning_rate=4e-3, batch_size=4, num_steps=500)
  recipe = vdvae.VDVAE.recipe(settings, grey_info)
  step = recipes.make_step(recipe, 0, 0)
  state = parallel.replicate(recipes.init_state(recipe, 0))
  slots = np.arange(4, dtype=np.int32)
  pixels = np.repeat(np.uint8([0, 90, 170, 255]), 64).reshape(4, 8, 8, 1)
  batch = parallel.shard(pipeline.Batch(pixels, slots, slots < 0, slots))
  bits, rates = [], []
  for _ in range(settings.training.num_steps):
    state, metrics = step(state, batch)
    bits.append(float(metrics['train/bits_per_dim'][0][0]))
    rates.append(float(metrics['train/bits_per_dim_rate'][0][0]))
  assert bits[0] > 5 and np.mean(bits[-50:]) < 3.5
  # Which of four images takes 2 bits at least, of 64 dimensions.
  assert rates[0] < 0.01 and np.mean(rates[-50:]) > 2 / 64


def test_published_weights_are_read_bit_for_bit(reference, published):
  variables = read(published)
  weights = weights_of(reference)
  block = variables['decoder']['1']['prior']['c2']
  assert block['w'].shape == (2, 3, 3, 4, 4)
  for layer, number in enumerate((1, 2)):
    theirs = weights[f'decoder.dec_blocks.{number}.prior.c2.weight']
    np.testing.assert_array_equal(block['w'][layer].transpose(3, 2, 0, 1), theirs)
  np.testing.assert_array_equal(
    variables['maps']['4'].transpose(2, 0, 1), weights['decoder.bias_xs.1'][0]
  )
  total = sum(x.size for x in jax.tree.leaves(variables))
  assert total == sum(x.size for x in weights.values()) == 7_764
  sums = sorted(float(np.float64(x).sum()) for x in weights.values())
  assert sum(sums) == pytest.approx(
    sum(np.float64(x).sum() for x in jax.tree.leaves(variables)), rel=1e-12
  )
  like = vdvae.VDVAE.variables_like(fixture_settings(), SMALL)
  assert jax.tree.structure(variables) == jax.tree.structure(like)
  for x, y in zip(*map(jax.tree.leaves, (variables, like)), strict=True):
    assert x.shape == y.shape and x.dtype == np.float32


def test_published_weights_make_a_run_that_has_been_fitted(
  published, tmp_path, monkeypatch
):
  config = generator_configs.get_config('vdvae', 'digits')
  config.generator = fixture_settings()
  colours = SMALL._replace(name='tiny_colours')
  monkeypatch.setitem(registries.DATASETS._items, 'tiny_colours', colours)
  config.dataset.name = 'tiny_colours'
  target = epath.Path(tmp_path) / 'run/generator.npz'
  line = convert_released.convert(config.lock(), published, target)
  assert '7,764 numbers' in line and 'MIT' in line
  info = dataset_info.of(config.dataset)
  found = vdvae.VDVAE.restore(target, config.generator, info)
  jax.tree.map(np.testing.assert_array_equal, found.variables, read(published))


def test_files_of_pytorch_are_read_alike(reference, published, tmp_path):
  """Of both formats, and with the prefix of weights from several devices."""
  torch = pytest.importorskip('torch', reason='PyTorch is not installed')
  expected = read(published)
  state = {k: torch.tensor(x) for k, x in weights_of(reference).items()}
  for prefix, zipped in (('', True), ('module.', False)):
    path = epath.Path(tmp_path) / 'theirs.th'
    content = {f'{prefix}{k}': x for k, x in state.items()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    jax.tree.map(np.testing.assert_array_equal, read(path), expected)


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda x: x.pop('decoder.gain'), 'lacks decoder.gain'),
    (lambda x: x.update(other=np.zeros(2, np.float32)), 'has other'),
    (
      lambda x: x.update({'decoder.bias': np.zeros((1, 9, 1, 1), np.float32)}),
      r'decoder.bias has shape \[1, 9, 1, 1\], and not \[1, 8, 1, 1\]',
    ),
    (
      lambda x: x.update({'decoder.gain': np.full((1, 8, 1, 1), np.nan, np.float32)}),
      'decoder.gain holds something else than finite numbers',
    ),
  ],
  ids=range(4),
)
def test_weights_of_another_network_are_refused(reference, tmp_path, change, words):
  weights, path = weights_of(reference), epath.Path(tmp_path) / 'x.th'
  change(weights)
  path.write_bytes(torch_archives.archive(weights))
  with pytest.raises(UserError, match=words) as e:
    read(path)
  assert str(path) in str(e.value) and '\n' not in str(e.value)


def test_weights_that_would_run_something_are_refused(reference, tmp_path):
  path, made = epath.Path(tmp_path) / 'x.th', tmp_path / 'made'
  command = f'touch {made}'.encode()
  run = b'cposix\nsystem\n(X' + len(command).to_bytes(4, 'little') + command + b'tR0'
  path.write_bytes(torch_archives.archive(weights_of(reference), run))
  with pytest.raises(UserError, match='x.th wants to run posix.system, .* refused'):
    read(path)
  assert not made.exists()


def test_damaged_weights_are_refused_in_one_line(published, tmp_path):
  content, path, good = published.read_bytes(), epath.Path(tmp_path) / 'x.th', 0
  like = vdvae.VDVAE.variables_like(fixture_settings(), SMALL)
  network = vdvae.make_network(fixture_settings(), SMALL)
  for damaged in [*mutations(content, 200, seed=3), b'', b'PK', content[:-1]]:
    path.write_bytes(damaged)
    try:
      released.read(path, like, network)
      good += 1
    except UserError as e:
      assert str(path) in str(e) and '\n' not in str(e)
  assert good < 120  # Dates, and numbers that are finite still.


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'encoder': '8x1,4d2'}, '4d2 comes where maps are 8x8'),
    ({'encoder': '8x1,8d3'}, '8d3 does not divide'),
    ({'encoder': '8x1,8m2'}, "'8m2' is no part"),
    ({'encoder': ''}, "'' is no part"),
    ({'encoder': '8x0'}, "'8x0' is no part"),
    ({'encoder': '8x1,8x9999'}, 'more than 1000 blocks'),
    ({'encoder': '16x1'}, '16x1 comes where maps are 8x8'),
    ({'decoder': '1x1,2m1,8m2'}, '2m1 needs a map that the encoder does not'),
    ({'decoder': '4x1,8m1'}, '8m1 needs a map of 1x1 that comes before'),
    ({'decoder': '1x1,4m1'}, 'ends with maps of 4x4, and images are 8x8'),
    ({'decoder': '1x1,4d1'}, "'4d1' is no part"),
  ],
  ids=str,
)
def test_refused_networks(fields, words):
  settings = fixture_settings()
  settings.network.update(fields)
  with pytest.raises(UserError, match=words) as e:
    vdvae.VDVAE.check(settings, SMALL)
  assert '\n' not in str(e.value)


def test_refused_images_and_stops():
  for shape in ((8, 6, 3), (8, 8, 4)):
    with pytest.raises(UserError, match='square images of 1 or 3 channels'):
      vdvae.VDVAE.check(fixture_settings(), CIFAR10._replace(image_shape=shape))
  settings = fixture_settings()
  settings.training.evaluation_interval_steps = 0
  with pytest.raises(UserError, match='early_stopping = True chooses among'):
    vdvae.VDVAE.check(settings, SMALL)
