"""A classifier that nobody trained, to label samples with."""

import jax
import numpy as np
from etils import epath

from experiments import digits
from jaxrobust import config as configs
from jaxrobust import models
from jaxrobust.config import dataset_info
from jaxrobust.models import parameter_files


def write(folder) -> str:
  """Makes a folder the workdir of a finished run on the digits; returns its path."""
  folder = epath.Path(folder)
  config = digits.get_config('labeller').unlock()
  config.model.name = 'wrn-10-1'
  (folder / 'config.json').write_text(configs.to_json(config))
  model = models.from_config(config.model, dataset_info.INFO['digits'])
  params, state = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.RandomState(0)
  random = lambda x: np.asarray(np.abs(rng.normal(size=x.shape)), x.dtype)
  parameter_files.export_npy(
    folder / 'checkpoint.npy', *(jax.tree.map(random, x) for x in (params, state))
  )
  return str(folder)
