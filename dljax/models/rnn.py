"""Recurrent networks: stacked Elman networks, LSTMs and GRUs, a language model and a forecaster made of them.

Wojciech Zaremba, Ilya Sutskever, Oriol Vinyals. "Recurrent Neural Network Regularization", 2014.
https://arxiv.org/abs/1409.2329
Stephen Merity, Nitish Shirish Keskar, Richard Socher. "Regularizing and Optimizing LSTM Language Models", 2018.
https://arxiv.org/abs/1708.02182

The cells, with their formulas and papers, are in `ops/recurrence.py`. What differs from the papers:
- A cell has two biases, as PyTorch's; the papers have one.
- Parameters start uniform within 1 / sqrt(H), as PyTorch's, but the forget gate's bias is 1 higher, so that an LSTM
  remembers from the start (Jozefowicz et al. 2015, "An Empirical Exploration of Recurrent Network Architectures").
- The forecaster's decoder is not fed its own forecasts, whose errors would add up: each step sees the encoder's
  summary and its own covariates (Wen et al. 2017, "A Multi-Horizon Quantile Recurrent Forecaster").

Dimensions: `B` batch, `L` length, `D` width of the inputs, `H` of the state, `G` gates of a cell, `V` vocabulary;
`W` window, `T` horizon, `C` channels of a series, `K` covariates, `Q` quantiles.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dljax.ops.dense import dense, dot_general
from dljax.ops.recurrence import CELLS, State, Weights, initial_carry, recurrence, valid_steps

Carry = tuple[State, ...]  # one state for each layer and direction, in the order of PyTorch's h_n


class Layer(nn.Module):
  """One layer in one direction.

  Attributes:
    cell, hidden_size, weight_dropout, layer_norm, dtype: see `Stack`.
    reverse: whether it begins at each row's last step.
  """

  cell: str
  hidden_size: int
  reverse: bool = False
  weight_dropout: float = 0.0
  layer_norm: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, carry: State, valid: jax.Array | None, train: bool) -> tuple[jax.Array, State]:
    """[L, B, D], a state and bool[L, B] -> [L, B, H] and the state at each row's end."""
    size, gates = self.hidden_size, (CELLS[self.cell].gates * self.hidden_size,)
    init = lambda key, shape, mean=0.0: mean + jax.random.uniform(key, shape, jnp.float32, -(size**-0.5), size**-0.5)
    forget = np.repeat([0.0, 1.0, 0.0, 0.0], size) if self.cell == "lstm" else 0.0  # of gates i, f, g, o
    scale = lambda part: self.param(f"scale_{part}", nn.initializers.ones, gates) if self.layer_norm else None
    drop = nn.Dropout(self.weight_dropout, deterministic=not train)  # the same weights in all steps
    weights = Weights(
        self.param("weight_ih", init, (x.shape[-1], *gates)), drop(self.param("weight_hh", init, (size, *gates))),
        self.param("bias_ih", init, gates, forget), self.param("bias_hh", init, gates), scale("ih"), scale("hh"))
    return recurrence(self.cell, x.astype(self.dtype or x.dtype), weights, carry, valid, reverse=self.reverse)


class Stack(nn.Module):
  """Layers of one cell, each the input of the next.

  Attributes:
    cell: "tanh" or "relu" (Elman), "lstm" or "gru".
    hidden_size: H.
    num_layers: how many.
    bidirectional: whether each layer also runs from the end; the results stand side by side.
    dropout: probability of dropping a value between layers, in training (rng stream "dropout"); Zaremba et al.
    variational: whether that drops the same values in all steps of a row (Merity et al., section 4.2).
    weight_dropout: probability of dropping a recurrent weight in training (DropConnect; Merity et al., section 2).
    layer_norm: whether both products of a cell are normalised; see `ops.recurrence.Weights`.
    last_size: H of the last layer, where it differs.
    dtype: of the products and outputs, by default x's; parameters are float32, and so is the state.
    remat: recompute each layer in the backward pass instead of storing its inside.
  """

  cell: str
  hidden_size: int
  num_layers: int = 1
  bidirectional: bool = False
  dropout: float = 0.0
  variational: bool = False
  weight_dropout: float = 0.0
  layer_norm: bool = False
  last_size: int | None = None
  dtype: Any = None
  remat: bool = False

  @property
  def parts(self) -> list[list[tuple[str, int]]]:
    """Of each layer, its directions' names, as PyTorch's, and H."""
    sizes = (self.hidden_size,) * (self.num_layers - 1) + (self.last_size or self.hidden_size,)
    suffixes = ("", "_reverse") if self.bidirectional else ("",)
    return [[(f"l{i}{suffix}", size) for suffix in suffixes] for i, size in enumerate(sizes)]

  def initial_carry(self, batch: int) -> Carry:
    """What a sequence begins with: zeros, f32[B, H] each."""
    return tuple(initial_carry(self.cell, batch, size) for layer in self.parts for _, size in layer)

  @nn.compact
  def __call__(
      self, x: jax.Array, length: jax.Array | None = None, carry: Carry | None = None, train: bool = False,
  ) -> tuple[jax.Array, Carry]:
    """Args are [B, L, D], how many steps of a row are no padding, the states to begin with, and whether to drop.

    Returns:
      The last layer's outputs [B, L, H], or [B, L, 2 H] where bidirectional, zero at padding; and the states at each
      row's last step (of a reversed layer: at its first).
    """
    layer = nn.remat(Layer, static_argnums=(4,)) if self.remat else Layer
    carry = self.initial_carry(x.shape[0]) if carry is None else carry
    valid = None if length is None else valid_steps(length, x.shape[1])
    drop = nn.Dropout(self.dropout, broadcast_dims=(0,) if self.variational else (), deterministic=not train)
    x, ends = x.swapaxes(0, 1), []
    for i, parts in enumerate(self.parts):
      x, outputs = x if i == 0 else drop(x), []
      for name, size in parts:
        y, end = layer(self.cell, size, name.endswith("_reverse"), self.weight_dropout, self.layer_norm, self.dtype,
                       name=name)(x, carry[len(ends)], valid, train)
        outputs.append(y)
        ends.append(end)
      x = jnp.concatenate(outputs, -1)
    return x.swapaxes(0, 1), tuple(ends)


class LanguageModel(nn.Module):
  """Tells each token from those before it.

  Attributes:
    vocab_size: V.
    embed_dim: width of a token's vector.
    cell, hidden_size, num_layers, weight_dropout, layer_norm, variational, dtype, remat: see `Stack`.
    dropout: probability of dropping a value before the first and after the last layer, in training.
    hidden_dropout: the same between layers; None for `dropout`.
    embed_dropout: probability of dropping a word from all of a row, in training (Merity et al., section 4.3).
    tied: whether the head's kernel is the embedding (section 4.5); the last layer then has its width.
  """

  vocab_size: int
  embed_dim: int = 256
  cell: str = "lstm"
  hidden_size: int = 256
  num_layers: int = 2
  dropout: float = 0.0
  hidden_dropout: float | None = None
  embed_dropout: float = 0.0
  weight_dropout: float = 0.0
  variational: bool = False
  tied: bool = False
  layer_norm: bool = False
  dtype: Any = jnp.float32
  remat: bool = False

  def stack(self, **options: Any) -> Stack:
    """The layers between embedding and head."""
    between = self.dropout if self.hidden_dropout is None else self.hidden_dropout
    return Stack(self.cell, self.hidden_size, self.num_layers, False, between, self.variational, self.weight_dropout,
                 self.layer_norm, self.embed_dim if self.tied else None, self.dtype, self.remat, **options)

  def init_cache(self, batch: int, length: int) -> Carry:  # pylint: disable=unused-argument
    """The state before a text: zeros, f32[B, H] each, whatever the length."""
    return self.stack(parent=None).initial_carry(batch)

  @nn.compact
  def __call__(
      self, tokens: jax.Array, cache: Carry | None = None, length: jax.Array | None = None, train: bool = False,
  ) -> dict[str, Any]:
    """i32[B, L] tokens after those of `cache` -> "logits" f32[B, L, V] of the next, and "cache" after each `length`."""
    init = lambda *args: nn.initializers.uniform(0.2)(*args) - 0.1  # Zaremba et al., section 4.1
    drop = nn.Dropout(self.dropout, broadcast_dims=(1,) if self.variational else (), deterministic=not train)
    embed = nn.Embed(self.vocab_size, self.embed_dim, embedding_init=init, dtype=self.dtype, name="embed")
    x = embed(tokens)
    if train and self.embed_dropout:
      words = nn.Dropout(self.embed_dropout, deterministic=False)(jnp.ones((len(x), self.vocab_size), x.dtype))
      x = x * jnp.take_along_axis(words, tokens, 1)[..., None]
    x, cache = self.stack(name="rnn")(drop(x), length, cache, train)
    x = drop(x)
    if self.tied:
      logits = dense(x, embed.embedding.T.astype(x.dtype))
      logits = logits + self.param("head_bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32)
    else:
      logits = nn.Dense(self.vocab_size, kernel_init=init, dtype=self.dtype, dot_general=dot_general, name="head")(x)
    return {"logits": logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), "cache": cache}


class Forecaster(nn.Module):
  """Reads a window of a series and tells what follows.

  Attributes:
    horizon: T, how many steps to tell.
    cell, hidden_size, num_layers, dropout, dtype, remat: of the encoder and the decoder; see `Stack`.
    num_quantiles: Q, how many values to tell of each step; None for one.
    relative: a key of `RELATIVE`; with differences a series that has moved to another level looks the same (NLinear;
      Zeng et al. 2023, https://arxiv.org/abs/2205.13504).
    season: of the series, in steps.
  """

  horizon: int
  cell: str = "lstm"
  hidden_size: int = 64
  num_layers: int = 1
  dropout: float = 0.0
  num_quantiles: int | None = None
  relative: str = "last"
  season: int = 24
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, window: jax.Array, covariates: jax.Array | None = None, train: bool = False) -> dict[str, Any]:
    """[B, W, C] and what is known beforehand [B, W + T, K] -> "logits" [B, T, C], or with quantiles [B, T, C, Q]."""
    stack = functools.partial(Stack, self.cell, self.hidden_size, self.num_layers, dropout=self.dropout,
                              dtype=self.dtype, remat=self.remat)
    rows, steps, channels = window.shape
    if covariates is None:
      covariates = jnp.zeros((rows, steps + self.horizon, 0), window.dtype)
    read = window if self.relative == "no" else window - window[:, -1:]
    outputs, carry = stack(name="encoder")(jnp.concatenate([read, covariates[:, :steps]], -1), train=train)
    summary = jnp.broadcast_to(outputs[:, -1:], (rows, self.horizon, self.hidden_size))
    outputs, _ = stack(name="decoder")(jnp.concatenate([summary, covariates[:, steps:]], -1), carry=carry, train=train)
    # It begins by telling what it takes differences from.
    init = nn.initializers.lecun_normal() if self.relative == "no" else nn.initializers.zeros
    y = nn.Dense(channels * (self.num_quantiles or 1), kernel_init=init, dtype=self.dtype, name="head")(outputs)
    y = y.reshape(rows, self.horizon, channels, -1).astype(window.dtype)
    if self.relative != "no":
      season = 1 if self.relative == "last" else self.season
      y = y + window[:, steps - season + np.arange(self.horizon) % season][..., None]
    return {"logits": y if self.num_quantiles else y[..., 0]}


RELATIVE: Mapping[str, str] = {  # what it reads and tells
    "no": "values", "last": "differences from the window's last", "season": "tells those from the last season"}

VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # Parameters with a vocabulary of 1000.
    "rnn_elman": functools.partial(LanguageModel, cell="tanh"),  # 776,168
    "rnn_gru": functools.partial(LanguageModel, cell="gru"),  # 1,302,504
    "rnn_lstm": functools.partial(LanguageModel, cell="lstm"),  # 1,565,672
    # Zaremba et al., section 4.1, and Merity et al., section 5; with the Penn Treebank's vocabulary of 10000.
    "rnn_zaremba_small": functools.partial(LanguageModel, embed_dim=200, hidden_size=200),  # 4,653,200
    "rnn_zaremba_medium": functools.partial(LanguageModel, embed_dim=650, hidden_size=650, dropout=0.5),  # 19,780,400
    "rnn_zaremba_large": functools.partial(LanguageModel, embed_dim=1500, hidden_size=1500, dropout=0.65),  # 66,034,000
    "rnn_awd_lstm": functools.partial(
        LanguageModel, embed_dim=400, hidden_size=1150, num_layers=3, dropout=0.4, hidden_dropout=0.3,
        embed_dropout=0.1, weight_dropout=0.5, variational=True, tied=True),  # 24,221,600
    "rnn_forecaster": functools.partial(Forecaster),  # 50,497 for one channel, no covariates and any horizon
}
