"""Every attack in every ball, on images and logits of every float type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.attacks import norms, suites
from jaxrobust.attacks.robustness import evaluate_robustness

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(16, 5))
IMAGES = RNG.random((8, 4, 4, 1))
LABELS = ((IMAGES.reshape(8, 16) - 0.5) @ WEIGHTS).argmax(-1).astype(np.int32)
BALLS = {'linf': 0.1, 'l2': 0.3, 'l1': 0.8}
# Types of images and of logits. What is computed in the logits' type must not leak into
# what an attack carries from step to step, nor the other way.
TYPES = [
  ('float32', 'float64'),
  ('float32', 'bfloat16'),
  ('float32', 'float16'),
  ('float64', 'float64'),
  ('bfloat16', 'bfloat16'),
  ('float16', 'float32'),
]
ATTACKS = [
  'apgd-ce:num_steps=3',
  'apgd-ce:num_steps=3:samples=2',
  'apgd-dlr:num_steps=3',
  'apgd-t:num_steps=3',
  'fab:num_steps=3',
  'fab-t:num_steps=3',
  'square:num_queries=3',
  'multitargeted:num_steps=4',
  'pgd:num_steps=2',
]


def linear(dtype):
  weights = jnp.asarray(WEIGHTS, dtype)
  return lambda x, *rng: (x.reshape(len(x), 16) - 0.5).astype(dtype) @ weights


@pytest.mark.parametrize('norm', BALLS)
@pytest.mark.parametrize('name', ATTACKS)
def test_images_keep_their_type(name, norm, float64):
  """As compiling would find out, without compiling."""
  [(_, attack)] = suites.get(name, norms.get(norm, BALLS[norm]))
  keys = jax.random.split(jax.random.key(0), 8)
  for of_images, of_logits in TYPES:
    network = linear(of_logits)
    found = jax.eval_shape(
      lambda x, network=network: attack(network, keys, x, jnp.asarray(LABELS)),
      jax.ShapeDtypeStruct(IMAGES.shape, of_images),
    )
    assert (found.shape, found.dtype) == (IMAGES.shape, of_images)


@pytest.mark.parametrize(
  ('name', 'norm', 'of_images', 'of_logits'),
  [
    ('fab-t:num_steps=20', 'l1', 'float64', 'float64'),
    ('fab:num_steps=20', 'l2', 'float32', 'bfloat16'),
    ('apgd-ce:num_steps=20', 'l1', 'float16', 'float32'),
    ('square:num_queries=300', 'l2', 'float16', 'float16'),
  ],
)
def test_attacks_succeed_in_any_type(name, norm, of_images, of_logits, float64):
  """A ball in which a linear network has an error for every image but few."""
  epsilon = 3 * BALLS[norm]
  [(_, attack)] = suites.get(name, norms.get(norm, epsilon))
  images, network = jnp.asarray(IMAGES, of_images), linear(of_logits)
  labels = network(images).argmax(-1)
  keys = jax.random.split(jax.random.key(0), 8)
  found = jax.jit(lambda x: attack(network, keys, x, labels))(images)
  assert (network(found).argmax(-1) != labels).mean() >= 0.75
  moved = attack.ball.distance(jnp.float64(found), jnp.float64(images))
  # As many roundings of values up to 1 as the norm sums up.
  rounding = {'linf': 1, 'l2': 4, 'l1': 16}[norm] * jnp.finfo(of_images).eps
  assert 0 < moved.max() <= epsilon + rounding


@pytest.mark.parametrize('norm', BALLS)
def test_the_size_of_the_ball_may_be_traced(norm):
  """So that what is compiled serves any epsilon."""
  keys, labels = jax.random.split(jax.random.key(0), 8), jnp.asarray(LABELS)
  make = type(norms.get(norm, 0.5))
  for name in ATTACKS:

    def attacked(images, epsilon, name=name):
      [(_, attack)] = suites.get(name, make(epsilon))
      return attack(linear('float32'), keys, images, labels)

    pixels = jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32)
    found = jax.eval_shape(attacked, pixels, jax.ShapeDtypeStruct((), jnp.float32))
    assert (found.shape, found.dtype) == (IMAGES.shape, jnp.float32)


def test_a_network_in_double_precision_is_judged(float64):
  outcome = evaluate_robustness(
    linear('float64'),
    IMAGES,
    LABELS,
    'linf',
    0.3,
    'apgd-ce:num_steps=3,fab-t:num_steps=10,square:num_queries=5',
    progress=None,
  )
  assert outcome.clean.all() and outcome.robust_accuracy <= 0.25
