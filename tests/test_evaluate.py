"""The evaluate program: every image once, resumable, the same on any devices."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from etils import epath

from jaxrobust import evaluate
from jaxrobust.errors import UserError
from jaxrobust.models import parameter_files
from jaxrobust.runs import cli
from jaxrobust.runs import workdir as workdirs
from tests.helpers.programs import TINY, ends

SUITE = (
  'apgd-ce:num_steps=30:restarts=3,apgd-t:num_steps=30:num_targets=3,'
  'square:num_queries=100'
)
FEW = [
  '--config.evaluation.num_images=90',
  '--config.evaluation.batch_size=16',
  # So small that images stand to the end.
  '--config.threat.epsilon=0.05',
]


def results(workdir):
  return json.loads((workdir / 'results.json').read_text())


def state(workdir):
  """The arrays of the only evaluation of a workdir, or None before the first batch."""
  files = list(workdir.glob('evaluations/*/state.npz'))
  if not files:
    return None
  with np.load(files[0]) as arrays:
    return dict(arrays)


def wait_for_attempt(process, workdir, attempt):
  """Until an evaluation has come to an attempt of its suite."""
  while process.poll() is None:
    found = state(workdir)
    if found is not None and found['position'][0] >= attempt:
      return
    time.sleep(0.01)
  pytest.fail(f'ended before attempt {attempt}: {process.communicate()[1]}')


@pytest.fixture(scope='module')
def judged(trained, call, tmp_path_factory):
  """The workdir of an uninterrupted evaluation by several attacks."""
  workdir = tmp_path_factory.mktemp('judged')
  code, out, err = call(*command(workdir, trained))
  assert code == 0, err
  assert out.count('\n') == 1 and '90 test images' in out
  return workdir


def command(workdir, trained, suite=SUITE):
  return [
    'evaluate', f'--workdir={workdir}', f'--checkpoint={trained}', f'--suite={suite}',
    *TINY, *FEW,
  ]  # fmt: skip


def test_there_is_a_device_for_each_core_before_jax_looks_for_them(tmp_path):
  program = """
import os, sys
os.sched_getaffinity = lambda _: range(3)
import jax
from jaxrobust.models import parameter_files
parameter_files.load = lambda *_: sys.exit(jax.device_count() + 40)
from jaxrobust import evaluate
evaluate.cli.run(evaluate.PROGRAM)
"""
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'checkpoint.npy').write_bytes(b'0' * 100)
  arguments = [f'--workdir={run}', '--config=digits', '--suite=pgd']
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_NUM_CPU_DEVICES'}
  found = subprocess.run(
    [sys.executable, '-c', program, *arguments],
    check=False, capture_output=True, text=True, env=environment,
  )  # fmt: skip
  assert found.returncode == 43, found.stderr


@pytest.mark.slow
def test_evaluate_judges_every_image_once_and_remembers(trained, call):
  code, out, err = call('evaluate', f'--workdir={trained}')
  assert code == 0, err
  assert '797 test images' in out
  [entry] = results(trained)
  assert entry['protocol']['num_images'] == 797
  assert 0 <= entry['robust_correct'] <= entry['clean_correct'] <= 797
  assert entry['clean_accuracy'] == entry['clean_correct'] / 797
  with np.load(trained / 'figures' / 'examples.npz') as examples:
    moved = np.abs(examples['adversarial'] - examples['images'] / 255)
    assert moved.max() <= 0.2 + 1e-6
  # Devices change nothing; the same protocol is shown, not repeated.
  code, again, _ = call('evaluate', f'--workdir={trained}', devices=4)
  assert again == out
  assert len(results(trained)) == 1
  code, out, _ = call(
    'evaluate',
    f'--workdir={trained}',
    *TINY,
    '--config.evaluation.suite=clean',
    '--config.evaluation.num_images=100',
  )
  assert code == 0
  assert '100 test images' in out
  assert len(results(trained)) == 2


@pytest.mark.slow
def test_a_suite_writes_what_each_attack_did(judged):
  [entry] = results(judged)
  assert entry['protocol']['suite'] == SUITE
  assert [a['name'] for a in entry['attacks']] == SUITE.split(',')
  assert [a['name'] for a in entry['protocol']['attacks']] == SUITE.split(',')
  assert entry['robust_correct'] > 0
  fallen = sum(a['fallen'] for a in entry['attacks'])
  assert 0 < fallen == entry['clean_correct'] - entry['robust_correct']
  assert entry['attacks'][-1]['robust_accuracy'] == entry['robust_accuracy']
  found = state(judged)['fallen']
  assert len(found) == 90 and (found == -1).sum() == entry['robust_correct']
  with np.load(judged / 'figures' / 'examples.npz') as examples:
    moved = np.abs(examples['adversarial'] - examples['images'] / 255)
    assert len(moved) == 16 and 0 < moved.max() <= 0.05 + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('name, code', [('SIGKILL', -9), ('SIGTERM', 42)])
def test_interrupted_ends_with_the_same_results(
  judged, trained, start, call, tmp_path, name, code
):
  process = start(*command(tmp_path, trained))
  wait_for_attempt(process, tmp_path, 2)
  process.send_signal(signal.Signals[name])
  _, err = process.communicate()
  assert process.returncode == code, err
  assert not (tmp_path / 'results.json').exists()
  before = state(tmp_path)
  status, out, err = call(*command(tmp_path, trained))
  assert status == 0, err
  assert 'clean:' not in err, 'the clean pass was done before'
  assert (tmp_path / 'results.json').read_text() == (
    judged / 'results.json'
  ).read_text()
  after, whole = state(tmp_path), state(judged)
  np.testing.assert_array_equal(after['fallen'], whole['fallen'])
  fell_before = before['fallen'] != -1
  np.testing.assert_array_equal(
    after['fallen'][fell_before], before['fallen'][fell_before]
  )


@pytest.mark.slow
def test_four_devices_find_the_same_robust_set(judged, trained, call, tmp_path):
  """In batches of another size, too."""
  other = '--config.evaluation.batch_size=36'
  code, _, err = call(*command(tmp_path, trained), other, devices=4)
  assert code == 0, err
  one, four = state(judged)['fallen'], state(tmp_path)['fallen']
  np.testing.assert_array_equal(one == -1, four == -1)


@pytest.mark.slow
def test_two_processes_stop_together_and_find_the_same_robust_set(
  judged, trained, pod, tmp_path
):
  processes = pod(2, *command(tmp_path, trained), devices=2)
  wait_for_attempt(processes[0], tmp_path, 2)
  processes[0].send_signal(signal.SIGTERM)  # To the one that writes.
  codes, texts = ends(processes)
  assert codes == [42, 42], texts
  assert not (tmp_path / 'results.json').exists()
  codes, texts = ends(pod(2, *command(tmp_path, trained), devices=2))
  assert codes == [0, 0], texts
  one, two = state(judged)['fallen'], state(tmp_path)['fallen']
  np.testing.assert_array_equal(one == -1, two == -1)


@pytest.mark.slow
def test_saves_adversarial_images_on_request(judged, trained, call, tmp_path):
  save = '--config.evaluation.save_adversarial=True'
  code, _, err = call(*command(tmp_path, trained), save)
  assert code == 0, err
  [path] = tmp_path.glob('evaluations/*/adversarial.npz')
  with np.load(path) as saved:
    assert len(saved['adversarial']) == 90
    moved = np.abs(saved['adversarial'] - saved['images'] / 255).max(axis=(1, 2, 3))
    wrong = saved['predictions'] != saved['labels']
  fallen = state(judged)['fallen']
  np.testing.assert_array_equal(moved > 1e-6, fallen > 0)
  np.testing.assert_array_equal(wrong, fallen != -1)
  assert moved.max() <= 0.05 + 1e-6
  assert results(tmp_path) == results(judged)


@pytest.mark.slow
def test_an_attack_of_ones_own_meets_a_run_of_another_config(trained, call, tmp_path):
  more = ['--register=docs/extending/my_attack.py']
  run = command(tmp_path, trained, 'random-points:restarts=1')
  code, out, err = call(*run, *more)
  assert code == 0, err
  assert 'random-points' in out and len(results(tmp_path)) == 1
  code, _, err = call(*run)
  assert code == 1 and "'random-points'" in err and '--register=FILE.py' in err


@pytest.mark.slow
def test_overrides_alone_take_the_config_of_the_workdir(judged, call, tmp_path):
  workdir = shutil.copytree(judged, tmp_path / 'copy')
  code, out, err = call(
    'evaluate',
    f'--workdir={workdir}',
    '--suite=clean',
    '--config.evaluation.num_images=7',
  )
  assert code == 0, err
  assert 'of 7 test images' in out
  assert [e['protocol']['suite'] for e in results(workdir)] == [SUITE, 'clean']


def run(*arguments):
  """The program in this process; returns its exit code."""
  return cli._run(evaluate.PROGRAM, arguments)


@pytest.mark.parametrize(
  'suite, words',
  [
    ('autoatack', "no attack or suite 'autoatack'"),
    ('apgd-ce:steps=3', "no option 'steps=3'"),
    ('autoattack-rand', 'is for randomised networks'),
  ],
)
def test_a_suite_that_does_not_exist(suite, words, tmp_path, capsys):
  assert run(f'--workdir={tmp_path / "x"}', f'--suite={suite}', TINY[0]) == 1
  err = capsys.readouterr().err
  assert words in err and err.count('\n') == 1
  assert not (tmp_path / 'x').exists()


CASES = [
  (
    ['--checkpoint=cifar10_linf_wrn28-10_ddpm_v2'],
    'no checkpoint at',  # Everything else is known, only the file is not there.
  ),
  (['--checkpoint=theirs.npy'], 'it does not exist; give a file'),
  (
    ['--checkpoint=mnist_linf_wrn28-10_without', '--config.evaluation.num_image=3'],
    'num_image',
  ),
  ([], 'holds no run to evaluate'),
  (
    [
      '--checkpoint=cifar10_l2_wrn28-10_ddpm_v2',
      '--config=experiments/cifar100_linf.py',
    ],
    'says dataset cifar100, and cifar10_l2_wrn28-10_ddpm_v2 is known to have cifar10',
  ),
  (
    ['--checkpoint=mnist_linf_wrn28-10_without', '--config.model.activation=relu'],
    'says model.activation relu, and',
  ),
]


@pytest.mark.parametrize('args, words', CASES)
def test_what_a_checkpoint_is_comes_from_itself(
  args, words, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('JAXROBUST_MODELS', str(tmp_path))
  assert run(f'--workdir={tmp_path / "x"}', *args) == 1
  err = capsys.readouterr().err
  assert words in err and err.count('\n') == 1
  assert not (tmp_path / 'x').exists()


@pytest.mark.slow
def test_remedies_of_a_workdir_that_holds_something_else(judged, trained, capsys):
  """One with evaluations alone has no checkpoint of its own to judge elsewhere."""
  was = results(judged)
  given = [f'--workdir={judged}', f'--checkpoint={trained}', f'--suite={SUITE}', *TINY]
  assert run(*given, '--config.evaluation.num_images=90') == 1
  line = capsys.readouterr().err
  assert 'threat.epsilon: 0.05 → 0.2' in line
  assert line.endswith(f'--workdir=OTHER --checkpoint={trained}\n')
  other = '--checkpoint=cifar10_l2_wrn28-10_ddpm_v2'
  assert run(f'--workdir={trained}', other) == 1
  line = capsys.readouterr().err
  assert f'the run in {trained} says dataset digits' in line
  assert line.endswith('give another --workdir\n') and '--config' not in line
  assert results(judged) == was


def test_a_released_checkpoint_needs_no_config(tmp_path):
  config = evaluate.default_config('', '', 'mnist_linf_wrn28-10_without')
  assert config.dataset.name == 'mnist' and config.threat.epsilon == 0.3
  assert config.model.padding == 2 and config.model.name == 'wrn-28-10'


@pytest.mark.slow
def test_a_file_with_a_card_needs_no_config(judged, trained, call, tmp_path):
  """Converted, a run is judged as before, from the file alone."""
  target = tmp_path / 'digits.safetensors'
  code, _, err = call('convert', f'--from={trained}', f'--to={target}')
  assert code == 0, err
  code, _, err = call(
    'evaluate',
    f'--workdir={tmp_path / "x"}',
    f'--checkpoint={target}',
    f'--suite={SUITE}',
    *FEW,
  )
  assert code == 0, err
  [entry], [whole] = results(tmp_path / 'x'), results(judged)
  assert entry['robust_correct'] == whole['robust_correct']
  assert entry['protocol']['epsilon'] == whole['protocol']['epsilon']


@pytest.mark.slow
def test_any_checkpoint_of_a_run_can_be_read_and_judged(trained, call, tmp_path):
  steps = [int(x.name) for x in (trained / 'checkpoints').iterdir()]
  exported = parameter_files.read(trained)
  same = [
    all(map(np.array_equal, *map(jax.tree.leaves, (exported, found))))
    for found in (parameter_files.read(f'{trained}@{step}') for step in steps)
  ]
  assert sum(same) == 1  # The best, which became checkpoint.npy.
  with pytest.raises(UserError, match='no checkpoint of step 999'):
    parameter_files.read(f'{trained}@999')
  last = max(steps)
  code, out, err = call(
    *('evaluate', f'--workdir={tmp_path / "last"}', '--suite=clean'),
    *(f'--checkpoint={trained}@{last}', '--config.evaluation.num_images=50'),
  )
  assert code == 0 and 'of 50 test images' in out, err
  (entry,) = results(tmp_path / 'last')
  assert entry['protocol']['checkpoint_step'] == last


def test_examples_are_of_the_strongest_evaluation(tmp_path):
  """Of one checkpoint and threat: others are not comparable."""
  folder, protocol = epath.Path(tmp_path), {'checkpoint_sha256': 'a', 'split': 'test'}
  protocol |= {'norm': 'linf', 'epsilon': 0.2}
  figures = {'clean_accuracy': 0.9, 'robust_accuracy': 0.5}
  workdirs.add_result(folder, protocol, figures)
  weaker = figures | {'robust_accuracy': 0.1}
  workdirs.add_result(folder, protocol | {'epsilon': 0.3}, weaker)
  for robust, is_strongest in ((0.4, True), (0.5, True), (0.6, False)):
    outcome = types.SimpleNamespace(robust_accuracy=robust)
    assert evaluate._is_strongest(folder, protocol, outcome) is is_strongest
