"""The very deep VAE, one of the generators that the paper compares.

An encoder and a decoder with random numbers at every layer learn a bound of the
likelihood (Child 2021), by the training loop of the classifiers; samples are drawn from
the prior, with averaged parameters. It knows no classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import config_dict

from jaxrobust.config import dataset_info, registries
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.generators import recipe as recipes
from jaxrobust.generators.trained import Evaluation, Trained
from jaxrobust.generators.vdvae import mixture, released, stages
from jaxrobust.generators.vdvae import network as networks
from jaxrobust.runs import metrics
from jaxrobust.training import optimizer

_NETWORK = 'vae'


@registries.GENERATORS.register('vdvae')
class VDVAE(Trained):
  """A fitted generator; its variables are the averaged parameters of the network."""

  licence = 'MIT, that of the code that Child published with them'

  def __init__(
    self,
    variables: Any,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
  ):
    super().__init__(variables, settings, info)
    self._judge = parallel.pmap(_make_judge(settings, info))

  @classmethod
  def check(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> None:
    """Raises UserError for settings that cannot be meant for images of `info`."""
    height, width, channels = info.image_shape
    if height != width or channels not in (1, 3):
      raise UserError(
        f"config.generator.name = 'vdvae' draws square images of 1 or 3 channels, and "
        f'{info.name} has {height}x{width}x{channels}: use another generator'
      )
    make_network(settings, info)
    training = settings.training
    if training.early_stopping and not training.evaluation_interval_steps:
      raise UserError(
        'config.generator.training.early_stopping = True chooses among evaluations, '
        'and evaluation_interval_steps = 0 is for none: set it, or early_stopping=False'
      )

  @classmethod
  def conditional(cls, settings: config_dict.ConfigDict) -> bool:
    """Whether samples are drawn for classes: never."""
    del settings
    return False

  @classmethod
  def recipe(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> recipes.Recipe:
    """The bound grows, by updates that are left out where a gradient is too great.

    Deviation: the decay of the average grows to theirs, as `optimizer.ema_decay` says;
    theirs is constant from the first update.
    """
    network, training = make_network(settings, info), settings.training

    def accept(gradient, found):
      is_finite = jnp.isfinite(found[metrics.TRAIN_LOSS])
      return is_finite & (optax.global_norm(gradient) < training.gradient_skip)

    return recipes.Recipe(
      init_fn=lambda rng: ({_NETWORK: networks.init(network, rng)}, {}),
      optimizers={_NETWORK: make_optimizer(training)},
      phases=(
        recipes.Phase(
          network=_NETWORK,
          metric=metrics.TRAIN_LOSS,
          loss_fn=_make_loss(network),
          streams=('latent',),
          decay_fn=lambda step: optimizer.ema_decay(training.ema_decay, step),
          accept_fn=accept,
        ),
      ),
      averaged_fn=lambda params, net_state: params[_NETWORK],
    )

  @classmethod
  def evaluation(
    cls,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
    real: datasets.Split,
    held_out: dict[str, datasets.Split],
    seed: int,
  ) -> Evaluation | None:
    """Bits a dimension of validation images, which choose, and of test images."""
    interval = settings.training.evaluation_interval_steps

    def judge(generator):
      figures = {
        f'{split}/{name}': value
        for split, (images, _) in held_out.items()
        for name, value in generator.evaluate(images, seed).items()
      }
      bits = figures.get(f'validation/{_BITS}')
      return figures, None if bits is None else -bits

    return Evaluation(interval, judge) if interval else None

  def evaluate(self, images: np.ndarray, seed: int) -> dict[str, float]:
    """The bound in bits a dimension, from one draw of the latent numbers an image.

    Args:
      images: uint8 [n, H, W, C].
      seed: of the draws.

    Returns:
      `bits_per_dim`, which an expected code length would be, and its parts:
      `bits_per_dim_rate` of the latent numbers, `bits_per_dim_distortion` of pixels.
    """
    count, whole = len(images), self.settings.training.batch_size
    whole *= parallel.num_devices()  # As many as a step of training, on each.
    start, stop = parallel.process_slots(whole)
    key = parallel.replicate(jax.random.key_data(jax.random.key(seed)))
    found = []
    for first in range(0, count, whole):
      chosen = np.minimum(np.arange(first + start, first + stop), count - 1)
      rows = parallel.shard((images[chosen], np.int32(chosen)))
      found.append(parallel.gather(self._judge((self._replicated, key), rows)))
    distortion, rate = np.concatenate(found)[:count].mean(0, np.float64)
    parts = {f'{_BITS}_rate': rate, f'{_BITS}_distortion': distortion}
    return {_BITS: float(distortion + rate)} | {k: float(v) for k, v in parts.items()}

  @classmethod
  def read_released(
    cls,
    path: epath.Path,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
  ) -> dict:
    """Reads weights as Child published them, the averaged ones; see Generator."""
    like = cls.variables_like(settings, info)
    return released.read(path, like, make_network(settings, info))

  @classmethod
  def make_draw(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> Callable:
    """Builds the function that draws samples; see Generator.

    Deviation: pixels are rounded, as those of all generators; the released code cuts
    them off, which makes images half a grey level darker.
    """
    network, temperature = make_network(settings, info), settings.sampling.temperature

    def draw(params, rngs, classes):
      del classes
      rngs = jax.vmap(jax.random.split)(rngs)
      latent_fn = _drawn(rngs[:, 0], temperature)
      outputs, _ = networks.decode(network, params, latent_fn, len(rngs))
      return (mixture.sample(outputs, rngs[:, 1], network.image_channels) + 1) * 127.5

    return draw


_BITS = 'bits_per_dim'


def make_network(
  settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
) -> networks.Network:
  """The sizes of the network; UserError if its parts do not fit to each other."""
  fields, size = settings.network, info.image_shape[0]
  encoder = stages.encoder(fields.encoder, size)
  return networks.Network(
    image_size=size,
    image_channels=info.image_shape[2],
    width=fields.width,
    bottleneck=fields.bottleneck,
    latent=fields.latent_channels,
    num_mixtures=fields.num_mixtures,
    encoder=encoder,
    decoder=stages.decoder(fields.decoder, encoder),
    pixel_mean=fields.pixel_mean,
    pixel_std=fields.pixel_std,
  )


def make_optimizer(training: config_dict.ConfigDict) -> recipes.Optimizer:
  """Adam with a clipped gradient and decoupled weight decay.

  Args:
    training: `config.generator.training`.
  """
  learning_rate_fn = optimizer.schedule(
    'constant',
    learning_rate=training.learning_rate,
    num_steps=training.num_steps,
    warmup_steps=training.warmup_steps,
  )
  adam = optax.adamw(
    learning_rate_fn,
    b1=training.b1,
    b2=training.b2,
    eps=training.epsilon,
    weight_decay=training.weight_decay,
  )
  clip = optax.clip_by_global_norm(training.gradient_clip)
  return recipes.Optimizer(optax.chain(clip, adam), learning_rate_fn)


def terms(
  network: networks.Network, params: Any, images: jax.Array, latent_fn: Callable
) -> tuple[jax.Array, jax.Array]:
  """The two parts of the bound.

  Args:
    network: its sizes.
    params: of `networks.init`.
    images: [B, H, W, C], whole numbers in 0..255.
    latent_fn: see `networks.decode`.

  Returns:
    (distortion [B], -log P(image | latent numbers); rate [B], KL of their posterior),
    in nats.
  """
  images = jnp.asarray(images, params['gain'].dtype)
  encoded = networks.encode(network, params, images)
  outputs, rates = networks.decode(network, params, latent_fn, len(images), encoded)
  likelihood = mixture.log_likelihood(outputs, images)
  return -jnp.sum(likelihood, (1, 2)), jnp.sum(rates, 0)


def _drawn(rngs, temperature=1.0):
  """The latent_fn that draws, from a key [B] an image."""

  def latent_fn(number, mean, log_std):
    keys = jax.vmap(jax.random.fold_in, (0, None))(rngs, number)
    shape, dtype = mean.shape[1:], mean.dtype
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
    return mean + temperature * jnp.exp(log_std) * noise

  return latent_fn


def _make_loss(network: networks.Network):
  """Builds the loss of `recipes.Phase`: the bound in nats a dimension.

  The norms at which gradients are clipped, and updates skipped, are of this unit.
  """

  def loss_fn(params, net_state, batch, rngs):
    latent_fn = _drawn(rngs('latent'))
    parts = terms(network, params[_NETWORK], batch.images, latent_fn)
    dimensions = np.prod(batch.images.shape[1:])
    distortion, rate = (jnp.mean(part) / dimensions for part in parts)
    loss = distortion + rate
    bits = lambda nats: nats / np.log(2)
    found = {f'train/{_BITS}': bits(loss), f'train/{_BITS}_rate': bits(rate)}
    return loss, (net_state, found)

  return loss_fn


def _make_judge(settings, info):
  """Builds what a device does of `evaluate`: (distortion, rate) [b, 2] in bits."""
  network = make_network(settings, info)

  def judge(variables, rows):
    (params, data), (images, numbers) = variables, rows
    rngs = parallel.key_per_slot(jax.random.wrap_key_data(data), numbers)
    parts = terms(network, params, images, _drawn(rngs))
    return jnp.stack(parts, -1) / (np.log(2) * np.prod(images.shape[1:]))

  return judge
