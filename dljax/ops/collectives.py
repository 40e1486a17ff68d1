"""Sums over devices, for code that must be right under jit and pmap alike; and their own parts.

Under jit with sharded arrays a sum over the batch already is the global sum, and these functions
are the identity. Under pmap each device traces the step on its own shard, and the same sum needs a
`psum`. `train/parallel.py` is the only place that knows which of the two is being traced, and says
so by `axis_context`. All other code calls `psum` and is right in both.

It also knows which devices a program is traced for, and says so by `target_context`: a kernel of
their vendor is chosen while tracing, and XLA cannot split it over a mesh. `on_parts` does.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

_axis_name: contextvars.ContextVar[str | None] = contextvars.ContextVar("axis_name", default=None)


@contextlib.contextmanager
def axis_context(name: str) -> Iterator[None]:
  """Makes the functions below act over the mapped axis `name` while code inside is traced."""
  token = _axis_name.set(name)
  try:
    yield
  finally:
    _axis_name.reset(token)


def psum(tree: Any) -> Any:
  """Sums every array of `tree` over the devices; does nothing outside an axis context."""
  name = _axis_name.get()
  return tree if name is None else jax.lax.psum(tree, name)


def all_gather(tree: Any) -> Any:
  """Joins every device's rows along the leading axis: [B / devices, ...] -> [B, ...]."""
  name = _axis_name.get()
  if name is None:
    return tree
  return jax.tree.map(lambda x: jax.lax.all_gather(x, name, tiled=True), tree)


def axis_index() -> jax.Array:
  """Returns this device's position along the axis, i32[]; 0 outside an axis context."""
  name = _axis_name.get()
  return jnp.zeros((), jnp.int32) if name is None else jax.lax.axis_index(name)


@dataclasses.dataclass(frozen=True)
class Target:
  """The devices that a program is traced for.

  Attributes:
    platform: their platform, such as "tpu".
    mesh: those that share the arrays of the program; None if each traces its own part.
    axes: the axes of the mesh that cut a dimension, by the dimension's role.
  """

  platform: str
  mesh: Mesh | None = None
  axes: tuple[tuple[str, tuple[str, ...]], ...] = ()


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def target_context(target: Target) -> Iterator[None]:
  """Says which devices the code inside is traced for."""
  token = _target.set(target)
  try:
    yield
  finally:
    _target.reset(token)


def platform() -> str | None:
  """The platform of the devices that the program is traced for; None outside a target context."""
  target = _target.get()
  return None if target is None else target.platform


def on_parts(
    function: Callable[..., jax.Array], arrays: Sequence[Any],
    roles: Sequence[tuple[str | None, ...]], result: tuple[str | None, ...],
) -> jax.Array:
  """`function(*arrays)`, where every device works on its part and nothing is moved between them.

  Outside a target context, and where there is no mesh, it is the plain call.

  Args:
    function: a function of arrays, of which a part of the result needs only that part of each
      array, along the dimensions that have the same role.
    arrays: the arguments; None in place of an array stays None.
    roles: the role of each dimension of each array, "batch" or "heads"; None for what is not cut.
    result: the roles of the result's dimensions. A role whose axes do not divide all dimensions
      that have it is not cut: every device then computes all of it.
  """
  target = _target.get()
  if target is None or target.mesh is None or target.mesh.size == 1:
    return function(*arrays)
  axes = dict(target.axes)
  for x, own in zip(arrays, roles, strict=True):
    for size, role in zip(() if x is None else x.shape, own):
      if role in axes and size % math.prod(target.mesh.shape[axis] for axis in axes[role]):
        del axes[role]
  specs = [None if x is None else P(*map(axes.get, own)) for x, own in zip(arrays, roles)]
  # What a kernel makes of devices' parts is not known to the check.
  return jax.shard_map(function, mesh=target.mesh, in_specs=tuple(specs),
                       out_specs=P(*map(axes.get, result)), check_vma=False)(*arrays)
