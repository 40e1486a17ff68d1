"""Convolution that is fast on a CPU, and is the native one everywhere else.

`conv_general_dilated` has the signature of `jax.lax.conv_general_dilated` and goes into a Flax
layer as `nn.Conv(..., conv_general_dilated=conv_general_dilated)`. On GPU and TPU it is the native
convolution with its native gradients. On a CPU, XLA's own convolution is slow for many shapes,
most of all for depthwise kernels, strides and small images. There, the static shapes decide which
of these forms is used:

- `_matmul_*`: a convolution with a 1x1 kernel is a matrix product.
- `_depthwise_*`: with one channel per group a convolution is a sum of shifted products.
- `_winograd_*`: 3x3 kernels without stride use F(2x2, 3x3) of Andrew Lavin, Scott Gray, "Fast
  Algorithms for Convolutional Neural Networks", 2015, https://arxiv.org/abs/1509.09308, section
  4.1: it needs 16 products where the definition needs 36. The kernel's gradient is F(3x3, 2x2),
  with the same transforms.
- `_band_*`: with few channels, parts of the image's rows are multiplied by a banded matrix that
  holds the kernel.
- `_patches_*`: for strides and small images, the kernel is multiplied by the patch of the image
  that each position of the result sees.
- `_native_*`: all other shapes use XLA's form.

Several forms work on a few images at a time, which keeps the intermediate arrays in the cache
(`_chunk`).

The convolution and its two gradients are bilinear, and each one's gradients are the other two:

  forward(x, w)             input_gradient(dy, w)         kernel_gradient(x, dy)
    d/dx  input_gradient      d/ddy  forward                d/dx   input_gradient
    d/dw  kernel_gradient     d/dw   kernel_gradient        d/ddy  forward

So reverse mode of any order stays within these forms. Forward mode needs `forward_mode=True`.

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

_WINOGRAD_CHANNELS = 64  # with fewer, the transforms cost more than the products save
# Tiles times channels at once: 16 transforms of so many floats fill 16 MB.
_WINOGRAD_FLOATS = 2**18
_PATCH_FLOATS = 2**20  # the size of all patches at once
_FEW_CHANNELS = 4  # with more, the native gradient of the kernel is faster than bands
_BAND_FLOATS = 2**17  # beyond this size of a whole row's banded matrix other forms are faster
# The least columns of the banded matrix: a product with fewer costs more than their zeros save.
_BAND_COLUMNS = 80


@dataclasses.dataclass(frozen=True)
class _Conv:
  """The static description of a convolution of [B, H, W, C] with [*kernel, C / groups, O].

  Attributes:
    image, kernel: their spatial sizes.
    strides, dilation: the kernel's strides and dilation in each spatial dimension.
    padding: (low, high) of each spatial dimension.
    groups: the number of groups that the channels are split into.
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
    sizes = zip(self.image, self.kernel, self.strides, self.dilation, self.padding)
    return tuple(
        (size + lo + hi - (k - 1) * d - 1) // s + 1 for size, k, s, d, (lo, hi) in sizes)

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
    # The image's gradient pads by kernel - 1 - padding, which must not be negative.
    reach = [(k - 1) * d for k, d in zip(self.kernel, self.dilation)]
    return (self.groups == self.features[0] == self.features[1] > 1
            and all(0 <= p <= r for r, pair in zip(reach, self.padding) for p in pair))

  @property
  def is_winograd(self) -> bool:
    return (self.plain and self.kernel == (3, 3) and self.strides == self.dilation == (1, 1)
            and min(self.features) >= _WINOGRAD_CHANNELS
            and all(p <= 2 for pair in self.padding for p in pair))

  @property
  def is_band(self) -> bool:
    width = self.image[1] + sum(self.padding[1])
    floats = self.kernel[0] * width * self.features[0] * self.out[1] * self.features[1]
    return self.plain and self.dilation == (1, 1) and floats <= _BAND_FLOATS


def conv_general_dilated(
    lhs: Array, rhs: Array, window_strides: Sequence[int], padding: str | Sequence[Pair],
    lhs_dilation: Sequence[int] | None = None, rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None, feature_group_count: int = 1, batch_group_count: int = 1,
    precision: Any = None, preferred_element_type: Any = None, out_sharding: Any = None, *,
    forward_mode: bool = False,
) -> Array:
  """Computes `jax.lax.conv_general_dilated` in forms that are fast on a CPU too.

  The results differ from the native ones by rounding alone (in float32 by 1e-5 of the result's
  scale). bfloat16 is computed in float32 and rounded once.

  Args:
    lhs: the images; only [B, H, W, C] and [B, W, C] use our forms.
    rhs: the kernel; only [h, w, C / groups, O] and [w, C / groups, O] use our forms.
    window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
    batch_group_count, precision, preferred_element_type, out_sharding: the native function's
      arguments. What our forms do not cover uses the native one, on a CPU too.
    forward_mode: whether to use the native form everywhere. It is the only one that can be
      differentiated in forward mode.

  Returns:
    What the native function returns.

  Raises:
    TypeError, ValueError: the native function raises them.
  """
  native = functools.partial(
      lax.conv_general_dilated, window_strides=window_strides, padding=padding,
      lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation, dimension_numbers=dimension_numbers,
      feature_group_count=feature_group_count, batch_group_count=batch_group_count,
      precision=precision, preferred_element_type=preferred_element_type,
      out_sharding=out_sharding)
  out = jax.eval_shape(native, lhs, rhs)  # the native function checks its arguments
  rank = lhs.ndim - 2
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  last = (0, rank + 1, *range(1, rank + 1))  # channels last
  covered = (not forward_mode and rank in (1, 2) and 0 not in out.shape and out_sharding is None
             and numbers.lhs_spec == numbers.out_spec == last
             and numbers.rhs_spec == (rank + 1, rank, *range(rank)) and batch_group_count == 1
             and set(lhs_dilation or (1,)) == {1} and precision in (None, lax.Precision.DEFAULT)
             and preferred_element_type in (None, lhs.dtype)
             and lhs.dtype in (jnp.float32, jnp.bfloat16, jnp.float64))
  if not covered:
    return native(lhs, rhs)

  dilation = tuple(rhs_dilation or (1,) * rank)
  if isinstance(padding, str):
    effective = [(k - 1) * d + 1 for k, d in zip(rhs.shape, dilation)]
    padding = lax.padtype_to_pads(lhs.shape[1:-1], effective, window_strides, padding)
  # A convolution over one dimension is one over two of which the first has size 1.
  ones, zeros = ((1,), ((0, 0),)) if rank == 1 else ((), ())
  conv = _Conv(
      image=(*ones, *lhs.shape[1:-1]), kernel=(*ones, *rhs.shape[:rank]),
      strides=(*ones, *window_strides), dilation=(*ones, *dilation),
      padding=(*zeros, *((int(lo), int(hi)) for lo, hi in padding)),
      groups=feature_group_count, features=(lhs.shape[-1], rhs.shape[-1]))
  y = _forward(conv, lhs.reshape(lhs.shape[0], *conv.image, -1),
               rhs.reshape(*conv.kernel, *rhs.shape[rank:]))
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


def _by_platform(
    form: Callable[..., Array], native: Callable[..., Array], conv: _Conv, a: Array, b: Array,
) -> Array:
  if form is native:
    return native(conv, a, b)

  def cpu(a, b):
    # The barrier stops XLA from recomputing the producers for every element read.
    a, b = lax.optimization_barrier((a, b))
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return form(conv, a.astype(wide), b.astype(wide)).astype(a.dtype)

  return lax.platform_dependent(a, b, cpu=cpu, default=functools.partial(native, conv))


def _forms(conv: _Conv) -> tuple[Callable[..., Array], Callable[..., Array], Callable[..., Array]]:
  """Returns the forms of the three functions for a CPU."""
  if conv.is_matmul:
    return _matmul_forward, _matmul_input_gradient, _matmul_kernel_gradient
  if conv.is_depthwise:
    return _depthwise_forward, _depthwise_input_gradient, _depthwise_kernel_gradient
  if conv.is_winograd:
    return _winograd_forward, _winograd_input_gradient, _winograd_kernel_gradient
  if conv.is_band:
    few = conv.features[0] <= _FEW_CHANNELS
    return (_band_forward, _band_input_gradient,
            _band_kernel_gradient if few else _native_kernel_gradient)
  if not conv.plain:
    return _native_forward, _native_input_gradient, _native_kernel_gradient
  # XLA swaps images and kernel if the kernel is larger, and then uses only its slowest form.
  area = math.prod(conv.kernel)
  input_gradient = conv.strides != (1, 1) or area > math.prod(conv.out)
  return (_patches_forward if area > math.prod(conv.image) else _native_forward,
          _patches_input_gradient if input_gradient else _native_input_gradient,
          _native_kernel_gradient)


# Native.


def _native_forward(conv: _Conv, x: Array, w: Array) -> Array:
  return lax.conv_general_dilated(
      x, w, conv.strides, conv.padding, rhs_dilation=conv.dilation,
      dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=conv.groups)


def _native_input_gradient(conv: _Conv, dy: Array, w: Array) -> Array:
  x = jax.ShapeDtypeStruct((dy.shape[0], *conv.image, conv.features[0]), dy.dtype)
  return jax.linear_transpose(lambda x: _native_forward(conv, x, w), x)(dy)[0]


def _native_kernel_gradient(conv: _Conv, x: Array, dy: Array) -> Array:
  c, o = conv.features
  w = jax.ShapeDtypeStruct((*conv.kernel, c // conv.groups, o), x.dtype)
  return jax.linear_transpose(lambda w: _native_forward(conv, x, w), w)(dy)[0]


# A few images at a time.


def _chunk(batch: int, floats: int, limit: int) -> int:
  """Returns how many images to work on at once.

  It is a divisor of `batch` with about `limit` floats in total, at `floats` per image. Every
  device has the same number of images in a chunk; otherwise a batch that is split over devices
  would have to be gathered. See `_split`.
  """
  devices = jax.device_count()
  wanted = max(1, limit // floats) * devices
  divisors = [n for n in range(1, batch + 1)
              if batch % n == 0 and (n % devices == 0 or n == batch)]
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
  """Applies `f` to the whole batch, `size` images at a time."""
  if size == x.shape[0]:
    return f(x)
  x = _split(x, size)
  out = jax.eval_shape(f, x[:, 0])

  def body(i, y):
    return lax.dynamic_update_index_in_dim(y, f(_chunk_of(x, i)), i, 1)

  # All of `y` will be overwritten. XLA would share one array of zeros among the loops of all
  # layers, and each loop would copy it.
  y = jnp.full((size, x.shape[1], *out.shape[1:]), x[(0,) * x.ndim].astype(out.dtype))
  y = lax.fori_loop(0, x.shape[1], body, y)
  return y.reshape(-1, *out.shape[1:])


def _sum_chunks(f: Callable[[Array, Array], Any], size: int, x: Array, dy: Array) -> Any:
  """Sums `f` over the whole batch, `size` images at a time."""
  if size == x.shape[0]:
    return f(x, dy)
  x, dy = _split(x, size), _split(dy, size)

  def body(i, total):
    part = f(_chunk_of(x, i), _chunk_of(dy, i))
    return jax.tree.map(jnp.add, total, part)

  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, x[:, 0], dy[:, 0]))
  return lax.fori_loop(0, x.shape[1], body, zeros)


def _after(x: Array, constant: np.ndarray) -> Array:
  """Returns `constant`, in a form that seems to depend on `x`.

  Otherwise XLA would compute the results of constants and kernels for all layers at once, at the
  start of the program.
  """
  constant = jnp.asarray(constant, x.dtype)
  first = x[(0,) * x.ndim]
  return lax.select(jnp.full(constant.shape, first == first), constant,
                    lax.optimization_barrier(constant))


def _pad(x: Array, padding: Sequence[Pair]) -> Array:
  """Pads the images with zeros once, and not again in each of the loops that read the result."""
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  return lax.optimization_barrier(x) if any(map(sum, padding)) else x


def _shifted(conv: _Conv, x: Array, tap: Pair) -> Array:
  """Returns what the kernel's position `tap` sees of the padded images: [B, *out, C]."""
  start = [t * d for t, d in zip(tap, conv.dilation)]
  (i, j), (h, w), (s, t) = start, conv.out, conv.strides
  return x[:, i:i + s * (h - 1) + 1:s, j:j + t * (w - 1) + 1:t]


def _shifts(
    x: Array, rows: np.ndarray, columns: np.ndarray, out: Pair, strides: Pair, axis: int,
) -> Array:
  """Stacks views of the padded images along `axis`.

  The views start at `rows` and `columns` and have size `out` with `strides`. One loop gathers all
  of them; slices would be compiled one by one.
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
  gaps = [(0, size - (out - 1) * s - 1, s - 1)
          for size, out, s in zip(conv.image, conv.out, conv.strides)]
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
  sizes = zip(conv.image, dy.shape[1:3], conv.kernel, conv.dilation, conv.padding)
  padding = tuple(((k - 1) * d - lo, size - spread_size + lo)
                  for size, spread_size, k, d, (lo, _) in sizes)
  reverse = dataclasses.replace(conv, image=dy.shape[1:3], strides=(1, 1), padding=padding)
  return _depthwise_forward(reverse, dy, w[::-1, ::-1])


def _depthwise_kernel_gradient(conv: _Conv, x: Array, dy: Array) -> Array:
  """Adds the rows one by one, so that the sums run over arrays and not over single numbers."""
  x = _pad(x, conv.padding)
  width = conv.strides[1] * (conv.out[1] - 1) + 1

  def body(row, sums):
    dy_row = lax.dynamic_index_in_dim(dy, row, 1, keepdims=False)
    new = []
    for i, in sorted({(i,) for i, _ in conv.taps}):
      place = row * conv.strides[0] + i * conv.dilation[0]
      x_row = lax.dynamic_index_in_dim(x, place, 1, keepdims=False)
      for j in range(conv.kernel[1]):
        start = j * conv.dilation[1]
        new.append(sums[len(new)] + x_row[:, start:start + width:conv.strides[1]] * dy_row)
    return new

  # The loop starts from the first row's products. Zeros would be one array, which the loop would
  # copy for each tap.
  sums = lax.fori_loop(1, conv.out[0], body, body(0, [0] * len(conv.taps)))
  return jnp.stack([jnp.sum(s, (0, 1)) for s in sums]).reshape(*conv.kernel, 1, -1)


# Winograd. Tiles are numbered row by row. The 16 numbers of a tile lie along the leading axis,
# which makes 16 matrix products.


def _winograd_forward(conv: _Conv, x: Array, w: Array) -> Array:
  return _winograd(conv, x, _KERNEL_TRANSFORM, w, "ktc,kco->kto")


def _winograd_input_gradient(conv: _Conv, dy: Array, w: Array) -> Array:
  """The forward form with the kernel reversed."""
  reverse = dataclasses.replace(conv, image=conv.out, features=conv.features[::-1],
                                padding=tuple((2 - lo, 2 - hi) for lo, hi in conv.padding))
  return _winograd(reverse, dy, _KERNEL_TRANSFORM[:, ::-1, ::-1], w, "kto,kco->ktc")


def _winograd(conv: _Conv, x: Array, transform: np.ndarray, w: Array, product: str) -> Array:
  """Computes `product` of the transformed images and the transformed kernel [3, 3, C, O]."""
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
    return jnp.einsum("ktc,kto->kco", x.reshape(16, -1, x.shape[-1]),
                      dy.reshape(16, -1, dy.shape[-1]))

  products = _sum_chunks(images, _winograd_chunk(conv, x, tiles), x, dy)
  return jnp.einsum("kij,kco->ijco", _KERNEL_TRANSFORM, products)


def _winograd_tiles(conv: _Conv) -> tuple[Pair, list[Pair]]:
  """Returns how many 2x2 tiles the result has, and the images' padding that completes them."""
  tiles = tuple(-(-size // 2) for size in conv.out)
  return tiles, [(lo, 2 * n + 2 - size - lo)
                 for n, size, (lo, _) in zip(tiles, conv.image, conv.padding)]


def _winograd_chunk(conv: _Conv, x: Array, tiles: Pair) -> int:
  return _chunk(x.shape[0], math.prod(tiles) * sum(conv.features), _WINOGRAD_FLOATS)


# G g G^T of the paper: [16, 3, 3].
_G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
_KERNEL_TRANSFORM = np.einsum("ia,jb->ijab", _G, _G).reshape(16, 3, 3)


def _transform_images(x: Array, tiles: Pair) -> Array:
  """Computes the paper's B^T d B for all overlapping 4x4 tiles d of the images.

  Each row of B^T adds one row of d to another, or subtracts it, so the result is made of four
  shifted views of the images.

  Args:
    x: the padded images [b, 2h + 2, 2w + 2, C].
    tiles: (h, w).

  Returns:
    [16, b, h, w, C].
  """
  first, second, sign = np.array([0, 1, 2, 1]), np.array([2, 2, 1, 3]), np.array([-1, 1, -1, -1])
  i, j = np.divmod(np.arange(16), 4)

  def view(rows, columns, signs):
    shifted = _shifts(x, rows, columns, tiles, (2, 2), axis=0)
    return jnp.asarray(signs, x.dtype)[:, None, None, None, None] * shifted

  return (_shifts(x, first[i], first[j], tiles, (2, 2), axis=0)
          + view(first[i], second[j], sign[j]) + view(second[i], first[j], sign[i])
          + view(second[i], second[j], sign[i] * sign[j]))


def _transform_cotangent(dy: Array) -> Array:
  """A dy A^T, the transpose of `_transform_output`: [b, 2h, 2w, O] -> [16, b, h, w, O]."""
  a = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])
  factors = np.einsum("ip,jq->ijpq", a, a).reshape(16, 2, 2, 1, 1, 1, 1)
  return sum(jnp.asarray(factors[:, p, q], dy.dtype) * dy[:, p::2, q::2]
             for p in range(2) for q in range(2))


def _transform_output(m: Array) -> Array:
  """A^T m A: [4, 4, b, h, w, O] -> [b, 2h, 2w, O]."""
  def half(m):
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]

  columns = [half(m[:, j]) for j in range(4)]
  y = jnp.stack([jnp.stack(half(row), 3) for row in zip(*columns)], 2)  # [b, h, 2, w, 2, O]
  b, h, _, w, _, _ = y.shape
  return y.reshape(b, 2 * h, 2 * w, -1)


# Bands. Each row of the kernel has a banded matrix, and these stand on top of each other:
# [h * V * C, n * O]. The product computes `n` columns of the result from the `V` columns of the
# padded image that they see. With a whole row at once it is one large product, most of whose
# numbers are zeros. With one column at once it has no zeros, but the image is copied h * w times
# and the matrix has only O columns.


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
  """Returns how many columns the matrix computes, and how many of the image's these see.

  The first is the smallest divisor of the result's width that gives the matrix at least
  `_BAND_COLUMNS` columns.
  """
  wide = [n for n in range(1, conv.out[1] + 1)
          if conv.out[1] % n == 0 and n * conv.features[1] >= _BAND_COLUMNS]
  n = min(wide, default=conv.out[1])
  return n, conv.strides[1] * (n - 1) + conv.kernel[1]


def _band_rows(conv: _Conv, x: Array) -> Array:
  """Returns what each part of each row of the result sees: [B, out, parts, h * V * C]."""
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
  """Returns the matrix that holds the kernel at each of `n` columns of the result."""
  n, width = _band_size(conv)
  columns = jnp.arange(n)
  diagonal = jnp.eye(width, dtype=w.dtype)
  band = sum(jnp.einsum("xz,hco->hxczo", diagonal[:, conv.strides[1] * columns + j], w[:, j])
             for j in range(conv.kernel[1]))
  return band.reshape(conv.kernel[0] * width * conv.features[0], -1)


# Patches. A patch is what a position of the result sees of the images.


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

    def views(x):
      margin = ((0, 0), *conv.padding, (0, 0))
      return [_shifted(conv, jnp.pad(x, margin), tap) for tap in conv.taps]

    return jax.linear_transpose(views, x)([patches[..., i, :] for i in range(len(conv.taps))])[0]

  return _map_chunks(images, _patches_chunk(conv, dy), dy)


def _patches(conv: _Conv, x: Array) -> Array:
  """Padded images [b, H, W, C] -> [b, *out, taps, C]."""
  return _shifts(x, *_offsets(conv), conv.out, conv.strides, axis=3)


def _offsets(conv: _Conv) -> np.ndarray:
  """The row and column of each tap: [2, taps]."""
  return np.array(conv.taps).T * np.array(conv.dilation)[:, None]


def _patches_chunk(conv: _Conv, x: Array) -> int:
  floats = math.prod(conv.out) * math.prod(conv.kernel) * conv.features[0]
  return _chunk(x.shape[0], floats, _PATCH_FLOATS)
