"""Decoders that predict the next token: GPT-2, and the form that later decoders share.

Alec Radford et al. "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2).
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
Hugo Touvron et al. "LLaMA: Open and Efficient Foundation Language Models", 2023.
https://arxiv.org/abs/2302.13971

Both are stacks of one block: attention to the tokens before, and a perceptron, each on normalised
tokens and with a shortcut. They differ in what the block is made of:

              GPT-2                   today's form (llama, qwen3)
  norm        layer norm              RMS norm
  positions   learned, added once     rotary, in every attention (`ops.rotary`)
  perceptron  GELU                    SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202)
  attention   a key for every query   several queries share a key (Ainslie et al. 2023,
                                      https://arxiv.org/abs/2305.13245); maybe `qk_norm`
  biases      everywhere              nowhere

Dimensions: `B` batch, `L` tokens, `D` width, `V` vocabulary, `H` heads of queries, `G` heads of keys
and values.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax import errors
from dljax.models.blocks import Cache, LayerNorm, Projection, append, apply_blocks, attend, empty_cache
from dljax.models.layers import RMSNorm
from dljax.ops import rotary
from dljax.ops.dense import dense_transposed, dot_general
from dljax.ops.gelu import gelu, gelu_tanh

Array = jax.Array

NORMS, POSITIONS = ("layer", "rms"), ("learned", "rotary")
# The perceptron's activations; "swiglu" multiplies by a second product.
ACTIVATIONS = {"gelu_tanh": gelu_tanh, "gelu": gelu, "relu": nn.relu, "swiglu": nn.silu}
_INIT = nn.initializers.normal(0.02)


class Form(nn.Module):
  """What a decoder and its blocks are made of.

  Attributes:
    vocab_size: V.
    max_length: the context, the greatest number of tokens that are read together.
    embed_dim, num_layers, num_heads: D, the number of blocks, H.
    num_kv_heads, head_dim: G, which divides H, and the width of a head; None for H and D / H.
    mlp_dim: the width of the perceptron's hidden layer; None for 4 D.
    norm, epsilon: one of `NORMS`, and the number added to the variance or the mean square.
    positions: one of `POSITIONS`.
    rope_theta, rope_scaling: see `rotary.frequencies`.
    activation: a key of `ACTIVATIONS`.
    use_bias, mlp_bias: whether there are biases, and in perceptrons; None for as elsewhere.
    qk_norm: whether the queries and keys of a head are normalised.
    tied: whether the head's kernel is the embedding.
    window: the number of tokens that a token sees, itself included; None for all.
    full_layers: the numbers of the blocks, from 0, in which it sees all in spite of `window`.
    scale_by_layer: whether scores are divided by the block's number, from 1.
    dropout: the dropout after the embeddings, on attention weights, and at the end of a branch.
    lora_rank, lora_alpha, remat, layer_scan: see `Projection` and `apply_blocks`.
    dtype: the dtype of the computation; parameters are float32.
  """

  vocab_size: int
  max_length: int
  embed_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int | None = None
  head_dim: int | None = None
  mlp_dim: int | None = None
  norm: str = "layer"
  epsilon: float = 1e-5
  positions: str = "learned"
  rope_theta: float = 10_000.0
  rope_scaling: Mapping[str, float] | None = None
  activation: str = "gelu_tanh"
  use_bias: bool = True
  mlp_bias: bool | None = None
  qk_norm: bool = False
  tied: bool = True
  window: int | None = None
  full_layers: Sequence[int] = ()
  scale_by_layer: bool = False
  dropout: float = 0.0
  lora_rank: int = 0
  lora_alpha: float = 16.0
  dtype: Any = jnp.float32
  remat: bool = False
  layer_scan: bool = False

  def norm_layer(self, name: str) -> nn.Module:
    """A norm of this form."""
    if self.norm == "rms":
      return RMSNorm(self.epsilon, self.dtype, name=name)
    return LayerNorm(self.epsilon, self.use_bias, self.dtype, name=name)

  @property
  def size_of_head(self) -> int:
    """The width of a head."""
    return self.head_dim or self.embed_dim // self.num_heads


class Block(Form):
  """Attention and a perceptron, each on normalised tokens, with shortcuts."""

  @nn.compact
  def __call__(
      self, x: Array, layer: int | Array, angles: Array | None, rules: Mapping[str, Any],
      cache: Cache | None, train: bool,
  ) -> tuple[Array, Cache | None]:
    """[B, L, D] -> [B, L, D], and the block's part of the new cache; see `apply_blocks`.

    `angles` are those of rotary positions, and `rules` the arguments of `attend` for all blocks.
    """
    width, head_dim, groups = self.embed_dim, self.size_of_head, self.num_kv_heads or self.num_heads
    project = functools.partial(
        Projection, use_bias=self.use_bias, lora_rank=self.lora_rank, lora_alpha=self.lora_alpha,
        kernel_init=_INIT, dtype=self.dtype)
    # The branches' last products start smaller, as many of them are added (section 2.3).
    last = functools.partial(
        project, (width,), kernel_init=nn.initializers.normal(0.02 / math.sqrt(2 * self.num_layers)))
    drop = functools.partial(nn.Dropout, self.dropout, deterministic=not train)

    parts = project((groups, self.num_heads // groups + 2, head_dim), name="qkv")(self.norm_layer("norm1")(x))
    query = parts[..., :-2, :].reshape(*x.shape[:2], self.num_heads, head_dim)
    key, value = parts[..., -2, :], parts[..., -1, :]  # [B, L, G, head_dim]
    if self.qk_norm:
      query = RMSNorm(self.epsilon, self.dtype, name="query_norm")(query)
      key = RMSNorm(self.epsilon, self.dtype, name="key_norm")(key)
    if angles is not None:
      query, key = rotary.rotate(query, angles), rotary.rotate(key, angles)
    if self.scale_by_layer:
      query = query / jnp.asarray(layer + 1, query.dtype)
    window = None if layer in self.full_layers else self.window
    y, cache = attend(self, query, key, value, cache=cache, causal=True, window=window,
                      dropout=self.dropout if train else 0.0, **rules)
    x = x + drop()(last(axes=2, name="project")(y))

    y = self.norm_layer("norm2")(x)
    biases = self.use_bias if self.mlp_bias is None else self.mlp_bias
    hidden = functools.partial(project, (self.mlp_dim or 4 * width,), use_bias=biases)
    if self.activation == "swiglu":
      y = nn.silu(hidden(name="gate")(y)) * hidden(name="mlp1")(y)
    else:
      y = ACTIVATIONS[self.activation](hidden(name="mlp1")(y))
    return x + drop()(last(name="mlp2", use_bias=biases)(y)), cache


class GPT(Form):
  """Embeddings, blocks, a norm, and the logits of the next token."""

  @nn.compact
  def __call__(
      self, tokens: Array, cache: Cache | None = None, length: Array | None = None,
      segment: Array | None = None, position: Array | None = None, train: bool = False,
  ) -> dict[str, Any]:
    """Predicts the token after each of i32[B, L].

    Args:
      cache: the tokens before; see `init_cache`.
      length: i32[B], the number of tokens in each row before its padding; None for L. Without a
        cache it changes nothing, as no token sees those after it.
      segment: i32[B, L], the document of each token, where several are packed in a row.
      position: i32[B, L], the place of each token in its document; by default in the row.

    Returns:
      "logits" f32[B, L, V]; and "cache", the new one, or None without.

    Raises:
      UserError: the tokens are more than the context, or blocks under `layer_scan` differ.
    """
    if self.layer_scan and self.full_layers:
      raise errors.UserError("layer_scan needs equal blocks: drop it, or drop full_layers")
    rules = {"segment": segment}
    if cache is not None:
      position, cache, seen = append(cache, tokens.shape[1], length)
      rules = {**seen, "used": cache["used"]}
    elif tokens.shape[1] > self.max_length:
      raise errors.UserError(f"{tokens.shape[1]} tokens are more than the context of {self.max_length}: "
                             "shorten them, or take a model with a longer one")
    if position is None:
      position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    embed = nn.Embed(self.vocab_size, self.embed_dim, embedding_init=_INIT, dtype=self.dtype, name="embed")
    x, angles = embed(tokens), None
    if self.positions == "learned":
      table = self.param("positions", _INIT, (self.max_length, self.embed_dim), jnp.float32)
      x = x + jnp.take(table, position, axis=0, mode="clip").astype(x.dtype)
    else:
      turns = rotary.frequencies(self.size_of_head, self.rope_theta, self.rope_scaling)
      angles = rotary.angles(position, turns, self.dtype)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)

    form = {name: getattr(self, name) for name in Form.__dataclass_fields__ if name not in ("parent", "name")}
    x, cache = apply_blocks(self, Block, form, x, angles, rules, cache=cache, train=train)
    x = self.norm_layer("norm")(x)
    if self.tied:
      logits = dense_transposed(x, embed.embedding.astype(x.dtype))
    else:
      logits = nn.Dense(self.vocab_size, use_bias=False, kernel_init=_INIT, dtype=self.dtype,
                        dot_general=dot_general, name="head")(x)
    return {"logits": logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), "cache": cache}

  def init_cache(self, batch: int, length: int) -> Cache:
    """The cache before the first token, with room for `length`; see `blocks.empty_cache`."""
    return empty_cache(batch, length, num_layers=self.num_layers, dtype=self.dtype,
                       groups=self.num_kv_heads or self.num_heads, head_dim=self.size_of_head)


_decoder = functools.partial(
    functools.partial, GPT, norm="rms", positions="rotary", activation="swiglu", use_bias=False)
_gpt2 = functools.partial(functools.partial, GPT, vocab_size=50257, max_length=1024)
VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # Radford et al. 2019, table 2, with the numbers of parameters of the published weights.
    "gpt2": _gpt2(embed_dim=768, num_layers=12, num_heads=12),  # 124,439,808
    "gpt2_medium": _gpt2(embed_dim=1024, num_layers=24, num_heads=16),  # 354,823,168
    "gpt2_large": _gpt2(embed_dim=1280, num_layers=36, num_heads=20),  # 774,030,080
    "gpt2_xl": _gpt2(embed_dim=1600, num_layers=48, num_heads=25),  # 1,557,611,200
    # Ben Allal et al. 2025, https://arxiv.org/abs/2502.02737: 134,515,008.
    "llama_smollm2_135m": _decoder(
        vocab_size=49152, max_length=8192, embed_dim=576, num_layers=30, num_heads=9,
        num_kv_heads=3, mlp_dim=1536, rope_theta=100_000.0),
    # Yang et al. 2025, https://arxiv.org/abs/2505.09388: 596,049,920.
    "qwen3_0_6b": _decoder(
        vocab_size=151_936, max_length=40_960, embed_dim=1024, num_layers=28, num_heads=16,
        num_kv_heads=8, head_dim=128, mlp_dim=3072, epsilon=1e-6, rope_theta=1e6, qk_norm=True),
    # Small ones of both forms, the first as in nanoGPT, https://github.com/karpathy/nanoGPT.
    "gpt_nano": functools.partial(GPT, vocab_size=257, max_length=64, embed_dim=128, num_layers=4,
                                  num_heads=4, use_bias=False),
    "llama_nano": _decoder(vocab_size=257, max_length=64, embed_dim=128, num_layers=4, num_heads=4,
                           num_kv_heads=2, mlp_dim=320),
}
SHARDING: Sequence[tuple[str, tuple[str | None, ...]]] = (  # see `dljax.models.vit.SHARDING`
    ("*embed/embedding", (None, "fsdp")),
    ("*/qkv/kernel", ("fsdp", "tensor", None, None)),
    ("*/qkv/bias", ("tensor", None, None)),
    ("*/project/kernel", ("tensor", None, "fsdp")),
    *((f"*/{name}/kernel", ("fsdp", "tensor")) for name in ("gate", "mlp1")),
    ("*/mlp1/bias", ("tensor",)),
    ("*/mlp2/kernel", ("tensor", "fsdp")),
)
NO_DECAY: Sequence[str] = ("positions", "*/positions")
INPUT_DIMENSIONS: Sequence[tuple[str, int]] = (("*/qkv/kernel", 1),)
