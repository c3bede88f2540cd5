"""Classifiers by name, as pure functions of parameters and BatchNorm state."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from ml_collections import config_dict

from jaxrobust.config import dataset_info, registries
from jaxrobust.errors import UnknownNameError, UserError
from jaxrobust.models import convolution
from jaxrobust.models.preact_resnet import PreActResNet18
from jaxrobust.models.wide_resnet import WideResNet

ACTIVATIONS = (
  'relu',
  'swish',
  'silu',
  'gelu',
  'elu',
  'softplus',
  'leaky_relu',
  'celu',
  'selu',
  'mish',
  'tanh',
)
MAX_DEPTH = 250  # of wide residual networks; 106 is the deepest published

# Decorates a function (num_classes, activation, group_size, remat) → Haiku module that
# classifies by `module(images, batch_stats)` → logits [B, K] and has
# `features(images, batch_stats)` → [B, F]. BatchNorm is `models.batch_norm.BatchNorm`.
register = registries.MODELS.register


class Model(NamedTuple):
  """A classifier.

  Attributes:
    init: `rng -> (params, net_state)`.
    apply: `(params, net_state, images, batch_stats) -> (logits, net_state)`. Images
      are float [B, H, W, C] in [0, 1], logits [B, K]. With `batch_stats`, each group
      of the batch is normalised by its own statistics and the returned state has
      this device's running statistics moved; drop it to leave them untouched.
    features: `(params, net_state, images) -> features`, what the last layer sees,
      float [B, F].
    natural: `apply` of a network that is trained without attacks beside this one;
      None without one (see `models.companions`).
  """

  init: Callable[[jax.Array], tuple[Any, Any]]
  apply: Callable[..., tuple[jax.Array, Any]]
  features: Callable[..., jax.Array]
  natural: Callable[..., tuple[jax.Array, Any]] | None = None


def build(
  name: str,
  *,
  num_classes: int,
  image_shape: tuple[int, int, int],
  activation: str,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  padding: int,
  group_size: int | None,
  remat: bool = False,
  compute_dtype: str = 'float32',
) -> Model:
  """Builds a classifier of images in [0, 1]; normalisation is part of it.

  Args:
    name: 'wrn-DEPTH-WIDTH' with DEPTH = 6 n + 4, 'preact-resnet-18', or one that was
      registered by `register`.
    num_classes: K.
    image_shape: (H, W, C) before padding.
    activation: one of ACTIVATIONS.
    mean: of each channel, subtracted after padding.
    std: of each channel.
    padding: pixels of zeros on each side.
    group_size: consecutive images of the global batch that share BatchNorm
      statistics in training; None for a model that only infers.
    remat: whether gradients compute the activations of a residual block again,
      which costs a forward pass and saves their memory.
    compute_dtype: of activations and kernels in convolutions with `batch_stats`;
      parameters, statistics and logits are not affected, nor is inference.

  Returns:
    The model.

  Raises:
    UserError: for a name, an activation or a normalisation that does not exist.
  """
  network_of = _network(name, num_classes, _activation(activation), group_size, remat)
  channels = image_shape[-1]
  for field, values in (('mean', mean), ('std', std)):
    if len(values) != channels:
      raise UserError(
        f'model.{field} = {tuple(values)} for images of {channels} channels: give '
        'one value a channel'
      )
  shift, scale = (jnp.array(v, jnp.float32).reshape(1, 1, 1, -1) for v in (mean, std))

  def normalise(images):
    sides = (padding, padding)
    images = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))
    return (images - shift) / scale

  def forward(images, batch_stats):
    images = normalise(images)
    if batch_stats and compute_dtype != 'float32':
      images = images.astype(compute_dtype)
    return network_of()(images, batch_stats)

  def penultimate(images):
    return network_of().features(normalise(images), batch_stats=False)

  transform = lambda fn: hk.without_apply_rng(hk.transform_with_state(fn))
  network: Any = transform(forward)
  trunk: Any = transform(penultimate)

  def init(rng):
    return network.init(rng, jnp.zeros((1, *image_shape)), batch_stats=True)

  def apply(params, net_state, images, batch_stats):
    params, images = convolution.hold(params, images)
    return network.apply(params, net_state, images, batch_stats)

  def features(params, net_state, images):
    return trunk.apply(params, net_state, images)[0]

  return Model(init, apply, features)


def from_config(
  config: config_dict.ConfigDict, info: dataset_info.DatasetInfo
) -> Model:
  """`build` for the `model` part of a config and a data set's DatasetInfo."""
  return build(
    config.name,
    num_classes=info.num_classes,
    image_shape=info.image_shape,
    activation=config.activation,
    mean=config.mean,
    std=config.std,
    padding=config.padding,
    group_size=config.batch_norm_group,
    # Runs from before these fields were made have none.
    remat=config.get('remat', False),
    compute_dtype=config.get('compute_dtype', 'float32'),
  )


def _activation(name):
  """The elementwise function of that name."""
  if name not in ACTIVATIONS:
    raise UserError(f'model.activation = {name!r}: use one of {", ".join(ACTIVATIONS)}')
  return getattr(jax.nn, name)


def _network(name, num_classes, activation, group_size, remat):
  """Makes the Haiku module, when called inside a transformed function."""
  if name in registries.MODELS:
    make = registries.MODELS.get(name)
    return lambda: make(num_classes, activation, group_size, remat)
  if name == 'preact-resnet-18':
    return lambda: PreActResNet18(num_classes, activation, group_size, remat)
  match = re.fullmatch(r'wrn-([0-9]{1,4})-([0-9]{1,4})', name)
  depth, width = (int(n) for n in match.groups()) if match else (0, 0)
  if not 10 <= depth <= MAX_DEPTH or (depth - 4) % 6 or width < 1:
    raise UnknownNameError(
      f'model.name = {name!r}: use preact-resnet-18, or wrn-DEPTH-WIDTH with a '
      f'DEPTH of 10, 16, 22, 28, …, {MAX_DEPTH} (6 n + 4), such as wrn-28-10'
    )
  return lambda: WideResNet(depth, width, num_classes, activation, group_size, remat)
