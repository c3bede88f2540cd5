"""Judges a network of your own, or runs one attack on it: Haiku, Flax, plain functions.

>>> import jax
>>> from jaxrobust import attacks
>>> logits_fn = lambda images: images.sum(axis=(1, 2))  # [B, H, W, C] → [B, K]
>>> images = jax.random.uniform(jax.random.key(0), (20, 4, 4, 3))
>>> labels = logits_fn(images).argmax(axis=-1)
>>> outcome = attacks.evaluate_robustness(
...     logits_fn, images, labels, norm='linf', epsilon=0.05,
...     suite='apgd-ce:num_steps=10,square:num_queries=50', progress=None)
>>> outcome.clean_accuracy
1.0
>>> outcome.robust_accuracy < 1
True

An attack alone, by its name in suites:

>>> adversarial = attacks.run(
...     'apgd-ce:num_steps=10', logits_fn, images, labels, 'linf', 0.05)
>>> bool((logits_fn(adversarial).argmax(axis=-1) != labels).any())
True

With parameters, close over them; BatchNorm and dropout must be in inference mode:

    logits_fn = lambda images: model.apply(params, images, train=False)  # Flax
    logits_fn = lambda images: network.apply(params, state, None, images)[0]  # Haiku

What was compiled for a function serves its later calls, with any epsilon and other
parameters, as long as the function lives: define it once.
"""

import html
import json
import math
import os
import re
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrobust.attacks import checks, norms, suites
from jaxrobust.attacks.evaluation import Evaluator, Outcome
from jaxrobust.attacks.record import Record
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.runs import metrics, waiting
from jaxrobust.runs import workdir as workdirs

# Of each function, what was compiled for it: by its program, attacks and numbers.
_COMPILED: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()


class Curve(dict[float, Outcome]):
  """Outcomes by epsilon, in the order in which these were given."""

  def __missing__(self, epsilon: float) -> Outcome:
    for known in self:
      if math.isclose(known, epsilon, rel_tol=1e-6):
        return self[known]
    measured = ', '.join(f'{known:.4g}' for known in self)
    raise KeyError(f'epsilon {epsilon} was not measured; those that were: {measured}')

  def to_dict(self) -> dict[float, dict]:
    """The figures of each, as JSON values."""
    return {epsilon: outcome.to_dict() for epsilon, outcome in self.items()}

  @property
  def clean_accuracy(self) -> dict[float, float]:
    """The share of images that are right before attacks, by epsilon: all the same."""
    return {epsilon: outcome.clean_accuracy for epsilon, outcome in self.items()}

  @property
  def robust_accuracy(self) -> dict[float, float]:
    """The share of images that are right after all attacks, by epsilon."""
    return {epsilon: outcome.robust_accuracy for epsilon, outcome in self.items()}

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the figures of `to_dict` to a `.json` file, or leaves what was there.

    Raises:
      UserError: for another ending.
    """
    file = epath.Path(path).expanduser()
    if file.suffix != '.json':
      raise UserError(f'{file}: a curve is saved as .json')
    file.parent.mkdir(parents=True, exist_ok=True)
    workdirs.write(file, json.dumps(self.to_dict(), indent=2) + '\n')

  def _rows(self) -> list[tuple[str, str, str]]:
    return [
      (f'{epsilon:.4g}', f'{o.clean_accuracy:.2%}', f'{o.robust_accuracy:.2%}')
      for epsilon, o in self.items()
    ]

  def _warnings(self) -> list[str]:
    return list(dict.fromkeys(x for o in self.values() for x in o.warnings))

  def __repr__(self) -> str:
    lines = [f'{e:>9} {c:>8} {r:>8}' for e, c, r in self._rows()]
    lines += [f'warning: {line}' for line in self._warnings()]
    return '\n  '.join([f'{"epsilon":>11} {"clean":>8} {"robust":>8}', *lines])

  def _repr_html_(self) -> str:
    cells = lambda row, tag: ''.join(f'<{tag}>{x}</{tag}>' for x in row)
    head = f'<tr>{cells(("epsilon", "clean", "robust"), "th")}</tr>'
    rows = ''.join(f'<tr>{cells(row, "td")}</tr>' for row in self._rows())
    lines = [f'<p>Warning: {html.escape(line)}</p>' for line in self._warnings()]
    return f'<table>{head}{rows}</table>{"".join(lines)}'


def evaluate_robustness(
  logits_fn: Callable[..., Any],
  images: Any,
  labels: Any,
  norm: str,
  epsilon: float | Sequence[float],
  suite: str = 'autoattack',
  *,
  batch_size: int = 256,
  seed: int = 0,
  folder: str | os.PathLike[str] | None = None,
  keep: int = 0,
  progress: Callable[[str, int, str], Any] | None = metrics.Progress,
) -> Outcome | Curve:
  """Judges any network by a suite of attacks, on all devices.

  Args:
    logits_fn: images [B, H, W, C] in [0, 1] → logits [B, K], in jax; each image by
      itself (BatchNorm and dropout in inference mode). For 'autoattack-rand' it is
      (images, rng) → logits.
    images: [n, H, W, C], uint8, or float of any precision in [0, 1].
    labels: int [n] in [0, K).
    norm: 'linf', 'l2' or 'l1'.
    epsilon: in pixel values of [0, 1], such as 8 / 255; several for a curve.
    suite: one of `suites.SUITES`, or attacks with options: see `suites.get`.
    batch_size: images in a batch, over all devices.
    seed: of everything random.
    folder: where to keep the state of each image, so that an interrupted evaluation
      goes on when it is called again; None for nowhere. A curve has a folder in it for
      each epsilon.
    keep: how many adversarial images to return, of the first images.
    progress: (attack, total, unit) → an object with `advance` and `close`; by default
      a bar in a terminal or a notebook, and lines elsewhere. None for no progress.

  Returns:
    An Outcome, which prints as a few lines and has the figures as `robust_accuracy`, …;
    for several epsilons a Curve, a dict of them.

  Raises:
    UserError: for arguments that cannot be meant.
  """
  images, labels = checks.inputs(images, labels)
  if np.ndim(epsilon):
    if not len(several := cast(Sequence[float], epsilon)):
      raise UserError('epsilon is empty: give one number or several')
    for each in several:
      norms.get(norm, each)
    found = Curve()
    for each in map(float, several):
      outcome = evaluate_robustness(
        logits_fn,
        images,
        labels,
        norm,
        each,
        suite,
        batch_size=batch_size,
        seed=seed,
        folder=folder and epath.Path(folder) / f'epsilon-{each:.6g}',
        keep=keep,
        progress=progress and _labelled(progress, f'epsilon {each:.4g}, '),
      )
      found[each] = cast(Outcome, outcome)
    return found
  radius = cast(float, epsilon)
  ball = norms.get(norm, radius)
  chosen = suites.get(suite, ball)
  randomized = any(a.randomized for _, a in chosen)
  variables, pure_fn, fingerprint, program = _hoist(
    logits_fn, images.shape[1:], randomized
  )
  attacks_at = lambda epsilon: suites.get(suite, type(ball)(epsilon))
  evaluator = _compiled(
    logits_fn,
    # The attacks themselves, in any one ball: names may come to mean another one.
    (program, tuple(attacks_at(1.0)), batch_size, seed),
    lambda: Evaluator(
      pure_fn,
      chosen,
      batch_size=batch_size,
      seed=seed,
      thorough=True,
      attacks_at=attacks_at,
    ),
  )
  identity = {
    'suite': suite,
    'norm': norm,
    'epsilon': float(radius),
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
    epsilon=float(radius),
  )


def run(
  attack: str,
  logits_fn: Callable[..., Any],
  images: Any,
  labels: Any,
  norm: str,
  epsilon: float,
  *,
  batch_size: int = 256,
  seed: int = 0,
) -> np.ndarray:
  """Runs one attack on images, on all devices of this process.

  Args:
    attack: one of `suites.ATTACKS` or a registered one, with options, such as
      'apgd-ce:restarts=5', 'square:num_queries=1000' or 'pgd'.
    logits_fn, images, labels, norm, epsilon: as for `evaluate_robustness`; one epsilon.
    batch_size: images in a batch, over all devices.
    seed: of everything random; what an image becomes depends on its place, not on the
      batches.

  Returns:
    Adversarial images, float32 [n, H, W, C] in the ball and in [0, 1]: of all attempts
    at an image that with the highest margin of another class (PGD's restarts: with the
    highest objective). FAB and Square leave images as they are, or nearly so, where
    they do not succeed.

  Raises:
    UserError: for arguments that cannot be meant.
  """
  images, labels = checks.inputs(images, labels)
  if np.ndim(epsilon):
    raise UserError(f'epsilon = {epsilon}: give one, or use evaluate_robustness')
  ball = norms.get(norm, epsilon)
  chosen = suites.get(attack, ball)
  if len(chosen) != 1:
    raise UserError(
      f'attack = {attack!r} has {len(chosen)} attacks: give one, or use '
      'evaluate_robustness'
    )
  attack_at = lambda epsilon: suites.get(attack, type(ball)(epsilon))[0][1]
  randomized = chosen[0][1].randomized
  if batch_size < 1:
    raise UserError(f'batch_size = {batch_size}: use 1 or more')
  variables, pure_fn, _, program = _hoist(logits_fn, images.shape[1:], randomized)
  image = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
  rest = (jax.random.key(0),) if randomized else ()
  checks.classes(labels, jax.eval_shape(pure_fn, variables, image, *rest).shape[1])

  def attack_shard(variables, rows):
    (variables, epsilon), (pixels, labels, index) = variables, rows
    network = lambda x, *rest: pure_fn(variables, x, *rest)
    keys = parallel.key_per_slot(jax.random.key(seed), index)
    return attack_at(epsilon)(network, keys, pixels, labels)

  attack_fn = _compiled(
    logits_fn,
    (program, attack_at(1.0), seed),
    lambda: parallel.pmap(attack_shard, local=True),
  )
  scale = np.float32(255 if images.dtype == np.uint8 else 1)
  rows = images.astype(np.float32) / scale, labels.astype(np.int32)
  size = -(-min(batch_size, len(images)) // parallel.num_local_devices())
  index = np.arange(len(images), dtype=np.int32)
  replicated = parallel.replicate((variables, np.float32(ball.epsilon)))
  with waiting.waiting(
    f'running {attack} on {len(images)} images, compilation included'
  ):
    return parallel.map_in_batches(attack_fn, replicated, (*rows, index), size)


def _labelled(progress, prefix: str):
  """A progress whose names have a prefix."""
  return lambda what, *rest: progress(prefix + what, *rest)


def _compiled(logits_fn, key, make):
  """What was made of a function before by the same key, as long as it lives."""
  try:
    known = _COMPILED.setdefault(logits_fn, {})
    hash(key)
  except TypeError:  # No hash, or no weak reference: it is made for each call.
    return make()
  if key not in known:
    known[key] = make()
  return known[key]


def _hoist(logits_fn, shape, randomized: bool):
  """Takes the arrays out of a function that it closes over.

  Compiled as constants, the parameters of a large network would be copied into every
  program.

  Returns:
    The arrays; the function of them and of images; checksums of program and arrays; and
    checksums of what is left in the program, which is the same for other parameters.
  """
  # What is closed over by a jitted function is hidden in its program.
  while isinstance(logits_fn, jax.stages.Wrapped):
    logits_fn = logits_fn.__wrapped__  # type: ignore[attr-defined]
  rest = (jax.random.key(0),) if randomized else ()
  closed, larger = (_trace(logits_fn, size, shape, rest) for size in (1, 2))
  program = re.sub('0x[0-9a-f]+', '', str(closed.jaxpr))
  arrays = [_numpy(v).tobytes() for v in _constants(closed)]
  fingerprint = [zlib.crc32(x) for x in (program.encode(), *arrays)]
  same = lambda x, y: np.array_equal(_numpy(x), _numpy(y))
  # What was compiled of a function must not keep it from being forgotten.
  function = _weakly(logits_fn)
  if len(closed.consts) != len(larger.consts) or not all(
    map(same, closed.consts, larger.consts)
  ):
    # Some depend on the size of the batch: they stay where they are.
    as_it_is = lambda _, *arguments: function()(*arguments)
    return [], as_it_is, fingerprint, tuple(fingerprint)
  is_key = [jnp.issubdtype(v.dtype, jax.dtypes.prng_key) for v in closed.consts]

  def pure_fn(variables, images, *rest):
    closed = jax.make_jaxpr(_anew(function()))(images, *rest)
    consts = [
      jax.random.wrap_key_data(v) if key else v
      for v, key in zip(variables, is_key, strict=True)
    ]
    return jax.core.eval_jaxpr(closed.jaxpr, consts, images, *rest)[0]

  inside = fingerprint[0], *fingerprint[1 + len(closed.consts) :]
  return [_numpy(v) for v in closed.consts], pure_fn, fingerprint, inside


def _weakly(logits_fn):
  """A function that gives it back, as long as somebody else holds it if possible."""
  try:
    return weakref.ref(logits_fn)
  except TypeError:
    return lambda: logits_fn


def _anew(logits_fn):
  """The function as one that jax has not seen: what it reads may have changed since."""
  return lambda *arguments: logits_fn(*arguments)


def _trace(logits_fn, size: int, shape, rest):
  """The closed jaxpr for so many images; UserError unless it makes logits."""
  images = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
  try:
    trace = jax.make_jaxpr(_anew(logits_fn), return_shape=True)
    closed, found = trace(images, *rest)
  except (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
  ) as e:
    raise UserError(
      'logits_fn needs the values of images, which jax does not give while it compiles '
      f'({type(e).__name__}): write it with jax.numpy, without numpy, torch or '
      'conditions on values'
    ) from e
  if size == 1:
    checks.logits(found, shape)
  return closed


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
