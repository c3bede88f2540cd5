"""tpu.sh itself, with the programs that it finds on the PATH."""

import shutil
import subprocess
import sys

import pytest

from tests.helpers.gcloud_play import BABYSIT

GCLOUD = """#!/bin/bash
printf '%s\\0' "$@" >> "$PLAY"
case $* in
  *'value(networkEndpoints'*) echo 1 ;;
  *'queued-resources describe '*) echo ACTIVE ;;
  *'tpu-vm describe '*) echo READY ;;
  *--status*) echo '== a: exit 0' ;;
esac
"""


@pytest.fixture
def script(repository, tmp_path):
  """Runs tpu.sh itself, where the PATH has these programs and no other."""
  tools = tmp_path / 'tools'
  tools.mkdir()
  (tools / 'gcloud').write_text(GCLOUD)
  (tools / 'gcloud').chmod(0o755)
  for tool in ('bash', 'dirname', 'git'):
    (tools / tool).symlink_to(shutil.which(tool))
  (tools / 'python3').write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
  (tools / 'python3').chmod(0o755)

  def run(*args, **variables):
    environment = {'PATH': str(tools), 'PLAY': str(tmp_path / 'calls')}
    return subprocess.run(
      ['bash', str(repository / 'launch' / 'tpu.sh'), *args],
      env={**environment, 'JAXROBUST_WAIT': '0', **variables},
      capture_output=True,
      text=True,
      cwd=tmp_path,
      timeout=60,
    )

  run.tools = tools
  return run


class TestScript:
  def test_it_babysits_to_the_end(self, script, repository, tmp_path):
    done = script(*BABYSIT, '--x=a b $(touch X)', CDPATH='/')
    assert done.returncode == 0, done.stderr
    assert 'x: done' in done.stderr
    assert (repository / 'runs' / 'launch' / 'x.log').read_text() == '== a: exit 0\n'
    calls = (tmp_path / 'calls').read_text().split('\0')
    command = 'bash jaxrobust/launch/worker.sh --start train --workdir=gs://b/x '
    assert f"--command={command}'--x=a b $(touch X)'" in calls

  def test_without_gcloud_it_says_so(self, script):
    (script.tools / 'gcloud').unlink()
    done = script('status', 'x')
    assert done.returncode == 1
    assert done.stderr.startswith('error: gcloud is not on the PATH: install')
    assert script('status', 'x', '--dry-run').returncode == 0

  def test_an_old_python_is_refused_in_a_line(self, script):
    (script.tools / 'python3').write_text('#!/bin/bash\nexit 1\n')
    done = script('status', 'x')
    assert done.returncode == 1
    assert done.stderr.startswith('error: python3 on the PATH is not Python 3.8')
    assert done.stderr.count('\n') == 1

  def test_a_wait_that_is_no_number_is_refused(self, script):
    done = script(*BABYSIT, JAXROBUST_WAIT='a[$(touch X)]')
    assert done.returncode == 1
    assert done.stderr.endswith(
      'error: JAXROBUST_WAIT=a[$(touch X)]: give seconds, a number from 0 to 99999\n'
    )

  def test_it_ends_quietly_and_leaves_nothing_in_the_folder_for_temporary_files(
    self, script, tmp_path
  ):
    """A Ctrl-C or a TERM, here of gcloud to the process that started it."""
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    for name, number in (('INT', 130), ('TERM', 143), ('HUP', 129)):
      (script.tools / 'gcloud').write_text(f'#!/bin/bash\nkill -{name} $PPID\n')
      done = script(*BABYSIT, TMPDIR=str(temporary))
      assert done.returncode == number, done.stderr
      assert 'Traceback' not in done.stderr
      assert not list(temporary.iterdir())
