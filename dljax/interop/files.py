"""Reads the files that hold weights."""

import json
import re
from pathlib import Path

import numpy as np

from dljax import errors
from dljax.interop import hub

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read(path: str | Path) -> dict[str, np.ndarray]:
  """Tensors by name.

  Args:
    path: a .safetensors file; a folder with model.safetensors, or with
      model.safetensors.index.json and the files that it names; or the Hub's repository
      "hub:OWNER/NAME".

  Raises:
    UserError: the file is missing, damaged or a pickle, or the folder holds no such file.
  """
  import safetensors.numpy  # late, because most runs read no such file

  if str(path).startswith(hub.PREFIX):
    return {name: tensor for part in hub.download(str(path))
            for name, tensor in read(part).items()}
  path = Path(path)
  if path.is_dir():
    return _read_folder(path)
  if path.suffix in PICKLES or _is_pickle(path):
    raise errors.UserError(
        f"{path} is a pickle, which can run any code when opened; convert it where PyTorch is installed: "
        f"safetensors.torch.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')")
  if not path.is_file():
    raise errors.UserError(f"{path}: there is no such file")
  try:
    return safetensors.numpy.load_file(path)
  except Exception as e:
    raise errors.UserError(f"{path} is no safetensors file: {e}") from e


def has_weights(folder: Path) -> bool:
  """Whether `read` finds weights in a folder."""
  return (folder / WHOLE).is_file() or (folder / INDEX).is_file()


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
  """The tensors of a folder, from its one file or from the files that its index names."""
  if (folder / WHOLE).is_file():
    return read(folder / WHOLE)
  index = folder / INDEX
  if not index.is_file():
    raise errors.UserError(
        f"{folder} holds neither {WHOLE} nor {INDEX}; name the .safetensors file")
  try:
    places = json.loads(index.read_text())["weight_map"]
    files = sorted(set(places.values()))
    if not files or not all(re.fullmatch(r"[\w.-]+\.safetensors", file) for file in files):
      raise ValueError("it names no .safetensors files of this folder")
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise errors.UserError(f"{index} is no index of weights ({e}); get the folder again") from e
  parts = {file: read(folder / file) for file in files}
  for name, file in places.items():
    if name not in parts[file]:
      raise errors.UserError(
          f"{index} says that {file} holds {name}, which it does not; get both files again")
  for file, part in parts.items():
    for name in part:
      if places.get(name) != file:
        raise errors.UserError(
            f"{folder / file} holds {name}, but {INDEX} does not say so; get both files again")
  return {name: parts[file][name] for name, file in places.items()}


def _is_pickle(path: Path) -> bool:
  """Whether a file begins as PyTorch's archives or bare pickles do."""
  if not path.is_file():
    return False
  with path.open("rb") as file:
    start = file.read(4)
  return start == b"PK\3\4" or start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
