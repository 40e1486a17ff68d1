"""What a user asks predictions for: files, folders, or arrays in place of files."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np


def each(
    inputs: Sequence[str | np.ndarray], files: Callable[[Path], Iterable[Path]],
) -> Iterator[tuple[str, Path | np.ndarray]]:
  """Every single input with its name, which is valid Unicode: a file's path, or "array 0" for the
  first array.

  Args:
    inputs: the paths of files and folders, or arrays.
    files: the path of a file or folder -> the files that it names; raises `UserError` if the path
      does not exist.
  """
  arrays = 0
  for given in inputs:
    if isinstance(given, np.ndarray):
      yield f"array {arrays}", given
      arrays += 1
    else:
      for path in files(Path(given)):
        yield _name(path), path


def _name(path: Path) -> str:
  """The path as text that can be printed and written anywhere.

  A byte of a file name that is not UTF-8 becomes \\xHH: Python holds it as half a character, which
  no file and no terminal takes.
  """
  return os.fsencode(path).decode(errors="backslashreplace")
