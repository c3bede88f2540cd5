"""Which samples of a pool to train on.

The authors draw samples until each class has its number of them; later work draws five
times as many and keeps the 20 % of each class whose labels are surest. A `Rule` says
so of samples that are being drawn (`jaxrobust.generate`), `subset` of a sample set that
exists. None holds images in memory.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxrobust.errors import UserError
from jaxrobust.runs import checksums
from jaxrobust.samples import sample_sets, shards

_CHUNK = 2**13  # images held in memory while a set is copied


class Rule(NamedTuple):
  """Which of the samples that are being drawn to keep.

  Of the samples in the order drawn the first `count / top_fraction` are candidates, or
  so many of each class that each can have its share; of the candidates the surest of
  each class are kept, or all. What was drawn beyond the candidates changes nothing.

  Attributes:
    count: samples to keep.
    balanced: whether as many of each class as of the others (where they do not divide
      the number, one more of the first ones), the authors' way.
    top_fraction: share of the candidates to keep, in (0, 1], those of each class with
      the highest confidence. 1, the authors' way, needs no confidences.
  """

  count: int  # type: ignore[assignment]
  balanced: bool
  top_fraction: float = 1.0

  def shortfall(self, per_class: np.ndarray) -> tuple[np.ndarray, float]:
    """What is missing after drawing samples [K] of each class.

    Returns:
      Candidates still to be found, int [K] of each class, or [1] of all; and how many
      times as many draws are likely to find them (infinite for a class not met yet).
    """
    wanted = self._candidates(len(per_class))
    found = np.asarray(per_class) if self.balanced else np.array([np.sum(per_class)])
    with np.errstate(divide='ignore', invalid='ignore'):
      times = np.where(wanted, wanted / found, 0).max()
    return np.maximum(wanted - found, 0), float(times)

  def choose(
    self, labels: np.ndarray, confidence: np.ndarray | None, num_classes: int
  ) -> tuple[np.ndarray, dict]:
    """Chooses among samples without a shortfall.

    Args:
      labels: int [n] in [0, K).
      confidence: [n]; may be None where `top_fraction` is 1.
      num_classes: K.

    Returns:
      Positions, int [count], ascending, and a description for metadata.json.
    """
    wanted = self._candidates(num_classes)
    pool = choose(labels, wanted) if self.balanced else np.arange(wanted[0])
    per_class = np.bincount(labels[pool], minlength=num_classes)
    kept = pool
    if self.top_fraction < 1:
      quotas = class_quotas(per_class, self.count, self.balanced)
      kept = pool[choose(labels[pool], quotas, confidence[pool])]
    return kept, {
      **self._asdict(),
      'drawn': len(labels),
      # As the generator gives them; in a balanced pool the classes are as many.
      'drawn_per_class': np.bincount(labels, minlength=num_classes).tolist(),
      'pool': _counts(per_class),
    }

  def _candidates(self, num_classes: int) -> np.ndarray:
    """Candidates needed, int [K] of each class, or [1] of all."""
    shares = equal_shares(self.count, num_classes if self.balanced else 1)
    # 3 / 0.3 is a little above 10.
    return np.ceil(shares / self.top_fraction - 1e-6).astype(int)


def subset(
  source: sample_sets.SampleSet,
  out: str | os.PathLike,
  *,
  count: int | None = None,
  top_fraction: float | None = None,
  balanced: bool = False,
  seed: int = 0,
  shard_size: int = sample_sets.SHARD_SIZE,
  progress: Callable[[Iterable, int], Iterable] = lambda batches, _: batches,
) -> sample_sets.SampleSet:
  """Makes a sample set of some of the samples of another, in the same order.

  Args:
    source: the pool.
    out: the folder to make.
    count: keep this many, drawn at random from each class.
    top_fraction: or keep this share of each class, in (0, 1], those with the highest
      confidence; the first ones among equals.
    balanced: keep as many of each class as of the others (where they do not divide
      the number, one more of the first ones); else the same share of each.
    seed: of what is drawn at random, from 0.
    shard_size: images in a file of the set.
    progress: wraps the batches, given the number of images.

  Returns:
    The new set; its metadata says how it was selected, and from what.

  Raises:
    UserError: not one of count and top_fraction is given, one is out of range, the
      pool has no confidences or too few of a class, or `samples.write` refuses.
  """
  if (count is None) == (top_fraction is None):
    raise UserError('give one of --top_fraction and --count')
  if not 0 <= seed < 2**32:
    raise UserError(f'seed = {seed}: give a number from 0 to {2**32 - 1}')
  if count is not None and not 0 < count <= len(source):
    raise UserError(
      f'--count={count}: {source.path} has {len(source)} samples; choose 1 to '
      f'{len(source)}'
    )
  fraction = count / len(source) if top_fraction is None else top_fraction
  if not 0 < fraction <= 1:
    raise UserError(
      f'{fraction:.6g} of the pool of {len(source)} samples ({source.path}); keep a '
      'share above 0 and up to 1'
    )
  confidence = source.confidence()
  if top_fraction is not None and confidence is None:
    raise UserError(
      f'{source.path} has no confidences to rank its samples by, which only sets have '
      'that a labeller of `jaxrobust generate` labelled: use --count=N for a random '
      'choice'
    )
  total = math.floor(len(source) * fraction + 0.5) if count is None else count
  per_class = source.metadata['counts']['per_class']
  quotas = class_quotas(per_class, total, balanced)
  ranks = confidence
  if count is not None:  # Sets may be sorted, by class or by how they were made.
    ranks = np.random.RandomState(seed).random_sample(len(source))
  indices = choose(source.gather_labels(slice(None)), quotas, ranks)
  selection = {
    'count': count,
    'balanced': balanced,
    'top_fraction': top_fraction,
    'seed': None if count is None else seed,
    'pool': {
      'selection': source.metadata['selection'],
      **_counts(per_class),
      'metadata_sha256': checksums.sha256(source.path / shards.METADATA),
    },
  }
  metadata = {
    field: value
    for field, value in source.metadata.items()
    if field not in sample_sets.RESERVED
  }
  return sample_sets.write(
    out,
    progress(_batches(source, indices, confidence), len(indices)),
    metadata={**metadata, 'selection': selection},
    num_classes=source.num_classes,
    shard_size=shard_size,
  )


def equal_shares(count: int, num_classes: int) -> np.ndarray:
  """`count` shared over K classes, int [K]; the first ones take what is left over."""
  return count // num_classes + (np.arange(num_classes) < count % num_classes)


def class_quotas(per_class: Iterable[int], count: int, balanced: bool) -> np.ndarray:
  """How many samples of each class to keep.

  Args:
    per_class: samples of each class in the pool, [K].
    count: samples to keep, at most as many as there are.
    balanced: whether the classes get equal numbers, or the same share of each, rounded
      by largest remainders.

  Returns:
    int [K], which sum to `count`.

  Raises:
    UserError: A class has too few samples.
  """
  per_class = np.asarray(per_class)
  if not balanced:
    exact = per_class * (count / per_class.sum())
    # Shares that are whole but for rounding must not lose one to another.
    quotas = np.floor(exact + 1e-6).astype(int)
    largest = np.argsort(quotas - exact, kind='stable')
    quotas[largest[: count - quotas.sum()]] += 1
    return quotas
  quotas = equal_shares(count, len(per_class))
  if (short := np.flatnonzero(per_class < quotas)).size:
    most = int(per_class.min()) * len(per_class)
    raise UserError(
      f'the pool has too few samples of the classes {short.tolist()} for {quotas[0]} '
      f'of each: keep at most {most} ({most / per_class.sum():.4g} of the pool), draw '
      'more, or leave out balanced'
    )
  return quotas


def choose(
  labels: np.ndarray, quotas: np.ndarray, confidence: np.ndarray | None = None
) -> np.ndarray:
  """Chooses samples by class.

  Args:
    labels: int [n] in [0, K).
    quotas: how many of each class, int [K].
    confidence: [n]; keeps the highest of each class, the first among equals. By
      default the first of each class.

  Returns:
    Positions, int [m], ascending.
  """
  chosen = []
  for label, quota in enumerate(quotas):
    members = np.flatnonzero(labels == label)
    if confidence is not None:
      members = members[np.argsort(-confidence[members], kind='stable')]
    chosen.append(members[:quota])
  return np.sort(np.concatenate(chosen))


def _counts(per_class) -> dict:
  """How many samples there are, and of each class, as metadata."""
  return {'total': int(np.sum(per_class)), 'per_class': np.asarray(per_class).tolist()}


def _batches(source, indices, confidence) -> Iterator[tuple[np.ndarray, ...]]:
  """Yields the chosen samples, with their confidences where they have any."""
  for start in range(0, len(indices), _CHUNK):
    chunk = indices[start : start + _CHUNK]
    rest = [] if confidence is None else [confidence[chunk]]
    yield source.gather(chunk), source.gather_labels(chunk), *rest
