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
  """

  peak: float
  devices: int
  usable: float


# Peaks are those of Google Cloud's pages on TPU versions; that of v2 is a quarter of
# the 180 TFLOP/s of its board. They are of bfloat16; by jax's default precision
# float32 convolutions multiply in bfloat16 on a TPU, too, so the same peak applies.
# Usable memory: what the compiler of libtpu 0.0.52 names as the limit when it refuses
# a program.
CHIPS = {
  'v2': Chip(45e12, 2, 7.48),
  'v3': Chip(123e12, 2, 15.48),
  'v4': Chip(275e12, 1, 30.75),
  'v5e': Chip(197e12, 1, 15.75),
  'v5p': Chip(459e12, 1, 95.73),
  'v5': Chip(459e12, 1, 95.73),
  'v6e': Chip(918e12, 1, 31.24),
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


def devices(topology: str) -> list:
  """Devices of a slice, for `parallel.lower_for`; jax itself runs on the CPU.

  Args:
    topology: generation:chips, such as 'v3:4x4'; a v3 chip has two devices.

  Raises:
    UserError: if libtpu is not installed, or knows no such slice.
  """
  if not re.fullmatch(r'\w+:[1-9]\d*(x[1-9]\d*)+', topology):
    raise UserError(
      f'--topology={topology}: use generation:chips, one of {", ".join(SLICES)}, or a '
      'larger one of these'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      "libtpu is not installed, which has the TPU's compiler: "
      "from a clone, pip install -e '.[plan]'"
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
