"""What gives samples their classes: a classifier, or the class they were drawn for."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxrobust.config import dataset_info
from jaxrobust.config.generator import CONDITION
from jaxrobust.distributed import parallel
from jaxrobust.models import named_classifiers
from jaxrobust.runs import checksums


class Labeller(NamedTuple):
  """Gives samples their classes.

  Attributes:
    described: for metadata.json.
    label_fn: see `Draws.label`.
  """

  described: dict | str
  label_fn: Callable


def labeller_of(path: str, info: dataset_info.DatasetInfo, batch_size: int) -> Labeller:
  """A classifier that labels samples, or none.

  Args:
    path: of a workdir or a file with a card, the name of a released checkpoint, or
      'condition' for the classes that samples are drawn for.
    info: of the data set that is generated.
    batch_size: images on a device at a time.

  Raises:
    UserError: if nothing is there, nothing says what it is, or it is of another kind
      of images.
  """
  if path == CONDITION:
    return Labeller(CONDITION, lambda images, classes: {'labels': classes})
  found, model, variables = named_classifiers.load(path, 'config.labeller', info)

  def predict(variables, images):
    logits, _ = model.apply(*variables, images / 255, batch_stats=False)
    sure = jax.nn.softmax(logits).max(-1)
    return {'labels': logits.argmax(-1), 'confidence': sure}

  mapped = parallel.pmap(predict, local=True)
  digest = checksums.sha256(found.path)
  return Labeller(
    {'experiment': found.card.name, 'checkpoint_sha256': digest},
    lambda images, _: parallel.map_in_batches(mapped, variables, images, batch_size),
  )
