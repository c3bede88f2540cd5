r"""Compiles a run for a TPU that is not here: does it fit, and what will it cost?

Usage:
  python -m jaxrobust.plan --topology=SLICE --config=experiments/FILE.py[:ARG] \
      [--what=train|evaluate|sample] [--suggest] [--sweep] [--utilization=0.4]
      [--config.a.b=VALUE …]
  python -m jaxrobust.plan --topology=SLICE --table=NAME [--tables=FILE]

Examples:
  The paper's WRN-28-10 on 16 chips (32 cores) of TPU v3, as published:
    python -m jaxrobust.plan --topology=v3:4x4 \
        --config=experiments/cifar10_linf.py:wrn-28-10,ddpm
  WRN-70-16 on 8 chips of v5e; if it does not fit, what would:
    python -m jaxrobust.plan --topology=v5e:2x4 --suggest \
        --config=experiments/cifar10_linf.py:wrn-70-16,ddpm
  The first attack of AutoAttack:
    … --what=evaluate --config.evaluation.suite=autoattack
  A generator that is trained, its training and its sampling:
    python -m jaxrobust.plan --topology=v4:2x2x1 --config=experiments/cifar10_ddpm.py
    … --what=sample
  What the paper's table of CIFAR-10 costs, by operations alone:
    python -m jaxrobust.plan --topology=v4:2x2x4 --table=cifar10-linf

No TPU is needed or used: the compiler comes with libtpu (from a clone: pip install -e
'.[plan]'), on x86 Linux. It compiles the very program that `train`, `evaluate` or
`generate` runs, which takes minutes; results are kept, by content of the program, in
$JAXROBUST_CACHE or ~/.cache/jaxrobust.

Memory, bytes and collectives are the compiler's. Operations are counted in the
program's jaxpr: multiplications and additions of convolutions and matrix products, each
as often as it runs, attack included. The compiler's own count has the body of a loop
once only. Time is these operations over the chip's published peak in bfloat16 (Google
Cloud's pages on TPU versions) times the utilization, which is a guess until it is
measured.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import re
import sys
import time

import jax
from absl import logging

from jaxrobust import config as configs
from jaxrobust.config import experiments
from jaxrobust.data import datasets
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.planning import device_programs, hardware, program_cost
from jaxrobust.reporting import planned_runs
from jaxrobust.runs import cli
from jaxrobust.runs import workdir as workdirs

_GIB = 2**30
_PARTS = ('arguments', 'outputs', 'aliased', 'temporaries')  # of a program's memory


def main(
  config, workdir, topology, what, suggest, sweep, utilization, table='', tables=''
):
  """Prints the plan."""
  del workdir
  if config is None and not table:
    raise UserError(
      '--config is missing: give an experiment, such as '
      '--config=experiments/cifar10_linf.py'
    )
  if table and config is not None:
    raise UserError(
      '--config has no use with --table=: its rows have their own configs'
    )
  if not 0 < utilization <= 1:
    raise UserError(f'--utilization={utilization}: use a number above 0, at most 1')
  of_table = _points_of_table(table, tables) if table else []
  generation = topology.partition(':')[0]
  if generation not in hardware.CHIPS:
    raise UserError(
      f'--topology={topology}: use generation:chips, one of '
      f'{", ".join(hardware.SLICES)}'
    )
  chip = hardware.CHIPS[generation]
  devices = hardware.devices(topology)
  chips = len(devices) // chip.devices
  if table:
    print_total(f'table {table}', of_table, devices, chip, utilization)
    return
  if config is not None:
    config = datasets.record(config)
  swept = _points_of_sweep(config) if sweep else []  # It may not be what it should.
  found = device_programs.of(config, what, len(devices))
  results = [compile_for(devices, topology, program) for program in found]
  print(
    f'{device_programs.name(config)}, {what}, on {topology}: {len(devices)} '
    f'devices of {chips} chips, {found[0].images} images each'
  )
  total = 0.0
  for program, result in zip(found, results, strict=True):
    if len(found) > 1:
      print(f'{program.name}:')
    operations = operations_of(program, len(devices))
    total += hours(operations, program, chip, utilization) * chips
    for line in report(result, operations, program, len(devices), chip):
      print(line)
    print(time_line(operations, program, chip, chips, utilization))
  if len(found) > 1:
    print(f'total       {total:,.4g} chip-hours')
  if suggest and any('refused' in result for result in results):
    for line in alternatives(config, what, devices, topology):
      print(line)
  if sweep:
    print_total('sweep      ', swept, devices, chip, utilization)


def print_total(
  what: str, found: list, devices: list, chip: hardware.Chip, share: float
):
  """Prints the chip-hours of each of (name, config, is it judged), and of all."""
  chips, num_devices = len(devices) // chip.devices, len(devices)
  known = {}

  def cost(config, part: str, make) -> float:
    kind = _kind(config, part)
    if kind not in known:
      known[kind] = chips * sum(
        hours(operations_of(program, num_devices), program, chip, share)
        for program in make()
      )
    return known[kind]

  training, judging = 0.0, 0.0
  for name, config, judged in found:
    train = lambda config=config: device_programs.of(config, 'train', num_devices)
    own = cost(config, 'training', train)
    line, training = f'  {name}: {own:,.4g} chip-hours', training + own
    if judged:
      judge = lambda config=config: device_programs.judging(config, num_devices)
      own = cost(config, 'evaluation', judge)
      line, judging = f'{line}, at most {own:,.4g} to judge it', judging + own
    print(line)
  print(
    f'{what} {training:,.4g} chip-hours of training, at most {judging:,.4g} of judging '
    '(if no image fell)'
  )


def operations_of(program: device_programs.Program, num_devices: int) -> float:
  """FLOPs of a call on one of so many devices."""
  jaxpr = parallel.trace(program.fn, program.arguments, num_devices)
  return program_cost.flops(jaxpr, rounds=program.rounds)


def compile_for(devices: list, topology: str, program: device_programs.Program) -> dict:
  """What the compiler says of a program; from the cache if it said so before.

  Returns:
    Sizes in bytes ('arguments', 'outputs', 'aliased', 'temporaries'), 'flops' and
    'bytes' by the compiler's count, 'collectives', 'seconds' of compilation; or only
    'refused' and 'seconds', if the memory of a device does not suffice.
  """
  lowered = parallel.lower_for(devices, program.fn, program.arguments, program.donated)
  versions = [importlib.metadata.version(name) for name in ('jax', 'libtpu')]
  key = hashlib.sha256(
    '\n'.join([topology, *versions, lowered.as_text()]).encode()
  ).hexdigest()
  path = workdirs.cache_folder('plan') / f'{key}.json'
  if path.exists():
    return json.loads(path.read_text())
  logging.info('compiling for %s, which takes minutes', topology)
  started = time.monotonic()
  try:
    result = _measures(lowered.compile())
  except jax.errors.JaxRuntimeError as e:
    result = {'refused': refusal(str(e))}
    if not result['refused']:
      raise
  result['seconds'] = round(time.monotonic() - started, 1)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(result))
    temporary.replace(path)
  except OSError as e:
    logging.warning('the result is not kept in %s: %s', path.parent, e.strerror or e)
  return result


def _measures(compiled) -> dict:
  """Of a compiled program."""
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  return {
    'arguments': memory.argument_size_in_bytes,
    'outputs': memory.output_size_in_bytes,
    'aliased': memory.alias_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'flops': cost.get('flops', 0.0),
    'bytes': cost.get('bytes accessed', 0.0),
    'collectives': program_cost.collectives(compiled.as_text()),
  }


def refusal(message: str) -> str:
  """One line from the compiler's refusal for want of memory; '' if it is of another."""
  if found := re.search(r'Used ([\d.]+\w) of ([\d.]+\w) hbm', message):
    return f'needs {found[1]}iB of {found[2]}iB'
  # Before it has placed everything.
  if found := re.search(
    r'temporaries \(([\d.]+\w)\) exceeds .*?\(([\d.]+\w)\)', message
  ):
    return f'needs {found[1]}iB and more of {found[2]}iB'
  if 'CompileTimeHbmOom' in message or 'RESOURCE_EXHAUSTED' in message:
    return 'needs more memory than there is'
  return ''


def _memory(result: dict) -> float:
  """Bytes of a device that a program takes; infinite for one that was refused."""
  if 'refused' in result:
    return math.inf
  outputs = result['outputs'] - result['aliased']  # The others replace arguments.
  return result['arguments'] + outputs + result['temporaries']


def fits(result: dict, usable: float) -> str:
  """One line on memory."""
  if 'refused' in result:
    return f'does NOT fit: {result["refused"]} on a device (--suggest: what may)'
  gib = {k: result[k] / _GIB for k in _PARTS}
  return (
    f'fits: {_memory(result) / _GIB:.2f} GiB of {usable} GiB usable on a device: '
    f'{gib["arguments"]:.2f} arguments, {gib["temporaries"]:.2f} temporaries, '
    f'{gib["outputs"]:.2f} outputs '
    f'({gib["aliased"]:.2f} in place of arguments)'
  )


def report(
  result: dict,
  operations: float,
  program: device_programs.Program,
  num_devices: int,
  chip: hardware.Chip,
) -> list[str]:
  """Lines on memory, operations and traffic.

  Args:
    result: of `compile_for`.
    operations: of a call on a device.
    program: what was compiled.
    num_devices: of the slice.
    chip: of the slice.
  """
  lines = [
    f'memory      {fits(result, chip.usable)}',
    f'operations  {operations / program.images:.3e} FLOPs an image, attack included; '
    f'{operations * num_devices:.3e} a batch of {program.images * num_devices}',
  ]
  if 'refused' in result:
    return lines
  traffic = ', '.join(
    f'{count} {kind} of {size / 2**20:.2f} MiB'
    for kind, (count, size) in sorted(result['collectives'].items())
  )
  return lines + [
    f'compiler    counts {result["flops"]:.3e} FLOPs and {result["bytes"]:.3e} bytes '
    'on a device, with the body of each loop once',
    f'collectives {traffic or "none"}',
  ]


def hours(
  operations: float,
  program: device_programs.Program,
  chip: hardware.Chip,
  utilization: float,
) -> float:
  """Of the whole run, by operations of a call on a device."""
  rate = chip.peak / chip.devices * utilization
  return operations / rate * program.calls / 3600


def time_line(operations, program, chip, chips, utilization) -> str:
  """The estimate of time, with what it supposes."""
  total = hours(operations, program, chip, utilization)
  return (
    f'time        {total * 3600 / program.calls:.3g} s a call, {program.calls:,} '
    f'calls in {total:.3g} h, {total * chips:,.4g} chip-hours: at '
    f'{utilization:.0%} of the {chip.peak / 1e12:.0f} TFLOP/s (bfloat16) published '
    'of a chip'
  )


def alternatives(config, what: str, devices: list, topology: str):
  """Lines on what else was compiled; of each kind until the first that fits."""
  usable = hardware.CHIPS[topology.partition(':')[0]].usable
  for kind in changes(config, what, len(devices)):
    for overrides in kind:
      other = config.copy_and_resolve_references()
      other.update_from_flattened_dict(overrides)
      found = device_programs.of(other, what, len(devices))
      results = [compile_for(devices, topology, program) for program in found]
      biggest = max(results, key=_memory)
      flags = ' '.join(f'--config.{k}={v}' for k, v in overrides.items())
      yield f'  {flags}: {fits(biggest, usable)}'
      if 'refused' not in biggest:
        break


def changes(config, what: str, num_devices: int) -> list[list[dict]]:
  """Overrides that save memory, by kind and from the mildest."""
  field, size = device_programs.batch(config, what)
  group, now = 1, 1
  if classifier := what == 'train' and 'model' in config:
    group, now = config.model.batch_norm_group, config.training.accumulation
  # Parts need whole groups on a device; without them a group may span several.
  multiple = math.lcm(group, num_devices) if now == 1 else group * num_devices * now
  if what == 'sample':
    multiple = 1  # The field is a device's.
  smaller = [
    {field: size // n} for n in (2, 4, 8, 16) if size % n == 0 == size // n % multiple
  ]
  remat = {'model.remat': True}
  if not classifier:
    return [[remat], smaller] if 'model' in config else [smaller]
  groups = size // num_devices // group
  parts = [
    {'training.accumulation': n} for n in range(now + 1, groups + 1) if groups % n == 0
  ]
  half = {'model.compute_dtype': 'bfloat16'}
  return [[remat], parts, [half, half | remat], smaller]


def _points_of_table(table: str, file: str) -> list:
  """Names and configs of the classifiers of a table, and whether they are judged.

  Labellers are among them, which are not.
  """
  tables, preparations = planned_runs.read_tables(file)
  made = planned_runs.Maker('runs', preparations).of_table(
    planned_runs.find_table(table, tables)
  )
  found = []
  for point in made:
    if 'train' not in point.programs:
      continue
    config = point.config.copy_and_resolve_references()
    config.evaluation.suite = point.suite or config.evaluation.suite
    found.append((point.name, config, 'evaluate' in point.programs))
  return found


def _points_of_sweep(config) -> list:
  """The same of the experiment's sweep()."""
  given = [x for x in sys.orig_argv if x.startswith('--config=')]
  if not given:
    raise UserError('--sweep needs --config= of an experiment that has a sweep()')
  file = given[-1].removeprefix('--config=').split(':')[0]
  found = experiments.sweep_points(config, file)
  return [(name, point, True) for name, _, point in found]


def _kind(config, part: str) -> str:
  """What the cost of a part follows from: points of a sweep often share it."""
  tree = json.loads(configs.to_json(config))
  fields = {
    'training': ('augment', 'loss', 'attack', 'ema', 'training'),
    'evaluation': ('evaluation', 'threat'),
  }[part]
  kept = [tree[field] for field in ('model', *fields)]
  return json.dumps([part, tree['dataset']['name'], tree['data']['batch_size'], *kept])


PROGRAM = cli.Program(
  'plan',
  main,
  (
    cli.Flag(
      'topology',
      'generation:chips, such as v2:2x2, v3:4x4, v4:2x2x4, v5e:2x4, v5p:2x2x2 or '
      'v6e:4x4.',
    ),
    cli.Flag(
      'what',
      "The training step of a classifier, or the programs of a generator's training, "
      'each as often as it runs; an attempt of the first attack of '
      "config.evaluation.suite; or a batch of a generator's samples.",
      device_programs.KINDS,
      'train',
    ),
    cli.Flag(
      'suggest',
      'Compiles alternatives if it does not fit: rematerialisation, accumulation, '
      'bfloat16, a smaller batch.',
      bool,
      False,
    ),
    cli.Flag('sweep', "Adds the total over the experiment's sweep().", bool, False),
    cli.Flag(
      'table',
      'The total over the classifiers of a table of experiments/paper.py, or of '
      '--tables, and over their attacks; compiles nothing.',
    ),
    cli.Flag('tables', 'A file with tables of your own.', cli.PATH),
    cli.Flag(
      'utilization',
      "The share of the chip's peak that the estimate of time supposes.",
      float,
      0.4,
    ),
  ),
  workdir='none',
  alone=True,
)

if __name__ == '__main__':
  cli.run(PROGRAM)
