"""Judging a network of one's own: of any kind, resumed, and broken defences."""

import doctest
import functools
import gc
import json
import sys
import types
import weakref

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from jaxrobust import attacks
from jaxrobust.attacks import apgd, norms, robustness
from jaxrobust.attacks.robustness import evaluate_robustness
from jaxrobust.errors import UserError

SHAPE = (6, 6, 1)
COUNT = 24
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(36, 4)).astype(np.float32)
IMAGES = RNG.random((COUNT, *SHAPE), np.float32)
judge = functools.partial(
  evaluate_robustness, norm='linf', batch_size=COUNT, progress=None
)


def linear(images):
  return (images.reshape(len(images), 36) - 0.5) @ WEIGHTS


LABELS = np.asarray(linear(IMAGES).argmax(-1))


def warned(outcome, words):
  return any(words in line for line in outcome.warnings)


def counting(logits_fn):
  """The function, and a list that grows whenever it computes."""
  calls = []

  def counted(images):
    jax.debug.callback(lambda: calls.append(None))
    return logits_fn(images)

  return counted, calls


@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.uint8])
def test_a_plain_function_without_attacks(dtype):
  images = (IMAGES * 255).astype(dtype) if dtype == np.uint8 else IMAGES.astype(dtype)
  outcome = judge(
    linear, images, (LABELS + (np.arange(COUNT) < 6)) % 4, epsilon=0.1, suite='clean'
  )
  right = np.asarray(linear(IMAGES if dtype != np.uint8 else images / 255).argmax(-1))
  np.testing.assert_array_equal(
    outcome.clean, right == (LABELS + (np.arange(COUNT) < 6)) % 4
  )
  np.testing.assert_array_equal(outcome.robust, outcome.clean)
  assert outcome.warnings == [] and (outcome.fallen_to == -1).all()


def test_a_linear_network_is_judged_exactly():
  """Each target's margin moves by the l1 norm of its slope, within the pixel range."""
  epsilon, best = 0.03, np.full(COUNT, -np.inf)
  logits = (IMAGES.reshape(COUNT, 36).astype(np.float64) - 0.5) @ WEIGHTS
  for n, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
    for k in set(range(4)) - {label}:
      slope, x = WEIGHTS[:, k] - WEIGHTS[:, label], image.ravel()
      room = np.minimum(np.where(slope > 0, 1 - x, x), epsilon)
      best[n] = max(best[n], logits[n, k] - logits[n, label] + room @ np.abs(slope))
  assert np.abs(best).min() > 1e-3 and (best > 0).any() and (best < 0).any()
  outcome = judge(
    linear, IMAGES, LABELS, epsilon=epsilon, suite='apgd-t:num_steps=10', keep=COUNT
  )
  np.testing.assert_array_equal(outcome.robust, best < 0)
  np.testing.assert_array_equal(outcome.predictions == LABELS, outcome.robust)
  changed = np.asarray(linear(outcome.adversarial).argmax(-1)) != LABELS
  np.testing.assert_array_equal(changed, ~outcome.robust)
  assert outcome.names == ('apgd-t:num_steps=10',)
  assert outcome.by_attack() == {outcome.names[0]: outcome.robust.mean()}
  assert warned(outcome, 'apgd-t:num_steps=10: 3 targets in place of 9')


def test_a_haiku_network():
  def forward(images, is_training=False):
    normalized = hk.BatchNorm(True, True, 0.9)(images, is_training)
    hidden = hk.Linear(8)(normalized.reshape(-1, 36))
    return hk.Linear(4)(jax.nn.relu(hidden))

  network = hk.transform_with_state(forward)
  params, state = network.init(jax.random.key(0), IMAGES, is_training=True)
  logits_fn = lambda images: network.apply(params, state, None, images)[0]
  labels = np.asarray(logits_fn(IMAGES).argmax(-1))
  outcome = judge(
    logits_fn, IMAGES, labels, epsilon=0.2, suite='apgd-ce:num_steps=5', keep=COUNT
  )
  assert outcome.clean.all() and not outcome.robust.all()
  np.testing.assert_array_equal(
    np.asarray(logits_fn(outcome.adversarial).argmax(-1)) != labels, ~outcome.robust
  )


LARGE = RNG.normal(size=(36, 500)).astype(np.float32)
CLOSURES = {
  'jax': lambda w: lambda x: x.reshape(len(x), 36) @ jnp.asarray(w),
  'jit': lambda w: jax.jit(lambda x: x.reshape(len(x), 36) @ jnp.asarray(w)),
  'loop': lambda w: (
    lambda x: jax.lax.fori_loop(
      0,
      2,
      lambda _, y: y + x.reshape(len(x), 36) @ jnp.asarray(w),
      jnp.zeros((len(x), 500)),
    )
  ),
  'remat': lambda w: jax.checkpoint(lambda x: x.reshape(len(x), 36) @ jnp.asarray(w)),
}


@pytest.mark.parametrize('kind', CLOSURES)
def test_large_arrays_do_not_become_constants(kind):
  logits_fn = CLOSURES[kind](jnp.asarray(LARGE))
  variables, pure_fn, *_ = robustness._hoist(logits_fn, SHAPE, False)
  assert [v.shape for v in variables] == [LARGE.shape]
  # 18,000 numbers would be 150,000 letters.
  assert len(jax.jit(pure_fn).lower(variables, IMAGES).as_text()) < 20_000
  np.testing.assert_allclose(pure_fn(variables, IMAGES), logits_fn(IMAGES), rtol=1e-5)
  doubled = pure_fn([2 * v for v in variables], IMAGES)
  np.testing.assert_allclose(doubled, 2 * logits_fn(IMAGES), rtol=1e-5)


@pytest.mark.parametrize('kind', [*CLOSURES, 'nested'])
def test_networks_are_told_apart(kind):
  closure = CLOSURES['jit'] if kind == 'nested' else CLOSURES[kind]
  wrap = (lambda f: lambda x: 2 * f(x)) if kind == 'nested' else lambda f: f
  prints = [
    robustness._hoist(wrap(closure(jnp.asarray(w))), SHAPE, False)[2]
    for w in (LARGE, LARGE.copy(), 2 * LARGE)
  ]
  assert prints[0] == prints[1] != prints[2]


def test_networks_without_arrays_are_told_apart():
  prints = [
    robustness._hoist(f, SHAPE, False)[2]
    for f in (
      lambda x: 2 * x[:, 0, :, 0],
      lambda x: 2 * x[:, 0, :, 0],
      lambda x: 3 * x[:, 0, :, 0],
    )
  ]
  assert prints[0] == prints[1] != prints[2]


SUITE = 'apgd-ce:num_steps=3,apgd-dlr:num_steps=3'


def test_a_folder_is_not_judged_again(tmp_path, monkeypatch):
  run = functools.partial(
    judge, linear, IMAGES, LABELS, epsilon=0.03, suite=SUITE, folder=tmp_path, keep=4
  )
  first = run()
  attempts = []

  def attempt(self, *args):
    attempts.append(self)
    return args[2]

  monkeypatch.setattr(apgd.APGD, 'attempt', attempt)
  again = run()
  assert attempts == []
  for one, other in zip(first, again, strict=True):
    np.testing.assert_array_equal(one, other)


def test_an_interrupted_evaluation_goes_on(tmp_path):
  """Killed within an attack, it ends as one that was never interrupted."""
  run = functools.partial(judge, linear, IMAGES, LABELS, epsilon=0.03, suite=SUITE)
  whole = run(batch_size=8, keep=COUNT)

  class Killed:
    """Progress that ends in its fifth step, in the middle of the first attack."""

    steps = 0

    def __init__(self, *args):
      pass

    def advance(self, count, note):
      Killed.steps += 1
      if Killed.steps == 5:
        raise KeyboardInterrupt

    def close(self):
      pass

  partly = functools.partial(run, batch_size=8, keep=COUNT, folder=tmp_path)
  with pytest.raises(KeyboardInterrupt):
    partly(progress=Killed)
  resumed = partly()
  for one, other in zip(whole, resumed, strict=True):
    np.testing.assert_array_equal(one, other)


def test_another_evaluation_in_the_folder_is_refused(tmp_path):
  run = functools.partial(judge, epsilon=0.03, folder=tmp_path, suite='clean')
  run(linear, IMAGES, LABELS)
  run(linear, IMAGES, LABELS)
  others = [
    lambda: run(lambda x: linear(x) * 2, IMAGES, LABELS),
    lambda: run(jax.jit(lambda x: linear(x) @ np.float32(np.eye(4))), IMAGES, LABELS),
    lambda: run(linear, IMAGES[::-1], LABELS),
    lambda: run(linear, IMAGES, LABELS[::-1]),
    lambda: run(linear, IMAGES, LABELS, epsilon=0.04),
    lambda: run(linear, IMAGES, LABELS, norm='l2'),
    lambda: run(linear, IMAGES, LABELS, seed=1),
    lambda: run(linear, IMAGES, LABELS, suite='apgd-ce'),
  ]
  for other in others:
    with pytest.raises(UserError, match='holds the evaluation of something else'):
      other()


def test_rounding_the_input_does_not_hide_from_square():
  """Eight levels of grey: no gradient at all, and AutoPGD finds next to nothing."""
  rounded = lambda x: linear(jnp.round(x * 7) / 7)
  labels = np.asarray(rounded(IMAGES).argmax(-1))
  outcome = judge(
    rounded,
    IMAGES,
    labels,
    epsilon=0.1,
    suite='apgd-ce:num_steps=10,square:num_queries=600',
  )
  shares = outcome.by_attack()
  assert shares['square:num_queries=600'] < 0.2
  assert shares['apgd-ce:num_steps=10'] > shares['square:num_queries=600'] + 0.2
  assert warned(outcome, 'gradient of the cross-entropy is zero for 24 of the first 24')
  assert warned(outcome, 'gradient of the margin is zero for 24')
  assert warned(outcome, 'Square lowers the robust accuracy')


@pytest.mark.parametrize('scale', [1e6, 1e-6])
def test_saturated_logits_do_not_hide_from_dlr(scale):
  """The loss of logits x 1e6 has no gradient in float32; DLR knows no scale."""
  outcome = judge(
    lambda x: linear(x) * scale,
    IMAGES,
    LABELS,
    epsilon=0.1,
    suite='apgd-dlr:num_steps=10',
  )
  assert outcome.clean.all() and outcome.robust.mean() < 0.1
  # That of the cross-entropy is rounding noise, 0 or not, as the compiler sees fit.
  assert not warned(outcome, 'margin is zero')


def noisy(images, rng):
  """Half of the values are dropped, others in each call."""
  keep = jax.random.bernoulli(rng, 0.5, images.shape[1:])
  return linear(0.5 + 2 * (images - 0.5) * keep[None])


def test_a_random_layer_falls_to_averages_of_draws():
  images = np.clip(IMAGES + 0.02 * WEIGHTS.T[LABELS].reshape(-1, *SHAPE), 0, 1)
  outcome = judge(
    noisy,
    images,
    LABELS,
    epsilon=0.3,
    suite='apgd-ce:samples=8:num_steps=5,apgd-dlr:samples=8:num_steps=5',
  )
  assert outcome.robust.mean() < 0.2 and outcome.warnings == []


def test_autoattack_rand_on_a_network_that_is_not_random():
  outcome = judge(
    lambda x, rng: linear(x),
    IMAGES,
    LABELS,
    epsilon=0.03,
    suite='apgd-ce:samples=2:num_steps=2',
  )
  assert warned(outcome, 'the logits are not randomised: use suite autoattack')


def test_randomness_that_is_not_declared_is_noticed():
  rng = np.random.default_rng(0)

  @jax.custom_jvp
  def noise(x):
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
    return jax.pure_callback(draw, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

  noise.defjvp(lambda primals, tangents: (noise(*primals), jnp.zeros_like(primals[0])))
  outcome = judge(
    lambda x: linear(x + 0.01 * noise(x)),
    IMAGES,
    LABELS,
    epsilon=0.03,
    suite='apgd-ce:num_steps=2',
  )
  assert warned(outcome, 'the logits are randomised: use suite autoattack-rand')


def test_bad_arguments_are_told_in_one_line():
  for fields, words in (
    (dict(norm='l7'), "norm 'l7' is unknown"),
    (dict(epsilon=0), 'epsilon = 0'),
    (dict(epsilon=8), 'did you mean 8/255'),
    (dict(epsilon=[0.1, 8]), 'did you mean 8/255'),
    (dict(suite='autoatack'), "no attack or suite 'autoatack'"),
    (dict(labels=LABELS + 4), 'for logits of 4 classes'),
    (dict(images=IMAGES * 255), 'scale them to'),
    (dict(images=IMAGES[0]), r'give \[n, H, W, C\]'),
  ):
    arguments = dict(images=IMAGES, labels=LABELS, epsilon=0.1, suite='clean') | fields
    with pytest.raises(UserError, match=words):
      judge(linear, **arguments)


@pytest.mark.parametrize(
  'network, words',
  [
    (lambda x: {'aux': linear(x)[:, ::-1], 'logits': linear(x)}, 'makes a dict'),
    (lambda x: (linear(x), x), 'makes a tuple'),
    (lambda x: linear(x).argmax(-1), r'makes a int32 \[1\]'),
    (lambda x: np.asarray(x).reshape(len(x), 36) @ WEIGHTS, 'write it with jax.numpy'),
    (lambda x: linear(x) if x.max() > 0 else -linear(x), 'write it with jax.numpy'),
  ],
  ids=['dict', 'tuple', 'classes', 'numpy', 'condition'],
)
def test_what_makes_no_logits_is_refused(network, words):
  for call in (
    lambda: judge(network, IMAGES, LABELS, epsilon=0.1, suite='clean'),
    lambda: attacks.run('apgd-ce', network, IMAGES, LABELS, 'linf', 0.1),
  ):
    with pytest.raises(UserError, match=words) as e:
      call()
    assert '\n' not in str(e.value)


def test_a_network_in_training_mode_is_noticed():
  def normalized(images):
    flat = images.reshape(len(images), 36)
    mean, deviation = flat.mean(0, keepdims=True), flat.std(0, keepdims=True)
    return (flat - mean) / (deviation + 1e-3) @ WEIGHTS

  outcome = judge(normalized, IMAGES, LABELS, epsilon=0.03, suite='clean')
  assert warned(outcome, 'depend on the other images of its batch')
  assert warned(outcome, 'inference mode') and len(outcome.warnings) == 1


def test_a_network_that_optimises_at_test_time_is_noticed():
  def purified(images):
    spread = lambda x: jnp.sum(jax.nn.logsumexp(linear(x), axis=-1))
    step = lambda _, x: x - 0.01 * jax.grad(spread)(x)
    return linear(jax.lax.fori_loop(0, 2, step, images))

  outcome = judge(purified, IMAGES, LABELS, epsilon=0.03, suite='clean')
  assert warned(outcome, 'takes gradients to answer') and len(outcome.warnings) == 1


class Holder:
  """A network whose weights may be exchanged."""

  def __init__(self, weights):
    self.weights = jnp.asarray(weights)

  def __call__(self, images):
    return (images.reshape(len(images), 36) - 0.5) @ self.weights


def test_a_second_call_compiles_nothing_and_sees_other_weights():
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: 'backend_compile' in event and compiled.append(event)
  )
  network, suite = Holder(WEIGHTS), 'apgd-ce:num_steps=2'

  def both(network, epsilon=0.03):
    outcome = judge(network, IMAGES, LABELS, epsilon=epsilon, suite=suite)
    found = attacks.run(
      suite, network, IMAGES, LABELS, 'linf', epsilon, batch_size=COUNT
    )
    return outcome, found

  outcome, found = both(network)
  assert compiled
  compiled.clear()
  again, same = both(network)
  np.testing.assert_array_equal(found, same)
  np.testing.assert_array_equal(outcome.fallen_to, again.fallen_to)
  larger, further = both(network, 0.06)
  assert larger.robust_accuracy < outcome.robust_accuracy
  assert 0.05 < np.abs(further - IMAGES).max() <= 0.06 + 1e-6
  network.weights = jnp.asarray(-WEIGHTS)
  other, changed = both(network)
  assert compiled == []
  assert outcome.clean.all() and other.clean_accuracy < 0.1
  assert np.abs(found - changed).max() > 0.05
  # What is not the same function is compiled anew, and none is held for ever.
  judge(Holder(WEIGHTS), IMAGES, LABELS, epsilon=0.03, suite='clean')
  assert compiled
  dropped = weakref.ref(network)
  del network
  gc.collect()
  assert dropped() is None


@pytest.mark.parametrize(
  ('epsilon', 'words'),
  [('8/255', "epsilon = '8/255' is text"), ((), 'epsilon is empty')],
)
def test_what_is_no_epsilon_is_told(epsilon, words):
  with pytest.raises(UserError, match=words):
    evaluate_robustness(linear, IMAGES, LABELS, 'linf', epsilon)
  with pytest.raises(UserError, match='epsilon = '):
    attacks.run('pgd', linear, IMAGES, LABELS, 'linf', epsilon or (0.1, 0.2))


def test_several_epsilons_make_a_curve(tmp_path):
  batches = []

  class Batches:
    def __init__(self, what, total, unit):
      self._what = what

    def advance(self, count, note):
      batches.append(self._what)

    def close(self):
      pass

  curve = functools.partial(
    judge, linear, IMAGES, LABELS, suite='apgd-ce:num_steps=3', folder=tmp_path, keep=2
  )
  found = curve(epsilon=np.array([0.01, 0.1]), progress=Batches)
  assert set(batches) == {
    f'epsilon {e}, {what}'
    for e in (0.01, 0.1)
    for what in ('clean', curve.keywords['suite'])
  }
  batches.clear()
  assert list(found) == [0.01, 0.1] and found[0.01].clean_accuracy == 1
  assert found[0.1 + 1e-9] is found[0.1]  # As of 25.5 / 255.
  with pytest.raises(
    KeyError, match='epsilon 0.2 was not measured; those that were: 0.01, 0.1'
  ):
    found[0.2]
  alone = judge(linear, IMAGES, LABELS, epsilon=0.01, suite='apgd-ce:num_steps=3')
  np.testing.assert_array_equal(found[0.01].robust, alone.robust)
  assert found[0.01].robust_accuracy > found[0.1].robust_accuracy
  shares = [f'{found[e].robust_accuracy:.2%}' for e in found]
  for text in (repr(found), found._repr_html_()):
    assert all(x in text for x in ('epsilon', '0.01', '100.00%', *shares))
  assert repr(found).count('\n') == 2
  assert json.loads(json.dumps(found.to_dict()))['0.1'] == found[0.1].to_dict()
  # Each is in a folder of its own, and none is judged again.
  again = curve(epsilon=[0.01, 0.1], progress=Batches)
  assert repr(again) == repr(found) and batches == []
  assert sorted(p.name for p in tmp_path.iterdir()) == ['epsilon-0.01', 'epsilon-0.1']


@pytest.mark.parametrize('norm, epsilon', [('linf', 0.1), ('l2', 0.5), ('l1', 2.0)])
def test_an_attack_alone(norm, epsilon):
  """On images of any type, the same in batches of any size."""
  images = (IMAGES * 255).astype(np.uint8)
  pixels = images.astype(np.float32) / 255
  labels = np.asarray(linear(pixels).argmax(-1))
  attack = functools.partial(
    attacks.run, 'apgd-dlr:num_steps=4', linear, labels=labels, norm=norm
  )
  found = attack(images, epsilon=epsilon)
  assert found.shape == images.shape and found.dtype == np.float32
  # Rounding of single precision.
  assert norms.get(norm, epsilon).distance(found, pixels).max() <= epsilon + 1e-5
  assert found.min() >= 0 and found.max() <= 1
  assert (linear(found).argmax(-1) != labels).mean() > 0.5
  np.testing.assert_array_equal(found, attack(jnp.asarray(pixels), epsilon=epsilon))
  if norm == 'linf':
    other = attack(images, epsilon=epsilon, batch_size=8)
    np.testing.assert_allclose(found, other, atol=1e-6)
    assert np.abs(found - attack(images, epsilon=epsilon, seed=1)).max() > 0.01


def test_an_attack_alone_is_one_attack():
  for attack, words in (
    ('autoattack', 'has 4 attacks: give one, or use evaluate_robustness'),
    ('apgd_ce', 'did you mean apgd-ce?'),
    ('apgd-ce:steps=3', 'use field=value of num_steps'),
  ):
    with pytest.raises(UserError, match=words):
      attacks.run(attack, linear, IMAGES, LABELS, 'linf', 0.1)
  with pytest.raises(UserError, match='use 0 to 3'):
    attacks.run('square', linear, IMAGES, LABELS + 4, 'linf', 0.1)


def test_an_attack_alone_on_a_random_network():
  found = attacks.run(
    'apgd-ce:samples=2:num_steps=2', noisy, IMAGES, LABELS, 'linf', 0.3
  )
  assert 0.1 < np.abs(found - IMAGES).max() <= 0.3 + 1e-6


def test_progress_is_seen_off_a_terminal(capsys, monkeypatch):
  """As lines with speed and time left, also where nobody has turned logs on."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.WARNING)
  try:
    evaluate_robustness(linear, IMAGES, LABELS, 'linf', 0.1, 'clean', batch_size=8)
  finally:
    logging.set_verbosity(verbosity)
  err = capsys.readouterr().err
  assert 'clean: 24 of 24 images' in err and ' a second' in err
  assert '0:00 left' in err and 'clean 100.00%' in err


def test_progress_in_a_notebook_is_a_bar(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'ipykernel', types.ModuleType('ipykernel'))
  evaluate_robustness(linear, IMAGES, LABELS, 'linf', 0.1, 'clean', batch_size=8)
  err = capsys.readouterr().err
  assert 'clean: 100%' in err and '24/24' in err and 'clean 100.00%' in err


def test_the_example_holds():
  assert doctest.testmod(robustness).failed == 0


def test_constants_that_depend_on_the_batch_stay_where_they_are():
  """Traced for one image and fed to a batch they would be another function."""
  weights = np.random.RandomState(0).normal(size=(16, 3)).astype(np.float32)
  plain = lambda x: x.reshape(len(x), 16) @ weights
  picked = lambda x: plain(x)[np.arange(len(x))]
  images = np.random.RandomState(1).uniform(size=(10, 4, 4, 1)).astype(np.float32)
  labels = np.asarray(plain(images).argmax(axis=-1))
  outcome = evaluate_robustness(
    picked, images, labels, 'linf', 0.1, 'clean', progress=None
  )
  assert outcome.clean.all()


@pytest.mark.parametrize(
  'labels, words',
  [
    (np.eye(4, dtype=int), 'labels of shape'),
    (np.zeros((4, 1), int), 'labels of shape'),
    (np.zeros(4), 'and type float64'),
    (np.array([0, 1, 2, 3]), 'use 0 to 2'),
  ],
)
def test_labels_that_cannot_be_meant(labels, words):
  logits_fn = lambda x: x.reshape(len(x), 4)[:, :3]
  with pytest.raises(UserError, match=words):
    evaluate_robustness(
      logits_fn, np.zeros((4, 2, 2, 1)), labels, 'linf', 0.1, 'clean', progress=None
    )
