"""Folders that hold weights and name their model, and weight files for other libraries.

A folder of ours holds weights.safetensors, whose tensors are named by our paths
("params/stem_conv/kernel", "batch_stats/stem_norm/mean"), and model.json, which names the model:
{"model": "resnet50", "settings": {"num_classes": 1000}, "source": the origin of the weights} (see
`variants.describe`). Its tensors have the dtypes of the file that they came from. A folder of
another library holds config.json, from which the family's file in `interop/families` reads the
sizes (`CONFIGS`); some also say what to write there (`WRITERS`).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from dljax import errors
from dljax.interop import variants
from dljax.interop.files import WHOLE, read
from dljax.interop.weights import (
    OURS, Tensors, all_families, check_finite, check_source, find_table, load)

WEIGHTS, MODEL = "weights.safetensors", "model.json"  # ours
CONFIG = "config.json"  # other libraries'


def write_folder(path: Path, tensors: Tensors, model: Mapping[str, Any]) -> None:
  """Writes a folder, all of it or nothing.

  Args:
    path: the new folder, which must not exist yet.
    tensors: our path -> array.
    model: the content of model.json.
  """
  import safetensors.numpy

  with _appearing(path) as temporary:
    temporary.mkdir()
    safetensors.numpy.save_file(dict(tensors), temporary / WEIGHTS)
    (temporary / MODEL).write_text(json.dumps(model, indent=2) + "\n", "utf-8")


def read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """(tensors by our path, the content of model.json).

  Raises:
    UserError: the folder is not one of ours, or damaged.
  """
  try:
    model = json.loads((path / MODEL).read_text("utf-8"))
    if not (isinstance(model["model"], str) and isinstance(model["settings"], dict)):
      raise ValueError("a field is wrong")
  except (OSError, *errors.MALFORMED) as e:
    raise errors.UserError(f"{path / MODEL} is missing or damaged; convert the weights again") from e
  tensors = read(path / WEIGHTS)
  check_finite(tensors)
  return tensors, model


def from_folder(path: str | Path, source: str) -> tuple[nn.Module, dict[str, Any]]:
  """A model with the sizes that a folder states, and its variables, which are float32.

  Args:
    path: a folder of ours, or a folder as another library writes or downloads it: config.json
      beside model.safetensors, or beside model.safetensors.index.json and the files that it names.
    source: the library that wrote it: `OURS`, or a source whose config.json some family can read.

  Raises:
    UserError: a file is missing or damaged, the model is unknown, or the weights do not fit it.
  """
  path = Path(path).expanduser()
  if source == OURS:
    tensors, model = read_folder(path)
    flat = {path: np.asarray(tensor, np.float32) for path, tensor in tensors.items()}
    variables = traverse_util.unflatten_dict(flat, sep="/")
    return variants.build(model["model"], model["settings"]), variables
  model = model_of(path, source)
  return model, load(model, read(path), source)


def model_of(path: Path, source: str) -> nn.Module:
  """The model that another library's config.json describes; raises as `from_folder` does."""
  check_source("interop source", source)
  tables = [getattr(family, "CONFIGS", {}) for family in all_families()]
  makers = [table[source] for table in tables if source in table]
  if not makers:
    raise errors.UserError(f"{path}: {source} writes no config.json that is known here; make the model, "
                           "and load the weights into it (interop.load, or --model=NAME)")
  file = path / CONFIG
  try:
    config = json.loads(file.read_text("utf-8"))
    if not isinstance(config, dict):
      raise ValueError("it is no object")
  except FileNotFoundError as e:
    raise errors.UserError(
        f"{file}: there is no such file; name the folder that holds it beside the weights") from e
  except (OSError, ValueError, RecursionError) as e:
    raise errors.UserError(f"{file} is no JSON object ({e}); get it again") from e
  for make in makers:
    try:
      model = make(config)
    except errors.UserError as e:
      raise errors.UserError(f"{path}: {e}") from e
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
      raise errors.UserError(f"{file} describes a model of {source} in another form "
                             f"({errors.one_line(e, 100)}); get it again") from e
    if model is not None:
      return model
  naming = ("architecture", "architectures", "model_type", "_class_name")
  says = {key: config[key] for key in naming if key in config}
  raise errors.UserError(
      f"{file}: no family here has this model of {source}: {says or 'it names none'}")


def write_file(path: Path, tensors: Tensors) -> None:
  """Writes a .safetensors file for another library, all of it or nothing; `path` must not exist
  yet.
  """
  with _appearing(path) as temporary:
    _save(tensors, temporary)


def _save(tensors: Tensors, file: Path) -> None:
  import safetensors.numpy

  # Hugging Face's libraries refuse a file without this word.
  safetensors.numpy.save_file(dict(tensors), file, metadata={"format": "pt"})


def config_of(model: nn.Module, source: str) -> dict[str, Any] | None:
  """What `source` writes into config.json for a model; None if that is not known here.

  Raises:
    UserError: the source has no model like it.
  """
  find_table(model, source)
  for family in all_families():
    if write := getattr(family, "WRITERS", {}).get(source, {}).get(type(model)):
      return write(model)
  return None


def write_their_folder(path: Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
  """Writes a folder for another library, all of it or nothing; `path` must not exist yet.

  Args:
    path: the new folder.
    tensors: name -> array, as the library has them.
    config: the content of config.json, to which the tensors' dtype is added.
  """
  dtypes = {str(tensor.dtype) for tensor in tensors.values()}
  if len(dtypes) == 1:
    config = {**config, "dtype": dtypes.pop()}
  with _appearing(path) as temporary:
    temporary.mkdir()
    _save(tensors, temporary / WHOLE)
    (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def check_new(path: Path) -> None:
  """Raises a `UserError` if `path` exists or its parent folder does not."""
  if path.exists():
    raise errors.UserError(f"{path} exists; name another place, or remove it")
  if not path.absolute().parent.is_dir():
    raise errors.UserError(f"{path}: there is no folder {path.absolute().parent}; make it first")


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
  """Yields a temporary path, which becomes `path` at the end, or is removed after an error."""
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
