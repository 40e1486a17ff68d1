"""Several processes as one run: when one ends, the others learn of it at once, and all stop at the
same point.

JAX's coordination service declares a process dead after 100 s without a heartbeat, and aborts the
others with a dump of C++ frames. Here every process keeps a TCP connection to the first one.

* The kernel closes a connection when its process dies, however it dies. If a whole machine is gone,
  the kernel's keepalive probes fail within 20 s. A kernel answers them for a process that is stopped
  or starved too, so that load is never taken for death.
* JAX's client aborts its process as soon as it loses the coordinator. It is connected through a
  relay inside its own process, which hides that loss, so that this file can report it in one line.
* A process that dies before it has connected cannot be told from one that is late. The first
  process waits for it until the time is over, and then names it to the others.
* Whoever gets a signal asks the first process to stop. It freezes the counters of all processes,
  and names the next point that none has passed. JAX has such a protocol too, but only the C handler
  that it installs for SIGTERM can start it, and no Ctrl-C or SIGHUP.

The first process listens on the coordinator's port, and passes JAX's own connections on to JAX's
service, so that no second port has to be open.
"""

import contextlib
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from dljax.errors import DONE, FAILED, PREEMPTED, RunError, end_process

_HELLO = b"dljax "  # how a connection begins that is not JAX's
_GRACE = {FAILED: 5, PREEMPTED: 20}  # seconds to end by oneself after another process has
_DELAY = 2  # seconds in which the others may read why the first process ends


class Watch:
  """The connections between the processes of a run.

  Attributes:
    address: the address of JAX's coordination service for this process.
  """

  def __init__(
      self, address: str, count: int, index: int, end: Callable[[str, int], Any] = end_process,
      patience: float = 300,
  ):
    """Connects to the first process, and waits for it; or is that process.

    Args:
      address: host:port, the same in all processes; the port is the first process's.
      count: the number of processes.
      index: the number of this one, from 0.
      end: prints a line and ends this process with a status.
      patience: the seconds in which all processes have to connect.

    Raises:
      RunError: the first process does not answer.
      RuntimeError: the port cannot be used.
      ValueError: the address is not host:port, or there is no such process.
    """
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()) or not 0 <= index < count:
      raise ValueError(f"process {index} of {count} at {address!r}")
    self._count, self._index, self._end, self._patience = count, index, end, patience
    self._changed = threading.Condition()  # of all that follows
    self._points, self._frozen, self._stop = 0, False, None
    self._stopping = False  # whether a point said so
    self._channels: dict[int, socket.socket] = {}
    self._missing: set[int] | None = set(range(1, count)) if index == 0 else None
    self._left: dict[int, int] = {}  # the status of each process that has said how it ended
    self._reported: dict[int, int] = {}  # the points at which the processes were frozen
    self._wishes: queue.SimpleQueue[None] = queue.SimpleQueue()
    if index == 0:
      with socket.create_server(("127.0.0.1", 0)) as free:
        self.address = "127.0.0.1:%d" % free.getsockname()[1]
      bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0]
      self._accept(_listen(bound.strip("[]"), int(port)), self._greet)
    else:
      place = host.strip("[]"), int(port)
      channel = _connect(place, patience, f"process 0 of {count} does not answer at {address}")
      channel.sendall(_HELLO + b"%d\n" % index)
      self._channels[0] = channel
      _thread(self._hear, 0, channel)
      relay = socket.create_server(("127.0.0.1", 0))
      self.address = "127.0.0.1:%d" % relay.getsockname()[1]
      self._accept(relay, lambda own: _relay(own, place, hide=True))
    _thread(self._ask)

  # What the run calls

  def wait_for_all(self) -> None:
    """Waits until all processes have connected; the first process decides when the time is over.

    Raises:
      RunError: some have not connected in time.
    """
    with self._changed:
      if self._index == 0:
        self._changed.wait_for(lambda: not self._missing, self._patience)
        self._tell(" ".join(map(str, ["missing", *sorted(self._missing)])))
      # The first process may have started later than this one.
      elif not self._changed.wait_for(lambda: self._missing is not None, 2 * self._patience):
        raise _late("process 0 does not say that all have come", 2 * self._patience)
      if self._missing:
        names = ", ".join(map(str, sorted(self._missing)))
        raise _late(f"of {self._count} processes, these have not come: {names}", self._patience)

  def reached(self) -> bool:
    """Counts a point; returns whether the run stops there. Every process asks equally often."""
    with self._changed:
      while self._frozen:
        self._changed.wait()
      self._points += 1
      self._stopping = self._stop is not None and self._points >= self._stop
      return self._stopping

  def stops_next(self) -> bool:
    """Whether the run stops at the next point; then no other process is past it."""
    with self._changed:
      return self._stop is not None and self._points + 1 >= self._stop

  def stop(self) -> None:
    """Asks all processes to stop at the next point that none has passed; a handler may call it."""
    self._wishes.put(None)  # the queue's `put` may interrupt itself, and no lock may

  def leave(self, status: int) -> None:
    """Says to the others that this process ends with `status`."""
    with self._changed:
      self._left[self._index] = status
    self._tell(f"left {self._index} {status}")

  # What the connections say

  def _ask(self) -> None:
    self._wishes.get()
    if self._index == 0:
      self._take(0, "stop")
    else:
      self._tell("stop")

  def _take(self, sender: int, word: str, *numbers: int) -> None:
    """Does what a line from another process says."""
    if word == "missing":
      with self._changed:
        self._missing = set(numbers)
        self._changed.notify_all()
    elif word == "left":
      self._take_end(*numbers)
    elif word == "lost":
      self._lose(*numbers)
    elif self._index == 0:
      with self._changed:
        if word == "stop" and not self._frozen and self._stop is None:
          self._frozen, self._reported = True, {0: self._points}
          self._tell("freeze")
        elif word == "points":
          self._reported[sender], = numbers
        self._decide()
    else:
      with self._changed:
        self._frozen = word == "freeze"
        if self._frozen:
          self._tell(f"points {self._points}")
        else:
          self._stop, = numbers
        self._changed.notify_all()

  def _decide(self) -> None:
    """Names the point at which all stop, once all have said how far they are."""
    if self._frozen and self._reported.keys() | self._left.keys() >= set(range(self._count)):
      self._stop = max(self._reported.values()) + 1
      self._frozen = False
      self._tell(f"stop {self._stop}")
      self._changed.notify_all()

  def _take_end(self, index: int, status: int) -> None:
    """Another process has said that it ends."""
    with self._changed:
      self._left[index] = status
      if self._index == 0:
        self._tell(f"left {index} {status}")
        self._decide()
    if status == DONE or index == self._index:
      return
    if status == PREEMPTED:
      line = "stopped, as process {} of {} was; the same command continues"
      if not self._stopping and self._index not in self._left:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
      status, line = FAILED, "error: process {} of {} has failed, and its own output says why"
    timer = threading.Timer(_GRACE[status], self._end, (line.format(index, self._count), status))
    timer.daemon = True
    timer.start()

  def _lose(self, index: int) -> None:
    """A process has ended without a word."""
    if self._index == 0:
      self._tell(f"lost {index}")
      with self._changed:  # this process's end would be the first that the others hear of
        self._changed.wait_for(lambda: not self._channels, _DELAY)
    self._end(f"error: process {index} of {self._count} has died or cannot be reached any more; "
              "the same command, on all hosts, continues from the last checkpoint", FAILED)

  # Sockets

  def _tell(self, text: str) -> None:
    """Sends a line to the first process, or from there to all others."""
    with self._changed:
      for channel in self._channels.values():
        with contextlib.suppress(OSError):  # its reader says that it is gone
          channel.sendall(f"{text}\n".encode())

  def _hear(self, index: int, channel: socket.socket) -> None:
    """Reads the lines of process `index` until it is gone."""
    _keep_alive(channel)
    with contextlib.suppress(OSError), channel.makefile("r") as lines:
      for line in lines:
        word, *numbers = line.split()
        self._take(index, word, *map(int, numbers))
    with self._changed:
      self._channels.pop(index, None)
      self._changed.notify_all()
      gone = index not in self._left
    if gone:
      self._lose(index)

  def _accept(self, listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    def accept() -> None:
      while True:
        with contextlib.suppress(ConnectionError):
          connection, _ = listener.accept()
          connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
          _thread(serve, connection)

    _thread(accept)

  def _greet(self, connection: socket.socket) -> None:
    """Serves a new connection to the first process: a process's, JAX's, or a stranger's."""
    begin = connection.recv(len(_HELLO), socket.MSG_PEEK | socket.MSG_WAITALL)
    if begin != _HELLO:
      host, _, port = self.address.partition(":")
      _relay(connection, (host, int(port)), hide=False)
      return
    line = b""
    while not line.endswith(b"\n") and len(line) < 20 and (byte := connection.recv(1)):
      line += byte
    number = line.removeprefix(_HELLO).strip()
    if not (number.isdigit() and 0 < int(number) < self._count):
      connection.close()
      return
    with self._changed:
      self._channels[int(number)] = connection
      self._missing.discard(int(number))
      self._changed.notify_all()
      if self._frozen:
        self._tell("freeze")
    self._hear(int(number), connection)


def _thread(call: Callable[..., None], *arguments: Any) -> None:
  def run() -> None:
    with contextlib.suppress(OSError):  # a connection that broke: its reader has dealt with it
      call(*arguments)

  threading.Thread(target=run, daemon=True, name="watch").start()


def _listen(host: str, port: int) -> socket.socket:
  """A server socket on all addresses of this machine, or on that of `host`."""
  version_6 = ":" in host or not host and socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
        (host, port), family=socket.AF_INET6 if version_6 else socket.AF_INET, backlog=1024,
        dualstack_ipv6=version_6 and not host)
  except OSError as error:
    raise RuntimeError(f"port {port} cannot be used: {error.strerror or error}") from error


def _late(what: str, seconds: float) -> RunError:
  return RunError(f"{what}, after {seconds:g} s (DLJAX_JOIN_SECONDS sets the time); the "
                  "output of these processes or of their launcher may say why")


def _connect(place: tuple[str, int], patience: float, fault: str) -> socket.socket:
  """A connection to the first process, which may start later."""
  deadline = time.monotonic() + patience
  while True:
    try:
      channel = socket.create_connection(place, timeout=10)
    except OSError as error:
      if time.monotonic() > deadline:
        raise _late(f"{fault} ({error})", patience) from error
      time.sleep(0.1)
      continue
    channel.settimeout(None)
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return channel


def _keep_alive(channel: socket.socket) -> None:
  """Lets the kernel find within 20 s that the machine at the other end is gone."""
  channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3,
                      "TCP_USER_TIMEOUT": 20_000}.items():
    if hasattr(socket, name):  # not all systems have all
      channel.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _relay(own: socket.socket, place: tuple[str, int], hide: bool) -> None:
  """Passes the bytes of a connection on to another place, and its answers back.

  Args:
    own: the connection.
    place: the host and port of the other one.
    hide: whether `own` stays open when the other one is closed.
  """
  try:
    with own, _reach(place) as other:
      def back() -> None:
        _pump(other, own)
        if not hide:
          _close(own)

      _thread(back)
      _pump(own, other)
      if hide:  # what JAX still sends goes nowhere
        with contextlib.suppress(OSError):
          while own.recv(65536):
            pass
      _close(other)
  except OSError:
    pass  # the caller's connection is closed, and it tries again


def _reach(place: tuple[str, int]) -> socket.socket:
  """A connection to JAX's service, which starts a little later than the process."""
  for _ in range(600):
    try:
      connection = socket.create_connection(place)
      connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
      return connection
    except ConnectionRefusedError:
      time.sleep(0.1)
  raise ConnectionRefusedError


def _pump(source: socket.socket, target: socket.socket) -> None:
  with contextlib.suppress(OSError):
    while data := source.recv(65536):
      target.sendall(data)


def _close(connection: socket.socket) -> None:
  with contextlib.suppress(OSError):
    connection.shutdown(socket.SHUT_RDWR)
