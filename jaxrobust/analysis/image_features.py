"""The features of images, in which some are near to each other.

They are the penultimate layer of a classifier, LPIPS, or what another program computed
and wrote to a file, such as those of the Inception network that published FIDs are by.
"""

import io
import os

import numpy as np
from etils import epath
from ml_collections import config_dict

from jaxrobust.analysis.complementarity import SETS
from jaxrobust.config import dataset_info
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.files import arrays
from jaxrobust.models import feature_networks, named_classifiers
from jaxrobust.runs import checksums, stop_requests
from jaxrobust.runs import workdir as workdirs


def of_real_and_generated(
  source: str, real: np.ndarray, generated: np.ndarray, dataset: str = ''
) -> tuple[str, np.ndarray, np.ndarray]:
  """The features of real and generated images, by a network or from a file.

  Args:
    source: an `.npz` as of `read_features`, or as of `feature_networks.network`.
    real, generated: uint8 [n, H, W, C].
    dataset: as of `feature_networks.network`.

  Returns:
    (name of the network, features [n, F] of real, and of generated).

  Raises:
    UserError: as of these; the file is of other numbers of images.
  """
  if not source.endswith('.npz'):
    name, features_fn = feature_networks.network(source, dataset=dataset)
    return name, features_fn(real), features_fn(generated)
  name, features = read_features(source)
  rows = [len(real), len(generated)]
  if [len(x) for x in features] != rows:
    raise UserError(
      f'{source} has features of {[len(x) for x in features]} real and generated '
      f'images; it needs {rows}'
    )
  return name, features[0], features[1]


def read_features(
  path: str | os.PathLike, sets: tuple[str, ...] = ('real', 'generated')
) -> tuple[str, list[np.ndarray]]:
  """Reads features that another program computed.

  Args:
    path: `.npz` with `network` (its name), and float [n, F] for each of the sets.
    sets: their names; F is the same for all.

  Returns:
    (name of the network, features of each set).

  Raises:
    UserError: the file is absent, damaged or holds something else.
  """
  expected = {'network': ('U', 0), **{name: ('fiu', 2) for name in sets}}
  content = arrays.read_npz(path, expected)
  found = [content[name] for name in sets]
  if len({x.shape[1] for x in found}) > 1 or not found[0].shape[1]:
    shapes = zip(sets, (list(x.shape) for x in found), strict=True)
    raise UserError(
      f'{path} holds {" and ".join(f"{name} {shape}" for name, shape in shapes)}: '
      'they must be [n, F], of one F'
    )
  return str(content['network']), found


def sha256(config: config_dict.ConfigDict) -> str:
  """The sha256 of the file that an analysis's `config.features` names.

  Returns:
    '' where LPIPS or a file of features is absent: the latter may be made when it is
    known of which images.

  Raises:
    UserError: if it names a classifier that is absent, or that sees other images.
  """
  path = epath.Path(config.features.removeprefix(feature_networks.LPIPS))
  if not config.features.startswith(feature_networks.LPIPS) and path.suffix != '.npz':
    info = dataset_info.of(config.dataset)
    path = named_classifiers.path_of(
      config.features, 'config.features', info, feature_networks.OR_FEATURES
    )
  return checksums.sha256(path) if path.exists() else ''


def of_sets(
  config: config_dict.ConfigDict,
  folder: epath.Path,
  images: dict[str, np.ndarray],
  parts: epath.Path,
  stops: stop_requests.StopRequests,
) -> tuple[str, dict[str, np.ndarray]]:
  """The features of the sets of an analysis, kept in `parts`.

  Every process computes all of them, which takes less than to compare them.

  Args:
    config: of the analysis.
    folder: its workdir; gets images.npz where `config.features` names a file that
      another program has yet to make.
    images: uint8 [n, H, W, C] of each of SETS.
    parts: folder of what an interrupted analysis goes on from.
    stops: asked after each batch.

  Returns:
    (name of the network, features [n, F] of each of SETS).

  Raises:
    PreemptedError: because the process was asked to stop.
    UserError: as of `feature_networks.network` or `read_features`; or of other
      numbers of images.
  """
  if config.features.endswith('.npz'):
    return _read_of_sets(config, folder, images)
  network = feature_networks.network(
    config.features or config.labeller, config.batch_size
  )
  found = {}
  for name, of_set in images.items():
    path = parts / f'features-{name}.npy'
    if parallel.everywhere(path.exists()):
      found[name] = np.load(io.BytesIO(path.read_bytes()))
      continue
    progress = stops.progress(f'features of {name}', len(of_set), 'images')
    size, rows = config.batch_size * parallel.num_local_devices(), []
    for start in range(0, len(of_set), size):
      rows.append(network.features(of_set[start : start + size]))
      progress.advance(len(rows[-1]))
    progress.close()
    found[name] = np.concatenate(rows)
    if parallel.is_writer():
      buffer = io.BytesIO()
      np.save(buffer, found[name])
      workdirs.write(path, buffer.getvalue())
  return network.name, found


def _read_of_sets(config, folder: epath.Path, images: dict):
  """Reads them from a file; where it is absent, writes the images to make it of."""
  if not epath.Path(config.features).exists():
    if parallel.is_writer():
      workdirs.write_npz(folder / 'images.npz', **images)
    parallel.barrier('images')
    raise UserError(
      f'config.features = {config.features} is absent: compute features '
      f'[{config.num_images}, F] of train, test and generated in '
      f'{folder / "images.npz"} and save them there, under these names and with '
      'network, a name'
    )
  name, rows = read_features(config.features, SETS)
  if [len(x) for x in rows] != [config.num_images] * len(SETS):
    raise UserError(
      f'{config.features} has features of {[len(x) for x in rows]} images: '
      f'config.num_images = {config.num_images} of each of {", ".join(SETS)} are needed'
    )
  return name, dict(zip(SETS, rows, strict=True))
