"""The parts of a table of names: rules, and the layouts of arrays."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dljax import errors

Array = Any
# What `models.blocks.Projection` calls its adapter of a low rank (Hu et al. 2021,
# https://arxiv.org/abs/2106.09685).
_ADAPTERS = ("lora_down", "lora_up")


@dataclasses.dataclass(frozen=True)
class Layout:
  """The layouts of arrays in the source and in dljax: two functions, each the other's inverse.

  A function takes all arrays that a rule names on its side, one argument each. It returns the
  array of the other side, or a tuple if the rule names several there.
  """

  to_ours: Callable[..., Any]
  to_source: Callable[..., Any]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.transpose(), lambda x: x.transpose())  # [out, in] <-> [in, out]
# OIHW <-> HWIO.
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def concatenate(arrays: Sequence[Array], axis: int) -> Array:
  """Concatenates arrays, for layouts that join; NumPy arrays stay on the host."""
  host = all(isinstance(array, np.ndarray) for array in arrays)
  return (np if host else jnp).concatenate(arrays, axis)


def flattened(channels: int, height: int, width: int) -> Layout:
  """A linear layer after flattening an image: [out, C H W] in the source, [H W C, out] with us."""
  return Layout(lambda x: x.reshape(-1, channels, height,
                                    width).transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
                lambda x: x.reshape(height, width, channels,
                                    -1).transpose(3, 2, 0, 1).reshape(x.shape[1], -1))


def joint_heads(parts: int, heads: int) -> tuple[Layout, Layout]:
  """The layouts of kernel and bias of a projection to `parts` vectors for each head.

  The kernel is [parts heads D', D] in the source, part after part, and [D, heads, parts, D'] with
  us. The bias has the same layouts without D.
  """
  return (
      Layout(lambda x: x.reshape(parts, heads, -1, x.shape[1]).transpose(3, 1, 0, 2),
             lambda x: x.transpose(2, 1, 3, 0).reshape(-1, x.shape[0])),
      Layout(lambda x: x.reshape(parts, heads, -1).transpose(1, 0, 2),
             lambda x: x.transpose(1, 0, 2).reshape(-1)))


def merged_heads(heads: int) -> Layout:
  """The projection that joins heads: [out, heads D'] in the source, [heads, D', out] with us."""
  return Layout(lambda x: x.reshape(x.shape[0], heads, -1).transpose(1, 2, 0),
                lambda x: x.transpose(2, 0, 1).reshape(x.shape[2], -1))


# (our paths, the source's names, layout). A string names one array, and a tuple several:
#   ("params/out/kernel", "out.weight", LINEAR)                        one to one
#   ("params/qkv/kernel", ("q.weight", "k.weight", "v.weight"), JOIN)  joint only with us
#   (("params/q/kernel", "params/k/kernel"), "qk.weight", SPLIT)       joint only in the source
Rule = tuple[str | tuple[str, ...], str | tuple[str, ...], Layout]


# What torch's wrappers put before or into the names of a module's tensors: DataParallel (before all
# names alone, as modules of that name exist), and torch.compile, FSDP and its checkpointing.
_WRAPPERS = r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\."


def unwrapped(tensors: Mapping[str, Array]) -> dict[str, Array]:
  """The tensors under the names that they have in the module itself, without torch's wrappers.

  Raises:
    UserError: two tensors then have one name.
  """
  names = {name: re.sub(_WRAPPERS, "", name) for name in tensors}
  while names and all(name.startswith("module.") for name in names.values()):
    names = {old: new.removeprefix("module.") for old, new in names.items()}
  found: dict[str, Array] = {}
  for old, new in names.items():
    if new in found:
      raise errors.UserError(f"two tensors are named {new} without what torch's wrappers add to "
                             f"names, one of them {old}; save the module inside the wrapper")
    found[new] = tensors[old]
  return found


@dataclasses.dataclass(frozen=True)
class Entry:
  """A rule applied to one model's paths.

  Attributes:
    paths: our paths.
    names: the source's names of the same weights.
    layout: the layout that leads from one side to the other.
  """

  paths: tuple[str, ...]
  names: tuple[str, ...]
  layout: Layout

  def to_ours(self, *tensors: Array) -> tuple[Array, ...]:
    """The arrays of `paths` from the tensors of `names`."""
    return _tuple(self.layout.to_ours(*tensors))

  def to_source(self, *arrays: Array) -> tuple[Array, ...]:
    """The tensors of `names` from the arrays of `paths`."""
    return _tuple(self.layout.to_source(*arrays))


@dataclasses.dataclass(frozen=True)
class Table:
  """One architecture in one source.

  Attributes:
    rules: the rules, tried in this order. A rule's first path is a pattern that matches the whole
      of our path, such as "params/stage1_block0/conv1/kernel"; its other paths and the source's
      names refer to the pattern's groups as \\1, \\2, ...
    inputs: the source's tensors -> the model's inputs, whose shapes decide the parameters' shapes.
      Any tensor may be missing.
    no_weight: the pattern of the source's names of buffers that hold no weight.
    older: (pattern, name): the name of a tensor in earlier versions of the source, and its name
      now.
    tied: the source's second name of a tensor -> its first name, which a rule has. The source may
      hold one of them, or both with equal values; both are written.
  """

  rules: Sequence[Rule]
  inputs: Callable[[Mapping[str, np.ndarray]], tuple[jax.ShapeDtypeStruct, ...]]
  no_weight: str = r"(?!)"
  older: Sequence[tuple[str, str]] = ()
  tied: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def entries(self, paths: Iterable[str]) -> list[Entry]:
    """The rules for our `paths`, in the paths' order; `UserError` if a path has no rule."""
    order = {path: place for place, path in enumerate(paths)}
    left, found = set(order), []
    for ours, names, layout in self.rules:
      pattern, *others = _tuple(ours)
      for path in order:
        match = re.fullmatch(pattern, path) if path in left else None
        if match:
          group = (path, *map(match.expand, others))
          if missing := [other for other in group if other not in left]:
            raise errors.UserError(f"the source has {path} and {missing[0]} in one, but this model "
                                   f"has no {missing[0]}; the weights are of another model")
          found.append(Entry(group, tuple(map(match.expand, _tuple(names))), layout))
          left.difference_update(group)
    if left:
      first = min(left, key=order.get)
      raise errors.UserError(
          f"the source has no counterpart of {first}; the weights are of another model")
    return sorted(found, key=lambda entry: order[entry.paths[0]])

  def rename(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors under the names in the rules: the newest version's, with each tied tensor once,
    and without torch's wrappers.

    Raises:
      UserError: two names of a tied tensor hold different values.
    """
    renamed = {}
    for name, tensor in unwrapped(tensors).items():
      matches = ((re.fullmatch(pattern, name), new) for pattern, new in self.older)
      renamed[next((match.expand(new) for match, new in matches if match), name)] = tensor
    for second, first in self.tied.items():
      if second in renamed:
        tensor = renamed.pop(second)
        if not np.array_equal(renamed.setdefault(first, tensor), tensor):
          raise errors.UserError(f"{second} and {first} differ, but this model has one array for both; "
                                 "the weights are of a model that does not tie them")
    return renamed

  def tie(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors with the tied ones under all of their names."""
    seconds = {second: tensors[first] for second, first in self.tied.items() if first in tensors}
    return {**tensors, **seconds}

  def holds_no_weight(self, name: str) -> bool:
    """Whether the source's tensor `name` is a buffer, which may be left over."""
    return re.fullmatch(self.no_weight, name) is not None


def _tuple(value: Any) -> tuple[Any, ...]:
  return value if isinstance(value, tuple) else (value,)


def layer(path: str, name: str, layout: Layout) -> list[Rule]:
  """The rules for a convolution or a linear layer at our `path` (a pattern) and the source's
  `name`.
  """
  return [(f"params/{path}/kernel", f"{name}.weight", layout),
          (f"params/{path}/bias", f"{name}.bias", SAME)]


def batch_norm(path: str, name: str) -> list[Rule]:
  """The four rules for a BatchNorm at our `path` (a pattern) and the source's `name`.

  In a frozen one, scale and bias are statistics too.
  """
  return [
      (f"(?:params|batch_stats)/{path}/scale", f"{name}.weight", SAME),
      (f"(?:params|batch_stats)/{path}/bias", f"{name}.bias", SAME),
      (f"batch_stats/{path}/mean", f"{name}.running_mean", SAME),
      (f"batch_stats/{path}/var", f"{name}.running_var", SAME),
  ]


def image(
    size: int, conv: str,
) -> Callable[[Mapping[str, np.ndarray]], tuple[jax.ShapeDtypeStruct, ...]]:
  """`Table.inputs` for images [1, size, size, C], with C read off the first convolution, `conv`.
  """

  def inputs(tensors: Mapping[str, np.ndarray]) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = np.shape(tensors.get(conv))
    return (jax.ShapeDtypeStruct((1, size, size, shape[1] if len(shape) == 4 else 3), np.float32),)

  return inputs


def columns(tensors: Mapping[str, np.ndarray], name: str) -> int:
  """The number of columns of the matrix `name`, or 1 if it is missing."""
  shape = np.shape(tensors.get(name))
  return shape[1] if len(shape) == 2 else 1


def patches(
    side: int, conv: str, positions: str,
) -> Callable[[Mapping[str, np.ndarray]], tuple[Any, ...]]:
  """`Table.inputs` for a vision transformer with a class token.

  A square image's size is read off the tensor `positions`.
  """

  def inputs(tensors: Mapping[str, np.ndarray]) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = np.shape(tensors.get(positions))
    grid = max(1, math.isqrt(max(0, shape[1] - 1))) if len(shape) == 3 else 1
    return image(grid * side, conv)(tensors)

  return inputs


def is_adapter(path: str) -> bool:
  """Whether a parameter's path, such as "block0/qkv/lora_up", is that of a `Projection`'s adapter."""
  return path.rpartition("/")[2] in _ADAPTERS


def merge_adapters(params: Mapping[str, Any], factor: float) -> dict[str, Any]:
  """The parameters of the same network without adapters: they are added to the kernels.

  Args:
    params: nested parameters, of float32 or wider.
    factor: lora_alpha / lora_rank.
  """
  down, up = (params.get(name) for name in _ADAPTERS)
  merged = {name: merge_adapters(value, factor) if isinstance(value, Mapping) else value
            for name, value in params.items() if name not in _ADAPTERS}
  if down is not None:
    merged["kernel"] = params["kernel"] + factor * np.tensordot(down, up, axes=1)
  return merged
