"""Keeps a program running on a TPU until it is done: the states of `tpu.sh babysit`."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import NamedTuple

from launch import ROOT, LaunchError, gcloud
from launch.text import say

# Looks in a row, of half a minute each if $JAXROBUST_WAIT does not say otherwise.
SILENT = 60  # Without an answer of all workers, the machine counts as lost.
RAGGED = 10  # With some workers ended and others not, all are started again.
STEADY = 40  # With all workers running, all attempts are given back.
KILLED = 137
LARGEST_PAUSE = 16  # Times the first one.


class Workers(NamedTuple):
  """What workers say of themselves.

  Attributes:
    ended: exit codes of those that do not run any more; KILLED without a record.
    running: how many run.
  """

  ended: list[int]
  running: int


def read(status: str) -> Workers:
  """Reads what `worker.sh --status` prints on all workers; logs are no states."""
  found = re.findall(
    r'^== [^\s:]+: (?:(running)|(stopped)|exit (\d{1,3}))$', status, re.M | re.A
  )
  ended = [int(code or KILLED) for running, _, code in found if not running]
  return Workers(ended, len(found) - len(ended))


def worst(codes: list[int]) -> int:
  """What exit codes of several processes mean together, which contract.sh defines."""
  done = subprocess.run(
    ['bash', '-c', '. launch/contract.sh && worst "$@"', 'worst', *map(str, codes)],
    cwd=str(ROOT),
    stdout=subprocess.PIPE,
    check=True,
  )
  return int(done.stdout)


class Babysitter:
  """Makes, sets up, starts, watches and resumes.

  Args:
    pod: the TPU, with what gcloud.Pod has.
    attempts: how often in a row something may fail.
    wait: time between two looks and the first pause after a failure, in seconds.
  """

  def __init__(self, pod, attempts: int, wait: int):
    self._pod, self._attempts, self._wait = pod, attempts, wait
    self._record = ROOT / 'runs' / 'launch' / f'{pod.name}.log'
    self._answered = False  # Whether gcloud ever has.
    self._started = False
    self._hosts = 1
    self._silent = self._ragged = self._steady = 0
    self._give_back()

  def run(self):
    """Returns once the program is done.

    Raises:
      LaunchError: if it ended with an error, or no attempt is left.
    """
    while not self.step():
      pass

  def step(self) -> bool:
    """Looks once at the TPU and does what its state asks for; True once all is done."""
    state = self._pod.state()
    say(f'{self._pod.name}: {state}')
    if state in ('UNKNOWN', 'REFUSED'):
      self._without_answer(state)
      return False
    self._answered = True
    if state == 'READY':
      return self._ready()
    if state == 'ABSENT':
      self._absent()
    elif state in gcloud.LOST:
      self._lost(state)
    else:
      time.sleep(self._wait)
    return False

  def _without_answer(self, state):
    """Where gcloud has answered before, the connection is gone, and will be back."""
    self._silent = 0
    if self._answered:
      self._pause('gcloud failed')
    elif state == 'REFUSED':
      raise LaunchError('gcloud refuses, see above: correct the flags, or log in')
    else:
      self._again('gcloud failed')

  def _absent(self):
    self._started = False
    failure = self._pod.make()
    if failure == 'REFUSED':
      raise LaunchError('gcloud refuses, see above')
    if failure:
      self._again('create failed')

  def _lost(self, why):
    self._started = False
    self._pod.delete()
    self._again(why)

  def _ready(self):
    if not self._started:
      # The same command resumes, so what may still run from before is started again.
      if not self._pod.begin():
        self._again('the start failed')
        return False
      self._started = True
      self._silent = self._ragged = self._steady = 0
      self._hosts = self._pod.count_hosts()
    time.sleep(self._wait)
    return self._watch(self._pod.look())

  def _watch(self, status):
    """Takes what the workers say, None if they could not be asked."""
    workers = read(status or '')
    # ssh's 255, like any failure of gcloud itself, says nothing of the program; nor do
    # some of the workers without the others.
    if status is None or workers.running + len(workers.ended) < self._hosts:
      self._silent += 1
      if self._silent >= SILENT:
        self._lost('the workers do not answer')
      return False
    self._silent = 0
    self._keep(status)
    code = worst(workers.ended)
    if workers.running and code != 1:
      if not self._stuck(workers):
        return False
      code = code or KILLED
    return self._ended(code, status)

  def _stuck(self, workers):
    """Whether workers run that should have ended, by agreement or by time-out."""
    if workers.ended:
      self._ragged, self._steady = self._ragged + 1, 0
    else:
      self._ragged, self._steady = 0, self._steady + 1
    if self._steady >= STEADY:
      self._give_back()
    return self._ragged >= RAGGED

  def _ended(self, code, status):
    name = self._pod.name
    if code == 0:
      say(f'{name}: done; it costs until bash launch/tpu.sh delete {name}')
      return True
    if code == 1:
      sys.stderr.write(status)
      self._pod.stop()
      raise LaunchError(
        f'the program ended with an error: {self._shown_record()} has the last lines'
      )
    self._started = False
    if code == 42:
      self._give_back()
      self._pause('exit code 42')
    else:
      self._again(f'exit code {code}')
    return False

  def _keep(self, status):
    """Writes what the workers said last, whole or not at all."""
    self._record.parent.mkdir(parents=True, exist_ok=True)
    new = self._record.with_suffix('.log.tmp')
    new.write_text(status, encoding='utf-8')
    new.replace(self._record)

  def _shown_record(self):
    return self._record.relative_to(ROOT)

  def _give_back(self):
    self._left, self._delay = self._attempts, self._wait

  def _again(self, why):
    """After a failure: pauses, or gives up."""
    self._left -= 1
    if self._left <= 0:
      more = f'; {self._shown_record()} has the last lines'
      raise LaunchError(
        f'{why}, and no attempt is left{more if self._record.exists() else ""}'
      )
    self._pause(f'{why}, {self._left} attempts left')

  def _pause(self, why):
    say(f'{why}: again in {self._delay} s')
    time.sleep(self._delay)
    if self._delay < LARGEST_PAUSE * self._wait:
      self._delay *= 2
