"""The product of a dense layer, whose kernel gradient takes half the time on a CPU.

JAX computes that gradient as the product of the output's gradient and the input, [N, K], and
transposes it. Computed as [K, N] at once, it runs at the full speed of XLA's product on a CPU. The
sums are the same. On other platforms the compiler chooses layouts itself.

Dimensions: `K` input features, `N` output features.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


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
  return _contract(x, kernel, ((x.ndim - 1,), (0,)))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  return dense(x, kernel), (x, kernel)


def _backward(inputs: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
  x, kernel = inputs
  rows = tuple(range(x.ndim - 1))
  return _contract(dy, kernel, ((x.ndim - 1,), (1,))), _contract(x, dy, (rows, rows))


dense.defvjp(_forward, _backward)


def dot_general(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
  """Is `dense` for a Flax layer, as in `nn.Dense(..., dot_general=dot_general)`.

  Any other product than that of a dense layer is the native one.
  """
  plain = (dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())) and kernel.ndim == 2
           and x.dtype == kernel.dtype)
  if plain and not any(option is not None for option in options.values()):
    return dense(x, kernel)
  return lax.dot_general(x, kernel, dimension_numbers, **options)


def _contract(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
  width = jnp.promote_types(a.dtype, jnp.float32)
  return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=width).astype(a.dtype)
