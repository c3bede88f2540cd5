"""Files that give images their labels, by the images' names."""

import csv
import os
import re

from jaxrobust.errors import UserError
from jaxrobust.files import arrays, json_files
from jaxrobust.samples import import_source

Labels = list[tuple[str, int]]  # names of images and their labels

_MAX_BYTES = 2**31
_NEEDED = 'write a line NAME LABEL for each image'


def read(path: str | os.PathLike) -> Labels:
  """Reads a file of labels.

  Args:
    path: `dataset.json` as of `parse_json`, or text with a line `NAME LABEL` for each
      image, parted by a space, a tab, a comma or a semicolon. Quotes, a mark of byte
      order and a line of headings are allowed.

  Returns:
    Names of images and their labels, in the order of the file.

  Raises:
    UserError: the file is absent or something else, names an image twice, or has labels
      that cannot be meant.
  """
  with arrays.open_file(path) as file:
    is_json = str(path).endswith('.json')
    limit = json_files.MAX_BYTES if is_json else _MAX_BYTES
    content = file.read(limit + 1)
  if is_json:
    return parse_json(content, f'{path}')
  if len(content) > limit:
    raise UserError(f'{path} has more than {limit >> 20} MiB: {_NEEDED}')
  try:
    lines = content.decode('utf-8-sig').splitlines()
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is no text in UTF-8 ({error}): {_NEEDED}') from None
  found = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    name, label = _fields(line)
    if re.fullmatch('[-+]?[0-9]{1,20}', label) and name:
      found.append((name, int(label)))
    elif found or name.lower().endswith('.png'):  # Else it is a line of headings.
      raise UserError(f'{path}, line {number}, is {line[:60]!r}: {_NEEDED}')
  return _checked(found, f'{path}')


def parse_json(content: bytes, name: str) -> Labels:
  """The labels in a `dataset.json` of EDM or StyleGAN.

  Args:
    content: of the file: `{"labels": [["00000/img00000000.png", 6], …]}`.
    name: of the file, for messages.

  Returns:
    Names of images and their labels, in the order of the file.

  Raises:
    UserError: it is something else, or its images have no labels.
  """
  pairs = json_files.parse(content, name).get('labels')
  if pairs is None:
    raise UserError(
      f'{name} says that its images have no labels: label them by a classifier, and '
      'give the labels by --labels=FILE, a line NAME LABEL for each image'
    )
  if not isinstance(pairs, list):
    raise UserError(f'{name} is not as expected: its labels are no list')
  for pair in pairs:
    if not (
      isinstance(pair, list) and list(map(type, pair)) == [str, int]  # bool is no int
    ):
      raise UserError(
        f'{name} is not as expected: {str(pair)[:60]} is no pair of a name and a class '
        'number'
      )
  return _checked([tuple(pair) for pair in pairs], name)


def _fields(line: str) -> tuple[str, str]:
  """Name and label of a line; '' where there is no label."""
  line = line.strip()
  if line.startswith('"'):
    for mark in ',;\t ':
      fields = next(csv.reader([line], delimiter=mark, skipinitialspace=True), [])
      if len(fields) == 2:
        return fields[0], fields[1].strip()
  fields = re.split(r'[\s,;]+(?=[^\s,;]+$)', line, maxsplit=1)
  name, label = [*fields, ''][:2]
  return name, label.strip('"\'')


def _checked(found: Labels, path: str) -> Labels:
  """Refuses labels that cannot be meant, none, and two of one image."""
  if not found:
    raise UserError(f'{path} has no labels: {_NEEDED}')
  labels = [label for _, label in found]
  import_source.check_labels(path, min(labels), max(labels))
  if len(set(name for name, _ in found)) < len(found):
    seen = set()
    twice = next(name for name, _ in found if name in seen or seen.add(name))
    raise UserError(
      f'{path} names {arrays.printable(twice)[:60]} twice: give each image one label'
    )
  return found
