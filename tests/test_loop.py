"""The loop that classifiers and generators share: what it says while it waits."""

import contextlib
from typing import NamedTuple

import jax
import numpy as np

from jaxrobust.distributed import parallel
from jaxrobust.runs import waiting
from jaxrobust.training import loop


class State(NamedTuple):
  weights: np.ndarray
  step: np.ndarray


def test_compiling_is_said_of_every_training_and_of_its_first_step_alone(
  tmp_path, monkeypatch
):
  said, now = [], []

  @contextlib.contextmanager
  def listening(what, **_):
    said.append(what)
    now.append(what)
    yield lambda text: None
    now.pop()

  monkeypatch.setattr(waiting, 'waiting', listening)
  during = []
  update = parallel.pmap(lambda state: state._replace(step=state.step + 1))

  def step(state, batch):
    del batch
    during.append([*now])
    return update(state), {'train/loss': parallel.replicate(np.float32(1))}

  devices = jax.local_device_count()
  run = loop.Loop(tmp_path, State(np.zeros(2), np.int32(0)), keep=1)
  run.train(
    step,
    [np.zeros((devices, 1), np.float32)] * 3,
    intervals=loop.Intervals(num_steps=3, log=3, checkpoint=3),
    batch_size=devices,
    losses=['train/loss'],
    schedules={},
    note_fn=lambda figures: '',
  )
  run.checkpoints.close()
  compiling = 'compiling the training step'
  assert during == [[compiling], [], []] and said.count(compiling) == 1
