"""Signs that an evaluation misleads, as AutoAttack looks for them, and bad input."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn

from jaxrobust.errors import UserError

# Calls of a network on the same images that are compared, as in the published code.
CALLS = 5

# Values of images that are off [0, 1] by rounding are taken for 0 and 1.
_ROUNDING = 1e-6


def misleading(
  calls: np.ndarray,
  alone: np.ndarray,
  no_cross_entropy: np.ndarray,
  no_margin: np.ndarray,
  randomized: bool,
) -> list[str]:
  """What is suspicious about a network, a line each.

  A pure function of images cannot be randomised; one with a callback can. Deviation:
  gradients are looked at where the images are, and those of the cross-entropy too; the
  published code looks at those of DLR at random starts.

  Args:
    calls: logits [CALLS, n, K] of the same images in one call after another.
    alone: logits [m, K] of the first m of them, each in a batch of copies of itself.
    no_cross_entropy: bool [n], whether its gradient vanishes.
    no_margin: the same for the gradient of the margin.
    randomized: whether the suite is made for randomised networks.
  """
  count, lines = calls.shape[1], []
  finite = np.isfinite(calls).all(axis=(0, 2))
  if bad := np.sum(~finite):
    lines.append(f'the logits of {bad} of the first {count} images are not finite')
  beside, alone = (x[finite[: len(alone)]] for x in (calls[0, : len(alone)], alone))
  calls = calls[:, finite]
  # The threshold is that of the published code.
  moved = any(_turned(x, y) > 1e-4 for x, y in itertools.combinations(calls, 2))
  if moved and not randomized:
    lines.append('the logits are randomised: use suite autoattack-rand')
  if randomized and not moved:
    lines.append('the logits are not randomised: use suite autoattack')
  # Rounding may differ with the place in a batch, in half precision by 1 %.
  if not moved and _turned(beside, np.nan_to_num(alone, posinf=0, neginf=0)) > 0.02:
    lines.append(
      'the logits of an image depend on the other images of its batch, and so do these '
      'figures: put BatchNorm and dropout into inference mode'
    )
  logits = calls[0]
  in_range = len(logits) and logits.min() > -1e-5 and logits.max() < 1 + 1e-5
  if in_range and np.all(np.abs(logits.sum(axis=-1) - 1) < 1e-5):
    lines.append('the logits look like probabilities: leave out the softmax')
  for what, vanishes in (('cross-entropy', no_cross_entropy), ('margin', no_margin)):
    if vanishes.any():
      lines.append(
        f'the gradient of the {what} is zero for {vanishes.sum()} of the first '
        f'{count} images: gradients may be masked'
      )
  return lines


def _turned(logits: np.ndarray, others: np.ndarray) -> float:
  """How far the directions of two arrays of logits [n, K] are apart, at most."""
  unit = lambda x: x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10)
  return np.linalg.norm(unit(logits) - unit(others), axis=-1).max(initial=0)


def optimizes(program: Jaxpr) -> str:
  """A line if a network takes gradients of its own to answer: a dynamic defence.

  The published code listens for calls of autograd while the network runs. What jax
  differentiates backwards leaves its name in a program, loops and compiled parts
  included. A defence that optimises without such gradients, or in a callback, is not
  seen, here as there.

  Args:
    program: the network's jaxpr.
  """
  if not any(
    'transpose(' in str(equation.source_info.name_stack)
    for equation in equations(program)
  ):
    return ''
  return (
    'the network takes gradients to answer, as defences that optimise at test time do: '
    'these attacks may not be enough, use one that is made for it'
  )


def equations(program: Jaxpr) -> Iterator[JaxprEqn]:
  """All equations of a jaxpr and of those inside it."""
  for equation in program.eqns:
    yield equation
    for parameter in jax.tree.leaves(list(equation.params.values())):
      inside: Any = getattr(parameter, 'jaxpr', parameter)
      if hasattr(inside, 'eqns'):
        yield from equations(inside)


def square_helped(shares: dict[str, float]) -> str:
  """A line if Square, without gradients, does better than attacks with them.

  Args:
    shares: names of attacks in their order → share of images that stand after them.
  """
  square = [v for k, v in shares.items() if k.startswith('square')]
  others = [v for k, v in shares.items() if not k.startswith('square')]
  # 0.2 points, as in the published code.
  if not square or not others or min(others) - square[0] <= 0.002:
    return ''
  return (
    f'Square lowers the robust accuracy by {min(others) - square[0]:.2%} after '
    'gradient attacks: gradients may be masked; run more of it, or an adaptive attack'
  )


def inputs(images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels as the evaluation takes them; UserError for what cannot be meant.

  Args:
    images: [n, H, W, C], uint8, or float of any precision in [0, 1] up to rounding.
    labels: int [n].

  Returns:
    Images as uint8, float32 or float64, and labels, in this machine's byte order.
  """
  images, labels = np.asarray(images), np.asarray(labels)
  if images.ndim != 4:
    raise UserError(
      f'images of shape {list(images.shape)}: give [n, H, W, C] (one image is '
      'image[None], grey images are images[..., None])'
    )
  if len(images) == 0:
    raise UserError('no images to evaluate: the split is empty')
  if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
    raise UserError(
      f'labels of shape {list(labels.shape)} and type {labels.dtype} for {len(images)} '
      'images: give one integer each'
    )
  if images.dtype == np.uint8:
    return images, labels
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(
      f'images of type {images.dtype}: give uint8 from 0 to 255, or floats in [0, 1]'
    )
  wide = images.dtype.kind == 'f' and images.dtype.itemsize == 8
  images = images.astype(np.float64 if wide else np.float32, copy=False)
  low, high = images.min(), images.max()
  if not np.isfinite(low + high):
    raise UserError('images with values that are not finite: give floats in [0, 1]')
  if low < -_ROUNDING or high > 1 + _ROUNDING:
    raise UserError(
      f'images from {low:.8g} to {high:.8g}: scale them to [0, 1], and put the '
      'normalisation into logits_fn'
    )
  return (images.clip(0, 1) if low < 0 or high > 1 else images), labels


def logits(found: Any, image_shape: tuple[int, ...]) -> None:
  """Raises UserError for what a network makes of one image unless it is logits.

  Args:
    found: shapes and types of its answer, a tree.
    image_shape: [H, W, C].
  """
  kind = type(found).__name__
  shape = list(getattr(found, 'shape', []))
  if hasattr(found, 'shape') and hasattr(found, 'dtype'):
    kind = f'{found.dtype} {shape}'
    if jnp.issubdtype(found.dtype, jnp.floating) and (
      len(shape) == 2 and shape[0] == 1 and shape[1] >= 2
    ):
      return
  raise UserError(
    f'logits_fn makes a {kind} of one image {list(image_shape)}: it should return one '
    'array of logits, float [B, K] of at least 2 classes'
  )


def classes(labels: np.ndarray, num_classes: int) -> None:
  """Raises UserError for labels that the network does not have."""
  if labels.min() < 0 or labels.max() >= num_classes:
    raise UserError(
      f'labels from {labels.min()} to {labels.max()} for logits of {num_classes} '
      f'classes: use 0 to {num_classes - 1}'
    )
