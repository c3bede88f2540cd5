"""Judges a checkpoint: clean and robust accuracy, every image once.

Usage:
  jaxrobust evaluate --workdir=DIR [--suite=SUITE] [--checkpoint=CHECKPOINT]
      [--register=FILE.py] [--config=EXPERIMENT[:ARG]] [--config.FIELD=VALUE …]

Examples:
  The final checkpoint of a training run by AutoAttack, on all its test images:
    jaxrobust evaluate --workdir=runs/digits --suite=autoattack
  A released checkpoint (jaxrobust download fetches it), with a workdir
  of its own for the result:
    jaxrobust evaluate --workdir=runs/released --suite=aa+mt \\
        --checkpoint=cifar10_linf_wrn28-10_ddpm_v2
  A run under another threat model than it was trained for, in a workdir of its own:
    jaxrobust evaluate --workdir=runs/digits-l2 --suite=autoattack \\
        --checkpoint=runs/digits --config.threat.norm=l2 --config.threat.epsilon=0.5
  A file of somebody else, of which nothing is known:
    jaxrobust evaluate --workdir=runs/theirs --suite=autoattack \\
        --checkpoint=theirs.pt --config=cifar10_linf:wrn-28-10

Suites (--suite is short for --config.evaluation.suite):
  pgd              the attack of config.evaluation.attack, PGD-40 by default
  clean            no attack
  pgd-40           the released code's in-training evaluation
  autoattack       APGD-CE, APGD-T, FAB-T, Square: AutoAttack, version standard
  autoattack-plus  AutoAttack, version plus
  autoattack-rand  AutoAttack, version rand: for randomised networks of your own, by
                   jaxrobust.attacks.robustness; none of the models here is
  aa+mt            APGD-CE and APGD-DLR with 5 restarts, MultiTargeted: the paper's
  or attacks with options, such as apgd-ce:restarts=5,square:num_queries=1000; the
  attacks are apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square, multitargeted, pgd, and
  those that a file of --register registers (jaxrobust.attacks.suites shows how).

--checkpoint (short for --config.evaluation.checkpoint) is a .npy, .pt or .safetensors
file, a workdir, or the name of a released checkpoint; without it, it is the workdir's
own. Without --config the workdir's is used, or what the checkpoint's name or its model
card says: data set, network, normalisation and threat model. The other fields of
config.evaluation say what is judged: split, num_images (the first so many), batch_size,
and whether to save_adversarial images.

Writes to the workdir: results.json (one entry an evaluation: protocol, counts,
accuracies after each attack as fractions, warnings, versions), figures/examples.npz
(the first images, their adversarial versions, labels, predictions and the suite: the
evaluation that left the fewest standing), and for each evaluation a folder
evaluations/ID/ with state.npz, which says which attempt each image fell to. The state
is written after every batch: interrupted, the same command goes on and ends with the
same results.json. An evaluation that is there already is shown, not repeated.
"""

import hashlib
import json

from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust import config as configs
from jaxrobust import models
from jaxrobust.attacks import norms, suites
from jaxrobust.attacks.evaluation import Evaluator, Outcome
from jaxrobust.attacks.record import Record
from jaxrobust.config import classifier, dataset_info, fields
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.models import card as cards
from jaxrobust.models import parameter_files, zoo
from jaxrobust.runs import (
  checkpoints,
  checksums,
  cli,
  process_group,
  stop_requests,
  waiting,
)
from jaxrobust.runs import workdir as workdirs

_NUM_EXAMPLES = 16
_ADVERSARIAL = 'adversarial.npz'


def default_config(workdir: str, suite: str, checkpoint: str) -> config_dict.ConfigDict:
  """The config where none is given: the workdir's, or what the checkpoint says."""
  del suite
  if workdirs.has_run(workdir):
    return workdirs.read_config(workdir).unlock()
  if not checkpoint:
    raise UserError(
      f'{workdir} holds no run to evaluate: give the workdir of one, or '
      '--checkpoint=RUN (a workdir, a file or a released name) to evaluate that with '
      f'its result in --workdir={workdir}'
    )
  found = zoo.find(checkpoint)
  if found is None:
    given = f'--checkpoint={checkpoint}'
    zoo.refuse_absent(checkpoint, given)
    raise UserError(
      f'{given}: nothing says what its network is{cards.of_others(checkpoint)}; give '
      '--config, the name of a released checkpoint, or a file with a model card'
    )
  config, card = classifier.get_config(), found.card
  config.dataset.name = card.dataset
  run = zoo.split_step(found.path)[0]
  run = run.parent if run.name == workdirs.CHECKPOINT else run
  if workdirs.has_run(run):  # What it is called by, and the images of one's own.
    trained = workdirs.read_config(run)
    if card.dataset not in dataset_info.INFO:
      config.dataset.update(trained.dataset)
    known = fields.flatten(config)  # An earlier version may have had others.
    config = fields.replace(
      config,
      {
        path: value
        for path, value in fields.flatten(trained).items()
        if path in known and path.split('.')[0] in ('data', 'loss', 'seed', 'variant')
      },
    ).unlock()
  config.threat.norm, config.threat.epsilon = card.norm, card.epsilon
  config.model.update(card.model)
  return config


def main(
  config: config_dict.ConfigDict,
  workdir: str,
  suite: str = '',
  checkpoint: str = '',
) -> None:
  """Evaluates and prints one line of result."""
  if config is None:
    config = default_config(workdir, suite, checkpoint)
  with config.unlocked():
    config.evaluation.suite = suite or config.evaluation.suite
    config.evaluation.checkpoint = checkpoint or config.evaluation.checkpoint
  config = datasets.record(workdirs.continued(workdir, config))
  configs.check(config)
  settings = config.evaluation
  # Runs from before this field was made have none.
  save_images = settings.get('save_adversarial', False)
  info = dataset_info.of(config.dataset)
  ball = norms.get(config.threat.norm, config.threat.epsilon)
  suite, attacks = suites.from_config(settings, ball)
  name, path = _find(config, workdir)
  file = path / workdirs.CHECKPOINT if path.is_dir() else path
  if process_group.membership() is None and file.exists():
    # Before all that has jax look for devices, as the model does.
    most = settings.num_images or dataset_info.size_of(config.dataset, settings.split)
    parallel.use_cores(min(settings.batch_size, most), file.stat().length)
  model = models.from_config(config.model, info)
  with waiting.waiting('loading the network and the images'):
    variables = parameter_files.load(path, model)
    images, labels = datasets.of(config.dataset, settings.split)
  if settings.num_images is not None:
    if settings.num_images > len(images):
      raise UserError(
        f'config.evaluation.num_images = {settings.num_images}: the '
        f'{settings.split} split has {len(images)} images'
      )
    images, labels = images[: settings.num_images], labels[: settings.num_images]
  protocol = {
    **suites.protocol(settings, ball),
    'dataset': info.name,
    'split': settings.split,
    'num_images': len(images),
    'norm': config.threat.norm,
    'epsilon': config.threat.epsilon,
    'seed': config.seed,
    'checkpoint_sha256': _sha256(path, variables),
  }
  if (step := zoo.split_step(path)[1]) is not None:
    protocol['checkpoint_step'] = step
  judged = {'images': datasets.Split(images, labels).checksum()}
  if dataset_info.is_own(config.dataset):  # Other images may take their place.
    protocol |= judged
  process_group.require_alike(protocol | judged)
  folder = workdirs.claim(workdir, config)
  identity = json.dumps(protocol, sort_keys=True) + str(save_images)
  state = folder / 'evaluations' / hashlib.sha256(identity.encode()).hexdigest()[:12]
  entry = workdirs.find_result(folder, protocol)
  record = Record(len(images), state, protocol)
  wanted = save_images and not (state / _ADVERSARIAL).exists()
  process_group.require_alike(
    {'progress': [entry is None, wanted, record.attempt, record.done]},
    'give all of them one workdir that they share',
  )
  if entry is None or wanted:
    evaluator = Evaluator(
      lambda v, x: model.apply(*v, x, batch_stats=False)[0],
      attacks,
      batch_size=min(settings.batch_size, len(images)),
      seed=config.seed,
      thorough=True,
    )
    with stop_requests.StopRequests('the state is saved') as stops:
      outcome = evaluator(
        parallel.replicate(variables),
        images,
        labels,
        keep=len(images) if save_images else _NUM_EXAMPLES,
        record=record,
        progress=stops.progress,
      )
    if parallel.is_writer():
      if save_images:
        _save_images(state / _ADVERSARIAL, images, labels, outcome, suite)
      examples = folder / workdirs.FIGURES / 'examples.npz'
      if not examples.exists() or _is_strongest(folder, protocol, outcome):
        _save_images(examples, images, labels, outcome, suite)
      entry = entry or workdirs.add_result(folder, protocol, outcome.to_dict())
      logging.info('wrote %s', folder / 'results.json')
    parallel.barrier('evaluated')
  if parallel.is_writer():
    for line in entry['warnings']:
      print(f'warning: {line}')
    robust = (
      f', {suite} {entry["robust_accuracy"]:.2%}' if suite != suites.CLEAN else ''
    )
    print(
      f'{name}: clean {entry["clean_accuracy"]:.2%}{robust} of {len(images)} '
      f'{settings.split} images'
    )


def _find(config, workdir) -> tuple[str, epath.Path]:
  """The checkpoint's name and its file; what is known of it must not contradict."""
  checkpoint = config.evaluation.checkpoint
  run = epath.Path(checkpoint or workdir)
  state = workdirs.how_far(run) if workdirs.has_run(run) else ''
  if state:
    raise UserError(
      f'the run in {run} is {state}: `jaxrobust train --workdir={run}` goes on with '
      f'it, or give --checkpoint={run}@STEP to judge what it saved after that step'
    )
  found = zoo.find(str(checkpoint or workdir))
  if found is None:
    return configs.experiment_name(config), epath.Path(checkpoint or workdir)
  said = {'dataset': dataset_info.of(config.dataset).name}
  known = {'dataset': found.card.dataset}
  for field, value in found.card.model.items():
    said[f'model.{field}'], known[f'model.{field}'] = config.model[field], value
  source, remedy = 'the config', 'correct the config, or leave out --config'
  if checkpoint and workdirs.has_run(workdir):  # Its config is the workdir's.
    source, remedy = f'the run in {workdir}', 'give another --workdir'
  for field, value in known.items():
    if said[field] != value:
      raise UserError(
        f'{source} says {field} {said[field]}, and {checkpoint or workdir} is known to '
        f'have {value}: {remedy}'
      )
  return found.card.name, found.path


def _is_strongest(folder: epath.Path, protocol: dict, outcome: Outcome) -> bool:
  """Whether no evaluation of the same checkpoint and threat left fewer standing."""
  same = {x: protocol[x] for x in ('checkpoint_sha256', 'norm', 'epsilon', 'split')}
  return all(
    outcome.robust_accuracy <= entry.get('robust_accuracy', 1.0)
    for entry in workdirs.read_results(folder)
    if same.items() <= entry['protocol'].items()
  )


def _save_images(path: epath.Path, images, labels, outcome: Outcome, suite: str):
  """Writes images beside their adversarial versions: all that were kept, or a few."""
  count = len(outcome.adversarial)
  if path.name == 'examples.npz':
    count = min(count, _NUM_EXAMPLES)
  path.parent.mkdir(parents=True, exist_ok=True)
  workdirs.write_npz(
    path,
    images=images[:count],
    adversarial=outcome.adversarial[:count],
    labels=labels[:count],
    predictions=outcome.predictions[:count],
    suite=suite,
  )


def _sha256(path: epath.Path, variables) -> str:
  """Checksum of the checkpoint's file, or of what was read of a step of a run."""
  if zoo.split_step(path)[1] is not None:
    return checkpoints.digest(variables)
  file = path / workdirs.CHECKPOINT if path.is_dir() else path
  return checksums.sha256(file)


PROGRAM = cli.Program(
  'evaluate',
  main,
  (
    cli.Flag('suite', 'Short for --config.evaluation.suite.'),
    cli.Flag(
      'checkpoint',
      'Short for --config.evaluation.checkpoint. WORKDIR@STEP is the averages of a run '
      'after so many updates.',
      cli.PATH,
    ),
  ),
  default_config=default_config,
)

if __name__ == '__main__':
  cli.run(PROGRAM)
