"""Reads the files that hold weights."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dljax import errors
from dljax.interop import hub
from dljax.interop.table import unwrapped

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
INDEX_END = ".safetensors.index.json"
WHOLE, INDEX = "model.safetensors", f"model{INDEX_END}"


def read(path: str | Path) -> dict[str, np.ndarray]:
  """Tensors by name, without what torch's wrappers (`module.`, `_orig_mod.`) add to names.

  Args:
    path: a .safetensors file; an index of the files that hold the shards, such as
      model.safetensors.index.json; a folder with model.safetensors, or with such an index; or the
      Hub's repository "hub:OWNER/NAME".

  Raises:
    UserError: the file is missing, damaged, a pickle, or one of several shards, or the folder
      holds no such file.
  """
  return unwrapped(_read(path))


def _read(path: str | Path) -> dict[str, np.ndarray]:
  if str(path).startswith(hub.PREFIX):
    return _joined([(part, _read_file(part)) for part in hub.download(str(path))])
  path = Path(path)
  if path.is_dir():
    return _read_folder(path)
  if path.name.endswith(INDEX_END):
    return _read_index(path)
  tensors = _read_file(path)
  if match := hub.SHARD.fullmatch(path.name):
    index = path.with_name(f"{match['stem']}{INDEX_END}")
    beside = "" if index.is_file() else ", which belongs beside it"
    raise errors.UserError(f"{path} is one of {int(match['count'])} shards of the weights; name "
                           f"{index}{beside}")
  return tensors


def has_weights(folder: Path) -> bool:
  """Whether `read` finds weights in a folder."""
  return (folder / WHOLE).is_file() or (folder / INDEX).is_file()


def _read_file(path: Path) -> dict[str, np.ndarray]:
  """The tensors of one .safetensors file."""
  import safetensors.numpy  # late, because most runs read no such file

  if path.suffix in PICKLES or _is_pickle(path):
    raise errors.UserError(
        f"{path} is a pickle, which can run any code when opened; convert it where PyTorch is installed: "
        f"safetensors.torch.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')")
  if not path.is_file():
    raise errors.UserError(f"{path}: there is no such file")
  try:
    return safetensors.numpy.load_file(path)
  except Exception as e:
    raise errors.UserError(
        f"{path} is no safetensors file: {' '.join(str(e).split())[:200]}") from e


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
  """The tensors of a folder, from its one file or from the shards that its index names."""
  if (folder / WHOLE).is_file():
    return _read_file(folder / WHOLE)
  if (folder / INDEX).is_file():
    return _read_index(folder / INDEX)
  raise errors.UserError(f"{folder} holds neither {WHOLE} nor {INDEX}; name the .safetensors "
                         f"file, or the *{INDEX_END} of its shards")


def _joined(shards: Sequence[tuple[Path, Mapping[str, np.ndarray]]]) -> dict[str, np.ndarray]:
  """The tensors of all shards; no two may hold the same."""
  tensors: dict[str, np.ndarray] = {}
  for file, shard in shards:
    for name in shard:
      if name in tensors:
        raise errors.UserError(f"{file} holds {name}, which another shard holds too; get the "
                               "shards again")
    tensors |= shard
  return tensors


def _read_index(index: Path) -> dict[str, np.ndarray]:
  """The tensors of the files that an index names."""
  folder = index.parent
  try:
    places = json.loads(index.read_bytes())["weight_map"]
    files = sorted(set(places.values()))
    if not files or not all(re.fullmatch(r"[\w.-]+\.safetensors", file) for file in files):
      raise ValueError("it names no .safetensors files of this folder")
  except (OSError, *errors.MALFORMED) as e:
    raise errors.UserError(
        f"{index} is no index of weights ({errors.one_line(e)}); get the folder again") from e
  parts = {file: _read_file(folder / file) for file in files}
  for name, file in places.items():
    if name not in parts[file]:
      raise errors.UserError(
          f"{index} says that {file} holds {name}, which it does not; get both files again")
  for file, part in parts.items():
    for name in part:
      if places.get(name) != file:
        raise errors.UserError(
            f"{folder / file} holds {name}, but {index.name} does not say so; get both files "
            "again")
  return {name: parts[file][name] for name, file in places.items()}


def _is_pickle(path: Path) -> bool:
  """Whether a file begins as PyTorch's archives or bare pickles do."""
  if not path.is_file():
    return False
  with path.open("rb") as file:
    start = file.read(4)
  return start == b"PK\3\4" or start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
