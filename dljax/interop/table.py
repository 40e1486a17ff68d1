"""What a table of names is made of: rules, and the layouts of arrays."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dljax import errors

Array = Any


@dataclasses.dataclass(frozen=True)
class Layout:
  """How one array stands in the source and with us: two functions, each the inverse of the other."""

  to_ours: Callable[[Array], Array]
  to_source: Callable[[Array], Array]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.transpose(), lambda x: x.transpose())  # [out, in] <-> [in, out]
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO


def flattened(channels: int, height: int, width: int) -> Layout:
  """A linear layer after flattening an image: [out, C H W] in the source, [H W C, out] with us."""
  return Layout(
      lambda x: x.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
      lambda x: x.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(x.shape[1], -1))


@dataclasses.dataclass(frozen=True)
class Table:
  """One architecture in one source.

  Attributes:
    rules: (pattern, name, layout), tried in this order. The pattern matches the whole of our path, as
      "params/stage1_block0/conv1/kernel"; name is the source's, with the pattern's groups as \\1, \\2, ...
    inputs: the source's tensors -> the model's inputs, whose shapes decide the parameters'. It must do
      without any tensor that might be missing.
    no_weight: pattern of the source's names of buffers that hold no weight.
    older: (pattern, name): what earlier versions of the source called a tensor, and what it is called now.
  """

  rules: Sequence[tuple[str, str, Layout]]
  inputs: Callable[[Mapping[str, np.ndarray]], tuple[jax.ShapeDtypeStruct, ...]]
  no_weight: str = r"(?!)"
  older: Sequence[tuple[str, str]] = ()

  def find(self, path: str) -> tuple[str, Layout]:
    """The source's name and layout for our `path`; `UserError` where it has none."""
    for pattern, name, layout in self.rules:
      match = re.fullmatch(pattern, path)
      if match:
        return match.expand(name), layout
    raise errors.UserError(f"the source has no counterpart of {path}; the weights are of another model")

  def rename(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors under the names of the source's newest version."""
    renamed = {}
    for name, tensor in tensors.items():
      matches = ((re.fullmatch(pattern, name), new) for pattern, new in self.older)
      renamed[next((match.expand(new) for match, new in matches if match), name)] = tensor
    return renamed

  def holds_no_weight(self, name: str) -> bool:
    """Whether the source's tensor `name` may be left over."""
    return re.fullmatch(self.no_weight, name) is not None


def batch_norm(path: str, name: str) -> list[tuple[str, str, Layout]]:
  """The four rules of a BatchNorm at our `path` (a pattern) and the source's `name`; frozen, it is all statistics."""
  return [
      (f"(?:params|batch_stats)/{path}/scale", f"{name}.weight", SAME),
      (f"(?:params|batch_stats)/{path}/bias", f"{name}.bias", SAME),
      (f"batch_stats/{path}/mean", f"{name}.running_mean", SAME),
      (f"batch_stats/{path}/var", f"{name}.running_var", SAME),
  ]


def image(size: int, conv: str) -> Callable[[Mapping[str, np.ndarray]], tuple[jax.ShapeDtypeStruct, ...]]:
  """`Table.inputs` of a model of images [1, size, size, C], with C read off the first convolution, `conv`."""

  def inputs(tensors: Mapping[str, np.ndarray]) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = np.shape(tensors.get(conv))
    return (jax.ShapeDtypeStruct((1, size, size, shape[1] if len(shape) == 4 else 3), np.float32),)

  return inputs


def patches(side: int, conv: str, positions: str) -> Callable[[Mapping[str, np.ndarray]], tuple[Any, ...]]:
  """`Table.inputs` of a vision transformer with a class token: the image's size is read off `positions`, if square."""

  def inputs(tensors: Mapping[str, np.ndarray]) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = np.shape(tensors.get(positions))
    grid = max(1, math.isqrt(max(0, shape[1] - 1))) if len(shape) == 3 else 1
    return image(grid * side, conv)(tensors)

  return inputs
