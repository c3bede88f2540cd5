"""Quality figures against closed forms, scipy and scikit-learn."""

import jax
import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import sklearn.neighbors
from etils import epath

from jaxrobust.analysis import distances, quality
from jaxrobust.data import __main__ as command_line
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.models import card, feature_networks, parameter_files
from jaxrobust.samples import sample_sets, stratified


def exact(mean, covariance, rng):
  """Rows whose sample mean and covariance are the given ones, up to rounding."""
  rows = rng.normal(size=(64, len(mean)))
  rows -= rows.mean(0)
  white = np.linalg.inv(np.linalg.cholesky(np.cov(rows.T)))
  return rows @ white.T @ np.linalg.cholesky(covariance).T + mean


def random_covariance(rng, n):
  root = rng.normal(size=(n, n))
  return root @ root.T + 0.1 * np.eye(n)


def test_frechet_distance_of_two_gaussians():
  """Diagonal covariances have the closed form sum (s - t)^2; float64 throughout."""
  rng = np.random.default_rng(0)
  means, stds = rng.normal(size=(2, 5)), rng.uniform(0.5, 2, (2, 5))
  sets = [exact(m, np.diag(s**2), rng) for m, s in zip(means, stds, strict=True)]
  wanted = np.square(means[0] - means[1]).sum() + np.square(stds[0] - stds[1]).sum()
  found = feature_networks.frechet_distance(*map(feature_networks.moments, sets))
  assert found == pytest.approx(wanted, rel=1e-10)
  assert feature_networks.frechet_distance(
    *[feature_networks.moments(sets[0])] * 2
  ) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_against_the_matrix_root_of_scipy():
  rng = np.random.default_rng(1)
  covariances = [random_covariance(rng, 6) for _ in range(2)]
  found = feature_networks.frechet_distance(
    *(feature_networks.moments(exact(np.zeros(6), c, rng)) for c in covariances)
  )
  root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
  wanted = np.trace(covariances[0] + covariances[1] - 2 * root.real)
  assert found == pytest.approx(wanted, rel=1e-8)


def test_moments_do_not_depend_on_batches_and_do_not_cancel():
  """Far from 0, where a sum of squares would lose 12 of its 16 digits."""
  rows = np.random.default_rng(2).normal(size=(50, 3)) + 1e6
  found = feature_networks.Moments(3)
  for part in np.split(rows, [0, 1, 7, 30]):
    found.update(part)
  np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-14)
  np.testing.assert_allclose(found.covariance(), np.cov(rows.T), rtol=1e-7, atol=1e-9)
  with pytest.raises(UserError, match='at least 2'):
    feature_networks.moments(rows[:1]).covariance()


@pytest.fixture(scope='module')
def clouds():
  rng = np.random.default_rng(3)
  real = rng.normal(size=(150, 4)).astype(np.float32) + 30
  generated = rng.normal(size=(130, 4)).astype(np.float32) * 0.7 + 30.3
  generated[:3] = real[[5, 77, 149]]  # Memorised.
  return real, generated


def test_neighbours_are_those_of_sklearn(clouds, monkeypatch):
  monkeypatch.setattr(distances, '_BLOCK', 64)  # The last block is filled up.
  real, generated = clouds
  trees = sklearn.neighbors.NearestNeighbors(algorithm='brute').fit(np.float64(real))
  wanted, indices = trees.kneighbors(np.float64(generated), 5)
  found, found_indices = distances.nearest(generated, real, 5)
  np.testing.assert_array_equal(found_indices, indices)
  # sklearn expands the square, which leaves 1e-6 where the distance is 0.
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  assert found_indices[:3, 0].tolist() == [5, 77, 149] and not found[:3, 0].any()
  with pytest.raises(UserError, match='2 images have no 3 nearest'):
    distances.nearest(generated, real[:2], 3)


def test_neighbours_are_exact_among_far_clusters(monkeypatch):
  """Clusters 10,000 times as far apart as wide, where float32 sees no order."""
  monkeypatch.setattr(distances, '_BLOCK', 64)
  rng = np.random.default_rng(5)
  places = 1e4 * rng.normal(size=(4, 6))
  real, generated = (np.repeat(places, 40, 0) + rng.normal(size=(160, 6)) for _ in '12')
  across = np.linalg.norm(generated[:, None] - real[None], axis=-1)
  found, indices = distances.nearest(generated, real, 3)
  np.testing.assert_array_equal(indices, np.argsort(across, 1)[:, :3])
  np.testing.assert_allclose(found, np.sort(across, 1)[:, :3], rtol=1e-12)
  radii = np.sort(np.linalg.norm(real[:, None] - real[None], axis=-1), 1)[:, 3]
  inside = across <= radii
  density, coverage = quality.density_coverage(real, generated, 3)
  assert density == inside.sum() / (3 * 160) and coverage == inside.any(0).mean()


@pytest.mark.parametrize('sizes', [(12, 12), (9, 30), (30, 9)])
def test_fid_of_fewer_images_than_features(sizes, monkeypatch):
  """Both forms; the root of a rounded 0 is 1e-8 of the largest singular value."""
  monkeypatch.setattr(feature_networks, '_BLOCK', 8)
  rng = np.random.default_rng(6)
  sets = [rng.normal(size=(n, 20)) + 3 * (n == 12) for n in sizes]
  wanted = feature_networks.frechet_distance(*map(feature_networks.moments, sets))
  monkeypatch.setattr(feature_networks, 'moments', None)  # Which is not needed.
  assert feature_networks.fid(*sets) == pytest.approx(wanted, rel=1e-5)


def test_density_and_coverage_by_their_definition(clouds, monkeypatch):
  monkeypatch.setattr(distances, '_BLOCK', 64)
  # Without copies, whose distances equal radii.
  clouds = clouds[0], clouds[1][3:]
  real, generated = (np.float64(x) for x in clouds)
  k = 4
  among = np.linalg.norm(real[:, None] - real[None], axis=-1)
  radii = np.sort(among, 1)[:, k]
  across = np.linalg.norm(real[:, None] - generated[None], axis=-1)
  inside = across <= radii[:, None]
  density, coverage = quality.density_coverage(*clouds, k)
  # Counts: float32 could only misjudge a distance that nearly is its radius.
  assert np.abs(across - radii[:, None]).min() > 2e-6
  assert density == pytest.approx(inside.sum() / (k * len(generated)))
  assert coverage == pytest.approx(inside.any(1).mean())


@pytest.fixture(scope='module')
def repeated(tmp_path_factory):
  """A set of 40 digits, the first 12 of them training images."""
  real = datasets.load('digits', 'train').images
  images = np.concatenate([real[:12], 255 - real[12:40]])
  path = tmp_path_factory.mktemp('quality') / 'set'
  return sample_sets.write(
    path, [(images, np.zeros(40, int))], metadata={}, num_classes=1
  )


def test_command_on_features_of_another_network(repeated, tmp_path, capsys):
  """Pixels as features; the picture starts with what the generator repeated."""
  real = datasets.load('digits', 'train').images
  chosen = stratified.one_of_each_part(40, 20, 0)
  rows = [real, repeated.gather(chosen)]
  flat = [np.float32(images.reshape(len(images), -1)) for images in rows]
  file = tmp_path / 'pixels.npz'
  np.savez(file, network='pixels', real=flat[0], generated=flat[1])
  picture = tmp_path / 'neighbours.png'
  command = ['quality', str(repeated.path), '--dataset=digits', f'--features={file}']
  assert command_line.main([*command, '--count=20', f'--picture={picture}']) == 0
  shown = capsys.readouterr().out
  found = feature_networks.fid(*flat)
  assert 'features: pixels, 64' in shown and f'FID {found:.4f}' in shown
  assert '1000 of digits train, 20 generated' in shown and 'at 0: 6' in shown
  drawn = np.asarray(PIL.Image.open(picture))
  assert drawn.shape == (2 + 10 * 34, 2 + 6 * 34, 3)
  for row in range(6):
    pair = [drawn[2 + row * 34 :, 2 + j * 34 :][:32:4, :32:4, 0] for j in (0, 1)]
    for shown in pair:
      np.testing.assert_array_equal(shown, real[chosen[row], :, :, 0])
  assert command_line.main(command) == 1
  assert 'it needs [1000, 40]' in capsys.readouterr().err
  seen = [*command, '--train_images=100', '--validation_images=400']
  assert command_line.main(seen) == 1
  assert 'it needs [100, 40]' in capsys.readouterr().err


def test_features_of_a_classifier_do_not_depend_on_batches(tmp_path):
  described = card.Card(
    name='tiny',
    dataset='digits',
    norm='linf',
    epsilon=0.2,
    model={
      'name': 'wrn-10-1',
      'activation': 'swish',
      'mean': (0.5,),
      'std': (0.5,),
      'padding': 0,
    },
  )
  model = described.build()
  path = epath.Path(tmp_path) / 'tiny.npy'
  variables = jax.jit(model.init)(jax.random.key(0))
  parameter_files.export_npy(path, *variables)
  card.path_of(path).write_text(described.to_json())
  images = datasets.load('digits', 'test').images[:11]
  network = feature_networks.network(str(path), batch_size=2)
  wanted = jax.jit(model.features)(*variables, np.float32(images) / 255)
  # Sums of a few hundred products in another order.
  np.testing.assert_allclose(network.features(images), wanted, rtol=1e-4, atol=1e-5)
  assert network.name == 'tiny (penultimate layer)'
  with pytest.raises(UserError, match='trained on digits, which has other images'):
    feature_networks.network(str(path), dataset='mnist')
  with pytest.raises(UserError, match='it does not exist'):
    feature_networks.network(str(tmp_path / 'none.npy'))
