"""A language model that takes no time, and batches for it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax.ops import attention

VOCABULARY, WIDTH = 11, 6
MODES = [("jit", "data:1"), ("jit", "data:4"), ("pmap", "data:4")]


class Tiny(nn.Module):
  """A leaky sum of embeddings; padding leaves the state."""

  vocab_size: int = VOCABULARY
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, tokens, cache=None, length=None, train=False):
    x = nn.Embed(self.vocab_size, WIDTH, dtype=self.dtype, name="embed")(tokens)
    cache = self.init_cache(*tokens.shape) if cache is None else cache
    valid = jnp.arange(tokens.shape[1]) < (tokens.shape[1] if length is None else length[:, None])
    valid = jnp.broadcast_to(valid, tokens.shape)

    def read(state, now):
      x, valid = now
      state = jnp.where(valid[:, None], jnp.tanh(0.7 * state + x), state)
      return state, state

    cache, h = jax.lax.scan(read, cache, (x.swapaxes(0, 1), valid.T))
    head = nn.Dense(self.vocab_size, dtype=self.dtype, name="head")
    return {"logits": head(3 * h.swapaxes(0, 1)), "cache": cache}

  def init_cache(self, batch, length):
    return jnp.zeros((batch, WIDTH), self.dtype)


class TinyEncoder(nn.Module):
  """One layer of attention in both directions; predicts words at `places`, or classes of rows or tokens."""

  vocab_size: int = VOCABULARY
  head: str = "words"
  num_classes: int = 3
  max_length: int = 64

  @nn.compact
  def __call__(self, tokens, length=None, token_type=None, segment=None, position=None, places=None, train=False):
    if position is None:
      position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    token_type = jnp.zeros_like(tokens) if token_type is None else token_type
    x = nn.Embed(self.vocab_size, WIDTH, name="embed")(tokens) + nn.Embed(64, WIDTH, name="positions")(position)
    x = x + nn.Embed(2, WIDTH, name="types")(token_type)
    q, k, v = jnp.moveaxis(nn.DenseGeneral((3, 2, 3), name="qkv")(x), 2, 0)
    mask = None if length is None else jnp.arange(tokens.shape[1]) < length[:, None]
    x = x + attention.attention(4 * q, k, v, mask=mask, segment=segment).reshape(x.shape)
    if self.head == "words":
      x = x if places is None else jnp.take_along_axis(x, places[..., None], axis=1)
      return {"logits": nn.Dense(self.vocab_size, name="head")(jnp.tanh(x))}
    x = x[:, 0] if self.head == "sequence" else x
    return {"logits": nn.Dense(2 if self.head == "span" else self.num_classes, name="head")(jnp.tanh(x))}


@functools.cache
def params(vocab_size=VOCABULARY):
  variables = jax.jit(Tiny(vocab_size).init)(jax.random.key(1), np.zeros((1, 1), np.int32))
  return jax.tree.map(lambda x: 2 * np.asarray(x), variables["params"])


def batch(rows=4, length=6, seed=0, lengths=None, **fields):
  """Rows of random tokens, of `lengths` where they are padded."""
  text = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length + 1)).astype(np.int32)
  lengths = np.full(rows, length, np.int32) if lengths is None else np.array(lengths, np.int32)
  weight = np.arange(length) < lengths[:, None]
  return {"tokens": text[:, :-1], "targets": text[:, 1:],
          "target_weight": weight.astype(np.float32),
          "length": lengths, "mask": (lengths > 0).astype(np.float32),
          "id": np.arange(rows, dtype=np.int32), **fields}
