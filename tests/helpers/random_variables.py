"""Parameters and BatchNorm state as a trained network might have, at no cost."""

import numpy as np

from jaxrobust.models import architecture


def random_variables(name, num_classes, channels, counter=5000, dtype=np.float32):
  """(params, net_state) of a network; logits of images come out of order 1.

  With many updates counted, Haiku's running sums equal its averages.
  """
  rng = np.random.default_rng(0)
  shapes = architecture.template(architecture.Architecture(name, num_classes, channels))
  params, net_state = {}, {}
  for module, leaves in shapes[0].items():
    params[module] = {}
    for leaf, x in leaves.items():
      values = rng.standard_normal(x.shape)
      if leaf == 'w':
        values /= np.sqrt(np.prod(x.shape[:-1]))
      elif leaf == 'scale':
        values = rng.uniform(0.5, 1.5, x.shape)
      else:
        values *= 0.1
      params[module][leaf] = values.astype(dtype)
  for module, leaves in shapes[1].items():
    shape = leaves['average'].shape
    average = rng.uniform(0.5, 1.5, shape)
    if module.endswith('mean_ema'):
      average = 0.1 * rng.standard_normal(shape)
    average = average.astype(dtype)
    net_state[module] = {
      'counter': np.array(counter, np.int32),
      'hidden': average,
      'average': average,
    }
  return params, net_state


def assert_same(a, b):
  """Same names, types and bits."""
  for x, y in zip(a, b, strict=True):
    assert set(x) == set(y)
    for module in x:
      assert set(x[module]) == set(y[module])
      for leaf in x[module]:
        found, wanted = np.asarray(x[module][leaf]), np.asarray(y[module][leaf])
        assert found.dtype == wanted.dtype, (module, leaf)
        np.testing.assert_array_equal(found, wanted, f'{module} {leaf}')
