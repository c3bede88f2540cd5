"""Prepares a dataset for training: `python -m jaxrobust.data.prepare --help`."""

import argparse
import sys

from jaxrobust.data import datasets
from jaxrobust.errors import UserError


def main(arguments: list[str] | None = None) -> int:
  """Runs the command.

  Args:
    arguments: what follows the command's name; None for `sys.argv`.

  Returns:
    The exit code: 0 done, 1 an error told in one line.
  """
  parser = argparse.ArgumentParser(
    prog='python -m jaxrobust.data.prepare',
    description='Downloads a dataset, or takes its official archives from a folder, '
    "and writes it in the form the programs read (tensorflow-datasets').",
  )
  parser.add_argument('name', help=', '.join(datasets.INFO))
  parser.add_argument(
    '--data_dir',
    default='',
    help='where to write it, local or gs:// (default: $TFDS_DATA_DIR or '
    '~/tensorflow_datasets); pass the same folder to the programs',
  )
  parser.add_argument(
    '--archives',
    default='',
    help='folder with the official archives under their official names; nothing '
    'is downloaded then',
  )
  options = parser.parse_args(arguments)
  try:
    datasets.prepare(options.name, data_dir=options.data_dir, archives=options.archives)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(f'{options.name} is ready')
  return 0


if __name__ == '__main__':
  sys.exit(main())
