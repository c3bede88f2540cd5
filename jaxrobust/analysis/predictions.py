"""What a labeller predicts, and which of its predictions an attack changes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import config_dict

from jaxrobust.analysis import image_sets
from jaxrobust.attacks import norms, pgd, suites
from jaxrobust.attacks.evaluation import Evaluator
from jaxrobust.attacks.record import Record
from jaxrobust.config import dataset_info
from jaxrobust.distributed import parallel
from jaxrobust.models import named_classifiers
from jaxrobust.runs import checksums, stop_requests

_FIELD = 'config.labeller'


def make_attack(config: config_dict.ConfigDict) -> pgd.PGD:
  """The attack of an analysis; UserError for one that cannot be meant."""
  ball = norms.get(config.threat.norm, config.threat.epsilon)
  return suites.attack_from_config(config.attack, ball)


def sha256_of_labeller(config: config_dict.ConfigDict) -> str:
  """The sha256 of the file of an analysis's labeller.

  Raises:
    UserError: if it is absent, or sees other images than those of the data set.
  """
  info = dataset_info.of(config.dataset)
  return checksums.sha256(named_classifiers.path_of(config.labeller, _FIELD, info))


def judge(
  config: config_dict.ConfigDict,
  sets: dict[str, image_sets.Arrays],
  protocol: dict[str, Any],
  parts: epath.Path,
  stops: stop_requests.StopRequests,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """Asks the labeller of test and generated images, and attacks what it says.

  Args:
    config: of the analysis.
    sets: images and labels of 'test' and of 'generated'.
    protocol: of the analysis (JSON values).
    parts: folder of what an interrupted analysis goes on from.
    stops: asked after each batch.

  Returns:
    (figures by name, fractions in [0, 1]; confidences [n] of each set).

  Raises:
    PreemptedError: because the process was asked to stop.
    UserError: for a labeller that is absent or damaged.
  """
  _, model, variables = named_classifiers.load(config.labeller, _FIELD)
  logits_fn = lambda v, x: model.apply(*v, x, batch_stats=False)[0]
  mapped = parallel.pmap(
    lambda v, x: jax.nn.softmax(logits_fn(v, jnp.asarray(x, jnp.float32) / 255)),
    local=True,
  )
  attack = make_attack(config)
  evaluator = Evaluator(
    logits_fn,
    [(f'pgd-{attack.num_steps}', attack)],
    batch_size=config.batch_size * parallel.num_devices(),
    seed=config.seed,
  )
  right, confidences, flips = {}, {}, {}
  for name, (images, labels) in sets.items():
    said = parallel.map_in_batches(mapped, variables, images, config.batch_size)
    predictions = said.argmax(-1)
    right[name] = float((predictions == labels).mean())
    confidences[name] = said.max(-1)
    outcome = evaluator(
      variables,
      images,
      predictions,
      record=Record(len(images), parts / f'attack-{name}', protocol),
      progress=lambda what, *rest, name=name: stops.progress(
        f'{what} of {name}', *rest
      ),
    )
    flips[name] = 1 - float(outcome.robust.mean())
  return {
    'label_agreement': right['generated'],
    'labeller_test_accuracy': right['test'],
    'mean_confidence': float(confidences['generated'].mean()),
    'mean_confidence_test': float(confidences['test'].mean()),
    'flip_rate_generated': flips['generated'],
    'flip_rate_test': flips['test'],
  }, confidences
