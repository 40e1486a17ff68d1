"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import signal
import threading

from dljax.errors import Preempted


class StopSignals:
  """SIGTERM and Ctrl-C while fit runs: between steps they end it at once, within one they wait for its end.

  Attributes:
    wait_for_step: whether to only note the signal.
    received: whether one was noted.
  """

  def __init__(self):
    self.wait_for_step, self.received = False, False
    self._old = {}

  def __enter__(self) -> "StopSignals":
    if threading.current_thread() is threading.main_thread():  # others cannot have handlers
      self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, *_: object) -> None:
    self.received = True
    if not self.wait_for_step:
      raise Preempted("stopped; the same command continues from the last checkpoint")
