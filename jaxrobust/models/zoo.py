"""The released checkpoints: what they are, what was published of them, where they go.

Names, accuracies and addresses are the authors' (README files of deepmind-research,
adversarial_robustness, and of its folders iclrw2021doing and iclrw2021data). A name
says data set, norm and architecture; all networks use Swish. Nothing is fetched here:
`jaxrobust download` does that, when asked.
"""

import dataclasses
import difflib
import os
from typing import NamedTuple

from etils import epath

from jaxrobust.config import dataset_info
from jaxrobust.errors import UserError
from jaxrobust.models import card as cards
from jaxrobust.models import hub, safetensors
from jaxrobust.runs import workdir as workdirs

URL = 'https://storage.googleapis.com/dm-adversarial-robustness/'
SUFFIXES = ('.npy', '.pt')  # of each released checkpoint

# Clean accuracy, robust accuracy under AutoAttack, in percent of the test images.
# "with" and "without" mean extra data.
_PUBLISHED = {
  'Gowal et al. 2020, arXiv 2010.03593': {
    'cifar10_linf_wrn70-16_with': (91.10, 65.88),
    'cifar10_linf_wrn28-10_with': (89.48, 62.80),
    'cifar10_linf_wrn70-16_without': (85.29, 57.20),
    'cifar10_linf_wrn34-20_without': (85.64, 56.86),
    'cifar10_l2_wrn70-16_with': (94.74, 80.53),
    'cifar10_l2_wrn70-16_without': (90.90, 74.50),
    'cifar100_linf_wrn70-16_with': (69.15, 36.88),
    'cifar100_linf_wrn70-16_without': (60.86, 30.03),
    'mnist_linf_wrn28-10_without': (99.26, 96.34),
  },
  'Rebuffi et al. 2021, arXiv 2103.01946': {
    'cifar10_linf_wrn106-16_cutmix_ddpm_v2': (88.50, 64.64),
    'cifar10_linf_wrn70-16_cutmix_ddpm_v2': (88.54, 64.25),
    'cifar10_linf_wrn28-10_cutmix_ddpm_v2': (87.33, 60.75),
    'cifar10_linf_resnet18_ddpm': (83.53, 56.66),
    'cifar10_l2_wrn70-16_cutmix_ddpm_v2': (92.41, 80.42),
    'cifar10_l2_wrn28-10_cutmix_ddpm_v2': (91.79, 78.80),
    'cifar10_l2_resnet18_cutmix_ddpm': (90.33, 75.86),
    'cifar100_linf_wrn70-16_cutmix_ddpm': (63.56, 34.64),
    'cifar100_linf_wrn28-10_cutmix_ddpm': (62.41, 32.06),
    'cifar100_linf_resnet18_ddpm': (56.87, 28.50),
    'cifar10_linf_wrn70-16_cutmix_external': (92.23, 66.58),
    'cifar10_linf_wrn70-16_cutmix': (87.25, 60.07),
    'cifar10_linf_wrn28-10_cutmix': (86.09, 57.61),
    'cifar100_linf_wrn70-16_cutmix': (65.76, 32.43),
    'cifar100_linf_wrn28-10_cutmix': (62.97, 29.80),
  },
  'Gowal et al. 2021, arXiv 2110.09468': {
    'cifar10_linf_wrn28-10_ddpm_v2': (85.97, 60.73),
    'cifar10_linf_wrn70-16_ddpm_v2': (86.94, 63.62),
    'cifar10_linf_wrn70-16_cutmix_ddpm_100m': (88.74, 66.11),
    'cifar10_linf_wrn28-10_ddpm_100m': (87.50, 63.44),
    'cifar10_linf_resnet18_ddpm_100m': (87.35, 58.63),
    'cifar10_l2_wrn28-10_ddpm_v2': (90.24, 77.44),
    'cifar10_l2_wrn70-16_ddpm_v2': (90.83, 78.39),
    'cifar100_linf_wrn28-10_ddpm': (59.18, 30.81),
    'cifar100_linf_wrn70-16_ddpm': (60.46, 33.49),
  },
}
_PADDING = {'cifar10': 0, 'cifar100': 0, 'mnist': 2}  # pixels
_EPSILON = {
  ('cifar10', 'linf'): 8 / 255,
  # One of the authors' tables says 8 / 255; the papers and RobustBench say this.
  ('cifar10', 'l2'): 128 / 255,
  ('cifar100', 'linf'): 8 / 255,
  ('mnist', 'linf'): 0.3,
}


class Found(NamedTuple):
  """A checkpoint: its card, and the path of its file, which may not be there yet."""

  card: cards.Card
  path: epath.Path


def _entry(name: str, paper: str, clean: float, robust: float) -> cards.Card:
  """The card of a released checkpoint, from its name."""
  dataset, norm, model = name.split('_')[:3]
  info = dataset_info.INFO[dataset]
  protocol = {
    'suite': 'autoattack',
    'dataset': dataset,
    'split': 'test',
    'num_images': info.test_size,
    'norm': norm,
    'epsilon': _EPSILON[dataset, norm],
  }
  return cards.Card(
    name=name,
    dataset=dataset,
    norm=norm,
    epsilon=_EPSILON[dataset, norm],
    model={
      'name': 'preact-resnet-18'
      if model == 'resnet18'
      else model.replace('wrn', 'wrn-'),
      'activation': 'swish',
      'mean': info.mean,
      'std': info.std,
      'padding': _PADDING[dataset],
    },
    accuracies=(
      {
        'protocol': protocol,
        'clean_accuracy': round(clean / 100, 4),
        'robust_accuracy': round(robust / 100, 4),
        'published': paper,
      },
    ),
    source=f'{URL}{name}',
  )


ENTRIES = {
  name: _entry(name, paper, *accuracies)
  for paper, checkpoints in _PUBLISHED.items()
  for name, accuracies in checkpoints.items()
}


def folder() -> epath.Path:
  """Where released checkpoints are looked for: `$JAXROBUST_MODELS`, or `models`."""
  return epath.Path(os.environ.get('JAXROBUST_MODELS') or 'models').expanduser()


def usual_suffix(name: str) -> str:
  """The released file to take of a checkpoint, '.npy' or '.pt'.

  The Haiku names of the released PreActResNet-18 are not published and two of its
  layers may have one shape, so that one is taken from PyTorch, whose names are.
  """
  return '.pt' if ENTRIES[name].model['name'] == 'preact-resnet-18' else '.npy'


def split_step(path: str | epath.Path) -> tuple[epath.Path, int | None]:
  """The workdir and the step of WORKDIR@STEP; the path and None of any other."""
  workdir, at, step = str(path).rpartition('@')
  if at and step.isdecimal() and not epath.Path(path).exists():
    return epath.Path(workdir), int(step)
  return epath.Path(path), None


def find(name_or_path: str) -> Found | None:
  """What is known of a checkpoint, without reading its parameters.

  Args:
    name_or_path: a key of ENTRIES, a file of parameters, a workdir, WORKDIR@STEP, or
      hf:OWNER/NAME, whose file is fetched.

  Returns:
    For a released checkpoint (by its name, or a file of that name) its entry; else
    the workdir's config, the card beside the file, or the card inside it. None if
    nothing says what the network is: then the user must.

  Raises:
    UserError: if a card or a config is there, and damaged; if the hub has no such file,
      or one without a card.
  """
  if hub.is_hub(name_or_path):
    path = hub.fetch(name_or_path)
    return Found(_card_inside(path, name_or_path), path)
  if name_or_path in ENTRIES:
    usual = usual_suffix(name_or_path)
    files = [
      folder() / f'{name_or_path}{suffix}'
      for suffix in (usual, *SUFFIXES, '.safetensors')
    ]
    path = next((file for file in files if file.exists()), files[0])
    return Found(ENTRIES[name_or_path], path)
  path = epath.Path(name_or_path).expanduser()
  workdir, step = split_step(path)
  if step is not None and workdirs.has_run(workdir):
    # What was judged is another checkpoint of the run.
    card = cards.from_workdir(workdir)
    return Found(dataclasses.replace(card, accuracies=()), path)
  if path.stem in ENTRIES:
    return Found(ENTRIES[path.stem], path)
  workdir = path.parent if path.name == workdirs.CHECKPOINT else path
  if workdirs.has_run(workdir):
    return Found(cards.from_workdir(workdir), workdir / workdirs.CHECKPOINT)
  if card := cards.beside(path):
    return Found(card, path)
  if path.suffix == '.safetensors' and path.exists():
    text = safetensors.metadata(path).get('card')
    return Found(cards.from_json(text, str(path)), path) if text else None
  return None


def _card_inside(path: epath.Path, source: str) -> cards.Card:
  """The card of a .safetensors file; UserError if it has none."""
  if text := safetensors.metadata(path).get('card'):
    return cards.from_json(text, source)
  raise UserError(
    f'{source} has no model card of jaxrobust: only checkpoints that jaxrobust convert '
    'wrote there are read from the hub'
  )


def refuse_absent(name_or_path: str, given: str, otherwise: str = '') -> None:
  """Raises UserError for a path where nothing is.

  Args:
    name_or_path: as of `find`.
    given: how it was given, to begin the message with.
    otherwise: what else may be given there.
  """
  path, _ = split_step(epath.Path(name_or_path).expanduser())
  if path.exists():
    return
  workdir, at, step = str(path).rpartition('@')
  if at and epath.Path(workdir).is_dir():
    raise UserError(f'{given}: {step!r} is no step of {workdir}: give its number')
  beside = path.parent.iterdir() if path.parent.is_dir() else ()
  near = difflib.get_close_matches(path.name, [x.name for x in beside], 3)
  remedy = f'{where_to_get(path)}{otherwise}'
  if near:
    remedy = f'did you mean {" or ".join(str(path.parent / x) for x in near)}?'
  raise UserError(f'{given}: it does not exist; {remedy}')


def where_to_get(path: epath.Path) -> str:
  """The remedy for a checkpoint that is not there."""
  name = path.stem
  if name in ENTRIES:
    wanted = f'{name}{usual_suffix(name)}'
    return (
      f'put {wanted} there from {URL}{wanted}, or let `python -m '
      f'jaxrobust.models.download {name}` do it'
    )
  if close := difflib.get_close_matches(str(path), ENTRIES, 1, 0.8):
    return f'did you mean the released {close[0]}?'
  return (
    'give a file (.npy, .pt, .safetensors), a workdir that finished training, or the '
    'name of a released checkpoint (`jaxrobust download` lists them)'
  )
