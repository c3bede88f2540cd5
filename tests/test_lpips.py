"""LPIPS against its formula in float64, and what it refuses."""

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.models import feature_networks

# Of AlexNet: channels in and out, kernel, stride, padding, whether a maximum precedes.
LAYERS = [
  ('net.slice1.0', 3, 64, 11, 4, 2, False),
  ('net.slice2.3', 64, 192, 5, 1, 2, True),
  ('net.slice3.6', 192, 384, 3, 1, 1, True),
  ('net.slice4.8', 384, 256, 3, 1, 1, False),
  ('net.slice5.10', 256, 256, 3, 1, 1, False),
]


@pytest.fixture(scope='module')
def state():
  """Random weights under the names of the package lpips, in PyTorch's layout."""
  rng, found = np.random.default_rng(0), {}
  for number, (name, before, after, size, *_) in enumerate(LAYERS):
    kernel = rng.normal(size=(after, before, size, size)) / (before * size**2) ** 0.5
    found[f'{name}.weight'] = np.float32(kernel)
    found[f'{name}.bias'] = np.float32(0.1 * rng.normal(size=after))
    weights = rng.uniform(size=(1, after, 1, 1))
    found[f'lin{number}.model.1.weight'] = np.float32(weights)
  return found


def windows(x, size, stride):
  """[C, H, W] → [h, w, C, size, size]."""
  found = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  return found[:, ::stride, ::stride].transpose(1, 2, 0, 3, 4)


def activations(state, image):
  """Of one image [H, W, 3] in 0..255, after each layer, channels of unit length."""
  x = np.float64(image).transpose(2, 0, 1) / 127.5 - 1
  shift, scale = [-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]
  x = (x - np.reshape(shift, (3, 1, 1))) / np.reshape(scale, (3, 1, 1))
  for name, _, _, size, stride, pad, pooled in LAYERS:
    if pooled:
      x = windows(x, 3, 2).max((3, 4)).transpose(2, 0, 1)
    x = windows(np.pad(x, ((0, 0), (pad, pad), (pad, pad))), size, stride)
    x = np.einsum('hwcij,ocij->ohw', x, np.float64(state[f'{name}.weight']))
    x = np.maximum(x + state[f'{name}.bias'][:, None, None], 0)
    yield x / (np.sqrt(np.square(x).sum(0)) + 1e-10)


def save(state, folder):
  path = epath.Path(folder) / 'lpips.safetensors'
  path.write_bytes(safetensors.numpy.save(state))
  return f'lpips:{path}'


def test_squared_distances_are_those_of_the_formula(state, tmp_path):
  images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
  network = feature_networks.network(save(state, tmp_path), batch_size=1)
  features = network.features(images)
  assert features.shape == (3, 5_760) and network.name == 'LPIPS (AlexNet)'
  whole = [list(activations(state, image)) for image in images]
  for i, j in ((0, 1), (1, 2)):
    wanted = sum(
      (np.square(x - y) * state[f'lin{number}.model.1.weight'][0]).sum(0).mean()
      for number, (x, y) in enumerate(zip(whole[i], whole[j], strict=True))
    )
    # Sums of up to 1,728 products in float32.
    found = np.square(np.float64(features[i] - features[j])).sum()
    assert found == pytest.approx(wanted, rel=1e-5)


def test_refusals(state, tmp_path):
  with pytest.raises(UserError, match='3 channels and at least 31 pixels, not'):
    feature_networks.network(save(state, tmp_path)).features(
      np.zeros((1, 8, 8, 1), np.uint8)
    )
  less = {key: x for key, x in state.items() if not key.startswith('lin3')}
  negative = state | {'lin2.model.1.weight': -state['lin2.model.1.weight']}
  for wrong in (less, negative):
    with pytest.raises(UserError, match='gives no LPIPS by AlexNet'):
      feature_networks.network(save(wrong, tmp_path))
  with pytest.raises(UserError, match='gives no LPIPS by AlexNet'):
    feature_networks.network('lpips:nowhere.safetensors')
