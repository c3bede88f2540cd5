"""Damaged copies of a file, the same ones each time."""

import copy
import json
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


# What stands in the place of these texts is no JSON, or hard to read.
_RAW = {
  '@infinity': 'Infinity',
  '@nan': 'NaN',
  '@huge': '1e999',
  '@digits': '9' * 5_000,
  '@deep': '[' * 100_000,
  '@nested': '[' * 500 + ']' * 500,
  '@half': '"\\ud800"',
}
_VALUES = (
  *(None, True, False, 0, -1, 5, 2**32, 2**70, 10**400, 0.5, -1e300),
  *('', 'text', '\x1b[31m', 'running', [], [[]], {}, {'': {}}, {'a.b': 1}, [None]),
  *_RAW,
)


def json_mutations(value, count: int, seed: int = 0) -> Iterator[bytes]:
  """Yields JSON that differs from `value` in one to three places.

  Args:
    value: of a good file; an object or a list.
    count: of copies.
    seed: the same one gives the same copies.
  """
  rng = np.random.default_rng(seed)
  for _ in range(count):
    tree = {'': json.loads(json.dumps(value))}
    for _ in range(rng.integers(1, 4)):
      home, keys = tree, ['']
      # Goes down by chance, and stops above the place that it changes.
      while True:
        key = keys[rng.integers(len(keys))]
        inner = home[key]
        keys = list(inner) if isinstance(inner, dict) else []
        keys = [*range(len(inner))] if isinstance(inner, list) else keys
        if not keys or rng.random() < 0.15:
          break
        home = inner
      if isinstance(home, dict) and home is not tree and rng.random() < 0.2:
        home[str(rng.choice(['', 'a.b', 'items', key * 2]))] = home.pop(key)
      elif home is not tree and rng.random() < 0.2:
        del home[key]
      else:
        home[key] = copy.deepcopy(_VALUES[rng.integers(len(_VALUES))])
    text = json.dumps(tree[''])
    for name, raw in _RAW.items():
      text = text.replace(json.dumps(name), raw)
    yield text.encode()
