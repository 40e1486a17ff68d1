"""SIGTERM and Ctrl-C: a run finishes its step, saves, and ends."""

import signal
import threading

from dljax.errors import Preempted


class StopSignals:
  """Handles SIGTERM and Ctrl-C while `fit` runs: between steps they end it at once, and during a
  step they wait for its end.

  Attributes:
    wait_for_step: whether to record a signal only, because a step is running.
    received: whether a signal was recorded.
  """

  def __init__(self):
    self.wait_for_step, self.received = False, False
    self._old = {}

  def __enter__(self) -> "StopSignals":
    if threading.current_thread() is threading.main_thread():  # other threads cannot have handlers
      self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, *_: object) -> None:
    self.received = True
    if not self.wait_for_step:
      raise Preempted("stopped; the same command continues from the last checkpoint")
