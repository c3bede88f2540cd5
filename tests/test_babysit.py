"""The states of babysit one by one, on a TPU that says what the test wants."""

import contextlib
import types

import pytest

from launch import LaunchError, babysit, gcloud

DONE = '== a: exit 0\n== b: exit 0\n'
RUNNING = '== a: running\n== b: running\n'
RAGGED = '== a: exit 0\n== b: running\n'
CRASHED = '== a: exit 134\n== b: exit 42\n'


class Pod:
  """A TPU with two workers; `asked` has what was done to it, pauses too."""

  name = 'x'

  def __init__(self):
    self.now, self.says, self.hosts = 'READY', RUNNING, 2
    self.failure, self.begins = '', True
    self.asked = []

  def state(self):
    return self.now

  def make(self):
    self.asked.append('make')
    return self.failure

  def delete(self):
    self.asked.append('delete')

  def begin(self):
    self.asked.append('begin')
    return self.begins

  def count_hosts(self):
    return self.hosts

  def look(self):
    self.asked.append('look')
    return self.says

  def stop(self):
    self.asked.append('stop')


@pytest.fixture
def pod(monkeypatch, tmp_path):
  pod = Pod()
  monkeypatch.setattr(
    babysit, 'time', types.SimpleNamespace(sleep=lambda s: pod.asked.append(s))
  )
  (tmp_path / 'launch').symlink_to(babysit.ROOT / 'launch')
  monkeypatch.setattr(babysit, 'ROOT', tmp_path)
  return pod


def step(sitter, pod, times=1, **now):
  """Steps with a TPU in a state; what was asked of it in the last, and the end."""
  for name, value in now.items():
    setattr(pod, name, value)
  for _ in range(times):
    pod.asked.clear()
    done = sitter.step()
  return [*pod.asked, 'done'] if done else list(pod.asked)


@pytest.fixture
def sitter(pod):
  return babysit.Babysitter(pod, attempts=3, wait=30)


class TestStates:
  @pytest.mark.parametrize('state', sorted(gcloud.STATES))
  def test_each_state_has_its_act(self, pod, sitter, state):
    acts = dict.fromkeys(gcloud.LOST, ['delete', 30])
    acts.update(ABSENT=['make'], READY=['begin', 30, 'look'], UNKNOWN=[30])
    if state == 'REFUSED':
      with pytest.raises(LaunchError, match='gcloud refuses'):
        step(sitter, pod, now=state)
    else:
      assert step(sitter, pod, now=state) == acts.get(state, [30])

  def test_a_failed_creation_pauses_and_a_refused_one_ends(self, pod, sitter):
    assert step(sitter, pod, now='ABSENT', failure='FAILED') == ['make', 30]
    assert step(sitter, pod) == ['make', 60]
    with pytest.raises(LaunchError, match='create failed, and no attempt is left'):
      step(sitter, pod)
    with pytest.raises(LaunchError, match='gcloud refuses'):
      step(sitter, pod, failure='REFUSED')

  @pytest.mark.parametrize('state', ['UNKNOWN', 'REFUSED'])
  def test_a_gcloud_that_has_answered_costs_no_attempt(self, pod, sitter, state):
    step(sitter, pod, now='PROVISIONING')
    for pause in (30, 60, 120, 240, 480, 480, 480):
      assert step(sitter, pod, now=state) == [pause]

  def test_a_gcloud_that_never_answered_does(self, pod, sitter):
    with pytest.raises(LaunchError, match='gcloud failed, and no attempt is left'):
      step(sitter, pod, 3, now='UNKNOWN')

  def test_it_is_started_once_and_anew_on_a_new_machine(self, pod, sitter):
    assert step(sitter, pod) == ['begin', 30, 'look']
    assert step(sitter, pod) == [30, 'look']
    step(sitter, pod, now='SUSPENDED')
    assert step(sitter, pod, now='READY') == ['begin', 30, 'look']

  def test_a_failed_start_is_tried_again(self, pod, sitter):
    assert step(sitter, pod, begins=False) == ['begin', 30]
    assert step(sitter, pod, begins=True) == ['begin', 30, 'look']

  def test_the_first_pause_of_none_stays_none(self, pod):
    sitter = babysit.Babysitter(pod, attempts=9, wait=0)
    assert [step(sitter, pod, now='FAILED') for _ in range(3)] == [['delete', 0]] * 3


class TestWorkers:
  def test_done_ends_it(self, pod, sitter):
    assert step(sitter, pod, says=DONE)[-1] == 'done'

  @pytest.mark.parametrize('other', ['exit 0', 'exit 42', 'exit 134', 'running'])
  def test_an_error_stops_all_and_names_the_record(self, pod, sitter, other, capsys):
    with pytest.raises(LaunchError, match=r'runs/launch/x\.log has the last lines'):
      step(sitter, pod, says=f'== a: {other}\n== b: exit 1\n  why\n')
    assert pod.asked[-1] == 'stop'
    assert '  why\n' in capsys.readouterr().err
    assert (babysit.ROOT / 'runs/launch/x.log').read_text().endswith('  why\n')

  def test_a_crash_costs_an_attempt(self, pod, sitter):
    assert step(sitter, pod, says=CRASHED) == ['begin', 30, 'look', 30]
    assert step(sitter, pod) == ['begin', 30, 'look', 60]
    with pytest.raises(LaunchError, match='exit code 134, and no attempt is left'):
      step(sitter, pod)

  def test_a_preemption_gives_all_back(self, pod, sitter):
    step(sitter, pod, 2, says=CRASHED)
    says = '== a: exit 42\n== b: exit 42\n'
    assert step(sitter, pod, says=says) == ['begin', 30, 'look', 30]
    step(sitter, pod, 2, says=CRASHED)

  @pytest.mark.parametrize('looks, enough', [(39, False), (40, True)])
  def test_so_do_40_looks_in_a_row_at_which_all_run(self, pod, sitter, looks, enough):
    step(sitter, pod, 2, says=CRASHED)
    step(sitter, pod, looks, says=RUNNING)
    refusal = pytest.raises(LaunchError, match='no attempt is left')
    with contextlib.nullcontext() if enough else refusal:
      step(sitter, pod, says=CRASHED)

  def test_a_worker_that_waits_for_an_ended_one_is_started_again(self, pod, sitter):
    assert step(sitter, pod, 9, says=RAGGED) == [30, 'look']
    assert step(sitter, pod, says=RUNNING) == [30, 'look']  # It counts in a row.
    assert step(sitter, pod, 9, says=RAGGED) == [30, 'look']
    assert step(sitter, pod) == [30, 'look', 30]
    assert step(sitter, pod)[0] == 'begin'

  @pytest.mark.parametrize('says', [None, '', '== a: exit 0\n', '  == a: exit 0\n' * 2])
  def test_without_an_answer_of_all_the_machine_is_lost(self, pod, sitter, says):
    assert step(sitter, pod, 59, says=says) == [30, 'look']
    step(sitter, pod, says=RUNNING)
    assert step(sitter, pod, 59, says=says) == [30, 'look']
    assert step(sitter, pod) == [30, 'look', 'delete', 30]
    assert step(sitter, pod)[0] == 'begin'

  def test_gcloud_between_begins_the_count_of_silences_anew(self, pod, sitter):
    step(sitter, pod, 59, says=None)
    step(sitter, pod, now='UNKNOWN')
    assert step(sitter, pod, now='READY') == [30, 'look']


@pytest.mark.parametrize(
  'status, ended, running',
  [
    ('== a: running\n== b: stopped\n== c-1.d: exit 42\n', [137, 42], 1),
    ('== a: exit 0\n  == 2026-01-01 10:00:00 train: exit 1\n', [0], 0),
    # The head of a log, as older workers print it.
    ('== a: exit 0\n== 2026-01-01 10:00:00 train --x: running\n', [0], 0),
    ('== a: exit $(x)\n== b: exit 9999\n== c: exit\n == d: running\n', [], 0),
    ('== a: running\r\n', [], 0),
    ('', [], 0),
  ],
)
def test_only_lines_of_workers_are_read(status, ended, running):
  assert babysit.read(status) == (ended, running)


@pytest.mark.parametrize(
  'codes, together',
  [([], 0), ([0, 0], 0), ([42, 0], 42), ([134, 42], 134), ([139, 1], 1), ([2], 1)],
)
def test_codes_mean_together_what_the_contract_says(codes, together):
  assert babysit.worst(codes) == together
