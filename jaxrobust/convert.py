"""Converts a checkpoint: Haiku .npy, PyTorch .pt, safetensors, in every direction.

Or the published weights of a generator, to a run of `generate` that has been fitted.

Usage:
  jaxrobust convert --from=PATH --to=PATH [--robustbench=FILE.json]
      [--config=EXPERIMENT[:ARG]]

Examples:
  A finished run that AutoAttack has judged, for a pull request to RobustBench, whose
  DMWideResNet and DMPreActResNet take the file:
    jaxrobust convert --from=runs/ours --to=ours.pt \\
        --robustbench=model_info.json
  A finished run, to a repository of the Hugging Face hub, and from there:
    jaxrobust convert --from=runs/ours --to=hf:OWNER/NAME
    jaxrobust convert --from=hf:OWNER/NAME --to=theirs.npy
  The authors' weights, as a file that cannot hold code:
    jaxrobust convert --from=models/cifar10_linf_wrn28-10_ddpm_v2.npy \\
        --to=models/cifar10_linf_wrn28-10_ddpm_v2.safetensors
  A state dict of somebody else:
    jaxrobust convert --from=theirs.pt --to=theirs.npy \\
        --config=cifar10_linf:wrn-28-10
  EDM's weights, as NVIDIA published them, and samples of them:
    jaxrobust convert --from=edm-cifar10-32x32-cond-vp.pkl \\
        --to=runs/edm/generator.npz --config=cifar10_edm
    jaxrobust generate --workdir=runs/samples \\
        --config=cifar10_edm --config.fitted=runs/edm \\
        --config.labeller=LABELLER

Writes the file and its model card, PATH with the ending .json: data set, threat model,
network, normalisation, accuracies with their protocol, checksum of the config. Before
the file gets its name it is read back, and the logits of both on random images are
compared; the largest difference is printed. Writing files of PyTorch needs PyTorch
installed (reading them, and the others, does not). --config says what the network is;
it is needed only for a file without a model card that is not of a released name.

hf:OWNER/NAME needs huggingface_hub installed. A repository there gets
model.safetensors, the card as model.json, and README.md. --robustbench writes what the
leaderboard shows: the figures of the run's results.json by AutoAttack on all test
images, and fields that are null where only you know them.

With the config of a generator, --from is a file as the generator's authors published
it, fetched by you: nothing is downloaded, and nothing in the file is run. The checksum
and the licence, under which the samples fall too, are printed. Published weights of
EDM (the `ema` of its .pkl files for CIFAR-10), of VD-VAE (its `model-ema.th` files for
CIFAR-10), of StyleGAN2 (the `G_ema` of the .pkl files of stylegan2-ada-pytorch) and of
BigGAN (a state dict of G, as .pth, by BigGAN-PyTorch) are known.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from ml_collections import config_dict

from jaxrobust.errors import UserError
from jaxrobust.generators import released
from jaxrobust.models import architecture, hub, leaderboard, parameter_files, zoo
from jaxrobust.models import card as cards
from jaxrobust.runs import cli
from jaxrobust.runs import workdir as workdirs

_NUM_IMAGES = 8


def main(
  config: config_dict.ConfigDict | None,
  workdir: str,
  from_: str,
  to: str,
  robustbench: str = '',
) -> None:
  """Converts and prints one line, or two."""
  del workdir
  if not from_ or not to:
    raise UserError('give --from=PATH and --to=PATH (--help shows examples)')
  target = epath.Path(to).expanduser()
  if config is not None and 'generator' in config:
    print(released.convert(config, epath.Path(from_).expanduser(), target))
    return
  if target.suffix not in parameter_files.SUFFIXES and not hub.is_hub(to):
    raise UserError(
      f'--to={to}: the name must end in one of {", ".join(parameter_files.SUFFIXES)}'
    )
  if robustbench:
    _check_leaderboard(robustbench, target)
  found = zoo.find(from_)
  source = found.path if found else epath.Path(from_).expanduser()
  variables = parameter_files.read(source)
  card = _card(config, found, source, variables[0])
  if not hub.is_hub(to):
    _check_target(target, card)
  info = leaderboard.model_info(card) if robustbench else None
  model = card.build()
  parameter_files.check_fits(
    source, variables, jax.eval_shape(model.init, jax.random.key(0))
  )

  def export(path: epath.Path) -> float:
    parameter_files.export(path, *variables, {'card': card.to_json()})
    return _difference(card, model, variables, parameter_files.load(path, model))

  if hub.is_hub(to):
    difference = hub.publish(to, card, export)
  else:
    difference = _write(target, card, export)
    if target.suffix != '.npy':
      _warn(card)
  print(
    f'{to}: {card.architecture}, {card.dataset}; largest difference of the logits '
    f'of {_NUM_IMAGES} random images after reading it back: {difference:g}'
  )
  if info:
    _write_info(robustbench, card, info)


def _write(target: epath.Path, card: cards.Card, export) -> float:
  """Writes a file and its card, or nothing; returns what `export` does."""
  draft = target.with_name(f'.draft-{target.name}')
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    difference = export(draft)
    workdirs.write(cards.path_of(target), _card_beside(target, card).to_json())
    draft.replace(target)
  except OSError as e:
    raise UserError(f'cannot write to {target}: {e.strerror or e}') from e
  finally:
    if draft.exists():
      draft.unlink()
  return difference


def _card_beside(target: epath.Path, card: cards.Card) -> cards.Card:
  """The card of all formats that were written under this name, never of the source.

  What was not converted, and has the same name, may be another checkpoint.
  """
  formats = (target.suffix,)
  if (beside := cards.path_of(target)).exists():
    known = cards.read(beside).formats  # Of an earlier version none: it is of any.
    formats = (*known, *(x for x in formats if x not in known)) if known else ()
  return dataclasses.replace(card, formats=formats)


def _check_leaderboard(path: str, target: epath.Path):
  """Refuses a place for RobustBench's file, or weights that it does not read."""
  if target.suffix != '.pt':
    raise UserError(f'--to={target}: give a .pt file, which RobustBench reads')
  if epath.Path(path).exists() or epath.Path(path) == cards.path_of(target):
    raise UserError(
      f'--robustbench={path}: give a name that no file has, and another than '
      f'{cards.path_of(target)}, the model card'
    )


def _write_info(path: str, card: cards.Card, info: dict):
  """Writes RobustBench's file, and prints what is left to do."""
  try:
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    workdirs.write(epath.Path(path), json.dumps(info, indent=2) + '\n')
  except OSError as e:
    raise UserError(f'cannot write to {path}: {e.strerror or e}') from e
  print(
    f'{path}: clean {info["clean_acc"]}, AutoAttack {info["autoattack_acc"]}; fill in '
    f'{", ".join(leaderboard.UNKNOWN)}, and put it into {leaderboard.place(card)} of '
    'their repository'
  )


def _card(config, found: zoo.Found | None, source, params) -> cards.Card:
  """What is known of the source, else what --config says; they must agree."""
  inferred = architecture.infer(params, str(source))
  if found is None and config is None:
    beside = cards.path_of(source)
    card = f' ({beside} is of another format)' if beside.exists() else f' {beside}'
    raise UserError(
      f'{source} is {inferred} by its parameters, and nothing says what its images '
      f'and its activation are: give --config, or a model card{card}'
    )
  said = None if config is None else cards.from_config(config, source=str(source))
  card = found.card if found else said
  if card.architecture != inferred:
    raise UserError(
      f'{source} is {inferred} by its parameters, but '
      f'{"what is known of it" if found else "--config"} says {card.architecture}: '
      'give the model card or --config that matches its parameters'
    )
  if said and (contradiction := _contradiction(said, card)):
    raise UserError(
      f'--config says {contradiction[0]}, and {_origin(source)} says '
      f'{contradiction[1]}: correct --config, or leave it out'
    )
  return card


def _origin(source: epath.Path) -> str:
  """Where what is known of a file comes from, for messages."""
  if source.is_file() and cards.beside(source):
    return (
      f'the model card {cards.path_of(source)} (remove it if it is of another file)'
    )
  return f'what is known of {source}'


def _check_target(target, card):
  """Overwrites nothing; one card may belong to several formats of a checkpoint."""
  if target.stem in ('config', 'results'):
    raise UserError(
      f'--to={target}: its model card would be {target.stem}.json, a file of workdirs: '
      'give another name'
    )
  if target.exists():
    raise UserError(f'{target} exists: remove it, or give another --to')
  beside = cards.path_of(target)
  if not beside.exists():
    return
  try:
    is_its = cards.read(beside).says_the_same(card)
  except UserError:
    is_its = False
  if not is_its:
    raise UserError(
      f'{beside} exists, and is the card of another checkpoint: give another --to'
    )


def _warn(card: cards.Card):
  """Warns where the PyTorch classes of others would not take the file as it is."""
  if card.model['name'].endswith('-1'):
    logging.warning(
      'This network is of width 1: its file has layer.0.block.0.shortcut.weight, '
      'which the classes of the authors and of RobustBench lack, so they refuse it.'
    )
  size = card.info.image_shape[0] + 2 * card.model['padding']
  if size != 32:
    logging.warning(
      'This network takes images of %d pixels: the classes of the authors and of '
      'RobustBench average over fixed windows, which are the whole map for 32 pixels '
      'only.',
      size,
    )


def _contradiction(ours: cards.Card, known: cards.Card) -> tuple[str, str] | None:
  """What two cards say of data set, threat model or network, where it differs."""
  for field in ('dataset', 'norm', 'epsilon'):
    a, b = getattr(ours, field), getattr(known, field)
    if a != b:
      return f'{field} {a}', f'{field} {b}'
  for field, a in ours.model.items():
    if a != known.model[field]:
      return f'model.{field} {a}', f'model.{field} {known.model[field]}'
  return None


def _difference(card: cards.Card, model, before, after) -> float:
  """The largest absolute difference of logits on random images."""
  shape = (_NUM_IMAGES, *card.info.image_shape)
  images = jnp.asarray(np.random.default_rng(0).random(shape, np.float32))
  logits_fn = jax.jit(lambda v: model.apply(*v, images, batch_stats=False)[0])
  a, b = (np.asarray(logits_fn(v)) for v in (before, after))
  if not np.isfinite(a).all():
    raise UserError('the logits of random images are not finite: the source is damaged')
  difference = float(np.abs(a - b).max())
  # Layouts and names change, numbers do not.
  if difference > 0:
    raise AssertionError(f'the logits changed by {difference:g}')
  return difference


PROGRAM = cli.Program(
  'convert',
  main,
  (
    cli.Flag(
      'from',
      'A .npy, .pt, .pth or .safetensors file, a workdir, or the name of a released '
      'checkpoint (jaxrobust download lists them), or hf:OWNER/NAME. '
      "With the config of a generator: a file as that generator's authors published "
      'it, such as a .pkl.',
      cli.PATH,
    ),
    cli.Flag(
      'to',
      'A file with one of these endings, which must not exist, or hf:OWNER/NAME. With '
      'the config of a generator: DIR/generator.npz.',
      cli.PATH,
    ),
    cli.Flag(
      'robustbench',
      "A .json file, which must not exist, for RobustBench's model_info. It needs a "
      '.pt file as --to, and so PyTorch installed.',
      cli.PATH,
    ),
  ),
  workdir='none',
  alone=True,
)

if __name__ == '__main__':
  cli.run(PROGRAM)
