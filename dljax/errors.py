"""Errors that print one line and no traceback, and the exit statuses of command lines."""

import contextlib
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

DONE, FAILED, BAD_INPUT, PREEMPTED = 0, 1, 2, 75  # exit status


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
  handler = end_as_ctrl_c()
  try:
    return run()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT
  except RunError as error:
    print(f"error: {error}", file=sys.stderr)
    return FAILED
  except (Preempted, KeyboardInterrupt) as stop:
    print(str(stop) or stopped, file=sys.stderr)
    return PREEMPTED
  finally:
    signal.signal(signal.SIGTERM, handler)


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
  with open(os.devnull, "w") as null:  # for streams that were closed before Python started
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


def end_as_ctrl_c() -> Any:
  """Lets SIGTERM end the process as Ctrl-C does, except in `fit`, which handles both.

  Returns:
    The handler that was installed before.
  """
  return signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns an `OSError` inside (disk full, read-only) into a `RunError` that names `path`."""
  try:
    yield
  except OSError as error:
    raise RunError(f"{path} was not written: {error.strerror or error}") from error


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
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  mend = f"did you mean {' or '.join(near)}?" if near else f"choose one of: {', '.join(known)}"
  return UserError(f"{what}: there is no {name!r}; {mend}")


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
  """Returns `table[name]`, or raises the error of `unknown`."""
  if name not in table:
    raise unknown(what, name, table)
  return table[name]
