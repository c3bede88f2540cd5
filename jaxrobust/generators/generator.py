"""What all generators share: checks, files, and sampling on all devices.

A generator is fitted to the training images only. What it has learned is a tree of
arrays, its variables; a sample is a function of them, a key of its own, and perhaps a
class. To add a generator, write a class of `Generator` (or of `trained.Trained`, if it
has networks that the training loop trains), which gives what is marked below, and
register it under a name:

  @registries.GENERATORS.register('mine')
  class Mine(generator.Generator):
    ...

Its settings are `config.generator` of an experiment, which
`jaxrobust.config.generator.register` declares.
"""

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.files import arrays, json_files
from jaxrobust.runs import workdir
from jaxrobust.samples import pictures

_SETTINGS = 'settings'  # beside the variables in the file
# Parts of the settings that may differ from those of the fit.
_LATER = ('training', 'sampling')
_SIDE = 10  # of a square of samples that shows what was learned


class Generator:
  """A fitted generator.

  Attributes:
    variables: tree of arrays.
    settings: `config.generator`.
    info: the data set's.
    licence: of the weights that `read_released` reads, in words.
  """

  licence = ''

  def __init__(
    self,
    variables: Any,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
  ):
    self.variables, self.settings, self.info = variables, settings, info
    self._mapped = parallel.pmap(self.make_sampler(settings, info), local=True)

  @functools.cached_property
  def _replicated(self):
    """The variables on the devices, as soon as they are needed there."""
    return parallel.replicate(self.variables)

  def having(self, variables: Any) -> 'Generator':
    """The same with other variables; what is compiled stays."""
    other = copy.copy(self)
    other.__dict__.pop('_replicated', None)
    other.variables = variables
    return other

  # To be given by each generator.

  @classmethod
  def check(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> None:
    """Checks what follows from several settings, before anything is written.

    Each one by itself is checked already (`config.generator`).

    Args:
      settings: `config.generator`.
      info: of the data set.

    Raises:
      UserError: for values that cannot be meant for images of `info`.
    """
    del settings, info

  @classmethod
  def check_devices(
    cls,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
    num_devices: int,
  ) -> None:
    """Raises UserError if so many devices cannot share the work of a fit."""
    del settings, info, num_devices

  @classmethod
  def conditional(cls, settings: config_dict.ConfigDict) -> bool:
    """Whether samples are drawn for classes, by settings that were checked."""
    raise NotImplementedError

  @classmethod
  def fit(
    cls,
    real: datasets.Split,
    info: dataset_info.DatasetInfo,
    settings: config_dict.ConfigDict,
    *,
    held_out: dict[str, datasets.Split],
    folder: epath.Path,
    seed: int,
  ) -> 'Generator':
    """Fits the generator; every process of a run calls it.

    Args:
      real: training images, uint8 [n, H, W, C], and labels.
      info: of their data set.
      settings: `config.generator`, checked.
      held_out: images that judge it and are not learned from: those of 'test', and of
        'validation' where the config holds some out.
      folder: workdir, for what a fit needs to go on where it was stopped.
      seed: of all that is random.

    Raises:
      PreemptedError: after a checkpoint, because the process was asked to stop.
      UserError: for training images that do not do.
    """
    raise NotImplementedError

  @classmethod
  def variables_like(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> Any:
    """Shapes of the variables as jax.ShapeDtypeStruct; an axis of -1 is of any size."""
    raise NotImplementedError

  @classmethod
  def make_draw(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> Callable:
    """Builds the function that draws samples.

    Returns:
      `draw(variables, rngs [b], classes int32 [b]) -> images float [b, H, W, C]`, with
      pixels of 0 to 255 that are neither rounded nor clipped; sample i depends on key
      i and class i only. Classes are -1 where samples are drawn for none.
    """
    raise NotImplementedError

  # To be given by some.

  def evaluate(self, images: np.ndarray, seed: int) -> dict[str, float]:
    """How likely it finds images that it did not see; every process calls it.

    Args:
      images: uint8 [n, H, W, C].
      seed: of what is random in it.

    Returns:
      Figures by name, means over the images; none where a generator has no likelihood.
    """
    del images, seed
    return {}

  @classmethod
  def read_released(
    cls,
    path: epath.Path,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
  ) -> Any:
    """Reads weights as the generator's authors published them.

    Args:
      path: of their file.
      settings: `config.generator`, checked.
      info: of the data set.

    Returns:
      Variables, by the names of `variables_like`; `check_fits` sees to their shapes.

    Raises:
      UserError: if the file is damaged, of another network, or wants to run anything;
        or where no such files are known.
    """
    raise UserError(
      f'{path}: no published weights of {settings.name} are known here: give a config '
      'of another generator, or fit this one with jaxrobust generate'
    )

  # The same for all.

  @classmethod
  def make_sampler(
    cls, settings: config_dict.ConfigDict, info: dataset_info.DatasetInfo
  ) -> Callable:
    """Builds the program of a device that samples.

    Returns:
      `((variables, key data), indices int32 [b]) -> images uint8 [b, H, W, C]`.
    """
    draw = cls.make_draw(settings, info)

    def sample(variables, indices):
      variables, data = variables
      rngs = parallel.key_per_slot(jax.random.wrap_key_data(data), indices)
      images = draw(variables, rngs, cls._classes(settings, info, indices))
      if images.shape != (shape := (len(indices), *info.image_shape)):
        raise UserError(
          f'{cls.__name__} draws {list(images.shape)}, where images are '
          f'{list(shape)}: correct its make_draw'
        )
      return jnp.round(jnp.clip(images, 0, 255)).astype(jnp.uint8)

    return sample

  @classmethod
  def _classes(cls, settings, info, indices):
    """They take turns; -1 where samples are drawn for none."""
    if cls.conditional(settings):
      return indices % info.num_classes
    return 0 * indices - 1

  def sample(
    self, rng: jax.Array, indices: np.ndarray, batch_size: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Draws samples on the devices of this process.

    Sample i depends on (rng, i) only, and by rounding on batch_size.

    Args:
      rng: key.
      indices: int [n], numbers of the samples.
      batch_size: images on a device at a time.

    Returns:
      (images uint8 [n, H, W, C], classes that they were drawn for, int32 [n], -1 for
      none).
    """
    indices = np.int32(indices)
    variables = (self._replicated, parallel.replicate(jax.random.key_data(rng)))
    images = parallel.map_in_batches(self._mapped, variables, indices, batch_size)
    if len(images) > 1 and images.min() == images.max():
      logging.warning(
        '%s drew %d images whose pixels are all %d, as they are where it draws nan',
        type(self).__name__,
        len(images),
        images.flat[0],
      )
    return images, np.int32(self._classes(self.settings, self.info, indices))

  def picture(self, seed: int) -> PIL.Image.Image:
    """The first samples of a seed, in rows of ten."""
    count = _SIDE**2
    batch_size = -(-count // parallel.num_local_devices())
    images, _ = self.sample(jax.random.key(seed), np.arange(count), batch_size)
    return pictures.grid(images.reshape(_SIDE, _SIDE, *images.shape[1:]))

  def save(self, path: epath.Path) -> None:
    """Writes variables and settings to a `.npz` file."""
    flat = {name: np.asarray(x) for name, x in _named(self.variables)}
    flat[_SETTINGS] = np.array(configs.to_json(self.settings))
    workdir.write_npz(path, **flat)

  @classmethod
  def restore(
    cls,
    path: epath.Path,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
  ) -> 'Generator':
    """Reads what `save` wrote, here or in a file that somebody else made.

    Args:
      path: of the file.
      settings: `config.generator`; they may differ from the file's in training and
        sampling only.
      info: of the data set.

    Raises:
      UserError: if the file is damaged, or was fitted with other settings.
    """
    like = cls.variables_like(settings, info)
    expected = dict(_named(like))
    found = arrays.read_npz(
      path,
      {name: (x.dtype.kind, len(x.shape)) for name, x in expected.items()},
      optional={_SETTINGS: ('U', 0)},  # Earlier versions wrote them for ddpm only.
    )
    if _SETTINGS in found:
      _check_same(path, str(found[_SETTINGS]), settings)
    _check_shapes(path, like, found)
    values = [found[name] for name in expected]
    return cls(jax.tree.unflatten(jax.tree.structure(like), values), settings, info)

  @classmethod
  def check_fits(
    cls,
    path: epath.Path,
    variables: Any,
    settings: config_dict.ConfigDict,
    info: dataset_info.DatasetInfo,
  ) -> None:
    """Raises UserError unless variables of a file are as the settings say."""
    like, found = cls.variables_like(settings, info), dict(_named(variables))
    expected = dict(_named(like))
    if odd := sorted(set(expected) ^ set(found)):
      where = 'the file' if odd[0] in found else 'the network of config.generator'
      raise UserError(
        f'{path} is of another network than config.generator says: only {where} has '
        f'{arrays.printable(odd[0])[:80]}, for one of {len(odd)}'
      )
    _check_shapes(path, like, found)


def _check_shapes(path, like, found: dict[str, np.ndarray]):
  """Raises UserError for an array that has another shape than its like."""
  for name, x in _named(like):
    shape = found[name].shape
    if len(shape) != len(x.shape) or any(
      not (a == b or a == -1 and b) for a, b in zip(x.shape, shape, strict=True)
    ):
      raise UserError(
        f'{path}: {name} has shape {list(shape)}, and by config.generator it has '
        f'{list(x.shape)}: use the config of its fit, or fit anew'
      )


def _check_same(path: epath.Path, text: str, settings):
  """Raises UserError unless a fit had these settings, but for those used later."""
  saved, given = (
    {name: value for name, value in _named(tree) if name.split('/')[0] not in _LATER}
    for tree in (
      json_files.parse(text, str(path)),
      json.loads(configs.to_json(settings)),
    )
  )
  changed = [
    f'{name.replace("/", ".")}: {saved.get(name, "(absent)")} → {value}'
    for name, value in given.items()
    if saved.get(name, '(absent)') != value
  ]
  if changed:
    raise UserError(
      f'{path} was fitted with another config.generator ({"; ".join(changed)}): use '
      'the same, or fit anew'
    )


def _named(tree) -> list[tuple[str, Any]]:
  """The leaves of a tree of dicts, with the keys that lead to them, parted by '/'."""
  is_leaf = lambda x: not isinstance(x, dict)
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return [('/'.join(str(key.key) for key in path), leaf) for path, leaf in leaves]
