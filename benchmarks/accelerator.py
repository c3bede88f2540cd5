"""One table of this machine's accelerator: the step, AutoAttack, diffusion, the input.

  python -m benchmarks.accelerator [--minutes 10] [--cases step-bfloat16 autoattack …]
                                   [--rivals ours torch …]
  python -m benchmarks.accelerator --cpu       rehearses it with tiny networks

Measures on the GPU that jax finds, or on all TPU devices of the host; PyTorch's rivals
need a GPU. Nothing need be prepared: images and weights are made here. What is missing
or does not fit is a row that says so. The cases, in the order of their importance:
  step-…       a step of TRADES with PGD-10 as `train` makes it, WRN-28-10 and 70-16
  autoattack   the standard suite on 64 images that all withstand it, the dearest case:
               a WRN-28-10 that nobody trained, whose own predictions are the labels,
               and a tiny epsilon. Its figure contains compiling; one without it follows
  ddpm, edm    training steps; samples by 20 and 35 evaluations of the network
  input        tf.data alone, on the CPU
The rivals:
  ours             on a batch that is there, waited for after each step
  ours+input       the step with batches from tf.data, 31.25 % of them real images
  torch            PyTorch, the same computation, channels-last; for bfloat16 by its
                   automatic mixed precision
  torch-compiled   the same by torch.compile
  published        the `autoattack` package, as it comes
float32 multiplies in TF32 on both sides where a GPU can.

One process runs at a time, so that no two share the device's memory. They alternate:
when all cases are done once, they are done again in the opposite order of rivals, as
long as there is time. Figures are medians with their range; a ratio is ours over the
rival, of turns of the same number. The share of the peak counts the multiplications and
additions of convolutions and products that the computation needs, against the card's
published dense peak for the type.
"""

import argparse
import contextlib
import importlib.metadata
import math
import os
import re
import sys
import tempfile
import time
from typing import NamedTuple

from benchmarks import rivals

# Published dense TFLOP/s of bfloat16 and TF32, by a word of the card's name; TPUs' are
# in jaxrobust.planning.hardware.
PEAKS = {
  'A10': (125, 62.5),
  'A30': (165, 82),
  'A100': (312, 156),
  'L4': (121, 60),
  'L40S': (362, 183),
  'H100': (989, 495),
  'H100 PCIe': (756, 378),
  'H100 NVL': (835, 418),
  'H200': (989, 495),
  'H200 NVL': (835, 418),
  'GH200': (989, 495),
  'B200': (2250, 1125),
  'RTX 3090': (71, 35.6),
  'RTX 4090': (165, 82.6),
}
TPUS = {'v5 lite': 'v5e', 'v6 lite': 'v6e', 'v5p': 'v5p', 'v5': 'v5p'}
TURNS, TURN_SECONDS = 3, 1.0  # of a process; a turn takes at least so long
TINY_EPSILON = 1e-4


class Case(NamedTuple):
  """What rivals do.

  Attributes:
    kind: of `KINDS`.
    rivals: who can do it.
    model: a network, or the experiment of a generator.
    batch: images of a batch, or those that are judged.
    dtype: of the network.
    seconds: that a process may take.
    samples: images of a batch of samples.
    files: folder of what was made for all.
    device: of PyTorch.
  """

  kind: str
  rivals: tuple[str, ...]
  model: str
  batch: int
  dtype: str = 'float32'
  seconds: int = 150
  samples: int = 0
  files: str = ''
  device: str = 'cuda'


_STEP = 'ours', 'torch', 'torch-compiled'
CASES = {
  'step-bfloat16': Case('step', (*_STEP, 'ours+input'), 'wrn-28-10', 512, 'bfloat16'),
  'step-float32': Case('step', _STEP[:2], 'wrn-28-10', 512),
  'autoattack': Case('autoattack', ('ours', 'published'), 'wrn-28-10', 64),
  'input': Case('input', ('ours',), '', 1024, 'uint8', 60),
  'edm': Case('diffusion', _STEP, 'cifar10_edm', 128, seconds=240, samples=128),
  'ddpm': Case('diffusion', _STEP, 'cifar10_ddpm', 128, seconds=240, samples=256),
  'step-1024-bfloat16': Case('step', _STEP, 'wrn-28-10', 1024, 'bfloat16'),
  'step-1024-float32': Case('step', _STEP[:2], 'wrn-28-10', 1024),
  'step-70-16-bfloat16': Case('step', _STEP[:2], 'wrn-70-16', 512, 'bfloat16', 200),
  'step-70-16-float32': Case('step', _STEP[:2], 'wrn-70-16', 512, 'float32', 200),
}


def rehearsal(case: Case) -> Case:
  """The same on the CPU with a tiny network, without compiling PyTorch's."""
  names = tuple(name for name in case.rivals if name != 'torch-compiled')
  model = 'wrn-10-1'
  if case.kind == 'diffusion':
    model = case.model.replace('cifar10', 'digits')
  size = 64 if case.kind in ('step', 'input') else 16  # It holds whole shares.
  return case._replace(
    rivals=names, model=model, batch=size, samples=16, device='cpu', seconds=600
  )


def chosen(names: list[str], among: list[str], rehearsed: bool) -> dict[str, Case]:
  """The cases that have a wanted rival, each with only those."""
  found = {}
  for name in names:
    case = rehearsal(CASES[name]) if rehearsed else CASES[name]
    if wanted := tuple(rival for rival in case.rivals if rival in among):
      found[name] = case._replace(rivals=wanted)
  return found


class Facts(NamedTuple):
  """What a process says of a task beside its times.

  Attributes:
    images: of a call.
    operations: of an image, 0 where they are not counted.
    note: for the row.
    compiling: a list of the seconds of compiling, where they are counted.
  """

  images: int
  operations: float = 0.0
  note: str = ''
  compiling: tuple[float, ...] = ()


def make(rival: str, case: Case) -> tuple[dict[str, rivals.Task], dict[str, Facts]]:
  """What a rival does of a case, in a process of its own."""
  if rival.startswith('torch') or rival == 'published':
    import torch

    if case.device == 'cuda' and not torch.cuda.is_available():
      raise RuntimeError('PyTorch sees no GPU')
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
  return KINDS[case.kind](rival, case)


def _probe(rival: str, case: None):
  """The accelerator that jax sees; does nothing."""
  import jax

  devices = jax.local_devices()
  return {}, (devices[0].platform, devices[0].device_kind, len(devices))


def _step(rival: str, case: Case):
  """A training step."""
  from benchmarks import train_step

  if rival.startswith('torch'):
    fn = train_step.torch_step(
      case.model,
      case.batch,
      channels_last=True,
      device=case.device,
      dtype=case.dtype,
      compiled=rival == 'torch-compiled',
    )
    return {'train': rivals.Task(fn)}, {'train': Facts(case.batch)}
  config = train_step.make_config(case.model, case.batch, case.dtype)
  batches = _batches(case) if rival == 'ours+input' else None
  fn = train_step.jax_step(config, batches=batches)
  facts = Facts(case.batch, _operations(config, 'train'))
  return {'train': rivals.Task(fn)}, {'train': facts}


def _batches(case: Case):
  """Training batches of tf.data, from 50,000 real and as many generated images."""
  import numpy as np
  from etils import epath

  from benchmarks import input_pipeline
  from jaxrobust.data.datasets import Split

  rng, count = np.random.default_rng(0), 50_000
  images = rng.integers(0, 256, (count, *input_pipeline.SHAPE), np.uint8)
  real = Split(images, rng.integers(0, 10, count).astype(np.int32))
  generated = input_pipeline.dense_set(epath.Path(case.files) / 'set', count)
  return input_pipeline.ours(real, generated, range(10**6), case.batch)


def _input(rival: str, case: Case):
  """The input alone."""
  batches = _batches(case)
  return {'read': rivals.Task(lambda: next(batches))}, {'read': Facts(case.batch)}


def _diffusion(rival: str, case: Case):
  """Training and sampling of a diffusion model."""
  from benchmarks import diffusion

  config = diffusion.make_config(case.model, None)
  config.generator.training.batch_size = case.batch
  config.samples.batch_size = case.samples
  sizes, kinds = (case.batch, case.samples), {'training': 'train', 'sampling': 'sample'}
  if rival.startswith('torch'):
    compiled = rival == 'torch-compiled'
    tasks, _ = diffusion.torch_tasks(config, *sizes, True, case.device, compiled)
    count = dict.fromkeys(tasks, 0.0)
  else:
    tasks, _ = diffusion.jax_tasks(config, *sizes)
    count = {task: _operations(config, kinds[task]) for task in tasks}
  facts = {k: Facts(n, count[k]) for k, n in zip(tasks, sizes, strict=True)}
  return {k: rivals.Task(fn) for k, fn in tasks.items()}, facts


def _autoattack(rival: str, case: Case):
  """The standard suite, once."""
  import numpy as np

  from benchmarks import autoattack

  if rival == 'ours':
    import jax

    jax.config.update('jax_enable_compilation_cache', False)  # Rounds are alike.
  path = f'{case.files}/{case.model}'
  if rival == 'weights':
    return {}, _write_weights(path, case)
  with np.load(f'{path}.npz') as arrays:
    images, labels = arrays['image'], arrays['label']
  facts = {'attack': Facts(len(images))}

  def judge():
    more = {'device': case.device} if rival == 'published' else {}
    robust, seconds, compiling = getattr(autoattack, rival)(
      f'{path}.npy', images, labels, 'linf', TINY_EPSILON, len(images), **more
    )
    note = f'{robust} of {len(images)} robust'
    if compiling:
      note += f'; {len(images) / (seconds - compiling):.2f} images/s without compiling'
    facts['attack'] = facts['attack']._replace(note=note, compiling=(compiling,))

  return {'attack': rivals.Task(judge, warm=0)}, facts


def _write_weights(path: str, case: Case):
  """A network that nobody trained, images, and what it takes them for."""
  import jax
  import numpy as np
  from etils import epath

  from benchmarks import autoattack, train_step
  from jaxrobust import models
  from jaxrobust.config import dataset_info
  from jaxrobust.models import parameter_files

  config = train_step.make_config(case.model, case.batch)
  model = models.from_config(config.model, dataset_info.INFO['cifar10'])
  params, net_state = jax.jit(model.init)(jax.random.key(0))
  images = autoattack.pictures()[0][: case.batch]
  # Its last layer begins with zeros; the others make logits of any size.
  last = max(params, key=lambda name: 'logits' in name)
  shape = params[last]['w'].shape
  params[last] = {**params[last], 'w': jax.random.normal(jax.random.key(1), shape)}
  apply = jax.jit(lambda p, x: model.apply(p, net_state, x, batch_stats=False)[0])
  scale = np.std(apply(params, images / np.float32(255)), 0).mean()
  params[last]['w'] = params[last]['w'] / scale
  logits = apply(params, images / np.float32(255))
  parameter_files.export_npy(epath.Path(f'{path}.npy'), params, net_state)
  np.savez(f'{path}.npz', image=images, label=np.argmax(logits, 1))


KINDS = {
  'step': _step,
  'autoattack': _autoattack,
  'diffusion': _diffusion,
  'input': _input,
}


def _operations(config, what: str) -> float:
  """Of an image: multiplications and additions of a program."""
  from jaxrobust.distributed import parallel
  from jaxrobust.planning import device_programs, program_cost

  programs = device_programs.of(config.copy_and_resolve_references().lock(), what, 1)
  assert len(programs) == 1, programs
  program = programs[0]
  traced = parallel.trace(program.fn, program.arguments, 1)
  return program_cost.flops(traced) / program.images


class Row:
  """What a rival did at a task of a case, over all rounds."""

  def __init__(self):
    self.times: list[float] = []  # of a call
    self.facts, self.first, self.note = None, None, ''

  def add(self, facts: Facts, first: float, warm: float, turns: list[float]) -> None:
    """Adds a process's calls; a task without turns has its first call."""
    if self.first is None:  # Later ones find the compiled code.
      self.first = sum(facts.compiling) if facts.compiling else max(first - warm, 0.0)
    self.facts, self.times, self.note = facts, self.times + (turns or [first]), ''


def take_turns(
  rival: rivals.Rival, deadline: float, turn_seconds: float
) -> dict[str, tuple]:
  """(facts, first, warm and turns' seconds of a call) of each task of a process.

  Raises:
    TimeoutError: if it is not done by the deadline.
    RuntimeError: for what was raised there.
  """
  left = lambda: max(deadline - time.monotonic(), 0.0)
  facts, before = rival.ready(left())
  found = {}
  for task, ((first, _), (warm, _)) in before.items():
    calls, turns = max(1, math.ceil(turn_seconds / max(warm, 1e-6))), []
    if facts[task].compiling:  # Once is enough of a suite.
      calls = 0
    for _ in range(TURNS if calls else 0):
      seconds = sum(rival.turn(task, left())[0] for _ in range(calls))
      turns.append(seconds / calls)
    found[task] = facts[task], first, warm, turns
  return found


def reason(e: Exception, seconds: float) -> str:
  """Why there is no figure, in a few words."""
  text = ' '.join(str(e).split())
  if isinstance(e, TimeoutError):
    return f'not done in the {seconds:.0f} s that it had'
  if re.search('RESOURCE_EXHAUSTED|out of memory|OutOfMemory', text, re.I):
    return 'out of memory'
  if missing := re.search(r"No module named '([\w.]+)'", text):
    return f'{missing[1]} is not installed'
  return text[:90]


class Table:
  """Rows of all cases, and what is left of the time."""

  def __init__(
    self, cases: dict[str, Case], minutes: float, turn_seconds: float, make=make
  ):
    """Turns take at least so long; a rehearsal's, of no length, are not repeated."""
    self.rows: dict[tuple[str, str, str], Row] = {}
    self._cases, self._make, self._turn_seconds = cases, make, turn_seconds
    self._end = time.monotonic() + 60 * minutes
    self._took = dict.fromkeys(cases, 0.0)

  def fill(self) -> None:
    """Does all cases once, then again as long as there is time for one."""
    order = 1
    while True:
      done = False
      for name, case in self._cases.items():
        # A second round of what took long, or did not work, is none.
        if order < 0 and self._took[name] > self._left() - 5:
          continue
        started = time.monotonic()
        for rival in case.rivals[::order]:
          done |= self._try(name, case, rival, again=order < 0)
        self._took[name] = time.monotonic() - started
      if order < 0 or not done or not self._turn_seconds:
        return
      order = -order

  def _left(self) -> float:
    return self._end - time.monotonic()

  def _try(self, name: str, case: Case, rival: str, again: bool) -> bool:
    """One process; whether it came to a figure."""
    known = [k for k in self.rows if k[0] == name and k[2] == rival]
    if again and not any(self.rows[k].times for k in known):
      return False
    seconds = min(case.seconds, self._left())
    if seconds < 1:
      self.rows.setdefault((name, '', rival), Row()).note = 'skipped: no time was left'
      return False
    print(f'{name}, {rival} …', file=sys.stderr, flush=True)
    process = rivals.Rival(self._make, rival, case)
    try:
      found = take_turns(process, time.monotonic() + seconds, self._turn_seconds)
    except (TimeoutError, RuntimeError) as e:
      if not again:
        row = self.rows.setdefault((name, '', rival), Row())
        row.note = reason(e, seconds)
        print(f'{name}, {rival}: {row.note}', file=sys.stderr, flush=True)
      return False
    finally:
      process.close(kill=True)  # Else it may take its time to give the memory back.
    for task, figures in found.items():
      self.rows.setdefault((name, task, rival), Row()).add(*figures)
    return True

  def lines(self, peaks: tuple[float, float] | None, devices: int) -> list[str]:
    """The table as text: a row a rival of each task."""
    heads = 'case', 'task', 'rival', 'images/s', 'ours is', 'of peak', 'compiling', ''
    rows = [heads, *(self._cells(key, peaks, devices) for key in self.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return [
      '  '.join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip()
      for row in rows
    ]

  def _cells(self, key, peaks, devices) -> tuple[str, ...]:
    """The cells of a row."""
    (name, task, rival), row = key, self.rows[key]
    if not row.times:
      return name, task, rival, '–', '', '', '', row.note
    case, ours = self._cases[name], self.rows.get((name, task, 'ours'))
    rates = [row.facts.images / seconds for seconds in row.times]
    ratio, share, compiling = '', '', f'{row.first:.1f} s'
    if ours and ours.times and rival != 'ours':
      pairs = zip(row.times, ours.times, strict=False)
      ratio = f'{rivals.spread([a / b for a, b in pairs], ".2f")} x'
    operations = ours.facts.operations if ours and ours.facts else 0.0
    if peaks and operations:
      peak = 1e12 * peaks[case.dtype != 'bfloat16'] * devices
      share = f'{operations * sorted(rates)[len(rates) // 2] / peak:.0%}'
    form = '.1f' if max(rates) < 100 else ',.0f'
    words = rivals.spread(rates, form)
    return name, task, rival, words, ratio, share, compiling, row.facts.note


def peaks_of(kind: str) -> tuple[float, float] | None:
  """Published dense TFLOP/s of a device, in bfloat16 and float32; None if unknown."""
  names = [x for x in PEAKS if re.search(rf'\b{x}\b', kind)]
  if names:
    return PEAKS[max(names, key=len)]
  if not kind.startswith('TPU '):
    return None
  from jaxrobust.planning import hardware

  word = kind.removeprefix('TPU ')
  chip = hardware.CHIPS.get(TPUS.get(word, word))
  # float32 multiplies in bfloat16 there, too.
  return (chip.peak / chip.devices / 1e12,) * 2 if chip else None


def versions() -> str:
  """Of what is compared."""
  found = []
  for name in ('jax', 'jaxlib', 'torch', 'autoattack', 'tensorflow-cpu'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found.append(f'{name} {importlib.metadata.version(name)}')
  return ', '.join(found)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--minutes', type=float, default=10, help='in all, at most')
  parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
  everyone = list(dict.fromkeys(r for case in CASES.values() for r in case.rivals))
  parser.add_argument(
    '--rivals',
    nargs='+',
    choices=everyone,
    default=everyone,
    help='ratios, and shares of the peak, need ours',
  )
  parser.add_argument('--cpu', action='store_true', help='rehearse with tiny networks')
  args = parser.parse_args()
  cases = chosen(args.cases, args.rivals, args.cpu)
  if not cases:
    words = ', '.join(args.rivals), ', '.join(args.cases)
    sys.exit('--rivals {}: none of them takes part in {}'.format(*words))
  started = time.monotonic()
  # PyTorch has the first GPU alone; so does jax, which would take all memory at once.
  for name, value in (
    ('CUDA_VISIBLE_DEVICES', '0'),
    ('XLA_PYTHON_CLIENT_PREALLOCATE', 'false'),
    ('TF_CPP_MIN_LOG_LEVEL', '3'),
    ('TF_ENABLE_ONEDNN_OPTS', '0'),  # It says so at any level.
    *((('JAX_NUM_CPU_DEVICES', '1'), ('OMP_NUM_THREADS', '1')) if args.cpu else ()),
  ):
    os.environ.setdefault(name, value)
  if args.cpu:
    os.environ['JAX_PLATFORMS'] = 'cpu'
  probe = rivals.Rival(_probe, 'ours', None)
  (platform, kind, devices), _ = probe.ready()
  probe.close()
  if platform == 'cpu' and not args.cpu:
    sys.exit(
      'jax sees no accelerator, only the CPU: install jax for it, such as '
      "`pip install '.[cuda]'`, or rehearse with --cpu"
    )
  with tempfile.TemporaryDirectory() as folder:
    # Compiled code of this run alone, so that what is compiled is measured.
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{folder}/compiled')
    os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', f'{folder}/inductor')
    cases = {name: case._replace(files=folder) for name, case in cases.items()}
    if 'autoattack' in cases:
      weights = rivals.Rival(make, 'weights', cases['autoattack'])
      with contextlib.suppress(RuntimeError):  # Its rows will say that there are none.
        weights.ready()
      weights.close(kill=True)
    minutes = args.minutes - (time.monotonic() - started) / 60
    table = Table(cases, minutes, 0.0 if args.cpu else TURN_SECONDS)
    with contextlib.suppress(KeyboardInterrupt):
      table.fill()
  print(f'{kind}, {devices} of them; {versions()}')
  if args.cpu:
    print('A rehearsal with tiny networks: its figures say nothing.')
  peaks = peaks_of(kind)
  if not peaks and not args.cpu:
    print(f'The peak of {kind} is not known here: no shares.')
  print('\n'.join(table.lines(peaks, devices)))
  print(f'in {(time.monotonic() - started) / 60:.1f} minutes', flush=True)


if __name__ == '__main__':
  main()
