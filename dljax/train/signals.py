"""SIGTERM, Ctrl-C and SIGHUP: a run finishes its step, saves, and ends."""

import threading

import jax

from dljax.errors import Preempted, Stops
from dljax.train import hosts, parallel

_POLL = 0.1  # seconds between two looks at whether a signal has come
_LINE = "stopped; the same command continues from the last checkpoint"


class StopSignals(Stops):
  """Handles the signals while `fit` runs: they end it at once, or at the next point that all hosts
  reach, which is the end of a step or of a batch of an evaluation. The compilation of an evaluation
  goes on in a thread, and is not waited for.

  Attributes:
    received: whether a signal has come to this host.
  """

  def __init__(self):
    super().__init__(self._note, _LINE)
    self.received = False

  def hold(self) -> None:
    """Lets signals wait for `reached` from now on: there is something to save."""
    self.may_end = False

  def release(self, line: str = _LINE) -> None:
    """Lets signals end the run at once from now on.

    Raises:
      Preempted: one came while they had to wait.
    """
    self.check(line)
    self.may_end = True

  def reached(self) -> bool:
    """Whether the run has to stop here; the same on all hosts, which ask equally often."""
    if jax.process_count() == 1:
      return self.received
    watch = hosts.watch()
    # Who joined the hosts without `parallel.initialize` pays for a collective.
    return watch.reached() if watch else parallel.any_host(self.received)

  def check(self, line: str = _LINE) -> None:
    """Raises `Preempted` with this line if the run has to stop here; see `reached`."""
    if self.reached():
      raise Preempted(line)

  def wait(self, done: threading.Event) -> None:
    """Waits until `done` is set, as by a compilation; the end is a point, see `reached`.

    Raises:
      Preempted: the run stops at this point, whether or not `done` is set.
    """
    while not (done.wait(_POLL) or self._stops_next()):
      pass
    self.check()

  def _stops_next(self) -> bool:
    """Whether it is known that the run stops at the next point."""
    if jax.process_count() == 1:
      return self.received
    watch = hosts.watch()
    return watch is not None and watch.stops_next()

  def _note(self) -> None:
    self.received = True
    if self.may_end:
      raise Preempted(_LINE)
    if watch := hosts.watch():
      watch.stop()
