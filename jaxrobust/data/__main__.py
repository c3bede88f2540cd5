"""Makes data sets and sample sets ready: `jaxrobust data --help`."""

import argparse
import functools
import json
import os
import pathlib
import re
import signal
import traceback
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tqdm

from jaxrobust.config import classifier, dataset_info, experiments
from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.runs import exits, flags
from jaxrobust.samples import (
  host_footprint,
  imports,
  npz,
  pictures,
  sample_sets,
  selection,
  shards,
  stratified,
)

_DELAY = 1.0  # Seconds until a bar is shown: before, it has no speed to show.


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command.

  Args:
    arguments: what follows the command's name; None for `sys.argv`.

  Returns:
    The exit code, as of the programs.
  """
  try:
    args = _parser().parse_args(arguments)
    _COMMANDS[args.command](args)
  except KeyboardInterrupt:
    exits.say('interrupted: nothing was written; run it again')
    return exits.INTERRUPTED
  except BrokenPipeError:
    raise
  except Exception as error:
    if line := error if isinstance(error, UserError) else _disk_error(error):
      exits.say(f'error: {line}')
      return exits.ERROR
    traceback.print_exc()
    return exits.CRASHED
  return exits.DONE


def _disk_error(error: Exception) -> UserError | None:
  """One line on a disk or bucket that cannot be used; see `workdir.disk_error`."""
  from jaxrobust.runs import workdir  # jax, which few commands need

  return workdir.disk_error(error)


def _prepare(args: argparse.Namespace) -> None:
  """A data set, downloaded or from its archives."""
  for file in args.register:
    experiments.load_file(file)
  datasets.prepare(args.name, data_dir=args.data_dir, archives=args.archives)
  print(f'{args.name} is ready')


def _import(args: argparse.Namespace) -> None:
  """A sample set of what others made."""
  found = imports.import_samples(
    args.sources,
    args.out,
    metadata={
      **{field: getattr(args, field) for field in shards.PROVENANCE},
      'imported_from': [pathlib.Path(source).name for source in args.sources],
    },
    num_classes=args.num_classes,
    shard_size=args.shard_size,
    labels=args.labels,
    progress=_progress,
  )
  print(f'{found.path}: {len(found)} images')


def _export(args: argparse.Namespace) -> None:
  """An `.npz` of a sample set."""
  found = sample_sets.SampleSet.open(args.set)
  npz.export_npz(found, args.npz)
  print(f'{args.npz}: {len(found)} images')


def _select(args: argparse.Namespace) -> None:
  """A sample set of some of the samples of another."""
  found = sample_sets.SampleSet.open(args.set)
  made = selection.subset(
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


def _verify(args: argparse.Namespace) -> None:
  """The checksums of a sample set."""
  found = sample_sets.SampleSet.open(args.set)
  found.verify(functools.partial(tqdm.tqdm, unit=' files', delay=_DELAY), anew=True)
  print(f'{found.path}: {len(found)} images, every file as written')


def _estimate_hosts(args: argparse.Namespace) -> None:
  """What the set, or a set of so many images, asks of each host."""
  if number := re.fullmatch('([0-9][0-9_]*)([kM]?)', args.set):
    count = int(number[1].replace('_', '')) * {'': 1, 'k': 10**3, 'M': 10**6}[number[2]]
    info = dataset_info.INFO[args.dataset]
    of_set = {'num_classes': info.num_classes}
    shape = info.image_shape
  else:
    found = sample_sets.SampleSet.open(args.set)
    count, shape = len(found), found.image_shape
    of_set = {
      'num_classes': found.num_classes,
      'num_shards': len(found.metadata['counts']['per_shard']),
      'confidence_bytes': found.confidence_bytes,
    }
  ways = {1: 'data.streams=1: the set is shuffled as a whole'}
  if args.hosts > 1:
    num_streams = args.streams or min(32, count)
    ways |= {num_streams: f'data.streams={num_streams}: each is shuffled by itself'}
  for num_streams, how in ways.items():
    needs = host_footprint.estimate(
      count,
      shape,
      hosts=args.hosts,
      num_streams=num_streams,
      cache_bytes=args.cache * 2**30,
      batch_size=args.batch_size,
      real_fraction=args.real_fraction,
      **of_set,
    )
    print(how)
    for line in host_footprint.lines(needs, args.hosts, args.steps_per_second):
      print(f'  {line}')


def _progress(batches: Iterable, total: int) -> Iterator:
  """Shows images a second while batches go by."""
  with tqdm.tqdm(total=total, unit=' images', unit_scale=True, delay=_DELAY) as bar:
    for batch in batches:
      yield batch
      bar.update(len(batch[0]))


def _compare_with_real(args: argparse.Namespace) -> None:
  """How close a sample set is to the training images; draws the closest."""
  from jaxrobust.analysis import (  # jax, which no other command needs
    image_features,
    quality,
  )

  found = sample_sets.SampleSet.open(args.set)
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
  name, *rows = image_features.of_real_and_generated(
    args.features, real, generated, dataset=args.dataset
  )
  figures = quality.compare(*rows)
  print(f'features: {name}, {rows[0].shape[1]} of each image')
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


def _show(args: argparse.Namespace) -> None:
  """What is known of a sample set, and some of each class."""
  found = sample_sets.SampleSet.open(args.set)
  known = {**found.metadata}
  counts, checked = known.pop('counts'), known.pop('sha256')
  num_shards = len(counts['per_shard'])
  plural = 's' * (num_shards > 1)
  print(f'{found.path}: {len(found)} images in {num_shards} shard{plural}')
  state = 'verified' if found.is_verified() else 'not verified (`verify` does it)'
  print(f'checksums: {len(checked)} files, {state}')
  for field, value in known.items():
    print(f'{field}: {value if isinstance(value, str) else json.dumps(value)}')
  largest = max(counts['per_class'])
  for label, count in enumerate(counts['per_class']):
    bar = '#' * round(40 * count / largest)
    print(f'class {label:3d} {count:12,d} {100 * count / len(found):6.2f} % {bar}')
  sheet = args.sheet or found.path / 'contact_sheet.png'
  pictures.save(pictures.contact_sheet(found), sheet)
  print(f'contact sheet: {sheet} (a row for each class)')


_COMMANDS = {
  'prepare': _prepare,
  'import': _import,
  'export': _export,
  'select': _select,
  'plan': _estimate_hosts,
  'quality': _compare_with_real,
  'info': _show,
  'verify': _verify,
}


def _parser() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  parser = flags.Parser(
    prog='jaxrobust data',
    description='Makes data sets and sample sets ready. Each command has its --help.',
  )
  commands = parser.add_subparsers(dest='command', required=True)
  command = commands.add_parser(
    'prepare',
    help='a data set, downloaded or from its official archives',
    description='Downloads a data set, or takes its official archives from a folder, '
    "and writes it in the form the programs read (tensorflow-datasets').",
  )
  command.add_argument(
    'name',
    help=f'{", ".join(dataset_info.PACKAGED)}; tfds:NAME[/CONFIG], any builder of '
    'tensorflow-datasets; or one that --register makes known',
  )
  command.add_argument(
    '--register',
    type=os.path.expanduser,
    action='append',
    default=[],
    metavar='FILE.py',
    help='a Python file of yours that registers the data set; it is run',
  )
  command.add_argument(
    '--data_dir',
    type=os.path.expanduser,
    default='',
    help='where to write it, local or gs:// (default: $TFDS_DATA_DIR or '
    '~/tensorflow_datasets); pass the same folder to the programs',
  )
  command.add_argument(
    '--archives',
    type=os.path.expanduser,
    default='',
    help='folder with the official archives under their official names; nothing is '
    'downloaded then',
  )
  command = commands.add_parser(
    'import',
    help='.npz, .npy, pickles, folders or .zip of PNG → sample set',
    description='Makes one sample set of any number of files and folders, streamed. '
    'Order does not matter: training shuffles the set as a whole. Only a pickle is '
    'held in memory whole. Nothing is left behind when it is interrupted, and a killed '
    'one leaves a hidden folder that the same command removes; it starts over.',
  )
  command.add_argument(
    'sources',
    type=os.path.expanduser,
    nargs='+',
    help='.npz with image and label (or x and y, arr_0 and arr_1); .npy of images and '
    'then of their labels; .pickle with data and extrapolated_targets, or image and '
    'label (it cannot run anything); folders or .zip of PNG',
  )
  command.add_argument('out', type=os.path.expanduser, help='the folder to make')
  command.add_argument('--num_classes', type=int, help='default: largest label + 1')
  command.add_argument(
    '--labels',
    type=os.path.expanduser,
    default='',
    help="for PNG: file with lines NAME LABEL, or EDM's dataset.json (default: the "
    'dataset.json beside the images; without one each folder is a class)',
  )
  command.add_argument('--shard_size', type=int, default=sample_sets.SHARD_SIZE)
  for field in shards.PROVENANCE:
    command.add_argument(f'--{field}', help='noted in metadata.json')
  command = commands.add_parser('export', help='sample set → .npz (image, label)')
  command.add_argument('set', type=os.path.expanduser)
  command.add_argument('npz', type=os.path.expanduser, help='the file to make')
  command = commands.add_parser(
    'select',
    help='sample set → its most confident samples, or a random subset',
    description='Makes a sample set from some of the samples of another: in each class '
    'those with the most confident labels, or a random subset.',
  )
  command.add_argument('set', type=os.path.expanduser, help='the pool')
  command.add_argument('out', type=os.path.expanduser, help='the folder to make')
  command.add_argument(
    '--top_fraction',
    type=flags.number,
    help='share of each class to keep, by confidence',
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
  recipe = classifier.get_config().data
  command = commands.add_parser(
    'plan',
    help='what a sample set asks of each host of a pod',
    description='Computes what each host of a pod needs for a sample set, or for one '
    'of so many images that is not there yet: shards, disk, memory, reads. Once where '
    'training shuffles it as a whole, and once where it is divided into streams.',
  )
  command.add_argument(
    'set',
    type=os.path.expanduser,
    help='a sample set, or a number such as 100_000_000 or 100M',
  )
  command.add_argument('--hosts', type=int, required=True)
  command.add_argument(
    '--streams',
    type=int,
    help='for several hosts: of the second part of what is printed (default: 32); the '
    'first is of one',
  )
  command.add_argument(
    '--dataset',
    default='cifar10',
    choices=sorted(dataset_info.INFO),
    help='whose image shape a number means (default: cifar10)',
  )
  command.add_argument(
    '--cache',
    type=flags.number,
    default=64,
    help='GiB of memory of a host left for the page cache (default: 64)',
  )
  command.add_argument('--batch_size', type=int, default=recipe.batch_size)
  command.add_argument(
    '--real_fraction', type=flags.number, default=recipe.real_fraction
  )
  command.add_argument('--steps_per_second', type=flags.number, default=1.0)
  command = commands.add_parser(
    'quality',
    help='FID, density, coverage and nearest training images of a sample set',
    description='Compares samples, one drawn from each of COUNT equal parts of the '
    'set, with the training images in the features of one network. Figures by '
    'different networks, or of different numbers of images, are not comparable.',
  )
  command.add_argument('set', type=os.path.expanduser)
  command.add_argument('--dataset', required=True, choices=sorted(dataset_info.INFO))
  command.add_argument(
    '--data_dir', type=os.path.expanduser, default='', help='as of `prepare`'
  )
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
    type=os.path.expanduser,
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
    '--picture',
    type=os.path.expanduser,
    default='',
    help='PNG to write (default: neighbours.png in the set)',
  )
  command = commands.add_parser(
    'info', help='check a sample set, print what it is and draw some of each class'
  )
  command.add_argument('set', type=os.path.expanduser)
  command.add_argument(
    '--sheet',
    type=os.path.expanduser,
    default='',
    help='PNG to write (default: contact_sheet.png in the set)',
  )
  command = commands.add_parser(
    'verify',
    help='compare the sha256 of each file of a sample set with its metadata',
    description='Reads each file of a sample set, each time, and compares its sha256 '
    'with the metadata. Training (data.verify_samples) reads only what has changed '
    'since.',
  )
  command.add_argument('set', type=os.path.expanduser)
  return parser


if __name__ == '__main__':
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # Leaves nothing behind.
  exits.exit_with(main)
