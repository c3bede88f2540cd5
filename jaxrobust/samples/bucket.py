"""Sample sets in a bucket, `gs://…`, of which every host keeps a copy on its disk.

Images are read at random, which disks can and buckets cannot. A set in a bucket is
whole once it has its metadata.json, which is written last. A copy has the files that
were asked for so far, each whole and compared with its sha256 before it gets its name.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import math
import os
import pathlib
import shutil
import threading
import zlib

from etils import epath

from jaxrobust.errors import UserError
from jaxrobust.runs import metrics, workdir
from jaxrobust.samples import shards, streams, verification

_COPIES_AT_A_TIME = 16
_CHUNK = 2**23  # bytes; as many times memory of a host as there are copies at a time
_ATTEMPTS = 3  # of a file, each of which goes on where the last one ended
_MB = 10**6


def fetch(
  path: str | os.PathLike, part: streams.Streams = streams.ALL
) -> tuple[pathlib.Path, concurrent.futures.Future | None]:
  """The local copy of a set in a bucket, of which what is missing is fetched.

  Copies are in $JAXROBUST_CACHE or ~/.cache/jaxrobust, in folders named by their
  content, so that a set that was made again is copied again. What was fetched, of a
  file too, when a process was killed is not fetched again.

  Args:
    path: of the set's folder.
    part: the streams whose images are needed.

  Returns:
    The copy's folder with the files of labels; and what is done once the images are
    there, too, or None if they are. Its result is None, or it raises UserError for
    files that are corrupt in the bucket, or a disk that is too small.

  Raises:
    UserError: there is no whole set, or its metadata or labels are damaged.
  """
  remote = epath.Path(path)
  if not shards.is_whole(remote):
    raise UserError(
      f'{path} is no sample set, or is being written: it has no {shards.METADATA}'
    )
  content = shards.metadata_bytes(remote)
  local = _copy_of(remote, content)
  metadata = shards.parse_metadata(content, f'{remote}/{shards.METADATA}')
  with _alone(local):
    if not (local / shards.METADATA).exists():
      local.mkdir(exist_ok=True)
      workdir.write(epath.Path(local / shards.METADATA), content)
  copy = _Copy(remote, local, metadata)
  copy.fetch(shards.label_names(metadata), 'labels')
  names = shards.image_names(metadata, part.images(metadata['counts']['total']))
  if not copy.missing(names):
    return local, None
  return local, _in_background(lambda: copy.fetch(names, 'images'))


def _in_background(call) -> concurrent.futures.Future:
  """Calls a function in a thread that the end of the process does not wait for."""
  future = concurrent.futures.Future()

  def run():
    try:
      future.set_result(call())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=run, daemon=True).start()
  return future


class _Copy:
  """The copy of a set on this host's disk."""

  def __init__(self, remote: epath.Path, local: pathlib.Path, metadata: dict):
    self._remote, self._local = remote, local
    self._metadata = metadata
    self._failed = threading.Event()

  def missing(self, names: list[str]) -> list[str]:
    """The files that are not here."""
    return [name for name in names if not (self._local / name).exists()]

  def fetch(self, names: list[str], what: str):
    """Fetches those files that are missing, some at a time."""
    if not self.missing(names):
      return
    with _alone(self._local):
      wanted = self.missing(names)  # Another process may have fetched some.
      sizes = {name: self._size(name) for name in wanted}
      left = sum(sizes.values()) - sum(self._begun(name) for name in wanted)
      self._check_room(left)
      progress = _Bytes(f'fetch {what} of {self._remote}', sum(sizes.values()))
      with concurrent.futures.ThreadPoolExecutor(_COPIES_AT_A_TIME) as pool:
        tasks = {pool.submit(self._fetch, x, progress.advance): x for x in wanted}
        try:
          for task in concurrent.futures.as_completed(tasks):
            task.result()
        except BaseException:
          self._failed.set()
          pool.shutdown(wait=False, cancel_futures=True)
          raise
        finally:
          progress.close()
      verification.record(self._local, wanted)

  def _fetch(self, name: str, advance):
    """Fetches a file, from where an attempt before ended."""
    target = self._local / name
    partial = shards.partial(target)
    for attempt in range(_ATTEMPTS):
      begun = self._begun(name)
      try:
        digest = self._stream(self._remote / name, partial, advance)
      except Exception:
        if attempt == _ATTEMPTS - 1:
          raise
        advance(-self._begun(name))  # What is read again.
        continue
      if digest == self._metadata['sha256'][name]:
        partial.replace(target)
        return
      advance(-partial.stat().st_size)
      partial.unlink()
      if not begun:  # It was damaged there, and not here before.
        break
    raise UserError(
      f'{self._remote / name} is corrupt (its sha256 differs from '
      f'{shards.METADATA}): store the set again'
    )

  def _stream(self, source: epath.Path, partial: pathlib.Path, advance) -> str:
    """Appends to a file what it lacks; returns the sha256 of all of it."""
    digest = hashlib.sha256()
    # Longer than the file there, so damaged: buckets read nothing from beyond an end.
    if partial.exists() and partial.stat().st_size > source.stat().length:
      partial.unlink()
    with partial.open('a+b') as file, source.open('rb') as stream:
      file.seek(0)
      while chunk := file.read(_CHUNK):
        digest.update(chunk)
        advance(len(chunk))
      stream.seek(file.tell())
      while chunk := stream.read(_CHUNK):
        if self._failed.is_set():
          raise InterruptedError('another file cannot be fetched')
        digest.update(chunk)
        file.write(chunk)
        advance(len(chunk))
    return digest.hexdigest()

  def _begun(self, name: str) -> int:
    """Bytes of a file that are here of an attempt before."""
    partial = shards.partial(self._local / name)
    return partial.stat().st_size if partial.exists() else 0

  def _size(self, name: str) -> int:
    """Bytes of a file, by the metadata."""
    kind, number = name.split('-')[:2]
    size = (
      math.prod(self._metadata['image_shape']) if kind == 'images' else shards.LABEL
    )
    return shards.HEADER + self._metadata['counts']['per_shard'][int(number)] * size

  def _check_room(self, size: int):
    """Refuses to fill the disk."""
    free = shutil.disk_usage(self._local).free
    if size > free:
      raise UserError(
        f'{self._remote} takes {size / 1e9:.1f} GB more in {self._local.parent}, which '
        f'has {free / 1e9:.1f} GB free: make room, set $JAXROBUST_CACHE to a folder on '
        'a larger disk, or on a pod set config.data.streams (`jaxrobust data plan` '
        'says what a host then holds)'
      )


class _Bytes:
  """The progress of several threads."""

  def __init__(self, what: str, total: int):
    self._progress = metrics.Progress(what, -(-total // _MB), 'MB')
    self._lock, self._done, self._shown = threading.Lock(), 0, 0

  def advance(self, count: int):
    with self._lock:
      self._done += count
      if more := -(-self._done // _MB) - self._shown:
        self._shown += more
        self._progress.advance(more)

  def close(self):
    self._progress.close()


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
  """The names of the files of a set, by its metadata."""
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
