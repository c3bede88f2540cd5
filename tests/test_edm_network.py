"""EDM's networks: equal to the reference's, of the published size."""

import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.config import dataset_info, generator
from jaxrobust.generators import edm
from jaxrobust.generators.edm import denoising, network, released
from tests.helpers import nvidia_files

pytestmark = pytest.mark.usefixtures('compiled_once')
FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
ARCHITECTURES = {'ddpm++': 'edm_ddpmpp', 'ncsn++': 'edm_ncsnpp'}


def read(name):
  """(parameters by the reference's names, its inputs and outputs)."""
  with np.load(FIXTURES / f'{name}.npz') as file:
    found = dict(file)
  parameters = {x[2:]: found.pop(x) for x in list(found) if x.startswith('p/')}
  return parameters, found


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_forward_passes_are_the_references(architecture, tmp_path):
  """From a file as NVIDIA releases it: F, D, and D with labels of augmentation.

  The reference computed in float32: so near float64 comes to it.
  """
  parameters, file = read(ARCHITECTURES[architecture])
  path = tmp_path / 'network.pkl'
  path.write_bytes(nvidia_files.dump({'ema': parameters}, ('model.enc', 'model.dec')))
  params = released.read(path)
  net = hk.without_apply_rng(
    hk.transform(lambda *x: network.UNet(architecture, 8, (1, 2), 1, (4,), 0.1, 3)(*x))
  )
  count = sum(x.size for x in jax.tree.leaves(params))
  frequencies = params.get('unet', {}).get('frequencies', np.zeros(0)).size
  assert count - frequencies == {'ddpm++': 48_379, 'ncsn++': 48_963}[architecture]

  nhwc = lambda x: x.transpose(0, 2, 3, 1)
  images, sigmas, labels = nhwc(file['x']), file['sigma'], file['augment']
  skip, out, into, _ = (
    np.asarray(x).reshape(-1, 1, 1, 1) for x in denoising.precondition(sigmas, 0.5)
  )
  # F of x is what D makes of x / c_in, less what it skips.
  batch = np.concatenate([images, images, images / into]), np.tile(sigmas, 3)
  given = np.tile(file['c'].argmax(1), 3), np.concatenate([0 * labels, labels] * 2)[:6]
  given[1][4:] = 0

  @jax.jit
  def denoise(params, *inputs):
    return denoising.denoiser(lambda *x: net.apply(params, *x), 0.5)(*inputs)

  for tolerance, kind in ((1e-4, np.float32), (1e-6, np.float64)):
    with jax.enable_x64(kind == np.float64):
      cast = jax.tree.map(kind, (params, *batch, given[1]))
      found = denoise(*cast[:3], given[0], cast[3])
      assert found.dtype == kind
    denoised, augmented, last = np.split(np.asarray(found), 3)
    raw = (last - skip * images / into) / out
    for name, value in (
      *(('denoised', denoised), ('denoised_augment', augmented)),
      ('raw', raw),
    ):
      wanted = nhwc(file[name])
      error = np.abs(value - wanted).max() / np.abs(wanted).max()
      assert error < tolerance, (name, kind)


@pytest.mark.parametrize(
  'architecture, classes, count',
  [
    ('ddpm++', 0, 55_733_891),
    ('ddpm++', 10, 55_735_299),
    ('ddpm++', 100, 55_746_819),
    ('ncsn++', 0, 56_397_827),
    ('ncsn++', 10, 56_400_643),
    ('ncsn++', 100, 56_423_683),
  ],
)
def test_published_sizes(architecture, classes, count):
  settings = generator.get_config('edm').generator
  settings.network.architecture = architecture
  settings.network.conditional = bool(classes)
  info = dataset_info.INFO['cifar100' if classes == 100 else 'cifar10']
  net = edm.make_network(settings, info)
  like = jax.eval_shape(
    net.init,
    jax.random.key(0),
    *(jnp.zeros((1, 32, 32, 3)), jnp.zeros(1), jnp.zeros(1, int)),
  )
  frequencies = 128 if architecture == 'ncsn++' else 0  # drawn, not trained
  assert sum(x.size for x in jax.tree.leaves(like)) - frequencies == count
  # Attention: 16x16 in four blocks down and the last up, and once in the middle.
  attended = {x.split('/')[1] for x in like if x.endswith('qkv')}
  down = {f'enc_16x16_block{i}' for i in range(4)}
  assert attended == {*down, 'dec_8x8_in0', 'dec_16x16_block4'}


def test_resampling_by_hand():
  images = np.float32(np.arange(16)).reshape(1, 4, 4, 1)
  plain = np.array([1.0, 1.0])
  found = network._down(images, plain)
  np.testing.assert_allclose(found[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
  doubled = network._up(images, plain)
  np.testing.assert_array_equal(doubled, images.repeat(2, 1).repeat(2, 2))
  # Three quarters of the pixel and one of the neighbour; nothing beyond the edge.
  row = network._up(np.float32([4.0, 8.0]).reshape(1, 2, 1, 1), np.array([1, 3, 3, 1]))
  np.testing.assert_allclose(row[0, :, 0, 0], np.array([3, 5, 7, 6]) * 0.75)


@pytest.mark.parametrize(
  'sigma, skip, out, into, noise, weight',
  [
    (0.002, 0.999984, 0.001999984, 1.999984, -1.553652, 250004),
    (0.1, 0.96153846, 0.098058068, 1.9611614, -0.57564627, 104),
    (0.5, 0.5, 0.35355339, 1.4142136, -0.1732868, 8),
    (1, 0.2, 0.4472136, 0.89442719, 0, 5),
    (10, 0.0024937656, 0.49937617, 0.099875234, 0.57564627, 4.01),
    (80, 3.9060974e-5, 0.49999023, 0.012499756, 1.0955067, 4.0001562),
  ],
)
def test_preconditioning_by_the_reference(sigma, skip, out, into, noise, weight):
  found = denoising.precondition(jnp.float32(sigma), 0.5)
  np.testing.assert_allclose(found, [skip, out, into, noise], rtol=1e-5, atol=1e-7)
  found = denoising.weight(jnp.float32(sigma), 0.5)
  np.testing.assert_allclose(found, weight, rtol=1e-5)


@pytest.mark.parametrize('moment', [0.25, 0.4])
def test_the_loss_of_a_network_of_zeros(moment):
  """1 for data of the deviation it is scaled by; else as its second moment says."""
  rng, count = np.random.RandomState(0), 2000
  shape = (count, 4, 4, 3)
  images, noise = (np.float32(rng.normal(size=shape)) for _ in range(2))
  images *= moment**0.5
  zero = denoising.denoiser(lambda x, levels: jnp.zeros_like(x), 0.5)
  for sigma in (0.01, 0.5, 20.0):
    sigmas = jnp.full(count, sigma)
    found = denoising.loss(zero, images, sigmas, noise, 0.5).mean()
    skip = 0.25 / (sigma**2 + 0.25)
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    expected = weight * (skip**2 * sigma**2 + (1 - skip) ** 2 * moment)
    if moment == 0.25:
      assert expected == pytest.approx(1)
    # 96,000 squares: four of their deviations, sqrt(2 / 96,000).
    assert float(found) == pytest.approx(expected, rel=0.02)
