"""Weights to and from other implementations.

    variables = interop.load(resnet.VARIANTS["resnet50"](num_classes=1000),
                             interop.read("resnet50.safetensors"), "torchvision")
    tensors = interop.dump(model, variables, "torchvision")

A source is a table (`interop/<source>.py`) that gives, for each of our parameter paths, the source's name and
how the array is laid out there. Checkpoints are read from safetensors files only: a pickle can run any code.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dljax import errors
from dljax.interop import timm, torch, torchvision
from dljax.interop.table import Table

Tensors = Mapping[str, np.ndarray]

# A table, or where the names depend on the model's sizes, what makes one for a model.
SOURCES: Mapping[str, Mapping[type[nn.Module], Table | Callable[[Any], Table]]] = {
    "torch": torch.TABLES,
    "torchvision": torchvision.TABLES,
    "timm": timm.TABLES,
}
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def load(model: nn.Module, tensors: Tensors, source: str) -> dict[str, Any]:
  """The variables of `model` with the weights of another implementation.

  Args:
    model: the module, with the same sizes as the source's (`num_classes` among them).
    tensors: name -> array, as the source's `state_dict()` has them. Other floating types become float32.
    source: who wrote them: a key of `SOURCES`.

  Returns:
    What `model.init` returns, as NumPy arrays: {"params": ..., "batch_stats": ...}.

  Raises:
    UserError: naming the first tensors that are missing, left over, or of another shape or kind.
  """
  table = _table(model, source)
  entries = {path: (spec, *table.find(path)) for path, spec in _specs(table, model, tensors).items()}
  names = {name for _, name, _ in entries.values()}
  missing = sorted(names - set(tensors))
  if missing:
    raise errors.UserError(f"these weights are no {_describe(model, source)}: {_list(missing)} missing")
  extra = sorted(name for name in set(tensors) - names if not table.holds_no_weight(name))
  if extra:
    raise errors.UserError(f"these weights are no {_describe(model, source)}: {_list(extra)} left over")
  flat = {}
  for path, (spec, name, layout) in entries.items():
    tensor = np.asarray(tensors[name])
    shape = jax.eval_shape(layout.to_source, spec).shape
    if tensor.shape != shape:
      raise errors.UserError(
          f"{name} has shape {tensor.shape}, but {_describe(model, source)} of these sizes has {shape}: "
          "check num_classes and the model's other sizes")
    if not jnp.issubdtype(tensor.dtype, np.floating):
      raise errors.UserError(f"{name} is {tensor.dtype}, not floating-point: convert it to float32 first")
    flat[path] = np.ascontiguousarray(layout.to_ours(tensor), spec.dtype)
  return traverse_util.unflatten_dict(flat, sep="/")


def dump(model: nn.Module, variables: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
  """The inverse of `load`, bit for bit: tensors under the source's names and in its layout.

  Buffers that hold no weight (`num_batches_tracked`) are left out; `load_state_dict` does without them.

  Args:
    model: the module.
    variables: its variables, e.g. `TrainState.variables`.
    source: for whom: a key of `SOURCES`.
  """
  table = _table(model, source)
  tensors = {}
  for path, array in traverse_util.flatten_dict(variables, sep="/").items():
    name, layout = table.find(path)
    tensors[name] = np.ascontiguousarray(layout.to_source(np.asarray(array)))
  return tensors


def read(path: str | Path) -> dict[str, np.ndarray]:
  """The tensors of a .safetensors file, by name.

  Raises:
    UserError: on a file that is missing, damaged, or a pickle.
  """
  import safetensors.numpy  # not needed by those who never read a file

  path = Path(path)
  if path.suffix in PICKLES:
    raise errors.UserError(
        f"{path} is a pickle, which can run any code when opened; convert it where PyTorch is installed: "
        f"safetensors.torch.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')")
  if not path.is_file():
    raise errors.UserError(f"{path}: there is no such file")
  try:
    return safetensors.numpy.load_file(path)
  except Exception as e:
    raise errors.UserError(f"{path} is no safetensors file: {e}") from e


def _table(model: nn.Module, source: str) -> Table:
  if source not in SOURCES:
    raise errors.unknown("interop source", source, SOURCES)
  tables = SOURCES[source]
  if type(model) not in tables:
    known = ", ".join(sorted(kind.__name__ for kind in tables))
    raise errors.UserError(f"{source} has no counterpart of {type(model).__name__}, but of: {known}")
  table = tables[type(model)]
  return table if isinstance(table, Table) else table(model)


def _specs(table: Table, model: nn.Module, tensors: Tensors) -> dict[str, jax.ShapeDtypeStruct]:
  """Path -> shape and dtype of the variables, without computing them."""
  inputs = table.inputs(tensors)
  variables = jax.eval_shape(lambda key, args: model.init(key, *args), jax.random.key(0), inputs)
  return traverse_util.flatten_dict(variables, sep="/")


def _describe(model: nn.Module, source: str) -> str:
  return f"{source} {type(model).__name__}"


def _list(names: list[str]) -> str:
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more + (" is" if len(names) == 1 else " are")
