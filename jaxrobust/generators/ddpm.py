"""Denoising diffusion, the generator of the paper's best results.

A U-Net learns to predict the noise in noisy training images (Ho et al. 2020), by the
training loop of the classifiers; samples are drawn with its averaged parameters. With
`network.conditional` it learns the classes too, and its samples can be guided to them;
the paper's own network knew no classes.
"""

import io
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from jaxrobust import config as configs
from jaxrobust.config import dataset_info
from jaxrobust.data import augment, datasets, pipeline
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.generators import diffusion, samplers, unet
from jaxrobust.runs import workdir
from jaxrobust.training import loop, optimizer, update

_SETTINGS = 'settings'  # their name in the saved file, which no Haiku module has
_MOST_LEFT = 0.01  # of an image's variance, at the end of the process; Ho et al.: 4e-5


class DDPM:
  """A fitted generator.

  Attributes:
    params: averaged parameters of the network.
    settings: `config.generator`.
    info: the data set's.
  """

  def __init__(self, params: Any, settings, info: dataset_info.DatasetInfo):
    self.params, self.settings, self.info = params, settings, info
    self._mapped = parallel.pmap(make_draw(settings, info), local=True)
    self._replicated = parallel.replicate(params)

  @staticmethod
  def check(settings, info: dataset_info.DatasetInfo, fits: bool = False):
    """Raises UserError for settings that cannot be meant for images of `info`."""
    if 'network' not in settings:
      raise UserError(
        "config.generator.name = 'ddpm' in another generator's config: start from "
        "experiments/digits_ddpm.py or base_generator.get_config('ddpm')"
      )
    _check_numbers(settings)
    network = settings.network
    halvings = len(network.multipliers) - 1
    if any(size % 2**halvings for size in info.image_shape[:2]):
      raise UserError(
        f'config.generator.network.multipliers = {network.multipliers} halve '
        f'images {halvings} times, which '
        f'{info.image_shape[0]}x{info.image_shape[1]} do not: give fewer'
      )
    sizes = [info.image_shape[0] // 2**i for i in range(len(network.multipliers))]
    if not set(network.attention_sizes) <= set(sizes):
      raise UserError(
        f'config.generator.network.attention_sizes = {network.attention_sizes}: the '
        f'maps have heights {", ".join(map(str, sizes))}; use some of them, or ()'
      )
    _check_process(settings.process)
    if fits:  # Sampling takes batches of its own.
      parallel.process_slots(settings.training.batch_size)
    sampling = settings.sampling
    if sampling.sampler not in samplers.SAMPLERS:
      raise UserError(
        f'config.generator.sampling.sampler = {sampling.sampler!r}: use one of '
        f'{", ".join(samplers.SAMPLERS)}'
      )
    samplers.SAMPLERS[sampling.sampler](
      diffusion.linear(**settings.process), sampling.num_steps
    )
    if sampling.guidance and not network.conditional:
      raise UserError(
        f'config.generator.sampling.guidance = {sampling.guidance} for a network '
        'without classes: set config.generator.network.conditional=True, or 0'
      )
    if sampling.guidance and not settings.training.condition_dropout:
      raise UserError(
        f'config.generator.sampling.guidance = {sampling.guidance} for a network that '
        'never learns to do without a class: use 0, or fit with '
        'config.generator.training.condition_dropout above 0'
      )

  @staticmethod
  def conditional(settings) -> bool:
    """Whether samples are drawn for classes, by these settings."""
    return settings.network.conditional

  @classmethod
  def fit(
    cls,
    real: datasets.Split,
    info: dataset_info.DatasetInfo,
    settings,
    *,
    folder: epath.Path,
    seed: int,
  ):
    """Trains the network, from wherever its training in `folder` is.

    Args:
      real: training images, uint8 [n, H, W, C], and labels.
      info: of their data set.
      settings: `config.generator`.
      folder: workdir, for checkpoints and metrics.
      seed: of initialisation, order of the images, and noise.

    Raises:
      PreemptedError: after a checkpoint, because the process was asked to stop.
      UserError: as `check`, or if training diverges.
    """
    cls.check(settings, info, fits=True)
    training = settings.training
    adam, learning_rate_fn = make_optimizer(training)
    fresh = jax.jit(lambda: init_state(settings, info, adam, seed))()
    run = loop.Loop(folder, fresh, keep=training.checkpoint_keep)
    batches = pipeline.train_batches(
      real,
      None,
      [pipeline.Share(1.0)],
      batch_size=training.batch_size,
      steps=range(run.start, training.num_steps),
      seed=seed,
      slots=parallel.process_slots(training.batch_size),
      num_classes=info.num_classes,
    )
    run.train(
      parallel.pmap(make_step(settings, info, adam, seed), donate_argnums=0),
      batches,
      intervals=loop.Intervals(
        num_steps=training.num_steps,
        log=training.log_interval_steps,
        checkpoint=training.checkpoint_interval_steps,
      ),
      batch_size=training.batch_size,
      learning_rate_fn=learning_rate_fn,
      note_fn=lambda figures: f'loss {figures["train/loss"]:.4f}',
    )
    run.checkpoints.close()
    return cls(parallel.unreplicate(run.state).ema_params, settings, info)

  def sample(self, rng: jax.Array, indices: np.ndarray, batch_size: int):
    """Draws samples; with a conditional network classes take turns.

    Args:
      rng: key.
      indices: int [n], numbers of the samples.
      batch_size: images on a device at a time.

    Returns:
      (images uint8 [n, H, W, C], classes int32 [n], -1 without condition).
    """
    variables = (self._replicated, parallel.replicate(jax.random.key_data(rng)))
    images = parallel.map_in_batches(
      self._mapped, variables, np.int32(indices), batch_size
    )
    if self.settings.network.conditional:
      return images, np.int32(indices % self.info.num_classes)
    return images, np.full(len(indices), -1, np.int32)

  def save(self, path: epath.Path):
    """Writes averaged parameters and settings to a `.npz` file."""
    arrays = {
      f'{module}/{name}': value
      for module, values in self.params.items()
      for name, value in values.items()
    }
    arrays[_SETTINGS] = np.array(configs.to_json(self.settings))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    workdir.write(path, buffer.getvalue())

  @classmethod
  def restore(cls, path: epath.Path, settings, info: dataset_info.DatasetInfo):
    """Reads what `save` wrote; `settings` may differ in how to sample only."""
    with np.load(io.BytesIO(path.read_bytes())) as file:
      saved = configs.from_json(str(file[_SETTINGS]))
      params = {}
      for key in set(file.files) - {_SETTINGS}:
        module, name = key.rsplit('/', 1)
        params.setdefault(module, {})[name] = file[key]
    for part in ('network', 'process'):
      if changed := configs.differences(saved[part], settings[part]):
        raise UserError(
          f'{path} was fitted with another config.generator.{part} '
          f'({"; ".join(changed)}): use the same'
        )
    return cls(params, settings, info)


def make_network(settings, info: dataset_info.DatasetInfo) -> hk.Transformed:
  """The network: `apply(params, images, times, classes, rngs) -> noise`."""
  fields = settings.network.to_dict()
  num_classes = info.num_classes if fields.pop('conditional') else 0
  return hk.without_apply_rng(
    hk.transform(lambda *inputs: unet.UNet(**fields, num_classes=num_classes)(*inputs))
  )


def make_optimizer(training) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Adam with a clipped gradient, and its learning rate by the step.

  Deviation: it gets, and clips, the mean gradient over all devices; the released code
  of Ho et al. clips that of each device before the mean.

  Args:
    training: `config.generator.training`.
  """
  learning_rate_fn = optimizer.schedule(
    'constant',
    learning_rate=training.learning_rate,
    num_steps=training.num_steps,
    warmup_steps=training.warmup_steps,
  )
  clip = optax.clip_by_global_norm(training.gradient_clip)
  adam = optax.adam(
    learning_rate_fn, b1=training.b1, b2=training.b2, eps=training.epsilon
  )
  return optax.chain(clip, adam), learning_rate_fn


def init_state(settings, info, adam, seed: int) -> update.TrainState:
  """The state before the first update; the network has no other state."""
  image = jnp.zeros((1, *info.image_shape))
  params = make_network(settings, info).init(
    _stream(seed, 'init'), image, jnp.zeros(1), jnp.zeros(1, jnp.int32)
  )
  return update.TrainState(
    params=params,
    net_state={},
    opt_state=adam.init(params),
    ema_params=params,
    ema_net_state={},
    step=jnp.zeros([], jnp.int32),
  )


def make_step(settings, info, adam: optax.GradientTransformation, seed: int):
  """Builds the training step (Ho et al., algorithm 1, with their released settings).

  Deviation: the decay of the average grows to theirs, as `optimizer.ema_decay` says;
  theirs is constant from the first update.

  Args:
    settings: `config.generator`.
    info: the data set's.
    adam: optimizer.
    seed: of all that is random.

  Returns:
    `step(state, batch) -> (state, metrics)` for one device inside `parallel.pmap`.
  """
  network = make_network(settings, info)
  process = diffusion.linear(**settings.process)
  training = settings.training

  def step(state: update.TrainState, batch: update.Batch):
    rngs = lambda name: parallel.key_per_slot(
      jax.random.fold_in(_stream(seed, name), state.step), batch.slots
    )
    each = lambda name, draw: jax.vmap(draw)(rngs(name))
    images = augment.augment(batch.images, rngs('flip'), pad=0, flip=training.flip)
    num_steps = len(process.betas)
    times = each('time', lambda rng: jax.random.randint(rng, (), 0, num_steps))
    noise = each('noise', lambda rng: jax.random.normal(rng, images.shape[1:]))
    unconditional = each(
      'condition', lambda rng: jax.random.bernoulli(rng, training.condition_dropout)
    )
    classes = jnp.where(unconditional, info.num_classes, batch.labels)
    dropout = rngs('dropout')

    def loss_fn(params):
      predict = lambda x, t: network.apply(params, x, t, classes, dropout)
      return jnp.mean(diffusion.loss(predict, process, 2 * images - 1, times, noise))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    loss, grads = parallel.mean_over_devices((loss, grads))
    params, opt_state, ema_params = update.descend(
      state, grads, adam, training.ema_decay
    )
    state = update.TrainState(params, {}, opt_state, ema_params, {}, state.step + 1)
    return state, {'train/loss': loss}

  return step


def make_draw(settings, info: dataset_info.DatasetInfo):
  """Builds the sampler of a device, to be mapped by `parallel.pmap`.

  Args:
    settings: `config.generator`.
    info: the data set's.

  Returns:
    `draw((params, key data), indices int32 [b]) -> images uint8 [b, H, W, C]`.
  """
  network = make_network(settings, info)
  sampling = settings.sampling
  table = samplers.SAMPLERS[sampling.sampler](
    diffusion.linear(**settings.process), sampling.num_steps
  )

  def draw(variables, indices):
    params, data = variables
    rngs = parallel.key_per_slot(jax.random.wrap_key_data(data), indices)
    predict = lambda x, t, classes=None: network.apply(params, x, t, classes)
    if settings.network.conditional:
      predict = diffusion.guided(
        predict, indices % info.num_classes, info.num_classes, sampling.guidance
      )
    images = samplers.sample(predict, table, rngs, info.image_shape)
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)

  return draw


def _check_numbers(settings):
  """Raises UserError for the first number out of its range."""
  network, process, training = settings.network, settings.process, settings.training
  positive = {
    'network.num_blocks': network.num_blocks,
    'network.multipliers': min(network.multipliers, default=0),
    'process.num_steps': process.num_steps,
    'process.first_beta': process.first_beta,
    **{
      f'training.{name}': training[name]
      for name in (
        'num_steps',
        'batch_size',
        'learning_rate',
        'epsilon',
        'gradient_clip',
        'checkpoint_interval_steps',
        'checkpoint_keep',
        'log_interval_steps',
      )
    },
  }
  for field, value in positive.items():
    if value <= 0:
      raise UserError(f'config.generator.{field} = {value}: use a number above 0')
  for field, value in {
    'training.warmup_steps': training.warmup_steps,
    'sampling.guidance': settings.sampling.guidance,
  }.items():
    if value < 0:
      raise UserError(f'config.generator.{field} = {value}: use 0 or more')
  for field, value in {
    'network.dropout': network.dropout,
    'process.first_beta': process.first_beta,
    'process.last_beta': process.last_beta,
    'training.b1': training.b1,
    'training.b2': training.b2,
    'training.ema_decay': training.ema_decay,
    'training.condition_dropout': training.condition_dropout,
  }.items():
    if not 0 <= value < 1:
      raise UserError(f'config.generator.{field} = {value}: use 0 to below 1')
  if network.channels < 4 or network.channels % 4:
    raise UserError(
      f'config.generator.network.channels = {network.channels}: use a multiple of 4'
    )


def _check_process(settings):
  """Raises UserError unless the process ends in noise, by numbers that float32 has."""
  left = diffusion.linear(**settings).alpha_bars[-1]
  least = np.finfo(np.float32).tiny
  if not least <= left <= _MOST_LEFT:
    raise UserError(
      f'config.generator.process leaves {left:.3g} of the variance of an image after '
      f'{settings.num_steps} steps, and sampling starts from noise alone: leave '
      f'{least:.0e} to {_MOST_LEFT} (more steps or greater betas leave less)'
    )


def _stream(seed: int, name: str) -> jax.Array:
  """The root key of one use of randomness in training."""
  streams = ('init', 'flip', 'time', 'noise', 'condition', 'dropout')
  # Sample i has the key fold_in(key(seed), i): this one is of no sample.
  training = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
  return jax.random.fold_in(training, streams.index(name))
