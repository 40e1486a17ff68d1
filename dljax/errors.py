"""Errors that print one line and no traceback, and the exit statuses of command lines."""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

DONE, FAILED, BAD_INPUT, PREEMPTED = 0, 1, 2, 75  # exit status
# What stops a program: a scheduler, Ctrl-C, and a terminal that is closed.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PATIENCE = 10  # seconds that the main thread has to come to a signal's handler


class UserError(ValueError):
  """Bad input: one line that names the flag, file or value, and says what to do.

  A command line prints it without a traceback and exits with status 2. Raise it before anything is
  written.
  """


class RunError(RuntimeError):
  """The input is sound, but the work failed: one line says where and why.

  A command line prints it without a traceback and exits with status 1.
  """


class Preempted(RuntimeError):
  """SIGTERM or Ctrl-C stopped the run. Its work is saved; one line says how to continue."""


def exit_status(run: Callable[[], int], stopped: str) -> int:
  """Calls `run` and returns its exit status; prints one line if it fails.

  Args:
    run: a function that returns an exit status.
    stopped: the line to print if SIGTERM or Ctrl-C ends `run` and no `Preempted` says what was
      saved.

  Returns:
    What `run` returns, or the status that belongs to the error it raises.
  """
  with _lasting_streams():
    return _exit_status(run, stopped)


def _exit_status(run: Callable[[], int], stopped: str) -> int:
  with Stops(_interrupt, stopped) as stops:
    try:
      return run()
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)
      return BAD_INPUT
    except RunError as error:
      print(f"error: {error}", file=sys.stderr)
      return FAILED
    except (Preempted, KeyboardInterrupt) as stop:
      stops.ignore = True  # the program ends already
      print(str(stop) or stopped, file=sys.stderr)
      return PREEMPTED


def _interrupt() -> NoReturn:
  raise KeyboardInterrupt


class Stops:
  """Handles SIGTERM, Ctrl-C and SIGHUP inside a `with` statement.

  Python runs a handler between two instructions of the main thread. While that thread waits for C
  code, as for a compilation, the next instruction may be minutes away. A thread therefore ends the
  process with the status `PREEMPTED` if the handler has not run within 10 s of a signal.

  Attributes:
    ignore: whether signals do nothing.
    may_end: whether the thread may end the process: nothing is lost then.
    writing: whether the main thread writes a file, which also keeps the thread from it.
  """

  def __init__(self, handle: Callable[[], None], line: str):
    """Changes nothing yet.

    Args:
      handle: called in the main thread for each signal; it may raise.
      line: what to print where the thread ends the process.
    """
    self.ignore, self.may_end, self.writing = False, True, False
    self._handle, self._line = handle, line
    self._answered = threading.Event()
    self._old: dict[int, Any] = {}

  def __enter__(self) -> "Stops":
    global _stops
    if threading.current_thread() is not threading.main_thread():
      return self  # other threads cannot have handlers
    for number in STOPS:
      before = signal.getsignal(number)
      if number != signal.SIGHUP or before is not signal.SIG_IGN:  # as `nohup` wants it
        self._old[number] = before
        signal.signal(number, self._answer)
    read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._old_write = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    self._outer, _stops = _stops, self
    threading.Thread(target=self._watch, args=(read,), daemon=True, name="stops").start()
    return self

  def __exit__(self, *_: object) -> None:
    global _stops
    if not self._old:
      return
    _stops = self._outer
    signal.set_wakeup_fd(self._old_write)
    os.close(self._write)
    for number, before in self._old.items():
      # A command that has ended no longer says that there was nothing to save.
      signal.signal(number, signal.SIG_IGN if before is _end_early else before or signal.SIG_DFL)

  def _answer(self, *_: object) -> None:
    self._answered.set()
    if not self.ignore:
      self._handle()

  def _watch(self, read: int) -> None:
    """Waits for the numbers of signals, which Python writes as they come."""
    with open(read, "rb", buffering=0) as numbers:
      while number := numbers.read(1):
        busy = number[0] in STOPS and not self._answered.wait(_PATIENCE)
        if busy and self.may_end and not self.writing:
          end_process(self._line, PREEMPTED)


_stops: Stops | None = None  # what handles signals now


def end_process(line: str, status: int) -> NoReturn:
  """Prints a line and ends the process, whatever its other threads do."""
  # A progress bar leaves its line open.
  bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
  with contextlib.suppress(OSError):  # nobody reads standard error any more
    os.write(2, f"{chr(10) if len(bars) else ''}{line}\n".encode(errors="backslashreplace"))
  os._exit(status)


def stop_early() -> None:
  """Lets signals end the program at once, with one line, until `exit_status` handles them.

  A program calls it in its first line: the imports that follow take seconds.
  """
  _open_descriptors()
  for number in STOPS:
    if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, _end_early)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # see `experiments/__init__.py`


def _open_descriptors() -> None:
  """Opens the null device for each standard stream that was closed before the program started.

  Otherwise the next file that is opened takes its number, and what C code prints (XLA's warnings)
  lands in a checkpoint or in metrics.jsonl.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def _end_early(*_: object) -> NoReturn:
  end_process("stopped before there was anything to save", PREEMPTED)


class _Lasting:
  """A text stream that goes on as the null device once nobody reads it any more."""

  def __init__(self, stream: Any):
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Writes, or drops the text if nobody can read it."""
    with self._dropping():
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    """Flushes, or drops what is buffered if nobody can read it."""
    with self._dropping():
      self._stream.flush()

  @contextlib.contextmanager
  def _dropping(self) -> Iterator[None]:
    try:
      yield
    except OSError:  # a closed pipe or terminal, a full disk
      # What the stream has buffered goes to the null device too, at the latest when Python ends.
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, self._stream.fileno())
      os.close(null)


@contextlib.contextmanager
def _lasting_streams() -> Iterator[None]:
  """Lets a program finish its work although its output is closed, as by `| head -1`."""
  before = sys.stdout, sys.stderr
  with open(os.devnull, "w", encoding="utf-8") as null:  # for streams that were closed before Python started
    sys.stdout, sys.stderr = (_Lasting(null if stream is None else stream) for stream in before)
    try:
      yield
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      sys.stdout, sys.stderr = before


def exit_with(run: Callable[[], int], stopped: str) -> NoReturn:
  """Ends the process with the `exit_status` of `run`."""
  sys.exit(exit_status(run, stopped))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns an `OSError` inside (disk full, read-only) into a `RunError` that names `path`.

  A signal does not end the process inside, so that no part of a file is left: see `Stops`.
  """
  stops = _stops if threading.current_thread() is threading.main_thread() else None
  outer = stops and stops.writing
  try:
    if stops:
      stops.writing = True
    yield
  except OSError as error:
    raise RunError(f"{path} was not written: {error.strerror or error}") from error
  finally:
    if stops:
      stops.writing = outer


# What JSON of another form than expected raises where it is parsed and used.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def one_line(error: BaseException, most: int = 150) -> str:
  """Returns what another library's error says, in one line of at most so many characters."""
  text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
  return " ".join(text.split())[:most] or type(error).__name__


def check_local(what: str, path: str | os.PathLike[str]) -> None:
  """Raises a `UserError` if a path is an address such as gs://bucket/folder.

  Python would take it for a folder "gs:" below the current one.

  Args:
    what: where the user wrote the path, e.g. "--workdir".
    path: the path that the user wrote; `pathlib` makes one slash of two.
  """
  if _ADDRESS.match(os.fsdecode(path)):
    raise UserError(f"{what}={os.fsdecode(path)}: only local paths can be used; copy the files "
                    "to a local folder, or mount the bucket, and name that folder")


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
  """Returns a `UserError` for a name that does not exist, with the nearest names that do.

  Args:
    what: where the user wrote the name, e.g. "--preset" or "--config.optimizer.name".
    name: the name that the user wrote.
    known: the valid names.
  """
  import difflib  # pylint: disable=g-import-not-at-top

  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  mend = f"did you mean {' or '.join(near)}?" if near else f"choose one of: {', '.join(known)}"
  return UserError(f"{what}: there is no {name!r}; {mend}")


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
  """Returns `table[name]`, or raises the error of `unknown`."""
  if name not in table:
    raise unknown(what, name, table)
  return table[name]
