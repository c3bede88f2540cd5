"""Damaged copies of a file, the same ones each time."""

from collections.abc import Iterator

import numpy as np

_BYTES = (0, 1, 0x7F, 0x80, 0xFF, *b'0-9[]{}()\'",.\\ \n')


def mutations(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
  """Yields copies of `content`, each with one to three random damages.

  Args:
    content: of a good file.
    count: of copies.
    seed: the same one gives the same copies.
  """
  rng = np.random.default_rng(seed)
  for _ in range(count):
    damaged = bytearray(content)
    for _ in range(rng.integers(1, 4)):
      kind = rng.integers(6)
      start = int(rng.integers(len(damaged) + 1))
      stop = min(len(damaged), start + int(2 ** rng.integers(0, 6)))
      part = damaged[start:stop]
      if kind == 0 and part:  # One bit.
        damaged[start] ^= 1 << int(rng.integers(8))
      elif kind == 1 and part:  # A byte that means something somewhere.
        damaged[start] = int(rng.choice(_BYTES))
      elif kind == 2:  # Cut short.
        del damaged[start:]
      elif kind == 3:  # A part is missing,
        del damaged[start:stop]
      elif kind == 4:  # or there twice,
        damaged[start:start] = part
      else:  # or something else.
        damaged[start:stop] = rng.bytes(len(part))
    yield bytes(damaged)
