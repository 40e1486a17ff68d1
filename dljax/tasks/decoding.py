"""Decoding: how a model that predicts the next token generates a text.

All families that generate tokens share this file. Such a model has

    init_cache(batch, length) -> cache      the memory of `length` tokens, for `batch` rows
    model(tokens, cache=..., length=...)    {"logits": [B, L, V], "cache": ...}

A cache is a tree of arrays [B, ...]; a recurrent network's is its carry, whatever the length.
`start` reads the prompts (prefill) and `advance` generates; both are pure functions with static
shapes.

Sampling: temperature, then the `top_k` most probable tokens (Fan et al. 2018, "Hierarchical Neural
Story Generation"), then of these the fewest that hold `top_p` of the probability (Holtzman et al.
2020, "The Curious Case of Neural Text Degeneration").

Dimensions: B batch, P tokens of the longest prompt, V vocabulary, N tokens to be generated.
"""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from dljax.errors import UserError
from dljax.tasks.base import Array, Batch, PyTree, Variables, row_keys

CACHE = "cache"


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen.

  Attributes:
    max_new_tokens: the number of tokens to generate, N.
    temperature: the logits' divisor; 0 always takes the most probable token.
    top_k: the number of most probable tokens that may be drawn; 0 allows all.
    top_p: the probability that the most probable tokens must reach together; only these may be
      drawn. 1 allows all.
    seed: the seed of the draws; another one gives another text for the same prompt and run.

  Raises:
    UserError: a value is out of range.
  """

  max_new_tokens: int = 400
  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    for field, valid, mend in (
        ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
        ("temperature", 0 <= self.temperature < math.inf,
         "must be at least 0; 0 takes the most probable token"),
        ("top_k", self.top_k >= 0, "must be at least 0; 0 allows all tokens"),
        ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1; 1 allows all tokens"),
        ("seed", 0 <= self.seed < 2**32, "must be from 0 to 2^32 - 1")):
      if not valid:
        raise UserError(f"--config.sampling.{field}={getattr(self, field)}: {mend}")

  def filter(self, logits: Array) -> Array:
    """Logits [..., V] of the tokens that may be drawn, over the temperature; -inf for the rest."""
    logits = logits / self.temperature
    if 0 < self.top_k < logits.shape[-1]:
      least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
      logits = jnp.where(logits < least, -jnp.inf, logits)
    if self.top_p < 1:
      ordered = -jnp.sort(-logits, axis=-1)
      p = jax.nn.softmax(ordered, axis=-1)
      needed = jnp.cumsum(p, axis=-1) - p < self.top_p  # the first token always is
      least = jnp.min(jnp.where(needed, ordered, jnp.inf), axis=-1, keepdims=True)
      logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits

  def draw(self, logits: Array, rng: Array, rows: Mapping[str, Array]) -> Array:
    """A token for each row, i32[B]; it depends on rng, seed, id, place and its logits alone.

    Args:
      logits: f32[B, V], the logits of the next token.
      rng: the text's key.
      rows: id i32[B], and place i32[B], the number of tokens generated before.
    """
    if self.temperature == 0:
      return jnp.argmax(logits, axis=-1)
    keys = row_keys(jax.random.fold_in(rng, self.seed), rows)
    keys = jax.vmap(jax.random.fold_in)(keys, rows["place"])
    return jax.vmap(jax.random.categorical)(keys, self.filter(logits))


def start(model: nn.Module, variables: Variables, batch: Batch, max_new_tokens: int) -> PyTree:
  """Reads prompts.

  Args:
    model: a model as this file's docstring describes it.
    variables: the model's variables.
    batch: prompt i32[B, P], length i32[B] and id i32[B].
    max_new_tokens: the number of tokens that the cache must have room for besides the prompt's.

  Returns:
    The state of the text, which `advance` continues: a tree of arrays [B, ...].
  """
  prompt, length = batch["prompt"], batch["length"]
  cache = model.init_cache(prompt.shape[0], prompt.shape[1] + max_new_tokens)
  out = model.apply(variables, prompt, cache=cache, length=length, train=False)
  last = jnp.maximum(length - 1, 0)[:, None, None]
  logits = jnp.take_along_axis(out["logits"], last, axis=1)[:, 0].astype(jnp.float32)
  return {"logits": logits, CACHE: out[CACHE], "id": batch["id"],
          "place": jnp.zeros_like(batch["id"])}


def advance(
    model: nn.Module, variables: Variables, sampling: Sampling, text: PyTree, rng: Array,
    count: int,
) -> tuple[Array, PyTree]:
  """Generates `count` tokens; two calls for 5 tokens give the same text as one call for 10.

  Args:
    model: a model as this file's docstring describes it.
    variables: the model's variables.
    sampling: the rule by which tokens are chosen.
    text: the state from `start`, or from the previous call.
    rng: a key, the same for all calls of a text.
    count: the number of tokens.

  Returns:
    The tokens i32[B, count], and the new state of the text.
  """

  def generate(text, _):
    token = sampling.draw(text["logits"], rng, text)
    out = model.apply(variables, token[:, None], cache=text[CACHE], train=False)
    cache = jax.tree.map(lambda new, old: new.astype(old.dtype), out[CACHE], text[CACHE])
    return {"logits": out["logits"][:, 0].astype(jnp.float32), CACHE: cache, "id": text["id"],
            "place": text["place"] + 1}, token.astype(jnp.int32)

  text, tokens = jax.lax.scan(generate, text, length=count)
  return tokens.T, text
