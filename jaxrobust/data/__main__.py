"""Makes data sets and sample sets ready: `python -m jaxrobust.data --help`."""

import argparse
import json
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tqdm

from jaxrobust.config import dataset_info
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.runs import cli
from jaxrobust.samples import (
  host_footprint,
  imports,
  npz,
  pictures,
  sample_sets,
  selection,
  stratified,
)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command.

  Args:
    arguments: what follows the command's name; None for `sys.argv`.

  Returns:
    The exit code, as of the programs.
  """
  try:
    args = _parser().parse_args(arguments)
    if args.command == 'prepare':
      datasets.prepare(args.name, data_dir=args.data_dir, archives=args.archives)
      print(f'{args.name} is ready')
    elif args.command == 'import':
      names = [pathlib.Path(source).name for source in args.sources]
      found = imports.import_samples(
        args.sources,
        args.out,
        metadata={
          **{field: getattr(args, field) for field in sample_sets.PROVENANCE},
          'imported_from': names,
        },
        num_classes=args.num_classes,
        shard_size=args.shard_size,
        labels=args.labels,
        progress=_progress,
      )
      print(f'{found.path}: {len(found)} images')
    elif args.command == 'plan':
      print('\n'.join(_plan(args)))
    else:
      _use(args, sample_sets.SampleSet.open(args.set))
  except KeyboardInterrupt:
    print('interrupted: nothing was written; run it again', file=sys.stderr)
    return cli.INTERRUPTED
  except Exception as error:
    if told := error if isinstance(error, UserError) else _disk_error(error):
      print(f'error: {told}', file=sys.stderr)
      return cli.ERROR
    traceback.print_exc()
    return cli.CRASHED
  return cli.DONE


def _disk_error(error: Exception) -> UserError | None:
  """As `workdir.disk_error`."""
  from jaxrobust.runs import workdir  # jax, which few commands need

  return workdir.disk_error(error)


def _plan(args: argparse.Namespace) -> list[str]:
  """What the set, or a set of so many images, asks of each host."""
  settings = {'batch_size': args.batch_size, 'real_fraction': args.real_fraction}
  if number := re.fullmatch('([0-9][0-9_]*)([kM]?)', args.set):
    count = int(number[1].replace('_', '')) * {'': 1, 'k': 10**3, 'M': 10**6}[number[2]]
    shape = dataset_info.INFO[args.dataset].image_shape
    settings['num_classes'] = dataset_info.INFO[args.dataset].num_classes
  else:
    found = sample_sets.SampleSet.open(args.set)
    count, shape = len(found), found.image_shape
    settings['num_classes'] = found.num_classes
    settings['num_shards'] = len(found.metadata['counts']['per_shard'])
    if dtype := found.metadata.get('confidence'):
      settings['confidence_bytes'] = 2 if dtype == 'float16' else 4
  cache = args.cache * 2**30
  needs = host_footprint.plan(
    count, shape, hosts=args.hosts, cache_bytes=cache, **settings
  )
  return host_footprint.lines(needs, args.hosts, args.steps_per_second)


def _progress(batches: Iterable, total: int) -> Iterator:
  """Shows images a second while batches go by."""
  with tqdm.tqdm(total=total, unit=' images', unit_scale=True) as bar:
    for batch in batches:
      yield batch
      bar.update(len(batch[0]))


def _use(args: argparse.Namespace, found: sample_sets.SampleSet) -> None:
  """The commands on a sample set that exists."""
  if args.command == 'export':
    npz.export_npz(found, args.npz)
  elif args.command == 'quality':
    _judge(args, found)
  elif args.command == 'select':
    made = selection.select(
      found,
      args.out,
      count=args.count,
      top_fraction=args.top_fraction,
      balanced=args.balanced,
      seed=args.seed,
      shard_size=args.shard_size,
      progress=_progress,
    )
    print(f'{made.path}: {len(made)} of {len(found)} images')
  elif args.command == 'verify':
    found.verify(tqdm.tqdm, anew=True)
    print(f'{found.path}: {len(found)} images, every file as written')
  else:
    _show(found)
    sheet = args.sheet or found.path / 'contact_sheet.png'
    pictures.save(pictures.contact_sheet(found), sheet)
    print(f'contact sheet: {sheet} (a row for each class)')


def _judge(args: argparse.Namespace, found: sample_sets.SampleSet) -> None:
  """Prints how close the set is to the training images, and draws the closest."""
  from jaxrobust.analysis import quality  # jax, which no other command needs

  real = datasets.load(
    args.dataset,
    'train',
    data_dir=args.data_dir,
    train_images=args.train_images,
    validation_images=args.validation_images,
  ).images
  if real.shape[1:] != found.image_shape:
    raise UserError(
      f'{found.path} holds images {list(found.image_shape)}, {args.dataset} '
      f'{list(real.shape[1:])}: name the data set that the samples are of'
    )
  if args.count < 2:
    raise UserError(f'count = {args.count}: compare at least 2 samples')
  generated = found.gather(stratified.one_of_each_part(len(found), args.count, 0))
  if args.features.endswith('.npz'):
    name, *features = quality.read_features(args.features)
    rows = [len(real), len(generated)]
    if [len(x) for x in features] != rows:
      raise UserError(
        f'{args.features} has features of {[len(x) for x in features]} real and '
        f'generated images; it needs {rows}'
      )
  else:
    name, features_fn = quality.network(args.features, dataset=args.dataset)
    features = [features_fn(real), features_fn(generated)]
  figures = quality.compare(*features)
  print(f'features: {name}, {features[0].shape[1]} of each image')
  print(f'images: {len(real)} of {args.dataset} train, {len(generated)} generated')
  print(f'FID {figures.fid:.4f} (comparable with the same features and numbers only)')
  print(f'density {figures.density:.4f}, coverage {figures.coverage:.4f}')
  nearest = figures.distances[:, 0]
  print(
    f'nearest training image: at {nearest.min():.4f} to {nearest.max():.4f}, median '
    f'{np.median(nearest):.4f}; at 0: {(nearest == 0).sum()}'
  )
  picture = args.picture or found.path / 'neighbours.png'
  pictures.save(quality.neighbours(figures, real, generated), picture)
  print(f'the closest, each beside its nearest training images: {picture}')


def _show(found: sample_sets.SampleSet) -> None:
  """Prints what is known of a set."""
  known = {**found.metadata}
  counts, checked = known.pop('counts'), known.pop('sha256')
  shards = len(counts['per_shard'])
  print(f'{found.path}: {len(found)} images in {shards} shard{"s" * (shards > 1)}')
  state = 'verified' if found.is_verified() else 'not verified (`verify` does it)'
  print(f'checksums: {len(checked)} files, {state}')
  for field, value in known.items():
    print(f'{field}: {value if isinstance(value, str) else json.dumps(value)}')
  largest = max(counts['per_class'])
  for label, count in enumerate(counts['per_class']):
    bar = '#' * round(40 * count / largest)
    print(f'class {label:3d} {count:12,d} {100 * count / len(found):6.2f} % {bar}')


class _Parser(argparse.ArgumentParser):
  """Tells mistakes as the programs do: in one line, with the exit code of an error."""

  def error(self, message):
    raise UserError(f'{message} (`{self.prog} --help` shows how to use it)')


def _parser() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  parser = _Parser(
    prog='python -m jaxrobust.data',
    description='Makes data sets and sample sets ready. Each command has its --help.',
  )
  commands = parser.add_subparsers(dest='command', required=True)
  command = commands.add_parser(
    'prepare',
    help='a data set, downloaded or from its official archives',
    description='Downloads a data set, or takes its official archives from a folder, '
    "and writes it in the form the programs read (tensorflow-datasets').",
  )
  command.add_argument('name', help=', '.join(dataset_info.INFO))
  command.add_argument(
    '--data_dir',
    default='',
    help='where to write it, local or gs:// (default: $TFDS_DATA_DIR or '
    '~/tensorflow_datasets); pass the same folder to the programs',
  )
  command.add_argument(
    '--archives',
    default='',
    help='folder with the official archives under their official names; nothing is '
    'downloaded then',
  )
  command = commands.add_parser(
    'import',
    help='.npz (image, label), pickles or folders of PNG → sample set',
    description='Makes one sample set of any number of files and folders, streamed. '
    'Order does not matter: training shuffles the set as a whole. Only a pickle is '
    'held in memory whole. Nothing is left behind when it is interrupted, and a killed '
    'one leaves a hidden folder that the same command removes; it starts over.',
  )
  command.add_argument(
    'sources',
    nargs='+',
    help='.npz with image and label; .pickle with data and extrapolated_targets, or '
    'image and label (it cannot run anything); folders of PNG',
  )
  command.add_argument('out', help='the folder to make')
  command.add_argument('--num_classes', type=int, help='default: largest label + 1')
  command.add_argument(
    '--labels',
    default='',
    help="for a folder of PNG: file with lines NAME LABEL, or EDM's dataset.json "
    '(default: each subfolder is a class)',
  )
  command.add_argument('--shard_size', type=int, default=sample_sets.SHARD_SIZE)
  for field in sample_sets.PROVENANCE:
    command.add_argument(f'--{field}', help='noted in metadata.json')
  command = commands.add_parser('export', help='sample set → .npz (image, label)')
  command.add_argument('set')
  command.add_argument('npz', help='the file to make')
  command = commands.add_parser(
    'select',
    help='a sample set of the surest, or of any, of another',
    description='Makes a sample set of some of the samples of another: the share of '
    'each class whose labels are surest, or any of each class, drawn at random.',
  )
  command.add_argument('set', help='the pool')
  command.add_argument('out', help='the folder to make')
  command.add_argument(
    '--top_fraction', type=float, help='share of each class to keep, by confidence'
  )
  command.add_argument(
    '--count', type=int, help='or how many to keep, of each class the same share'
  )
  command.add_argument(
    '--seed', type=int, default=0, help='which ones --count keeps (default: 0)'
  )
  command.add_argument(
    '--balanced', action='store_true', help='as many of each class as of the others'
  )
  command.add_argument('--shard_size', type=int, default=sample_sets.SHARD_SIZE)
  command = commands.add_parser(
    'plan',
    help='what a sample set asks of each host of a pod',
    description='Computes what each host of a pod needs for a sample set, or for one '
    'of so many images that is not there yet: shards, disk, memory, reads.',
  )
  command.add_argument(
    'set', help='a sample set, or a number such as 100_000_000 or 100M'
  )
  command.add_argument('--hosts', type=int, required=True)
  command.add_argument(
    '--dataset',
    default='cifar10',
    choices=sorted(dataset_info.INFO),
    help='whose image shape a number means (default: cifar10)',
  )
  command.add_argument(
    '--cache',
    type=float,
    default=64,
    help='GiB of memory of a host left for the page cache (default: 64)',
  )
  command.add_argument('--batch_size', type=int, default=1_024)
  command.add_argument('--real_fraction', type=float, default=0.3)
  command.add_argument('--steps_per_second', type=float, default=1.0)
  command = commands.add_parser(
    'quality',
    help='FID, density, coverage and nearest training images of a sample set',
    description='Compares samples, one drawn from each of COUNT equal parts of the '
    'set, with the training images in the features of one network. Figures by '
    'different networks, or of different numbers of images, are not comparable.',
  )
  command.add_argument('set')
  command.add_argument('--dataset', required=True, choices=sorted(dataset_info.INFO))
  command.add_argument('--data_dir', default='', help='as of `prepare`')
  command.add_argument(
    '--train_images',
    type=int,
    help='how many training images the generator saw, after those held out (default: '
    'all): beside others a repeated one does not show',
  )
  command.add_argument(
    '--validation_images',
    type=int,
    default=0,
    help='training images that were held out, the first ones (default: 0)',
  )
  command.add_argument(
    '--features',
    required=True,
    help='a classifier (workdir, file or released name), whose penultimate layer is '
    'taken; or lpips:FILE (see jaxrobust/models/lpips.py); or .npz with network (a '
    'name), real [n, F] of the training images in their order, generated [m, F] of '
    'the samples at jaxrobust.samples.stratified.one_of_each_part(N, m, 0) of the N in '
    'the set, which are all where m = N',
  )
  command.add_argument(
    '--count', type=int, default=10_000, help='samples to compare (default: 10000)'
  )
  command.add_argument(
    '--picture', default='', help='PNG to write (default: neighbours.png in the set)'
  )
  command = commands.add_parser(
    'info', help='check a sample set, print what it is and draw some of each class'
  )
  command.add_argument('set')
  command.add_argument(
    '--sheet', default='', help='PNG to write (default: contact_sheet.png in the set)'
  )
  command = commands.add_parser(
    'verify',
    help='compare the sha256 of each file of a sample set with its metadata',
    description='Reads each file of a sample set, each time, and compares its sha256 '
    'with the metadata. Training (data.verify_samples) reads only what has changed '
    'since.',
  )
  command.add_argument('set')
  return parser


if __name__ == '__main__':
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # Leaves nothing behind.
  sys.exit(main())
