"""How often an attack calls the network, in its program and while it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.attacks import norms, suites
from jaxrobust.attacks.norms import Ball

RNG = np.random.default_rng(0)
IMAGES = RNG.random((2, 5, 5, 1)).astype(np.float32)
LABELS = np.zeros(2, np.int32)
BALLS = {'linf': 0.1, 'l2': 0.3, 'l1': 0.8}


def steadfast(x):
  """Logits that depend on the image and are right for all."""
  return jnp.stack([9 + x.mean((1, 2, 3)), *(x[:, i, i, 0] for i in range(4))], -1)


def attempt(name: str, ball: Ball, network):
  [(_, attack)] = suites.get(name, ball)
  keys = jax.random.split(jax.random.key(0), len(IMAGES))
  return attack, lambda x: attack.attempt(network, keys, x, jnp.asarray(LABELS), 0)


@pytest.mark.parametrize('norm', BALLS)
@pytest.mark.parametrize(
  'name, copies',
  # One ranks the targets of a targeted attack, and one looks for FAB's errors.
  [('apgd-ce', 1), ('apgd-t', 2), ('square', 1), ('fab-t', 3)],
)
def test_a_program_holds_the_network_as_often_as_it_must(name, copies, norm):
  """Each copy of a large network costs seconds or minutes of compiling."""
  network = lambda x: jnp.sinh(steadfast(x))  # which nothing else uses
  _, program = attempt(name, norms.get(norm, BALLS[norm]), network)
  assert str(jax.make_jaxpr(program)(IMAGES)).count(' sinh ') == copies


@pytest.mark.parametrize('norm', BALLS)
@pytest.mark.parametrize(
  'name', ['apgd-ce:num_steps=7', 'square:num_queries=7', 'fab-t:num_steps=7']
)
def test_turns_are_as_many_as_plans_count(name, norm):
  calls = []

  def network(x):
    jax.debug.callback(lambda: calls.append(0))
    return steadfast(x)

  attack, program = attempt(name, norms.get(norm, BALLS[norm]), network)
  jax.block_until_ready(jax.jit(program)(IMAGES))
  jax.effects_barrier()
  name = name.partition(':')[0]
  phases = 3 if (name, norm) == ('apgd-ce', 'l1') else 1
  expected = {'apgd-ce': 7 + phases, 'square': 7 + 2, 'fab-t': 1 + 2 * 7}
  assert len(calls) == expected[name]
  # FAB calls twice a turn.
  rounded_up = {'apgd-ce': -(-7 // phases) + 1, 'square': 9, 'fab-t': 7}
  assert attack.turns == rounded_up[name]
