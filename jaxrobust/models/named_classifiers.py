"""Classifiers that a field of a config or a flag names: found, checked and loaded."""

from typing import Any, NamedTuple

from etils import epath

from jaxrobust.config import dataset_info
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.models import Model, parameter_files, zoo


class Loaded(NamedTuple):
  """A classifier that is ready to be used.

  Attributes:
    found: what is known of it.
    model: its network.
    variables: parameters and statistics on all local devices.
  """

  found: zoo.Found
  model: Model
  variables: Any


def find(
  path: str,
  field: str,
  info: dataset_info.DatasetInfo | None = None,
  otherwise: str = '',
) -> zoo.Found:
  """What is known of a classifier.

  Args:
    path: of a workdir or a file of parameters with its card, or the name of a released
      checkpoint.
    field: what the path was given as, for messages.
    info: of the images that it is to see; None for those it was trained on.
    otherwise: what else may be given there, for messages.

  Raises:
    UserError: nothing says what network it is, or it was trained on other images.
  """
  found = zoo.find(path)
  if found is None:
    zoo.refuse_absent(path, f'{field} = {path}', otherwise)
    raise UserError(
      f'{field} = {path}: nothing says what network that is; give '
      'a workdir that finished training, a file with its card, or the name of a '
      f'released checkpoint{otherwise}'
    )
  theirs = found.card.info
  info = info or theirs
  if (theirs.image_shape, theirs.num_classes) != (info.image_shape, info.num_classes):
    raise UserError(
      f'{field} = {path} was trained on {theirs.name}, which has other images or '
      f'classes than {info.name}: give a classifier of {info.name}'
    )
  return found


def path_of(
  path: str, field: str, info: dataset_info.DatasetInfo, otherwise: str = ''
) -> epath.Path:
  """The file of a classifier.

  Args:
    path, field, info, otherwise: as of `find`.

  Raises:
    UserError: as of `find`, or the file is absent.
  """
  found = find(path, field, info, otherwise)
  if not found.path.exists():
    raise UserError(f'{found.path} is absent: {zoo.where_to_get(found.path)}')
  return found.path


def load(
  path: str,
  field: str,
  info: dataset_info.DatasetInfo | None = None,
  otherwise: str = '',
) -> Loaded:
  """A classifier on all local devices.

  Args:
    path, field, info, otherwise: as of `find`.

  Raises:
    UserError: as of `find`, or the file is absent or damaged.
  """
  found = find(path, field, info, otherwise)
  model = found.card.build()
  variables = parallel.replicate(parameter_files.load(found.path, model))
  return Loaded(found, model, variables)
