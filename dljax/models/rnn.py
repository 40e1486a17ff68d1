"""Recurrent networks: stacked Elman networks, LSTMs and GRUs; a language model and a forecaster.

Wojciech Zaremba, Ilya Sutskever, Oriol Vinyals. "Recurrent Neural Network Regularization", 2014.
https://arxiv.org/abs/1409.2329
Stephen Merity, Nitish Shirish Keskar, Richard Socher. "Regularizing and Optimizing LSTM Language
Models", 2018. https://arxiv.org/abs/1708.02182

The cells, with formulas and papers, are in `ops/recurrence.py`. What differs from the papers:
- A cell has two biases, as in PyTorch; the papers have one.
- Parameters start uniform within 1 / sqrt(H), as in PyTorch, but the forget gate's bias is 1 more,
  so that an LSTM remembers from the start (Jozefowicz et al. 2015, proceedings.mlr.press/v37).
- The decoder does not read its own forecasts, whose errors would add up. Each step sees the
  encoder's summary and its covariates (Wen et al. 2017, https://arxiv.org/abs/1711.11053).

Dimensions: `B` batch, `L` length, `D` inputs' width, `H` state's width, `G` gates of a cell, `V`
vocabulary; `W` window, `T` horizon, `C` channels of a series, `K` covariates, `Q` quantiles.
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

Array = jax.Array
Carry = tuple[State, ...]  # one state for each layer and direction, in the order of PyTorch's h_n


class Layer(nn.Module):
  """One layer in one direction, with `Stack`'s attributes; `reverse` starts at rows' last step."""

  cell: str
  hidden_size: int
  reverse: bool = False
  weight_dropout: float = 0.0
  layer_norm: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array, carry: State, valid: Array | None, train: bool) -> tuple[Array, State]:
    """[L, B, D], a state and bool[L, B] -> [L, B, H] and the state at each row's end."""
    size, r = self.hidden_size, self.hidden_size**-0.5
    gates = (CELLS[self.cell].gates * size,)
    init = lambda key, shape, mean=0: mean + jax.random.uniform(key, shape, jnp.float32, -r, r)
    forget = np.repeat([0.0, 1.0, 0.0, 0.0], size) if self.cell == "lstm" else 0.0  # of i, f, g, o
    drop = nn.Dropout(self.weight_dropout, deterministic=not train)  # the same for all steps
    weights = Weights(
        self.param("weight_ih", init, (x.shape[-1], *gates)),
        drop(self.param("weight_hh", init, (size, *gates))),
        self.param("bias_ih", init, gates, forget), self.param("bias_hh", init, gates),
        *(self.param(f"scale_{part}", nn.initializers.ones, gates)
          for part in ("ih", "hh") if self.layer_norm))
    x = x.astype(self.dtype or x.dtype)
    return recurrence(self.cell, x, weights, carry, valid, reverse=self.reverse)


class Stack(nn.Module):
  """Layers of one cell, each the input of the next.

  Attributes:
    cell: "tanh" or "relu" (Elman), "lstm" or "gru".
    hidden_size: H.
    num_layers: the number of layers.
    bidirectional: whether each layer also runs from the end; both outputs are concatenated.
    dropout: the probability of dropping a value between layers in training (rng stream "dropout").
    variational: whether all steps of a row drop the same values (Merity et al., section 4.2).
    weight_dropout: the probability of dropping a recurrent weight, in training (section 2).
    layer_norm: whether both products of a cell are normalised; see `ops.recurrence.Weights`.
    last_size: H of the last layer, if it differs.
    dtype: the dtype of products and outputs, by default x's; parameters and states are float32.
    remat: whether to recompute each layer in the backward pass instead of storing its activations.
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
    """(name, H) of each direction of each layer; the names are PyTorch's."""
    sizes = (self.hidden_size,) * (self.num_layers - 1) + (self.last_size or self.hidden_size,)
    suffixes = ("", "_reverse") if self.bidirectional else ("",)
    return [[(f"l{i}{suffix}", size) for suffix in suffixes] for i, size in enumerate(sizes)]

  def initial_carry(self, batch: int) -> Carry:
    """The states before a sequence: zeros, f32[B, H] each."""
    return tuple(initial_carry(self.cell, batch, size) for part in self.parts for _, size in part)

  @nn.compact
  def __call__(
      self, x: Array, length: Array | None = None, carry: Carry | None = None, train: bool = False,
  ) -> tuple[Array, Carry]:
    """[B, L, D], lengths, states -> [B, L, H or 2 H], zero at padding; states at rows' ends."""
    layer = nn.remat(Layer, static_argnums=(4,)) if self.remat else Layer
    carry = self.initial_carry(x.shape[0]) if carry is None else carry
    valid = None if length is None else valid_steps(length, x.shape[1])
    drop = nn.Dropout(self.dropout, (0,) if self.variational else (), deterministic=not train)
    x, ends, carries = x.swapaxes(0, 1), [], iter(carry)
    for i, parts in enumerate(self.parts):
      x = drop(x) if i else x
      ys = [layer(self.cell, size, name.endswith("_reverse"), self.weight_dropout, self.layer_norm,
                  self.dtype, name=name)(x, next(carries), valid, train) for name, size in parts]
      x = jnp.concatenate([y for y, _ in ys], -1)
      ends += [end for _, end in ys]
    return x.swapaxes(0, 1), tuple(ends)


class LanguageModel(nn.Module):
  """Predicts each token from those before it.

  Attributes:
    vocab_size: V.
    embed_dim: the width of a token's vector.
    cell, hidden_size, num_layers, weight_dropout, variational, layer_norm, dtype, remat: `Stack`'s.
    dropout: the probability of dropping a value before the first and after the last layer.
    hidden_dropout: the probability of dropping a value between layers; None for `dropout`.
    embed_dropout: the probability of dropping a word from all of a row (section 4.3).
    tied: whether the head's kernel is the embedding, and the last layer's width too (section 4.5).
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
    return Stack(self.cell, self.hidden_size, self.num_layers, False, between, self.variational,
                 self.weight_dropout, self.layer_norm, self.embed_dim if self.tied else None,
                 self.dtype, self.remat, **options)

  def init_cache(self, batch: int, length: int) -> Carry:  # pylint: disable=unused-argument
    """The state before a text: zeros, f32[B, H] each, whatever the length."""
    return self.stack(parent=None).initial_carry(batch)

  @nn.compact
  def __call__(
      self, tokens: Array, cache: Carry | None = None, length: Array | None = None, train: bool = False,
  ) -> dict[str, Any]:
    """Reads i32[B, L] after `cache`; gives the next tokens' "logits" f32[B, L, V] and "cache"."""
    init = lambda *args: nn.initializers.uniform(0.2)(*args) - 0.1  # Zaremba et al., section 4.1
    drop = nn.Dropout(self.dropout, (1,) if self.variational else (), deterministic=not train)
    embed = nn.Embed(
        self.vocab_size, self.embed_dim, embedding_init=init, dtype=self.dtype, name="embed")
    x = embed(tokens)
    if train and self.embed_dropout:
      words = jnp.ones((len(x), self.vocab_size), x.dtype)
      words = nn.Dropout(self.embed_dropout, deterministic=False)(words)
      x = x * jnp.take_along_axis(words, tokens, 1)[..., None]
    x, cache = self.stack(name="rnn")(drop(x), length, cache, train)
    if self.tied:
      bias = self.param("head_bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32)
      logits = dense(drop(x), embed.embedding.T.astype(x.dtype)) + bias
    else:
      logits = nn.Dense(self.vocab_size, kernel_init=init, dtype=self.dtype,
                        dot_general=dot_general, name="head")(drop(x))
    return {"logits": logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), "cache": cache}


class Forecaster(nn.Module):
  """Reads a window of a series and predicts what follows.

  Attributes:
    horizon: T.
    cell, hidden_size, num_layers, dropout, dtype, remat: encoder's and decoder's; see `Stack`.
    num_quantiles: Q, the number of values to predict for each step; None for one value.
    relative: what it predicts, a key of `RELATIVE`. Differences make a series look the same at any
      level (NLinear; Zeng et al. 2023, https://arxiv.org/abs/2205.13504).
    season: the length of the series' season, in steps.
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
  def __call__(self, window: Array, covariates: Array | None = None, train: bool = False) -> dict[str, Any]:
    """[B, W, C] and [B, W + T, K], known beforehand -> "logits" [B, T, C], or [B, T, C, Q]."""
    stack = functools.partial(Stack, self.cell, self.hidden_size, self.num_layers,
                              dropout=self.dropout, dtype=self.dtype, remat=self.remat)
    rows, steps, channels = window.shape
    if covariates is None:
      covariates = jnp.zeros((rows, steps + self.horizon, 0), window.dtype)
    read = window if self.relative == "no" else window - window[:, -1:]
    read = jnp.concatenate([read, covariates[:, :steps]], -1)
    outputs, carry = stack(name="encoder")(read, train=train)
    summary = jnp.broadcast_to(outputs[:, -1:], (rows, self.horizon, self.hidden_size))
    summary = jnp.concatenate([summary, covariates[:, steps:]], -1)
    outputs, _ = stack(name="decoder")(summary, carry=carry, train=train)
    # With differences, its first forecast is the value that they are taken from.
    init = nn.initializers.lecun_normal() if self.relative == "no" else nn.initializers.zeros
    width = channels * (self.num_quantiles or 1)
    y = nn.Dense(width, kernel_init=init, dtype=self.dtype, name="head")(outputs)
    y = y.reshape(rows, self.horizon, channels, -1).astype(window.dtype)
    if self.relative != "no":
      season = 1 if self.relative == "last" else self.season
      y = y + window[:, steps - season + np.arange(self.horizon) % season][..., None]
    return {"logits": y if self.num_quantiles else y[..., 0]}


RELATIVE = {"no": "values", "last": "differences from the last", "season": "from the last season"}

VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    # The numbers of parameters with a vocabulary of 1000.
    "rnn_elman": functools.partial(LanguageModel, cell="tanh"),  # 776,168
    "rnn_gru": functools.partial(LanguageModel, cell="gru"),  # 1,302,504
    "rnn_lstm": functools.partial(LanguageModel, cell="lstm"),  # 1,565,672
    # Zaremba et al., section 4.1, and Merity et al., section 5, with a vocabulary of 10000:
    # 4,653,200; 19,780,400; 66,034,000; 24,221,600.
    "rnn_zaremba_small": functools.partial(LanguageModel, embed_dim=200, hidden_size=200),
    "rnn_zaremba_medium": functools.partial(LanguageModel, embed_dim=650, hidden_size=650, dropout=0.5),
    "rnn_zaremba_large": functools.partial(
        LanguageModel, embed_dim=1500, hidden_size=1500, dropout=0.65),
    "rnn_awd_lstm": functools.partial(
        LanguageModel, embed_dim=400, hidden_size=1150, num_layers=3, dropout=0.4,
        hidden_dropout=0.3, embed_dropout=0.1, weight_dropout=0.5, variational=True, tied=True),
    "rnn_forecaster": functools.partial(Forecaster),  # 50,497 with one channel and no covariates
}
