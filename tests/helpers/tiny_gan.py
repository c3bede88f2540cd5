"""A generator from outside the package: a GAN of two small networks for the digits.

It has what a diffusion model lacks: two networks with learning rates of their own, of
which the discriminator moves twice an iteration, on half of the batch each time, and
once more in every third (R1), a state beside parameters (a running mean of features,
the strength of augmentation, which a controller moves), updates that are skipped, and
metrics of its own. It is judged while it trains by the mean of its samples.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrobust.config import generator, registries
from jaxrobust.config.fields import field
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators.trained import Evaluation, Trained

_LATENT, _WIDTH, _PIXELS = 6, 16, 64
_FIELDS = {
  'training': {
    'num_steps': field(6, 'iterations', above=0),
    'batch_size': field(16, 'images in a global batch', above=0),
    'learning_rates': {
      'generator': field(2e-3, 'of Adam', above=0),
      'discriminator': field(1e-3, 'of Adam', above=0),
    },
    'skip': field(1e9, 'norm of a gradient from which on an update is skipped'),
    'checkpoint_interval_steps': field(4, 'iterations', above=0),
    'checkpoint_keep': field(2, 'last ones kept', above=0),
    'log_interval_steps': field(1, 'iterations', above=0),
    'evaluation_interval_steps': field(0, 'iterations; 0 for none', least=0),
    'early_stopping': field(False, 'whether the best by validation is taken'),
  },
  'sampling': {'shift': field(0.0, 'of all pixels, by how unusual a sample is')},
}
generator.register('tiny-gan', _FIELDS)
_BOTH = {'num_parts': 2, 'parts': (0, 1)}


@registries.GENERATORS.register('tiny-gan')
class TinyGAN(Trained):
  """A GAN of two networks with one hidden layer each."""

  @classmethod
  def conditional(cls, settings):
    return False

  @classmethod
  def recipe(cls, settings, info):
    training = settings.training
    optimizers = {
      name: recipes.Optimizer(optax.adam(rate, b1=0.0), lambda step, rate=rate: rate)
      for name, rate in training.learning_rates.items()
    }

    def init(rng):
      rngs = jax.random.split(rng)
      params = {
        'generator': _init_layers(rngs[0], (_LATENT, _WIDTH, _PIXELS)),
        'discriminator': _init_layers(rngs[1], (_PIXELS, _WIDTH, 1)),
      }
      state = {'features': jnp.zeros(_WIDTH), 'sign': 0.0, 'strength': 0.0}
      return params, jax.tree.map(jnp.float32, state)

    return recipes.Recipe(
      init_fn=init,
      optimizers=optimizers,
      phases=(
        recipes.Phase(
          network='discriminator',
          metric='train/discriminator_loss',
          loss_fn=_discriminator_loss,
          streams=('latent', 'noise'),
          accept_fn=lambda grads, _: optax.global_norm(grads) < training.skip,
          **_BOTH,
        ),
        recipes.Phase(
          network='generator',
          metric='train/generator_loss',
          loss_fn=_generator_loss,
          streams=('latent',),
          num_parts=2,
          decay_fn=lambda step: jnp.minimum(0.9, (1 + step) / (10.0 + step)),
        ),
        recipes.Phase(
          network='discriminator',
          metric='train/penalty',
          loss_fn=_penalty,
          streams=(),
          interval=3,
        ),
      ),
      averaged_fn=lambda params, state: params['generator'],
      variables_fn=lambda averaged, state: {
        'generator': averaged,
        'features': state['features'],
      },
      after_fn=_control,
    )

  @classmethod
  def evaluation(cls, settings, info, real, held_out, seed):
    interval = settings.training.evaluation_interval_steps
    means = {name: split.images.mean() for name, split in held_out.items()}

    def judge(generator):
      images, _ = generator.sample(jax.random.key(seed), np.arange(8), 2)
      errors = {
        f'{name}/brightness_error': abs(images.mean() - mean)
        for name, mean in means.items()
      }
      return errors, errors['validation/brightness_error']  # The worst, as it learns.

    return Evaluation(interval, judge) if interval else None

  @classmethod
  def make_draw(cls, settings, info):
    def draw(variables, rngs, classes):
      latent = _normal(rngs, _LATENT)
      hidden, pixels = _apply(variables['generator'], latent)
      unusual = (hidden - variables['features'][None]).mean(-1, keepdims=True)
      pixels += settings.sampling.shift * unusual
      return 127.5 * (1 + pixels.reshape(-1, *info.image_shape))

    return draw


def make_config(**fields):
  """A config of `generate` with this generator."""
  config = generator.get_config('tiny-gan', 'digits')
  config.update_from_flattened_dict(
    {
      'dataset.train_images': 100,
      'dataset.validation_images': 400,
      'samples.count': 20,
      'samples.draw_size': 10,
      'samples.batch_size': 4,
      'samples.selection': 'none',
    }
    | fields
  )
  return config.lock()


def _init_layers(rng, sizes):
  shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
  rngs = jax.random.split(rng, len(shapes))
  return {
    f'layer/{i}': {
      'w': jax.random.normal(rngs[i], s) / s[0] ** 0.5,
      'b': jnp.zeros(s[1]),
    }
    for i, s in enumerate(shapes)
  }


def _apply(params, x):
  """(values of the hidden layer, output)."""
  first, last = params['layer/0'], params['layer/1']
  hidden = jax.nn.leaky_relu(x @ first['w'] + first['b'][None], 0.2)
  return hidden, hidden @ last['w'] + last['b'][None]


def _normal(rngs, size):
  return jax.vmap(lambda rng: jax.random.normal(rng, (size,)))(rngs)


def _pixels(batch):
  return batch.images.reshape(-1, _PIXELS) / 127.5 - 1


def _discriminator_loss(params, state, batch, rngs):
  fakes = _apply(params['generator'], _normal(rngs('latent'), _LATENT))[1]
  noise = state['strength'] * _normal(rngs('noise'), _PIXELS)
  logits = lambda x: _apply(params['discriminator'], x + noise)[1]
  real = logits(_pixels(batch))
  loss = jnp.mean(jax.nn.softplus(-real) + jax.nn.softplus(logits(fakes)))
  sign = jnp.mean(jnp.sign(real))
  return loss, ({**state, 'sign': sign}, {'train/real_sign': sign})


def _generator_loss(params, state, batch, rngs):
  hidden, fakes = _apply(params['generator'], _normal(rngs('latent'), _LATENT))
  features = 0.9 * state['features'] + 0.1 * hidden.mean(0)
  loss = jnp.mean(jax.nn.softplus(-_apply(params['discriminator'], fakes)[1]))
  return loss, ({**state, 'features': features}, {})


def _penalty(params, state, batch, rngs):
  total = lambda x: jnp.sum(_apply(params['discriminator'], x)[1])
  gradients = jax.grad(total)(_pixels(batch))
  return 0.05 * jnp.mean(jnp.sum(gradients**2, -1)), (state, {})


def _control(state):
  strength = state.net_state['strength'] + 0.01 * jnp.sign(state.net_state['sign'])
  return {**state.net_state, 'strength': jnp.maximum(strength, 0.0)}
