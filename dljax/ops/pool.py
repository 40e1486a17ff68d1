"""Pooling: the maximum of a window, and averages that bring an image to a given size.

Max-pooling is fast on a CPU, and is the native one everywhere else. Its gradient compares every
value of a window once to find the window's maximum, instead of XLA's `select_and_scatter`. Windows
that tile the image are a reshape of it, other windows are shifted views. The maximum of the views,
first over rows and then over columns, is also several times faster than XLA's `reduce_window`.

Dimensions: `B` batch, `H` and `W` height and width, `C` channels, `h` and `w` height and width of
the window.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

Array = jax.Array
Pair = tuple[int, int]


def max_pool(
    inputs: Array, window_shape: Sequence[int], strides: Sequence[int] | None = None,
    padding: str | Sequence[Pair] = "VALID",
) -> Array:
  """Computes `flax.linen.max_pool`; the first of equal values in a window gets the gradient.

  Args:
    inputs: [B, H, W, C], or of any shape that the native function takes.
    window_shape: (h, w).
    strides: the window's strides; all 1 by default.
    padding: "SAME", "VALID" or (low, high) of each dimension.

  Returns:
    The maximum of each window; without padding [B, (H - h) // stride + 1, (W - w) // stride + 1,
    C].
  """
  window, strides = tuple(window_shape), tuple(strides or (1,) * len(window_shape))
  # Flax checks the arguments.
  out = jax.eval_shape(lambda x: nn.max_pool(x, window, strides, padding), inputs)
  floating = jnp.issubdtype(inputs.dtype, jnp.floating)
  if inputs.ndim != 4 or len(window) != 2 or not floating or 0 in out.shape:
    return nn.max_pool(inputs, window, strides, padding)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(inputs.shape[1:3], window, strides, padding)
  pool = _Pool(window, strides, tuple((int(lo), int(hi)) for lo, hi in padding))
  return _max_pool(pool, inputs)


def adaptive_avg_pool(inputs: Array, size: Pair) -> Array:
  """Averages the image to `size`, as `torch.nn.AdaptiveAvgPool2d` does.

  Row i of the result is the mean of the image's rows from floor(i H / h) up to, but not including,
  ceil((i + 1) H / h). These windows overlap if h does not divide H, and repeat rows if h is larger
  than H.

  Args:
    inputs: [B, H, W, C].
    size: (h, w).

  Returns:
    [B, h, w, C].
  """
  for axis, out in zip((1, 2), size):
    if inputs.shape[axis] != out:
      means = jnp.asarray(_adaptive_means(inputs.shape[axis], out), inputs.dtype)
      inputs = jnp.moveaxis(jnp.tensordot(means, inputs, ((1,), (axis,))), 0, axis)
  return inputs


def _adaptive_means(size: int, out: int) -> np.ndarray:
  """Returns the matrix [out, size] that averages one axis."""
  start, end = np.arange(out) * size // out, -(-np.arange(1, out + 1) * size // out)
  place = np.arange(size)
  inside = (start[:, None] <= place) & (place < end[:, None])
  return inside / inside.sum(1, keepdims=True)


class _Pool(NamedTuple):
  """The static arguments of `flax.linen.max_pool`."""

  window: Pair
  strides: Pair
  padding: tuple[Pair, Pair]

  @property
  def tiles(self) -> bool:
    """Whether the windows neither overlap nor leave gaps."""
    return self.window == self.strides and not any(map(sum, self.padding))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _max_pool(pool: _Pool, x: Array) -> Array:
  if pool.tiles:
    return nn.max_pool(x, *pool)
  return lax.platform_dependent(
      x, cpu=functools.partial(_maximum, pool), default=lambda x: nn.max_pool(x, *pool))


@_max_pool.defjvp
def _max_pool_jvp(
    pool: _Pool, primals: tuple[Array], tangents: tuple[Array],
) -> tuple[Array, Array]:
  (x,), (dx,) = primals, tangents
  dy = lax.platform_dependent(
      x, dx, cpu=functools.partial(_tangent_of_tiles if pool.tiles else _tangent, pool),
      default=lambda x, dx: jax.jvp(lambda x: nn.max_pool(x, *pool), (x,), (dx,))[1])
  return _max_pool(pool, x), dy


def _maximum(pool: _Pool, x: Array) -> Array:
  """Computes the maximum over each window's rows, and then over its columns."""
  rows = _Pool((pool.window[0], 1), (pool.strides[0], 1), (pool.padding[0], (0, 0)))
  columns = _Pool((1, pool.window[1]), (1, pool.strides[1]), ((0, 0), pool.padding[1]))
  for part in (rows, columns):
    x = functools.reduce(jnp.maximum, _views(part, x, -jnp.inf))
  return x


def _tangent(pool: _Pool, x: Array, dx: Array) -> Array:
  """Takes the tangent at each window's first maximum, as a sum with one non-zero term a window."""
  first = _first_maximum(_views(pool, x, -jnp.inf))
  return sum(jnp.where(first == place, view, 0) for place, view in enumerate(_views(pool, dx, 0)))


def _tangent_of_tiles(pool: _Pool, x: Array, dx: Array) -> Array:
  """Computes `_tangent` for windows that tile the image."""
  h, w = pool.window
  tiles = _tiles(pool, x)
  first = _first_maximum([tiles[:, :, i, :, j] for i in range(h) for j in range(w)])
  places = jnp.arange(h * w).reshape(h, 1, w, 1)
  return jnp.sum(jnp.where(first[:, :, None, :, None] == places, _tiles(pool, dx), 0), (2, 4))


def _first_maximum(values: Sequence[Array]) -> Array:
  """Returns which of the arrays holds the maximum; of equal values the first counts."""
  best, first = values[0], jnp.zeros((), jnp.int32)
  for place, value in enumerate(values[1:], 1):
    better = (value > best) | (value != value)  # a NaN is the maximum, as in the native form
    best, first = jnp.where(better, value, best), jnp.where(better, place, first)
  # The barrier makes XLA compute it once for each window, not once for each of its values.
  return lax.optimization_barrier(first)


def _views(pool: _Pool, x: Array, fill: float) -> list[Array]:
  """Returns for each place in the window, row by row, the values of all windows: [B, *out, C]."""
  x = jnp.pad(x, ((0, 0), *pool.padding, (0, 0)), constant_values=fill)
  (h, w), (s, t) = pool.window, pool.strides
  rows, columns = x.shape[1] - h, x.shape[2] - w  # where the last window starts, at most
  return [x[:, i:i + rows + 1:s, j:j + columns + 1:t] for i in range(h) for j in range(w)]


def _tiles(pool: _Pool, x: Array) -> Array:
  """[B, H, W, C] -> [B, H // h, h, W // w, w, C], without rows and columns that fill no window."""
  (h, w), (rows, columns) = pool.window, x.shape[1:3]
  x = x[:, :rows // h * h, :columns // w * w]
  return x.reshape(x.shape[0], rows // h, h, columns // w, w, x.shape[-1])
