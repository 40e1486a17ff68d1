"""BERT: an encoder of text that sees both sides of every word.

Jacob Devlin, Ming-Wei Chang, Kenton Lee, Kristina Toutanova. "BERT: Pre-training of Deep
Bidirectional Transformers for Language Understanding", 2019. https://arxiv.org/abs/1810.04805

A block normalises after each shortcut and not before it. A token's first vector is the sum of three
learned ones: of its word, of its position, and of its type, which says to which of two sentences it
belongs. Where the paper is silent, this follows the authors' code
(https://github.com/google-research/bert): the epsilon of 1e-12, the exact GELU, a start from a
normal distribution truncated at two standard deviations of 0.02, and a head for masked words that
has a layer of its own and shares the embedding.

The sizes tiny and small come from Turc et al. 2019 (https://arxiv.org/abs/1908.08962), which has
the same blocks. What differs from the paper:
- Several texts can be packed in one row; none sees the others.
- `bert_nano` is not in a paper; it is made of the same blocks, for training on a CPU.

Dimensions: `B` batch, `L` tokens, `D` width, `H` heads, `V` vocabulary, `C` classes, `M` places
whose words are predicted.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dljax import errors
from dljax.models.blocks import LayerNorm, Projection, attend
from dljax.ops.dense import dense_transposed
from dljax.ops.gelu import gelu, gelu_tanh

Array = jax.Array

HEADS = ("none", "mlm", "pretraining", "sequence", "token", "span")
ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": nn.relu, "silu": nn.silu}
_POOLED = ("none", "pretraining", "sequence")  # these read the first token of a row
_INIT = nn.initializers.truncated_normal(0.02)


class Block(nn.Module):
  """Attention and a perceptron, each with a shortcut that is normalised; attributes of `BERT`."""

  num_heads: int
  mlp_dim: int
  activation: str
  epsilon: float
  dropout: float
  attention_dropout: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Array, rules: Mapping[str, Array], train: bool) -> Array:
    """[B, L, D] -> [B, L, D]; `rules` are the arguments of `ops.attention` on what is seen."""
    width = x.shape[-1]
    project = functools.partial(Projection, dtype=self.dtype, kernel_init=_INIT)
    norm = functools.partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
    drop = functools.partial(nn.Dropout, self.dropout, deterministic=not train)

    qkv = project((self.num_heads, 3, width // self.num_heads), name="qkv")(x)
    query, key, value = jnp.moveaxis(qkv, 3, 0)  # each [B, L, H, D / H]
    rate = self.attention_dropout if train else 0.0
    y, _ = attend(self, query, key, value, dropout=rate, **rules)
    x = norm(name="norm1")(x + drop()(project((width,), axes=2, name="project")(y)))

    y = ACTIVATIONS[self.activation](project((self.mlp_dim,), name="mlp1")(x))
    return norm(name="norm2")(x + drop()(project((width,), name="mlp2")(y)))


class BERT(nn.Module):
  """Embeddings, an encoder, and the head of a task.

  Attributes:
    vocab_size: V.
    max_length: the number of learned positions.
    num_types: the number of types that a token can have.
    embed_dim, num_layers, num_heads: the encoder's sizes.
    mlp_dim: the width of the perceptrons' hidden layers; None for 4 D.
    head: what it predicts: "mlm", the words at masked places; "pretraining", these, and whether
      the second sentence follows the first; "sequence", classes of the row; "token", classes of
      every token; "span", where an answer starts and ends; "none", nothing.
    num_classes: C, for the heads "sequence" and "token".
    tied: whether the kernel that gives the words' logits is the embedding.
    activation: the activation of the perceptrons and of the words' head, a key of `ACTIVATIONS`.
    epsilon: the number added to the variance in layer norms.
    dropout: the dropout after the embeddings and at the end of a branch.
    attention_dropout: the dropout on attention weights.
    head_dropout: the dropout before the heads "sequence" and "token"; None for `dropout`.
    dtype: the dtype of the computation; parameters are float32.
    remat: whether to recompute each block in the backward pass instead of storing its activations.
  """

  vocab_size: int = 30_522
  max_length: int = 512
  num_types: int = 2
  embed_dim: int = 768
  num_layers: int = 12
  num_heads: int = 12
  mlp_dim: int | None = None
  head: str = "none"
  num_classes: int = 1
  tied: bool = True
  activation: str = "gelu"
  epsilon: float = 1e-12
  dropout: float = 0.1
  attention_dropout: float = 0.1
  head_dropout: float | None = None
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
      self, tokens: Array, length: Array | None = None, token_type: Array | None = None,
      segment: Array | None = None, position: Array | None = None, places: Array | None = None,
      train: bool = False,
  ) -> dict[str, Array]:
    """Encodes texts, and predicts what `head` says.

    Args:
      tokens: i32[B, L].
      length: i32[B], the number of tokens of each row before its padding.
      token_type: i32[B, L], each token's type; by default 0.
      segment: i32[B, L], the text of each token, if several are packed in a row.
      position: i32[B, L], each token's place in its text; by default its place in the row.
      places: i32[B, M], where words are to be predicted; by default everywhere.
      train: whether to drop units.

    Returns:
      "hidden" [B, L, D] of `dtype`, the tokens' last vectors, and with a head float32 "logits":
      [B, M, V] or [B, L, V] of words; [B, C] of a row; [B, L, C] of tokens; [B, L, 2] of being an
      answer's start and end. The heads "none", "pretraining" and "sequence" have "pooled" [B, D],
      computed from the first token of a row; "pretraining" has "next_sentence" [B, 2], the logits
      of following and of not following. The intermediates "attention" are the blocks' weights.

    Raises:
      UserError: there are more tokens than positions, or sizes or names do not fit.
    """
    self._check(tokens, segment, position, places)
    rules = {} if segment is None else {"segment": segment}
    if length is not None:
      rules["mask"] = jnp.arange(tokens.shape[1]) < length[:, None]

    norm = functools.partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
    embed = functools.partial(
        nn.Embed, features=self.embed_dim, embedding_init=_INIT, dtype=self.dtype)
    words = embed(self.vocab_size, name="embed")
    position = jnp.arange(tokens.shape[1])[None] if position is None else position
    token_type = jnp.zeros((1, 1), jnp.int32) if token_type is None else token_type
    x = words(tokens) + embed(self.num_types, name="types")(token_type)
    x = norm(name="embed_norm")(x + embed(self.max_length, name="positions")(position))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
    for i in range(self.num_layers):
      x = block(
          num_heads=self.num_heads, mlp_dim=self.mlp_dim or 4 * self.embed_dim,
          activation=self.activation, epsilon=self.epsilon, dropout=self.dropout,
          attention_dropout=self.attention_dropout, dtype=self.dtype, name=f"block{i}",
      )(x, rules, train)

    outputs = {"hidden": x}
    project = functools.partial(Projection, dtype=self.dtype, kernel_init=_INIT)
    rate = self.dropout if self.head_dropout is None else self.head_dropout
    drop = nn.Dropout(rate, deterministic=not train)
    if self.head in _POOLED:
      outputs["pooled"] = jnp.tanh(project((self.embed_dim,), name="pooler")(x[:, 0]))
    if self.head in ("mlm", "pretraining"):
      if places is not None:
        x = jnp.take_along_axis(x, places[..., None], axis=1)
      x = ACTIVATIONS[self.activation](project((self.embed_dim,), name="transform")(x))
      x = norm(name="transform_norm")(x)
      if self.tied:
        x = dense_transposed(x, words.embedding.astype(x.dtype))
      else:
        x = project((self.vocab_size,), use_bias=False, name="decoder")(x)
      bias = self.param("decoder_bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32)
      outputs["logits"] = x + bias.astype(x.dtype)
    if self.head == "pretraining":
      outputs["next_sentence"] = project((2,), name="next_sentence")(outputs["pooled"])
    elif self.head == "sequence":
      outputs["logits"] = project((self.num_classes,), name="head")(drop(outputs["pooled"]))
    elif self.head == "token":
      outputs["logits"] = project((self.num_classes,), name="head")(drop(x))
    elif self.head == "span":
      outputs["logits"] = project((2,), name="head")(x)
    for name in outputs.keys() & {"logits", "next_sentence"}:
      outputs[name] = outputs[name].astype(jnp.promote_types(self.dtype, jnp.float32))
    return outputs

  def _check(self, tokens, segment, position, places):
    """Raises a `UserError` that names what does not fit."""
    for name, table in (("head", HEADS), ("activation", ACTIVATIONS)):
      if getattr(self, name) not in table:
        raise errors.unknown(f"BERT's {name}", getattr(self, name), table)
    if self.num_heads < 1 or self.embed_dim % self.num_heads:
      raise errors.UserError(f"{self.num_heads} heads do not divide a width of {self.embed_dim}: "
                             "take another number of heads")
    if position is None and tokens.shape[1] > self.max_length:
      raise errors.UserError(f"{tokens.shape[1]} tokens are more than this model's "
                             f"{self.max_length} positions: shorten the texts")
    if segment is not None and self.head in ("pretraining", "sequence"):
      raise errors.UserError(f"the head {self.head!r} reads the first token of a row, so that no "
                             "row can hold several texts: do not pack them")
    if places is not None and self.head not in ("mlm", "pretraining"):
      raise errors.UserError(f"places are for the heads of words, 'mlm' and 'pretraining', not for "
                             f"{self.head!r}")


def _bert(
    embed_dim: int, num_layers: int, num_heads: int, **sizes: int,
) -> Callable[..., nn.Module]:
  return functools.partial(
      BERT, embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads, **sizes)


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # Section 3 and table 1 of Turc et al., with the numbers of parameters without a head.
    "bert_tiny": _bert(128, 2, 2),  # 4,385,920
    "bert_small": _bert(512, 4, 8),  # 28,763,648
    "bert_base": _bert(768, 12, 12),  # 109,482,240
    "bert_large": _bert(1024, 24, 16),  # 335,141,888
    "bert_nano": _bert(96, 3, 4, max_length=128),
}

# As in `models/vit.py`: `tensor` splits heads and hidden units.
SHARDING: Sequence[tuple[str, tuple[str | None, ...]]] = (
    ("*/embed/embedding", (None, "fsdp")),
    ("*/qkv/kernel", ("fsdp", "tensor", None, None)),
    ("*/qkv/bias", ("tensor", None, None)),
    ("*/project/kernel", ("tensor", None, "fsdp")),
    ("*/mlp1/kernel", ("fsdp", "tensor")),
    ("*/mlp1/bias", ("tensor",)),
    ("*/mlp2/kernel", ("tensor", "fsdp")),
)
# See `input_dimensions` of `dljax.tasks.base.TaskBase`. There is no NO_DECAY: the authors' weight
# decay spares biases and norms alone.
INPUT_DIMENSIONS: Sequence[tuple[str, int]] = (("*/qkv/kernel", 1),)
