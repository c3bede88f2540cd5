"""Warnings that fire where they should, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust import models
from jaxrobust.attacks import checks
from jaxrobust.config import dataset_info, experiments
from jaxrobust.errors import UserError

LOGITS = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
NONE = np.zeros(8, bool)


def misleading(
  logits=LOGITS,
  again=None,
  alone=None,
  no_cross_entropy=NONE,
  no_margin=NONE,
  randomized=False,
):
  """The lines for five calls, of which the fourth may answer otherwise."""
  calls = np.stack([logits] * checks.CALLS)
  calls[3] = logits if again is None else again
  alone = logits[:4] if alone is None else alone
  return checks.misleading(calls, alone, no_cross_entropy, no_margin, randomized)


def softmax(logits):
  return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def test_an_honest_network_gets_no_warning():
  assert misleading() == []
  assert misleading(100 * LOGITS) == []
  assert misleading(again=LOGITS + 1, randomized=True) == []


def test_rounding_is_not_taken_for_randomness():
  assert misleading(again=LOGITS * (1 + 1e-6)) == []
  # A scale that changes is none either: directions are compared, as published.
  assert misleading(again=LOGITS * 2) == []


def test_random_logits():
  (line,) = misleading(again=LOGITS + 0.01)
  assert 'randomised: use suite autoattack-rand' in line
  # One image is enough.
  again = LOGITS.copy()
  again[3, 1] += 0.01
  assert len(misleading(again=again)) == 1


def test_logits_that_depend_on_the_rest_of_the_batch():
  (line,) = misleading(alone=LOGITS[:4] + 0.3)
  assert 'other images of its batch' in line and 'inference mode' in line
  # One image is enough, and what is not finite alone.
  for bad in (0.0, np.nan, np.inf):
    alone = LOGITS[:4].copy()
    alone[2] = bad
    assert len(misleading(alone=alone)) == 1
  # Rounding of half precision is none, nor is what differs between all calls.
  assert misleading(alone=LOGITS[:4].astype(np.float16)) == []
  assert len(misleading(again=LOGITS + 0.3, alone=LOGITS[:4] + 0.3)) == 1
  assert misleading(again=LOGITS + 1, alone=LOGITS[:4] + 1, randomized=True) == []


def test_logits_that_are_not_random_in_a_randomised_suite():
  (line,) = misleading(randomized=True)
  assert 'not randomised: use suite autoattack' in line


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(bad):
  logits = LOGITS.copy()
  logits[2, 1] = logits[5] = bad
  assert misleading(logits) == ['the logits of 2 of the first 8 images are not finite']


def test_random_logits_show_beside_some_that_are_not_finite():
  logits = LOGITS.copy()
  logits[2] = np.nan
  lines = misleading(logits, again=logits + 0.01)
  assert len(lines) == 2 and 'autoattack-rand' in lines[1]
  assert len(misleading(logits, again=logits + 0.01, randomized=True)) == 1


def test_no_finite_logits_at_all():
  logits = np.full_like(LOGITS, np.nan)
  assert 'of 8 of the first 8' in misleading(logits)[0]


def test_probabilities():
  (line,) = misleading(softmax(LOGITS))
  assert 'look like probabilities: leave out the softmax' in line
  one_hot = np.eye(4, dtype=np.float32)[[0, 1, 2, 3] * 2]
  assert len(misleading(one_hot)) == 1
  # Not those whose sum or range is another.
  assert misleading(softmax(LOGITS) * 1.01) == []
  assert misleading(LOGITS - LOGITS.mean(-1, keepdims=True) + 0.25) == []


def test_gradients_that_vanish():
  some = np.arange(8) < 3
  (line,) = misleading(no_cross_entropy=some)
  assert line.startswith('the gradient of the cross-entropy is zero for 3 of the first')
  assert 'masked' in line
  (line,) = misleading(no_margin=~NONE)
  assert 'the margin is zero for 8 of the first 8 images' in line
  assert len(misleading(no_margin=some, no_cross_entropy=some)) == 2


def test_warnings_are_one_line_each():
  logits = softmax(LOGITS)
  lines = misleading(logits, logits[::-1], no_cross_entropy=~NONE, no_margin=~NONE)
  assert len(lines) == 4 and not any('\n' in line for line in lines)


@pytest.mark.parametrize(
  ('shares', 'helped'),
  [
    ({'apgd-ce': 0.5, 'square': 0.497}, True),
    ({'apgd-ce': 0.5, 'square': 0.499}, False),
    ({'apgd-ce': 0.5, 'square': 0.5}, False),
    ({'apgd-ce': 0.9, 'apgd-t': 0.5, 'square:num_queries=9': 0.4}, True),
    # What stands before Square is compared, not what stood at first.
    ({'apgd-ce': 0.9, 'apgd-t': 0.5, 'square': 0.5}, False),
    # Not Square's doing.
    ({'square': 0.5, 'apgd-t': 0.1}, False),
    ({'apgd-ce': 0.5, 'square': 0.5, 'apgd-t': 0.1}, False),
    ({'square': 0.1}, False),
    ({}, False),
  ],
)
def test_square_helped(shares, helped):
  line = checks.square_helped(shares)
  assert bool(line) == helped and '\n' not in line


def test_square_helped_says_by_how_much():
  assert '10.00%' in checks.square_helped({'apgd-ce': 0.5, 'square': 0.4})


GOOD = {
  'uint8': (np.uint8([0, 255]), np.uint8),
  'float32': (np.float32([0, 1]), np.float32),
  'big-endian': (np.array([0, 1], '>f4'), np.float32),
  'float64': (np.array([0, 1], '>f8'), np.float64),
  'float16': (np.float16([0, 1]), np.float32),
  'bfloat16': (jnp.bfloat16([0, 1]), np.float32),
  'jax': (jnp.array([0, 1], jnp.bfloat16), np.float32),
  # A float32 above 1 by an eighth of a millionth.
  'rounding': (np.float32([-1e-9, 1.0000001]), np.float32),
}


@pytest.mark.parametrize('kind', GOOD)
def test_good_inputs(kind):
  values, dtype = GOOD[kind]
  labels = np.array([0, 2], '>i8')
  images, found = checks.inputs(values.reshape(2, 1, 1, 1), labels)
  assert images.dtype == dtype and images.dtype.isnative
  np.testing.assert_array_equal(
    images.ravel(), [0, 255 if dtype is np.uint8 else 1], strict=False
  )
  checks.classes(found, 3)


@pytest.mark.parametrize(
  ('images', 'labels', 'words'),
  [
    ([], [], ['no images']),
    ([0.5, 0.5], [1], ['labels of shape [1]', 'for 2 images', 'one integer each']),
    ([0.0, 255.0], [0, 1], ['images from 0 to 255', 'scale them to [0, 1]']),
    ([-1.0, 1.0], [0, 1], ['images from -1 to 1', 'scale them']),
    # So many digits that it is seen to be too much.
    ([0.0, 1.00002], [0, 1], ['images from 0 to 1.00002', 'scale them']),
    ([0.5, np.nan], [0, 1], ['not finite', 'floats in [0, 1]']),
    (np.array([0, 255]), [0, 1], ['type int64', 'uint8 from 0 to 255']),
    (np.array([0, 1j]), [0, 1], ['type complex128', 'uint8']),
    ([0.5, 0.5], [0, 3], ['labels from 0 to 3', 'use 0 to 2']),
    ([0.5, 0.5], [-1, 2], ['labels from -1 to 2']),
  ],
)
def test_bad_inputs(images, labels, words):
  images = np.float32(images) if isinstance(images, list) else images
  with pytest.raises(UserError) as e:
    images, labels = checks.inputs(
      images.reshape(-1, 1, 1, 1), np.array(labels, np.int32)
    )
    checks.classes(labels, 3)
  assert '\n' not in str(e.value)
  for word in words:
    assert word in str(e.value)


def test_images_without_the_axis_of_a_batch():
  with pytest.raises(
    UserError, match=r'shape \[4, 4, 3\]: give \[n, H, W, C\].*image\['
  ):
    checks.inputs(np.zeros((4, 4, 3), np.float32), np.zeros(4, int))


def program(network):
  return jax.make_jaxpr(network)(jnp.ones((1, 8, 8, 1))).jaxpr


def purified(images, network):
  """Images that were moved towards a smooth prediction, as purification does."""
  spread = lambda x: jnp.sum(jax.nn.logsumexp(network(x), axis=-1))
  return jax.lax.fori_loop(
    0, 3, lambda _, x: x - 0.1 * jax.jit(jax.grad(spread))(x), images
  )


def test_networks_that_optimise_at_test_time():
  weights = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
  plain = lambda x: x.reshape(len(x), 64) @ weights
  assert checks.optimizes(program(plain)) == ''
  for dynamic in (
    lambda x: plain(purified(x, plain)),
    jax.jit(lambda x: plain(purified(x, plain))),
    jax.checkpoint(lambda x: plain(jax.vjp(plain, x)[1](plain(x))[0])),
  ):
    line = checks.optimizes(program(dynamic))
    assert 'takes gradients to answer' in line and '\n' not in line


@pytest.mark.parametrize('name', ['wrn-10-1', 'preact-resnet-18'])
def test_networks_of_the_package_do_not_optimise(name):
  """Their convolutions have gradient rules of their own, which are not asked for."""
  info = dataset_info.INFO['digits']
  config = experiments.load('experiments/digits.py:wrn-10-1').model
  config = config.copy_and_resolve_references().unlock()
  config.name, config.remat = name, True
  model = models.from_config(config, info)
  variables = jax.eval_shape(model.init, jax.random.key(0))
  network = lambda v, x: model.apply(*v, x, batch_stats=False)[0]
  images = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
  forward = jax.make_jaxpr(network)(variables, images).jaxpr
  assert checks.optimizes(forward) == ''
  gradient = jax.grad(lambda x, v: network(v, x).sum())
  backward = jax.make_jaxpr(gradient)(images, variables).jaxpr
  assert checks.optimizes(backward)


@pytest.mark.parametrize(
  'found',
  [
    jax.ShapeDtypeStruct((1,), np.float32),
    jax.ShapeDtypeStruct((1, 1), np.float32),
    jax.ShapeDtypeStruct((2, 3), np.float32),
    jax.ShapeDtypeStruct((1, 3), np.int32),
    {'logits': jax.ShapeDtypeStruct((1, 3), np.float32)},
    (jax.ShapeDtypeStruct((1, 3), np.float32), None),
    None,
  ],
  ids=str,
)
def test_what_are_no_logits(found):
  with pytest.raises(UserError, match=r'one array of logits, float \[B, K\]') as e:
    checks.logits(found, (4, 4, 3))
  assert '[4, 4, 3]' in str(e.value) and '\n' not in str(e.value)
  checks.logits(jax.ShapeDtypeStruct((1, 2), jnp.bfloat16), (4, 4, 3))
