"""How the networks of a generator are trained: phases, which make the loop's step.

An iteration runs the phases in their order. Each moves one network by its own loss; it
may come in some iterations only (lazy regularisation), see a part of the batch, or
reject an update. Beside parameters there is a state of other arrays, such as BatchNorm
statistics or the strength of augmentation. Whatever is random is drawn from (seed,
step, phase, global slot): no number depends on how a batch is spread over devices, and
a run that resumes repeats nothing and misses nothing.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrobust.distributed import parallel

# Sample i has the key fold_in(key(seed), i): that of training is of no sample.
_TRAINING = 2**32 - 1
_STREAMS = 2**16  # of a phase, at most


class State(NamedTuple):
  """What a fit is after `step` iterations.

  Attributes:
    params: parameters by network.
    net_state: arrays that phases change beside parameters, a tree.
    opt_state: of the optimizers, by network.
    averaged: what `Recipe.averaged_fn` takes, averaged over updates.
    step: completed iterations, int32 [].
  """

  params: dict[str, Any]
  net_state: Any
  opt_state: dict[str, Any]
  averaged: Any
  step: jax.Array


class Optimizer(NamedTuple):
  """How a network moves.

  Attributes:
    transformation: from the gradient's mean over the batch, learning rate included.
    learning_rate_fn: `completed iterations -> learning rate`, to be written.
  """

  transformation: optax.GradientTransformation
  learning_rate_fn: Callable[[int], Any]


class Phase(NamedTuple):
  """A kind of update.

  Attributes:
    network: that moves.
    metric: name under which the loss is written.
    loss_fn: `(params, net_state, batch, rngs) -> (loss [], (net_state, metrics))` of a
      device's `pipeline.Batch`: params of all networks; `rngs(stream)` has a key an
      image. Devices average what it returns, net_state too.
    streams: names of what is random in it; new ones come last, or old runs change.
    interval: it comes in every so manyth iteration, from the first on.
    num_parts: into which the batch is cut: an image is in that of its slot modulo their
      number.
    parts: with which it runs in an iteration, one after the other.
    decay_fn: `completed iterations -> decay` of the average, which moves after each
      of its updates; None where it stays.
    accept_fn: `(gradient, metrics) -> bool []`: whether the update is made; if not, the
      schedule of the learning rate alone goes on. None for always; then a loss that is
      not finite ends the run.
    norm_metric: name under which the norm of the gradient is written, '' for none.
  """

  network: str
  metric: str
  loss_fn: Callable
  streams: tuple[str, ...]
  interval: int = 1
  num_parts: int = 1
  parts: tuple[int, ...] = (0,)
  decay_fn: Callable[[jax.Array], Any] | None = None
  accept_fn: Callable[..., jax.Array] | None = None
  norm_metric: str = ''


class Recipe(NamedTuple):
  """How a generator is trained.

  Attributes:
    init_fn: `rng -> (params, net_state)`.
    optimizers: by network.
    phases: in their order.
    averaged_fn: `(params, net_state) -> tree` of what is averaged.
    variables_fn: `(averaged, net_state) -> variables` of the generator.
    after_fn: `State -> net_state` after an iteration, None for no change.
  """

  init_fn: Callable
  optimizers: dict[str, Optimizer]
  phases: tuple[Phase, ...]
  averaged_fn: Callable
  variables_fn: Callable = lambda averaged, net_state: averaged
  after_fn: Callable[[State], Any] | None = None


class Program(NamedTuple):
  """What devices run of an iteration.

  Attributes:
    fn: `(state, batch, part int32 []) -> (state, metrics)` of a device.
    interval: it runs in every so manyth iteration, from the first on.
    parts: of the batch, for each of which it runs.
    num_parts: into which the batch is cut.
    name: what it moves.
  """

  fn: Callable
  interval: int
  parts: tuple[int, ...]
  num_parts: int
  name: str


def init_state(recipe: Recipe, seed: int) -> State:
  """The state before the first iteration."""
  params, net_state = recipe.init_fn(_stream(seed, 0))
  return State(
    params=params,
    net_state=net_state,
    opt_state={
      name: optimizer.transformation.init(params[name])
      for name, optimizer in recipe.optimizers.items()
    },
    averaged=recipe.averaged_fn(params, net_state),
    step=jnp.zeros([], jnp.int32),
  )


def make_programs(recipe: Recipe, seed: int) -> list[Program]:
  """The programs of an iteration, in their order.

  Neighbours that come in every iteration, once, are one program; any other phase is
  one by itself, so that nothing is compiled twice.
  """
  units = [
    Program(
      _make_update(recipe, index, seed),
      phase.interval,
      phase.parts,
      phase.num_parts,
      f'{phase.network} by {phase.metric.removeprefix("train/")}',
    )
    for index, phase in enumerate(recipe.phases)
  ]
  # The end of an iteration sees no image: it joins the last phase if that is possible.
  end = units[-1]._replace(fn=_make_finish(recipe), interval=1, name='end of iteration')
  units.append(end._replace(parts=end.parts[:1]))
  when = lambda unit: (unit.interval, unit.parts, unit.num_parts)
  together = lambda x: when(x) if x.interval == len(x.parts) == 1 else x
  groups = [list(group) for _, group in itertools.groupby(units, together)]
  return [
    group[0]._replace(
      fn=_chain([unit.fn for unit in group]),
      name=', '.join(unit.name for unit in group),
    )
    for group in groups
  ]


def make_step(recipe: Recipe, seed: int, start: int) -> Callable:
  """The step of the loop, on all devices.

  Args:
    recipe: of the generator.
    seed: of all that is random.
    start: completed iterations before the first call.

  Returns:
    `(state, batch) -> (state, metrics)`; a metric is a list of those of its parts.
  """
  programs = make_programs(recipe, seed)
  mapped = [parallel.pmap(program.fn, donate_argnums=0) for program in programs]
  numbers = itertools.count(start)
  most = max(program.num_parts for program in programs)
  parts = [parallel.replicate(np.int32(part)) for part in range(most)]

  def step(state, batch):
    done, metrics = next(numbers), {}
    for program, fn in zip(programs, mapped, strict=True):
      if done % program.interval:
        continue
      for part in program.parts:
        state, found = fn(state, batch, parts[part])
        for name, value in found.items():
          metrics.setdefault(name, []).append(value)
    return state, metrics

  return step


def _make_update(recipe: Recipe, index: int, seed: int):
  """A phase as a function of a device."""
  phase = recipe.phases[index]
  optimizer = recipe.optimizers[phase.network].transformation

  def update(state: State, batch, part):
    if phase.num_parts > 1:
      cut = lambda x: x.reshape(-1, phase.num_parts, *x.shape[1:])[:, part]
      batch = jax.tree.map(cut, batch)

    def rngs(stream):
      number = index * _STREAMS + 1 + phase.streams.index(stream)
      rng = jax.random.fold_in(_stream(seed, number), state.step)
      return parallel.key_per_slot(rng, batch.slots)

    def loss_fn(own):
      params = {**state.params, phase.network: own}
      return phase.loss_fn(params, state.net_state, batch, rngs)

    before = state.params[phase.network]
    (loss, (net_state, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      before
    )
    metrics = {phase.metric: loss, **metrics}
    grads, net_state, metrics = parallel.mean_over_devices((grads, net_state, metrics))
    if phase.norm_metric:
      metrics[phase.norm_metric] = optax.global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state[phase.network], before)
    params = {**state.params, phase.network: optax.apply_updates(before, updates)}
    averaged = state.averaged
    if phase.decay_fn:
      averaged = optax.incremental_update(
        recipe.averaged_fn(params, net_state), averaged, 1 - phase.decay_fn(state.step)
      )
    moved = state._replace(
      params=params,
      net_state=net_state,
      opt_state={**state.opt_state, phase.network: opt_state},
      averaged=averaged,
    )
    if phase.accept_fn is None:
      return moved, metrics
    accepted = phase.accept_fn(grads, metrics)
    metrics[f'{phase.metric}_skipped'] = 1.0 - accepted
    return _choose(accepted, moved, state), metrics

  return update


def _choose(accepted: jax.Array, moved: State, state: State) -> State:
  """The state after an update that may be skipped, which the schedule counts anyway."""
  counts = lambda x: isinstance(x, optax.ScaleByScheduleState)
  choose = lambda new, old: new if counts(new) else jnp.where(accepted, new, old)
  return jax.tree.map(choose, moved, state, is_leaf=counts)


def _make_finish(recipe: Recipe):
  """The end of an iteration as a function of a device."""

  def finish(state: State, batch, part):
    del batch, part
    net_state = recipe.after_fn(state) if recipe.after_fn else state.net_state
    return state._replace(net_state=net_state, step=state.step + 1), {}

  return finish


def _chain(fns: list[Callable]):
  """One function after the other."""

  def run(state, batch, part):
    metrics = {}
    for fn in fns:
      state, found = fn(state, batch, part)
      metrics |= found
    return state, metrics

  return run


def _stream(seed: int, number: int) -> jax.Array:
  """The root key of one use of randomness; 0 is that of initialisation."""
  training = jax.random.fold_in(jax.random.key(seed), _TRAINING)
  return jax.random.fold_in(training, number)
