"""Files that outlive a power failure, and that show every change.

A file's bytes are on the disk once the file was synchronised (fsync), and its name once the folder
was. So a file is written under another name, synchronised, renamed, and then its folder is
synchronised: whoever looks finds the old file or the new one, whole.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(path: Path, data: bytes) -> None:
  """Writes a file that exists in full or not at all; raises `OSError` where that fails."""
  temporary = path.with_name(path.name + ".tmp")
  try:
    with temporary.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    _remove(temporary)
    raise
  sync(path.parent)


def make_folder(path: Path) -> None:
  """Makes a folder, and those above it, unless they exist; raises `OSError` where that fails."""
  if path.is_dir():
    return
  make_folder(path.parent)
  path.mkdir(exist_ok=True)
  sync(path.parent)


def sync(path: Path) -> None:
  """Makes a file's bytes durable, or the names in a folder."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sealed(value: Mapping[str, Any], **layout: Any) -> bytes:
  """An object's only form as JSON, in which any change shows.

  Args:
    value: the object.
    **layout: arguments of `json.dumps`, which decide the form.

  Returns:
    The object with the hash of all its other fields as "sha256".
  """
  value = {name: part for name, part in value.items() if name != "sha256"}
  digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
  return (json.dumps({**value, "sha256": digest}, **layout) + "\n").encode()


def _remove(path: Path) -> None:
  """Removes what a failed write left, which takes room on a full disk."""
  try:
    path.unlink()
  except OSError:  # it was never made, or is a folder
    pass
