"""Encoders and decoders, written as strings of blocks.

Child 2021 writes `32x11,32d2,16x6` for eleven blocks at 32x32, one more of which the
map is pooled by two, and six at 16x16; `16m8,16x10` for a decoder's layer at 16x16 that
first adds the map of 8x8, and ten layers more.
"""

import re
from typing import NamedTuple

from jaxrobust.errors import UserError

_BLOCKS = re.compile(r'(\d{1,4})(x|d|m)(\d{1,4})')
_MOST = 1_000  # blocks, of a network


class Stage(NamedTuple):
  """Blocks of equal shape in a row, which are compiled once.

  Attributes:
    size: height and width of their maps.
    count: of the blocks.
    factor: of an encoder, by which the last of its maps is pooled, 1 for not at all.
    source: of a decoder, the size of the map that is added to the first, 0 for none.
  """

  size: int
  count: int
  factor: int = 1
  source: int = 0


def encoder(text: str, image_size: int) -> list[Stage]:
  """The stages of an encoder.

  Args:
    text: such as `32x11,32d2,16x6`.
    image_size: height and width of images, those of the first stage.

  Raises:
    UserError: if it is not written so, or the sizes do not follow from each other.
  """
  field, size, found = 'encoder', image_size, []
  for part, at, kind, number in _parts(field, text, 'xd'):
    if at != size:
      raise UserError(
        f'{_named(field, text)}: {part} comes where maps are {size}x{size}'
      )
    count = number if kind == 'x' else 1
    if found and found[-1].size == at:
      count += found.pop().count
    factor = number if kind == 'd' else 1
    if at % factor:
      raise UserError(f'{_named(field, text)}: {part} does not divide the map')
    found.append(Stage(at, count, factor))
    size = at // factor
  return found


def decoder(text: str, encoder_stages: list[Stage]) -> list[Stage]:
  """The stages of a decoder.

  Args:
    text: such as `1x1,4m1,4x2`.
    encoder_stages: of the encoder, which must give a map for every size.

  Raises:
    UserError: if it is not written so, or does not fit to the encoder.
  """
  field, found = 'decoder', []
  there = {x.size for x in encoder_stages} | {
    encoder_stages[-1].size // encoder_stages[-1].factor
  }
  for part, at, kind, number in _parts(field, text, 'xm'):
    if at not in there:
      raise UserError(
        f'{_named(field, text)}: {part} needs a map that the encoder does not have; it '
        f'has those of {", ".join(map(str, sorted(there)))}'
      )
    if kind == 'm' and (number not in {x.size for x in found} or at % number):
      raise UserError(
        f'{_named(field, text)}: {part} needs a map of {number}x{number} that comes '
        'before it, and fits into its own a whole number of times'
      )
    count = number if kind == 'x' else 1
    source = number if kind == 'm' else 0
    if found and found[-1].size == at and not source:
      count += found[-1].count
      source = found.pop().source
    found.append(Stage(at, count, source=source))
  if found[-1].size != encoder_stages[0].size:
    raise UserError(
      f'{_named(field, text)}: it ends with maps of {found[-1].size}x{found[-1].size}, '
      f'and images are {encoder_stages[0].size}x{encoder_stages[0].size}'
    )
  return found


def count(stages: list[Stage]) -> int:
  """All blocks."""
  return sum(stage.count for stage in stages)


def _named(field, text):
  """The field and its value."""
  return f'config.generator.network.{field} = {text!r}'


def _parts(field, text, kinds):
  """(what is written, size, kind, number) of each part."""
  found = []
  for part in text.split(','):
    match = _BLOCKS.fullmatch(part.strip())
    if not match or match[2] not in kinds or not int(match[1]) or not int(match[3]):
      raise UserError(
        f'{_named(field, text)}: {part.strip()!r} is no part of one; write such as '
        + ('32x11,32d2,16x6' if 'd' in kinds else '1x1,4m1,4x2,8m4')
      )
    found.append((part.strip(), int(match[1]), match[2], int(match[3])))
  if sum(number for _, _, kind, number in found if kind == 'x') > _MOST:
    raise UserError(f'{_named(field, text)}: more than {_MOST} blocks; give fewer')
  return found
