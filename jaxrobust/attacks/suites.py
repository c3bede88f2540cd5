"""Suites: which attacks judge a network, run over a whole set of images.

Every image is judged exactly once. An image counts as robust when the network is
right on it and on what each attack of the suite makes of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import parallel
from jaxrobust.attacks import norms, objectives, pgd
from jaxrobust.errors import UserError

SUITES = ('pgd', 'clean')


def attack_from_config(config, ball: norms.Ball) -> pgd.PGD:
  """`pgd.from_config` for an attack that judges: it must move away from labels.

  Raises:
    UserError: as `pgd.from_config`, or if the objective wants probabilities.
  """
  attack = pgd.from_config(config, ball)
  if objectives.REFERENCES[config.objective] == 'probabilities':
    raise UserError(
      f'evaluation.attack.objective = {config.objective!r} does not know '
      'labels: use margin or cross_entropy'
    )
  return attack


class Outcome(NamedTuple):
  """What a suite found.

  Attributes:
    clean: bool [n], right without an attack.
    robust: bool [n], right without and under every attack.
    adversarial: float32 [k, H, W, C] in [0, 1], of the first k images.
    predictions: int32 [k], the classes predicted for them.
  """

  clean: np.ndarray
  robust: np.ndarray
  adversarial: np.ndarray
  predictions: np.ndarray


class Evaluator:
  """Judges a network on sets of images; compiled once, for any parameters.

  The random start of an attack depends on (seed, index of the image) only, not on
  batches or devices.
  """

  def __init__(
    self, logits_fn, attack: pgd.PGD | None, *, batch_size: int, seed: int = 0
  ):
    """Prepares the evaluation.

    Args:
      logits_fn: (variables, images [B, H, W, C] in [0, 1]) → logits [B, K].
      attack: PGD with an objective that wants labels; None for clean accuracy only.
      batch_size: images in a batch, over all devices.
      seed: of the random starts.
    """
    devices = parallel.num_devices()
    self._batch_size = -(-batch_size // devices) * devices
    self._rng = jax.random.key(seed)
    self._attack = attack
    self._logits_fn = logits_fn
    self._judge = parallel.pmap(self._judge_shard)

  def _judge_shard(self, variables, images, labels, index):
    """One device's images → (right, right under attack, images, predictions)."""
    images = jnp.asarray(images, jnp.float32) / 255
    logits_fn = lambda x: self._logits_fn(variables, x)
    predicted = lambda x: jnp.argmax(logits_fn(x), axis=-1)
    clean = predicted(images) == labels
    adversarial = images
    if self._attack is not None:
      adversarial = self._attack(
        logits_fn, parallel.key_per_slot(self._rng, index), images, labels
      )
    predictions = predicted(adversarial)
    return clean, clean & (predictions == labels), adversarial, predictions

  def __call__(
    self,
    variables,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    keep: int = 0,
    progress=None,
  ) -> Outcome:
    """Judges every image once.

    Args:
      variables: replicated tree for `logits_fn`.
      images: uint8 [n, H, W, C].
      labels: int [n].
      keep: how many adversarial images to return, of the first batch at most.
      progress: called with (images done, note) after each batch.

    Returns:
      An Outcome, the same in every process.
    """
    n, size = len(images), self._batch_size
    if n == 0:
      raise UserError('no images to evaluate: the split is empty')
    start, stop = parallel.process_slots(size)
    clean, robust, kept = [], [], None
    for first in range(0, n, size):
      # The last batch is filled up with copies of its first image, then cut.
      index = np.arange(first, first + size)
      mine = np.where(index < n, index, first)[start:stop]
      batch = parallel.shard(
        (images[mine], labels[mine].astype(np.int32), mine.astype(np.int32))
      )
      found = self._judge(variables, *batch)
      right, stands = parallel.gather(found[:2])
      real = min(size, n - first)
      clean.append(right[:real])
      robust.append(stands[:real])
      if kept is None:
        kept = [x[: min(keep, real)] for x in parallel.gather(found[2:])]
      if progress is not None:
        progress(real, f'robust {np.mean(np.concatenate(robust)):.2%}')
    clean, robust = np.concatenate(clean), np.concatenate(robust)
    assert len(clean) == len(robust) == n
    return Outcome(clean, robust, *kept)
