"""Plans: operations, collectives, text, cache and refusals; a compile for a TPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import (
  cifar10_ddpm,
  cifar10_linf,
  digits,
  digits_analysis,
  digits_ddpm,
  digits_gaussian,
)
from jaxrobust import config as configs
from jaxrobust import models, plan
from jaxrobust.config import dataset_info
from jaxrobust.distributed import parallel
from jaxrobust.errors import UserError
from jaxrobust.models.convolution import conv2d
from jaxrobust.planning import (
  compiler,
  device_programs,
  hardware,
  program_cost,
  schedule,
)

FITS = {
  'arguments': 3 * 2**30,
  'outputs': 2**30,
  'aliased': 2**29,
  'temporaries': 2**31,
  'schedule': schedule.Schedule(
    [
      schedule.Work('convolutions', '3x3 16→32 at 8x8', 11, 8e6, 6.4e12),
      schedule.Work('other', 'select_n', 5, 2e6, 0.0),
    ],
    7e8,
    {'all-reduce': (2, 3e6)},
  ),
}
# A device of it multiplies and adds 1e6 times a cycle, 50 million times a second.
CHIP = hardware.Chip(
  peak=100e12, devices=2, usable=15.5, arrays=1, bandwidth=1e11, interconnect=9e6
)


def small(**overrides):
  config = digits.get_config('wrn-10-1').unlock()
  config.update_from_flattened_dict(
    {
      'data.batch_size': 32,
      'model.batch_norm_group': 4,
      'attack.num_steps': 2,
      'optimizer.warmup_epochs': 0.0,
    }
    | overrides
  )
  return config


def count(fn, *shapes):
  return program_cost.flops(jax.make_jaxpr(fn)(*(jnp.zeros(s) for s in shapes)))


def test_one_convolution_by_hand():
  # 5 pixels, 3 taps, SAME: 3 taps meet a pixel in the middle, 2 at the ends: 13 pairs.
  operations = 2 * 7 * 13 * 13 * 2 * 4
  shapes = (7, 5, 5, 2), (3, 3, 2, 4)
  assert count(conv2d, *shapes) == operations
  # By 2, from pixels 0, 2 and 4 with one zero before: 2 + 3 + 2 pairs.
  assert count(lambda x, k: conv2d(x, k, 2), *shapes) == 2 * 7 * 7 * 7 * 2 * 4
  # Gradients of images and of kernels do the same products again.
  total = jax.grad(lambda x, k: jnp.sum(conv2d(x, k) ** 2), (0, 1))
  assert count(total, *shapes) == 3 * operations
  # Zeros of a strided gradient do not count.
  total = jax.grad(lambda x, k: jnp.sum(conv2d(x, k, 2) ** 2))
  assert count(total, *shapes) == 2 * 2 * 7 * 7 * 7 * 2 * 4


def test_loops_count_as_often_as_they_run_and_branches_by_the_longest():
  product = lambda x: x @ x
  assert count(product, (3, 3)) == 2 * 27
  loop = lambda x: jax.lax.fori_loop(0, 5, lambda _, y: product(y), x)
  assert count(loop, (3, 3)) == 5 * 2 * 27
  wait = lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 9, product, x)
  stops = jax.make_jaxpr(wait)(jnp.zeros((3, 3)))
  assert (
    program_cost.flops(stops) == 2 * 27
    and program_cost.flops(stops, rounds=7) == 7 * 2 * 27
  )
  assert count(jax.jit(jax.checkpoint(loop)), (3, 3)) == 5 * 2 * 27
  branch = lambda x: jax.lax.cond(x[0, 0] > 0, loop, product, x)
  assert count(branch, (3, 3)) == 5 * 2 * 27
  platform = lambda x: jax.lax.platform_dependent(x, cpu=loop, default=product)
  assert count(platform, (3, 3)) == 2 * 27
  chosen = lambda x: jax.lax.platform_dependent(x, cpu=product, tpu=loop)
  assert count(chosen, (3, 3)) == 5 * 2 * 27


def as_xla(fn, *arguments):
  """XLA's own count, for the CPU."""
  return jax.jit(fn).lower(*arguments).cost_analysis()['flops']


def test_products_as_xla_counts_them():
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  shapes = shape(2, 9, 9, 3), shape(3, 3, 3, 8), shape(1, 1, 8, 4), shape(36, 5)
  chain = lambda x, a, b, w: conv2d(conv2d(x, a, 2), b, 2).reshape(2, -1) @ w
  assert program_cost.flops(jax.make_jaxpr(chain)(*shapes)) == as_xla(chain, *shapes)


def test_a_forward_pass_as_xla_counts_it():
  info = dataset_info.INFO['digits']
  model = models.from_config(small().model, info)
  variables = jax.eval_shape(model.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((4, *info.image_shape), jnp.float32)
  forward = lambda v, x: model.apply(*v, x, batch_stats=False)[0]
  ours = program_cost.flops(jax.make_jaxpr(forward)(variables, images))
  # XLA counts elementwise work, too, which is an eighth in so narrow a network.
  assert 0.8 * as_xla(forward, variables, images) < ours
  assert ours <= as_xla(forward, variables, images)


def program_of(config, what):
  """The only one, on eight devices."""
  [program] = device_programs.of(config, what, 8)
  return program


def operations_of(what='train', **overrides):
  return compiler.operations(program_of(small(**overrides), what), 8)


def test_the_attack_is_in_the_step():
  one, three, seven = (operations_of(**{'attack.num_steps': n}) for n in (1, 3, 7))
  assert seven - three == 2 * (three - one) > 0


def test_an_attack_that_may_stop_early_counts_all_its_steps():
  first, second = (
    operations_of('evaluate', **{'evaluation.suite': f'apgd-ce:num_steps={n}'})
    for n in (10, 20)
  )
  assert 1.7 * first < second < 2 * first


HLO = """
  %all-reduce.1 = f32[8,3]{1,0:T(8,128)} all-reduce(%a), replica_groups={{0,1}}
  ROOT %all-reduce.2 = (f32[5]{0}, bf16[2,2]{1,0}) all-reduce(%b, %c), to_apply=%add
  %ar = f32[4]{0} all-reduce-start(%d), channel_id=1
  %done = f32[4]{0} all-reduce-done(%ar)
  %ag = (u8[2,4]{1,0}, u8[16,4]{1,0}) all-gather-start(%e), dimensions={0}
  %flag = pred[] all-reduce(%f)
  %other = f32[100]{0} add(%all-reduce.1, %all-reduce.1)
"""


def test_collectives_and_their_bytes():
  assert program_cost.collectives(HLO) == {
    'all-reduce': (4, 96 + 20 + 8 + 16 + 1),
    'all-gather': (1, 64),
  }


def test_lines():
  program = device_programs.Program(None, (), (), images=8, calls=100)
  lines = '\n'.join(plan.lines_of(FITS, 4e12, program, 4, CHIP))
  # 3 + 1 - 0.5 + 2 GiB; 4e12 over 8 images, times 4 devices.
  assert 'fits: 5.50 GiB of 15.5 GiB usable on a device: 3.00 arguments' in lines
  assert '5.000e+11 FLOPs an image' in lines
  assert '1.600e+13 a batch of 32' in lines
  # Each device sends 3 MB twice, less a quarter, at 4.5 MB/s.
  assert '2 all-reduce of 2.86 MiB: 1 s by the published interconnect' in lines
  # At the peak of a device, 50 TFLOP/s, and 50 GB/s.
  assert '0.08 s by operations at the peak; 0.014 s by 0.7 GB' in lines
  assert '10M cycles' in lines and 'convolutions 80%, other 20%' in lines
  assert '80.0%  convolutions: 3x3 16→32 at 8x8, 11 times' in lines
  # 6.4e12 in 8 million cycles of 32,768 each.
  assert f'{6.4e12 / 8e6 / 32768:.0%} of the peak' in lines
  refused = plan.lines_of(
    {'refused': 'needs 20.5GiB of 15.48GiB'}, 4e12, program, 4, CHIP
  )
  assert 'does NOT fit: needs 20.5GiB of 15.48GiB' in refused[0] and len(refused) == 2


def test_time():
  program = device_programs.Program(None, (), (), images=8, calls=100)
  # 4e12 over half of a device's 50e12, a hundred times, on two chips.
  seconds = plan.seconds_of(FITS, 4e12, 4, CHIP, 0.5)
  line = plan.time_line(seconds, 4e12, program, CHIP, 2, 0.5)
  assert '0.16 s a call, 100 calls in 0.00444 h, 0.008889 chip-hours' in line
  assert 'at 50% of the 100 TFLOP/s (bfloat16)' in line
  # By the schedule: its cycles at the clock, and the second of the collectives.
  seconds = plan.seconds_of(FITS, 4e12, 4, CHIP, 0)
  assert seconds == pytest.approx(10e6 / (50e12 / 32768) + 1.0)
  line = plan.time_line(seconds, 4e12, program, CHIP, 2, 0)
  assert 'estimate' in line and f'{4e12 / seconds / 50e12:.0%} of the 100' in line
  assert plan.seconds_of({'refused': 'needs more'}, 4e12, 4, CHIP, 0) is None


def test_refusals_of_the_compiler_are_told_from_its_faults():
  message = (
    'RESOURCE_EXHAUSTED: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out '
    'of memory in memory space hbm. Used 20.50G of 15.48G hbm. Exceeded hbm capacity'
  )
  assert compiler.refusal(message) == 'needs 20.50GiB of 15.48GiB'
  message = (
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total '
    'memory required for HLO temporaries (8.52G) exceeds available HBM (7.48G). HLO '
    'module: jit__fun.'
  )
  assert compiler.refusal(message) == 'needs 8.52GiB and more of 7.48GiB'
  assert compiler.refusal('CompileTimeHbmOom') == 'needs more memory than there is'
  assert compiler.refusal('INTERNAL: something else') == ''


def test_what_would_save_memory():
  config = cifar10_linf.get_config('real')
  remat, parts, half, smaller = plan.changes(config, 'train', 8)
  # 1,024 images on 8 devices: four groups of 32 on each.
  assert remat == [{'model.remat': True}]
  assert parts == [{'training.accumulation': 2}, {'training.accumulation': 4}]
  assert half[0] == {'model.compute_dtype': 'bfloat16'}
  assert smaller[-1] == {'data.batch_size': 64}
  assert plan.changes(config, 'train', 32)[1] == []  # One group on each.
  for kind in (remat, parts, half, smaller):
    for overrides in kind:
      other = config.copy_and_resolve_references().unlock()
      other.update_from_flattened_dict(overrides)
      configs.resolve(other)


def test_what_would_save_memory_of_a_generator():
  config = cifar10_ddpm.get_config()
  # 128 images, on 32 devices: a batch of 64 or 32 still divides.
  assert plan.changes(config, 'train', 32) == [
    [{'generator.training.batch_size': 64}, {'generator.training.batch_size': 32}]
  ]
  # A device's own batch of 250 does not depend on their number.
  assert plan.changes(config, 'sample', 32) == [[{'samples.batch_size': 125}]]


def test_the_programs_of_a_generator():
  config = digits_ddpm.get_config().unlock()
  operations = lambda what: compiler.operations(program_of(config, what), 8)
  step, samples = operations('train'), operations('sample')
  # An update is a forward pass and two of gradients of 64 / 8 images, less the first
  # layer's gradient of its input; a sample 20 forward passes, of 250.
  forward = samples / (20 * 250)
  assert 2.8 * 8 * forward < step < 3 * 8 * forward
  assert program_of(config, 'sample').calls == 5  # 10,000 samples, 2,000 a call
  assert program_of(config, 'train').calls == 2_000
  config.generator.sampling.num_steps = 10
  assert operations('sample') == samples / 2


class Lowered:
  """Plays jax's Lowered; counts compilations."""

  compilations = 0

  def __init__(self, text, error=None):
    self.text, self.error = text, error

  def as_text(self):
    return self.text

  def compile(self):
    Lowered.compilations += 1
    if self.error:
      raise jax.errors.JaxRuntimeError(self.error)
    return 'compiled'


def test_results_are_kept_by_content(tmp_path, monkeypatch):
  program = device_programs.Program(None, (), (), 8, 100)
  monkeypatch.setenv('JAXROBUST_CACHE', str(tmp_path))
  monkeypatch.setattr(compiler.importlib.metadata, 'version', lambda name: '1.0')
  monkeypatch.setattr(compiler, '_measures', lambda *a: dict(FITS))
  monkeypatch.setattr(Lowered, 'compilations', 0)

  def compile_for(text, topology, error=None):
    monkeypatch.setattr(parallel, 'lower_for', lambda *a: Lowered(text, error))
    return compiler.compile_for([], topology, program)

  first = compile_for('a', 'v3:2x2')
  assert first['arguments'] == FITS['arguments'] and Lowered.compilations == 1
  again = compile_for('a', 'v3:2x2')
  assert again == first | {'seconds': again['seconds']} and Lowered.compilations == 1
  compile_for('b', 'v3:2x2')
  compile_for('a', 'v4:2x2x1')
  assert Lowered.compilations == 3
  oom = 'CompileTimeHbmOom: Used 20.5G of 15.48G hbm'
  assert compile_for('c', 'v3:2x2', oom)['refused'] == 'needs 20.5GiB of 15.48GiB'
  assert 'refused' in compile_for('c', 'v3:2x2') and Lowered.compilations == 4
  with pytest.raises(jax.errors.JaxRuntimeError):
    compile_for('d', 'v3:2x2', 'INTERNAL: a fault')
  files = list((tmp_path / 'plan').iterdir())
  assert len(files) == 4 and all(json.loads(f.read_text()) for f in files)
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_tpu_scoped_vmem_limit_kib=16384')
  compile_for('a', 'v3:2x2')
  assert Lowered.compilations == 6


@pytest.mark.parametrize(
  'flags, words',
  [
    ({'topology': ''}, 'v3:4x4'),
    ({'topology': 'v9:2x2'}, 'v3:4x4'),
    ({'topology': 'v4:0x2x1'}, 'v4:0x2x1: use generation:chips'),
    ({'topology': 'v4-32'}, 'v4-32: use generation:chips, .* v4:2x2x4'),
    ({'utilization': 40.0}, 'at most 1'),
  ],
)
def test_refuses_in_one_line(flags, words):
  given = {'topology': 'v3:2x2', 'what': 'train', 'suggest': False, 'sweep': False}
  given |= {'utilization': 0.4} | flags
  with pytest.raises(UserError, match=words) as e:
    plan.main(small(), None, **given)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'accelerator, expected',
  [
    *(('v2-8', 'v2:2x2'), ('v3-8', 'v3:2x2'), ('v3-32', 'v3:4x4')),
    *(('v4-8', 'v4:2x2x1'), ('v4-16', 'v4:2x2x2'), ('v4-32', 'v4:2x2x4')),
    *(('v4-64', 'v4:2x4x4'), ('v4-128', 'v4:4x4x4'), ('v5p-256', 'v5p:4x4x8')),
    *(('v5litepod-1', 'v5e:1x1'), ('v5litepod-8', 'v5e:2x4'), ('v6e-16', 'v6e:4x4')),
    *(('v6e-256', 'v6e:16x16'), ('v4-12', ''), ('v4-2', ''), ('h100-8', '')),
    *(('v4-0', ''), ('v4', ''), ('v4:2x2x1', '')),
  ],
)
def test_slices_of_accelerator_types(accelerator, expected):
  assert hardware.slice_of(accelerator) == expected


def test_the_total_of_a_table(capsys, monkeypatch):
  """Every classifier counts once, runs of one kind are counted once."""
  monkeypatch.setattr(compiler, 'operations', lambda program, n: 4e12)
  traced = []
  for made in ('of', 'judging'):
    make = getattr(device_programs, made)
    monkeypatch.setattr(
      device_programs,
      made,
      lambda *a, made=made, make=make: traced.append(made) or make(*a),
    )
  found = plan._points_of_table('digits-linf', '')
  plan.print_total('table', found, [None] * 2, 'v4:2x1x1', 0.5)
  *lines, total = capsys.readouterr().out.splitlines()
  assert [x.split(':')[0].strip() for x in lines] == ['digits_labeller'] + [
    f'digits_linf_wrn-10-1_{data}_seed-{seed}'
    for data in ('real', 'gaussian', 'ddpm')
    for seed in range(3)
  ]
  assert traced == ['of', 'of', 'judging']
  # 9 runs of 1,000 steps and one of 400, in two chips at half of 275 TFLOP/s.
  hour = 4e12 / (275e12 / 2) / 3600 * 2
  hours = (9 * 1_000 + 400) * hour
  # One attempt of APGD-CE and of Square, 9 of APGD-T and FAB-T; 797 images in batches.
  size = found[1][1].evaluation.batch_size
  judged = 9 * (1 + 9 + 9 + 1) * -(-797 // size) * hour
  assert total == (
    f'table {hours:,.4g} chip-hours of training, at most {judged:,.4g} of judging '
    '(if no image fell)'
  )


def test_libtpu_is_optional_and_its_absence_told(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install '.\[plan\]'"):
    hardware.devices('v3:2x2')


@pytest.mark.parametrize(
  'experiment, what, words',
  [
    (digits, 'sample', 'has no such program; use train or evaluate'),
    (digits_ddpm, 'evaluate', 'digits_ddpm has no such program; use train or sample'),
    (digits_gaussian, 'train', "'gaussian' has no network.*give a generator that is"),
    (digits_analysis, 'train', 'no program worth a plan: give the experiment of a'),
  ],
)
def test_a_config_without_such_a_program(experiment, what, words):
  with pytest.raises(UserError, match=words):
    device_programs.of(experiment.get_config(), what, 1)


def test_a_batch_must_divide_over_the_slice():
  with pytest.raises(UserError, match='a batch of 32 does not divide over 5 devices'):
    device_programs.of(small(), 'train', 5)


needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="the TPU's compiler is not installed: pip install libtpu",
)


@needs_libtpu
@pytest.mark.parametrize('given, mebibytes', [('', (16, 44)), ('16384', (0, 16))])
def test_a_convolution_gets_memory_of_the_core(given, mebibytes):
  """Of 44 MiB it takes what large tiles need; a limit of the user's holds."""
  program = """
import jax, jax.numpy as jnp, re
from jaxrobust.distributed import parallel
from jaxrobust.planning import hardware
shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
convolve = lambda x, k: jax.lax.conv_general_dilated(
  x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')) + x
text = parallel.lower_for(
  hardware.devices('v5e:1x1'), convolve,
  (shape(128, 32, 32, 160), shape(3, 3, 160, 160))).compile().as_text()
used = re.findall(r'"used_scoped_memory_configs":\\[[^\\]]*"size":"(\\d+)"', text)
print(max(int(n) for n in used))
"""
  arguments = f'--xla_tpu_scoped_vmem_limit_kib={given}' if given else ''
  done = subprocess.run(
    [sys.executable, '-c', program],
    env={**os.environ, 'LIBTPU_INIT_ARGS': arguments},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  least, most = (n * 2**20 for n in mebibytes)
  assert least < int(done.stdout) <= most


@needs_libtpu
def test_kernels_in_lanes_save_cycles_of_both_directions():
  """Of a step with 160 channels, which do not fill the lanes of whole vectors."""
  program = """
import jax, jax.numpy as jnp
from jaxrobust.distributed import parallel
from jaxrobust.models import convolution
from jaxrobust.planning import hardware, schedule
def climb(images, kernel):
  def step(_, x):
    held, x = convolution.hold(kernel, x)
    return x + jax.grad(lambda x: jnp.sum(jnp.sin(convolution.conv2d(x, held))))(x)
  return jax.lax.fori_loop(0, 4, step, images)
def cycles():
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
  text = parallel.lower_for(
    hardware.devices('v5e:1x1'), lambda *args: climb(*args),
    (shape(128, 16, 16, 160), shape(3, 3, 160, 160))).compile().as_text()
  work = schedule.read(text, 4).work
  return sum(w.cycles for w in work if w.kind == 'convolutions')
ours = cycles()
convolution._in_lanes = lambda kernel: kernel
print(ours / cycles())
"""
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) < 0.85


@needs_libtpu
def test_compiles_for_a_tpu(tmp_path):
  """A small network for four chips of v4, then the same from the cache."""
  command = [
    *(sys.executable, '-m', 'jaxrobust.plan', '--topology=v4:2x2x1'),
    *('--config=experiments/digits.py:wrn-10-1', '--config.data.batch_size=16'),
    *('--config.model.batch_norm_group=4', '--config.attack.num_steps=1'),
  ]
  environment = {**os.environ, 'JAXROBUST_CACHE': str(tmp_path)}
  texts = []
  for _ in range(2):
    done = subprocess.run(
      command, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    texts.append(done.stdout)
  assert texts[0] == texts[1] and 'compiling' not in done.stderr
  assert '4 devices of 4 chips, 4 images each' in texts[0]
  assert re.search(r'fits: 0\.\d+ GiB of 30.75 GiB usable', texts[0])
  assert re.search(r'\d+ all-reduce of', texts[0])
  assert re.search(r'M cycles at 1.05 GHz: .*convolutions \d', texts[0])
  assert re.search(r'3x3 16→16 at 8x8, \d+ times, \d+% of the peak', texts[0])
  assert re.search(r"time .* by the compiler's schedule, an estimate", texts[0])
  bad = [x.replace('2x2x1', '3x3x3x3') for x in command]
  done = subprocess.run(bad, capture_output=True, text=True, timeout=600)
  assert done.returncode == 1 and 'knows no such slice' in done.stderr
