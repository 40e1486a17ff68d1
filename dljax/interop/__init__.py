"""Weights to and from other implementations.

    variables = interop.load(resnet.VARIANTS["resnet50"](num_classes=1000),
                             interop.read("resnet50.safetensors"), "torchvision")
    tensors = interop.dump(model, variables, "torchvision")

A source is a table (`interop/<source>.py`) that gives, for each of our parameter paths, the source's name and
how the array is laid out there. Checkpoints are read from safetensors files only: a pickle can run any code.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dljax import errors
from dljax.interop import hub, timm, torch, torchvision
from dljax.interop.table import SAME, Layout, Table

Tensors = Mapping[str, np.ndarray]
Specs = Mapping[str, jax.ShapeDtypeStruct]

OURS = "dljax"  # our own paths as names, "params/conv1/kernel"
# A table, or where the names depend on the model's sizes, what makes one for a model.
SOURCES: Mapping[str, Mapping[type[nn.Module], Table | Callable[[Any], Table]]] = {
    "torch": torch.TABLES,
    "torchvision": torchvision.TABLES,
    "timm": timm.TABLES,
}
_OURS = Table(rules=[("(.*)", r"\1", SAME)], inputs=lambda tensors: ())
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def load(
    model: nn.Module, tensors: Tensors, source: str, *, specs: Specs | None = None, head: Collection[str] = (),
) -> dict[str, Any]:
  """The variables of `model` with the weights of another implementation.

  Args:
    model: the module, with the same sizes as the source's (`num_classes` among them).
    tensors: name -> array, as the source's `state_dict()` has them. Other floating types become float32.
    source: who wrote them: `OURS` (which needs `specs`) or a key of `SOURCES`.
    specs: path ("params/conv1/kernel") -> shape and dtype of the variables wanted; by default those for images of as
      many channels as the tensors have.
    head: paths that are left out together if the source lacks one of them or has it in another shape.

  Returns:
    What `model.init` returns, as NumPy arrays: {"params": ..., "batch_stats": ...}.

  Raises:
    UserError: naming the first tensors that are missing, left over, or of another shape or kind.
  """
  table = find_table(model, source)
  tensors = table.rename(tensors)
  specs = _specs(table, model, tensors) if specs is None else specs
  entries = {path: (spec, *table.find(path)) for path, spec in specs.items()}
  names = {name for _, name, _ in entries.values()}
  if any(path in entries and not _fits(entries[path], tensors) for path in head):
    entries = {path: entry for path, entry in entries.items() if path not in head}
  missing = sorted({name for _, name, _ in entries.values()} - set(tensors))
  if missing:
    raise errors.UserError(f"these weights are no {_describe(model, source)}: {_list(missing)} missing")
  extra = sorted(name for name in set(tensors) - names if not table.holds_no_weight(name))
  if extra:
    raise errors.UserError(f"these weights are no {_describe(model, source)}: {_list(extra)} left over")
  flat = {}
  for path, (spec, name, layout) in entries.items():
    tensor = np.asarray(tensors[name])
    if not _fits((spec, name, layout), tensors):
      shape = jax.eval_shape(layout.to_source, spec).shape
      raise errors.UserError(
          f"{name} has shape {tensor.shape}, but {_describe(model, source)} of these sizes has {shape}: "
          f"{_why(tensor.shape, shape, layout)}")
    if not jnp.issubdtype(tensor.dtype, np.floating):
      raise errors.UserError(f"{name} is {tensor.dtype}, not floating-point: convert it to float32 first")
    flat[path] = np.ascontiguousarray(layout.to_ours(tensor), spec.dtype)
  return traverse_util.unflatten_dict(flat, sep="/")


def recognise(model: nn.Module, tensors: Tensors, specs: Specs | None = None) -> str:
  """Who wrote the weights: `OURS`, or the key of `SOURCES` with the most names in common.

  Args:
    model: the module.
    tensors: name -> array.
    specs: as for `load`.

  Raises:
    UserError: nobody's names are among them.
  """
  if any(name.startswith("params/") for name in tensors):
    return OURS
  common = {}
  for source, tables in SOURCES.items():
    if type(model) in tables:
      table = find_table(model, source)
      paths = _specs(table, model, tensors) if specs is None else specs
      common[source] = len({table.find(path)[0] for path in paths} & set(tensors))
  if not any(common.values()):
    some = ", ".join(sorted(tensors)[:3]) or "none"
    raise errors.UserError(f"these are no weights of a {type(model).__name__} with the names of "
                           f"{' or '.join([OURS, *common])}; the first names are: {some}")
  return max(common, key=common.get)


def dump(model: nn.Module, variables: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
  """The inverse of `load`, bit for bit: tensors under the source's names and in its layout.

  Buffers that hold no weight (`num_batches_tracked`) are left out; `load_state_dict` does without them.

  Args:
    model: the module.
    variables: its variables, e.g. `TrainState.variables`.
    source: for whom: `OURS` or a key of `SOURCES`.
  """
  table = find_table(model, source)
  tensors = {}
  for path, array in traverse_util.flatten_dict(variables, sep="/").items():
    name, layout = table.find(path)
    tensors[name] = np.ascontiguousarray(layout.to_source(np.asarray(array)))
  return tensors


def read(path: str | Path) -> dict[str, np.ndarray]:
  """The tensors of a .safetensors file, or of the Hub's repository "hub:OWNER/NAME", by name.

  Raises:
    UserError: on a file that is missing, damaged, or a pickle.
  """
  import safetensors.numpy  # not needed by those who never read a file

  if str(path).startswith(hub.PREFIX):
    return {name: tensor for part in hub.download(str(path)) for name, tensor in read(part).items()}
  path = Path(path)
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


def _is_pickle(path: Path) -> bool:
  """Whether a file begins as PyTorch's archives or bare pickles do."""
  if not path.is_file():
    return False
  with path.open("rb") as file:
    start = file.read(4)
  return start == b"PK\3\4" or start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")


def find_table(model: nn.Module, source: str) -> Table:
  """The table of names of `model` in `source`; raises `UserError` where there is none."""
  if source == OURS:
    return _OURS
  if source not in SOURCES:
    raise errors.unknown("interop source", source, [OURS, *SOURCES])
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


def _fits(entry: tuple[jax.ShapeDtypeStruct, str, Layout], tensors: Tensors) -> bool:
  """Whether a tensor is there with the shape that it should have."""
  spec, name, layout = entry
  return name in tensors and np.shape(tensors[name]) == jax.eval_shape(layout.to_source, spec).shape


def _why(found: tuple[int, ...], wanted: tuple[int, ...], layout: Layout) -> str:
  """What to look at where a shape is not the one that it should be."""
  if len(found) == len(wanted) == 4:
    ours = lambda shape: jax.eval_shape(layout.to_ours, jax.ShapeDtypeStruct(shape, np.float32)).shape
    (*size, channels, _), (*size_here, channels_here, _) = ours(found), ours(wanted)
    if size == size_here and channels != channels_here and {channels, channels_here} <= {1, 3, 4}:
      return f"they were trained on images of {channels} channels, and these have {channels_here}"
  return "check num_classes and the model's other sizes"


def _describe(model: nn.Module, source: str) -> str:
  return f"{source} {type(model).__name__}"


def _list(names: list[str]) -> str:
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more + (" is" if len(names) == 1 else " are")
