r"""Compiles a run for a TPU that is not here: does it fit, and what will it cost?

Usage:
  jaxrobust plan --topology=SLICE --config=EXPERIMENT[:ARG] \
      [--what=train|evaluate|sample] [--suggest] [--sweep] [--utilization=SHARE]
      [--config.a.b=VALUE …]
  jaxrobust plan --topology=SLICE --table=NAME [--tables=FILE]

Examples:
  The paper's WRN-28-10 on 16 chips (32 cores) of TPU v3, as published:
    jaxrobust plan --topology=v3:4x4 \
        --config=cifar10_linf:wrn-28-10,ddpm
  WRN-70-16 on 8 chips of v5e; if it does not fit, what would:
    jaxrobust plan --topology=v5e:2x4 --suggest \
        --config=cifar10_linf:wrn-70-16,ddpm
  The attacks of AutoAttack, each with its attempts as if no image fell:
    … --what=evaluate --config.evaluation.suite=autoattack
  A generator that is trained, its training and its sampling:
    jaxrobust plan --topology=v4:2x2x1 --config=cifar10_ddpm
    … --what=sample
  What the paper's table of CIFAR-10 costs, in a minute by its operations alone, at a
  share of the peak that you suppose (without it each kind of run is compiled):
    jaxrobust plan --topology=v4:2x2x4 --table=cifar10-linf --utilization=0.5

No TPU is needed or used: the compiler comes with libtpu (from a clone: pip install -e
'.[plan]'), on x86 Linux. It compiles the very program that `train`, `evaluate` or
`generate` runs, which takes minutes; results are kept, by content of the program, in
$JAXROBUST_CACHE or ~/.cache/jaxrobust.

Memory is the compiler's. Time is the compiler's, too: it notes with each piece of work
how many cycles it should take, and their sum, loops as often as they run, over the
chip's clock is the time of a call; collectives come on top, by their bytes over the
published interconnect. That is an estimate by a model of the chip, not a measurement:
it knows nothing of the host, of the input or of waiting. Operations are counted in the
program's jaxpr: multiplications and additions of convolutions and matrix products, each
as often as it runs, attack included. With --utilization time is these operations over
that share of the chip's published peak in bfloat16 (Google Cloud's pages on TPU
versions), in place of the schedule.
"""

import math
import sys
from collections.abc import Iterator

from ml_collections import config_dict

from jaxrobust.data import datasets
from jaxrobust.errors import UserError
from jaxrobust.planning import compiler, device_programs, hardware
from jaxrobust.planning import schedule as schedules
from jaxrobust.reporting import planned_runs
from jaxrobust.runs import cli, metrics

_MOST_LINES = 12  # of work


def main(
  config: config_dict.ConfigDict | None,
  workdir: str,
  topology: str,
  what: str,
  suggest: bool,
  sweep: bool,
  utilization: float,
  table: str = '',
  tables: str = '',
) -> None:
  """Prints the plan."""
  del workdir
  if config is None and not table:
    raise UserError(
      '--config is missing: give an experiment, such as --config=cifar10_linf'
    )
  if table and config is not None:
    raise UserError(
      '--config has no use with --table=: its rows have their own configs'
    )
  if not 0 <= utilization <= 1:
    raise UserError(
      f'--utilization={utilization}: use a share of the peak, above 0 and at most 1; 0 '
      "takes the compiler's schedule"
    )
  of_table = _points_of_table(table, tables) if table else []
  chip = hardware.chip_of(topology)
  devices = hardware.devices(topology)
  chips = len(devices) // chip.devices
  if table:
    print_total(f'table {table}', of_table, devices, topology, utilization)
    return
  if config is not None:
    config = datasets.record(config)
  swept = _points_of_sweep(config) if sweep else []  # It may not be what it should.
  found = device_programs.of(config, what, len(devices))
  results = [compiler.compile_for(devices, topology, program) for program in found]
  print(
    f'{device_programs.name(config)}, {what}, on {topology}: '
    f'{metrics.counted(len(devices), "device")} of {metrics.counted(chips, "chip")}, '
    f'{metrics.counted(found[0].images, "image")} each'
  )
  total = 0.0
  for program, result in zip(found, results, strict=True):
    if len(found) > 1:
      print(f'{program.name}:')
    operations = compiler.operations(program, len(devices))
    for line in lines_of(result, operations, program, len(devices), chip):
      print(line)
    seconds = seconds_of(result, operations, len(devices), chip, utilization)
    if seconds:
      total += seconds * program.calls / 3600 * chips
      print(time_line(seconds, operations, program, chip, chips, utilization))
  if len(found) > 1:
    print(f'total       {total:,.4g} chip-hours')
  if suggest and any('refused' in result for result in results):
    for line in alternatives(config, what, devices, topology):
      print(line)
  if sweep:
    print_total('sweep      ', swept, devices, topology, utilization)


def print_total(
  what: str, found: list, devices: list, topology: str, utilization: float
) -> None:
  """Prints the chip-hours of each of (name, config, is it judged), and of all."""
  chip = hardware.chip_of(topology)
  chips, num_devices = len(devices) // chip.devices, len(devices)
  known = {}

  def hours(program) -> float:
    result = None if utilization else compiler.compile_for(devices, topology, program)
    operations = compiler.operations(program, num_devices) if utilization else 0.0
    seconds = seconds_of(result, operations, num_devices, chip, utilization)
    if seconds is None:
      raise UserError(
        f'--topology={topology}: {result["refused"]} on a device; use a larger slice, '
        'or --utilization=0.4, which asks the operations only'
      )
    return seconds * program.calls / 3600

  def cost(config, part: str, make) -> float:
    kind = device_programs.cost_key(config, part)
    if kind not in known:
      known[kind] = chips * sum(hours(program) for program in make())
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


def seconds_of(
  result: dict | None,
  operations: float,
  num_devices: int,
  chip: hardware.Chip,
  utilization: float,
) -> float | None:
  """How long a call takes; None for a program that does not fit.

  Args:
    result: of `compiler.compile_for`, if `utilization` is 0.
    operations: of a call on a device.
    num_devices: of the slice.
    chip: of the slice.
    utilization: share of the peak; 0 takes the compiler's schedule.
  """
  if utilization:
    return operations / (chip.peak / chip.devices * utilization)
  if 'refused' in result:
    return None
  return result['schedule'].seconds(chip, num_devices)


def lines_of(
  result: dict,
  operations: float,
  program: device_programs.Program,
  num_devices: int,
  chip: hardware.Chip,
) -> list[str]:
  """Lines on memory, operations, traffic and the compiler's schedule.

  Args:
    result: of `compiler.compile_for`.
    operations: of a call on a device.
    program: what was compiled.
    num_devices: of the slice.
    chip: of the slice.
  """
  lines = [
    f'memory      {compiler.fits(result, chip.usable)}',
    f'operations  {operations / program.images:.3e} FLOPs an image, all passes '
    f'included; {operations * num_devices:.3e} a batch of '
    f'{program.images * num_devices}',
  ]
  if 'refused' in result:
    return lines
  schedule = result['schedule']
  traffic = ', '.join(
    f'{count:,.0f} {kind} of {size / 2**20:.2f} MiB'
    for kind, (count, size) in sorted(schedule.collectives.items())
  )
  lines.append(
    f'collectives {traffic or "none"}'
    + (
      f': {schedule.collective_seconds(chip, num_devices):.2g} s by the published '
      'interconnect'
      if traffic
      else ''
    )
  )
  return lines + _schedule_lines(schedule, operations, chip)


def _schedule_lines(
  schedule: schedules.Schedule, operations: float, chip: hardware.Chip
) -> list[str]:
  """Where the cycles go, and what would bound them."""
  cycles = schedule.cycles
  if not (cycles or operations):
    return [
      'schedule    none: this program multiplies nothing, and takes next to no time'
    ]
  if not cycles:
    return ['schedule    none: this compiler notes no cycles; give --utilization']
  shares = {
    kind: sum(x.cycles for x in schedule.work if x.kind == kind) / cycles
    for kind in schedules.KINDS
  }
  lines = [
    f'schedule    {cycles / 1e6:,.4g}M cycles at {chip.clock / 1e9:.2f} GHz: '
    + ', '.join(f'{kind} {x:.0%}' for kind, x in shares.items() if x >= 0.005),
    f'floors      {operations / (chip.peak / chip.devices):.3g} s by operations at the '
    f'peak; {schedule.memory_seconds(chip):.3g} s by {schedule.bytes / 1e9:.3g} GB to '
    'and from memory',
  ]
  for x in schedule.work[:_MOST_LINES]:
    own = f', {x.flops / x.cycles / chip.per_cycle:.0%} of the peak' if x.flops else ''
    lines.append(
      f'  {x.cycles / cycles:6.1%}  {x.kind}: {x.name}, {x.calls:,.0f} times{own}'
    )
  return lines


def time_line(
  seconds: float,
  operations: float,
  program: device_programs.Program,
  chip: hardware.Chip,
  chips: int,
  utilization: float,
) -> str:
  """The estimate of time, with what it supposes."""
  total = seconds * program.calls / 3600
  share = operations / seconds / (chip.peak / chip.devices)
  peak = f'{chip.peak / 1e12:.0f} TFLOP/s (bfloat16) published of a chip'
  by = f"by the compiler's schedule, an estimate: {share:.0%} of the {peak}"
  return (
    f'time        {seconds:.3g} s a call, {program.calls:,} '
    f'calls in {total:.3g} h, {total * chips:,.4g} chip-hours: '
    + (f'at {utilization:.0%} of the {peak}' if utilization else by)
  )


def alternatives(
  config: config_dict.ConfigDict, what: str, devices: list, topology: str
) -> Iterator[str]:
  """Lines on what else was compiled; of each kind until the first that fits."""
  usable = hardware.chip_of(topology).usable
  for kind in changes(config, what, len(devices)):
    for overrides in kind:
      other = config.copy_and_resolve_references()
      other.update_from_flattened_dict(overrides)
      found = device_programs.of(other, what, len(devices))
      results = [compiler.compile_for(devices, topology, program) for program in found]
      biggest = max(results, key=compiler.memory)
      flags = ' '.join(f'--config.{k}={v}' for k, v in overrides.items())
      yield f'  {flags}: {compiler.fits(biggest, usable)}'
      if 'refused' not in biggest:
        break


def changes(
  config: config_dict.ConfigDict, what: str, num_devices: int
) -> list[list[dict]]:
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
  found = planned_runs.of_sweep(config, given[-1].removeprefix('--config='), 'runs')
  return [(point.name, point.config, True) for point in found]


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
      'each as often as it runs; an attempt of each attack of '
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
      '--tables, and over their attacks; with --utilization it compiles nothing.',
    ),
    cli.Flag('tables', 'A file with tables of your own.', cli.PATH),
    cli.Flag(
      'utilization',
      "The share of the chip's peak that the estimate of time supposes, in place of "
      "the compiler's schedule; 0 takes the schedule.",
      float,
      0.0,
    ),
  ),
  workdir='none',
  alone=True,
)

if __name__ == '__main__':
  cli.run(PROGRAM)
