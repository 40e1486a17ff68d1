"""Writes predictions: a .jsonl, .json or .csv file, or a folder of drawings and their rows."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dljax import errors
from dljax.errors import UserError
from dljax.train import durable
from dljax.train.workdir import write_csv, write_json


def check(place: Path, drawn: bool) -> None:
  """Raises `UserError` if predictions cannot be written to `place`.

  Args:
    place: a file with a known suffix, or a new or empty folder.
    drawn: whether predictions can be drawn; only drawings go into a folder.
  """
  if place.suffix not in _WRITERS and (place.suffix or not drawn):
    raise UserError(f"--output={place}: must end in {', '.join(_WRITERS)}"
                    + ", or be a new folder" * drawn)
  if not place.absolute().parent.is_dir():
    raise UserError(
        f"--output={place}: there is no folder {place.absolute().parent}; make it first")
  if place.suffix not in _WRITERS and place.is_dir():
    if any(place.iterdir()):
      raise UserError(
          f"--output={place} is not empty, and nothing is written over; name a new folder")
    place /= _ROWS
  _check_writable(place)


def write(
    place: Path, rows: Sequence[Mapping[str, Any]],
    draw: Callable[[], Iterable[tuple[str, bytes] | None]] | None,
    saw: Callable[[], Iterable[bytes]] | None = None,
) -> None:
  """Writes predictions.

  Args:
    place: the file or folder, as `check` accepts it.
    rows: one dict for each prediction, with the same keys.
    draw: () -> each row's picture or sound, see `Experiment.draw`; it is called only if `place` is
      a folder. None if predictions are not drawn.
    saw: () -> for each row a PNG of what the network saw, see `Experiment.saw`; or None.

  Raises:
    RunError: the disk is full, or the like.
  """
  with errors.writing(place):
    if place.suffix in _WRITERS:
      _WRITERS[place.suffix](place, rows)
    else:
      nothing = [None] * len(rows)
      _write_folder(place, rows, draw() if draw else nothing, saw() if saw else nothing)


def _check_writable(place: Path) -> None:
  """Opens the file, because permissions do not show a folder, /proc or a read-only disk."""
  new = not place.exists()
  try:
    place.open("ab").close()
  except OSError as error:
    raise UserError(
        f"--output={place} cannot be written ({error.strerror}); name another file") from None
  if new:
    place.unlink(missing_ok=True)


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
  durable.write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _write_folder(
    folder: Path, rows: Sequence[Mapping[str, Any]], drawings: Iterable[tuple[str, bytes] | None],
    seen: Iterable[bytes | None],
) -> None:
  """Makes a folder with `_ROWS` and each row's drawing, "a.png" for "scans/a.jpg".

  What the network saw of it is "a-seen.png".

  Equal names are numbered from the second on. A prompt that is no file name gives "text.png".
  """
  folder.mkdir(exist_ok=True)
  names: list[str] = []
  named = []
  for row, drawing, picture in zip(rows, drawings, seen, strict=True):
    stem = re.sub(r"\.\w+(\[(\d+)\])?$", lambda end: f"-{end[2]}" if end[2] else "",
                  Path(row["input"]).name)
    if not (stem.isprintable() and 0 < len(stem.encode()) <= _LONGEST_NAME):
      stem = "text"
    numbered = (f"{stem}-{i}" for i in range(2, 2 + len(rows)))
    names.append(next(name for name in (stem, *numbered) if name not in names))
    if drawing is not None:
      suffix, content = drawing
      (folder / f"{names[-1]}{suffix}").write_bytes(content)
      row = {**row, "picture": f"{names[-1]}{suffix}"}
    if picture is not None:
      (folder / f"{names[-1]}-seen.png").write_bytes(picture)
      row = {**row, "seen": f"{names[-1]}-seen.png"}
    named.append(row)
  _write_jsonl(folder / _ROWS, named)


_ROWS = "predictions.jsonl"
_LONGEST_NAME = 200  # bytes; a file system takes 255, suffix and number included
_WRITERS = {".jsonl": _write_jsonl, ".json": write_json, ".csv": write_csv}
