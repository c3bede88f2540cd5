"""Weights that others published, as a run whose generator is fitted."""

import hashlib

import jax
from etils import epath
from ml_collections import config_dict

from jaxrobust.config import dataset_info
from jaxrobust.errors import UserError
from jaxrobust.files import arrays
from jaxrobust.generators import checks
from jaxrobust.runs import workdir as workdirs


def convert(
  config: config_dict.ConfigDict, source: epath.Path, target: epath.Path
) -> str:
  """Writes published weights as `generator.npz`, into the workdir of a config.

  The folder is then a run of `generate` that has been fitted: `--workdir=` goes on with
  it, and `--config.fitted=` of another run takes it.

  Args:
    config: of a generator's run; says what the weights are.
    source: file as its authors published it.
    target: `generator.npz` in a folder that is new, or a workdir of this config.

  Returns:
    One line: what was written, the checksum of the source, and its licence.

  Raises:
    UserError: if the source is damaged or of another network, or the target exists;
      then nothing is written.
  """
  if target.name != workdirs.GENERATOR:
    raise UserError(
      f"--to={target}: --config is a generator's, which is written to "
      f'{workdirs.GENERATOR} in the workdir of a run: give '
      f"--to=DIR/{workdirs.GENERATOR}, or a classifier's config"
    )
  if target.exists():
    raise UserError(f'{target} exists: remove it, or give another --to')
  checks.check(config, is_labelled=False)
  kind = checks.generator_of(config)
  settings, info = config.generator, dataset_info.of(config.dataset)
  variables = kind.read_released(source, settings, info)
  kind.check_fits(source, variables, settings, info)
  folder = workdirs.claim(str(target.parent), config)
  fitted = kind(variables, settings, info)
  try:
    fitted.save(folder / target.name)
  except OSError as e:
    raise UserError(f'cannot write to {target}: {e.strerror or e}') from e
  with arrays.open_file(source) as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  count = sum(x.size for x in jax.tree.leaves(variables))
  return (
    f'{target}: {settings.name} of {config.dataset.name}, {count:,} numbers; {source} '
    f'has sha256 {digest}; its licence holds for them and what they draw: '
    f'{kind.licence}'
  )
