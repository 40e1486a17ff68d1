"""What families of attention share: projections, a norm, and stacks of blocks with a cache.

Low-rank adaptation. Edward J. Hu et al. "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
https://arxiv.org/abs/2106.09685

A cache holds the keys and values of the tokens that were read before. Every call appends its tokens
to all rows at the same slots, and a slot has a position in each row: padding gets one that no query
reaches. So prompts of unequal lengths, prompts that are read in parts, and generated tokens are one
case, and nothing is scattered by row.

Dimensions: `B` batch, `L` tokens, `D` width, `H` heads of queries, `G` heads of keys and values, `S`
slots of a cache, `r` rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax.ops.attention import attention, attention_with_weights
from dljax.ops.dense import dense
from dljax.ops.norm import layer_norm

Cache = Mapping[str, Any]
_NOWHERE = 2**30  # the position of a slot that holds no token: later than any query's


class LayerNorm(nn.Module):
  """`flax.linen.LayerNorm` by `ops.norm`, whose gradient is faster on a CPU.

  Attributes:
    epsilon: the number added to the variance.
    use_bias: whether a bias is added.
    dtype: the dtype of the result.
  """

  epsilon: float = 1e-5
  use_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
    bias = None
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
    return layer_norm(x.astype(self.dtype), scale, bias, self.epsilon)


class Projection(nn.Module):
  """A dense layer over the last axes of its input, whose result may have several axes.

  An attention's joint projection, to the queries, the key and the value of each group of heads,
  has the kernel [D, groups, queries + 2, head_dim]: devices that share a layer hold whole groups.

  Attributes:
    features: the sizes of the new axes.
    axes: the number of the input's axes that are summed over, its last.
    use_bias: whether a bias is added.
    kernel_init: the initialiser of the kernel as a matrix, [inputs, outputs].
    lora_rank: r; above 0, the product of two matrices, [inputs, r] and [r, outputs], is added to the
      kernel (Hu et al. 2021, section 4.1). The second starts at zero. `interop.table` knows the
      names of both.
    lora_alpha: that product's factor is lora_alpha / r.
    dtype: the dtype of the computation.
  """

  features: Sequence[int]
  axes: int = 1
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  lora_rank: int = 0
  lora_alpha: float = 16.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., *inputs] -> [..., *features]."""
    split = x.ndim - self.axes
    lead, inputs, outputs = x.shape[:split], x.shape[split:], tuple(self.features)
    x = x.reshape(*lead, math.prod(inputs)).astype(self.dtype)

    def matrix(name, init, left, right):
      flat = math.prod(left), math.prod(right)
      array = self.param(
          name, lambda *key: init(*key, flat, jnp.float32).reshape(*left, *right))
      return array.astype(self.dtype).reshape(flat)

    y = dense(x, matrix("kernel", self.kernel_init, inputs, outputs))
    if self.lora_rank:
      down = matrix("lora_down", nn.initializers.he_uniform(), inputs, (self.lora_rank,))
      up = matrix("lora_up", nn.initializers.zeros, (self.lora_rank,), outputs)
      y = y + dense(dense(x, down), up) * (self.lora_alpha / self.lora_rank)
    y = y.reshape(*lead, *outputs)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, outputs, jnp.float32)
      y = y + bias.astype(self.dtype)
    return y


def empty_cache(
    batch: int, length: int, *, num_layers: int, groups: int, head_dim: int, dtype: Any,
) -> Cache:
  """The cache of a decoder that has read nothing.

  Args:
    batch: B.
    length: S, the number of tokens that it has room for, padding included.
    num_layers, groups, head_dim: the decoder's sizes.
    dtype: the dtype of keys and values.

  Returns:
    "block0", ...: {"key", "value": [B, S, G, head_dim]}; "position" i32[B, S], each slot's position
    in the row; "used" i32[B], the number of slots in use, the same for all rows; "next" i32[B], the
    position of each row's next token.
  """
  shape = batch, length, groups, head_dim
  blocks = {f"block{i}": {name: jnp.zeros(shape, dtype) for name in ("key", "value")}
            for i in range(num_layers)}
  return {**blocks, "position": jnp.full((batch, length), _NOWHERE, jnp.int32),
          "used": jnp.zeros(batch, jnp.int32), "next": jnp.zeros(batch, jnp.int32)}


def append(
    cache: Cache, count: int, length: jax.Array | None,
) -> tuple[jax.Array, Cache, dict[str, jax.Array]]:
  """Makes room for the next tokens of all rows.

  Args:
    cache: see `empty_cache`.
    count: L, the number of new tokens in each row, padding included.
    length: i32[B], the number of new tokens that are no padding; None for L.

  Returns:
    The new tokens' positions i32[B, L]; the cache with them, whose blocks `attend` changes; and the
    arguments of `ops.attention` that say what they see.
  """
  places = jnp.arange(count, dtype=jnp.int32)
  length = jnp.asarray(count if length is None else length, jnp.int32)
  position = cache["next"][:, None] + places
  known = jnp.where(places < length[..., None], position, _NOWHERE)
  slot = cache["used"][0]
  known = jax.lax.dynamic_update_slice(cache["position"], known, (jnp.zeros_like(slot), slot))
  cache = {**cache, "position": known, "used": cache["used"] + count, "next": cache["next"] + length}
  return position, cache, {"query_position": position, "key_position": known}


def attend(
    module: nn.Module, query: jax.Array, key: jax.Array, value: jax.Array, *,
    used: jax.Array | None = None, cache: Cache | None = None, dropout: float = 0.0, **rules: Any,
) -> tuple[jax.Array, Cache | None]:
  """Attention of a block, to the cache and the new tokens.

  Args:
    module: the block. If its collection "intermediates" is mutable, it gets "attention", the weights
      [B, H, L, S], whose rows sum to 1.
    query, key, value: [B, L, H, head_dim], and twice [B, L, G, head_dim].
    used: i32[B], the slots in use with the new tokens.
    cache: the block's part of the cache, or None; then S is L.
    dropout: the dropout on the weights, with the module's rng stream "dropout".
    **rules: what a query sees; see `ops.attention`.

  Returns:
    [B, L, H, head_dim], and the block's part of the new cache.
  """
  if cache is not None:
    zero = jnp.zeros_like(used[0])
    start = zero, used[0] - key.shape[1], zero, zero
    cache = {name: jax.lax.dynamic_update_slice(cache[name], new.astype(cache[name].dtype), start)
             for name, new in (("key", key), ("value", value))}
    key, value = (cache[name].astype(query.dtype) for name in ("key", "value"))
  if not (dropout or module.is_mutable_collection("intermediates")):
    return attention(query, key, value, **rules), cache
  rng = module.make_rng("dropout") if dropout else None
  y, weights = attention_with_weights(query, key, value, dropout=dropout, rng=rng, **rules)
  module.sow("intermediates", "attention", weights)
  return y, cache


def apply_blocks(
    module: nn.Module, kind: type[nn.Module], form: Mapping[str, Any], x: jax.Array, *rest: Any,
    cache: Cache | None = None, train: bool,
) -> tuple[jax.Array, Cache | None]:
  """Applies the blocks of a network, block0, block1, ..., one after the other.

  Args:
    module: the network, with the attributes num_layers; remat, whether the backward pass recomputes
      each block; and layer_scan, whether one block is compiled for all layers, so that the time to
      compile does not grow with depth. Then the weights are stacked inside the program, which takes
      the memory of a copy of them and of their gradients; the variables are the same. With a cache
      there is no scan, as it would copy all weights for every token.
    kind, form: the class of the blocks and its attributes. A block is called as
      block(x, layer, *rest, cache, train), with its number from 0 and its part of the cache, and
      gives its result and the new part.
    x: [B, L, D].
    *rest: further arguments, the same for all blocks.
    cache: the cache that `append` gave, or None.
    train: whether to drop units.

  Returns:
    [B, L, D], and the new cache.
  """
  whole = cache is not None or module.is_mutable_collection("intermediates")
  if module.layer_scan and not (whole or module.is_initializing()):
    return _scan_blocks(module, kind(**form, parent=None), x, (*rest, None, train)), None
  if module.remat and cache is None:
    # Module and x are arguments 0 and 1; layer and train are no arrays.
    kind = nn.remat(kind, static_argnums=(2, 4 + len(rest)))
  for i in range(module.num_layers):
    part = None if cache is None else cache[f"block{i}"]
    x, part = kind(**form, name=f"block{i}")(x, i, *rest, part, train)
    if cache is not None:
      cache = {**cache, f"block{i}": part}
  return x, cache


def _scan_blocks(module, block, x, rest):
  rng = module.make_rng("dropout") if module.has_rng("dropout") else None

  def step(x, layer):
    params, i = layer
    rngs = {} if rng is None else {"dropout": jax.random.fold_in(rng, i)}
    return block.apply({"params": params}, x, i, *rest, rngs=rngs)[0], None

  params = [module.variables["params"][f"block{i}"] for i in range(module.num_layers)]
  stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *params)
  step = jax.checkpoint(step) if module.remat else step
  return jax.lax.scan(step, x, (stacked, jnp.arange(module.num_layers)))[0]
