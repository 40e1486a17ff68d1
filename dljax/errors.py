"""Errors that end in one line instead of a traceback, and the exit statuses of command lines."""

import contextlib
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

DONE, FAILED, BAD_INPUT, PREEMPTED = 0, 1, 2, 75  # exit status


class UserError(ValueError):
  """Bad input: one line that names the flag, file or value, and the mend.

  A command line prints it without a traceback and exits with status 2. Raise it before anything is
  written.
  """


class RunError(RuntimeError):
  """What was asked for is sound and yet failed: one line that says where, and why.

  A command line prints it without a traceback and exits with status 1.
  """


class Preempted(RuntimeError):
  """SIGTERM or Ctrl-C stopped the run, whose work is saved; one line says how to continue."""


def exit_status(run: Callable[[], int], stopped: str) -> int:
  """What `run` gives, or the status of its error, of which one line is printed.

  Args:
    run: gives the exit status.
    stopped: the line to print where SIGTERM or Ctrl-C ends `run` and no `Preempted` says what
      was saved.
  """
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


def exit_with(run: Callable[[], int], stopped: str) -> NoReturn:
  """Exits with the `exit_status` of `run`."""
  status = exit_status(run, stopped)
  sys.stdout.flush()
  sys.exit(status)


def end_as_ctrl_c() -> Any:
  """Lets SIGTERM end the process as Ctrl-C does, except in `fit`, which handles both.

  Returns:
    The handler that was there.
  """
  return signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Makes the `OSError` of a write inside (disk full, read-only) a `RunError` that names `path`."""
  try:
    yield
  except OSError as error:
    raise RunError(f"{path} was not written: {error.strerror or error}") from error


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
  """A `UserError` for a name that does not exist, with the nearest names that do.

  Args:
    what: what the name should have named, e.g. "--preset" or "--config.optimizer.name".
    name: what the user wrote.
    known: the valid names.
  """
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  mend = f"did you mean {' or '.join(near)}?" if near else f"choose one of: {', '.join(known)}"
  return UserError(f"{what}: there is no {name!r}; {mend}")


def choose(what: str, name: str, table: Mapping[str, T]) -> T:
  """`table[name]`, or the error of `unknown`."""
  if name not in table:
    raise unknown(what, name, table)
  return table[name]
