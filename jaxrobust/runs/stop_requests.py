"""Requests to stop: a program notices them where its state is saved, and ends there."""

from jaxrobust.distributed import parallel
from jaxrobust.errors import PreemptedError
from jaxrobust.runs import metrics
from jaxrobust.runs import workdir as workdirs

SIGNALS = parallel.STOP_SIGNALS  # by which a program is asked


class StopRequests:
  """Notices that a program was asked to stop, or cannot go on in its workdir.

  All processes of a run ask equally often: they agree on when to stop. Requests are
  noticed from when it is made until it is closed, at best by `with`.
  """

  def __init__(self, message: str = ''):
    """`message` says what is kept where `check` stops the program."""
    self._message = message
    self._preemption = parallel.Preemption()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def close(self) -> None:
    """Gives the signals back."""
    self._preemption.close()

  def reached(self) -> bool:
    """Whether to save and stop now.

    Raises:
      UserError: if the workdir was removed; nothing is saved, which would make a part
        of it anew.
    """
    if error := workdirs.removed():
      raise error
    return self._preemption.reached()

  def check(self, during: str = '') -> None:
    """Raises PreemptedError if the program was asked to stop.

    Args:
      during: what it stops during.
    """
    if self.reached():
      during = during and f' during {during}'
      raise PreemptedError(
        f'stopped{during}, {self._message}: run the same command again'
      )

  def progress(self, what: str, total: int, unit: str) -> metrics.Progress:
    """A Progress that checks each time it has advanced."""
    bar = metrics.Progress(what, total, unit)
    advance = bar.advance

    def watched(count, note=''):
      advance(count, note)
      self.check(what)

    bar.advance = watched
    return bar
