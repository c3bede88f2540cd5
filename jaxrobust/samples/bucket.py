"""Sample sets in a bucket, `gs://…`, of which every host keeps a copy on its disk.

Images are read at random, which disks can and buckets cannot. A set in a bucket is
whole once it has its metadata.json, which is written last.
"""

import concurrent.futures
import contextlib
import fcntl
import os
import pathlib
import shutil
import zlib

from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.runs import metrics, workdir
from jaxrobust.samples import shards

_COPIES_AT_A_TIME = 8


def fetch(path: str | os.PathLike) -> pathlib.Path:
  """The local copy of a set in a bucket, made if there is none.

  Copies are in $JAXROBUST_CACHE or ~/.cache/jaxrobust, in folders named by their
  content, so that a set that was made again is copied again.

  Args:
    path: of the set's folder.

  Returns:
    The copy's folder, with files as they were found: `SampleSet.verify` compares them.

  Raises:
    UserError: there is no whole set, or its metadata are damaged.
  """
  remote = epath.Path(path)
  if not shards.is_whole(remote):
    raise UserError(
      f'{path} is no sample set, or is being written: it has no {shards.METADATA}'
    )
  content = shards.metadata_bytes(remote)
  local = _copy_of(remote, content)
  if local.exists():
    return local
  names = _names(remote, content)
  with _alone(local):
    if local.exists():  # Another process has made it.
      return local
    folder = shards.partial(local)
    shutil.rmtree(folder, ignore_errors=True)  # Of a process that was killed.
    folder.mkdir()
    copy = lambda name: (remote / name).copy(folder / name)
    _each('fetch', copy, names)
    (folder / shards.METADATA).write_bytes(content)
    folder.rename(local)
  return local


def draft(path: str | os.PathLike) -> pathlib.Path:
  """Where on this host's disk a set is written before it is stored.

  Args:
    path: of the folder that will be made in the bucket.

  Returns:
    The folder to make; there is none.

  Raises:
    UserError: there is a set in the bucket.
  """
  if shards.is_whole(path):
    raise UserError(
      f'{path} exists; a sample set is never overwritten: remove it '
      'or choose another folder'
    )
  folder = _home() / f'draft-{zlib.crc32(str(path).encode()):08x}'
  shutil.rmtree(folder, ignore_errors=True)  # Of a process that was killed.
  return folder


def store(folder: pathlib.Path, path: str | os.PathLike) -> None:
  """Copies a set that was written in `draft(path)` to there; it becomes the copy here.

  Args:
    folder: of the set.
    path: of the folder to make in the bucket.
  """
  remote = epath.Path(path)
  content = shards.metadata_bytes(folder)
  remote.mkdir(parents=True, exist_ok=True)
  copy = lambda name: epath.Path(folder / name).copy(remote / name, overwrite=True)
  _each('store', copy, _names(folder, content))
  workdir.write(remote / shards.METADATA, content)
  local = _copy_of(remote, content)
  with _alone(local):
    if not local.exists():
      folder.rename(local)


def _copy_of(remote: epath.Path, content: bytes) -> pathlib.Path:
  """The local folder for a set with these metadata."""
  return _home() / f'{remote.parent.name}-{remote.name}-{zlib.crc32(content):08x}'


def _home() -> pathlib.Path:
  home = pathlib.Path(workdir.cache_folder('samples'))
  home.mkdir(parents=True, exist_ok=True)
  return home


def _names(where, content: bytes) -> list[str]:
  """Of the files of a set, by its metadata."""
  return sorted(shards.parse_metadata(content, f'{where}/{shards.METADATA}')['sha256'])


def _each(what: str, copy, names: list[str]):
  """Copies files, some at a time."""
  progress = metrics.Progress(what, len(names), 'files')
  with concurrent.futures.ThreadPoolExecutor(_COPIES_AT_A_TIME) as pool:
    for done in concurrent.futures.as_completed([pool.submit(copy, x) for x in names]):
      done.result()
      progress.advance()
  progress.close()


@contextlib.contextmanager
def _alone(local: pathlib.Path):
  """Keeps other processes of this host away from a copy."""
  with local.with_name(f'.{local.name}.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield
