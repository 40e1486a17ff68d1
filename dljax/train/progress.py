"""What a run says while it works: what it compiles, how far it is, and how long it still takes."""

import contextlib
import functools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax


class Compilations:
  """Says what is being compiled and how long that took, and adds up the time.

  A compiled step is compiled when it is first called with a batch of some shape, within that call.

  Attributes:
    seconds: the time that the compilations have taken so far.
    say: shows a line, or does nothing.
    quiet: whether it shows no lines; then no bar is shown either.
  """

  def __init__(
      self, say: Callable[[str], None] | None = None,
      wait: Callable[[threading.Event], None] | None = None,
  ):
    """
    Args:
      say: shows a line; None shows none.
      wait: waits for an event, and may raise an error before it. While it waits, a thread compiles,
        because XLA cannot be interrupted. With None the call itself compiles.
    """
    self.seconds, self._wait = 0.0, wait
    self.quiet, self.say = say is None, say or (lambda text: None)

  def of(
      self, step: Callable[..., Any], name: str, batch: int, patience: float = 0.0,
      aside: bool = False,
  ) -> Callable[..., Any]:
    """Returns `step`, which now says when it compiles.

    Args:
      step: a function that `parallel.compile_step` gave.
      name: what it is, such as "train step".
      batch: which argument has the shapes that it is compiled for.
      patience: the seconds that it may take before anything is said.
      aside: whether a thread compiles, so that a signal need not wait; see `wait`.
    """
    seen = set()

    @functools.wraps(step)
    def announced(*arguments: Any) -> Any:
      shapes = tuple(x.shape for x in jax.tree.leaves(arguments[batch]))
      if shapes in seen:
        return step(*arguments)
      more = " for another shape of the batch" if seen else ""
      start = time.monotonic()
      with _later(patience, lambda: self.say(f"compiling the {name}{more} ...")):
        if aside and self._wait:
          self._wait(_compile_aside(step, arguments))
        out = step(*arguments)
      seen.add(shapes)
      seconds = time.monotonic() - start
      self.seconds += seconds
      if seconds >= patience:
        self.say(f"compiled the {name}{more} in {seconds:.1f} s")
      return out

    return announced


_aside: list[threading.Event] = []  # of each compilation in a thread, set when it is done


def still_compiling() -> bool:
  """Whether a thread still compiles; until it is done Python cannot end in the usual way."""
  return not all(done.is_set() for done in _aside)


def _compile_aside(step: Callable[..., Any], arguments: Any) -> threading.Event:
  """Compiles in a thread what the call `step(*arguments)` will need; sets the event at the end."""
  done = threading.Event()
  _aside.append(done)

  def compile_step() -> None:
    try:
      step.lower(*arguments).compile()
    except Exception:  # pylint: disable=broad-exception-caught
      pass  # the call fails in the same way, and says so
    finally:
      done.set()

  threading.Thread(target=compile_step, daemon=True, name="compile").start()
  return done


@contextlib.contextmanager
def _later(seconds: float, act: Callable[[], None]) -> Iterator[None]:
  """Calls `act` after so many seconds, unless what happens inside has ended by then."""
  if not seconds:
    act()
    yield
    return
  timer = threading.Timer(seconds, act)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    timer.join()


_CURSOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # how a bar below another moves the cursor


class _Lines:
  """A log file, in which every state of a bar is a line; nothing goes back in a file."""

  def write(self, text: str) -> None:
    if line := _CURSOR.sub("", text).strip("\r\n "):
      sys.stderr.write(line + "\n")

  def __getattr__(self, name: str) -> Any:
    return getattr(sys.stderr, name)


def bar_stream() -> Any:
  """Where progress bars are written: the terminal, or a log file a line at a time."""
  return sys.stderr if sys.stderr.isatty() else _Lines()


class Progress:
  """A progress bar with the newest numbers and the time left; on a terminal or in a log file.

  The time left is that of the remaining steps and evaluations, each as long as those before. What
  was compiled does not count, nor do the steps that an earlier call has made.
  """

  def __init__(self, name: str, start: int, total: int, eval_every: int, show: bool):
    """
    Args:
      name: what the bar is called.
      start: the number of steps that are done.
      total: the number of steps at the end.
      eval_every: the interval of evaluations, of which one is at the end.
      show: whether to show anything; on the first host.
    """
    self._done, self._total, self._every = start, total, eval_every
    self._first: tuple[int, float] | None = None  # the step that the clock starts after, and when
    self._paused = self._evaluation = 0.0  # seconds; the second of the newest evaluation
    # In a file each refresh is a line: one in ten seconds is enough.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    self._bar = _bar_class()(
        total=total, initial=start, desc=name, unit="step", mininterval=interval,
        maxinterval=interval, dynamic_ncols=True, file=bar_stream(), disable=not (show and jax.process_index() == 0),
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]")
    self._bar.times = self._times

  def advance(self) -> None:
    """Counts a step that was dispatched. The first one compiled, and only starts the clock."""
    self._done += 1
    if self._first is None:
      self._first = self._done, time.monotonic()
    self._bar.update(1)

  def pause(self, seconds: float, evaluation: float | None = None) -> None:
    """Takes out time in which no step was made.

    Args:
      seconds: the time.
      evaluation: how much of it the next evaluation takes too, if this was one.
    """
    if self._first is not None:
      self._paused += seconds
    if evaluation is not None:
      self._evaluation = evaluation

  def seconds_left(self) -> float | None:
    """The time until the last evaluation has ended; None before the second step."""
    rate = self._rate()
    if rate is None:
      return None
    passed, whole = (step // self._every for step in (self._done, self._total))
    evaluations = whole - passed + (self._total % self._every > 0)
    return (self._total - self._done) / rate + max(evaluations, 0) * self._evaluation

  def show(self, values: Mapping[str, float]) -> None:
    """Shows the newest numbers beside the bar."""
    self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)

  def close(self) -> None:
    """Leaves the last state of the bar on the screen."""
    self._bar.close()

  def _rate(self) -> float | None:
    """Steps in a second of training."""
    if self._first is None or self._done == self._first[0]:
      return None
    took = time.monotonic() - self._first[1] - self._paused
    return (self._done - self._first[0]) / max(took, 1e-9)

  def _times(self) -> dict[str, Any]:
    """The fields of the bar's text that are not tqdm's own."""
    left = self.seconds_left()
    return {"rate": self._rate(),
            "left": "?" if left is None else self._bar.format_interval(left)}


_BEGIN = time.time() - time.monotonic()


def _steady() -> float:
  """Seconds since 1970, by a clock that nobody sets while the program runs."""
  return _BEGIN + time.monotonic()


def _bar_class() -> type:
  """tqdm's bar, with the fields of `Progress`; imported late, as other commands need no bar."""
  from tqdm import tqdm  # pylint: disable=g-import-not-at-top

  class Bar(tqdm):
    """A bar whose text has more fields."""

    times: Callable[[], Mapping[str, Any]] = dict
    # tqdm reads the wall clock: once that is set back by an hour, it shows nothing for an hour.
    _time = property(lambda self: _steady, lambda self, value: None)

    @property
    def format_dict(self):
      return {**super().format_dict, "left": "?", **self.times()}

  return Bar
