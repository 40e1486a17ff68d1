"""Convolution that is fast on a CPU, and the native one everywhere else.

`conv_general_dilated` has the signature of `jax.lax.conv_general_dilated` and goes into a Flax layer as
`nn.Conv(..., conv_general_dilated=conv_general_dilated)`. On GPU and TPU it is the native convolution and its
native gradients. On a CPU, XLA's own are slow for many shapes, most of all for depthwise kernels, strides and small
images. There, static shapes choose among

- `_matmul_*`: a 1x1 kernel is a matrix product.
- `_depthwise_*`: one channel per group is a sum of shifted products.
- `_winograd_*`: 3x3 kernels without stride, by F(2x2, 3x3) of Andrew Lavin, Scott Gray, "Fast Algorithms for
  Convolutional Neural Networks", 2015, https://arxiv.org/abs/1509.09308, section 4.1: 16 products where the
  definition has 36. The kernel's gradient is F(3x3, 2x2), with the same transforms.
- `_band_*`: with few channels, parts of rows of the image times a banded matrix that holds the kernel.
- `_patches_*`: products with what each position of the result sees of the images, for strides and small images.
- `_native_*`: whatever is left.

The work goes through a few images at a time where that keeps the intermediate arrays in the cache (`_chunk`).

The convolution and its two gradients are bilinear, and each one's gradients are the other two:

  forward(x, w)             input_gradient(dy, w)         kernel_gradient(x, dy)
    d/dx  input_gradient      d/ddy  forward                d/dx   input_gradient
    d/dw  kernel_gradient     d/dw   kernel_gradient        d/ddy  forward

so reverse mode of any order stays within these forms. Forward mode needs `forward_mode=True`.

Dimensions: `B` batch, `H` and `W` height and width, `C` and `O` channels in and out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
Pair = tuple[int, int]

_WINOGRAD_CHANNELS = 64  # with fewer the transforms cost more than the products save
_WINOGRAD_FLOATS = 2**18  # tiles times channels at once: 16 transforms of so many floats fill 16 MB
_PATCH_FLOATS = 2**20  # of patches at once
_FEW_CHANNELS = 4  # with more, the native gradient of the kernel is faster than bands
_BAND_FLOATS = 2**17  # largest banded matrix of a whole row: beyond it other forms are faster
_BAND_COLUMNS = 80  # of the banded matrix; fewer make a product slower than the zeros that they save


@dataclasses.dataclass(frozen=True)
class _Conv:
  """All that is static about a two-dimensional convolution of [B, H, W, C] with [*kernel, C / groups, O].

  Attributes:
    image, kernel: spatial sizes.
    strides, dilation: of the kernel.
    padding: (low, high) of each spatial dimension.
    groups: how many the channels are split into.
    features: C and O.
  """

  image: Pair
  kernel: Pair
  strides: Pair
  dilation: Pair
  padding: tuple[Pair, Pair]
  groups: int
  features: Pair

  @property
  def out(self) -> Pair:
    """Spatial size of the result."""
    return tuple(
        (size + lo + hi - (k - 1) * d - 1) // s + 1
        for size, k, s, d, (lo, hi) in zip(self.image, self.kernel, self.strides, self.dilation, self.padding))

  @property
  def taps(self) -> list[Pair]:
    """The kernel's positions, row by row."""
    return [(i, j) for i in range(self.kernel[0]) for j in range(self.kernel[1])]

  @property
  def plain(self) -> bool:
    return self.groups == 1 and all(p >= 0 for pair in self.padding for p in pair)

  @property
  def is_matmul(self) -> bool:
    return self.groups == 1 and self.kernel == (1, 1) and self.padding == ((0, 0), (0, 0))

  @property
  def is_depthwise(self) -> bool:
    # A gradient of the image pads by kernel - 1 - padding, which must not be negative.
    reach = [(k - 1) * d for k, d in zip(self.kernel, self.dilation)]
    return (self.groups == self.features[0] == self.features[1] > 1
            and all(0 <= p <= r for r, pair in zip(reach, self.padding) for p in pair))

  @property
  def is_winograd(self) -> bool:
    return (self.plain and self.kernel == (3, 3) and self.strides == self.dilation == (1, 1)
            and min(self.features) >= _WINOGRAD_CHANNELS and all(p <= 2 for pair in self.padding for p in pair))

  @property
  def is_band(self) -> bool:
    width = self.image[1] + sum(self.padding[1])
    return (self.plain and self.dilation == (1, 1)
            and self.kernel[0] * width * self.features[0] * self.out[1] * self.features[1] <= _BAND_FLOATS)


def conv_general_dilated(
    lhs: Array, rhs: Array, window_strides: Sequence[int], padding: str | Sequence[Pair],
    lhs_dilation: Sequence[int] | None = None, rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None, feature_group_count: int = 1, batch_group_count: int = 1,
    precision: Any = None, preferred_element_type: Any = None, out_sharding: Any = None, *,
    forward_mode: bool = False,
) -> Array:
  """`jax.lax.conv_general_dilated`, in forms that are fast on a CPU too.

  Results differ from the native ones by rounding alone (float32: 1e-5 of the result's scale). bfloat16 is
  computed in float32 and rounded once.

  Args:
    lhs: the images; [B, H, W, C] or [B, W, C] where our forms are to be used.
    rhs: the kernel; [h, w, C / groups, O] or [w, C / groups, O] likewise.
    window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
    batch_group_count, precision, preferred_element_type, out_sharding: as of the native function. What
      our forms do not cover takes the native one, on a CPU too.
    forward_mode: use the native form everywhere, which alone can be differentiated in forward mode.

  Returns:
    As the native function does.

  Raises:
    TypeError, ValueError: as the native function does.
  """
  native = functools.partial(
      lax.conv_general_dilated, window_strides=window_strides, padding=padding, lhs_dilation=lhs_dilation,
      rhs_dilation=rhs_dilation, dimension_numbers=dimension_numbers, feature_group_count=feature_group_count,
      batch_group_count=batch_group_count, precision=precision, preferred_element_type=preferred_element_type,
      out_sharding=out_sharding)
  out = jax.eval_shape(native, lhs, rhs)  # all checks are the native function's
  rank = lhs.ndim - 2
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  last = (0, rank + 1, *range(1, rank + 1))  # channels last
  covered = (
      not forward_mode and rank in (1, 2) and 0 not in out.shape and out_sharding is None
      and numbers.lhs_spec == numbers.out_spec == last and numbers.rhs_spec == (rank + 1, rank, *range(rank))
      and batch_group_count == 1 and set(lhs_dilation or (1,)) == {1}
      and precision in (None, lax.Precision.DEFAULT) and preferred_element_type in (None, lhs.dtype)
      and lhs.dtype in (jnp.float32, jnp.bfloat16, jnp.float64))
  if not covered:
    return native(lhs, rhs)

  dilation = tuple(rhs_dilation or (1,) * rank)
  if isinstance(padding, str):
    effective = [(k - 1) * d + 1 for k, d in zip(rhs.shape, dilation)]
    padding = lax.padtype_to_pads(lhs.shape[1:-1], effective, window_strides, padding)
  # One dimension is two of which the first is 1.
  pad = lambda values, fill: (fill,) * (2 - rank) + tuple(values)
  conv = _Conv(
      image=pad(lhs.shape[1:-1], 1), kernel=pad(rhs.shape[:rank], 1), strides=pad(window_strides, 1),
      dilation=pad(dilation, 1), padding=pad([(int(lo), int(hi)) for lo, hi in padding], (0, 0)),
      groups=feature_group_count, features=(lhs.shape[-1], rhs.shape[-1]))
  y = _forward(conv, lhs.reshape(lhs.shape[0], *conv.image, -1), rhs.reshape(*conv.kernel, *rhs.shape[rank:]))
  return y.reshape(out.shape)


# The three functions and their gradients.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(conv: _Conv, x: Array, w: Array) -> Array:
  """[B, H, W, C], [h, w, C / groups, O] -> [B, *out, O]."""
  return _by_platform(_forms(conv)[0], _native_forward, conv, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _input_gradient(conv: _Conv, dy: Array, w: Array) -> Array:
  """[B, *out, O], [h, w, C / groups, O] -> [B, H, W, C]."""
  return _by_platform(_forms(conv)[1], _native_input_gradient, conv, dy, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_gradient(conv: _Conv, x: Array, dy: Array) -> Array:
  """[B, H, W, C], [B, *out, O] -> [h, w, C / groups, O]."""
  return _by_platform(_forms(conv)[2], _native_kernel_gradient, conv, x, dy)


def _keep(function: Callable[..., Array]) -> Callable[..., tuple[Array, tuple[Array, Array]]]:
  return lambda conv, a, b: (function(conv, a, b), (a, b))


_forward.defvjp(_keep(_forward), lambda conv, kept, dy: (
    _input_gradient(conv, dy, kept[1]), _kernel_gradient(conv, kept[0], dy)))
_input_gradient.defvjp(_keep(_input_gradient), lambda conv, kept, dx: (
    _forward(conv, dx, kept[1]), _kernel_gradient(conv, dx, kept[0])))
_kernel_gradient.defvjp(_keep(_kernel_gradient), lambda conv, kept, dw: (
    _input_gradient(conv, kept[1], dw), _forward(conv, kept[0], dw)))


def _by_platform(form: Callable[..., Array], native: Callable[..., Array], conv: _Conv, a: Array, b: Array) -> Array:
  if form is native:
    return native(conv, a, b)

  def cpu(a, b):
    # Without the barrier what made them would be made again for every element that reads them.
    a, b = lax.optimization_barrier((a, b))
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return form(conv, a.astype(wide), b.astype(wide)).astype(a.dtype)

  return lax.platform_dependent(a, b, cpu=cpu, default=functools.partial(native, conv))


def _forms(conv: _Conv) -> tuple[Callable[..., Array], Callable[..., Array], Callable[..., Array]]:
  """The forms of the three functions for a CPU."""
  if conv.is_matmul:
    return _matmul_forward, _matmul_input_gradient, _matmul_kernel_gradient
  if conv.is_depthwise:
    return _depthwise_forward, _depthwise_input_gradient, _depthwise_kernel_gradient
  if conv.is_winograd:
    return _winograd_forward, _winograd_input_gradient, _winograd_kernel_gradient
  if conv.is_band:
    few = conv.features[0] <= _FEW_CHANNELS
    return _band_forward, _band_input_gradient, _band_kernel_gradient if few else _native_kernel_gradient
  if not conv.plain:
    return _native_forward, _native_input_gradient, _native_kernel_gradient
  # XLA exchanges the roles of images and kernel where the kernel is larger, and then finds only its slowest form.
  area = math.prod(conv.kernel)
  input_gradient = conv.strides != (1, 1) or area > math.prod(conv.out)
  return (_patches_forward if area > math.prod(conv.image) else _native_forward,
          _patches_input_gradient if input_gradient else _native_input_gradient, _native_kernel_gradient)


# Native.


def _native_forward(conv: _Conv, x: Array, w: Array) -> Array:
  return lax.conv_general_dilated(
      x, w, conv.strides, conv.padding, rhs_dilation=conv.dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=conv.groups)


def _native_input_gradient(conv: _Conv, dy: Array, w: Array) -> Array:
  x = jax.ShapeDtypeStruct((dy.shape[0], *conv.image, conv.features[0]), dy.dtype)
  return jax.linear_transpose(lambda x: _native_forward(conv, x, w), x)(dy)[0]


def _native_kernel_gradient(conv: _Conv, x: Array, dy: Array) -> Array:
  w = jax.ShapeDtypeStruct((*conv.kernel, conv.features[0] // conv.groups, conv.features[1]), x.dtype)
  return jax.linear_transpose(lambda w: _native_forward(conv, x, w), w)(dy)[0]


# A few images at a time.


def _chunk(batch: int, floats: int, limit: int) -> int:
  """How many images at once: a divisor of `batch` with about `limit` floats at `floats` an image.

  A chunk takes as many images of every device, or a batch that is split over devices would have to be
  gathered: see `_split`.
  """
  devices = jax.device_count()
  wanted = max(1, limit // floats) * devices
  divisors = [n for n in range(1, batch + 1) if batch % n == 0 and (n % devices == 0 or n == batch)]
  smaller, larger = [n for n in divisors if n <= wanted], [n for n in divisors if n > wanted]
  if smaller and (not larger or 4 * smaller[-1] > wanted):
    return smaller[-1]
  return larger[0]


def _split(x: Array, size: int) -> Array:
  """[B, ...] -> [size, B / size, ...], of which chunk i is [:, i]; every device keeps its rows."""
  return x.reshape(size, x.shape[0] // size, *x.shape[1:])


def _chunk_of(x: Array, i: Array) -> Array:
  return lax.dynamic_index_in_dim(x, i, 1, keepdims=False, allow_negative_indices=False)


def _map_chunks(f: Callable[[Array], Array], size: int, x: Array) -> Array:
  """`f` of the whole batch, `size` images at a time."""
  if size == x.shape[0]:
    return f(x)
  x = _split(x, size)
  out = jax.eval_shape(f, x[:, 0])

  def body(i, y):
    return lax.dynamic_update_index_in_dim(y, f(_chunk_of(x, i)), i, 1)

  # All of it will be overwritten. Zeros would be one array for the loops of all layers, from which each copies.
  y = jnp.full((size, x.shape[1], *out.shape[1:]), x[(0,) * x.ndim].astype(out.dtype))
  y = lax.fori_loop(0, x.shape[1], body, y)
  return y.reshape(-1, *out.shape[1:])


def _sum_chunks(f: Callable[[Array, Array], Any], size: int, x: Array, dy: Array) -> Any:
  """The sum of `f` over the whole batch, `size` images at a time."""
  if size == x.shape[0]:
    return f(x, dy)
  x, dy = _split(x, size), _split(dy, size)

  def body(i, total):
    part = f(_chunk_of(x, i), _chunk_of(dy, i))
    return jax.tree.map(jnp.add, total, part)

  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, x[:, 0], dy[:, 0]))
  return lax.fori_loop(0, x.shape[1], body, zeros)


def _after(x: Array, constant: np.ndarray) -> Array:
  """`constant`, as if it depended on `x`.

  What is made from it and a kernel would otherwise be made for all layers at once, at the start of the program.
  """
  constant = jnp.asarray(constant, x.dtype)
  first = x[(0,) * x.ndim]
  return lax.select(jnp.full(constant.shape, first == first), constant, lax.optimization_barrier(constant))


def _pad(x: Array, padding: Sequence[Pair]) -> Array:
  """Zeros around the images; padded once, not again in each of the loops that read it."""
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  return lax.optimization_barrier(x) if any(map(sum, padding)) else x


def _shifted(conv: _Conv, x: Array, tap: Pair) -> Array:
  """What the kernel's position `tap` sees of the padded images: [B, *out, C]."""
  start = [t * d for t, d in zip(tap, conv.dilation)]
  (i, j), (h, w), (s, t) = start, conv.out, conv.strides
  return x[:, i:i + s * (h - 1) + 1:s, j:j + t * (w - 1) + 1:t]


def _shifts(x: Array, rows: np.ndarray, columns: np.ndarray, out: Pair, strides: Pair, axis: int) -> Array:
  """Views of padded images that begin at `rows` and `columns`, of size `out` with `strides`, stacked on `axis`.

  One loop gathers all views; slices would be compiled one by one.
  """
  size = [s * (n - 1) + 1 for s, n in zip(strides, out)]

  def shift(row, column):
    view = lax.dynamic_slice(x, (0, row, column, 0), (x.shape[0], *size, x.shape[3]))
    return view[:, ::strides[0], ::strides[1]]

  return jax.vmap(shift, out_axes=axis)(rows, columns)


# 1x1.


def _matmul_forward(conv: _Conv, x: Array, w: Array) -> Array:
  return x[:, ::conv.strides[0], ::conv.strides[1]] @ w[0, 0]


def _matmul_input_gradient(conv: _Conv, dy: Array, w: Array) -> Array:
  dx = jnp.einsum("bhwo,co->bhwc", dy, w[0, 0])
  gaps = [(0, size - (out - 1) * s - 1, s - 1) for size, out, s in zip(conv.image, conv.out, conv.strides)]
  return lax.pad(dx, jnp.zeros((), dx.dtype), ((0, 0, 0), *gaps, (0, 0, 0)))


def _matmul_kernel_gradient(conv: _Conv, x: Array, dy: Array) -> Array:
  return jnp.einsum("bhwc,bhwo->co", x[:, ::conv.strides[0], ::conv.strides[1]], dy)[None, None]


# Depthwise.


def _depthwise_forward(conv: _Conv, x: Array, w: Array) -> Array:
  x = _pad(x, conv.padding)
  return sum(_shifted(conv, x, tap) * w[tap][0] for tap in conv.taps)


def _depthwise_input_gradient(conv: _Conv, dy: Array, w: Array) -> Array:
  """The forward form with the kernel reversed; a stride spreads the cotangent by zeros first."""
  spread = [(0, 0, s - 1) for s in conv.strides]
  dy = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *spread, (0, 0, 0)))
  padding = tuple(
      ((k - 1) * d - lo, size - spread_size + lo)
      for size, spread_size, k, d, (lo, _) in zip(conv.image, dy.shape[1:3], conv.kernel, conv.dilation, conv.padding))
  reverse = dataclasses.replace(conv, image=dy.shape[1:3], strides=(1, 1), padding=padding)
  return _depthwise_forward(reverse, dy, w[::-1, ::-1])


def _depthwise_kernel_gradient(conv: _Conv, x: Array, dy: Array) -> Array:
  """Adds up row by row, so that the sums run over arrays and not over single numbers."""
  x = _pad(x, conv.padding)
  width = conv.strides[1] * (conv.out[1] - 1) + 1

  def body(row, sums):
    dy_row = lax.dynamic_index_in_dim(dy, row, 1, keepdims=False)
    new = []
    for i, in sorted({(i,) for i, _ in conv.taps}):
      x_row = lax.dynamic_index_in_dim(x, row * conv.strides[0] + i * conv.dilation[0], 1, keepdims=False)
      for j in range(conv.kernel[1]):
        start = j * conv.dilation[1]
        new.append(sums[len(new)] + x_row[:, start:start + width:conv.strides[1]] * dy_row)
    return new

  # Begins with the first row: zeros would be one array, of which the loop copies one for each tap.
  sums = lax.fori_loop(1, conv.out[0], body, body(0, [0] * len(conv.taps)))
  return jnp.stack([jnp.sum(s, (0, 1)) for s in sums]).reshape(*conv.kernel, 1, -1)


# Winograd. Tiles are numbered row by row, and the 16 numbers of a tile lie in the leading axis: 16 matrix products.


def _winograd_forward(conv: _Conv, x: Array, w: Array) -> Array:
  return _winograd(conv, x, _KERNEL_TRANSFORM, w, "ktc,kco->kto")


def _winograd_input_gradient(conv: _Conv, dy: Array, w: Array) -> Array:
  """The forward form with the kernel reversed."""
  reverse = dataclasses.replace(
      conv, image=conv.out, features=conv.features[::-1], padding=tuple((2 - lo, 2 - hi) for lo, hi in conv.padding))
  return _winograd(reverse, dy, _KERNEL_TRANSFORM[:, ::-1, ::-1], w, "kto,kco->ktc")


def _winograd(conv: _Conv, x: Array, transform: np.ndarray, w: Array, product: str) -> Array:
  """`product` of the transformed images and [3, 3, C, O]."""
  tiles, padding = _winograd_tiles(conv)
  kernel = jnp.einsum("kij,ijco->kco", _after(x, transform), w)

  def images(x):
    x = _transform_images(jnp.pad(x, ((0, 0), *padding, (0, 0))), tiles)
    y = jnp.einsum(product, x.reshape(16, -1, x.shape[-1]), kernel)
    return _transform_output(y.reshape(4, 4, *x.shape[1:4], -1))[:, :conv.out[0], :conv.out[1]]

  return _map_chunks(images, _winograd_chunk(conv, x, tiles), x)


def _winograd_kernel_gradient(conv: _Conv, x: Array, dy: Array) -> Array:
  tiles, padding = _winograd_tiles(conv)
  odd = [(0, 2 * n - size) for n, size in zip(tiles, conv.out)]

  def images(x, dy):
    x = _transform_images(jnp.pad(x, ((0, 0), *padding, (0, 0))), tiles)
    dy = _transform_cotangent(jnp.pad(dy, ((0, 0), *odd, (0, 0))))
    return jnp.einsum("ktc,kto->kco", x.reshape(16, -1, x.shape[-1]), dy.reshape(16, -1, dy.shape[-1]))

  products = _sum_chunks(images, _winograd_chunk(conv, x, tiles), x, dy)
  return jnp.einsum("kij,kco->ijco", _KERNEL_TRANSFORM, products)


def _winograd_tiles(conv: _Conv) -> tuple[Pair, list[Pair]]:
  """How many 2x2 tiles the result has, and the padding of the images that makes them whole."""
  tiles = tuple(-(-size // 2) for size in conv.out)
  return tiles, [(lo, 2 * n + 2 - size - lo) for n, size, (lo, _) in zip(tiles, conv.image, conv.padding)]


def _winograd_chunk(conv: _Conv, x: Array, tiles: Pair) -> int:
  return _chunk(x.shape[0], math.prod(tiles) * sum(conv.features), _WINOGRAD_FLOATS)


# G g G^T of the paper: [16, 3, 3].
_KERNEL_TRANSFORM = np.einsum("ia,jb->ijab", *[np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2] * 2)
_KERNEL_TRANSFORM = _KERNEL_TRANSFORM.reshape(16, 3, 3)


def _transform_images(x: Array, tiles: Pair) -> Array:
  """B^T d B of the paper, of all overlapping 4x4 tiles d: [b, 2h + 2, 2w + 2, C] -> [16, b, h, w, C].

  Each row of B^T takes one row of d with a sign from or to another, so four shifted views of the images make
  up the result.
  """
  first, second, sign = np.array([0, 1, 2, 1]), np.array([2, 2, 1, 3]), np.array([-1, 1, -1, -1])
  i, j = np.divmod(np.arange(16), 4)
  view = lambda rows, columns: _shifts(x, rows, columns, tiles, (2, 2), axis=0)
  signed = lambda signs, view: jnp.asarray(signs, x.dtype)[:, None, None, None, None] * view
  return (view(first[i], first[j]) + signed(sign[j], view(first[i], second[j]))
          + signed(sign[i], view(second[i], first[j])) + signed(sign[i] * sign[j], view(second[i], second[j])))


def _transform_cotangent(dy: Array) -> Array:
  """A dy A^T, the transpose of `_transform_output`: [b, 2h, 2w, O] -> [16, b, h, w, O]."""
  a = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])
  factors = np.einsum("ip,jq->ijpq", a, a).reshape(16, 2, 2, 1, 1, 1, 1)
  return sum(jnp.asarray(factors[:, p, q], dy.dtype) * dy[:, p::2, q::2] for p in range(2) for q in range(2))


def _transform_output(m: Array) -> Array:
  """A^T m A: [4, 4, b, h, w, O] -> [b, 2h, 2w, O]."""
  half = lambda m: (m[0] + m[1] + m[2], m[1] - m[2] - m[3])
  columns = [half(m[:, j]) for j in range(4)]
  y = jnp.stack([jnp.stack(half(row), 3) for row in zip(*columns)], 2)  # [b, h, 2, w, 2, O]
  b, h, _, w, _, _ = y.shape
  return y.reshape(b, 2 * h, 2 * w, -1)


# A banded matrix for each row of the kernel, on top of each other: [h * V * C, n * O], which makes `n` columns of the
# result out of the `V` columns of the padded image that they see. A whole row at once is one large product most of
# whose numbers are zeros, a column at once has none but is copied h * w times and has only O columns.


def _band_forward(conv: _Conv, x: Array, w: Array) -> Array:
  return (_band_rows(conv, x) @ _band(conv, w)).reshape(-1, *conv.out, conv.features[1])


def _band_input_gradient(conv: _Conv, dy: Array, w: Array) -> Array:
  rows = _band_columns(conv, dy) @ _band(conv, w).T
  back = jax.linear_transpose(
      functools.partial(_band_rows, conv),
      jax.ShapeDtypeStruct((dy.shape[0], *conv.image, conv.features[0]), dy.dtype))
  return back(rows)[0]


def _band_kernel_gradient(conv: _Conv, x: Array, dy: Array) -> Array:
  band = jnp.einsum("bhnk,bhno->ko", _band_rows(conv, x), _band_columns(conv, dy))
  w = jax.ShapeDtypeStruct((*conv.kernel, *conv.features), x.dtype)
  return jax.linear_transpose(functools.partial(_band, conv), w)(band)[0]


def _band_size(conv: _Conv) -> Pair:
  """How many columns of the result the matrix makes, and how many of the image they see.

  The fewest that leave it `_BAND_COLUMNS` columns, and divide the result.
  """
  wide = [n for n in range(1, conv.out[1] + 1) if conv.out[1] % n == 0 and n * conv.features[1] >= _BAND_COLUMNS]
  n = min(wide, default=conv.out[1])
  return n, conv.strides[1] * (n - 1) + conv.kernel[1]


def _band_rows(conv: _Conv, x: Array) -> Array:
  """For each row of the result and each part of it, what it sees of the padded images: [B, out, parts, h * V * C]."""
  x = jnp.pad(x, ((0, 0), *conv.padding, (0, 0)))
  n, width = _band_size(conv)
  starts = range(0, conv.strides[1] * conv.out[1], conv.strides[1] * n)
  x = jnp.stack([x[:, :, start:start + width].reshape(*x.shape[:2], -1) for start in starts], 2)
  end = conv.strides[0] * (conv.out[0] - 1) + 1
  return jnp.concatenate([x[:, i:i + end:conv.strides[0]] for i in range(conv.kernel[0])], -1)


def _band_columns(conv: _Conv, dy: Array) -> Array:
  """[B, *out, O] -> [B, out, parts, n * O]."""
  n, _ = _band_size(conv)
  return dy.reshape(*dy.shape[:2], conv.out[1] // n, -1)


def _band(conv: _Conv, w: Array) -> Array:
  """The kernel at each of `n` columns of the result."""
  n, width = _band_size(conv)
  columns = jnp.arange(n)
  band = sum(
      jnp.einsum("xz,hco->hxczo", jnp.eye(width, dtype=w.dtype)[:, conv.strides[1] * columns + j], w[:, j])
      for j in range(conv.kernel[1]))
  return band.reshape(conv.kernel[0] * width * conv.features[0], -1)


# Patches: what each position of the result sees of the images.


def _patches_forward(conv: _Conv, x: Array, w: Array) -> Array:
  kernel = w.reshape(-1, conv.features[1])

  def images(x):
    return _patches(conv, x).reshape(x.shape[0], *conv.out, -1) @ kernel

  return _map_chunks(images, _patches_chunk(conv, x), jnp.pad(x, ((0, 0), *conv.padding, (0, 0))))


def _patches_input_gradient(conv: _Conv, dy: Array, w: Array) -> Array:
  """The cotangent of the patches, added up where they overlap."""
  kernel = w.reshape(-1, conv.features[1]).T

  def images(dy):
    patches = lax.optimization_barrier(dy @ kernel).reshape(*dy.shape[:3], len(conv.taps), -1)
    x = jax.ShapeDtypeStruct((dy.shape[0], *conv.image, conv.features[0]), dy.dtype)
    taps = lambda x: [_shifted(conv, jnp.pad(x, ((0, 0), *conv.padding, (0, 0))), tap) for tap in conv.taps]
    return jax.linear_transpose(taps, x)([patches[..., i, :] for i in range(len(conv.taps))])[0]

  return _map_chunks(images, _patches_chunk(conv, dy), dy)


def _patches(conv: _Conv, x: Array) -> Array:
  """[b, H, W, C], padded -> [b, *out, taps, C]."""
  return _shifts(x, *_offsets(conv), conv.out, conv.strides, axis=3)


def _offsets(conv: _Conv) -> np.ndarray:
  """Row and column of each tap: [2, taps]."""
  return np.array(conv.taps).T * np.array(conv.dilation)[:, None]


def _patches_chunk(conv: _Conv, x: Array) -> int:
  return _chunk(x.shape[0], math.prod(conv.out) * math.prod(conv.kernel) * conv.features[0], _PATCH_FLOATS)
