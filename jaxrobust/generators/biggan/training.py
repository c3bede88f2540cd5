"""How BigGAN is trained: D several times an iteration, each on its part of the batch.

Source: Brock et al. 2019, and the PyTorch code that its first author published. Both
networks are in training mode whenever they run, so G's state moves with D's updates.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from jaxrobust.data import augment, pipeline
from jaxrobust.generators import adversarial
from jaxrobust.generators import recipe as recipes

GENERATOR, DISCRIMINATOR = 'generator', 'discriminator'
# The root of the keys of standing statistics, which are of no sample and no update.
_STANDING = 2**32 - 2
_Found = tuple[jax.Array, tuple[dict, dict]]  # loss, (state, metrics)


class Functions(NamedTuple):
  """What is trained.

  Attributes:
    init_fn: `rng -> (parameters, states)`, each by network.
    image_fn: `(params, state, latents [b, Z], classes [b], momentum) -> (images, new
      state)`; momentum is that of BatchNorm's running statistics, which moves them and
      has those of the batch used; with None it does neither.
    logit_fn: `(params, state, images, classes, whether the state moves) -> (logits [b],
      new state)`.
    latent_size: Z.
    num_classes: K.
  """

  init_fn: Callable
  image_fn: Callable
  logit_fn: Callable
  latent_size: int
  num_classes: int


def make_recipe(
  functions: Functions, training: config_dict.ConfigDict
) -> recipes.Recipe:
  """The recipe of a GAN of two networks with states, in which both know the class.

  Args:
    functions: of the networks.
    training: `config.generator.training`.
  """
  losses = Losses(functions, training)
  parts = training.discriminator_steps
  variables = lambda params, state: {'params': params, 'state': state}
  standing = make_standing(functions, training)
  return recipes.Recipe(
    init_fn=losses.init,
    optimizers={
      GENERATOR: _adam(training, training.generator_learning_rate),
      DISCRIMINATOR: _adam(training, training.discriminator_learning_rate),
    },
    phases=(
      recipes.Phase(
        network=DISCRIMINATOR,
        metric='train/discriminator_loss',
        loss_fn=losses.discriminator,
        streams=('latent', 'class', 'augmentation', 'flip', 'real-augmentation'),
        num_parts=parts,
        parts=tuple(range(parts)),
        norm_metric='train/discriminator_gradient_norm',
      ),
      recipes.Phase(
        network=GENERATOR,
        metric='train/generator_loss',
        loss_fn=losses.generator,
        streams=('latent', 'class', 'augmentation'),
        num_parts=parts,
        norm_metric='train/generator_gradient_norm',
        decay_fn=lambda step: jnp.where(
          step + 1 < training.ema_start_steps, 0.0, training.ema_decay
        ),
      ),
    ),
    averaged_fn=lambda params, state: variables(params[GENERATOR], state[GENERATOR]),
    variables_fn=lambda averaged, state: standing(averaged),
    after_fn=losses.control if losses.augmentation.adapts else None,
  )


def make_standing(
  functions: Functions, training: config_dict.ConfigDict
) -> Callable[[dict], dict]:
  """Builds `variables -> variables` with standing statistics of BatchNorm.

  They are means, over some batches of images whose keys are the same in every fit, of
  what BatchNorm finds in training (Brock et al. 2019, section 3.1 and appendix B).
  """
  batches = training.standing_batches
  if not batches:
    return lambda variables: variables
  size = training.batch_size // training.discriminator_steps

  @jax.jit
  def state_fn(variables):
    root = jax.random.fold_in(jax.random.key(0), _STANDING)

    def found(index):
      rngs = jax.random.split(jax.random.fold_in(root, index))
      latents = jax.random.normal(rngs[0], (size, functions.latent_size))
      classes = jax.random.randint(rngs[1], (size,), 0, functions.num_classes)
      params, state = variables['params'], variables['state']
      # Momentum 1: what is found takes the place of the running statistics.
      return functions.image_fn(params, state, latents, classes, 1.0)[1]

    states = jax.lax.map(found, jnp.arange(batches))
    return {
      module: {
        name: old if name == 'u' else jnp.mean(states[module][name], 0)
        for name, old in leaves.items()
      }
      for module, leaves in variables['state'].items()
    }

  return lambda variables: {**variables, 'state': state_fn(variables)}


def orthogonal_penalty(matrix: jax.Array) -> jax.Array:
  """Squared products of different rows (Brock et al. 2019, equation 3).

  Deviation: its own gradient is taken; the published code adds half of it.

  Args:
    matrix: [O, n], of a layer's weights by output.
  """
  products = matrix @ matrix.T
  return jnp.sum(jnp.square(products)) - jnp.sum(jnp.square(jnp.diag(products)))


def _penalties(params):
  """The sum over G's weights but the shared embedding."""
  total = 0.0
  for module, leaves in params.items():
    for name, x in leaves.items():
      if x.ndim > 1 and module != 'shared':
        rows = x if name == 'table' else x.reshape(-1, x.shape[-1]).T
        total += orthogonal_penalty(rows)
  return total


def _adam(training, rate: float) -> recipes.Optimizer:
  adam = optax.adam(rate, training.b1, training.b2, eps=training.epsilon)
  return recipes.Optimizer(adam, lambda step: rate)


class Losses:
  """The losses of the phases; each is `(params, state, batch, rngs)`, see `Phase`."""

  def __init__(self, functions: Functions, training: config_dict.ConfigDict):
    """Makes them from `config.generator.training`."""
    self._functions, self._training = functions, training
    self._loss = adversarial.LOSSES[training.loss]
    self.augmentation = adversarial.Augmentation(training.augmentation)

  def init(self, rng: jax.Array) -> tuple[dict, dict]:
    """(parameters, states) at first."""
    params, states = self._functions.init_fn(rng)
    return params, {**states, 'augmentation': self.augmentation.init()}

  def discriminator(
    self, params: dict, state: dict, batch: pipeline.Batch, rngs: Callable
  ) -> _Found:
    """Real and generated images go through D together: one iteration of each norm."""
    fakes, classes, state = self._fakes(params, state, batch, rngs)
    images = augment.augment(
      batch.images, rngs('flip'), pad=0, flip=self._training.flip
    )
    images = self._shown(2 * images - 1, state, rngs('real-augmentation'))
    logits, moved = self._functions.logit_fn(
      params[DISCRIMINATOR],
      state[DISCRIMINATOR],
      jnp.concatenate([images, fakes]),
      jnp.concatenate([batch.labels, classes]),
      True,
    )
    real, fake = jnp.split(logits, 2)
    losses = self._loss.real(real), self._loss.fake(fake)
    counted = self.augmentation.count(state['augmentation'], real)
    metrics = {
      'train/real_loss': losses[0],
      'train/fake_loss': losses[1],
      'train/real_logit': jnp.mean(real),
      'train/fake_logit': jnp.mean(fake),
      'train/real_sign': jnp.mean(jnp.sign(real)),
    }
    if self.augmentation.adapts:
      metrics['train/augmentation_probability'] = state['augmentation']['probability']
    state = {**state, DISCRIMINATOR: moved, 'augmentation': counted}
    return sum(losses), (state, metrics)

  def generator(
    self, params: dict, state: dict, batch: pipeline.Batch, rngs: Callable
  ) -> _Found:
    """By D's logits, and perhaps a penalty of weights that are not orthogonal."""
    fakes, classes, state = self._fakes(params, state, batch, rngs)
    logits, moved = self._functions.logit_fn(
      params[DISCRIMINATOR], state[DISCRIMINATOR], fakes, classes, True
    )
    loss = self._loss.generator(logits)
    if self._training.orthogonal_weight:
      loss += self._training.orthogonal_weight * _penalties(params[GENERATOR])
    return loss, ({**state, DISCRIMINATOR: moved}, {})

  def control(self, state: recipes.State) -> dict:
    """The state after an iteration."""
    known = state.net_state
    found = self.augmentation.control(
      known['augmentation'], state.step, self._training.batch_size
    )
    return {**known, 'augmentation': found}

  def _fakes(self, params, state, batch, rngs):
    """(generated images as D sees them, their classes, state)."""
    each = lambda stream, draw: jax.vmap(draw)(rngs(stream))
    size, num_classes = self._functions.latent_size, self._functions.num_classes
    latents = each('latent', lambda rng: jax.random.normal(rng, (size,)))
    classes = each('class', lambda rng: jax.random.randint(rng, (), 0, num_classes))
    images, moved = self._functions.image_fn(
      params[GENERATOR],
      state[GENERATOR],
      latents,
      classes,
      self._training.batch_norm_momentum,
    )
    state = {**state, GENERATOR: moved}
    return self._shown(images, state, rngs('augmentation')), classes, state

  def _shown(self, images, state, rngs):
    return self.augmentation(images, state['augmentation'], rngs)
