"""The one exception that means "the user can mend this"."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
  """Bad input: one line that names the flag, file or value, and the mend.

  `launch.main` prints it without a traceback and exits with status 2. Raise it before anything is
  written.
  """


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
