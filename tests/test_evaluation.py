"""The evaluator: every image once, whatever the batches, on a linear network."""

import contextlib
import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.attacks import apgd, evaluation, norms, objectives, pgd, suites
from jaxrobust.attacks.attack import Attack
from jaxrobust.attacks.evaluation import Evaluator, Outcome
from jaxrobust.attacks.record import STANDING, Record
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError

EPSILON = 0.1


@pytest.fixture(scope='module')
def case():
  """Images uint8, and a linear two-class network with logits (0, w x + b)."""
  rng = np.random.RandomState(0)
  # Away from 0 and 255 by more than epsilon, so that the box never binds.
  images = rng.randint(64, 192, (37, 4, 4, 1)).astype(np.uint8)
  weights = rng.normal(size=16).astype(np.float32)
  bias = 0.01 - np.float32(np.median(images.reshape(37, 16) / 255 @ weights))
  scores = images.reshape(37, 16) / 255 @ weights + bias
  labels = (scores + rng.normal(scale=0.1, size=37) > 0).astype(np.int32)
  return images, labels, (weights, bias), scores


def logits_fn(variables, images):
  weights, bias = variables
  scores = images.reshape(len(images), -1) @ weights + bias
  return jnp.stack([jnp.zeros_like(scores), scores], axis=-1)


def attack(**fields):
  fields = dict(num_steps=5, step_sizes=(EPSILON,)) | fields
  return pgd.PGD(
    norms.Linf(EPSILON), objectives.margin, pgd.STEP_RULES['sign'], **fields
  )


@pytest.mark.parametrize('batch_size', [4, 16, 37, 100])
@pytest.mark.parametrize('thorough', [False, True])
def test_judges_a_linear_network_exactly(case, batch_size, thorough):
  """The margin of a linear network moves by epsilon times the l1 norm of w."""
  images, labels, (weights, bias), scores = case
  evaluator = Evaluator(
    logits_fn, [('pgd', attack())], batch_size=batch_size, thorough=thorough
  )
  outcome = evaluator(parallel.replicate((weights, bias)), images, labels, keep=30)
  margin = np.where(labels == 1, scores, -scores)
  # One score may lie on the threshold up to rounding; none here does.
  assert np.abs(margin).min() > 1e-5
  assert np.abs(margin - EPSILON * np.abs(weights).sum()).min() > 1e-5
  np.testing.assert_array_equal(outcome.clean, margin > 0)
  np.testing.assert_array_equal(
    outcome.robust, margin > EPSILON * np.abs(weights).sum()
  )
  assert outcome.robust.sum() < outcome.clean.sum() < 37
  # Images that fell have changed, the others have not.
  assert len(outcome.adversarial) == len(outcome.predictions) == 30
  fell = (outcome.clean & ~outcome.robust)[:30]
  np.testing.assert_array_equal(outcome.fallen_to[:30] == 0, fell)
  moved = np.abs(outcome.adversarial - images[:30] / 255).max(axis=(1, 2, 3))
  assert fell.any() and (moved[fell] > 0.01).all() and (moved[~fell] < 1e-6).all()
  assert moved.max() <= EPSILON + 1e-6
  np.testing.assert_array_equal(outcome.predictions == labels[:30], outcome.robust[:30])
  assert outcome.by_attack() == {'pgd': outcome.robust.mean()}


def test_what_compiles_is_waited_for_aloud(case, monkeypatch):
  """A judge of minutes says so; one of a few validation images is quiet."""
  images, labels, variables, _ = case
  said = []

  def waiting(what):
    said.append(what)
    return contextlib.nullcontext()

  monkeypatch.setattr(evaluation.waiting, 'waiting', waiting)
  for thorough in (True, False):
    evaluator = Evaluator(
      logits_fn, [('pgd', attack())], batch_size=16, thorough=thorough
    )
    evaluator(parallel.replicate(variables), images, labels)
  assert [what.partition(' ')[0] for what in said] == ['compiling', 'pgd:']


def test_without_an_attack_robust_is_clean(case):
  images, labels, variables, _ = case
  evaluator = Evaluator(logits_fn, [], batch_size=8)
  outcome = evaluator(parallel.replicate(variables), images, labels)
  np.testing.assert_array_equal(outcome.clean, outcome.robust)
  assert len(outcome.adversarial) == 0
  assert outcome.by_attack() == {}


def test_an_attack_never_mends_a_wrong_prediction(case):
  """An image that is wrong without an attack is not robust."""
  images, _, variables, scores = case
  wrong = (scores <= 0).astype(np.int32)
  mend = pgd.PGD(
    norms.Linf(0.5),
    lambda x, y: -objectives.margin(x, y),
    pgd.STEP_RULES['sign'],
    num_steps=3,
    step_sizes=(0.5,),
  )
  evaluator = Evaluator(logits_fn, [('mend', mend)], batch_size=37)
  outcome = evaluator(parallel.replicate(variables), images, wrong)
  assert not outcome.robust.any() and not outcome.clean.any()


class Scripted(Attack):
  """Makes image i fall at the attempt that its first pixel names, and counts."""

  def __init__(self, attempts, log):
    self._attempts, self._log, self.ball = attempts, log, norms.Linf(1.0)

  def num_attempts(self, num_classes):
    assert num_classes == 2
    return self._attempts

  def attempt(self, logits_fn, rngs, images, labels, index):
    jax.debug.callback(self._log, jnp.round(images[:, 0, 0, 0] * 255), index)
    falls = jnp.round(images[:, 0, 0, 0] * 255) == index
    return jnp.where(falls[:, None, None, None], 1.0, images)


def bright(_, images):
  """Class 1 where an image is white."""
  white = images.min(axis=(1, 2, 3)) > 0.99
  return jnp.stack([0.5 * jnp.ones(len(images)), white.astype(jnp.float32)], axis=-1)


def test_each_attempt_sees_only_what_stands():
  """Attempts get the images that stand, in full batches, and no other."""
  seen = []
  log = lambda pixels, index: seen.extend((int(index), int(p)) for p in pixels.ravel())
  images = np.zeros((20, 2, 2, 1), np.uint8)
  images[:, 0, 0, 0] = [0] * 6 + [1] * 6 + [2] * 2 + [9] * 6
  attack = Scripted(3, log)
  evaluator = Evaluator(
    bright, [('first', attack), ('second', attack)], batch_size=8, thorough=True
  )
  outcome = evaluator(parallel.replicate([np.zeros(1)]), images, np.zeros(20, int))
  jax.effects_barrier()
  assert outcome.clean.all() and outcome.robust.sum() == 6
  assert outcome.by_attack() == {'first': 6 / 20, 'second': 6 / 20}
  for attempt, stood in enumerate([{0, 1, 2, 9}, {1, 2, 9}, {2, 9}]):
    assert {p for index, p in seen if index == attempt} == stood
  # 20, 14 and 8 images in batches of 8 (a third of 20, whole on 4 devices), and twice 6
  # in one batch.
  sizes = [len([0 for index, _ in seen if index == a]) for a in range(3)]
  assert sizes == [24 + 8, 16 + 8, 8 + 8]


def test_random_starts_depend_on_the_image_only():
  """Also where the attack is nothing but its random start."""
  images = np.full((10, 2, 2, 1), 128, np.uint8)
  # Wrong wherever the image is not the original.
  still = lambda _, x: jnp.stack(
    [jnp.full(len(x), 0.1), jnp.abs(x - 128 / 255).max(axis=(1, 2, 3)) * 1e3], axis=-1
  )
  found = []
  for batch_size in (4, 8, 12):
    start = attack(num_steps=1, step_sizes=(0.0,))
    evaluator = Evaluator(still, [('start', start)], batch_size=batch_size)
    outcome = evaluator(
      parallel.replicate([np.zeros(1)]), images, np.zeros(10, np.int32), keep=10
    )
    assert not outcome.robust.any()
    found.append(outcome.adversarial)
  np.testing.assert_array_equal(found[0], found[1])
  np.testing.assert_array_equal(found[0], found[2])
  assert len(np.unique(found[0][:, 0, 0, 0])) == 10


def test_attempts_and_attacks_draw_other_numbers():
  """Each restart and each attack of a suite starts somewhere else."""
  starts = []

  @dataclasses.dataclass(frozen=True)
  class Restarts(Attack):
    ball: norms.Linf = norms.Linf(0.1)

    def num_attempts(self, num_classes):
      return 2

    def attempt(self, logits_fn, rngs, images, labels, index):
      start = self.ball.initialize(rngs, images)
      jax.debug.callback(lambda x: starts.extend(x[:, 0, 0, 0].tolist()), start)
      return start

  evaluator = Evaluator(
    lambda _, x: jnp.stack([x.sum(axis=(1, 2, 3)), -jnp.ones(len(x))], axis=-1),
    [('a', Restarts()), ('b', Restarts())],
    batch_size=4,
  )
  images = np.full((4, 2, 2, 1), 128, np.uint8)
  evaluator(parallel.replicate([np.zeros(1)]), images, np.zeros(4, np.int32))
  jax.effects_barrier()
  assert len(starts) == 16 and len(set(starts)) == 16


class Bar:
  """Notes what a progress is told."""

  log = []

  def __init__(self, name, total, unit):
    self._name, self._total, self._done = name, total, 0

  def advance(self, count, note):
    self._done += count

  def close(self):
    Bar.log.append((self._name, self._done, self._total))


def test_progress_ends_at_its_total():
  images = np.zeros((20, 2, 2, 1), np.uint8)
  images[:, 0, 0, 0] = [0] * 6 + [1] * 6 + [2] * 2 + [9] * 6
  attack = Scripted(3, lambda *_: None)
  Bar.log = []
  Evaluator(bright, [('a', attack), ('b', attack)], batch_size=8)(
    parallel.replicate([np.zeros(1)]), images, np.zeros(20, int), progress=Bar
  )
  assert Bar.log == [('clean', 20, 20), ('a', 60, 60), ('b', 18, 18)]


class KilledError(Exception):
  pass


@pytest.mark.parametrize('thorough', [False, True])
def test_goes_on_where_it_was_killed(case, tmp_path, thorough):
  """KilledError after every single batch, it ends as if it had not been."""
  images, labels, variables, _ = case
  suite = [('a', apgd.APGD(norms.Linf(0.02), num_steps=3, restarts=2))]
  suite += [('b', attack(num_steps=2, step_sizes=(EPSILON / 2,)))]
  evaluator = Evaluator(logits_fn, suite, batch_size=8, thorough=thorough)
  batches = []

  class Fragile(Bar):
    def advance(self, count, note):
      batches.append(note)
      raise KilledError

  def run(folder, progress):
    return evaluator(
      parallel.replicate(variables),
      images,
      labels,
      keep=37,
      record=Record(37, folder, {'of': 'the test'}),
      progress=progress,
    )

  whole = run(None, None)
  assert len(set(whole.fallen_to)) == 3, 'both attacks should have work to do'
  for _ in range(1000):
    try:
      outcome = run(tmp_path / 'state', Fragile)
      break
    except KilledError:
      continue
  assert len(batches) > 12
  for found, wanted in zip(outcome, whole, strict=True):
    np.testing.assert_array_equal(found, wanted)


def test_a_finished_evaluation_runs_nothing(case, tmp_path):
  images, labels, variables, _ = case
  calls = []
  suite = [('pgd', attack())]

  def run():
    evaluator = Evaluator(logits_fn, suite, batch_size=8)
    evaluator._attempts = [
      lambda *x, f=f: calls.append(0) or f(*x) for f in evaluator._attempts
    ]
    record = Record(37, tmp_path / 'state', {})
    return evaluator(parallel.replicate(variables), images, labels, record=record)

  first = run()
  count = len(calls)
  again = run()
  assert count > 0 and len(calls) == count
  np.testing.assert_array_equal(first.robust, again.robust)


def test_logits_that_are_not_numbers_count_as_wrong(case):
  images, labels, (weights, bias), scores = case
  broken = lambda v, x: jnp.where(x[:, :1, 0, 0] < 0.4, jnp.nan, logits_fn(v, x))
  evaluator = Evaluator(broken, [], batch_size=8, thorough=True)
  outcome = evaluator(parallel.replicate((weights, bias)), images, labels)
  nan = images[:, 0, 0, 0] / 255 < 0.4
  right = (scores > 0) == (labels == 1)
  np.testing.assert_array_equal(outcome.clean, right & ~nan)
  assert any('not finite' in line for line in outcome.warnings)


def test_what_leaves_the_ball_is_a_fault_of_the_attack(case):
  images, labels, variables, _ = case

  class Cheat(Attack):
    ball = norms.Linf(0.1)

    def num_attempts(self, num_classes):
      return 1

    def attempt(self, logits_fn, rngs, images, labels, index):
      return jnp.clip(images + 0.11, 0, 1)

  with pytest.raises(AssertionError):
    Evaluator(logits_fn, [('cheat', Cheat())], batch_size=8)(
      parallel.replicate(variables), images, labels
    )


def test_a_record_of_something_else_is_refused(tmp_path):
  record = Record(3, tmp_path, {'seed': 0})
  record.begin(0)
  fell = np.array([True, False, False])
  record.advance(np.arange(3), fell, keep=0, write=True)
  again = Record(3, tmp_path, {'seed': 0})
  assert again.fallen.tolist() == [0, STANDING, STANDING] and again.done == 3
  with pytest.raises(UserError, match='holds the evaluation of something else'):
    Record(3, tmp_path, {'seed': 1})


def test_only_the_writer_writes(tmp_path):
  record = Record(2, tmp_path / 'state', {})
  record.advance(np.arange(2), np.array([True, False]), keep=0, write=False)
  assert not (tmp_path / 'state').exists()


def test_no_images_is_an_error():
  evaluator = Evaluator(bright, [], batch_size=4)
  with pytest.raises(UserError, match='no images to evaluate'):
    evaluator({}, np.zeros((0, 2, 2, 1), np.uint8), np.zeros(0, np.int32))


def test_compiles_once_for_other_parameters(case):
  images, labels, (weights, bias), _ = case
  traces = []

  def counted(variables, x):
    if len(x) > 1:  # Not the look at the number of classes.
      traces.append(None)
    return logits_fn(variables, x)

  evaluator = Evaluator(counted, [('pgd', attack())], batch_size=16)
  evaluator(parallel.replicate((weights, bias)), images, labels)
  count = len(traces)
  evaluator(parallel.replicate((2 * weights, bias - 0.3)), images, labels)
  assert len(traces) == count > 0
  assert jax.device_count() == 4


def test_programs_share_what_is_traced_of_the_network(case):
  images, labels, (weights, bias), _ = case
  traced = []

  def counted(variables, images):
    traced.append(images.shape)
    return jnp.tile(logits_fn(variables, images), 3)

  suite = suites.get('autoattack', norms.Linf(EPSILON))
  evaluator = Evaluator(counted, suite, batch_size=16)
  programs = evaluator.lower(parallel.replicate((weights, bias)), images, labels)
  assert len(programs) == 5 and len(traced) == 1


def test_another_evaluator_sees_what_has_changed_in_a_function(case):
  images, labels, (weights, bias), _ = case
  sign = 1

  def network(variables, images):
    return sign * logits_fn(variables, images)

  judge = lambda: Evaluator(network, [], batch_size=16)(
    parallel.replicate((weights, bias)), images, labels
  )
  before = judge().clean_accuracy
  sign = -1
  assert judge().clean_accuracy == pytest.approx(1 - before) != before


def test_a_function_needs_no_hash(case):
  images, labels, variables, _ = case

  @dataclasses.dataclass  # Equal to others of its fields, and so without one.
  class Network:
    factor: float

    def __call__(self, variables, images):
      return self.factor * logits_fn(variables, images)

  evaluator = Evaluator(Network(2.0), [], batch_size=16)
  outcome = evaluator(parallel.replicate(variables), images, labels)
  same = Evaluator(logits_fn, [], batch_size=16)(
    parallel.replicate(variables), images, labels
  )
  np.testing.assert_array_equal(outcome.clean, same.clean)


def test_a_gradient_that_is_not_a_number_breaks_nothing(case):
  """The attack finds nothing, the evaluation says so and goes on."""
  images, labels, variables, _ = case
  broken = lambda v, x: logits_fn(v, x) + 0 * jnp.sqrt(0 * jnp.abs(x)).sum()
  suite = [('apgd', apgd.APGD(norms.Linf(EPSILON), num_steps=3))]
  evaluator = Evaluator(broken, suite, batch_size=8, thorough=True)
  outcome = evaluator(parallel.replicate(variables), images, labels)
  assert outcome.clean.any()
  assert any('not finite' in line for line in outcome.warnings)


def test_logits_that_an_attack_makes_infinite_count_as_wrong():
  """As in the published code, where no comparison with nan is ever right."""
  fragile = lambda _, x: (
    jnp.where(x.max(axis=(1, 2, 3))[:, None] > 0.55, jnp.nan, jnp.array([[1.0, 0.0]]))
    + 0 * x.sum(axis=(1, 2, 3))[:, None]
  )
  images = np.full((6, 2, 2, 1), 128, np.uint8)
  start = attack(num_steps=1, step_sizes=(1e-3,))
  evaluator = Evaluator(fragile, [('start', start)], batch_size=8)
  outcome = evaluator(parallel.replicate([np.zeros(1)]), images, np.zeros(6, int))
  assert outcome.clean.all() and outcome.robust.sum() < 6
  assert any('not finite' in line for line in outcome.warnings)


def test_a_record_without_its_images_is_refused(tmp_path):
  record = Record(2, tmp_path, {})
  fell = np.array([True, False])
  images = np.zeros((2, 2, 2, 1), np.float32)
  record.advance(np.arange(2), fell, images, np.zeros(2, int), keep=2, write=True)
  [path] = tmp_path.glob('adversarial-*.npz')
  path.unlink()
  with pytest.raises(UserError, match='is absent: remove'):
    Record(2, tmp_path, {})


@pytest.mark.parametrize('count', [32, 20])  # The half of 20 is no 4 devices' share.
def test_few_images_left_run_in_smaller_batches(count):
  """All images are in one batch, of which 5 reach the second attempt."""
  sizes = []
  log = lambda pixels, index: sizes.append((int(index), pixels.size))
  images = np.zeros((count, 2, 2, 1), np.uint8)
  images[:5, 0, 0, 0] = 9
  evaluator = Evaluator(bright, [('a', Scripted(2, log))], batch_size=64, thorough=True)
  evaluator(parallel.replicate([np.zeros(1)]), images, np.zeros(count, int))
  jax.effects_barrier()
  total = lambda index: sum(size for i, size in sizes if i == index)
  assert (total(0), total(1)) == (count, 8)


@pytest.mark.parametrize(
  'network, words',
  [
    (lambda _, x: x.sum(axis=(1, 2, 3)), 'of at least 2 classes'),
    (lambda _, x: x.sum(axis=(1, 2, 3))[:, None], 'of at least 2 classes'),
  ],
)
def test_what_are_no_logits_is_refused(network, words):
  images = np.zeros((2, 2, 2, 1), np.uint8)
  with pytest.raises(UserError, match=words):
    Evaluator(network, [], batch_size=4)(
      parallel.replicate([np.zeros(1)]), images, np.zeros(2, int)
    )


@pytest.fixture(scope='module')
def outcome():
  """Of four images: one wrong, one fell to each attack, one stands."""
  return Outcome(
    clean=np.array([True, True, False, True]),
    robust=np.array([False, True, False, False]),
    fallen_to=np.array([0, -1, -1, 1]),
    names=('apgd-ce', 'square:num_queries=<9>'),
    adversarial=np.zeros((2, 4, 4, 1), np.float32),
    predictions=np.array([1, 0], np.int32),
    warnings=['gradients may be <masked>'],
  )


def test_an_outcome_prints_as_a_few_lines(outcome):
  assert repr(outcome).splitlines() == [
    'Outcome of 4 images',
    '  clean                         75.00%',
    '  robust                        25.00%',
    '  after apgd-ce                 50.00%',
    '  after square:num_queries=<9>  25.00%',
    '  warning: gradients may be <masked>',
  ]
  page = outcome._repr_html_()
  assert '<td>after apgd-ce</td><td>50.00%</td>' in page and '<caption>4 images' in page
  clean = outcome._replace(names=(), warnings=[], robust=outcome.clean)
  assert repr(clean).splitlines() == ['Outcome of 4 images', '  clean  75.00%']
  assert '&lt;9&gt;' in page and '&lt;masked&gt;' in page and '<9>' not in page


def test_an_outcome_has_its_figures_as_json(outcome):
  assert outcome.to_dict() == {
    'clean_correct': 3,
    'robust_correct': 1,
    'clean_accuracy': 0.75,
    'robust_accuracy': 0.25,
    'attacks': [
      {'name': 'apgd-ce', 'fallen': 1, 'robust_accuracy': 0.5},
      {'name': 'square:num_queries=<9>', 'fallen': 1, 'robust_accuracy': 0.25},
    ],
    'warnings': ['gradients may be <masked>'],
  }
  assert (outcome.clean_accuracy, outcome.robust_accuracy) == (0.75, 0.25)


def test_an_outcome_is_saved(outcome, tmp_path):
  outcome.save(tmp_path / 'new' / 'figures.json')
  found = json.loads((tmp_path / 'new' / 'figures.json').read_text())
  assert found == outcome.to_dict()
  outcome.save(str(tmp_path / 'all.npz'))
  with np.load(tmp_path / 'all.npz') as saved:
    assert json.loads(str(saved['figures'])) == outcome.to_dict()
    for name in ('clean', 'robust', 'fallen_to', 'adversarial', 'predictions'):
      np.testing.assert_array_equal(saved[name], getattr(outcome, name))
  with pytest.raises(UserError, match='saved as .json.*or .npz'):
    outcome.save(tmp_path / 'all.pickle')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['all.npz', 'new']


@pytest.fixture
def kept(tmp_path):
  """A folder whose record is under way, with a batch of images that fell."""
  record = Record(3, tmp_path, {'seed': 0})
  images = np.full((3, 2, 2, 1), 0.25, np.float32)
  record.warn('a line')
  record.advance(
    np.arange(3),
    np.array([False, True, True]),
    images,
    np.array([0, 1, 2]),
    keep=3,
    write=True,
  )
  return tmp_path


def refused(folder):
  """Whether the record is refused, by one line that names a file and the remedy."""
  try:
    record = Record(3, folder, {'seed': 0})
    record.check(4, (2, 2, 1))
  except UserError as e:
    line = str(e)
    assert str(folder) in line and f'remove {folder}' in line, line
    assert '\n' not in line and len(line) < 400, line
    return True
  assert record.fallen.tolist() == [STANDING, 0, 0] and record.warnings == ['a line']
  assert sorted(record.adversarial) == [1, 2] and record.predictions == {1: 1, 2: 2}
  return False


DAMAGES = {
  'fallen': [
    np.array([0, 0]),
    np.array([-2, 0, 0]),
    np.array([1, 0, 0]),
    np.zeros((3, 1), int),
    np.zeros(3),
    np.array([2**40, 0, 0]),
  ],
  'position': [np.array([0, 4, 1]), np.array([5, 0, 1]), np.array([-1, 0, 1]), 3],
  'files': [np.array([1]), np.array([-1]), np.array(['a'])],
  'warnings': ['{}', '[1]', '[', '"a"', np.array(['[]'])],
  'identity': [np.array(3)],
}


@pytest.mark.parametrize('name', DAMAGES)
def test_a_record_that_cannot_be_is_refused(kept, name):
  path = kept / 'state.npz'
  assert not refused(kept)
  with np.load(path) as state:
    whole = dict(state)
  for value in DAMAGES[name]:
    np.savez(path, **whole | {name: value})
    assert refused(kept), value
  np.savez(path, **{k: v for k, v in whole.items() if k != name})
  assert refused(kept)


def test_images_that_cannot_be_of_this_record_are_refused(kept):
  [path] = kept.glob('adversarial-*.npz')
  with np.load(path) as batch:
    whole = dict(batch)
  for name, value in (
    ('images', whole['images'] + 1),
    ('images', whole['images'] * np.nan),
    ('images', whole['images'][:1]),
    ('images', whole['images'][:, :1]),
    ('index', np.array([1, 3])),
    ('predictions', np.array([-1, 2**40])),
  ):
    np.savez(path, **whole | {name: value})
    assert refused(kept), name


def test_damaged_files_of_a_record_never_go_further(kept):
  """Bytes that are changed, cut off or repeated: refused, or read as they were."""
  rng, count = random.Random(0), 0
  for path in sorted(kept.glob('*.npz')):
    whole = path.read_bytes()
    for _ in range(150):
      content = bytearray(whole)
      for _ in range(rng.choice((1, 1, 3, 20))):
        content[rng.randrange(len(content))] = rng.choice(
          (0, 1, 255, rng.randrange(256))
        )
      cut = rng.randrange(len(content))
      content = rng.choice((content, content, content[:cut], content + content[cut:]))
      path.write_bytes(bytes(content))
      count += refused(kept)
    path.write_bytes(whole)
  assert count > 200 and not refused(kept)
