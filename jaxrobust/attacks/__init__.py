"""Attacks: an objective, a step rule, an initialisation and a ball.

An attack looks for images near the given ones on which a network fails. It knows no
network and no data set, only

  a `logits_fn`    images [B, H, W, C] in [0, 1] → logits [B, K], an image at a time
                   or a batch at a time;
  a ball           how far an image may move: `norms.Linf(8 / 255)`;
  an objective     what it climbs: `objectives.margin`, `cross_entropy`, …;
  a step rule      how a gradient becomes a step: an optax transformation, or one of
                   `pgd.STEP_RULES` (Adam, the sign, the normalised gradient);
  initialisation   where it starts: at a uniform point of the ball, or at the image.

By name, on arrays of any kind and on all devices, it takes three lines:

    from jaxrobust import attacks
    adversarial = attacks.run('apgd-ce', logits_fn, images, labels, 'linf', 8 / 255)
    outcome = attacks.evaluate_robustness(logits_fn, images, labels, 'linf', 8 / 255)

Any of the four parts can be exchanged without the others. An attack on a linear
classifier of 2x2 images, with three restarts of which the worst for the classifier
is kept:

>>> import jax
>>> from jaxrobust.attacks import norms, objectives, pgd
>>> weights = jax.random.normal(jax.random.key(0), (4, 3))
>>> logits_fn = lambda images: images.reshape(len(images), 4) @ weights
>>> images = jax.random.uniform(jax.random.key(1), (8, 2, 2, 1))
>>> labels = logits_fn(images).argmax(axis=-1)
>>> ball = norms.Linf(0.2)
>>> attack = pgd.PGD(
...     ball, objectives.margin, pgd.STEP_RULES['sign'], num_steps=10,
...     step_sizes=(0.05,), restarts=3)
>>> rngs = jax.random.split(jax.random.key(2), 8)
>>> adversarial = attack(logits_fn, rngs, images, labels)
>>> bool((ball.distance(adversarial, images) <= 0.2 + 1e-6).all())
True
>>> before = objectives.margin(logits_fn(images), labels)
>>> after = objectives.margin(logits_fn(adversarial), labels)
>>> bool((after > before).all())
True

The fast gradient sign method is PGD with a single step of the ball's size:

>>> fgsm = pgd.PGD(
...     ball, objectives.cross_entropy, pgd.STEP_RULES['sign'], num_steps=1,
...     step_sizes=(ball.epsilon,), initialization='zero')
>>> fgsm(logits_fn, rngs, images, labels).shape
(8, 2, 2, 1)
"""

import importlib

_PUBLIC = ('evaluate_robustness', 'run')


def __getattr__(name: str):
  """What users call, imported when it is first asked for."""
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module('jaxrobust.attacks.robustness'), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_PUBLIC])
