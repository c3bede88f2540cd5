"""The Frechet distance of a generator's samples from the training images, in training.

It says how a generator with a discriminator goes on, whose losses do not.
"""

import jax
import numpy as np
from ml_collections import config_dict

from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.generators.trained import Evaluation
from jaxrobust.models import feature_networks

METRIC = 'eval_ema/fid'


def evaluation(
  training: config_dict.ConfigDict,
  info: dataset_info.DatasetInfo,
  real: datasets.Split,
  seed: int,
) -> Evaluation | None:
  """Judges by the distance of the first samples of a seed from all training images.

  Args:
    training: `config.generator.training`, of which `fid` says how.
    info: of the data set.
    real: training images.
    seed: of the samples.

  Returns:
    What `Trained.evaluation` gives, with less distance for the better score; None where
    none is asked for.

  Raises:
    UserError: for a network of features that is not there, or for other images.
  """
  fields = training.fid
  if not fields.interval_steps:
    return None
  features_fn = lambda images: images.reshape(len(images), -1) / np.float32(255)
  if fields.features:
    features_fn = feature_networks.network(fields.features, dataset=info.name).features
  moments = feature_networks.moments(features_fn(real.images))
  batch_size = max(training.batch_size // parallel.num_devices(), 1)

  def judge(generator):
    images, _ = generator.sample(
      jax.random.key(seed), np.arange(fields.samples), batch_size
    )
    found = feature_networks.frechet_distance(
      moments, feature_networks.moments(features_fn(images))
    )
    return {METRIC: found}, -found

  return Evaluation(fields.interval_steps, judge)
