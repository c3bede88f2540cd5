"""Judges a network of your own: of Haiku, Flax or plain functions.

>>> import jax
>>> from jaxrobust.attacks.robustness import evaluate_robustness
>>> logits_fn = lambda images: images.sum(axis=(1, 2))  # [B, H, W, C] → [B, K]
>>> images = jax.random.uniform(jax.random.key(0), (20, 4, 4, 3))
>>> labels = logits_fn(images).argmax(axis=-1)
>>> outcome = evaluate_robustness(
...     logits_fn, images, labels, norm='linf', epsilon=0.05,
...     suite='apgd-ce:num_steps=10,square:num_queries=50', progress=None)
>>> float(outcome.clean.mean())
1.0
>>> bool(outcome.robust.mean() < 1)
True

With parameters, close over them; BatchNorm and dropout must be in inference mode:

    logits_fn = lambda images: model.apply(params, images, train=False)  # Flax
    logits_fn = lambda images: network.apply(params, state, None, images)[0]  # Haiku
"""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust.attacks import norms, suites
from jaxrobust.attacks.evaluation import Evaluator, Outcome
from jaxrobust.attacks.record import Record
from jaxrobust.distributed import parallel
from jaxrobust.runs import metrics


def evaluate_robustness(
  logits_fn,
  images,
  labels,
  norm: str,
  epsilon: float,
  suite: str = 'autoattack',
  *,
  batch_size: int = 256,
  seed: int = 0,
  folder: str | None = None,
  keep: int = 0,
  progress=metrics.Progress,
) -> Outcome:
  """Judges any network by a suite of attacks, on all devices.

  Args:
    logits_fn: images [B, H, W, C] in [0, 1] → logits [B, K], in jax; each image by
      itself (BatchNorm and dropout in inference mode). For 'autoattack-rand' it is
      (images, rng) → logits.
    images: [n, H, W, C], float in [0, 1] or uint8.
    labels: int [n] in [0, K).
    norm: 'linf', 'l2' or 'l1'.
    epsilon: in pixel values of [0, 1], such as 8 / 255.
    suite: one of `suites.SUITES`, or attacks with options: see `suites.get`.
    batch_size: images in a batch, over all devices.
    seed: of everything random.
    folder: where to keep the state of each image, so that an interrupted evaluation
      goes on when it is called again; None for nowhere.
    keep: how many adversarial images to return, of the first images.
    progress: (attack, total, unit) → an object with `advance` and `close`; None for
      no progress.

  Returns:
    An Outcome; `outcome.robust.mean()` is the robust accuracy.

  Raises:
    UserError: for arguments that cannot be meant.
  """
  images, labels = np.asarray(images), np.asarray(labels)
  chosen = suites.get(suite, norms.get(norm, epsilon))
  randomized = any(a.randomized for _, a in chosen)
  variables, pure_fn, fingerprint = _hoist(logits_fn, images.shape[1:], randomized)
  evaluator = Evaluator(
    pure_fn, chosen, batch_size=batch_size, seed=seed, thorough=True
  )
  identity = {
    'suite': suite,
    'norm': norm,
    'epsilon': float(epsilon),
    'seed': int(seed),
    'batch_size': batch_size,
    'keep': keep,
    'data': zlib.crc32(np.ascontiguousarray(images).tobytes()),
    'labels': zlib.crc32(np.ascontiguousarray(labels).tobytes()),
    'network': fingerprint,
  }
  return evaluator(
    parallel.replicate(variables),
    images,
    labels,
    keep=keep,
    record=Record(len(images), folder, identity),
    progress=progress,
  )


def _hoist(logits_fn, shape, randomized: bool):
  """The arrays that a function closes over, the function of them, and checksums.

  Compiled as constants, the parameters of a large network would be copied into every
  program.
  """
  # What is closed over by a jitted function is hidden in its program.
  while isinstance(logits_fn, jax.stages.Wrapped):
    logits_fn = logits_fn.__wrapped__
  rest = (jax.random.key(0),) if randomized else ()
  trace = lambda size: jax.make_jaxpr(logits_fn)(
    jax.ShapeDtypeStruct((size, *shape), jnp.float32), *rest
  )
  closed, larger = trace(1), trace(2)
  program = re.sub('0x[0-9a-f]+', '', str(closed.jaxpr))
  arrays = [_numpy(v).tobytes() for v in _constants(closed)]
  fingerprint = [zlib.crc32(x) for x in (program.encode(), *arrays)]
  same = lambda x, y: np.array_equal(_numpy(x), _numpy(y))
  if len(closed.consts) != len(larger.consts) or not all(
    map(same, closed.consts, larger.consts)
  ):
    # Some depend on the size of the batch: they stay where they are.
    return [], lambda _, *arguments: logits_fn(*arguments), fingerprint
  is_key = [jnp.issubdtype(v.dtype, jax.dtypes.prng_key) for v in closed.consts]

  def pure_fn(variables, images, *rest):
    closed = jax.make_jaxpr(logits_fn)(images, *rest)
    consts = [
      jax.random.wrap_key_data(v) if key else v
      for v, key in zip(variables, is_key, strict=True)
    ]
    return jax.core.eval_jaxpr(closed.jaxpr, consts, images, *rest)[0]

  return [_numpy(v) for v in closed.consts], pure_fn, fingerprint


def _numpy(array) -> np.ndarray:
  """An array, or the data of a key."""
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  return np.asarray(array)


def _constants(closed) -> list:
  """The arrays that a traced function and those that it calls close over."""
  parameters = [list(eqn.params.values()) for eqn in closed.jaxpr.eqns]
  within = [p for p in jax.tree.leaves(parameters) if hasattr(p, 'consts')]
  return sum(map(_constants, within), list(closed.consts))
