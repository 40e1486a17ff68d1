"""Max-pooling whose gradient is fast on a CPU, and the native one everywhere else.

Where windows tile the image, one comparison per value says whether it was its window's maximum, in place of XLA's
`select_and_scatter`. Windows that overlap or are padded take the native form on a CPU too.

Dimensions: `B` batch, `H` and `W` height and width, `C` channels, `h` and `w` of the window.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

Array = jax.Array
Pair = tuple[int, int]


def max_pool(
    inputs: Array, window_shape: Sequence[int], strides: Sequence[int] | None = None,
    padding: str | Sequence[Pair] = "VALID",
) -> Array:
  """`flax.linen.max_pool`; of equal values in a window the first gets the gradient, as there.

  Args:
    inputs: [B, H, W, C], or of any shape that the native function takes.
    window_shape: (h, w).
    strides: of the window; all 1 by default.
    padding: "SAME", "VALID" or (low, high) of each dimension.

  Returns:
    The maximum of each window, [B, H / strides, W / strides, C] up to what the padding adds.
  """
  window = tuple(window_shape)
  tiles = (
      inputs.ndim == 4 and len(window) == 2 and window == tuple(strides or (1, 1)) and window != (1, 1)
      and jnp.issubdtype(inputs.dtype, jnp.floating)
      and (padding == "VALID" or padding == "SAME" and not any(size % w for size, w in zip(inputs.shape[1:3], window))
           or not isinstance(padding, str) and not any(map(sum, padding))))
  if not tiles:
    return nn.max_pool(inputs, window, strides, padding)
  return _tiled(window, inputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _tiled(window: Pair, x: Array) -> Array:
  """[B, H, W, C] -> [B, H // h, W // w, C]."""
  return _native(window, x)


@_tiled.defjvp
def _tiled_jvp(window: Pair, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
  (x,), (dx,) = primals, tangents
  dy = lax.platform_dependent(
      x, dx, cpu=functools.partial(_tangent, window),
      default=lambda x, dx: jax.jvp(functools.partial(_native, window), (x,), (dx,))[1])
  return _tiled(window, x), dy


def _native(window: Pair, x: Array) -> Array:
  return nn.max_pool(x, window, window, "VALID")


def _tangent(window: Pair, x: Array, dx: Array) -> Array:
  """The tangent at each window's first maximum, as a sum over the window with one term that is not zero."""
  values = _windows(window, x)
  best, first = values[:, :, 0, :, 0], jnp.zeros((), jnp.int32)
  for place in range(1, window[0] * window[1]):
    value = values[:, :, place // window[1], :, place % window[1]]
    better = (value > best) | (value != value)  # as the native form, a NaN is the maximum
    best, first = jnp.where(better, value, best), jnp.where(better, place, first)
  first = lax.optimization_barrier(first)  # found once for each window, not once for each of its values
  places = jnp.arange(window[0] * window[1]).reshape(window[0], 1, window[1], 1)
  return jnp.sum(jnp.where(first[:, :, None, :, None] == places, _windows(window, dx), 0), (2, 4))


def _windows(window: Pair, x: Array) -> Array:
  """[B, H, W, C] -> [B, H // h, h, W // w, w, C], without the rows and columns that fill no window."""
  (h, w), (rows, columns) = window, x.shape[1:3]
  x = x[:, :rows // h * h, :columns // w * w]
  return x.reshape(x.shape[0], rows // h, h, columns // w, w, x.shape[-1])
