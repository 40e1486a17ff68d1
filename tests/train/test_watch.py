"""Processes that watch each other, here as threads: who dies is named at once, and all stop at one point."""

import queue
import signal
import socket
import threading
import time

import pytest

from dljax.errors import DONE, FAILED, PREEMPTED, RunError
from dljax.train import watch
from dljax.train.watch import Watch


class Run:
  """The watches of one run, and how they end: (index, line, status) as it comes."""

  def __init__(self, count):
    address = _free_address()
    self.ends = queue.SimpleQueue()
    self.watches = [
        Watch(address, count, i, lambda line, status, i=i: self.ends.put((i, line, status)))
        for i in range(count)]
    self.address = address
    while len(self.watches[0]._channels) < count - 1:
      time.sleep(0.001)

  def ended(self, count):
    """The next ends, by process."""
    return {i: (line, status) for i, line, status in (self.ends.get(timeout=10) for _ in range(count))}

  def die(self, index):
    """What the kernel does for a process that is killed, which says no more."""
    self.watches[index]._tell = lambda text: None
    for channel in [*self.watches[index]._channels.values()]:
      channel.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
  monkeypatch.setattr(watch, "_DELAY", 0.01)
  monkeypatch.setattr(watch, "_GRACE", {FAILED: 0.05, PREEMPTED: 0.05})


@pytest.mark.parametrize("dead, left", [(1, {0, 2}), (0, {1, 2})])
def test_a_process_that_dies_ends_the_others_in_one_line(dead, left):
  run = Run(3)
  run.die(dead)
  ends = {}
  while not ends.keys() >= left:  # the dead one still talks here
    ends |= run.ended(1)
  ends = {i: ends[i] for i in left}
  for line, status in ends.values():
    assert status == FAILED and f"process {dead} of 3 has died" in line and "\n" not in line


def test_processes_that_end_well_end_nobody():
  run = Run(3)
  for i in (1, 0, 2):
    run.watches[i].leave(DONE)
  for i in range(3):
    run.die(i)
  with pytest.raises(queue.Empty):
    run.ends.get(timeout=0.2)


def test_a_process_that_fails_ends_the_others_a_little_later():
  run = Run(3)
  run.watches[1].leave(FAILED)
  ends = run.ended(2)
  assert ends.keys() == {0, 2}
  assert all(status == FAILED and "process 1 of 3 has failed" in line for line, status in ends.values())


def test_a_process_that_is_stopped_alone_stops_the_others(monkeypatch):
  signals = queue.SimpleQueue()
  monkeypatch.setattr(watch.os, "kill", lambda pid, number: signals.put(number))
  run = Run(2)
  run.watches[0].leave(PREEMPTED)
  assert signals.get(timeout=10) == signal.SIGTERM  # by which it may save
  assert run.ended(1)[1][1] == PREEMPTED


@pytest.mark.parametrize("asks", [(0,), (2,), (1, 2, 0)])
def test_all_stop_at_one_point_that_none_has_passed(asks):
  run = Run(3)
  stopped = queue.SimpleQueue()

  def train(i):
    points = 1
    while not run.watches[i].reached():
      points += 1
      time.sleep(0.001 * (i + 1))  # they get ever further apart
    stopped.put(points)

  for i in range(3):
    threading.Thread(target=train, args=(i,), daemon=True).start()
  time.sleep(0.02)
  for i in asks:
    run.watches[i].stop()
  points = [stopped.get(timeout=10) for _ in range(3)]
  assert len(set(points)) == 1 and points[0] > 1
  assert all(w.reached() for w in run.watches)


def test_the_next_point_is_known_before_it_is_reached():
  """So that a process that waits for its compilation need not wait for its end."""
  run = Run(2)
  ahead, behind = run.watches
  assert not ahead.reached() and not ahead.reached() and not behind.reached()
  behind.stop()
  deadline = time.monotonic() + 10
  while not ahead.stops_next() and time.monotonic() < deadline:
    time.sleep(0.001)
  assert ahead.stops_next() and not behind.stops_next()  # which has to come to the other's point first
  assert not behind.reached()
  assert behind.stops_next() and behind.reached() and ahead.reached()


def test_jax_s_connections_pass_through_and_do_not_break_with_the_first_process():
  run = Run(2)
  host, port = run.watches[0].address.split(":")
  service = socket.create_server((host, int(port)))  # JAX's, as JAX would start it
  own = socket.create_connection(run.watches[1].address.split(":"))
  own.sendall(b"PRI * HTTP/2.0")
  there, _ = service.accept()
  assert there.recv(100) == b"PRI * HTTP/2.0"
  there.sendall(b"answer")
  assert own.recv(100) == b"answer"
  there.close()
  own.settimeout(0.1)
  for text in b"", b"heartbeat", b"barrier":  # of which the first is answered by a reset
    own.sendall(text)
    with pytest.raises(TimeoutError):
      own.recv(1)


def test_a_stranger_disturbs_nobody():
  run = Run(2)
  for text in b"dljax 7\n", b"dljax one\n", b"dlja", b"":
    with socket.create_connection(run.address.split(":")) as stranger:
      stranger.sendall(text)
  with pytest.raises(queue.Empty):
    run.ends.get(timeout=0.1)


def _free_address():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def _wait(made):
  """What `wait_for_all` of a watch raises."""
  with pytest.raises(RunError) as error:
    made.wait_for_all()
  return str(error.value)


def test_all_that_have_come_go_on():
  run = Run(3)
  waiting = [threading.Thread(target=w.wait_for_all) for w in run.watches]
  for thread in waiting:
    thread.start()
  for thread in waiting:
    thread.join(10)
    assert not thread.is_alive()


def test_who_has_not_come_in_time_is_named_by_all_others():
  address = _free_address()
  first, third = (Watch(address, 4, i, lambda *_: None, patience=0.1) for i in (0, 2))
  lines = [_wait(first), _wait(third)]
  assert lines[0] == lines[1] and "\n" not in lines[0]
  assert lines[0].startswith("of 4 processes, these have not come: 1, 3, after 0.1 s (DLJAX_JOIN_SECONDS ")


def test_a_first_process_that_has_not_come_in_time_is_named():
  with pytest.raises(RunError, match="^process 0 of 2 does not answer at 127.0.0.1:.*after 0.05 s [(]DLJAX_JOIN_SECONDS"):
    Watch(_free_address(), 2, 1, patience=0.05)
  with socket.create_server(("127.0.0.1", 0)) as silent:  # a stranger has the port
    made = Watch("127.0.0.1:%d" % silent.getsockname()[1], 2, 1, lambda *_: None, patience=0.05)
    assert "process 0 does not say that all have come, after 0.1 s" in _wait(made)


@pytest.mark.parametrize("address, count, index", [
    ("127.0.0.1", 2, 0), ("127.0.0.1:x", 2, 0), (":1", 2, 0), ("a:1", 2, 2), ("a:1", 2, -1)])
def test_an_impossible_place_is_refused(address, count, index):
  with pytest.raises(ValueError):
    Watch(address, count, index)
