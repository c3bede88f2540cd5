"""FAB: the smallest change of an image that a network gets wrong.

The fast adaptive boundary attack of Croce & Hein, "Minimally distorted adversarial
examples with a fast adaptive boundary attack" (ICML 2020); targeted as in AutoAttack
(FAB-T), or untargeted. Other attacks climb inside a given ball; this one looks for the
closest misclassified image, wherever it is. Each step

  1. takes the network as linear round the iterate, where the label and the target
     are then separated by a plane;
  2. finds the point of that plane next to the iterate, and the one next to the
     original image, among the images in [0, 1] and in the sense of the ball's norm;
  3. goes a little beyond both (`eta`) and mixes them: the closer the iterate is to
     the plane, the more it leans to the original, up to a share `alpha_max`;
  4. keeps an image of any class but the label if none was closer, and from there
     moves back towards the original (`beta`), so as to cross the boundary again.

It needs no step size, and as only the plane counts, no scale of the logits. On a
linear classifier of 2x2 images the closest misclassified image is known: none of its
values moves by more than margin / (sum of |weights|) where no value meets 0 or 1:

>>> import jax
>>> import jax.numpy as jnp
>>> from jaxrobust.attacks import fab, norms
>>> weights = jnp.array([[2., 0.], [0., 2.], [1., 0.], [0., 1.]])
>>> logits_fn = lambda images: images.reshape(len(images), 4) @ weights
>>> images = jnp.array([0.7, 0.5, 0.6, 0.4]).reshape(1, 2, 2, 1)
>>> labels = jnp.array([0])
>>> rngs = jax.random.split(jax.random.key(0), 1)
>>> attack = fab.FAB(norms.Linf(0.2))
>>> adversarial, distance = attack.minimal(logits_fn, rngs, images, labels, index=0)
>>> logits_fn(adversarial).argmax(axis=-1).tolist()
[1]
>>> bool(jnp.abs(distance / (0.6 / 6) - 1)[0] < 0.01)
True

An attempt at one target (`index` counts targets and restarts) stops at the first
misclassified image in the ball, and gives back the original where there is none:

>>> attack.num_attempts(num_classes=10)
9
>>> found = attack.attempt(logits_fn, rngs, images, labels, index=0)
>>> bool(attack.ball.distance(found, images)[0] <= 0.2)
True
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxrobust.attacks import attack, norms, objectives


@dataclasses.dataclass(frozen=True)
class FAB(attack.Attack):
  """The fast adaptive boundary attack; each image by itself.

  The defaults are AutoAttack's. A step costs a gradient and a forward pass. The pass
  cannot wait for the next gradient: where it finds an error, as most steps do once
  the boundary is reached, the gradient is taken elsewhere.

  Attributes:
    ball: its norm is what is minimised; an attempt succeeds within its epsilon.
    num_steps: gradients of an attempt.
    num_targets: classes to aim at in turn, those with the highest logits beside the
      label; all others if the network has fewer. 0 for the untargeted attack, where
      each step goes for the class whose plane is nearest; it costs a backward pass a
      class.
    restarts: attempts at each target, of which the first starts at the image, and
      the others at random points half an epsilon away.
    alpha_max: largest share of the original image's way to the plane, in [0, 1].
    eta: how far to go along the way to the plane; above 1 goes beyond it.
    beta: share of the distance kept when moving back from a misclassified image.
  """

  ball: norms.Ball
  num_steps: int = 100
  num_targets: int = 9
  restarts: int = 1
  alpha_max: float = 0.1
  eta: float = 1.05
  beta: float = 0.9

  @property
  def turns(self) -> int:
    return self.num_steps

  def num_attempts(self, num_classes: int) -> int:
    """How many attempts there are: restarts within targets.

    Args:
      num_classes: of the network, at least 2.
    """
    return self.restarts * max(min(self.num_targets, num_classes - 1), 1)

  def remark(self, num_classes: int) -> str:
    """Says so if there are fewer targets than asked for."""
    if num_classes > self.num_targets:
      return ''
    return f'FAB aims at {num_classes - 1} targets, not {self.num_targets}'

  def attempt(
    self,
    logits_fn: attack.LogitsFn,
    rngs: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    index: int | jax.Array,
  ) -> jax.Array:
    """Looks for a misclassified image in the ball, of any class but the label.

    Args:
      logits_fn: images [B, H, W, C] in [0, 1] → logits [B, K].
      rngs: keys [B], one an image, for this attempt.
      images: [B, H, W, C] in [0, 1], float.
      labels: int [B] in [0, K).
      index: of the attempt, from 0, may be traced: target `index // restarts` in the
        order of the clean logits, from the image if `index % restarts` is 0.

    Returns:
      [B, H, W, C]: the first such image, or the original one where there is none or
      where it is misclassified itself.
    """
    epsilon = self.ball.epsilon
    found, distance = self._search(logits_fn, rngs, images, labels, index, epsilon)
    return jnp.where(_per_image(distance <= epsilon), found, images)

  def minimal(
    self,
    logits_fn: attack.LogitsFn,
    rngs: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    index: int | jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """The closest misclassified image found, in the ball or outside it.

    Args:
      logits_fn, rngs, images, labels, index: as for `attempt`.

    Returns:
      Images [B, H, W, C] in [0, 1], the originals where none was found, and their
      distances [B]: 0 for images that are misclassified themselves, infinite where
      none was found.
    """
    return self._search(logits_fn, rngs, images, labels, index, enough=0)

  def _search(self, logits_fn, rngs, images, labels, index, enough):
    """Closest errors and their distances; an image rests at a distance of `enough`."""
    logits = logits_fn(images)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    target = objectives.ranked_class(logits, labels, index // self.restarts)
    is_target = jax.nn.one_hot(target, logits.shape[-1], dtype=bool)
    # In the precision of the images, whatever that of the logits.
    contrast = is_target.astype(images.dtype) - is_label.astype(images.dtype)

    def lead(iterate):
      """The target's lead over the label: summed for the gradients, and [B]."""
      leads = jnp.sum(logits_fn(iterate).astype(contrast.dtype) * contrast, axis=-1)
      return jnp.sum(leads), leads

    def unfinished(state):
      step, _, _, closest = state
      return (step < self.num_steps) & jnp.any(closest > enough)

    def advance(state):
      step, iterate, found, closest = state
      if self.num_targets:
        slopes, leads = jax.grad(lead, has_aux=True)(iterate)
      else:
        slopes, leads = self._nearest(logits_fn, iterate, is_label)
      iterate = self._cross(iterate, images, slopes, leads)
      # Any other class counts, not only the target, as in the published code.
      wrong = jnp.argmax(logits_fn(iterate), axis=-1) != labels
      distance = self.ball.distance(iterate, images)
      better = wrong & (distance < closest) & (closest > enough)
      found = jnp.where(_per_image(better), iterate, found)
      closest = jnp.where(better, distance, closest)
      back = images + self.beta * (iterate - images)
      return step + 1, jnp.where(_per_image(wrong), back, iterate), found, closest

    # Deviation: no final search between the original and the closest error, which the
    # paper describes. The authors' first code leaves it off unless asked, and
    # AutoAttack's, whose distances these are to agree with, has none.
    right = jnp.argmax(logits, axis=-1) == labels
    closest = jnp.where(right, jnp.inf, 0).astype(images.dtype)
    start = self._start(rngs, images, index)
    state = (0, start, images, closest)
    _, _, found, closest = jax.lax.while_loop(unfinished, advance, state)
    return found, closest

  def _nearest(self, logits_fn, iterate, is_label):
    """Slopes and leads of the class whose plane is nearest to each iterate."""
    logits, pull = jax.vjp(lambda x: logits_fn(x).astype(x.dtype), iterate)

    def consider(k, best):
      is_class = jax.nn.one_hot(jnp.full(len(logits), k), logits.shape[-1], dtype=bool)
      contrast = is_class.astype(logits.dtype) - is_label.astype(logits.dtype)
      slopes, leads = pull(contrast)[0], jnp.sum(logits * contrast, axis=-1)
      away = jnp.abs(leads) / (1e-12 + self._dual_length(slopes))
      away = jnp.where(is_label[:, k], jnp.inf, away)
      nearer = away < best[2]
      return (
        jnp.where(_per_image(nearer), slopes, best[0]),
        jnp.where(nearer, leads, best[1]),
        jnp.where(nearer, away, best[2]),
      )

    none = jnp.full(len(logits), jnp.inf, logits.dtype)
    start = jnp.zeros_like(iterate), jnp.zeros_like(none), none
    slopes, leads, _ = jax.lax.fori_loop(0, logits.shape[-1], consider, start)
    return slopes, leads

  def _dual_length(self, slopes):
    """How much a step of length 1 in the ball's norm can gain, [B]."""
    match self.ball:
      case norms.Linf():
        return jnp.sum(jnp.abs(slopes), axis=(1, 2, 3))
      case norms.L2():
        return norms.L2.distance(slopes, jnp.zeros_like(slopes))
      case norms.L1():
        return jnp.max(jnp.abs(slopes), axis=(1, 2, 3))

  def _start(self, rngs, images, index):
    """The images, or from the second restart on points half an epsilon away."""
    if self.restarts == 1:
      return images
    draw = jax.random.normal
    if isinstance(self.ball, norms.Linf):
      draw = functools.partial(jax.random.uniform, minval=-1)
    offset = jax.vmap(lambda rng: draw(rng, images.shape[1:], images.dtype))(rngs)
    scale = self.ball.epsilon / 2 / self._length(offset)
    start = jnp.clip(images + _per_image(scale) * offset, 0, 1)
    return jnp.where(index % self.restarts > 0, start, images)

  def _cross(self, iterate, images, slopes, leads):
    """One step: beyond the plane where target and label tie in the linear model."""
    image_leads = leads + jnp.sum(slopes * (images - iterate), axis=(1, 2, 3))
    both = jnp.concatenate([iterate, images])
    offsets = to_plane(
      self.ball,
      both,
      jnp.concatenate([slopes, slopes]),
      jnp.concatenate([leads, image_leads]),
    )
    near, far = jnp.split(jnp.maximum(self._length(offsets), 1e-8), 2)
    share = _per_image(jnp.minimum(near / (near + far), self.alpha_max))
    beyond_iterate, beyond_image = jnp.split(both + self.eta * offsets, 2)
    return jnp.clip((1 - share) * beyond_iterate + share * beyond_image, 0, 1)

  def _length(self, offsets):
    """Size of each offset in the ball's norm, [B]."""
    return self.ball.distance(offsets, jnp.zeros_like(offsets))


def to_plane(
  ball: norms.Ball, images: jax.Array, weights: jax.Array, excess: jax.Array
) -> jax.Array:
  """The smallest steps to planes, among those that stay in [0, 1].

  Deviation: weights count however small they are, while the published code leaves
  out those below 1e-8 in l2 and l1, and with them whole networks whose gradients are
  small. Where values with equal weights are to move in part in l1, all of them do
  by the same share, not one after the other; the distance is the same.

  Args:
    ball: its norm says what is small.
    images: [B, H, W, C] in [0, 1].
    weights: [B, H, W, C], the planes' normals.
    excess: [B], what the steps have to take away, of either sign.

  Returns:
    Steps [B, H, W, C] with sum(weights * step) = -excess to a relative 1e-5, or, for a
    plane that does not meet [0, 1], those to the corner that comes nearest. Values
    without weight stay.
  """
  # Only weights / excess counts; so neither overflows, nor do squares vanish.
  largest = jnp.max(jnp.abs(weights), axis=(1, 2, 3))
  largest = jnp.where(largest > 0, largest, 1)
  weights, need = weights / _per_image(largest), jnp.abs(excess) / largest
  towards = jnp.sign(weights) * _per_image(jnp.where(excess >= 0, -1.0, 1.0))
  room = jnp.where(towards < 0, images, 1 - images)
  gain = jnp.abs(weights)
  reached = need <= jnp.sum(gain * room, axis=(1, 2, 3))
  # What cannot be reached needs no search.
  need = jnp.where(reached, need, 0)
  match ball:
    case norms.Linf():
      step = _at_rates(jnp.ones_like(gain), gain, room, need)
    case norms.L2():
      step = _at_rates(gain, gain, room, need)
    case norms.L1():
      step = _in_order(gain, room, need)
  return towards * jnp.where(_per_image(reached), step, room)


def _at_rates(rates, gain, room, need):
  """Moves all values at their rates, each up to its room, until the need is met.

  What is gained by time t, sum(gain * min(rates * t, room)), is concave and piecewise
  linear. So Newton's method from 0 never goes too far, and in each iteration the
  product of what is missing and the slope falls to a quarter: after 24 either has
  fallen below a rounding error. Sorting the times at which values meet their ends,
  as in the published code, is slow on CPUs.
  """
  missing_at = lambda time: (
    need - jnp.sum(gain * jnp.minimum(rates * _per_image(time), room), axis=(1, 2, 3))
  )

  def unfinished(state):
    iteration, _, missing = state
    return (iteration < 24) & jnp.any(missing > 1e-6 * need)

  def advance(state):
    iteration, time, missing = state
    free = rates * _per_image(time) < room
    slope = jnp.sum(jnp.where(free, gain * rates, 0), axis=(1, 2, 3))
    # Images that are done stay as they are, whatever the rest of the batch does.
    moving = (missing > 1e-6 * need) & (slope > 0)
    later = time + missing / jnp.where(moving, slope, 1)
    # An infinite time would make a rate of 0 undefined.
    time = jnp.where(moving, jnp.minimum(later, jnp.finfo(time.dtype).max), time)
    return iteration + 1, time, missing_at(time)

  state = (0, jnp.zeros_like(need), need)
  _, time, _ = jax.lax.while_loop(unfinished, advance, state)
  return jnp.minimum(rates * _per_image(time), room)


def _in_order(gain, room, need):
  """Moves the values with the highest gains to their ends, the last one in part.

  The gain of the last is the highest one from which on, upwards, the need is met. Its
  bits are found one by one: floats of one sign are in the order of their bits.
  """
  bits = jnp.finfo(gain.dtype).bits
  rank = jax.lax.bitcast_convert_type(gain, jnp.dtype(f'int{bits}'))
  gained = lambda chosen: jnp.sum(jnp.where(chosen, gain * room, 0), axis=(1, 2, 3))

  def add_bit(index, last):
    higher = last | jnp.left_shift(jnp.ones_like(last), bits - 2 - index)
    return jnp.where(gained(rank >= _per_image(higher)) >= need, higher, last)

  last = jnp.zeros(len(gain), rank.dtype)
  last = jax.lax.fori_loop(0, bits - 1, add_bit, last)
  before, partly = rank > _per_image(last), rank == _per_image(last)
  whole = gained(partly)
  share = (need - gained(before)) / jnp.where(whole > 0, whole, 1)
  part = jnp.where(partly, jnp.clip(_per_image(share), 0, 1), 0)
  return room * jnp.where(before, 1, part)


def _per_image(values):
  """[B] to [B, 1, 1, 1]."""
  return values[:, None, None, None]
