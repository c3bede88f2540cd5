"""Which files of a sample set were found to be as they were written, and are so still.

`verified.json` in the set's folder holds the size and the time of modification of each.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable

from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.files import json_files
from jaxrobust.runs import checksums
from jaxrobust.samples import shards

_STAMP = 'verified.json'


def pending(path: pathlib.Path, names: Iterable[str]) -> list[str]:
  """The files of a set that were not verified, or have changed since."""
  found, known = _stamp(path, names), _read(path)
  if found[shards.METADATA] != known.get(shards.METADATA):
    return sorted(names)
  return sorted(name for name in names if found[name] != known.get(name))


def record(path: pathlib.Path, names: Iterable[str]) -> None:
  """Remembers that files were verified, where the folder is writable."""
  found, known = _stamp(path, names), _read(path)
  if found[shards.METADATA] != known.get(shards.METADATA):
    known = {}
  with contextlib.suppress(OSError):
    temporary = path / f'.{_STAMP}.{uuid.uuid4().hex}'
    temporary.write_text(json.dumps(known | found))
    temporary.replace(path / _STAMP)


def compare(
  path: pathlib.Path,
  names: Iterable[str],
  expected: dict[str, str],
  progress: Callable[[Iterable], Iterable],
) -> None:
  """Reads files and compares their sha256; UserError names each that is corrupt.

  Args:
    path: of the set.
    names: of its files.
    expected: sha256 in hex of each.
    progress: wraps the list of files, as `tqdm.tqdm` does.
  """
  stamp = _stamp(path, names)
  files = [path / name for name in names]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    digests = pool.map(checksums.sha256, files)
    corrupt = [
      str(file)
      for file, digest in zip(progress(files), digests, strict=True)
      if digest != expected[file.name]
    ]
  if corrupt:
    with contextlib.suppress(OSError):
      (path / _STAMP).unlink()  # What an earlier verification said is no longer so.
    raise UserError(
      f'corrupt (sha256 differs from metadata.json): {", ".join(corrupt)}; '
      'fetch or make these files again'
    )
  if stamp == _stamp(path, names):  # None has changed while it was read.
    record(path, names)


def _stamp(path, names):
  """Size and time of modification of files, and of the metadata."""
  stats = {name: (path / name).stat() for name in [*names, shards.METADATA]}
  return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}


def _read(path):
  """What is remembered; {} where nothing is, or it cannot be read."""
  with contextlib.suppress(OSError, UserError):
    return json_files.read(epath.Path(path / _STAMP))
  return {}
