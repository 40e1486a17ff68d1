"""The folder that holds weights under our own names, and the files that are written for others.

A folder holds weights.safetensors, whose tensors are named by our paths ("params/stem_conv/kernel",
"batch_stats/stem_norm/mean"), and model.json, which says of which model: {"model": "resnet50", "settings":
{"num_classes": 1000}, "source": where the weights came from}.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dljax import errors
from dljax.interop import Tensors, read

WEIGHTS, MODEL = "weights.safetensors", "model.json"


def write_folder(path: Path, tensors: Tensors, model: Mapping[str, Any]) -> None:
  """Writes a folder, all of it or nothing.

  Args:
    path: must not exist yet.
    tensors: our path -> array.
    model: for model.json.
  """
  import safetensors.numpy

  with _appearing(path) as temporary:
    temporary.mkdir()
    safetensors.numpy.save_file(dict(tensors), temporary / WEIGHTS)
    (temporary / MODEL).write_text(json.dumps(model, indent=2) + "\n")


def read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """(tensors by our path, what model.json holds).

  Raises:
    UserError: the folder is not one of ours, or damaged.
  """
  try:
    model = json.loads((path / MODEL).read_text())
    if not (isinstance(model["model"], str) and isinstance(model["settings"], dict)):
      raise ValueError("a field is wrong")
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.UserError(f"{path / MODEL} is missing or damaged; convert the weights again") from e
  return read(path / WEIGHTS), model


def write_file(path: Path, tensors: Tensors) -> None:
  """Writes a .safetensors file for another library, all of it or nothing; `path` must not exist yet."""
  import safetensors.numpy

  with _appearing(path) as temporary:
    # Hugging Face's libraries refuse a file without this word.
    safetensors.numpy.save_file(dict(tensors), temporary, metadata={"format": "pt"})


def check_new(path: Path) -> None:
  """Raises a `UserError` where `path` exists or there is no folder for it."""
  if path.exists():
    raise errors.UserError(f"{path} exists; name another place, or remove it")
  if not path.absolute().parent.is_dir():
    raise errors.UserError(f"{path}: there is no folder {path.absolute().parent}; make it first")


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
  """Gives a path beside `path` that becomes it at the end, or vanishes."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with errors.writing(path):
      yield temporary
      temporary.rename(path)
  finally:
    if temporary.is_dir():
      shutil.rmtree(temporary)
    else:
      temporary.unlink(missing_ok=True)
