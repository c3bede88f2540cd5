"""A trained network with its parameters, as one function of images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxrobust.config import experiments
from jaxrobust.errors import UserError
from jaxrobust.models import card as cards
from jaxrobust.models import parameter_files, zoo
from jaxrobust.models.card import Card


class Classifier:
  """A network that infers: images in, logits out.

  It is a function of each image by itself, so that attacks take it as it is:

    classifier = jaxrobust.load('runs/digits')
    logits = classifier(images)
    outcome = jaxrobust.evaluate_robustness(classifier, images, labels, 'linf', 8 / 255)

  Attributes:
    card: what it is: data set, threat model, network, accuracies.
    params, net_state: Haiku trees of arrays: parameters, BatchNorm statistics.
  """

  def __init__(self, card: Card, params, net_state):
    """Builds the network of `card`; see `load`."""
    self.card, self.params, self.net_state = card, params, net_state
    model = card.build()
    self._apply = lambda images: model.apply(params, net_state, images, False)[0]
    self._features = lambda images: model.features(params, net_state, images)
    self._compiled = functools.cache(jax.jit)

  def __call__(self, images) -> jax.Array:
    """The logits of images.

    Args:
      images: [B, H, W, C], uint8, or float in [0, 1].

    Returns:
      float [B, K].

    Raises:
      UserError: for images of another shape or type.
    """
    return self._compiled(self._apply)(self._pixels(images))

  def features(self, images) -> jax.Array:
    """What the last layer sees, float [B, F]; arguments as of a call."""
    return self._compiled(self._features)(self._pixels(images))

  def predict(self, images) -> jax.Array:
    """The class of each image, int [B]; arguments as of a call."""
    return self(images).argmax(axis=-1)

  def _pixels(self, images):
    """Images as the network takes them: float in [0, 1]."""
    shape = tuple(self.card.image_shape)
    if np.ndim(images) != 4 or tuple(np.shape(images)[1:]) != shape:
      raise UserError(
        f'images have the shape {list(np.shape(images))}: {self.card.name} takes '
        f'{["B", *shape]}'
      )
    images = jnp.asarray(images)
    if images.dtype == jnp.uint8:
      return images.astype(jnp.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise UserError(f'images are {images.dtype}: give uint8, or float in [0, 1]')
    return images

  def __repr__(self) -> str:
    card = self.card
    lines = [
      f'{card.name}: {card.model["name"]} of {card.dataset}, {card.norm} '
      f'{card.epsilon:.4g}'
    ]
    for entry in card.accuracies:
      protocol = entry.get('protocol')
      judge = protocol.get('suite') if isinstance(protocol, dict) else protocol
      published = ' (published)' if entry.get('published') else ''
      lines.append(
        f'  clean {entry["clean_accuracy"]:.2%}, robust '
        f'{entry["robust_accuracy"]:.2%} by {judge}{published}'
      )
    return '\n'.join(lines)


def load(path: str, config: str = '') -> Classifier:
  """Loads a trained classifier.

  Args:
    path: a workdir, a file of parameters of any format, or the name of a released
      checkpoint.
    config: an experiment that says what the network is, such as
      'cifar10_linf:wrn-28-10'; needed only for a file that has no model card.

  Returns:
    The classifier.

  Raises:
    UserError: if there is no such checkpoint, it is damaged, or nothing says what its
      network is.
  """
  path = str(epath.Path(path).expanduser()) if path not in zoo.ENTRIES else path
  found = zoo.find(path)
  if config:
    card = cards.from_config(experiments.load(config), source=path)
    file = found.path if found else path
  elif found:
    card, file = found
  else:
    raise UserError(
      f'nothing says what the network of {path} is: give config=, an experiment such '
      f'as cifar10_linf:wrn-28-10. {zoo.where_to_get(epath.Path(path))}'
    )
  return Classifier(card, *parameter_files.load(file, card.build()))
