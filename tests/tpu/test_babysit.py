"""A babysitter of a TPU machine goes from any state to the end of the run."""

import pytest

from tests.helpers.gcloud_play import ABSENT, BABYSIT, RUNNING, ended


class TestBabysit:
  def test_from_nothing_to_done(self, call):
    """Creation fails twice, with growing pauses; then the machine is waited for."""
    run = call(
      *BABYSIT,
      create=['1', '1', '0'],
      state=[
        *[ABSENT] * 3,
        *('0 WAITING_FOR_RESOURCES', '0 PROVISIONING', '0 ACTIVE'),
      ],
      node=['0 CREATING', '0 READY'],
      status=[RUNNING, RUNNING, ended('exit 0', 'running'), ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story == [
      *('create', 'sleep 30', 'create', 'sleep 60', 'create'),
      *('sleep 30', 'sleep 30', 'sleep 30', 'setup', 'start'),
      *('sleep 30', 'status') * 4,
    ]
    created = [c for c in run.calls if 'create' in c]
    assert all(
      '--spot' in c and '--runtime-version=tpu-ubuntu2204-base' in c for c in created
    )
    assert (
      (call.repository / 'runs' / 'launch' / 'x.log')
      .read_text()
      .endswith('last line\n')
    )

  @pytest.mark.parametrize('after', ['SUSPENDED', 'FAILED'])
  def test_what_was_preempted_is_made_anew_and_resumed(self, call, after):
    run = call(
      *BABYSIT,
      state=['0 ACTIVE', '0 ACTIVE', '0 SUSPENDING', f'0 {after}', ABSENT, '0 ACTIVE'],
      node=['0 READY'],
      status=[RUNNING, RUNNING, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story == [
      *('setup', 'start', 'sleep 30', 'status', 'sleep 30', 'status'),
      *('sleep 30', 'delete', 'sleep 30', 'create'),
      *('setup', 'start', 'sleep 30', 'status'),
    ]
    deleted = next(c for c in run.calls if 'delete' in c)
    assert {'--force', '--quiet'} <= set(deleted)
    starts = [c for c in run.calls if any('--start' in a for a in c)]
    assert starts[0] == starts[1]

  @pytest.mark.parametrize('node', ['0 PREEMPTED', ABSENT])
  def test_a_lost_machine_of_an_active_resource(self, call, node):
    run = call(
      *BABYSIT,
      state=['0 ACTIVE', '0 ACTIVE', ABSENT, '0 ACTIVE'],
      node=['0 READY', node, '0 READY'],
      status=['255', ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story.count('delete') == run.story.count('create') == 1

  @pytest.mark.parametrize(
    'end',
    [
      ended('exit 42', 'exit 42'),
      ended('exit 42', 'exit 134'),
      ended('exit 137', 'exit 0'),
      ended('stopped', 'stopped'),
    ],
  )
  def test_preempted_or_crashed_programs_start_again_on_the_same_machine(
    self, call, end
  ):
    run = call(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[end, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    once = ['setup', 'start', 'sleep 30', 'status']
    assert run.story == [*once, 'sleep 30', *once]

  @pytest.mark.parametrize(
    'end',
    [
      ended('exit 1', 'exit 1'),
      ended('exit 134', 'exit 1'),
      ended('exit 1', 'running'),  # it would only wait for the other
    ],
  )
  def test_an_error_ends_it(self, call, end):
    run = call(*BABYSIT, state=['0 ACTIVE'], node=['0 READY'], status=[RUNNING, end])
    assert run.code == 1
    assert run.story == [
      *('setup', 'start', 'sleep 30', 'status', 'sleep 30', 'status', 'stop')
    ]
    assert 'error: the program ended with an error' in run.err
    assert 'last line' in run.err

  def test_what_ssh_does_not_know_is_looked_at_again(self, call):
    """255 restarts nothing while the machine is there; half an hour makes it anew."""
    run = call(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=['255', RUNNING, *['255'] * 59, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story == ['setup', 'start', *('sleep 30', 'status') * 62]
    run = call(
      *BABYSIT,
      state=[*['0 ACTIVE'] * 60, ABSENT, '0 ACTIVE'],
      node=['0 READY'],
      status=[*['255'] * 60, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.kinds.count('delete') == 1

  @pytest.mark.parametrize('answer', ['0', '0 == a: exit 0\\nlast line'])
  def test_some_of_the_workers_do_not_say_that_all_are_done(self, call, answer):
    run = call(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      hosts=['0 2'],
      status=[answer, ended('exit 0', 'exit 1')],
    )
    assert run.code == 1, run.err
    assert run.story == ['setup', 'start', *('sleep 30', 'status') * 2, 'stop']

  def test_workers_that_wait_for_a_lost_one_are_started_again(self, call):
    run = call(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[*[ended('stopped', 'running')] * 10, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story.count('start') == 2
    assert run.story.count('status') == 11

  def test_workers_that_end_one_after_the_other_now_and_then_are_left_alone(self, call):
    """What a look saw half-way says nothing by the tenth time in all."""
    between = ended('exit 0', 'running')
    run = call(
      *BABYSIT,
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[*[between] * 6, RUNNING, *[between] * 6, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story.count('start') == 1

  def test_attempts_and_pauses_are_bounded(self, call):
    run = call(*BABYSIT[:3], '--attempts=8', 'train', create=['1'], state=[ABSENT])
    assert run.code == 1
    assert [k for k in run.story if k != 'create'] == [
      f'sleep {s}' for s in (30, 60, 120, 240, 480, 480, 480)
    ]
    assert 'error: create failed, and no attempt is left' in run.err

  @pytest.mark.parametrize(
    'end',
    [[ended('exit 42', 'exit 42')], [*[RUNNING] * 40, ended('exit 134', 'exit 134')]],
  )
  def test_progress_gives_the_attempts_back(self, call, end):
    crash = ended('exit 134', 'exit 134')
    run = call(
      *(*BABYSIT[:3], '--attempts=3', 'train'),
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[crash, crash, *end, crash, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story.count('start') == 5
    # The third pause begins anew.
    pauses = [
      a
      for a, b, c in zip(run.story, run.story[1:], run.story[2:], strict=False)
      if (b, c) == ('setup', 'start')
    ]
    assert pauses == ['sleep 30', 'sleep 60', 'sleep 30', 'sleep 60']

  def test_a_run_that_only_crashes_ends(self, call):
    run = call(
      *(*BABYSIT[:3], '--attempts=3', 'train'),
      state=['0 ACTIVE'],
      node=['0 READY'],
      status=[x for _ in range(3) for x in (RUNNING, ended('exit 134', 'exit 134'))],
    )
    assert run.code == 1
    assert run.story.count('start') == 3
    assert 'exit code 134, and no attempt is left' in run.err

  @pytest.mark.parametrize(
    'look',
    ['1 ERROR: no network', '1 ERROR: UNAUTHENTICATED', '0 ', '0 NO_WORD_OF_OURS'],
  )
  def test_a_lost_connection_costs_no_attempt_and_starts_nothing(self, call, look):
    run = call(
      *(*BABYSIT[:3], '--attempts=1', 'train'),
      state=['0 ACTIVE', *[look] * 7, '0 ACTIVE'],
      node=['0 READY'],
      status=[RUNNING, ended('exit 0', 'exit 0')],
    )
    assert run.code == 0, run.err
    assert run.story == [
      *('setup', 'start', 'sleep 30', 'status'),
      *(f'sleep {s}' for s in (30, 60, 120, 240, 480, 480, 480)),
      *('sleep 30', 'status'),
    ]

  def test_a_gcloud_that_fails_creates_nothing(self, call):
    run = call(
      *(*BABYSIT[:3], '--attempts=3', 'train'), state=['1 ERROR: no credentials']
    )
    assert run.code == 1
    assert run.story == ['sleep 30', 'sleep 60']
    assert 'no credentials' in run.err

  @pytest.mark.parametrize(
    'answers',
    [
      {'state': ['1 ERROR: The required property [zone] is not currently set.']},
      {'state': ['1 ERROR: PERMISSION_DENIED: no']},
      {'state': [ABSENT], 'create': ['1 ERROR: INVALID_ARGUMENT: no such type']},
    ],
  )
  def test_what_no_attempt_mends_is_told_at_once(self, call, answers):
    run = call(*BABYSIT, **answers)
    assert run.code == 1
    assert not [k for k in run.kinds if k.startswith('sleep')]
    assert 'error: gcloud refuses, see above' in run.err
    assert answers.get('create', answers['state'])[0][2:] in run.err

  def test_the_wait_is_a_setting(self, call):
    run = call(
      *BABYSIT[:3], '--attempts=3', 'train', create=['1'], state=[ABSENT], wait='0'
    )
    assert run.story == ['create', 'sleep 0', 'create', 'sleep 0', 'create']


# Plays gcloud for a process: success; each look finds the program done.
