"""How StyleGAN2 is trained: losses, penalties that come seldom, ADA's controller.

Source: Karras et al. 2020, "Training generative adversarial networks with limited
data", and the code that they published with it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from jaxrobust.data import augment, pipeline
from jaxrobust.distributed import parallel
from jaxrobust.generators import adversarial
from jaxrobust.generators import recipe as recipes

GENERATOR, DISCRIMINATOR = 'generator', 'discriminator'
_LOSS = adversarial.LOSSES['non-saturating']
_Found = tuple[jax.Array, tuple[dict, dict]]  # loss, (state, metrics)
_STYLES = ('latent', 'second-latent', 'mixing')  # what is random in styles


class Functions(NamedTuple):
  """What is trained.

  Attributes:
    init_fn: `rng -> {GENERATOR: params, DISCRIMINATOR: params}`.
    style_fn: `(params, latents [b, Z], classes [b]) -> styles [b, W]`.
    image_fn: `(params, styles [b, L, W], keys [b]) -> images [b, H, W, C]`.
    logit_fn: `(params, images [b, H, W, C], classes [b]) -> logits [b]`.
    latent_size: Z.
    style_size: W.
    num_styles: L.
  """

  init_fn: Callable
  style_fn: Callable
  image_fn: Callable
  logit_fn: Callable
  latent_size: int
  style_size: int
  num_styles: int


def make_recipe(
  functions: Functions, training: config_dict.ConfigDict
) -> recipes.Recipe:
  """The recipe of a GAN of style-based functions.

  An iteration updates G, then D with images of the new G and new latents; each may have
  a penalty besides, in some iterations only, by an update of its own.

  Args:
    functions: of the networks.
    training: `config.generator.training`.
  """
  losses = Losses(functions, training)
  phases = [
    recipes.Phase(
      network=GENERATOR,
      metric='train/generator_loss',
      loss_fn=losses.generator,
      streams=(*_STYLES, 'noise', 'augmentation'),
      norm_metric='train/generator_gradient_norm',
    ),
    recipes.Phase(
      network=GENERATOR,
      metric='train/path_length_loss',
      loss_fn=losses.path_length,
      streams=(*_STYLES, 'noise', 'probe'),
      interval=training.path_length_interval_steps,
      num_parts=2,
    ),
    recipes.Phase(
      network=DISCRIMINATOR,
      metric='train/discriminator_loss',
      loss_fn=losses.discriminator,
      streams=(*_STYLES, 'noise', 'augmentation', 'flip', 'real-augmentation'),
      norm_metric='train/discriminator_gradient_norm',
      decay_fn=lambda step: ema_decay(training, step),
    ),
    recipes.Phase(
      network=DISCRIMINATOR,
      metric='train/r1_loss',
      loss_fn=losses.r1,
      streams=('flip', 'augmentation'),
      interval=training.r1_interval_steps,
    ),
  ]
  weights = {
    'train/path_length_loss': training.path_length_weight,
    'train/r1_loss': training.r1_gamma,
  }
  return recipes.Recipe(
    init_fn=losses.init,
    optimizers={
      GENERATOR: make_optimizer(training, training.path_length_interval_steps),
      DISCRIMINATOR: make_optimizer(training, training.r1_interval_steps),
    },
    phases=tuple(x for x in phases if weights.get(x.metric, 1)),
    averaged_fn=lambda params, net_state: params[GENERATOR],
    variables_fn=lambda averaged, net_state: {
      **averaged,
      'style_mean': net_state['style_mean'],
    },
    after_fn=losses.control if losses.augmentation.adapts else None,
  )


def make_optimizer(
  training: config_dict.ConfigDict, interval: int
) -> recipes.Optimizer:
  """Adam, slower by the share of updates that a penalty adds in its interval.

  A penalty that comes in every k-th iteration makes k + 1 updates of k: with the rate
  times k / (k + 1), and decays to that power, k iterations go as far as without it
  (Karras et al. 2020, appendix B). Gradients that are not finite become 0, or 1e5 where
  infinite, as in their code.
  """
  share = interval / (interval + 1)
  rate = training.learning_rate * share
  finite = lambda x: jnp.nan_to_num(x, nan=0.0, posinf=1e5, neginf=-1e5)
  return recipes.Optimizer(
    optax.chain(
      optax.stateless(lambda updates, params: jax.tree.map(finite, updates)),
      optax.adam(rate, training.b1**share, training.b2**share, eps=training.epsilon),
    ),
    lambda step: rate,
  )


def ema_decay(training: config_dict.ConfigDict, step: jax.Array) -> jax.Array:
  """Decay of the average in an iteration, after `step` others."""
  halflife = float(training.ema_halflife_images)
  if training.ema_ramp:
    shown = jnp.float32(training.batch_size) * step
    halflife = jnp.minimum(halflife, training.ema_ramp * shown)
  return 0.5 ** (training.batch_size / jnp.maximum(halflife, 1e-8))


class Losses:
  """The losses of the phases; each is `(params, state, batch, rngs)`, see `Phase`.

  Deviation: generated images have the classes of the batch's real ones, in theirs those
  of other training images; styles are mixed for each image by itself, in theirs from
  one layer on for all images of a device.
  """

  def __init__(self, functions: Functions, training: config_dict.ConfigDict):
    """Makes them from `config.generator.training`."""
    self._functions, self._training = functions, training
    self.augmentation = adversarial.Augmentation(training.augmentation)

  def init(self, rng: jax.Array) -> tuple[dict, dict]:
    """(parameters, state) at first."""
    state = {
      'style_mean': jnp.zeros(self._functions.style_size),
      'path_length': jnp.float32(0),
      'augmentation': self.augmentation.init(),
    }
    return self._functions.init_fn(rng), state

  def generator(
    self, params: dict, state: dict, batch: pipeline.Batch, rngs: Callable
  ) -> _Found:
    """Non-saturating."""
    state, logits = self._fake_logits(params, state, batch, rngs)
    return _LOSS.generator(logits), (state, {})

  def discriminator(
    self, params: dict, state: dict, batch: pipeline.Batch, rngs: Callable
  ) -> _Found:
    """Logistic."""
    state, fake = self._fake_logits(params, state, batch, rngs)
    images = self._augment(
      self._real(batch, rngs('flip')), state, rngs('real-augmentation')
    )
    real = self._functions.logit_fn(params[DISCRIMINATOR], images, batch.labels)
    return _LOSS.fake(fake) + _LOSS.real(real), (
      self._count(state, real),
      {
        'train/real_logit': jnp.mean(real),
        'train/fake_logit': jnp.mean(fake),
        'train/real_sign': jnp.mean(jnp.sign(real)),
        'train/augmentation_probability': state['augmentation']['probability'],
      },
    )

  def r1(
    self, params: dict, state: dict, batch: pipeline.Batch, rngs: Callable
  ) -> _Found:
    """Squared gradient in the images, as they are before augmentation."""

    def total(images):
      shown = self._augment(images, state, rngs('augmentation'))
      logits = self._functions.logit_fn(params[DISCRIMINATOR], shown, batch.labels)
      return jnp.sum(logits), logits

    images = self._real(batch, rngs('flip'))
    gradients, logits = jax.grad(total, has_aux=True)(images)
    squares = jnp.mean(jnp.sum(gradients**2, (1, 2, 3)))
    loss = squares * self._training.r1_gamma / 2 * self._training.r1_interval_steps
    return loss, (self._count(state, logits), {'train/r1': squares})

  def path_length(
    self, params: dict, state: dict, batch: pipeline.Batch, rngs: Callable
  ) -> _Found:
    """How unequally images move with styles (Karras et al. 2020, section 3.2)."""
    styles, _ = self._styles(params, state, batch, rngs)
    noise = rngs('noise')

    def image_fn(styles):
      return self._functions.image_fn(params[GENERATOR], styles, noise)

    shape = jax.eval_shape(image_fn, styles).shape[1:]
    probe = _normal(rngs('probe'), shape) / (shape[0] * shape[1]) ** 0.5
    gradients = jax.grad(lambda styles: jnp.sum(image_fn(styles) * probe))(styles)
    lengths = jnp.sqrt(jnp.mean(jnp.sum(gradients**2, -1), -1))
    mean = parallel.mean_over_devices(jnp.mean(lengths))
    mean = state['path_length'] + self._training.path_length_decay * (
      mean - state['path_length']
    )
    loss = jnp.mean((lengths - mean) ** 2) * self._training.path_length_weight
    state = {**state, 'path_length': jax.lax.stop_gradient(mean)}
    return loss * self._training.path_length_interval_steps, (
      state,
      {'train/path_length': jnp.mean(lengths)},
    )

  def control(self, state: recipes.State) -> dict:
    """The state after an iteration: ADA's probability follows the signs."""
    known, size = state.net_state, self._training.batch_size
    moved = self.augmentation.control(known['augmentation'], state.step, size)
    return {**known, 'augmentation': moved}

  def _styles(self, params, state, batch, rngs):
    """Styles of generated images [b, L, W], and the state with their mean."""
    size, count = self._functions.latent_size, self._functions.num_styles
    style_fn = lambda stream: self._functions.style_fn(
      params[GENERATOR], _normal(rngs(stream), (size,)), batch.labels
    )
    first = style_fn('latent')
    decay = self._training.style_mean_decay
    mean = decay * state['style_mean'] + (1 - decay) * jnp.mean(first, 0)
    state = {**state, 'style_mean': jax.lax.stop_gradient(mean)}
    styles = jnp.repeat(first[:, None], count, 1)
    if self._training.style_mixing:
      draw = lambda rng: _cut(rng, count, self._training.style_mixing)
      cuts = jax.vmap(draw)(rngs('mixing'))
      keep = jnp.arange(count)[None] < cuts[:, None]
      styles = jnp.where(keep[..., None], styles, style_fn('second-latent')[:, None])
    return styles, state

  def _fake_logits(self, params, state, batch, rngs):
    """(state with the mean style, logits of augmented generated images)."""
    styles, state = self._styles(params, state, batch, rngs)
    images = self._functions.image_fn(params[GENERATOR], styles, rngs('noise'))
    images = self._augment(images, state, rngs('augmentation'))
    logit_fn = self._functions.logit_fn
    return state, logit_fn(params[DISCRIMINATOR], images, batch.labels)

  def _real(self, batch, rngs):
    """The training images in [-1, 1]."""
    flip = self._training.flip
    return 2 * augment.augment(batch.images, rngs, pad=0, flip=flip) - 1

  def _augment(self, images, state, rngs):
    """What the discriminator sees."""
    return self.augmentation(images, state['augmentation'], rngs)

  def _count(self, state, logits):
    """The state with the signs of these logits, of real images."""
    counted = self.augmentation.count(state['augmentation'], logits)
    return {**state, 'augmentation': counted}


def _normal(rngs, shape):
  return jax.vmap(lambda rng: jax.random.normal(rng, shape))(rngs)


def _cut(rng, count, probability):
  """The layer from which on an image has another style; `count` for none."""
  whether, where = jax.random.split(rng)
  layer = jax.random.randint(where, (), 1, count)
  return jnp.where(jax.random.bernoulli(whether, probability), layer, count)
