"""Sums over devices, for code that must be right under jit and pmap alike.

Under jit with sharded arrays a sum over the batch already is the global sum, and these functions
are the identity. Under pmap each device traces the step on its own shard, and the same sum needs a
`psum`. `train/parallel.py` is the only place that knows which of the two is being traced, and says
so by `axis_context`. All other code calls `psum` and is right in both.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

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
