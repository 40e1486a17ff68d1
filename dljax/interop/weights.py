"""Weights under the names of other implementations: loading and writing them."""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dljax import errors, models
from dljax.interop import families
from dljax.interop.table import SAME, Entry, Layout, Table, is_adapter, merge_adapters

Tensors = Mapping[str, np.ndarray]
Specs = Mapping[str, jax.ShapeDtypeStruct]
# Source -> class -> its table, or a function from a model to its table if the names depend on
# sizes.
Tables = Mapping[str, Mapping[type[nn.Module], Table | Callable[[Any], Table]]]

OURS = "dljax"  # our own paths as names, "params/conv1/kernel"
_OURS = Table(rules=[("(.*)", r"\1", SAME)], inputs=lambda tensors: ())


def load(
    model: nn.Module, tensors: Tensors, source: str, *,
    specs: Specs | None = None, head: Collection[str] = (), partial: bool = False,
    keep_dtype: bool = False,
    image: tuple[int, int] | None = None, note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """The variables of `model` with the weights of another implementation.

  Args:
    model: the module, with the same sizes as the source's (`num_classes` among them).
    tensors: name -> array, as the source's `state_dict()` has them.
    source: the library that wrote them: `OURS` (which needs `specs`) or one of `sources(model)`.
    specs: path ("params/conv1/kernel") -> shape and dtype of the wanted variables; by default
      those for inputs with as many channels as the tensors have.
    head: the paths that are left out together if the source lacks one of them or has it in another
      shape.
    partial: whether arrays of heads may be missing that only some models of the class have (HEADS
      of the family's file); they are then left out. Such arrays may always be left over.
    keep_dtype: whether arrays keep the source's dtype, such as bfloat16, so that `dump` gives the
      same bits; by default all become those of `specs`, which are float32.
    image: the height and width of the images that the variables are for, in pixels; by default
      they are square. Learned positions of patches are interpolated to that size.
    note: gets a line for each array that was interpolated.

  Returns:
    Variables as `model.init` returns them, as NumPy arrays: {"params": ..., "batch_stats": ...}.
    Adapters of a low rank are left out if the source has none.

  Raises:
    UserError: tensors are missing, left over, not finite, or of another shape or kind; it names
      the first.
  """
  table = find_table(model, source)
  tensors = table.rename(tensors)
  specs = _given(model, _specs(table, model, tensors) if specs is None else specs, tensors)
  entries = {entry: _shapes(entry, specs) for entry in table.entries(specs)}
  names = {name for entry in entries for name in entry.names}
  of_head = [entry for entry in entries if not set(head).isdisjoint(entry.paths)]
  if any(_shapes_of(tensors, entry.names) != entries[entry] for entry in of_head):
    entries = {entry: shapes for entry, shapes in entries.items() if entry not in of_head}
  if partial:
    entries = {entry: shapes for entry, shapes in entries.items() if tensors.keys() >= {*entry.names}
               or not re.fullmatch(_heads(model), entry.paths[0])}
  missing = sorted({name for entry in entries for name in entry.names} - set(tensors))
  if missing:
    raise errors.UserError(
        f"these weights are no {_describe(model, source)}: {_list(missing)} missing")
  extra = sorted(name for name in set(tensors) - names if not table.holds_no_weight(name))
  if extra:
    raise errors.UserError(
        f"these weights are no {_describe(model, source)}: {_list(extra)} left over")
  flat = {}
  resizers = getattr(_family(model), "RESIZERS", {}).get(type(model), {})
  check_finite({name: tensors[name] for entry in entries for name in entry.names})
  for entry, shapes in entries.items():
    parts = [np.asarray(tensors[name]) for name in entry.names]
    if resize := resizers.get(entry.paths[0]):
      shape = specs[entry.paths[0]].shape
      parts = [resize(model, *parts, shape, image if source != OURS or parts[0].shape != shape
                      else None, note)]
    for name, part, shape in zip(entry.names, parts, shapes, strict=True):
      if part.shape != shape:
        raise errors.UserError(
            f"{name} has shape {part.shape}, but {_describe(model, source)} of these sizes has "
            f"{shape}: {_why(part.shape, shape, entry.layout)}")
      if not jnp.issubdtype(part.dtype, np.floating):
        raise errors.UserError(
            f"{name} is {part.dtype}, not floating-point: convert it to float32 first")
    for path, array in zip(entry.paths, entry.to_ours(*parts), strict=True):
      flat[path] = np.ascontiguousarray(array, None if keep_dtype else specs[path].dtype)
  return traverse_util.unflatten_dict(flat, sep="/")


def check_finite(tensors: Tensors) -> None:
  """Raises a `UserError` that names the first tensor with a value that is NaN or infinite."""
  for name, tensor in tensors.items():
    array = np.asarray(tensor)
    if jnp.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
      count = array.size - int(np.isfinite(array).sum())
      raise errors.UserError(f"{name} holds {count} of {array.size} values that are NaN or infinite; "
                             "take weights from before they diverged")


def recognise(model: nn.Module, tensors: Tensors, specs: Specs | None = None) -> str:
  """The library that wrote the weights: `OURS`, or the source with the most names in common.

  Args:
    model: the module.
    tensors: name -> array.
    specs: see `load`.

  Raises:
    UserError: the tensors have no source's names.
  """
  if any(name.startswith("params/") for name in tensors):
    return OURS
  common = {}
  for source in sources(model):
    table = find_table(model, source)
    renamed = table.rename(tensors)
    paths = _given(model, _specs(table, model, renamed) if specs is None else specs, renamed)
    names = {name for entry in table.entries(paths) for name in entry.names}
    common[source] = len(names & set(renamed))
  if not any(common.values()):
    some = ", ".join(sorted(tensors)[:3]) or "none"
    raise errors.UserError(f"these are no weights of a {type(model).__name__} with the names of "
                           f"{' or '.join([OURS, *common])}; the first names are: {some}")
  return max(common, key=common.get)


def dump(model: nn.Module, variables: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
  """The inverse of `load`, bit for bit: tensors under the source's names and in its layout, with the
  variables' dtypes.

  Buffers that hold no weight (`num_batches_tracked`) are left out; `load_state_dict` does without
  them. Adapters of a low rank are added to the kernels beside them, unless the source is `OURS`.

  Args:
    model: the module.
    variables: its variables, e.g. `TrainState.variables`.
    source: the library to write for: `OURS` or one of `sources(model)`.
  """
  table = find_table(model, source)
  if source != OURS and getattr(model, "lora_rank", 0):
    from dljax.models import blocks  # late, because most families have no such part

    factor = model.lora_alpha / model.lora_rank
    variables = {**variables, "params": merge_adapters(variables["params"], factor)}
  flat = traverse_util.flatten_dict(variables, sep="/")
  tensors = {}
  for entry in table.entries(flat):
    parts = entry.to_source(*(np.asarray(flat[path]) for path in entry.paths))
    tensors |= zip(entry.names, map(np.ascontiguousarray, parts), strict=True)
  return table.tie(tensors)


def find_table(model: nn.Module, source: str) -> Table:
  """The table of names of `model` in `source`; raises `UserError` if there is none."""
  if source == OURS:
    return dataclasses.replace(_OURS, no_weight=_heads(model))
  if source not in sources(model):
    check_source("interop source", source)
    counterparts = (getattr(family, "TABLES", {}).get(source, ()) for family in all_families())
    known = ", ".join(sorted(kind.__name__ for kinds in counterparts for kind in kinds))
    raise errors.UserError(
        f"{source} has no counterpart of {type(model).__name__}, but of: {known}")
  table = _tables(model)[source][type(model)]
  return table if isinstance(table, Table) else table(model)


def sources(model: nn.Module) -> list[str]:
  """Who else has names for the weights of `model`, such as "torchvision"."""
  return [source for source, kinds in _tables(model).items() if type(model) in kinds]


def all_sources() -> list[str]:
  """The same of any family, whose names are all imported; sorted."""
  return sorted({source for family in all_families() for source in family.TABLES})


def check_source(what: str, source: str) -> None:
  """Checks that `source` is `OURS` or one of `all_sources()`.

  Raises:
    UserError: it is not; the message begins with `what`, such as "--source".
  """
  errors.choose(what, source, dict.fromkeys([OURS, *all_sources()]))


def all_families() -> list[ModuleType]:
  """The module of names of every family.

  This imports all families, so only messages and the conversion command call it: training one
  family imports no other.
  """
  return [importlib.import_module(f"{families.__name__}.{info.name}")
          for info in pkgutil.iter_modules(families.__path__)]


def _tables(model: nn.Module) -> Tables:
  """The `TABLES` of the model's family alone: for dljax/models/x.py that is interop/families/x.py.
  """
  return getattr(_family(model), "TABLES", {})


def _family(model: nn.Module) -> ModuleType | None:
  """The file of names of the model's family, or None."""
  package, _, family = type(model).__module__.rpartition(".")
  if package != models.__name__:
    return None
  name = f"{families.__name__}.{family}"
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name != name:
      raise
    return None


def _heads(model: nn.Module) -> str:
  """The pattern of our paths of heads that only some models of the class have, HEADS of its family.
  """
  return getattr(_family(model), "HEADS", {}).get(type(model), r"(?!)")


def _specs(table: Table, model: nn.Module, tensors: Tensors) -> dict[str, jax.ShapeDtypeStruct]:
  """Path -> shape and dtype of the variables, without computing them."""
  inputs = table.inputs(tensors)
  variables = jax.eval_shape(lambda key, args: model.init(key, *args), jax.random.key(0), inputs)
  return traverse_util.flatten_dict(variables, sep="/")


def _given(model: nn.Module, specs: Specs, tensors: Tensors) -> Specs:
  """The specs without the adapters that the tensors lack."""
  if not getattr(model, "lora_rank", 0):
    return specs
  from dljax.models import blocks

  return {path: spec for path, spec in specs.items()
          if path in tensors or not is_adapter(path)}


def _shapes(entry: Entry, specs: Specs) -> tuple[tuple[int, ...], ...]:
  """The shapes that the tensors of an entry should have."""
  parts = jax.eval_shape(entry.to_source, *(specs[path] for path in entry.paths))
  return tuple(part.shape for part in parts)


def _shapes_of(tensors: Tensors, names: Collection[str]) -> tuple[tuple[int, ...] | None, ...]:
  """The shapes of the named tensors; None for a missing one."""
  return tuple(np.shape(tensors[name]) if name in tensors else None for name in names)


def _why(found: tuple[int, ...], wanted: tuple[int, ...], layout: Layout) -> str:
  """What to check if a shape is wrong."""
  if len(found) == len(wanted) == 4:
    kernels = (jax.ShapeDtypeStruct(shape, np.float32) for shape in (found, wanted))
    (*size, channels, _), (*size_here, channels_here, _) = (
        jax.eval_shape(layout.to_ours, kernel).shape for kernel in kernels)
    if size == size_here and channels != channels_here and {channels, channels_here} <= {1, 3, 4}:
      return f"they were trained on images of {channels} channels, and these have {channels_here}"
  return "check num_classes and the model's other sizes"


def _describe(model: nn.Module, source: str) -> str:
  return f"{source} {type(model).__name__}"


def _list(names: list[str]) -> str:
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more + (" is" if len(names) == 1 else " are")
