"""TPU chips, and slices of them that are not here, to compile for."""

import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from jaxrobust.errors import UserError


class Chip(NamedTuple):
  """A TPU chip.

  Attributes:
    peak: multiplications and additions a second of the chip, in bfloat16.
    devices: that jax sees of it.
    usable: GiB that a program may use on a device.
    arrays: units of 128x128 that multiply and add in each cycle of a device.
    bandwidth: bytes a second between a chip and its memory.
    interconnect: bytes a second that a chip sends to others of its slice.
  """

  peak: float
  devices: int
  usable: float
  arrays: int
  bandwidth: float
  interconnect: float

  @property
  def clock(self) -> float:
    """Cycles a second: what the peak takes of the arrays."""
    return self.peak / self.devices / self.per_cycle

  @property
  def per_cycle(self) -> int:
    """Multiplications and additions of a device in a cycle."""
    return self.arrays * 128 * 128 * 2


# Peaks are those of Google Cloud's pages on TPU versions; that of v2 is a quarter of
# the 180 TFLOP/s of its board. They are of bfloat16; by jax's default precision
# float32 convolutions multiply in bfloat16 on a TPU, too, so the same peak applies.
# Bandwidths are of the same pages; of v2 and v3 a chip's interconnect is taken to be
# one of its links. Usable memory is what the compiler of libtpu 0.0.52 names as the
# limit when it refuses a program. Arrays follow from the cycles that it gives a product
# of two matrices of 4,096x4,096 (one of v6e counts as four here: it is 256x256).
CHIPS = {
  'v2': Chip(45e12, 2, 7.48, 1, 700e9, 62e9),
  'v3': Chip(123e12, 2, 15.48, 2, 900e9, 82e9),
  'v4': Chip(275e12, 1, 30.75, 8, 1228e9, 300e9),
  'v5e': Chip(197e12, 1, 15.75, 4, 819e9, 200e9),
  'v5p': Chip(459e12, 1, 95.73, 8, 2765e9, 600e9),
  'v5': Chip(459e12, 1, 95.73, 8, 2765e9, 600e9),
  'v6e': Chip(918e12, 1, 31.24, 16, 1638e9, 400e9),
}

# TPU slices known to compile, as generation:chips; other sizes of them may, too.
SLICES = (
  'v2:2x2',
  'v3:2x2',
  'v3:4x4',
  'v4:2x2x1',
  'v4:2x2x2',
  'v4:2x2x4',
  'v5e:1x1',
  'v5e:2x2',
  'v5e:2x4',
  'v5e:4x4',
  'v5p:2x2x1',
  'v5p:2x2x2',
  'v6e:2x2',
  'v6e:2x4',
  'v6e:4x4',
)


def chip_of(topology: str) -> Chip:
  """The chip of a slice.

  Args:
    topology: generation:chips, such as 'v3:4x4'.

  Raises:
    UserError: if it is not written so, with the slice of an accelerator type.
  """
  generation = topology.partition(':')[0]
  shape = re.fullmatch(r'\w+:[1-9]\d*(x[1-9]\d*)+', topology)
  if generation in CHIPS and shape:
    return CHIPS[generation]
  meant = slice_of(topology)
  raise UserError(
    f'--topology={topology}: use generation:chips, '
    + (f'for this accelerator type {meant}' if meant else f'one of {", ".join(SLICES)}')
    + ', or a larger one of these' * (not meant)
  )


def slice_of(accelerator: str) -> str:
  """The slice that Google Cloud makes of an accelerator type, '' if it has no such one.

  Args:
    accelerator: family-size, such as 'v4-32', whose size is in chips for v5e and v6e
      and in cores, two a chip, for the others.
  """
  match = re.fullmatch(r'(v2|v3|v4|v5e|v5litepod|v5p|v6e)-(\d{1,5})', accelerator)
  if not match:
    return ''
  family, size = match[1].replace('litepod', 'e'), int(match[2])
  in_chips = family in ('v5e', 'v6e')
  chips = size if in_chips else size // 2
  if chips < 1 or chips & (chips - 1) or chips < 4 and not in_chips:
    return ''
  # As near to a square or a cube as powers of two come, the longer sides last.
  log, sides = chips.bit_length() - 1, 3 if family in ('v4', 'v5p') else 2
  lengths = [2 ** ((log + i) // sides) for i in range(sides)]
  if sides == 3 and chips == 4:
    lengths = [2, 2, 1]
  return f'{family}:{"x".join(map(str, lengths))}'


def devices(topology: str) -> list:
  """Devices of a slice, for `parallel.lower_for`; jax itself runs on the CPU.

  Args:
    topology: generation:chips, such as 'v3:4x4'; a v3 chip has two devices.

  Raises:
    UserError: if libtpu is not installed, or knows no such slice.
  """
  chip_of(topology)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      "libtpu is not installed, which has the TPU's compiler: "
      "from a clone, pip install '.[plan]'"
    )
  # Without these libtpu looks for a TPU, and waits for it.
  for name, value in (
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('TPU_ACCELERATOR_TYPE', 'v4-8'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
    ('TPU_LOG_DIR', 'disabled'),
  ):
    os.environ.setdefault(name, value)
  jax.config.update('jax_platforms', 'cpu')
  # The two cores of a v4 chip are one device, as on its virtual machines.
  options = {'chip_config_name': 'megacore'} if topology.startswith('v4:') else {}
  try:
    return list(
      topologies.get_topology_desc(topology, platform='tpu', **options).devices
    )
  except Exception as e:  # Whatever libtpu may raise.
    raise UserError(
      f'--topology={topology}: the compiler knows no such slice; use one of '
      f'{", ".join(SLICES)}, or a larger one of these'
    ) from e
