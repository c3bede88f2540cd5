"""The table of an accelerator: rehearsed on the CPU, and what its rows say if not."""

import os
import re
import signal
import subprocess
import sys

import pytest

from benchmarks import accelerator, rivals
from jaxrobust.planning import hardware
from tests.helpers.programs import ROOT


def run(*args, **variables):
  environment = {**os.environ, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  return subprocess.run(
    [sys.executable, '-m', 'benchmarks.accelerator', *args],
    cwd=ROOT,
    env={**environment, **variables},
    capture_output=True,
    text=True,
    timeout=600,
  )


@pytest.mark.slow
def test_the_rehearsal_prints_a_table_with_a_row_for_each_rival(compiled):
  done = run('--cpu', '--cases', 'step-float32', JAX_COMPILATION_CACHE_DIR=compiled)
  assert done.returncode == 0, done.stderr
  rows = [re.split(r'\s{2,}', line) for line in done.stdout.splitlines()]
  found = {tuple(row[:3]): row[3:] for row in rows if row[0] == 'step-float32'}
  assert re.match(r'[\d,.]+ \(', found['step-float32', 'train', 'ours'][0])
  (torch,) = [
    x for x in done.stdout.splitlines() if re.match('step-float32.* torch ', x)
  ]
  # Without PyTorch the row says so; with it there is a ratio.
  assert re.search(r'torch is not installed|\d\.\d\d \(.* x', torch)
  assert 'rehearsal' in done.stdout and 'jax' in done.stdout


def test_it_refuses_a_machine_without_an_accelerator():
  done = run(JAX_PLATFORMS='cpu')
  assert done.returncode == 1 and done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert 'only the CPU' in line and '--cpu' in line


def test_only_the_chosen_rivals_take_part():
  names = ['step-bfloat16', 'autoattack']
  found = accelerator.chosen(names, ['torch', 'ours'], rehearsed=False)
  assert {k: case.rivals for k, case in found.items()} == {
    'step-bfloat16': ('ours', 'torch'),
    'autoattack': ('ours',),
  }
  assert list(accelerator.chosen(names, ['published'], rehearsed=False)) == names[1:]


def test_rivals_of_no_case_are_refused():
  done = run('--cpu', '--cases', 'step-bfloat16', '--rivals', 'published')
  assert done.returncode == 1 and done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert 'published' in line and 'step-bfloat16' in line


def pretend(rival, case):
  """What `accelerator.make` would give, or what may go wrong in it."""
  if rival == 'crowded':
    raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes')
  if rival == 'absent':
    raise ModuleNotFoundError("No module named 'autoattack'")
  if rival == 'crashing':
    os._exit(139)
  if rival == 'hanging':
    signal.pause()
  operations = 2e9 if rival == 'ours' else 0.0
  return {'train': rivals.Task(int)}, {'train': accelerator.Facts(8, operations)}


def pretended(names, **fields):
  case = accelerator.Case('step', names, 'wrn-10-1', 8, 'bfloat16', seconds=900)
  case = case._replace(**fields)
  table = accelerator.Table({'step': case}, 60.0, 0.0, make=pretend)
  table.fill()
  return table


def test_trouble_is_a_row_and_the_others_go_on():
  table = pretended(('crowded', 'absent', 'crashing', 'ours', 'torch'))
  notes = {rival: row.note for (_, _, rival), row in table.rows.items()}
  assert notes == {
    'crowded': 'out of memory',
    'absent': 'autoattack is not installed',
    'crashing': 'ended with code 139',
    'ours': '',
    'torch': '',
  }
  assert len(table.rows['step', 'train', 'torch'].times) == accelerator.TURNS
  lines = table.lines((100.0, 50.0), 1)
  assert len(lines) == 6 and len(lines[0].split()) >= 6
  ours, torch = lines[4:]
  assert ' x ' not in ours and ' x ' in torch and '%' in ours and '%' in torch


def test_a_rival_has_no_more_than_its_time():
  table = pretended(('hanging',), seconds=2)
  assert 'not done in the 2 s' in table.rows['step', '', 'hanging'].note


def test_what_no_time_is_left_for_is_skipped_with_the_reason():
  case = accelerator.Case('step', ('ours',), 'wrn-10-1', 8)
  table = accelerator.Table({'step': case}, 0.0, 0.0, make=pretend)
  table.fill()
  assert 'skipped' in table.rows['step', '', 'ours'].note
  assert 'skipped' in table.lines(None, 1)[1]


def test_cells_are_of_the_case():
  """10 images of 4 GFLOP in 2 ms are 20 TFLOP/s: a fifth of 100 in bfloat16."""
  case = accelerator.Case('step', (), 'wrn-28-10', 10, 'bfloat16')
  table = accelerator.Table({'a': case, 'b': case._replace(dtype='float32')}, 0.0, 0.0)
  for name in 'ab':
    for rival, seconds in (('ours', 2e-3), ('torch', 5e-3)):
      row = table.rows[name, 'train', rival] = accelerator.Row()
      facts = accelerator.Facts(10, 4e9 if rival == 'ours' else 0.0)
      row.add(facts, 3.0, 1.0, [seconds])
  lines = [re.split(r'\s{2,}', line) for line in table.lines((100.0, 50.0), 1)[1:]]
  assert lines[0] == ['a', 'train', 'ours', '5,000 (5,000 … 5,000)', '20%', '2.0 s']
  ratio = '2.50 (2.50 … 2.50) x'
  assert lines[1] == [
    *('a', 'train', 'torch', '2,000 (2,000 … 2,000)', ratio, '8%', '2.0 s')
  ]
  assert [line[-2] for line in lines[2:]] == ['40%', '16%']
  assert '%' not in ''.join(table.lines(None, 1))  # Of a card that is not known.


@pytest.mark.parametrize(
  ('kind', 'peaks'),
  [
    ('NVIDIA H100 80GB HBM3', (989, 495)),
    ('NVIDIA H100 PCIe', (756, 378)),
    ('NVIDIA A100-SXM4-80GB', (312, 156)),
    ('NVIDIA L40S', (362, 183)),
    ('NVIDIA A10G', None),
    ('cpu', None),
    ('TPU v4', (275, 275)),
    ('TPU v3', (61.5, 61.5)),
    ('TPU v5 lite', (197, 197)),
    ('TPU v9', None),
  ],
)
def test_peaks_are_of_the_card(kind, peaks):
  assert accelerator.peaks_of(kind) == (pytest.approx(peaks) if peaks else None)


def test_every_tpu_of_the_table_is_a_chip():
  assert set(accelerator.TPUS.values()) <= set(hardware.CHIPS)
