"""The schedule in a compiled program's text: cycles, loops, names, bytes."""

import pytest

from jaxrobust.planning import hardware, program_cost, schedule

# As the TPU's compiler writes them, shortened.
HLO = """
HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused.conv (p.0: f32[4,8,8,16], p.1: f32[3,3,16,32]) -> (f32[4,8,8,32], f32[32]) {
  %p.0 = f32[4,8,8,16]{3,0,2,1:T(8,128)S(1)} parameter(0)
  %p.1 = f32[3,3,16,32]{3,2,1,0:T(8,128)} parameter(1)
  %conv.1 = f32[4,8,8,32]{3,0,2,1:T(8,128)} convolution(%p.0, %p.1), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %zero = f32[] constant(0)
  %stats = f32[32]{0} reduce(%conv.1, %zero), dimensions={0,1,2}, to_apply=%add.1
  ROOT %both = (f32[4,8,8,32]{3,0,2,1}, f32[32]{0}) tuple(%conv.1, %stats)
}

%fused.kernel (q.0: f32[4,8,8,16], q.1: f32[4,8,8,32]) -> f32[3,3,16,32] {
  %q.0 = f32[4,8,8,16]{3,0,2,1} parameter(0)
  %q.1 = f32[4,8,8,32]{3,0,2,1} parameter(1)
  ROOT %conv.2 = f32[3,3,16,32]{3,2,1,0} convolution(%q.0, %q.1), \
window={size=8x8 pad=1_1x1_1}, dim_labels=f01b_i01o->01bf
}

%fused.sum (r.0: f32[4,8,8,16]) -> f32[4,8,8,16] {
  %r.0 = f32[4,8,8,16]{3,0,2,1} parameter(0)
  ROOT %twice = f32[4,8,8,16]{3,0,2,1} add(%r.0, %r.0)
}

%body (s: (s32[], f32[4,8,8,16])) -> (s32[], f32[4,8,8,16]) {
  %s = (s32[], f32[4,8,8,16]{3,0,2,1}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8,8,16]{3,0,2,1:T(8,128)S(1)} get-tuple-element(%s), index=1
  %w = f32[3,3,16,32]{3,2,1,0:T(8,128)} constant({...})
  %f = (f32[4,8,8,32]{3,0,2,1:T(8,128)}, f32[32]{0}) fusion(%x, %w), kind=kOutput, \
calls=%fused.conv, metadata={op_name="jit(step)/while/body/conv_general_dilated"}, \
backend_config={"window_config":{"estimated_cycles":"700"}}
  %g = f32[4,8,8,16]{3,0,2,1:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%fused.sum, \
metadata={op_name="jit(step)/transpose(jvp())/add_any"}, \
backend_config={"window_config":{"estimated_cycles":"50"}}
  %mean = f32[32]{0} all-reduce(%h), replica_groups={{0,1}}, to_apply=%add.1
  ROOT %next = (s32[], f32[4,8,8,16]{3,0,2,1}) tuple(%i, %g)
}

%condition (t: (s32[], f32[4,8,8,16])) -> pred[] {
  %t = (s32[], f32[4,8,8,16]{3,0,2,1}) parameter(0)
  %bound = s32[]{:T(128)} constant(10), metadata={op_name="jit(step)"}
  %j = s32[] get-tuple-element(%t), index=0
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

%ends.itself (u: (s32[], f32[4,8,8,16])) -> pred[] {
  %u = (s32[], f32[4,8,8,16]{3,0,2,1}) parameter(0)
  %never = pred[] constant(false)
  ROOT %alive = pred[] get-tuple-element(%u), index=0
}

ENTRY %main (x.1: f32[4,8,8,16], y.1: f32[4,8,8,32]) -> f32[3,3,16,32] {
  %x.1 = f32[4,8,8,16]{3,0,2,1} parameter(0)
  %y.1 = f32[4,8,8,32]{3,0,2,1} parameter(1)
  %init = (s32[], f32[4,8,8,16]{3,0,2,1}) tuple(%zero.1, %x.1)
  %loop = (s32[], f32[4,8,8,16]{3,0,2,1}) while(%init), condition=%condition, body=%body
  %again = (s32[], f32[4,8,8,16]{3,0,2,1}) while(%loop), condition=%ends.itself, \
body=%body
  ROOT %k = f32[3,3,16,32]{3,2,1,0} fusion(%x.1, %y.1), kind=kOutput, \
calls=%fused.kernel, backend_config={"window_config":{"estimated_cycles":"900"}}
}
"""
# Pairs of a pixel and a tap of a 3x3 convolution with padding, on 8 pixels an axis.
PAIRS = (8 + 7 + 7) ** 2


@pytest.fixture(scope='module')
def found():
  return schedule.read(HLO, rounds=3)


def test_a_loop_counts_as_often_as_it_runs(found):
  """Ten times by its condition, and three where nothing says when it ends."""
  assert found.cycles == 13 * (700 + 50) + 900
  assert found.collectives == {'all-reduce': (13, 13 * 32 * 4)}
  assert schedule.read(HLO).cycles == 11 * (700 + 50) + 900


def test_what_the_cycles_are_spent_on(found):
  flops = 2 * 4 * PAIRS * 16 * 32
  assert found.work == [
    ('convolutions', '3x3 16→32 at 8x8', 13, 13 * 700, 13 * flops),
    ('convolutions', 'gradient of 3x3 16→32 at 8x8', 1, 900, flops),
    ('sums of gradients', 'add_any', 13, 13 * 50, 0),
  ]


def test_bytes_are_of_the_chips_memory_alone(found):
  """Arrays in the cores' own memory, S(1), move nothing."""
  kernel, image, out = 3 * 3 * 16 * 32, 4 * 8 * 8 * 16, 4 * 8 * 8 * 32
  body = kernel + out + 32 + 32  # the mean, and what it is of has no shape here
  assert found.bytes == 4 * (13 * body + image + out + kernel)


def test_seconds(found):
  chip = hardware.Chip(
    peak=2 * 2 * 128 * 128 * 1e9,  # two devices of an array each, at 1 GHz
    devices=2,
    usable=1.0,
    arrays=1,
    bandwidth=2e9,
    interconnect=2e6,
  )
  assert chip.clock == pytest.approx(1e9)
  # All of it twice round a ring of 4, less an own quarter, at 1 MB/s a device.
  collectives = 13 * 32 * 4 * 2 * 3 / 4 / 1e6
  assert found.collective_seconds(chip, 4) == pytest.approx(collectives)
  assert found.seconds(chip, 4) == pytest.approx(found.cycles / 1e9 + collectives)
  assert found.memory_seconds(chip) == pytest.approx(found.bytes / 1e9)


def test_another_compilers_program_has_no_cycles():
  assert schedule.read(HLO.replace('estimated_cycles', 'nothing')).work == []


def test_gradients_that_are_written_as_convolutions_by_images():
  """Strided: 4x4 gradients, dilated, are the window over a kernel of 3x3."""
  line = (
    '  %c = f32[4,8,8,16]{3,0,2,1} convolution(%k, %g), window={size=4x4 pad=7_7x7_7 '
    'rhs_dilate=2x2 rhs_reversal=1x1}, dim_labels=01bf_o01i->f01b'
  )
  shapes = {'k': 'f32[3,3,16,32]', 'g': 'f32[4,4,4,32]'}
  name, flops = schedule._product(schedule._instruction(line), shapes)
  assert name == '3x3 32→16 at 8x8'
  taps = program_cost.taps(3, 4, 8, 1, 7, 1, 2)
  assert flops == 2 * taps**2 * 4 * 16 * 32


@pytest.mark.parametrize('generation', hardware.CHIPS)
def test_clocks_are_those_of_such_chips(generation):
  """By the peak over the arrays; a wrong number of them would double or halve it."""
  assert 0.65e9 < hardware.CHIPS[generation].clock < 1.8e9
