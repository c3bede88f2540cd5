"""Fetches released checkpoints, when asked; `--help` shows how."""

import argparse
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

import tqdm
from absl import logging
from etils import epath

from jaxrobust.config import registries
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.files import arrays
from jaxrobust.models import zoo
from jaxrobust.runs import checksums, flags
from jaxrobust.runs import workdir as workdirs

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 60  # seconds without a byte
_MAX_NOTE = 2**10  # bytes
_ETAG = re.compile(r'(W/)?"[!#-~]*"')  # a version of a file, as servers say it
_AGAIN = 'run the same command again, it goes on from there'


def download(url: str, path: str | epath.Path) -> epath.Path:
  """Downloads a file; what is there already is compared with its checksum instead.

  An interrupted download goes on where it was, if the server still has the same file.
  The file gets its name when it is whole.

  Args:
    url: http or https.
    path: of the file to make, in a local folder, which is made if absent.

  Returns:
    The path.

  Raises:
    UserError: if the server refuses, answers with a page, or breaks off; if the file
      is not the one whose checksum was noted.
  """
  path = epath.Path(path).expanduser()
  if not path.exists():
    part = path.with_name(f'{path.name}.part')
    _fetch(url, part, path.with_name(f'{path.name}.part.etag'))
    part.replace(path)
  compare_checksum(path)
  return path


def compare_checksum(path: epath.Path) -> None:
  """Notes the sha256 of a file beside it, or compares it with the one noted there.

  Args:
    path: of the file; the note is `NAME.sha256`, as of the program sha256sum.

  Raises:
    UserError: if they differ.
  """
  note = path.with_name(f'{path.name}.sha256')
  sha256 = checksums.sha256(path)
  if not note.exists():
    if not parallel.is_writer():
      return
    try:
      workdirs.write(note, f'{sha256}  {path.name}\n')
    except OSError as e:  # Somebody else's folder.
      logging.warning('the sha256 of %s is not noted: %s', path, e.strerror)
  elif (noted := _start_of(note).split()[:1]) != [sha256]:
    raise UserError(
      f'{path} is not the file of its first use: its sha256 is {sha256}, {note} says '
      f'{arrays.printable("".join(noted))[:80]}; fetch it again, or remove the note if '
      'the new file is meant'
    )


def main(arguments: Sequence[str] | None = None) -> int:
  """Lists the released checkpoints, or fetches some.

  Args:
    arguments: what follows the command's name; None for `sys.argv`.

  Returns:
    The exit code: 0 done, 1 an error, given in one line.
  """
  try:
    return _run(_parser().parse_args(arguments))
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1


def _run(args: argparse.Namespace) -> int:
  """Lists, or fetches."""
  if not args.names:
    for name, card in zoo.ENTRIES.items():
      [published] = card.accuracies
      clean, robust = published['clean_accuracy'], published['robust_accuracy']
      figures = f'clean {clean:.2%}, AutoAttack {robust:.2%}'
      print(f'{name:40} {figures}  {published["published"]}')
    return 0
  for name in args.names:
    if name not in zoo.ENTRIES:
      raise UserError(
        f'{name!r} is no released checkpoint: without a name, the command lists them'
        f'{registries.did_you_mean(name, zoo.ENTRIES)}'
      )
    file = name + (args.suffix or zoo.usual_suffix(name))
    folder = epath.Path(args.folder).expanduser() if args.folder else zoo.folder()
    print(download(args.url + file, folder / file))
  return 0


def _fetch(url: str, part: epath.Path, tag: epath.Path):
  """Writes the rest of a file to `part`; `tag` holds the version that it is of."""
  start = os.path.getsize(part) if part.exists() and tag.exists() else 0
  version = _start_of(tag) if start else ''
  start = start if _ETAG.fullmatch(version) else 0
  headers = {'Range': f'bytes={start}-', 'If-Range': version} if start else {}
  try:
    part.parent.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
      if 'html' in (kind := response.headers.get_content_type()) or 'xml' in kind:
        raise UserError(f'{url} answers with a page ({kind}), not with a file')
      if response.status != http.client.PARTIAL_CONTENT:
        start = 0  # Another version by now, or a server that cannot go on.
      length = response.headers.get('Content-Length')
      whole = start + int(length) if (length or '').isdecimal() else None
      with (
        open(part, 'ab' if start else 'wb') as f,
        tqdm.tqdm(
          initial=start,
          total=whole,
          unit='B',
          unit_scale=True,
          desc=part.stem,
          disable=None,
        ) as progress,
      ):
        # After what another version left is gone.
        if version := response.headers.get('ETag'):
          tag.write_text(version)
        else:
          tag.unlink(missing_ok=True)
        while chunk := response.read(_CHUNK):
          f.write(chunk)
          progress.update(len(chunk))
  except UserError:
    raise
  except urllib.error.HTTPError as e:
    if e.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
      part.unlink()
      return _fetch(url, part, tag)
    raise UserError(
      f'{url}: the server says {e.code} {e.reason}; put the file at '
      f'{part.with_name(part.stem)} by other means'
    ) from e
  except (OSError, http.client.HTTPException, ValueError) as e:
    reason = arrays.printable(str(getattr(e, 'reason', None) or repr(e)))[:200]
    raise UserError(f'{url}: {reason}; {_AGAIN}') from e
  size = os.path.getsize(part)
  if whole is not None and size != whole:
    raise UserError(f'{url}: {size} of {whole} bytes came; {_AGAIN}')
  with open(part, 'rb') as f:
    if f.read(1) in (b'<', b''):
      part.unlink()
      raise UserError(f'{url} answers with a page or nothing, not with a file')
  tag.unlink(missing_ok=True)
  return None


def _start_of(note: epath.Path) -> str:
  """The text of a small file, of which a damaged one may have more."""
  with arrays.open_file(note) as f:
    return f.read(_MAX_NOTE).decode('latin1')


def _parser() -> argparse.ArgumentParser:
  """Returns the parser of the command line."""
  parser = flags.Parser(
    prog='jaxrobust download',
    description="Fetches the authors' released checkpoints; without a name, lists them "
    'with their published clean and robust (AutoAttack) accuracies.',
  )
  parser.add_argument('names', nargs='*', metavar='NAME')
  parser.add_argument(
    '--suffix',
    choices=zoo.SUFFIXES,
    help='.npy (Haiku; the default but for ResNet-18) or .pt (PyTorch)',
  )
  parser.add_argument(
    '--folder', default='', help='where to put them ($JAXROBUST_MODELS, or models)'
  )
  parser.add_argument('--url', default=zoo.URL, help='where they are, ending in /')
  return parser


if __name__ == '__main__':
  sys.exit(main())
