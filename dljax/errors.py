"""The two exceptions that are one line instead of a traceback: the user can mend the input; the run has failed."""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
  """Bad input: one line that names the flag, file or value, and the mend.

  `launch.main` prints it without a traceback and exits with status 2. Raise it before anything is
  written.
  """


class RunError(RuntimeError):
  """What was asked for is sound and yet failed: one line that says where, and why.

  `launch.main` prints it without a traceback and exits with status 1.
  """


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
