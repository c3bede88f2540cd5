"""AutoPGD against exact optima on linear networks and a float64 AutoPGD."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrobust.attacks import apgd, norms

SHAPE = (3, 3, 2)
SIZE = 18
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(SIZE, 5)).astype(np.float32)
BALLS = {'linf': norms.Linf(0.1), 'l2': norms.L2(0.3), 'l1': norms.L1(0.1)}
each_ball = pytest.mark.parametrize('norm', BALLS)


def linear(images, classes=5):
  """Logits of a linear network; an elementwise sum, the same in any batch."""
  flat = images.reshape(len(images), SIZE, 1) - 0.5
  return jnp.sum(flat * WEIGHTS[None, :, :classes], axis=1)


two_class = functools.partial(linear, classes=2)


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def some_images(count, low=0.0, high=1.0, seed=1):
  rng = np.random.default_rng(seed)
  return rng.uniform(low, high, (count, *SHAPE)).astype(np.float32)


def crowded(count, seed=1):
  """Images of which most values are 0 or 1."""
  return np.clip(some_images(count, -1, 2, seed), 0, 1)


def length(ball, offsets):
  """The norm of each offset, in float64."""
  order = {norms.Linf: np.inf, norms.L2: 2, norms.L1: 1}[type(ball)]
  flat = np.asarray(offsets, np.float64).reshape(len(offsets), -1)
  return np.linalg.norm(flat, order, axis=-1)


def assert_inside(ball, found, images):
  found = np.asarray(found)
  assert found.min() >= 0 and found.max() <= 1
  # Sums of 18 float32.
  assert length(ball, found - images).max() <= ball.epsilon + 2e-6


def most(ball, image, direction):
  """Most that a linear function gains in ball and pixel range, in float64."""
  image = np.asarray(image, np.float64).ravel()
  room = np.where(direction > 0, 1 - image, image)
  slope = np.abs(np.asarray(direction, np.float64))
  match ball:
    case norms.Linf():
      return slope @ np.minimum(room, ball.epsilon)
    case norms.L2():
      low, high = 0.0, 1e6
      for _ in range(200):
        middle = (low + high) / 2
        fits = np.linalg.norm(np.minimum(room, middle * slope)) <= ball.epsilon
        low, high = (middle, high) if fits else (low, middle)
      return slope @ np.minimum(room, low * slope)
    case norms.L1():
      order = np.argsort(-slope)
      before = np.concatenate([[0], np.cumsum(room[order])[:-1]])
      spent = np.clip(ball.epsilon - before, 0, room[order])
      return slope[order] @ spent


def highest_margin(ball, images, labels, classes):
  """The highest margin that any image of each ball has, [n]."""
  logits = np.asarray(images, np.float64).reshape(-1, SIZE) - 0.5
  logits = logits @ WEIGHTS[:, :classes].astype(np.float64)
  margins = []
  for image, label, z in zip(images, labels, logits, strict=True):
    slope = WEIGHTS - WEIGHTS[:, [label]]
    others = [k for k in range(classes) if k != label]
    margins.append(
      max(z[k] - z[label] + most(ball, image, slope[:, k]) for k in others)
    )
  return np.array(margins)


@functools.cache
def runner(norm, loss, classes, num_steps=100, scale=1.0):
  """A compiled attempt of an attack on the linear network."""
  ball = type(BALLS[norm])(BALLS[norm].epsilon * scale)
  attack = apgd.APGD(ball, loss, num_steps)
  network = functools.partial(linear, classes=classes)
  return ball, jax.jit(functools.partial(attack.attempt, network))


def test_checkpoints_are_those_of_the_paper():
  at = apgd.checkpoints(100)
  # 0, 0.22, 0.41, ... in section 3; none lies at 0 here.
  assert (np.flatnonzero(at) + 1).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
  assert at[at > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]


@pytest.mark.parametrize(
  ('num_steps', 'expected'),
  [
    (1, [1]),
    (2, [1, 2]),
    (5, [1, 2, 3, 4, 5]),
    (10, [2, 3, 4, 5, 6, 7, 8, 9, 10]),
    (40, [8, 15, 21, 26, 30, 33, 35, 37, 39]),
  ],
)
def test_checkpoints_of_short_attacks(num_steps, expected):
  at = apgd.checkpoints(num_steps)
  assert len(at) == num_steps
  assert (np.flatnonzero(at) + 1).tolist() == expected
  # Each says how many steps it looks back on.
  np.testing.assert_array_equal(np.diff([0, *expected]), at[at > 0])


# What APGD misses of the exact optimum, as a share of the most that the margin gains:
# in l2 by clipping after the projection, whose fixed point nears the optimum as steps
# shrink.
SLACK = {'linf': 1e-4, 'l2': 0.02, 'l1': 1e-4}


def assert_flips_what_can_be(norm, classes, flip):
  """Also where the pixel range binds: half of the images are full of 0 and 1."""
  images = np.concatenate([some_images(60, 0.1, 0.9), crowded(60)])
  labels = np.asarray(linear(images, classes).argmax(-1))
  best = highest_margin(BALLS[norm], images, labels, classes)
  nothing = type(BALLS[norm])(1e-9)
  gains = best - highest_margin(nothing, images, labels, classes)
  flipped = flip(images, labels)
  assert flipped[:60].any() and flipped[60:].any() and not flipped.all()
  clear = np.abs(best) > SLACK[norm] * gains
  assert clear.sum() > 110
  if norm == 'l1':
    # Steps along the largest gradients alone stop at values that have reached their
    # end, as published; in so few dimensions these can be all that move.
    assert not flipped[clear & (best < 0)].any()
    assert flipped[60:].sum() >= 0.7 * (best[60:] > 0).sum()
    clear[60:] = False
  np.testing.assert_array_equal(flipped[clear], best[clear] > 0)


@pytest.mark.parametrize(
  ('norm', 'loss'),
  [
    ('linf', 'cross_entropy'),
    ('l2', 'cross_entropy'),
    ('l1', 'cross_entropy'),
    ('linf', 'dlr'),
    ('l2', 'targeted_dlr'),
  ],
)
def test_flips_of_two_classes_what_can_be_flipped(norm, loss):
  ball, attempt = runner(norm, loss, 2)

  def flip(images, labels):
    found = attempt(keys(120), images, labels, 0)
    assert_inside(ball, found, images)
    return np.asarray(two_class(found).argmax(-1)) != labels

  assert_flips_what_can_be(norm, 2, flip)


@each_ball
def test_all_targets_together_flip_what_can_be_flipped(norm):
  ball, attempt = runner(norm, 'targeted_dlr', 5)

  def flip(images, labels):
    flipped = np.zeros(120, bool)
    for index in range(4):
      found = attempt(keys(120), images, labels, index)
      assert_inside(ball, found, images)
      flipped |= np.asarray(linear(found).argmax(-1)) != labels
    return flipped

  assert_flips_what_can_be(norm, 5, flip)


@pytest.mark.parametrize(
  ('norm', 'loss'),
  [('linf', 'cross_entropy'), ('linf', 'dlr'), ('l2', 'dlr'), ('l1', 'dlr')],
)
def test_of_five_classes_never_flips_what_cannot_be_flipped(norm, loss):
  """Not all that can be: an attempt may climb towards another class than the best."""
  ball, attempt = runner(norm, loss, 5)
  images = np.concatenate([some_images(60, 0.1, 0.9), crowded(60)])
  labels = np.asarray(linear(images).argmax(-1))
  best = highest_margin(ball, images, labels, 5)
  found = attempt(keys(120), images, labels, 0)
  assert_inside(ball, found, images)
  flipped = np.asarray(linear(found).argmax(-1)) != labels
  assert not flipped[best < -1e-5].any()
  assert flipped.sum() >= (0.7 if norm == 'l1' else 0.9) * (best > 0).sum()


# A network of one hidden layer, and its cross-entropy in numpy.
HIDDEN = RNG.normal(size=(SIZE, 6)) * 1.5
OUT = RNG.normal(size=(6, 3))
BIAS = np.array([4.0, 0.0, 0.0])


def curved(images):
  flat = images.reshape(len(images), SIZE, 1) - 0.5
  hidden = jnp.tanh(jnp.sum(flat * jnp.asarray(HIDDEN)[None], axis=1))
  out = jnp.sum(hidden[:, :, None] * jnp.asarray(OUT)[None], axis=1)
  return out + jnp.asarray(BIAS)[None]


def curved_loss(x):
  """Cross-entropy to class 0, its gradient and whether another is predicted."""
  hidden = np.tanh((x - 0.5) @ HIDDEN)
  logits = hidden @ OUT + BIAS
  p = np.exp(logits - logits.max())
  p /= p.sum()
  gradient = HIDDEN @ ((1 - hidden**2) * (OUT @ (p - np.eye(3)[0])))
  return -np.log(p[0]), gradient, logits.argmax() != 0


def numpy_apgd(image, start, epsilon, num_steps, euclidean):
  """AutoPGD of one image, from the paper's algorithm 1 and conditions 1 and 2."""
  if euclidean:
    unit = lambda v: v / np.linalg.norm(v)
    near = lambda x: image + (x - image) * min(1, epsilon / np.linalg.norm(x - image))
  else:
    unit = np.sign
    near = lambda x: np.clip(x, image - epsilon, image + epsilon)
  project = lambda x: np.clip(near(x), 0, 1)
  marks, width = [0, int(0.22 * num_steps)], int(0.22 * num_steps)
  while marks[-1] < num_steps:
    width = max(width - int(0.03 * num_steps), int(0.06 * num_steps))
    marks.append(marks[-1] + width)
  losses = [curved_loss(start)[0]]
  best, best_loss, size = start, losses[0], 2 * epsilon
  x, before, halved, best_before, halvings = start, start, True, losses[0], 0
  for k in range(1, num_steps + 1):
    _, gradient, fooled = curved_loss(x)
    if fooled:
      return x, halvings
    z = project(x + size * unit(gradient))
    share = 0.75 if k > 1 else 1
    x, before = project(x + share * (z - x) + (1 - share) * (x - before)), x
    losses.append(curved_loss(x)[0])
    if losses[-1] > best_loss:
      best, best_loss = x, losses[-1]
    if k in marks:
      last = marks[marks.index(k) - 1]
      rises = sum(losses[j] > losses[j - 1] for j in range(last + 1, k + 1))
      few = rises <= 0.75 * (k - last)
      stuck = not halved and best_loss == best_before
      halved, best_before = few or stuck, best_loss
      if halved:
        size, x, halvings = size / 2, best, halvings + 1
        # Where it returns to, the next step's first loss is the best one's; the
        # published code compares with the loss of the step before, as here.
  return (x if curved_loss(x)[2] else best), halvings


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_the_path_is_that_of_the_paper(norm, float64):
  # In single precision a gradient near 0 may have either sign, and paths part.
  ball = {'linf': norms.Linf(0.1), 'l2': norms.L2(0.35)}[norm]
  images = some_images(12, seed=3).astype(np.float64)
  labels, total = np.zeros(12, int), 0
  images[0] = np.round(images[0])
  # The first of two keys draws noise, which is scaled to the sphere.
  draw = jax.random.normal if norm == 'l2' else jax.random.uniform
  noise = jax.vmap(lambda k: draw(jax.random.split(k)[0], SHAPE, images.dtype))(
    keys(12)
  )
  noise = np.asarray(noise if norm == 'l2' else 2 * noise - 1)
  noise = noise / length(ball, noise)[:, None, None, None]
  starts = np.clip(images + ball.epsilon * noise, 0, 1)
  attempt = jax.jit(functools.partial(apgd.APGD(ball, num_steps=50).attempt, curved))
  found = np.asarray(attempt(keys(12), images, labels, 0)).reshape(12, SIZE)
  fooled = np.asarray(curved(found.reshape(12, *SHAPE)).argmax(-1)) != 0
  assert 2 <= fooled.sum() <= 10
  for n in range(12):
    x, start = images[n].ravel().astype(float), starts[n].ravel().astype(float)
    expected, halvings = numpy_apgd(x, start, ball.epsilon, 50, norm == 'l2')
    np.testing.assert_allclose(found[n], expected, atol=1e-8)
    total += halvings
  assert total > 3


@pytest.mark.parametrize(
  ('norm', 'num_steps'),
  [(norm, n) for norm in BALLS for n in (1, 2, 3, 7)],
)
def test_short_attacks_stay_inside(norm, num_steps):
  ball, attempt = runner(norm, 'cross_entropy', 5, num_steps, 3.0)
  images = crowded(120)
  found = attempt(keys(120), images, np.zeros(120, int), 0)
  assert_inside(ball, found, images)
  assert (np.abs(found - images).max(axis=(1, 2, 3)) > 0).all()


@each_ball
def test_a_result_does_not_depend_on_its_batch(norm):
  _, attempt = runner(norm, 'dlr', 5)
  images = np.concatenate([some_images(60, 0.1, 0.9), crowded(60)])
  labels = np.asarray(linear(images).argmax(-1))
  whole = np.asarray(attempt(keys(120), images, labels, 0))
  for part in (slice(55, 65), slice(4, 5)):
    repeated = np.resize(np.arange(120)[part], 120)
    found = attempt(keys(120)[repeated], images[repeated], labels[repeated], 0)
    np.testing.assert_array_equal(found, whole[repeated])


def test_ends_when_all_images_are_fooled_and_keeps_the_first_point():
  calls = []

  def network(images):
    jax.debug.callback(lambda: calls.append(None))
    return two_class(images)

  images = np.full((2, *SHAPE), 0.5, np.float32)
  images[1] -= 0.4 * np.sign(WEIGHTS[:, 1] - WEIGHTS[:, 0]).reshape(SHAPE)
  labels = np.array([0, 0])
  attempt = jax.jit(functools.partial(apgd.APGD(norms.Linf(0.05)).attempt, network))
  first = np.array([0, 0])
  alone = attempt(keys(2)[first], images[first], labels, 0)
  jax.effects_barrier()
  assert len(calls) <= 4
  calls.clear()
  # The second image cannot be flipped; meanwhile the first one stays.
  both = attempt(keys(2), images, labels, 0)
  jax.effects_barrier()
  assert len(calls) == 101
  assert two_class(both).argmax(-1).tolist() == [1, 0]
  np.testing.assert_array_equal(both[0], alone[0])


def test_few_classes():
  remark = lambda loss, classes: apgd.APGD(BALLS['linf'], loss).remark(classes)
  assert remark('cross_entropy', 2) == '' and remark('dlr', 3) == ''
  assert remark('targeted_dlr', 10) == ''
  assert 'margin takes the place of dlr, which needs 3' in remark('dlr', 2)
  for classes in (2, 3):
    assert 'which needs 4 classes' in remark('targeted_dlr', classes)
  assert remark('targeted_dlr', 4) == '3 targets in place of 9'


def test_attempts_are_restarts_within_targets():
  attack = apgd.APGD(BALLS['l2'], 'targeted_dlr', 5, restarts=2, num_targets=3)
  assert [attack.num_attempts(k) for k in (2, 3, 4, 5, 10)] == [2, 4, 6, 6, 6]
  assert apgd.APGD(BALLS['l2'], 'dlr', restarts=5).num_attempts(10) == 5
  traces = []

  def network(images):
    traces.append(None)
    return linear(images)

  images = some_images(4, 0.4, 0.6)
  labels = np.asarray(linear(images).argmax(-1))
  attempt = jax.jit(functools.partial(attack.attempt, network))
  first = attempt(keys(4), images, labels, 0)
  count = len(traces)
  found = [np.asarray(attempt(keys(4), images, labels, i)) for i in range(6)]
  assert len(traces) == count
  np.testing.assert_array_equal(first, found[0])
  for index in (0, 2, 4):
    # With one key the restarts of a target are one; other targets lie elsewhere.
    np.testing.assert_array_equal(found[index], found[index + 1])
    assert (found[index] != found[(index + 2) % 6]).any()


def test_a_call_keeps_the_attempt_of_the_highest_margin():
  attack = apgd.APGD(BALLS['l2'], 'targeted_dlr', 5)
  images = some_images(6, 0.4, 0.6)
  labels = np.asarray(linear(images).argmax(-1))
  margin = lambda x: np.asarray(apgd.objectives.margin(linear(x), labels))
  found = jax.jit(functools.partial(attack, linear))(keys(6), images, labels)
  assert (margin(found) > margin(images)).all()
  assert_inside(attack.ball, found, images)


def noisy(images, rng):
  """A margin whose slope is 3 and -1 in turn: on average the linear network's."""
  return two_class(images) * (1 + 2 * jax.random.rademacher(rng, ()))


def test_draws_of_a_randomised_network_are_averaged():
  images, labels = some_images(8, 0.4, 0.6), np.arange(8) % 2
  slope = (WEIGHTS[:, 1] - WEIGHTS[:, 0]).reshape(SHAPE)
  sides = np.where(labels == 0, 1, -1)[:, None, None, None]
  optimum = images + 0.1 * sides * np.sign(slope)
  # The other label is out of reach, so that no point fools by its noise.
  network = lambda x, rng: noisy(x, rng) - 50 * jax.nn.one_hot(1 - labels, 2)
  hits = {}
  for samples in (1, 33):
    attack = apgd.APGD(BALLS['linf'], 'dlr', num_steps=1, samples=samples)
    assert attack.randomized
    attempt = jax.jit(functools.partial(attack.attempt, network))
    found = [np.asarray(attempt(keys(8, s), images, labels, 0)) for s in range(6)]
    np.testing.assert_array_equal(found[0], attempt(keys(8), images, labels, 0))
    far = np.abs(np.array(found) - optimum).max(axis=(2, 3, 4))
    hits[samples] = np.mean(far < 1e-5)
  # A single step climbs if the mean of its draws, 3 or -1 each, is above 0: half of
  # the time for one draw, 499 times of 500 for 33. The loss is then noisy as well.
  assert hits[1] < 0.7 and hits[33] > 0.9


def test_a_randomised_network_is_called_once_a_sample():
  calls = []

  def network(images, rng):
    jax.debug.callback(lambda: calls.append(None))
    return noisy(images, rng) - 50 * jax.nn.one_hot(1, 2)[None]

  attack = apgd.APGD(BALLS['linf'], num_steps=3, samples=4)
  attack.attempt(network, keys(1), some_images(1), np.array([0]), 0)
  jax.effects_barrier()
  assert len(calls) == (3 + 1) * 4


def test_the_example_holds():
  assert doctest.testmod(apgd).failed == 0
