"""A trained network with its parameters, as one function of images."""

import contextlib
import functools
import html
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import config_dict

from jaxrobust import models
from jaxrobust.config import experiments
from jaxrobust.errors import UnknownNameError, UserError
from jaxrobust.models import card as cards
from jaxrobust.models import parameter_files, pytorch, zoo
from jaxrobust.models.card import Card
from jaxrobust.runs import waiting

# Of logits of a PyTorch module and of the same network here: sums of float32 in another
# order, relative to the largest logit.
_AGREEMENT = 1e-3


class Classifier:
  """A network that infers: images in, logits out.

  It is a function of each image by itself, so that attacks take it as it is, and other
  jax code may differentiate or compile it:

    classifier = jaxrobust.load('runs/digits')
    logits = classifier(images)
    outcome = jaxrobust.evaluate_robustness(classifier, images, labels, 'linf', 8 / 255)

  Attributes:
    card: what it is: data set, threat model, network, accuracies.
    params: Haiku tree of arrays.
    net_state: Haiku tree of arrays, the statistics of BatchNorm.
  """

  def __init__(self, card: Card, params: Any, net_state: Any):
    """Builds the network of `card`; see `load`.

    Args:
      card: what the network is.
      params: Haiku tree of arrays of that network.
      net_state: likewise.
    """
    self.card = card
    self.params, self.net_state = jax.tree.map(jnp.asarray, (params, net_state))
    sizes = card.info.num_classes, tuple(card.info.image_shape)
    self._logits, self._features = _programs(tuple(card.model.items()), *sizes)
    self._called = set()  # Programs and numbers of images.

  def __call__(self, images: Any) -> jax.Array:
    """The logits of images; a network is compiled once for each number of them.

    Args:
      images: [B, H, W, C], uint8, or float in [0, 1].

    Returns:
      float [B, K].

    Raises:
      UserError: for images of another shape or type.
    """
    return self._of(self._logits, images)

  def features(self, images: Any) -> jax.Array:
    """What the last layer sees, float [B, F]; arguments as of a call."""
    return self._of(self._features, images)

  def predict(self, images: Any) -> jax.Array:
    """The class of each image, int [B]; arguments as of a call."""
    return self(images).argmax(axis=-1)

  def _of(self, program, images) -> jax.Array:
    """What a program gives for images; waits aloud where it has to be compiled."""
    pixels = self._pixels(images)
    waited, call = contextlib.nullcontext(), (program, len(pixels))
    if call not in self._called and not isinstance(pixels, jax.core.Tracer):
      waited = waiting.waiting(f'compiling {self.card.name} for {len(pixels)} images')
      self._called.add(call)
    with waited:
      return program((self.params, self.net_state), pixels)

  def _pixels(self, images) -> jax.Array:
    """Images as the network takes them: float in [0, 1]."""
    shape = self.card.info.image_shape
    if np.ndim(images) != 4 or tuple(np.shape(images)[1:]) != tuple(shape):
      found = list(map(str, np.shape(images)))
      if isinstance(images, jax.core.Tracer):
        found[:1] = ['B']  # Who traces it may do so for other numbers than were given.
      raise UserError(
        f'images have the shape [{", ".join(found)}]: {self.card.name} takes '
        f'[B, {", ".join(map(str, shape))}]'
      )
    is_float = isinstance(images, np.ndarray) and images.dtype.kind == 'f'
    if is_float and images.max(initial=0) > 2:  # No attack goes so far beyond 1.
      raise UserError(
        f'images are float up to {images.max():.4g}: give uint8, or divide them by 255'
      )
    images = jnp.asarray(images)
    if images.dtype == jnp.uint8:
      return images.astype(jnp.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise UserError(f'images are {images.dtype}: give uint8, or float in [0, 1]')
    return images

  def _lines(self) -> list[str]:
    """What it is, and what it was judged to be, a line each."""
    card = self.card
    lines = [
      f'{card.name}: {card.model["name"]} of {card.dataset}, {card.norm} '
      f'{card.epsilon:.4g}'
    ]
    for entry in card.accuracies:
      published = ' (published)' if entry.get('published') else ''
      suite = entry['protocol'].get('suite')
      robust = f', robust {entry["robust_accuracy"]:.2%} by {suite}'
      robust = robust if cards.has_attack(entry) else ''
      lines.append(f'clean {entry["clean_accuracy"]:.2%}{robust}{published}')
    return lines

  def __repr__(self) -> str:
    return '\n  '.join(self._lines())

  def _repr_html_(self) -> str:
    return '<br>'.join(map(html.escape, self._lines()))


def load(
  path: str | os.PathLike[str], config: str | config_dict.ConfigDict = ''
) -> Classifier:
  """Loads a trained classifier.

  Args:
    path: a workdir, a file of parameters of any format, the name of a released
      checkpoint, or hf:OWNER/NAME on the Hugging Face hub.
    config: what the network is: an experiment, such as 'cifar10_linf:wrn-28-10', or its
      config; needed only where no model card says it.

  Returns:
    The classifier.

  Raises:
    UserError: if there is no such checkpoint, it is damaged, or nothing says what its
      network is.
  """
  path = os.path.expanduser(path)
  try:
    return _load(path, config)
  except UnknownNameError as e:
    raise UserError(f'{path}: {e}; run the file that registers one of your own') from e


def _load(path: str, config: str | config_dict.ConfigDict) -> Classifier:
  found = zoo.find(path)
  if config:
    file = found.path if found else epath.Path(path)
    card = cards.from_config(_config(config), source=path)
  elif found:
    card, file = found
  else:
    zoo.refuse_absent(path, path)
    raise UserError(
      f'{path}: nothing says what its network is{cards.of_others(path)}; give config=, '
      'an experiment such as cifar10_linf:wrn-28-10; or '
      f'{zoo.where_to_get(epath.Path(path))}'
    )
  return Classifier(card, *parameter_files.load(file, card.build()))


def from_torch(
  network: Any, config: str | config_dict.ConfigDict, name: str = ''
) -> Classifier:
  """Takes over a network of PyTorch: a WideResNet or PreActResNet of RobustBench.

  These are the authors' two networks, which RobustBench calls DMWideResNet and
  DMPreActResNet; `jaxrobust.models.pytorch` has their names. A module is called once on
  random images, and must answer as the network here does.

  Args:
    network: a module, or its state dict: names → tensors or arrays. Of a file, use
      `load`, which needs no PyTorch.
    config: what the network is: an experiment, such as 'cifar10_linf:wrn-28-10', or its
      config.
    name: what to call it.

  Returns:
    The classifier.

  Raises:
    UserError: for another network, with the names that it has; or if a module answers
      otherwise.
  """
  source = name or type(network).__name__
  is_module = callable(getattr(network, 'state_dict', None))
  state = network.state_dict() if is_module else network
  if not isinstance(state, Mapping):
    raise UserError(f'{source} is neither a module of PyTorch nor a state dict')
  arrays = {key: pytorch.to_numpy(x) for key, x in state.items()}
  variables = pytorch.from_state_dict(arrays, source)
  card = cards.from_config(_config(config), source=source, name=source)
  template = jax.eval_shape(card.build().init, jax.random.key(0))
  parameter_files.check_fits(source, variables, template)
  classifier = Classifier(card, *variables)
  if is_module:
    _compare(classifier, network, source)
  return classifier


@functools.lru_cache(maxsize=32)
def _programs(model: tuple, num_classes: int, image_shape: tuple):
  """Logits and features of a network, which classifiers of the same kind share."""
  network = models.build(
    **dict(model), num_classes=num_classes, image_shape=image_shape, group_size=None
  )
  # The variables are arguments, so that no program has them as constants.
  return (
    jax.jit(lambda variables, x: network.apply(*variables, x, False)[0]),
    jax.jit(lambda variables, x: network.features(*variables, x)),
  )


def _config(config) -> config_dict.ConfigDict:
  return experiments.load(config) if isinstance(config, str) else config


def _compare(classifier: Classifier, module, source: str):
  """Raises UserError unless both have the same logits."""
  shape = (8, *classifier.card.info.image_shape)
  images = np.random.default_rng(0).random(shape, np.float32)
  theirs, ours = pytorch.logits(module, images), np.asarray(classifier(images))
  if theirs.shape != ours.shape:
    raise UserError(
      f'{source} makes {list(theirs.shape)} of images {list(shape)}, and the network '
      f'of its config {list(ours.shape)}'
    )
  difference = np.abs(theirs - ours).max()
  if not difference <= _AGREEMENT * max(1.0, np.abs(theirs).max()):
    said = classifier.card.model
    raise UserError(
      f'{source} has other logits than the network of its config, by up to '
      f'{difference:.3g}: correct model.activation = {said["activation"]}, model.mean '
      f'= {said["mean"]}, model.std = {said["std"]} or model.padding = '
      f'{said["padding"]} of the config'
    )
