"""Phases of training, by hand: one number a network, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrobust.data import pipeline
from jaxrobust.distributed import parallel
from jaxrobust.generators import recipe as recipes

RATE, DECAY, BATCH = 0.5, 0.75, 16


def follow(params, state, batch, rngs):
  """a goes to the mean slot of its part; the state counts what it saw."""
  slot = batch.slots.astype(jnp.float32)
  loss = jnp.mean((params['a'] - slot) ** 2) / 2
  return loss, ({**state, 'seen': state['seen'] + jnp.mean(slot)}, {'own': slot.max()})


def chase(params, state, batch, rngs):
  """b goes to a."""
  return (params['b'] - params['a']) ** 2 / 2, (state, {})


def make_recipe(**changes):
  phase = recipes.Phase('a', 'loss_a', follow, (), num_parts=2, parts=(1, 0))
  sgd = recipes.Optimizer(optax.sgd(RATE), lambda step: RATE)
  fields = {
    'init_fn': lambda rng: (
      {'a': jnp.float32(3.0), 'b': jnp.float32(1.0)},
      {'seen': jnp.float32(0.0), 'calls': jnp.float32(0.0)},
    ),
    'optimizers': {'a': sgd, 'b': sgd},
    'phases': (
      phase._replace(**changes),
      recipes.Phase('b', 'loss_b', chase, (), interval=3, decay_fn=lambda step: DECAY),
    ),
    'averaged_fn': lambda params, state: {'b': params['b']},
    'after_fn': lambda state: {
      **state.net_state,
      'calls': state.net_state['calls'] + state.step + 1,
    },
  }
  return recipes.Recipe(**fields)


def run(recipe, num_steps, start=0, state=None):
  """(state, metrics of each iteration) on all devices."""
  step = recipes.make_step(recipe, 0, start)
  if state is None:
    state = parallel.replicate(recipes.init_state(recipe, 0))
  slots = np.arange(BATCH, dtype=np.int32)
  batch = parallel.shard(
    pipeline.Batch(np.zeros((BATCH, 1, 1, 1), np.uint8), 0 * slots, slots < 0, slots)
  )
  found = []
  for _ in range(num_steps):
    state, metrics = step(state, batch)
    found.append({k: [float(x[0]) for x in v] for k, v in metrics.items()})
  return state, found


def by_hand(num_steps, limit=np.inf):
  """a, b, their average and the state, by the meaning of the phases."""
  a, b, averaged, seen, calls, losses = 3.0, 1.0, 1.0, 0.0, 0.0, []
  slots = np.arange(BATCH)
  for step in range(num_steps):
    losses.append({'loss_a': [], 'loss_b': []})
    for part in (1, 0):
      mine = slots[slots % 2 == part]
      losses[-1]['loss_a'].append(np.mean((a - mine) ** 2) / 2)
      gradient = np.mean(a - mine)
      if abs(gradient) < limit:
        a, seen = a - RATE * gradient, seen + mine.mean()
    if step % 3 == 0:
      losses[-1]['loss_b'].append((b - a) ** 2 / 2)
      b -= RATE * (b - a)
      averaged = DECAY * averaged + (1 - DECAY) * b
    calls += step + 1
  return a, b, averaged, seen, calls, losses


def values(state):
  state = parallel.unreplicate(state)
  net_state = state.net_state
  return [
    *(state.params[x] for x in 'ab'),
    state.averaged['b'],
    net_state['seen'],
    net_state['calls'],
  ]


def test_parts_intervals_averages_and_the_end_of_an_iteration():
  state, metrics = run(make_recipe(), 5)
  *expected, losses = by_hand(5)
  # Sums of a few float32 numbers below 100.
  np.testing.assert_allclose(values(state), expected, rtol=1e-6)
  for found, wanted in zip(metrics, losses, strict=True):
    assert found['loss_a'] == pytest.approx(wanted['loss_a'], rel=1e-6)
    assert found.get('loss_b', []) == pytest.approx(wanted['loss_b'], rel=1e-6)
    # Means over devices of the greatest slot that each had in its part.
    assert found['own'] == [9.0, 8.0]


def test_a_run_that_goes_on_keeps_the_rhythm():
  """From iteration 2 on, where the next seldom phase comes at 3."""
  state, _ = run(make_recipe(), 2)
  state, _ = run(make_recipe(), 3, start=2, state=state)
  np.testing.assert_allclose(values(state), by_hand(5)[:5], rtol=1e-6)


def test_an_update_that_is_not_accepted_changes_nothing():
  limit = 4.5  # Of the gradients -5, -4, …: the first is not.
  recipe = make_recipe(accept_fn=lambda grads, _: optax.global_norm(grads) < limit)
  state, metrics = run(recipe, 4)
  *expected, _ = by_hand(4, limit)
  np.testing.assert_allclose(values(state), expected, rtol=1e-6)
  skipped = [x for found in metrics for x in found['loss_a_skipped']]
  assert skipped[0] == 1 and 0 in skipped
  assert int(state.step[0]) == 4


def test_the_schedule_counts_updates_that_are_skipped():
  """Adam's own count does not: its moments have seen nothing."""
  rates = [0.5, 0.25, 0.125, 0.0625]
  adam = optax.adam(lambda step: jnp.array(rates)[step])
  limit = 4.5  # Of the gradients of a, the first is greater.
  recipe = make_recipe(
    parts=(0,), accept_fn=lambda grads, _: optax.global_norm(grads) < limit
  )
  recipe = recipe._replace(
    optimizers={**recipe.optimizers, 'a': recipes.Optimizer(adam, lambda step: 0.0)}
  )
  fresh = recipes.init_state(recipe, 0)
  fresh.params['a'] = jnp.float32(12.0)  # A gradient of 5, where the mean slot is 7.
  state, _ = run(recipe, 1, state=parallel.replicate(fresh))
  near = parallel.unreplicate(state)
  near.params['a'] = np.float32(8.0)
  state, _ = run(recipe, 1, start=1, state=parallel.replicate(near))
  moments, schedule = parallel.unreplicate(state).opt_state['a']
  assert (int(moments.count), int(schedule.count)) == (1, 2)
  # Adam's first update is by the learning rate, now the second.
  assert float(state.params['a'][0]) == pytest.approx(8.0 - rates[1], rel=1e-6)


def test_what_is_not_a_number_is_not_accepted():
  def broken(params, state, batch, rngs):
    return params['a'] * jnp.nan, ({**state, 'seen': jnp.float32(jnp.nan)}, {})

  recipe = make_recipe(
    loss_fn=broken, accept_fn=lambda grads, _: jnp.isfinite(optax.global_norm(grads))
  )
  state, _ = run(recipe, 1)
  assert values(state)[0] == 3.0 and values(state)[3] == 0.0


def test_neighbours_that_come_together_are_one_program():
  always = recipes.Phase('a', 'train/a', follow, ())
  other = always._replace(network='b', metric='train/b')
  seldom = other._replace(metric='train/penalty', interval=16)
  half = always._replace(num_parts=4)
  of = lambda *phases: [
    (x.name, x.interval, x.parts)
    for x in recipes.make_programs(make_recipe()._replace(phases=phases), 0)
  ]
  end = 'end of iteration'
  assert of(always) == [(f'a by a, {end}', 1, (0,))]
  assert of(always, other, seldom) == [
    ('a by a, b by b', 1, (0,)),
    ('b by penalty', 16, (0,)),
    (end, 1, (0,)),
  ]
  four = half._replace(parts=(0, 1, 2, 3))
  assert of(four, half._replace(network='b', metric='train/b')) == [
    ('a by a', 1, (0, 1, 2, 3)),
    (f'b by b, {end}', 1, (0,)),
  ]


def test_every_use_of_randomness_has_its_own_keys():
  """By phase, stream, iteration, slot and seed; the slot alone says which image."""

  def draw(params, state, batch, rngs):
    draws = {stream: jax.vmap(jax.random.uniform)(rngs(stream)) for stream in 'xy'}
    return 0 * params['a'], (state, draws)

  def draws_of(slots, seed=0, step=0):
    """Of both phases and streams, by one device: [4, b]."""
    phases = tuple(recipes.Phase('a', f'loss{i}', draw, ('x', 'y')) for i in '01')
    recipe = make_recipe()._replace(phases=phases)
    state = recipes.init_state(recipe, seed)._replace(step=jnp.int32(step))
    batch = pipeline.Batch(jnp.zeros(len(slots)), slots, slots < 0, slots)
    updates = [recipes._make_update(recipe, index, seed) for index in (0, 1)]
    metrics = jax.pmap(
      lambda _: [update(state, batch, 0)[1] for update in updates],
      axis_name=parallel.AXIS,
      devices=jax.devices()[:1],
    )(jnp.zeros(1))
    return np.array([found[stream][0] for found in metrics for stream in 'xy'])

  slots = jnp.arange(4)
  first = draws_of(slots)
  others = [draws_of(slots, step=1), draws_of(slots, seed=1)]
  assert len(np.unique([first, *others])) == 3 * 4 * 4
  np.testing.assert_array_equal(draws_of(slots[2:]), first[:, 2:])
