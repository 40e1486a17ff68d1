"""A module from its name: a key of any family's VARIANTS, and the settings that it takes."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dljax import errors, interop, models

_NOT_SETTINGS = ("parent", "name", "dtype", "remat")


def find(name: str) -> Callable[..., nn.Module]:
  """The constructor of `name`, such as "resnet50", whatever the family.

  Raises:
    UserError: no family has it.
  """
  modules = (f"{models.__name__}.{info.name}" for info in pkgutil.iter_modules(models.__path__))
  families = map(importlib.import_module, modules)
  table = {key: variant for family in families for key, variant in getattr(family, "VARIANTS", {}).items()}
  return errors.choose("--model", name, table)


def build(name: str, settings: Mapping[str, Any]) -> nn.Module:
  """The module `name` with `settings`, among which `num_classes` may be missing.

  Raises:
    UserError: an unknown name or setting.
  """
  variant = find(name)
  known = _settings(variant)
  for key in settings:
    if key not in known:
      raise errors.unknown(f"--set: {name}", key, known)
  plain = lambda value: tuple(value) if isinstance(value, list) else value  # modules must be hashable
  unset = {"num_classes": 1} if "num_classes" in known else {}
  try:
    return variant(**unset | {key: plain(value) for key, value in settings.items()})
  except TypeError as e:
    raise errors.UserError(f"--set: {name} cannot be made: {e}") from None


def settings_of(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
  """Those fields of a config that set an attribute of the same name and type of the module `name`."""
  known = _settings(find(name))
  return {key: value for key, value in config.items() if key in known and type(value) is type(known[key].default)}


def _settings(variant: Callable[..., nn.Module]) -> dict[str, inspect.Parameter]:
  return {key: p for key, p in inspect.signature(variant).parameters.items() if key not in _NOT_SETTINGS}


class HeadArray(NamedTuple):
  """A variable whose size depends on the number of classes.

  Attributes:
    rank: of the array.
    axis: whose size is slope * classes + offset.
    slope, offset: see there.
  """

  rank: int
  axis: int
  slope: int
  offset: int


def head(init: Callable[[int], Any]) -> dict[str, HeadArray]:
  """Which variables depend on the number of classes, found by asking for two and for three.

  Args:
    init: number of classes -> variables; is only traced.

  Returns:
    Path ("params/head/kernel") -> how.
  """
  two, three = (traverse_util.flatten_dict(jax.eval_shape(lambda: init(n)), sep="/") for n in (2, 3))
  found = {}
  for path, spec in two.items():
    for axis, (a, b) in enumerate(zip(spec.shape, three[path].shape)):
      if a != b:
        found[path] = HeadArray(len(spec.shape), axis, b - a, a - 2 * (b - a))
  return found


def num_classes(model: nn.Module, tensors: interop.Tensors, source: str) -> int | None:
  """How many classes another implementation's weights are for; None where the head is not among them.

  Args:
    model: a module with an attribute `num_classes`, of any value.
    tensors: name -> array, as the source has them.
    source: a key of `interop.SOURCES`.
  """
  table = interop.find_table(model, source)
  inputs = table.inputs(tensors)

  def init(classes: int) -> Any:
    return model.clone(num_classes=classes).init(jax.random.key(0), *(jnp.zeros(x.shape, x.dtype) for x in inputs))

  for path, array in head(init).items():
    name, layout = table.find(path)
    if np.ndim(tensors.get(name)) == array.rank:
      shape = jax.eval_shape(layout.to_ours, jax.ShapeDtypeStruct(np.shape(tensors[name]), np.float32)).shape
      classes, rest = divmod(shape[array.axis] - array.offset, array.slope)
      if not rest and classes > 0:
        return classes
  return None
