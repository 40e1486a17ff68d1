"""What a run says: the compilations, and the time left."""

import threading
import types

import numpy as np
import pytest

from dljax.errors import Preempted
from dljax.train import progress
from dljax.train.progress import Compilations, Progress
from dljax.train.signals import StopSignals


@pytest.fixture
def clock(monkeypatch):
  """A clock that moves by hand."""
  now = types.SimpleNamespace(seconds=100.0)
  monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
  return now


def test_each_compilation_is_announced_and_timed_once(clock):
  said = []

  def step(state, batch):
    assert said and said[-1].startswith("compiling") or clock.seconds > 100
    clock.seconds += 2.5
    return state + batch["x"].sum()

  compilations = Compilations(said.append)
  announced = compilations.of(step, "train step", batch=1)
  for rows in (3, 3, 4, 3):
    assert announced(1, {"x": np.ones(rows)}) == 1 + rows
  assert said == ["compiling the train step ...", "compiled the train step in 2.5 s",
                  "compiling the train step for another shape of the batch ...",
                  "compiled the train step for another shape of the batch in 2.5 s"]
  assert compilations.seconds == 5.0  # two of the four calls


def test_a_short_compilation_may_pass_in_silence():
  said = []
  waits = threading.Event()
  compilations = Compilations(said.append)
  compilations.of(lambda x: x, "prediction", batch=0, patience=30.0)(np.ones(1))
  assert not said
  slow = compilations.of(lambda x: waits.wait(0.1), "prediction", batch=0, patience=0.01)
  slow(np.ones(1))
  assert said == ["compiling the prediction ...", "compiled the prediction in 0.1 s"]


def test_nothing_is_said_without_a_place_to_say_it(capsys):
  assert Compilations().of(lambda x: 2 * x, "step", batch=0)(np.ones(1)) == 2
  assert capsys.readouterr() == ("", "")


class _Slow:
  """A step whose compilation ends when it may."""

  def __init__(self):
    self.may_end, self.threads = threading.Event(), []

  def lower(self, batch):
    self.threads.append(threading.current_thread())
    return self

  def compile(self):
    assert self.may_end.wait(10)

  def __call__(self, batch):
    self.threads.append(threading.current_thread())
    return batch["x"].sum()


def test_a_compilation_that_nobody_waits_for_goes_on_in_a_thread(monkeypatch):
  step, main, give_up = _Slow(), threading.current_thread(), True
  monkeypatch.setattr(progress, "_aside", [])

  def wait(done):
    assert not done.is_set() or not give_up
    if give_up:
      raise Preempted("stopped")
    assert done.wait(10)

  announced = Compilations(wait=wait).of(step, "evaluation step", batch=0, aside=True)
  with pytest.raises(Preempted):
    announced({"x": np.ones(3)})
  assert progress.still_compiling() and main not in step.threads
  step.may_end.set()
  give_up = False
  assert announced({"x": np.ones(3)}) == announced({"x": np.ones(3)}) == 3  # of which the first compiles
  assert not progress.still_compiling()
  aside, again, *calls = step.threads
  assert main not in (aside, again) and calls == [main, main]


def test_a_signal_ends_the_wait_for_a_compilation():
  signals = StopSignals()
  signals.hold()
  done = threading.Event()
  done.set()
  signals.wait(done)  # it is done, and no signal has come
  signals._note()
  with pytest.raises(Preempted):
    signals.wait(threading.Event())  # which never ends
  with pytest.raises(Preempted):
    signals.wait(done)


@pytest.mark.parametrize("start", [0, 40])
def test_the_time_left_counts_steps_and_evaluations_but_no_compilation(clock, start):
  bar = Progress("lenet digits", start, start + 100, eval_every=20, show=False)
  clock.seconds += 60  # the first step compiles
  bar.advance()
  assert bar.seconds_left() is None
  clock.seconds += 2
  bar.advance()
  assert bar.seconds_left() == 98 * 2  # right from the second step, and nothing is known of evaluations
  for _ in range(18):
    clock.seconds += 2
    bar.advance()
  clock.seconds += 30
  bar.pause(30, evaluation=10)  # of the 30 s, 20 were a compilation
  assert bar.seconds_left() == 80 * 2 + 4 * 10
  clock.seconds += 7
  bar.pause(7)  # a train step of another shape compiled
  clock.seconds += 2
  bar.advance()
  assert bar.seconds_left() == pytest.approx(79 * 2 + 4 * 10)
  bar.close()


def test_the_last_evaluation_is_at_the_end_whatever_the_interval(clock):
  bar = Progress("x", 0, 10, eval_every=4, show=False)
  for _ in range(8):
    clock.seconds += 1
    bar.advance()
  bar.pause(0, evaluation=100)
  assert bar.seconds_left() == 2 + 100
  for _ in range(2):
    clock.seconds += 1
    bar.advance()
  assert bar.seconds_left() == 100  # it comes now
  bar.close()


def test_the_bar_shows_the_time_left(clock, capsys):
  bar = Progress("lenet digits", 0, 100, eval_every=50, show=True)
  for _ in range(3):
    clock.seconds += 36
    bar.advance()
  bar.close()
  err = capsys.readouterr().err
  assert "\r" not in err and err.endswith("\n")  # a log file has whole lines
  last = err.splitlines()[-1]
  assert "lenet digits" in last and "3/100" in last and "<58:12, " in last and "36.00s/step" in last


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_bar_goes_on_when_somebody_sets_the_clock(clock, monkeypatch, capsys, jump):
  bar = Progress("x", 0, 100, eval_every=50, show=True)
  day = progress.time.time() + jump
  monkeypatch.setattr(progress.time, "time", lambda: day)
  monkeypatch.setattr("tqdm.std.time", lambda: day)
  for _ in range(3):
    clock.seconds += 11  # beyond the interval of lines in a file
    bar.advance()
  lines = capsys.readouterr().err.splitlines()
  bar.close()
  assert [line.partition("/100 [")[2][:5] for line in lines[-3:]] == ["00:11", "00:22", "00:33"]


def test_bars_leave_whole_lines_in_a_log_file(capsys):
  """Also one below another, for which the terminal's cursor would go up and down."""
  from tqdm import tqdm

  for _ in tqdm(range(2), desc="outer", file=progress.bar_stream(), mininterval=0):
    for _ in tqdm(range(3), desc="inner", file=progress.bar_stream(), mininterval=0, leave=False):
      pass
  lines = capsys.readouterr().err.splitlines()
  assert lines and not [line for line in lines if not line.startswith(("outer", "inner"))]
