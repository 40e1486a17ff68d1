"""Builds a module from its description, {"model": name, "settings": {field: value}}, and describes
one.

The name is a key of any family's VARIANTS, such as "resnet50"; a class without variants is named
as "rnn.Stack". The settings are the module's fields that differ from the variant, as JSON. A value
that JSON lacks becomes an object with its own key: {"callable": "flax.linen.relu"}, {"partial":
"dljax.models.layers.BatchNorm", "settings": {...}} for `functools.partial`, {"tuple":
"dljax.models.efficientnet.Stage", "settings": {...}} for a named tuple, {"mapping": {...}} for a
mapping, and {"model": ..., "settings": ...} for a module in a module. Only names in `dljax.models`,
`flax.linen` and `jax.nn` are looked up, so that a file can run nothing else.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import core, traverse_util

from dljax import errors, models
from dljax.interop.weights import Tensors, find_table

_NOT_SETTINGS = ("parent", "name", "dtype", "remat")  # they say how a model runs, not which it is
_OPEN = ("flax.linen", "jax.nn")  # callables are looked up here and in `dljax.models`


def find(name: str) -> Callable[..., nn.Module]:
  """The constructor of the model `name`, such as "resnet50", of any family.

  If `name` begins with the family's name, no other family is imported.

  Raises:
    UserError: no family has such a model.
  """
  known = [info.name for info in pkgutil.iter_modules(models.__path__)]
  family, _, kind = name.partition(".")
  if family in known and kind:
    found = getattr(_family(family), kind, None)
    if isinstance(found, type) and issubclass(found, nn.Module):
      return found
  for family in known:
    if name.startswith(family) and name in _variants(family):
      return _variants(family)[name]
  table = {key: variant for family in known for key, variant in _variants(family).items()}
  return errors.choose("--model", name, table)


def _family(name: str) -> Any:
  return importlib.import_module(f"{models.__name__}.{name}")


def _variants(family: str) -> Mapping[str, Callable[..., nn.Module]]:
  return getattr(_family(family), "VARIANTS", {})


def build(model: str, settings: Mapping[str, Any]) -> nn.Module:
  """The module of a name, with settings, of which `num_classes` may be missing.

  Raises:
    UserError: an unknown name or setting.
  """
  variant = find(model)
  known = _settings(variant)
  for key in settings:
    if key not in known:
      raise errors.unknown(f"--set: {model}", key, known)
  unset = {"num_classes": 1} if "num_classes" in known else {}
  try:
    return variant(**unset | {key: _decode(value) for key, value in settings.items()})
  except errors.UserError:
    raise
  except errors.MALFORMED as e:
    raise errors.UserError(f"--set: {model} cannot be made: {errors.one_line(e, 200)}") from None


def describe(model: nn.Module | None) -> dict[str, Any] | None:
  """The description {"model": name, "settings": {...}} from which `build` makes `model` again.

  It leaves out dtype and remat. It names the variant of the model's class that needs the fewest
  settings.

  Returns:
    None if there is no model, it is not from `dljax.models`, or a setting is a callable that
    cannot be looked up.
  """
  package, _, family = type(model).__module__.rpartition(".")
  if package != models.__name__:
    return None
  of_class = {name: variant for name, variant in _variants(family).items()
              if getattr(variant, "func", variant) is type(model)}
  values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
  found = []
  for name, variant in (of_class or {f"{family}.{type(model).__name__}": type(model)}).items():
    settings = {key: values[key] for key, parameter in _settings(variant).items()
                if not _same(values[key], parameter.default)}
    found.append({"model": name, "settings": settings})
  nearest = min(found, key=lambda entry: len(entry["settings"]))
  try:
    return nearest | {"settings": _encode_all(nearest["settings"])}
  except _NoJSONError:
    return None


def _settings(variant: Callable[..., nn.Module]) -> dict[str, inspect.Parameter]:
  parameters = inspect.signature(variant).parameters
  return {key: parameter for key, parameter in parameters.items() if key not in _NOT_SETTINGS}


class _NoJSONError(Exception):
  """A value that has no form in JSON."""


def _same(value: Any, default: Any) -> bool:
  try:
    return value is default or _encode(value) == _encode(default)
  except _NoJSONError:
    return False


def _encode(value: Any) -> Any:
  """The JSON of a setting."""
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, nn.Module):
    if (module := describe(value)) is None:
      raise _NoJSONError
    return module
  if hasattr(value, "_asdict"):
    return {"tuple": _reference(type(value)), "settings": _encode_all(value._asdict())}
  if isinstance(value, (tuple, list)):
    return [_encode(item) for item in value]
  if isinstance(value, Mapping):
    return {"mapping": _encode_all(value)}
  if isinstance(value, functools.partial) and not value.args:
    return {"partial": _reference(value.func), "settings": _encode_all(value.keywords)}
  return {"callable": _reference(value)}


def _encode_all(settings: Mapping[str, Any]) -> dict[str, Any]:
  return {key: _encode(value) for key, value in settings.items()}


def _decode(value: Any) -> Any:
  """The reverse of `_encode`; a list becomes a tuple and a mapping is frozen, because modules must
  be hashable.
  """
  if isinstance(value, (tuple, list)):
    return tuple(map(_decode, value))
  if not isinstance(value, dict):
    return value
  if "model" in value:
    return build(value["model"], value["settings"])
  if "mapping" in value:
    return core.freeze({key: _decode(item) for key, item in value["mapping"].items()})
  settings = {key: _decode(item) for key, item in value.get("settings", {}).items()}
  if "partial" in value:
    return functools.partial(_look_up(value["partial"]), **settings)
  if "tuple" in value:
    return _look_up(value["tuple"])(**settings)
  return _look_up(value.get("callable", ""))


def _reference(value: Any) -> str:
  """The dotted name of a class or a function."""
  for module in (getattr(value, "__module__", None) or "", *_OPEN):
    name = f"{module}.{getattr(value, '__name__', '')}"
    try:
      if _look_up(name) is value:
        return name
    except errors.UserError:
      pass
  raise _NoJSONError


def _look_up(name: str) -> Any:
  """The class or function of a dotted name; `UserError` if it may not be looked up."""
  module, _, attribute = str(name).rpartition(".")
  allowed = module in _OPEN or module.rpartition(".")[0] == models.__name__
  try:
    found = getattr(importlib.import_module(module), attribute, None) if allowed else None
  except ModuleNotFoundError:
    found = None
  if not callable(found):
    raise errors.UserError(f"--set: there is no {name!r} among the modules and functions of "
                           f"{', '.join((models.__name__, *_OPEN))}")
  return found


class HeadArray(NamedTuple):
  """A variable whose size depends on the number of classes.

  Attributes:
    rank: the array's rank.
    axis: the axis whose size is slope * classes + offset.
    slope, offset: the numbers in that formula.
  """

  rank: int
  axis: int
  slope: int
  offset: int


def head(init: Callable[[int], Any]) -> dict[str, HeadArray]:
  """The variables that depend on the number of classes, found from their shapes for two and three.

  Args:
    init: number of classes -> variables; it is only traced.

  Returns:
    Path ("params/head/kernel") -> how its size depends on the number of classes.
  """
  two, three = (traverse_util.flatten_dict(jax.eval_shape(lambda: init(n)), sep="/")
                for n in (2, 3))
  found = {}
  for path, spec in two.items():
    for axis, (a, b) in enumerate(zip(spec.shape, three[path].shape)):
      if a != b:
        found[path] = HeadArray(len(spec.shape), axis, b - a, a - 2 * (b - a))
  return found


def num_classes(model: nn.Module, tensors: Tensors, source: str) -> int | None:
  """The number of classes of another implementation's weights; None if they have no head.

  Args:
    model: a module with an attribute `num_classes`, of any value.
    tensors: name -> array, as the source has them.
    source: one of `weights.sources(model)`.
  """
  table = find_table(model, source)
  inputs = table.inputs(tensors)

  def init(classes: int) -> Any:
    zeros = (jnp.zeros(x.shape, x.dtype) for x in inputs)
    return model.clone(num_classes=classes).init(jax.random.key(0), *zeros)

  arrays = head(init)
  for entry in table.entries(arrays):
    # A layout that joins or splits tensors says nothing of the number of classes.
    if len(entry.paths) == len(entry.names) == 1:
      array, shape = arrays[entry.paths[0]], np.shape(tensors.get(entry.names[0]))
      if len(shape) == array.rank:
        shape = jax.eval_shape(entry.layout.to_ours, jax.ShapeDtypeStruct(shape, np.float32)).shape
        classes, rest = divmod(shape[array.axis] - array.offset, array.slope)
        if not rest and classes > 0:
          return classes
  return None
