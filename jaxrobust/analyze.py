"""Analyses a sample set: does it meet the conditions under which it should help?

Usage:
  python -m jaxrobust.analyze --workdir=DIR --config=experiments/FILE.py[:SAMPLES] \\
      --config.labeller=NON_ROBUST_CLASSIFIER [--config.FIELD=VALUE …]

Examples:
  The Gaussian samples of the digits, in the features of their labeller:
    python -m jaxrobust.analyze --workdir=runs/paper/digits_gaussian_analysis \\
        --config=experiments/digits_analysis.py:gaussian
  Any other set, by LPIPS (jaxrobust/models/lpips.py says how to make the file):
    python -m jaxrobust.analyze --workdir=DIR --config.labeller=runs/cifar10_labeller \\
        --config=experiments/cifar10_analysis.py:data/cifar10_ddpm \\
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

import hashlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust.analysis import complementarity, conditions, quality
from jaxrobust.analysis.complementarity import SETS
from jaxrobust.attacks import norms, pgd, suites
from jaxrobust.attacks.evaluation import Evaluator
from jaxrobust.attacks.record import Record
from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.models import classifiers, feature_networks, zoo
from jaxrobust.runs import checksums, cli, process_group
from jaxrobust.runs import workdir as workdirs
from jaxrobust.runs.stop_requests import StopRequests
from jaxrobust.samples import sample_sets, stratified

_SIZES = ('num_images', 'num_attacked', 'batch_size')


def main(config: config_dict.ConfigDict, workdir: str) -> None:
  """Measures what is not measured yet, and prints the page."""
  config = datasets.record(workdirs.continued(workdir, config))
  check(config)
  sample_set = open_samples(config)
  protocol = make_protocol(config, sample_set)
  process_group.require_alike(protocol)
  folder = workdirs.claim(workdir, config)
  entry = workdirs.find_result(folder, protocol)
  parallel.require_agreement(int(entry is not None))
  if entry is not None:
    logging.info('%s is finished', folder)
  else:
    entry = analyze(config, folder, sample_set, protocol)
  parallel.barrier('analyzed')
  if parallel.is_writer():
    print(conditions.page(entry), end='')
    print(f'figures: {folder / "figures"}')


def check(config: config_dict.ConfigDict) -> None:
  """Raises UserError for a value that cannot be meant."""
  if 'rules' not in config:
    raise UserError(
      "this is not an analysis's config: give an experiment such as "
      'experiments/digits_analysis.py'
    )
  dataset_info.check(config.dataset)
  for field, least in zip(_SIZES, (4, 1, 1), strict=True):
    if config[field] < least:
      raise UserError(f'config.{field} = {config[field]}: use {least} or more')
  for field, value in config.rules.items():
    if not 0 <= value <= 1:
      raise UserError(f'config.rules.{field} = {value}: use a number from 0 to 1')
  for field, what in (
    ('samples', 'the folder of the sample set'),
    ('labeller', 'the workdir of a non-robust classifier'),
  ):
    if not config[field]:
      raise UserError(f'config.{field} is not set: give {what}')
  make_attack(config)


def make_attack(config: config_dict.ConfigDict) -> pgd.PGD:
  """The attack that tries to change predictions."""
  ball = norms.get(config.threat.norm, config.threat.epsilon)
  return suites.attack_from_config(config.attack, ball)


def open_samples(config: config_dict.ConfigDict) -> sample_sets.SampleSet:
  """The sample set; UserError if its images are not like those of the data set."""
  found = sample_sets.SampleSet.open(config.samples)
  info = dataset_info.of(config.dataset)
  # Imported sets may lack the last classes.
  if found.image_shape != info.image_shape or found.num_classes > info.num_classes:
    raise UserError(
      f'config.samples = {config.samples} holds images {list(found.image_shape)} of '
      f'{found.num_classes} classes, {info.name} {list(info.image_shape)} of '
      f'{info.num_classes}: name the data set that the samples are of'
    )
  return found


def make_protocol(
  config: config_dict.ConfigDict, sample_set: sample_sets.SampleSet
) -> dict:
  """What is compared and how, with checksums of all that is read (JSON values)."""
  protocol = {
    'dataset': dataset_info.identity(config.dataset),
    'samples_sha256': checksums.sha256(epath.Path(sample_set.path) / 'metadata.json'),
    'labeller_sha256': checksums.sha256(find_classifier(config, 'labeller').path),
  }
  if config.features:
    path = features_path(config)
    # An .npz may be made when it is known of which images.
    protocol['features_sha256'] = checksums.sha256(path) if path.exists() else ''
  for field in ('samples', 'labeller', 'features', 'seed', *_SIZES[:2]):
    protocol[field] = config[field]
  for field in ('threat', 'attack', 'rules'):
    protocol[field] = config[field].to_dict()
  return json.loads(json.dumps(protocol))


def features_path(config: config_dict.ConfigDict) -> epath.Path:
  """The file that config.features names."""
  if config.features.startswith(feature_networks.LPIPS):
    return epath.Path(config.features.removeprefix(feature_networks.LPIPS))
  if config.features.endswith('.npz'):
    return epath.Path(config.features)
  return find_classifier(config, 'features').path


def find_classifier(config: config_dict.ConfigDict, field: str) -> zoo.Found:
  """What is known of the classifier in a field; UserError if it sees other images."""
  found = classifiers.find(
    config[field],
    f'config.{field}',
    dataset_info.of(config.dataset),
    feature_networks.OR_FEATURES if field == 'features' else '',
  )
  if not found.path.exists():
    raise UserError(f'{found.path} is absent: {zoo.where_to_get(found.path)}')
  return found


def analyze(
  config: config_dict.ConfigDict,
  folder: epath.Path,
  sample_set: sample_sets.SampleSet,
  protocol: dict,
) -> dict | None:
  """Measures, draws and writes; returns the entry of results.json if this writes it."""
  identity = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
  parts = folder / 'parts' / identity[:12]
  for path in (folder / 'figures', parts):
    path.mkdir(parents=True, exist_ok=True)
  sources = open_sources(config, sample_set)
  compared = {name: images_of(config, sources, name, 'num_images') for name in SETS}
  judged = {name: images_of(config, sources, name, 'num_attacked') for name in SETS[1:]}
  with StopRequests('the state is saved') as stops:
    network, features = find_features(config, folder, compared, parts, stops)
    figures, confidences = judge(config, judged, protocol, parts, stops)
  parallel.barrier('measured')  # The parts are read.
  if not parallel.is_writer():
    return None
  more, neighbours = compare(config, features)
  entry = {
    'network': network,
    'num_features': features['train'].shape[1],
    **said_of_labels(sample_set.metadata, protocol),
    **figures,
    **more,
  }
  entry['verdicts'] = conditions.verdicts(entry, protocol['rules'])
  images = {name: split.images for name, split in compared.items()}
  for name, png in (
    ('conditions', conditions.draw(entry, protocol, confidences)),
    ('neighbours', conditions.draw_neighbours(images, neighbours)),
  ):
    workdirs.write(folder / 'figures' / f'{name}.png', png)
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


def open_sources(
  config: config_dict.ConfigDict, sample_set: sample_sets.SampleSet
) -> dict:
  """Of each of SETS: its size, and a function from indices to a Split."""
  sources = {
    'generated': (
      len(sample_set),
      lambda i: datasets.Split(sample_set.gather(i), sample_set.gather_labels(i)),
    )
  }
  for name in ('train', 'test'):
    real = datasets.of(config.dataset, name)
    sources[name] = (
      len(real.images),
      lambda i, real=real: datasets.Split(real.images[i], real.labels[i]),
    )
  return sources


def images_of(
  config: config_dict.ConfigDict, sources: dict, name: str, field: str
) -> datasets.Split:
  """`config[field]` images of a set; UserError if it has fewer."""
  (total, gather), count = sources[name], config[field]
  if count > total:
    raise UserError(
      f'config.{field} = {count}: there are {total} {name} images; use at most {total}'
    )
  return gather(stratified.one_of_each_part(total, count, config.seed))


def find_features(
  config: config_dict.ConfigDict,
  folder: epath.Path,
  sets: dict,
  parts: epath.Path,
  stops: StopRequests,
) -> tuple[str, dict[str, np.ndarray]]:
  """(name of the network, features [n, F] of each of SETS), kept in `parts`.

  Every process computes all of them, which takes less than to compare them.
  """
  if config.features.endswith('.npz'):
    return read_features(config, folder, sets)
  network = feature_networks.network(
    config.features or config.labeller, config.batch_size
  )
  found = {}
  for name, split in sets.items():
    path = parts / f'features-{name}.npy'
    if parallel.everywhere(path.exists()):
      found[name] = np.load(io.BytesIO(path.read_bytes()))
      continue
    progress = stops.progress(f'features of {name}', len(split.images), 'images')
    size, rows = config.batch_size * parallel.num_local_devices(), []
    for start in range(0, len(split.images), size):
      rows.append(network.features(split.images[start : start + size]))
      progress.advance(len(rows[-1]))
    progress.close()
    found[name] = np.concatenate(rows)
    if parallel.is_writer():
      buffer = io.BytesIO()
      np.save(buffer, found[name])
      workdirs.write(path, buffer.getvalue())
  return network.name, found


def read_features(
  config: config_dict.ConfigDict, folder: epath.Path, sets: dict
) -> tuple[str, dict[str, np.ndarray]]:
  """The same of a file; where it is absent, UserError after writing what it is of."""
  if not epath.Path(config.features).exists():
    if parallel.is_writer():
      images = {name: split.images for name, split in sets.items()}
      workdirs.write_npz(folder / 'images.npz', **images)
    parallel.barrier('images')
    raise UserError(
      f'config.features = {config.features} is absent: compute features '
      f'[{config.num_images}, F] of train, test and generated in '
      f'{folder / "images.npz"} and save them there, under these names and with '
      'network, a name'
    )
  network, *rows = quality.read_features(config.features, SETS)
  if [len(x) for x in rows] != [config.num_images] * len(SETS):
    raise UserError(
      f'{config.features} has features of {[len(x) for x in rows]} images: '
      f'config.num_images = {config.num_images} of each of {", ".join(SETS)} are needed'
    )
  return network, dict(zip(SETS, rows, strict=True))


def judge(
  config: config_dict.ConfigDict,
  sets: dict,
  protocol: dict,
  parts: epath.Path,
  stops: StopRequests,
) -> tuple[dict, dict[str, np.ndarray]]:
  """What the labeller says of test and generated images, and what an attack changes.

  Returns:
    (figures, confidences of test and generated).
  """
  _, model, variables = classifiers.load(config.labeller, 'config.labeller')
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


def compare(
  config: config_dict.ConfigDict, features: dict[str, np.ndarray]
) -> tuple[dict, complementarity.Neighbours]:
  """(figures of the features of SETS, neighbours of the generated images)."""
  logging.info('comparing %d features of each image', features['train'].shape[1])
  fid = lambda name: feature_networks.fid(features['train'], features[name])
  distinguished = complementarity.two_sample_test(
    features['test'], features['generated'], config.seed
  )
  neighbours = complementarity.neighbours(features, 'generated')
  shares = neighbours.shares()
  return {
    'fid': fid('generated'),
    'fid_test': fid('test'),
    'two_sample_accuracy': distinguished.accuracy,
    'two_sample_standard_error': distinguished.standard_error,
    'nearest_train': float(shares[0]),
    'nearest_test': float(shares[1]),
    'nearest_itself': float(shares[2]),
    'coverage_train': complementarity.coverage(features, 'train'),
    'coverage_test': complementarity.coverage(features, 'test'),
  }, neighbours


PROGRAM = cli.Program('analyze', main, config='needed', example='digits_analysis')

if __name__ == '__main__':
  cli.run(PROGRAM)
