"""What a compiled TPU program does, by the schedule that its compiler wrote into it.

The compiler of libtpu notes with each fusion and convolution how many cycles it should
take, by its own model of the chip. Their sum, loops as often as they run, is an
estimate of the time that needs no chip. It leaves out whatever the model leaves out:
collectives, waiting for the memory beside other work, and the host.
"""

import collections
import math
import re
from typing import NamedTuple

from jaxrobust.planning import hardware, program_cost

# What takes no time of its own: the others are counted where they run.
_FREE = frozenset(
  {
    *('parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'iota'),
    *('while', 'conditional', 'call', 'after-all', 'partition-id', 'replica-id'),
    *('copy-done', 'slice-done', 'async-done', 'all-reduce-done', 'all-gather-done'),
  }
)
KINDS = (
  'convolutions',
  'matrix products',
  'sums of gradients',
  'reductions',
  'copies',
  'other',
)


class Work(NamedTuple):
  """Equal work of a program.

  Attributes:
    kind: one of `KINDS`.
    name: what it is, such as '3x3 160→160 at 32x32'.
    calls: how often it is done.
    cycles: of all calls, by the compiler's estimate.
    flops: multiplications and additions of all calls; of convolutions and matrix
      products only.
  """

  kind: str
  name: str
  calls: float
  cycles: float
  flops: float


class Schedule(NamedTuple):
  """What a call of a program does on a device.

  Attributes:
    work: equal work together, the longest first.
    bytes: moved to and from the device's memory, at most.
    collectives: by kind, their number and bytes; see `program_cost.collectives`.
  """

  work: list[Work]
  bytes: float
  collectives: dict[str, tuple[float, float]]

  @property
  def cycles(self) -> float:
    """The cycles of all work."""
    return sum(x.cycles for x in self.work)

  def collective_seconds(self, chip: hardware.Chip, num_devices: int) -> float:
    """How long the collectives take, if nothing runs beside them.

    Each device of a ring sends twice what it holds (all-reduce), or once, less its own
    part; the start of a collective is not counted.
    """
    sent = sum(
      size * (2 if kind == 'all-reduce' else 1)
      for kind, (_, size) in self.collectives.items()
    )
    own = chip.interconnect / chip.devices
    return sent * (num_devices - 1) / num_devices / own

  def seconds(self, chip: hardware.Chip, num_devices: int) -> float:
    """How long a call takes, collectives included."""
    return self.cycles / chip.clock + self.collective_seconds(chip, num_devices)

  def memory_seconds(self, chip: hardware.Chip) -> float:
    """How long the memory takes to move the bytes, which runs beside the work."""
    return self.bytes / (chip.bandwidth / chip.devices)


def from_json(tree: list) -> Schedule:
  """Reads what `json.dumps` made of a schedule."""
  work, moved, found = tree
  return Schedule(
    [Work(*x) for x in work], moved, {k: (n, b) for k, (n, b) in found.items()}
  )


class _Instruction(NamedTuple):
  """A line of a program's text."""

  name: str
  shape: str
  code: str
  arguments: str
  rest: str

  @property
  def operands(self) -> list[str]:
    """Names of the instructions that it takes results of."""
    return re.findall(r'%([\w.-]+)', self.arguments)


def read(hlo: str, rounds: int = 1) -> Schedule:
  """Reads the schedule in a compiled program's text.

  Args:
    hlo: of `compiled.as_text()`; from another compiler than the TPU's it has no cycles.
    rounds: of a loop whose end does not follow from the program, at most.
  """
  computations, entry = _parse(hlo)
  work, moved, collective = {}, 0.0, {}
  for computation, times in _runs(computations, entry, rounds).items():
    shapes = {x.name: x.shape for x in computations[computation]}
    for instruction in computations[computation]:
      for kind, (count, size) in program_cost.collectives(
        f' = {instruction.shape} {instruction.code}('
      ).items():
        before = collective.get(kind, (0, 0))
        collective[kind] = before[0] + times * count, before[1] + times * size
      if instruction.code in _FREE:
        continue
      moved += times * _moved(instruction, shapes)
      cycles = _cycles(instruction)
      if cycles:
        kind, name, flops = _described(instruction, shapes, computations)
        calls, total, operations = work.get((kind, name), (0, 0, 0))
        work[kind, name] = (
          calls + times,
          total + times * cycles,
          operations + times * flops,
        )
  found = [Work(*key, *value) for key, value in work.items()]
  return Schedule(sorted(found, key=lambda x: -x.cycles), moved, collective)


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
  """The computations of a program, and the name of its entry."""
  computations, entry, current = {}, '', None
  for line in hlo.splitlines():
    if line.endswith('{') and ' -> ' in line:
      head = re.match(r'(ENTRY )?%?([\w.-]+) ', line)
      if head:
        current = computations.setdefault(head[2], [])
        entry = head[2] if head[1] else entry
    elif current is not None and (found := _instruction(line)):
      current.append(found)
  return computations, entry


def _instruction(line: str) -> _Instruction | None:
  """One line, taken apart."""
  head = re.match(r'\s+(?:ROOT )?%?([\w.-]+) = ', line)
  if not head:
    return None
  start = head.end()
  end = _closing(line, start) if line[start] == '(' else line.index(' ', start)
  shape = line[start:end]
  call = re.compile(r'\s*([\w-]+)\(').match(line, end)
  if not call:
    return None
  close = _closing(line, call.end() - 1)
  arguments = line[call.end() : close - 1]
  return _Instruction(head[1], shape, call[1], arguments, line[close:])


def _closing(text: str, start: int) -> int:
  """The position behind the bracket that closes the one at `start`."""
  depth = 0
  for match in re.compile(r'[()]').finditer(text, start):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.end()
  return len(text)


def _runs(computations, entry: str, rounds: int) -> dict[str, float]:
  """How often each computation runs that is not a fusion's."""
  runs = collections.Counter()

  def visit(name: str, times: float):
    runs[name] += times
    for x in computations.get(name, ()):
      called = re.findall(
        r'\b(?:body|to_apply|true_computation|false_computation)=%?([\w.-]+)', x.rest
      )
      if x.code == 'while':
        trips = _trips(x, computations, rounds)
        visit(called[0], times * trips)
      elif x.code == 'conditional':
        branches = re.search(r'branch_computations=\{([^}]*)\}', x.rest)
        called = re.findall(r'%([\w.-]+)', branches[1]) if branches else called
        # The longest branch runs.
        visit(max(called, key=lambda c: _total(computations, c)), times)
      elif x.code == 'call':
        visit(called[0], times)

  visit(entry, 1)
  return runs


def _total(computations, name: str) -> int:
  """Cycles of a computation, without loops in it."""
  return sum(_cycles(x) for x in computations.get(name, ()))


def _trips(loop: _Instruction, computations, rounds: int) -> int:
  """How often a loop runs: from 0, until its counter is a constant."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known[1])
  condition = computations[re.search(r'condition=%?([\w.-]+)', loop.rest)[1]]
  numbers = {
    x.name: int(x.arguments)
    for x in condition
    if x.code == 'constant' and re.fullmatch(r'-?\d+', x.arguments)
  }
  bounds = [
    numbers[x.operands[1]]
    for x in condition
    if x.code == 'compare' and 'direction=LT' in x.rest and x.operands[1] in numbers
  ]
  return max(bounds) if bounds else rounds


def _cycles(instruction: _Instruction) -> int:
  """The cycles by the compiler's estimate; 0 where it made none."""
  found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
  return int(found[1]) if found else 0


def _moved(instruction: _Instruction, shapes: dict[str, str]) -> float:
  """Bytes between the device's memory and its cores, as if all of each array was."""
  arrays = [shapes.get(name, '') for name in instruction.operands]
  result = instruction.shape
  if instruction.code.endswith('-start'):  # Its result names its operand again.
    result = _ARRAY.search(result)[0] if _ARRAY.search(result) else ''
  return sum(
    program_cost.size_of(kind, dimensions)
    for kind, dimensions, layout in _ARRAY.findall(' '.join([*arrays, result]))
    if 'S(1)' not in layout  # which lies in the memory of the cores
  )


_ARRAY = re.compile(r'\b(pred|[a-z]+\d+)\w*\[([\d,]*)\](\{[^}]*\})?')


def _described(instruction, shapes, computations) -> tuple[str, str, float]:
  """The kind of an instruction, its name, and its multiplications and additions."""
  inner, known = [instruction], shapes
  if called := re.search(r'\bcalls=%?([\w.-]+)', instruction.rest):
    inner = _inside(called[1], computations)
    known = {x.name: x.shape for x in inner}
  found = [_product(x, known) for x in inner if x.code in ('convolution', 'dot')]
  if found:
    kind = 'convolutions' if any(' at ' in name for name, _ in found) else KINDS[1]
    return kind, ' and '.join(sorted({x for x, _ in found})), sum(x for _, x in found)
  label = re.search(r'op_name="([^"]*)"', instruction.rest)
  name = label[1].rpartition('/')[2] if label else instruction.code
  codes = {x.code for x in inner}
  if name == 'add_any':
    kind = 'sums of gradients'
  elif codes & {'reduce', 'reduce-window', 'sort'}:
    kind = 'reductions'
  elif codes <= {'copy', 'parameter', 'bitcast', 'transpose', 'reverse', 'convert'}:
    kind = 'copies'
  else:
    kind = 'other'
  return kind, name, 0.0


def _inside(name: str, computations) -> list[_Instruction]:
  """The instructions of a fusion, and of fusions in it."""
  found = []
  for x in computations.get(name, ()):
    found.append(x)
    if x.code == 'fusion':
      found += _inside(re.search(r'\bcalls=%?([\w.-]+)', x.rest)[1], computations)
  return found


def _dimensions(shape: str) -> list[int]:
  """The dimensions of an array's type."""
  found = _ARRAY.search(shape)
  return [int(n) for n in found[2].split(',') if n]


def _product(instruction: _Instruction, shapes: dict[str, str]) -> tuple[str, float]:
  """Name and operations of a convolution or a matrix product."""
  left, right = (_dimensions(shapes[name]) for name in instruction.operands[:2])
  out = _dimensions(instruction.shape)
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest)
  if not labels:
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest)
    depth = math.prod(left[int(i)] for i in contracted[1].split(',') if i)
    return f'{math.prod(out)} of {depth}', 2.0 * math.prod(out) * depth
  window = dict(re.findall(r'(\w+)=([\dx_-]+)', _window(instruction.rest)))
  axes = [c for c in labels[3] if c.isdigit()]
  at = lambda text, sizes, axis: sizes[text.index(axis)]
  taps, names = 1.0, []
  for number, axis in enumerate(axes):
    part = lambda key, default, number=number: window.get(key, default).split('x')[
      min(number, len(window.get(key, default).split('x')) - 1)
    ]
    size = int(part('size', '1'))
    taps *= program_cost.taps(
      at(labels[1], left, axis),
      size,
      at(labels[3], out, axis),
      int(part('stride', '1')),
      int(part('pad', '0_0').split('_')[0]),
      int(part('lhs_dilate', '1')),
      int(part('rhs_dilate', '1')),
    )
    names.append((at(labels[1], left, axis), size, at(labels[3], out, axis)))
  inputs, outputs = at(labels[2], right, 'i'), at(labels[3], out, 'f')
  operations = 2 * taps * at(labels[3], out, 'b') * outputs * inputs
  batch = at(labels[3], out, 'b')
  if not names:
    return f'{batch}x{outputs} of {inputs}', operations
  image, kernel, made = (
    'x'.join(str(n) for n in sizes) for sizes in zip(*names, strict=True)
  )
  # The compiler writes gradients as convolutions by images, too: the smallest of the
  # three is what the network calls its kernel.
  smallest = names[0].index(min(names[0]))
  if names[0][1] == names[0][smallest]:
    return f'{kernel} {inputs}→{outputs} at {made}', operations
  if smallest == 2:
    return f'gradient of {made} {batch}→{outputs} at {kernel}', operations
  return f'{image} {inputs}→{batch} at {made}', operations


def _window(rest: str) -> str:
  """The window of a convolution, '' for a product of matrices written as one."""
  found = re.search(r'window=\{([^}]*)\}', rest)
  return found[1] if found else ''
