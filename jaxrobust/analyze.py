"""Analyses a sample set: does it meet the conditions under which it should help?

Usage:
  jaxrobust analyze --workdir=DIR --config=EXPERIMENT[:SAMPLES] \\
      --config.labeller=NON_ROBUST_CLASSIFIER [--config.FIELD=VALUE …]

Examples:
  The Gaussian samples of the digits, in the features of their labeller:
    jaxrobust analyze --workdir=runs/paper/digits_gaussian_analysis \\
        --config=digits_analysis:gaussian
  Any other set, by LPIPS (jaxrobust/models/lpips.py says how to make the file):
    jaxrobust analyze --workdir=DIR --config.labeller=runs/cifar10_labeller \\
        --config=cifar10_analysis:data/cifar10_ddpm \\
        --config.features=lpips:lpips.safetensors
  With --config.features=FILE.npz, which another program computes: while the file is
  absent, this one writes DIR/images.npz and says what it should hold.

Generated data helps, the paper says, if (a) the pseudo-labels are accurate; (b)
generated and real images are distributed alike, or attacks on generated images are
unlikely to flip the classifier that labels them; (c) generated images cover the real
ones. Measured are
  (a) the labeller's accuracy on test images, its agreement with the labels of the set,
      and its confidence;
  (b) the share of generated images, and of test images, whose predicted class an attack
      changes; the FID of the features; how well a classifier of the features
      distinguishes generated from test images (50 % if they are alike);
  (c) whether the nearest neighbour of a generated image is a training, test or other
      generated image (a third each if they are alike); the share of train and of test
      images whose nearest neighbour is generated (50 % if they are alike; the paper
      prints coverage without a definition, and this one fits the ideal of its values).
config.rules says when a condition counts as met: these rules are not the paper's. (b)
is undecided where labels are easy to flip and too few images are compared to decide.
Samples that lie nearer to training than to test images are reported as memorisation.

Features decide what is near, so compare figures by the same features only. The paper's
are of LPIPS; experiments/base_analysis.py says what config.features may be.

Writes to the workdir: config.json, results.json (protocol, figures as fractions,
verdicts), figures/conditions.png, figures/neighbours.png (generated images with their
nearest in each set), and until it is finished parts/, from which an interrupted
analysis goes on.
"""

import functools
import hashlib
import json

from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust.analysis import (
  complementarity,
  conditions,
  image_features,
  image_sets,
  predictions,
)
from jaxrobust.analysis.complementarity import SETS
from jaxrobust.config import analysis as analysis_configs
from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.runs import cli, process_group
from jaxrobust.runs import workdir as workdirs
from jaxrobust.runs.stop_requests import StopRequests

_COUNTS = ('num_images', 'num_attacked')


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Measures what is not measured yet, and prints the page."""
  config = datasets.record(workdirs.continued(workdir, config))
  check(config)
  real_fn = functools.partial(datasets.of, config.dataset)
  sets = image_sets.ImageSets(config, real_fn)
  protocol = make_protocol(config, sets)
  process_group.require_alike(protocol)
  folder = workdirs.claim(workdir, config)
  entry = workdirs.find_result(folder, protocol)
  parallel.require_agreement(int(entry is not None))
  if entry is not None:
    logging.info('%s is finished', folder)
  else:
    entry = analyze(config, folder, sets, protocol)
  parallel.barrier('analyzed')
  if parallel.is_writer():
    print(conditions.page(entry), end='')
    print(f'figures: {folder / workdirs.FIGURES}')


def check(config: config_dict.ConfigDict) -> None:
  """Raises UserError for a value that cannot be meant."""
  analysis_configs.check(config)
  predictions.make_attack(config)


def make_protocol(config: config_dict.ConfigDict, sets: image_sets.ImageSets) -> dict:
  """What is compared and how, with checksums of all that is read (JSON values)."""
  protocol = {
    'dataset': dataset_info.identity(config.dataset),
    'samples_sha256': sets.sha256(),
    'labeller_sha256': predictions.sha256_of_labeller(config),
  }
  if config.features:
    protocol['features_sha256'] = image_features.sha256(config)
  for field in ('samples', 'labeller', 'features', 'seed', *_COUNTS):
    protocol[field] = config[field]
  for field in ('threat', 'attack', 'rules'):
    protocol[field] = config[field].to_dict()
  return json.loads(json.dumps(protocol))


def analyze(
  config: config_dict.ConfigDict,
  folder: epath.Path,
  sets: image_sets.ImageSets,
  protocol: dict,
) -> dict | None:
  """Measures, draws and writes; returns the entry of results.json if this writes it."""
  identity = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
  parts = folder / 'parts' / identity[:12]
  for path in (folder / workdirs.FIGURES, parts):
    path.mkdir(parents=True, exist_ok=True)
  images = {name: sets.draw(name, 'num_images')[0] for name in SETS}
  judged = {name: sets.draw(name, 'num_attacked') for name in SETS[1:]}
  with StopRequests('the state is saved') as stops:
    network, found = image_features.of_sets(config, folder, images, parts, stops)
    figures, confidences = predictions.judge(config, judged, protocol, parts, stops)
  parallel.barrier('measured')  # The parts are read.
  if not parallel.is_writer():
    return None
  more, neighbours = complementarity.compare(found, config.seed)
  entry = {
    'network': network,
    'num_features': found['train'].shape[1],
    **said_of_labels(sets.metadata, protocol),
    **figures,
    **more,
  }
  entry['verdicts'] = conditions.verdicts(entry, protocol['rules'])
  for name, png in (
    ('conditions', conditions.draw(entry, protocol, confidences)),
    ('neighbours', conditions.draw_neighbours(images, neighbours)),
  ):
    workdirs.write(folder / workdirs.FIGURES / f'{name}.png', png)
  entry = workdirs.add_result(folder, protocol, entry)
  logging.info('wrote %s', folder / 'results.json')
  (folder / 'parts').rmtree()
  return entry


def said_of_labels(metadata: dict, protocol: dict) -> dict:
  """What a sample set's metadata say of its labels, as far as they do."""
  labeller, selection = (
    said if isinstance(said, dict) else {}
    for said in (metadata['labeller'], metadata['selection'])
  )
  return {
    # Then it agrees with all labels, and that says nothing.
    'labelled_by_labeller': labeller.get('checkpoint_sha256')
    == protocol['labeller_sha256'],
    # With the classes that samples were drawn for; null where for none, or not known.
    'agreement_with_condition': selection.get('agreement_with_condition'),
  }


PROGRAM = cli.Program('analyze', main, config='needed', example='digits_analysis')

if __name__ == '__main__':
  cli.run(PROGRAM)
