"""The product of a dense layer, in forms that are fast on a CPU.

The kernel's gradient takes half the time. JAX computes it as the product of the output's gradient
and the input, [N, K], and transposes it. Computed as [K, N] at once, it runs at the full speed of
XLA's product on a CPU. The sums are the same. On other platforms the compiler chooses layouts
itself.

A single row, which a decoder has for every token, is multiplied with the kernel and summed: XLA's
product of one row runs on one thread, and this one on all. Few rows of 16-bit numbers are padded to
the fewest for which XLA has a fast product.

Dimensions: `K` input features, `N` output features.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_LEAST_ROWS = 8  # of a fast product of 16-bit numbers on a CPU


@jax.custom_vjp
def dense(x: Array, kernel: Array) -> Array:
  """Multiplies x by the kernel, sums in float32 or better, and rounds once.

  It cannot be differentiated in forward mode.

  Args:
    x: [..., K].
    kernel: [K, N], of x's dtype.

  Returns:
    [..., N], of x's dtype.
  """
  return _product(x, kernel, 0)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  return dense(x, kernel), (x, kernel)


def _backward(inputs: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
  x, kernel = inputs
  rows = tuple(range(x.ndim - 1))
  return _contract(dy, kernel, ((x.ndim - 1,), (1,))), _contract(x, dy, (rows, rows))


dense.defvjp(_forward, _backward)


@jax.custom_vjp
def dense_transposed(x: Array, kernel: Array) -> Array:
  """Is `dense` with a kernel [N, K], such as an embedding that gives a model's logits too."""
  return _product(x, kernel, 1)


def _forward_transposed(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  return dense_transposed(x, kernel), (x, kernel)


def _backward_transposed(inputs: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
  x, kernel = inputs
  rows = tuple(range(x.ndim - 1))
  return _contract(dy, kernel, ((x.ndim - 1,), (0,))), _contract(dy, x, (rows, rows))


dense_transposed.defvjp(_forward_transposed, _backward_transposed)


def dot_general(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
  """Is `dense` for a Flax layer, as in `nn.Dense(..., dot_general=dot_general)`.

  Any other product than that of a dense layer is the native one.
  """
  plain = (dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())) and kernel.ndim == 2
           and x.dtype == kernel.dtype)
  if plain and not any(option is not None for option in options.values()):
    return dense(x, kernel)
  return lax.dot_general(x, kernel, dimension_numbers, **options)


def _product(x: Array, kernel: Array, axis: int) -> Array:
  """The product that sums over `axis` of the kernel."""
  native = functools.partial(_contract, axes=((x.ndim - 1,), (axis,)))
  rows = math.prod(x.shape[:-1])
  if rows == 1:
    on_cpu = functools.partial(_one_row, axis=axis)
  elif 1 < rows < _LEAST_ROWS and x.dtype.itemsize < 4:
    on_cpu = functools.partial(_padded, axis=axis)
  else:
    return native(x, kernel)
  return lax.platform_dependent(x, kernel, cpu=on_cpu, default=native)


def _one_row(x: Array, kernel: Array, axis: int) -> Array:
  """[1, ..., 1, K] -> [1, ..., 1, N]."""
  width = jnp.promote_types(x.dtype, jnp.float32)
  row = jnp.expand_dims(x.reshape(-1), 1 - axis).astype(width)
  y = jnp.sum(kernel.astype(width) * row, axis=axis)
  return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _padded(x: Array, kernel: Array, axis: int) -> Array:
  """The product with rows of zeros below those of x."""
  rows = x.reshape(-1, x.shape[-1])
  y = _contract(jnp.pad(rows, ((0, _LEAST_ROWS - len(rows)), (0, 0))), kernel, ((1,), (axis,)))
  return y[:len(rows)].reshape(*x.shape[:-1], -1)


def _contract(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
  width = jnp.promote_types(a.dtype, jnp.float32)
  return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=width).astype(a.dtype)
