"""Trains a classifier from Python, and gives it back."""

import os

from ml_collections import config_dict

from jaxrobust.config import experiments
from jaxrobust.data.training_images import Arrays
from jaxrobust.errors import PreemptedError
from jaxrobust.models import classifier as classifiers
from jaxrobust.runs import workdir as workdirs
from jaxrobust.training import classifier as training


def train_classifier(
  config: str | config_dict.ConfigDict,
  workdir: str | os.PathLike[str],
  *,
  train: Arrays | None = None,
  validation: Arrays | None = None,
  samples: str | os.PathLike[str] = '',
) -> classifiers.Classifier:
  """Trains a classifier by the loop of `jaxrobust train`, in the same kind of workdir.

    config = jaxrobust.load_config('digits', {'training.num_steps': 200})
    classifier = jaxrobust.train_classifier(config, 'runs/mine', train=(images, labels))

  Interrupted, the same call goes on where it was; of a finished run it returns the
  classifier at once. Other images than those that the run began with are refused.

  Args:
    config: an experiment, such as 'cifar10_linf:wrn-28-10,ddpm', or its config.
    workdir: the run's folder, local or `gs://`; made if absent.
    train: images uint8 [n, H, W, C] and labels int [n] in 0..K-1, in the place of the
      data set's training images: the first `config.dataset.validation_images` of them
      are held out unless `validation` is given. Where their shape or classes are not
      those of `config.dataset`, it becomes 'arrays', and the network normalises by
      their own mean and standard deviation.
    validation: images and labels that are not trained on, in the place of those.
    samples: folder of a sample set, in the place of `config.data.samples`.

  Returns:
    What `jaxrobust.load` does of the workdir: the averaged parameters.

  Raises:
    PreemptedError: after a checkpoint, because the process was asked to stop.
    UserError: for a config or images that cannot be meant, before anything is written;
      or if training diverges.
  """
  # tensorflow, which feeds the images, says much when it is imported.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  if isinstance(config, str):
    config = experiments.load(config)
  folder = os.path.expanduser(workdir)
  workdirs.begin(['train_classifier'])
  state, message = 'done', ''
  try:
    path = training.train(
      config, folder, train=train, validation=validation, samples=samples
    )
  except BaseException as e:  # Also what a cell of a notebook is stopped by.
    stopped = isinstance(e, PreemptedError | KeyboardInterrupt)
    state = 'preempted' if stopped else 'failed'
    message = str(e) or type(e).__name__
    raise
  finally:
    workdirs.write_status(state, message)
  return classifiers.load(path)
