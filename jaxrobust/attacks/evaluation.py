"""Judges a network on a set of images: each exactly once, against the worst attack.

An image counts as robust when the network is right on it and on what every attempt of
every attack makes of it. Attacks run one after another, attempt by attempt, each on the
images that still stand: these are gathered into full batches, so that the cost falls as
images fall. Whatever an attack claims, its images are classified once more and their
distance is measured.
"""

import contextlib
import functools
import html
import json
import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrobust.attacks import attack as attacks
from jaxrobust.attacks import checks, objectives
from jaxrobust.attacks.record import STANDING, Record
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.runs import waiting
from jaxrobust.runs import workdir as workdirs

# Images may be further than epsilon by the rounding of float32: a share of it in sums,
# and an absolute part where pixels of size 1 are subtracted.
_SLACK = 1e-4, 1e-6
# Keys of a purpose of their own: attacks derive theirs from the numbers of steps. An
# attempt's number is taken from that of judging.
_JUDGE, _INNER = 2**31 - 1, 2**31 - 2


class Outcome(NamedTuple):
  """What a suite found.

  Attributes:
    clean: bool [n], right without an attack.
    robust: bool [n], right without and under every attack.
    fallen_to: int [n]; the attack that an image fell to, from 0; -1 for none.
    names: of the attacks.
    adversarial: float32 [k, H, W, C] in [0, 1], of the first k images: what those that
      fell to an attack were changed to, the others as they are.
    predictions: int32 [k], the classes predicted for `adversarial`.
    warnings: reasons not to trust the figures, a line each.
  """

  clean: np.ndarray
  robust: np.ndarray
  fallen_to: np.ndarray
  names: tuple[str, ...]
  adversarial: np.ndarray
  predictions: np.ndarray
  warnings: list[str]

  @property
  def clean_accuracy(self) -> float:
    """Share of all images that are right without an attack."""
    return float(self.clean.mean())

  @property
  def robust_accuracy(self) -> float:
    """Share of all images that are right without and under every attack."""
    return float(self.robust.mean())

  def by_attack(self) -> dict[str, float]:
    """Share of all images that stand after each attack in turn."""
    standing, shares = self.clean.sum(), {}
    for number, name in enumerate(self.names):
      standing = standing - np.sum(self.fallen_to == number)
      shares[name] = float(standing / len(self.clean))
    return shares

  def to_dict(self) -> dict:
    """Counts, accuracies as fractions and warnings, as JSON values."""
    return {
      'clean_correct': int(self.clean.sum()),
      'robust_correct': int(self.robust.sum()),
      'clean_accuracy': self.clean_accuracy,
      'robust_accuracy': self.robust_accuracy,
      'attacks': [
        {
          'name': name,
          'fallen': int(np.sum(self.fallen_to == number)),
          'robust_accuracy': share,
        }
        for number, (name, share) in enumerate(self.by_attack().items())
      ],
      'warnings': self.warnings,
    }

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes it to a file, or leaves what was there.

    Args:
      path: local or `gs://`; ends in `.json` for the figures of `to_dict`, or in
        `.npz` for them (as text, `figures`) and the arrays.

    Raises:
      UserError: for another ending.
    """
    file, text = epath.Path(path).expanduser(), json.dumps(self.to_dict(), indent=2)
    if file.suffix not in ('.json', '.npz'):
      raise UserError(
        f'{file}: an outcome is saved as .json, its figures, or .npz, with the arrays'
      )
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == '.json':
      workdirs.write(file, f'{text}\n')
      return
    found = {k: v for k, v in self._asdict().items() if isinstance(v, np.ndarray)}
    workdirs.write_npz(file, figures=text, **found)

  def _rows(self) -> list[tuple[str, str]]:
    """What `repr` shows beside the warnings: words and a share."""
    rows = [('clean', self.clean_accuracy)]
    rows += [('robust', self.robust_accuracy)] * bool(self.names)
    rows += [(f'after {name}', share) for name, share in self.by_attack().items()]
    return [(words, f'{share:.2%}') for words, share in rows]

  def __repr__(self) -> str:
    rows = self._rows()
    width = max(len(words) for words, _ in rows)
    lines = [f'{words:{width}} {share:>7}' for words, share in rows]
    lines += [f'warning: {line}' for line in self.warnings]
    return '\n  '.join([f'Outcome of {len(self.clean)} images', *lines])

  def _repr_html_(self) -> str:
    rows = [
      f'<tr><td>{html.escape(words)}</td><td>{share}</td></tr>'
      for words, share in self._rows()
    ]
    lines = [f'<p>Warning: {html.escape(line)}</p>' for line in self.warnings]
    caption = f'<caption>{len(self.clean)} images</caption>'
    return f'<table>{caption}{"".join(rows)}</table>{"".join(lines)}'


class Evaluator:
  """Judges a network on sets of images; compiled once, for any parameters.

  What is random depends on (seed, attack, attempt, index of the image) only, not on
  batches or devices; but for the draws of a randomised network, which takes one key for
  all images on a device.
  """

  def __init__(
    self,
    logits_fn: Callable[..., Any],
    named_attacks: Iterable[tuple[str, Any]],
    *,
    batch_size: int,
    seed: int = 0,
    thorough: bool = False,
    attacks_at: Callable[[Any], Any] | None = None,
  ):
    """Prepares the evaluation.

    Args:
      logits_fn: (variables, images [B, H, W, C] in [0, 1]) → logits [B, K]; with a
        third argument, a key, if an attack is randomised.
      named_attacks: pairs of a name and an Attack, in the order in which they run;
        none for clean accuracy only.
      batch_size: images in a batch, over all devices.
      seed: of everything random.
      thorough: whether to look for signs of a misleading evaluation, and to fit the
        size of an attack's batches to the number of images that stand when it
        begins; else all batches have one size, so that nothing is compiled again when
        other images are judged.
      attacks_at: epsilon, which may be traced → `named_attacks` in a ball of that size;
        lets calls choose an epsilon for which nothing is compiled again.
    """
    if batch_size < 1:
      raise UserError(f'batch_size = {batch_size}: use 1 or more')
    self._batch_size, self._thorough = batch_size, thorough
    # An argument of the programs, so that one serves all seeds.
    self._root = np.asarray(jax.random.key_data(jax.random.key(seed)))
    self._attacks = tuple(named_attacks)
    self._randomized = any(a.randomized for _, a in self._attacks)
    # As a function of its own, it and its gradient are traced once for all programs; as
    # a new one, since what it reads may have changed since it was traced elsewhere.
    self._logits_fn = jax.jit(lambda *arguments: logits_fn(*arguments))
    self._attacks_at = attacks_at
    self._survey = parallel.pmap(self._survey_shard)
    self._checks = parallel.pmap(self._check_shard)
    self._attempts = [
      parallel.pmap(functools.partial(self._attempt_shard, name, attack))
      for name, attack in self._attacks
    ]

  def _network(self, variables, rng):
    """The network's logits_fn with a key of the device's own, if it needs one."""
    if self._randomized:
      return lambda x, rng=rng: self._logits_fn(variables, x, rng)
    return lambda x: self._logits_fn(variables, x)

  def _survey_shard(self, variables, images, labels, index, root, call):
    """One device's images → (right, finite, predictions, logits) in a call."""
    keys = _keys(root, index)
    logits = self._network(variables, jax.random.fold_in(keys[0], call))(images)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    predictions = jnp.argmax(logits, axis=-1)
    return finite & (predictions == labels), finite, predictions, logits

  def _check_shard(self, variables, images, labels, index, root):
    """One device's images → whether gradients vanish: cross-entropy's, margin's."""
    keys = _keys(root, index)
    logits, pull = jax.vjp(self._network(variables, keys[0]), images)

    def vanishes(objective):
      gradient = jax.grad(lambda logits: jnp.sum(objective(logits, labels)))(logits)
      return jnp.all(pull(gradient)[0] == 0, axis=(1, 2, 3))

    return vanishes(objectives.cross_entropy), vanishes(objectives.margin)

  def _attempt_shard(
    self, name, attack, variables, images, labels, index, root, attempt, *epsilon
  ):
    """One device's images → (changed images, finite, distance)."""
    if epsilon and self._attacks_at:
      attack = dict(self._attacks_at(*epsilon))[name]
    keys = attacks.attempt_keys(_keys(root, index, name), attempt)
    network = self._network(variables, jax.random.fold_in(keys[0], _INNER))
    found = attack.attempt(network, keys, images, labels, attempt)
    finite = jnp.all(jnp.isfinite(found), axis=(1, 2, 3), keepdims=True)
    found = jnp.where(finite, found, images)
    return found, finite[:, 0, 0, 0], attack.ball.distance(found, images)

  def __call__(
    self,
    variables: Any,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    keep: int = 0,
    record: Record | None = None,
    progress: Callable[[str, int, str], Any] | None = None,
    epsilon: float | None = None,
  ) -> Outcome:
    """Judges every image once.

    Args:
      variables: replicated tree for `logits_fn`.
      images: uint8, or float in [0, 1], [n, H, W, C].
      labels: int [n].
      keep: how many adversarial images to return, of the first images.
      record: where to start from and to note what becomes of each image.
      progress: (attack, total, unit) → an object with `advance(count, note)` and
        `close`; None for no progress.
      epsilon: of the ball, where `attacks_at` was given; None for that of the attacks.

    Returns:
      An Outcome, the same in every process.
    """
    images, labels = checks.inputs(images, labels)
    program, classes = self._trace(variables, images.shape[1:])
    checks.classes(labels, classes)
    labels = labels.astype(np.int32)
    record = record or Record(len(images), None, {})
    attempts = sum(attack.num_attempts(classes) for _, attack in self._attacks)
    record.check(attempts, images.shape[1:])
    run = _Run(variables, images, labels, record, keep, self._thorough, self._root)
    if record.attempt == 0:
      run.size = self._size(len(images))
      if self._thorough:
        with waiting.waiting('compiling the network, and looking for what misleads'):
          self._warn(run, program, classes)
      first = parallel.replicate(np.int32(0))
      survey = lambda *batch: parallel.gather(
        self._survey(variables, *batch, first)[:3]
      )
      with _bar(progress, 'clean', len(images), 'images') as advance:
        run.attempt(0, survey, advance)
    first = 1
    size = () if epsilon is None else (parallel.replicate(np.float32(epsilon)),)
    for (name, attack), find in zip(self._attacks, self._attempts, strict=True):
      numbers = range(first, first + attack.num_attempts(classes))
      first = numbers.stop
      ahead = [n for n in numbers if n >= record.attempt]
      if not ahead or not len(run.standing(ahead[0])):
        continue
      run.size = self._size(len(run.standing(numbers.start)))
      total = len(run.standing(ahead[0])) * len(ahead)
      with _bar(progress, name, total, 'attempts') as advance:
        for number in ahead:
          attempt = parallel.replicate(np.int32(number - numbers.start))
          call = parallel.replicate(np.int32(_JUDGE - number))

          def judge(*batch, find=find, attempt=attempt, call=call):
            found, whole, distance = find(variables, *batch, attempt, *size)
            # By the program of the survey, whatever the attack claims.
            judged = self._survey(variables, found, *batch[1:], call)[:3]
            found, whole, distance, right, finite, predictions = parallel.gather(
              (found, whole, distance, *judged)
            )
            return found, ~right, finite & whole, predictions, distance

          run.attempt(
            number,
            judge,
            advance,
            what=name if number == ahead[0] else '',
            left=numbers.stop - number,
            epsilon=epsilon or attack.ball.epsilon,
          )
    return self._outcome(run, classes, keep)

  def lower(
    self, variables: Any, images: np.ndarray, labels: np.ndarray
  ) -> list[jax.stages.Lowered]:
    """What a call with such arguments runs, to be compiled before it.

    Args:
      variables, images, labels: as of a call.

    Returns:
      Programs; once their `compile` was called, a call compiles none of them. Those of
      a thorough evaluation are not all known before it.
    """
    images, labels = checks.inputs(images, labels)
    record = Record(len(images), None, {})
    run = _Run(variables, images, labels.astype(np.int32), record, 0, False, self._root)
    batch = run.batch(np.arange(1), self._size(len(images)))
    number = parallel.replicate(np.int32(0))
    return [
      mapped.lower(variables, *batch, number)
      for mapped in (self._survey, *self._attempts)
    ]

  def _outcome(self, run: '_Run', classes: int, keep: int) -> Outcome:
    """What the record says."""
    record = run.record
    ends = np.cumsum([0] + [a.num_attempts(classes) for _, a in self._attacks])
    fallen_to = np.searchsorted(ends, record.fallen) - 1
    fallen_to[record.fallen <= 0] = -1
    robust = record.fallen == STANDING
    names = tuple(name for name, _ in self._attacks)
    kept = min(keep, len(run.images))
    changed = np.array(_unit(run.images[:kept]))
    predictions = np.array(run.labels[:kept])
    for index, image in record.adversarial.items():
      changed[index], predictions[index] = image, record.predictions[index]
    outcome = Outcome(
      record.fallen != 0, robust, fallen_to, names, changed, predictions, []
    )
    if line := checks.square_helped(outcome.by_attack()):
      record.warn(line)
    return outcome._replace(warnings=list(record.warnings))

  def _size(self, count: int) -> int:
    """Images in a batch, for so many images: a whole number on every device."""
    batches = -(-count // self._batch_size) if self._thorough else 1
    size = -(-count // batches) if self._thorough else self._batch_size
    devices = parallel.num_devices()
    return -(-size // devices) * devices

  def _trace(self, variables, shape):
    """The network's jaxpr for one image, and its number of classes."""
    local = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    network = lambda v, x: self._network(v, jax.random.key(0))(x)
    program, logits = jax.make_jaxpr(network, return_shape=True)(
      jax.tree.map(local, variables), image
    )
    checks.logits(logits, shape)
    return program.jaxpr, logits.shape[1]

  def _warn(self, run: '_Run', program, classes: int):
    """Looks at the first batch for what misleads attacks, and says so."""
    count = min(run.size, len(run.images))
    first = np.arange(count)

    def logits(call, index=first):
      batch = run.batch(index, run.size), parallel.replicate(np.int32(call))
      return parallel.gather(self._survey(run.variables, *batch[0], batch[1])[3])

    calls = np.stack([logits(call)[:count] for call in range(checks.CALLS)])
    # A device for each image, which has nothing but copies of it.
    few, each = min(count, 4), run.size // run.devices
    alone = [
      logits(0, np.minimum(range(n, n + run.devices), few - 1).repeat(each))[::each]
      for n in range(0, few, run.devices)
    ]
    no_cross_entropy, no_margin = parallel.gather(
      self._checks(run.variables, *run.batch(first, run.size))
    )
    found = [
      f'{name}: {remark}'
      for name, attack in self._attacks
      if (remark := attack.remark(classes))
    ]
    found += checks.misleading(
      calls,
      np.concatenate(alone)[:few],
      no_cross_entropy[:count],
      no_margin[:count],
      self._randomized,
    )
    found.append(checks.optimizes(program))
    for line in filter(None, found):
      run.record.warn(line)


class _Run:
  """One pass over the images: batches in, record out."""

  def __init__(
    self, variables, images, labels, record: Record, keep: int, fits: bool, root
  ):
    self.size, self.fits, self.devices = 0, fits, parallel.num_devices()
    self.root = parallel.replicate(root)
    self.variables = variables
    self.images, self.labels, self.record, self.keep = images, labels, record, keep

  def standing(self, number: int) -> np.ndarray:
    """Images that an attempt with this number has to deal with."""
    fallen = self.record.fallen
    return np.flatnonzero((fallen == STANDING) | (fallen >= number))

  def batch(self, index: np.ndarray, size: int):
    """A batch on the devices, filled up with its first image, and the root."""
    filled = np.concatenate([index, np.full(size - len(index), index[0])])
    mine = filled[slice(*parallel.process_slots(size))]
    # In [0, 1], so that one program takes them and what attacks make of them.
    batch = _unit(self.images[mine]), self.labels[mine], mine.astype(np.int32)
    return *parallel.shard(batch), self.root

  def attempt(
    self, number: int, judge, advance, left: int = 1, epsilon=np.inf, what: str = ''
  ):
    """Runs one attempt (0: the clean pass) on the images that stand.

    The first batch of `what` is waited for aloud: it compiles.
    """
    record = self.record
    record.begin(number)
    index = record.standing()
    # What is left of the images may need no more than a half, or a quarter, …
    size, half_of = self.size, lambda n: -(-(n // 2) // self.devices) * self.devices
    while self.fits and 0 < len(index) <= half_of(size) < size:
      size = half_of(size)
    while len(index) > record.done:
      part = index[record.done : record.done + size]
      aloud = contextlib.nullcontext()
      if what and self.fits:
        aloud = waiting.waiting(f'{what}: compiling, and the first batch')
      with aloud:
        found = judge(*self.batch(part, size))
      what, found = '', [x[: len(part)] for x in found]
      if number == 0:
        right, finite, predictions = found
        fell, changed = ~right, _unit(self.images[part])
      else:
        changed, fell, finite, predictions, distance = found
        furthest = epsilon * (1 + _SLACK[0]) + _SLACK[1]
        assert distance.max() <= furthest, (distance.max(), epsilon)
        assert changed.min() >= 0 and changed.max() <= 1
      if not finite.all():
        record.warn(
          'logits or gradients of some images are not finite; such logits count as '
          'wrong'
        )
      record.advance(
        part,
        fell,
        changed,
        predictions,
        keep=self.keep,
        write=parallel.is_writer(),
      )
      # Before the attacks an image counts once it was seen.
      seen = record.fallen if number else record.fallen[: part[-1] + 1]
      note = f'{"robust" if number else "clean"} {np.mean(seen == STANDING):.2%}'
      # An image that fell needs none of its further attempts.
      advance(len(part) + int(fell.sum()) * (left - 1), note)


@contextlib.contextmanager
def _bar(progress, name: str, total: int, unit: str):
  """The `advance` of a progress that is closed at the end, if there is one."""
  if progress is None:
    yield lambda count, note: None
    return
  bar = progress(name, total, unit)
  try:
    yield bar.advance
  finally:
    bar.close()


def _keys(root: jax.Array, index: jax.Array, name: str = '') -> jax.Array:
  """A key for each image, from the data of a key and what it is for."""
  rng = jax.random.wrap_key_data(root)
  if name:
    rng = jax.random.fold_in(rng, zlib.crc32(name.encode()))
  return parallel.key_per_slot(rng, index)


def _unit(images: np.ndarray) -> np.ndarray:
  """Images as float32 in [0, 1]."""
  if images.dtype == np.uint8:
    return images.astype(np.float32) / 255
  return images.astype(np.float32)
