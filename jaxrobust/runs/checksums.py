"""The checksum by which records name a file."""

import hashlib
import os

from jaxrobust.files import arrays


def sha256(path: str | os.PathLike[str]) -> str:
  """Returns the sha256 of a file in hex, local or `gs://`.

  Raises:
    UserError: it is absent, no regular file, or may not be read.
  """
  with arrays.open_file(path) as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()  # type: ignore[arg-type]
