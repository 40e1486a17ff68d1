"""Attention by the kernels of the devices' vendors, where one suits.

- TPU: splash attention, which comes with JAX (`jax.experimental.pallas.ops.tpu`): FlashAttention
  with shared keys and values, and without the blocks that a causal mask or a window hides. Queries
  are multiplied by the scale before it, in their dtype.
- NVIDIA GPU: cuDNN's attention, by `jax.nn.dot_product_attention`, where the cuDNN library is; in
  bfloat16 and float16, without padding and documents.

A kernel of this file is a function (q, k, v, mask, segments, causal, window, scale) -> [B, Q, H, V],
all of which mean what they do in `ops.attention.attention`, with positions 0, 1, 2, ..., a mask of
[B, K], and a pair of segments. Its first derivative is the kernel's too, and it has no other. A query
that sees no key may get any finite numbers. `ops.attention` adds what is missing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Segments = tuple[Array, Array]
Kernel = Callable[[Array, Array, Array, Array | None, Segments | None, bool, int | None, float],
                  Array]

_LANES = 128  # numbers that a TPU works on at once
# Queries or keys at a time: the first of these that divides the length. Larger blocks are faster,
# and this one's scores, in float32, still take but 1 MiB of the memory of 16 MiB beside a core.
_TPU_BLOCKS = (512, 256, 128)


def choose(
    platform: str | None, q: Array, k: Array, v: Array, mask: Array | None,
    segments: Segments | None, causal: bool, window: int | None,
) -> Kernel | None:
  """The kernel for these arguments on a platform's devices, or None if there is none.

  Args:
    platform: the target's, as its devices name it; None if it is not known.
    q, k, v, mask, segments, causal, window: the kernel's arguments, or their specifications.
  """
  for name, suits, kernel in _KERNELS:
    if name == platform and suits(q, k, v, mask, segments, causal, window):
      return kernel
  return None


# TPU


def _splash_suits(q, k, v, mask, segments, causal, window) -> bool:
  del mask, segments, causal  # all of them are known to the kernel
  lengths, widths = (q.shape[1], k.shape[1]), (q.shape[3], v.shape[3])
  return (
      {q.dtype, k.dtype, v.dtype} in ({jnp.dtype(jnp.float32)}, {jnp.dtype(jnp.bfloat16)})
      # The kernel counts in 32 bits, and Pallas in as many as JAX does by default.
      and not jax.config.jax_enable_x64
      and all(n and n % _LANES == 0 for n in lengths)
      # Narrower heads would leave more than half of the lanes idle.
      and all(n % (_LANES // 2) == 0 and n <= 2 * _LANES for n in widths)
      # Blocks of queries that see nothing are divided by zero.
      and (window is None or lengths[0] <= lengths[1])
      and _splash_modules() is not None)


@functools.cache
def _splash_modules():
  """The kernel's module and that of its masks, or None where this JAX has none."""
  try:  # it takes 0.4 seconds, and only programs for TPUs need it
    from jax.experimental.pallas.ops.tpu.splash_attention import (  # pylint: disable=g-import-not-at-top
        splash_attention_kernel, splash_attention_mask)
  except ImportError:
    return None
  return splash_attention_kernel, splash_attention_mask


def _splash(q, k, v, mask, segments, causal, window, scale, interpret: bool = False) -> Array:
  """Splash attention; `interpret` runs it on a CPU, for tests."""
  splash, masks = _splash_modules()
  (batch, queries, heads), keys = q.shape[:3], k.shape[1]
  rows, columns = (next(n for n in _TPU_BLOCKS if length % n == 0) for length in (queries, keys))
  sizes = splash.BlockSizes(
      block_q=rows, block_kv=columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows,
      block_kv_dq=columns)
  visible = masks.MultiHeadMask([_splash_mask(queries, keys, causal, window)] * heads)
  attend = splash.make_splash_mha(
      visible, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
  ids = None
  if mask is not None or segments is not None:
    own, other = segments or (jnp.ones((batch, queries), jnp.int32), jnp.ones((batch, keys), jnp.int32))
    if mask is not None:  # a hidden key is in a segment of no query
      other = jnp.where(mask, other, jnp.min(own, axis=1, keepdims=True) - 1)
    ids = splash.SegmentIds(own, other)
  q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
  return jax.vmap(attend)(q, k, v, ids).swapaxes(1, 2)


@functools.cache
def _splash_mask(queries: int, keys: int, causal: bool, window: int | None):
  """What is seen by the positions; the same object for all layers, which so share a program."""
  _, masks = _splash_modules()
  if window is not None:
    return masks.LocalMask((queries, keys), (window - 1, 0 if causal else window - 1), 0)
  return (masks.CausalMask if causal else masks.FullMask)((queries, keys))


# GPU


def _cudnn_suits(q, k, v, mask, segments, causal, window) -> bool:
  # cuDNN knows padding only as a length, and a mask as a bias that holds every query and key.
  if mask is not None or segments is not None or not q.shape[1]:
    return False
  if causal and q.shape[1] != k.shape[1] or window is not None and not causal:
    return False
  try:
    # JAX checks dtype, widths and lengths, and looks for the library.
    jax.eval_shape(functools.partial(_cudnn, mask=None, segments=None, causal=causal, window=window,
                                     scale=1.0), q, k, v)
  except (NotImplementedError, RuntimeError, ValueError):
    return False
  return True


def _cudnn(q, k, v, mask, segments, causal, window, scale) -> Array:
  del mask, segments  # there are none
  return jax.nn.dot_product_attention(
      q, k, v, scale=scale, is_causal=causal,
      local_window_size=None if window is None else (window - 1, 0), implementation="cudnn")


_KERNELS = (
    ("tpu", _splash_suits, _splash),
    ("gpu", _cudnn_suits, _cudnn),
)
