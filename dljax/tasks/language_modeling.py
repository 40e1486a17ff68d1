"""Language modelling: the next token of a text.

The loss is the cross-entropy of each token given those before it, in nats per token, computed in float32. Per character
and per byte it is in bits; these and the perplexity come from sums over a whole split.

Sampling: temperature, then the `top_k` most probable tokens (Fan et al. 2018, "Hierarchical Neural Story Generation"),
then of these the fewest that hold `top_p` of the probability (Holtzman et al. 2020, "The Curious Case of Neural Text
Degeneration").

Dimensions: B batch, L tokens to be predicted, P tokens of the longest prompt, V vocabulary, N tokens to be written.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax import report
from dljax.errors import UserError
from dljax.tasks.base import ALL, CARRY, Array, Batch, Findings, LossOutput, PyTree, Sums, Variables

MAX_PICTURED = 2000  # tokens, of which as many are drawn as there is room for


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a text is continued.

  Attributes:
    max_new_tokens: N.
    temperature: what the logits are divided by; 0 always takes the most probable token.
    top_k: how many of the most probable tokens may be drawn; 0 is all.
    top_p: the share of the probability from which tokens may be drawn; 1 is all.
    seed: another one draws another text, for the same prompt and the same run.

  Raises:
    UserError: a value out of range.
  """

  max_new_tokens: int = 400
  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    for field, valid, mend in (
        ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
        ("temperature", 0 <= self.temperature < math.inf, "must be at least 0; 0 takes the most probable token"),
        ("top_k", self.top_k >= 0, "must be at least 0; 0 is all"),
        ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1; 1 is all"),
        ("seed", 0 <= self.seed < 2**32, "must be from 0 to 2^32 - 1")):
      if not valid:
        raise UserError(f"--config.sampling.{field}={getattr(self, field)}: {mend}")

  def filter(self, logits: Array) -> Array:
    """Logits [..., V] of the tokens that may be drawn, divided by the temperature; -inf for the rest."""
    logits = logits / self.temperature
    if 0 < self.top_k < logits.shape[-1]:
      least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
      logits = jnp.where(logits < least, -jnp.inf, logits)
    if self.top_p < 1:
      ordered = -jnp.sort(-logits, axis=-1)
      p = jax.nn.softmax(ordered, axis=-1)
      needed = jnp.cumsum(p, axis=-1) - p < self.top_p  # of those before it: the first always is
      least = jnp.min(jnp.where(needed, ordered, jnp.inf), axis=-1, keepdims=True)
      logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits

  def draw(self, logits: Array, rng: Array, example: Array, place: Array) -> Array:
    """A token for each row, i32[B], a function of (rng, seed, example, place) and its logits alone.

    Args:
      logits: f32[B, V].
      rng: a key.
      example: i32[B].
      place: i32[B], how many tokens were written before.
    """
    if self.temperature == 0:
      return jnp.argmax(logits, axis=-1)
    rng = jax.random.fold_in(rng, self.seed)
    keys = jax.vmap(lambda e, n: jax.random.fold_in(jax.random.fold_in(rng, e), n))(example, place)
    return jax.vmap(jax.random.categorical)(keys, self.filter(logits))


@dataclasses.dataclass(frozen=True)
class LanguageModeling:
  """Predicts each token from those before it.

  Batches have tokens i32[B, L]; targets i32[B, L], what follows each of them, and target_weight f32[B, L], 0 where that
  is not to be predicted; length i32[B], how many tokens of a row are no padding; where the text's characters and bytes
  are to be counted characters f32[B] and bytes f32[B]. Training windows of a text that is carried from batch to batch
  (`stateful`) have no padding.

  Attributes:
    model: called as `model(tokens, carry=None, length=None, train=...)` gives {"logits": [B, L, V], "carry": ...}:
      what it has to know of these tokens to read on, a tree of [B, ...]; None stands for zeros.
    stateful: whether a batch goes on where the one before ended, as long as its rows are not reset.
    sampling: how `predict` continues a prompt.
    spell: the text of each of some tokens i32[n], for the picture of an evaluation; None draws none.
    players: one, all parameters.
  """

  model: nn.Module
  stateful: bool = False
  sampling: Sampling = Sampling()
  spell: Callable[[np.ndarray], Sequence[str]] | None = None
  players: tuple[str, ...] = (ALL,)

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    tokens = batch["tokens"][:, :1]
    variables = dict(self.model.init({"params": rng}, tokens, train=False))
    if self.stateful:
      carry = jax.eval_shape(lambda: self.model.apply(variables, tokens, train=False)[CARRY])
      variables[CARRY] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), carry)
    return variables

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The number of tokens to be predicted."""
    return {"tokens": jnp.sum(batch["target_weight"])}

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str = ALL,
  ) -> LossOutput:
    """See `Task.loss`. Metrics: loss, accuracy; bits_per_character, bits_per_byte; padding, where rows can have some.

    The gradient ends at the carry that the batch begins with.
    """
    del player  # one player: all parameters
    rest = {k: v for k, v in model_state.items() if k != CARRY}
    inputs, targets = batch["tokens"], batch["targets"]
    # Whole windows are read without asking of each step whether it is padding, which costs time.
    length = None if train and self.stateful else batch["length"]
    kwargs = {"carry": model_state.get(CARRY), "length": length, "train": train}
    if train:
      out, rest = self.model.apply(
          {"params": params, **rest}, inputs, **kwargs, rngs={"dropout": rng}, mutable=list(rest))
    else:
      out = self.model.apply({"params": params, **rest}, inputs, **kwargs)
    if self.stateful:
      rest = {**rest, CARRY: jax.tree.map(lambda new, old: new.astype(old.dtype), out[CARRY], model_state[CARRY])}

    logits = out["logits"].astype(jnp.promote_types(out["logits"].dtype, jnp.float32))
    predicted = batch["target_weight"].astype(logits.dtype)
    total = jnp.sum(_nats(logits, targets) * predicted)
    count = jnp.sum(predicted)
    right = jnp.sum((jnp.argmax(logits, axis=-1) == targets) * predicted)
    metrics = {"loss": (total, count), "accuracy": (right, count)}
    for unit in ("character", "byte"):
      if f"{unit}s" in batch:
        metrics[f"bits_per_{unit}"] = total / math.log(2), jnp.sum(batch[f"{unit}s"])
    if not self.stateful:
      positions = jnp.asarray(inputs.size, count.dtype)
      metrics["padding"] = positions - jnp.sum(batch["length"]), positions
    return LossOutput(loss=total / jnp.maximum(denominators["tokens"], 1), metrics=metrics, model_state=rest)

  def predict(self, variables: Variables, batch: Batch, rng: Array) -> PyTree:
    """Continues prompts: prompt i32[B, P], length i32[B] and id i32[B] give {"tokens": i32[B, N]}.

    Each row depends on the prompt, `rng` and id alone. The batches of an evaluation, which have no prompt, give the
    cross-entropy of each token, {"nats": f32[B, L]}, or without `spell` nothing.
    """
    if "prompt" not in batch:
      if self.spell is None:
        return {}
      rest = {k: v for k, v in variables.items() if k != CARRY}
      out = self.model.apply(
          rest, batch["tokens"], carry=variables.get(CARRY), length=batch["length"], train=False)
      return {"nats": _nats(out["logits"].astype(jnp.float32), batch["targets"])}
    tokens, _ = self.advance(variables, self.start(variables, batch), rng, self.sampling.max_new_tokens)
    return {"tokens": tokens}

  def start(self, variables: Variables, batch: Batch) -> PyTree:
    """Reads prompts (see `predict`): what `advance` continues, a tree of [B, ...]."""
    length = batch["length"]
    out = self.model.apply(variables, batch["prompt"], length=length, train=False)
    last = jnp.maximum(length - 1, 0)[:, None, None]
    logits = jnp.take_along_axis(out["logits"], last, axis=1)[:, 0].astype(jnp.float32)
    return {"logits": logits, CARRY: out[CARRY], "id": batch["id"], "place": jnp.zeros_like(batch["id"])}

  def advance(self, variables: Variables, text: PyTree, rng: Array, count: int) -> tuple[Array, PyTree]:
    """Writes `count` tokens: (i32[B, count], what to continue from). Twice 5 tokens are the same as once 10."""

    def write(text, _):
      token = self.sampling.draw(text["logits"], rng, text["id"], text["place"])
      out = self.model.apply(variables, token[:, None], carry=text[CARRY], train=False)
      carry = jax.tree.map(lambda new, old: new.astype(old.dtype), out[CARRY], text[CARRY])
      return {"logits": out["logits"][:, 0].astype(jnp.float32), CARRY: carry, "id": text["id"],
              "place": text["place"] + 1}, token.astype(jnp.int32)

    text, tokens = jax.lax.scan(write, text, length=count)
    return tokens.T, text

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """The means, and the perplexity; NaN where nothing was counted."""
    means = {name: float(total) / float(count) if count else math.nan for name, (total, count) in sums.items()}
    with np.errstate(over="ignore"):
      return {**means, "perplexity": float(np.exp(means["loss"]))}

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums, assets: Mapping[str, Any],
  ) -> Findings:
    """The figure surprise: the beginning of the text, and how many bits each token of it took."""
    del sums, assets
    if self.spell is None:
      return Findings()
    parts = []
    for predicted, batch in rows:
      for tokens, nats, begin, length in zip(
          batch["targets"], predicted["nats"], batch["host/position"], batch["length"]):
        if begin < MAX_PICTURED:
          parts.append((begin, tokens[:length], nats[:length]))
    parts.sort(key=lambda part: part[0])  # in reading order, whatever stream or bucket they were in
    if not parts:
      return Findings()
    _, tokens, nats = zip(*parts)
    return Findings(figures={
        "surprise": report.surprise(self.spell(np.concatenate(tokens)), np.concatenate(nats) / math.log(2))})


def _nats(logits: Array, targets: Array) -> Array:
  """-log p [...] of the targets i32[...] under the logits [..., V]."""
  own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - own
