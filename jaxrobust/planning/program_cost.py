"""What a program costs: operations from its jaxpr, collectives from its HLO."""

import math
import re
from collections.abc import Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr


def flops(
  jaxpr: Jaxpr | ClosedJaxpr,
  used: list[bool] | None = None,
  rounds: int = 1,
) -> float:
  """Multiplications and additions of convolutions and matrix products on a TPU.

  A loop counts as often as it runs, the longest branch of a condition once. What no
  result needs is left out, and so are products with the zeros of padding and dilation,
  as XLA does.

  Args:
    jaxpr: of `jax.make_jaxpr`.
    used: which of its results are needed; None for all.
    rounds: of a loop that stops by itself, at most.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  used = used or [True] * len(jaxpr.outvars)
  # By identity, since literals have no hash.
  live = {id(v) for v, u in zip(jaxpr.outvars, used, strict=True) if u}
  platforms = {
    id(e.outvars[0]): _branch_of_tpu(e.params['platforms'])
    for e in jaxpr.eqns
    if e.primitive.name == 'platform_index'
  }
  total = 0.0
  for equation in reversed(jaxpr.eqns):
    used = [id(v) in live for v in equation.outvars]
    if any(used) or equation.effects:
      live |= {id(v) for v in equation.invars}
      total += _operations(equation, used, platforms, rounds)
  return total


def _operations(equation, used, platforms, rounds) -> float:
  """The operations of one equation, for its results that are used."""
  name, params = equation.primitive.name, equation.params
  if name == 'conv_general_dilated':
    return _convolution(equation)
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    shape = equation.invars[0].aval.shape
    outputs = math.prod(equation.outvars[0].aval.shape)
    return 2 * outputs * math.prod(shape[i] for i in contracted)
  if name == 'cond':
    # What depends on the platform has a branch for each.
    chosen = platforms.get(id(equation.invars[0]))
    branches = params['branches']
    if chosen is not None:
      branches = branches[chosen : chosen + 1]
    return max(flops(branch, used, rounds) for branch in branches)
  times = {'scan': params.get('length'), 'while': rounds}.get(name, 1)
  # One round's results are the next one's arguments: they all count.
  same = name not in ('scan', 'while')
  return times * sum(
    flops(inner, used if same and len(_outputs(inner)) == len(used) else None, rounds)
    for inner in _inner(params)
  )


def _outputs(jaxpr) -> list:
  return getattr(jaxpr, 'jaxpr', jaxpr).outvars


def _inner(params) -> Iterator:
  """The jaxprs among an equation's parameters."""
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if hasattr(getattr(item, 'jaxpr', item), 'eqns'):
        yield item


def _branch_of_tpu(platforms) -> int:
  """Index of the branch that runs on a TPU: its own, or the default (None)."""
  for index, names in enumerate(platforms):
    if names is None or 'tpu' in names:
      return index
  raise ValueError(f'no branch for a TPU in {platforms}')


def _convolution(equation) -> float:
  """The operations of one convolution."""
  params = equation.params
  numbers = params['dimension_numbers']
  images, kernel = (v.aval.shape for v in equation.invars)
  outputs = equation.outvars[0].aval.shape
  product = 1
  for axis, (left, right, out) in enumerate(
    zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
  ):
    product *= taps(
      images[left],
      kernel[right],
      outputs[out],
      params['window_strides'][axis],
      params['padding'][axis][0],
      params['lhs_dilation'][axis],
      params['rhs_dilation'][axis],
    )
  examples, features = (outputs[i] for i in numbers.out_spec[:2])
  return 2 * product * examples * features * kernel[numbers.rhs_spec[1]]


def taps(
  pixels: int,
  size: int,
  outputs: int,
  stride: int,
  low: int,
  dilation: int,
  kernel_dilation: int,
) -> int:
  """Pairs of an output and a tap along an axis that meet a pixel."""
  positions = (
    output * stride + tap * kernel_dilation - low
    for output in range(outputs)
    for tap in range(size)
  )
  last = (pixels - 1) * dilation
  return sum(0 <= p <= last and p % dilation == 0 for p in positions)


_COLLECTIVE = re.compile(
  r'= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)'
  r'(-start)?\('
)
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]')


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
  """Number and bytes of each kind of collective in a compiled program's text.

  Bytes are those of a device's result. One in a loop counts once.
  """
  found = {}
  for line in hlo.splitlines():
    if match := _COLLECTIVE.search(line):
      shape, kind, asynchronous = match.groups()
      sizes = [size_of(*array) for array in _ARRAY.findall(shape)]
      # Of what runs beside other work the shape has operands and results; only that of
      # all-reduce has results alone.
      both = asynchronous and kind != 'all-reduce'
      count, total = found.get(kind, (0, 0))
      found[kind] = count + 1, total + (max(sizes) if both else sum(sizes))
  return found


def size_of(kind: str, dimensions: str) -> int:
  """Bytes of an array such as f32[8,3]: kind 'f32', dimensions '8,3'."""
  bits = 8 if kind == 'pred' else int(re.search(r'\d+', kind)[0])
  return math.prod(int(n) for n in dimensions.split(',') if n) * max(bits // 8, 1)
