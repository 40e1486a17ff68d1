"""Language modelling: the next token of a text.

The loss is the cross-entropy of each token given those before it, in nats per token, computed in
float32. Per character and per byte it is in bits. These and the perplexity come from sums over a
whole split.

Dimensions: B batch, L tokens to be predicted, P tokens of the longest prompt, V vocabulary, N
tokens to be generated.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax import report
from dljax.tasks import decoding
from dljax.tasks.base import (
    ALL, CARRY, MAX, MIN, Array, Batch, Findings, LossOutput, PyTree, Sums, TaskBase, Variables,
    at_least_float32)
from dljax.tasks.decoding import CACHE, Sampling

MAX_PICTURED = 2000  # tokens handed to the figure, which draws as many as it has room for


@dataclasses.dataclass(frozen=True)
class LanguageModeling(TaskBase):
  """Predicts each token from those before it.

  Batches have
    tokens i32[B, L];
    targets i32[B, L], the token after each, and target_weight f32[B, L], 0 if it is not predicted;
    length i32[B], the number of tokens in each row before its padding;
    segment i32[B, L] and position i32[B, L], if several documents share a row: which document of
    its row a token belongs to (0 is padding), and its place there;
    characters f32[B] and bytes f32[B], if the text's characters and bytes are to be counted;
    "host/position" in evaluation, the place in the text of a row's first token, i64[B], or of each
    token, i64[B, L].
  The training windows of a text that is carried from batch to batch (`stateful`) have no padding.

  Attributes:
    model: called as `model(tokens, cache=None, length=None, train=...)`, gives {"logits":
      [B, L, V], "cache": ...}; see `decoding`. Without a cache it reads from the start. Where
      documents share rows it is also given segment and position, and keeps the documents apart.
    stateful: whether each row continues the same row of the batch before, unless it is reset.
    sampling: how `predict` continues a prompt.
    spell: a function from tokens i32[n] to their texts, for the figure of an evaluation; with None
      no figure is drawn.
    decode: a function from tokens i32[n] to the text that they stand for; needed if there are stop
      texts.
    padded: whether rows have documents of different lengths, so that their padding is reported.
  """

  model: nn.Module
  stateful: bool = False
  sampling: Sampling = Sampling()
  spell: Callable[[np.ndarray], Sequence[str]] | None = None
  decode: Callable[[np.ndarray], str] | None = None
  padded: bool = False

  evaluate_reads = ("host/position",)
  evaluate_draws = ("targets", "target_weight")

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    tokens = batch["tokens"][:, :1]
    variables = dict(self.model.init({"params": rng}, tokens, train=False))
    if self.stateful:
      variables[CARRY] = self.model.init_cache(*tokens.shape)
    return variables

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The number of tokens to be predicted."""
    return {"tokens": jnp.sum(batch["target_weight"])}

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str = ALL,
  ) -> LossOutput:
    """See `Task.loss`. Metrics: loss, accuracy, bits_per_character, bits_per_byte, padding.

    The gradient ends at the carry that the batch starts with. Only padded rows have the metric
    padding.
    """
    del player  # one player: all parameters
    rest = {k: v for k, v in model_state.items() if k != CARRY}
    inputs, targets = batch["tokens"], batch["targets"]
    out, rest = self.apply(
        params, rest, batch, rng, train, inputs, cache=model_state.get(CARRY),
        **self._extent(batch, train))
    if self.stateful:
      rest = {**rest, CARRY: jax.tree.map(
          lambda new, old: new.astype(old.dtype), out[CACHE], model_state[CARRY])}

    logits = at_least_float32(out["logits"])
    predicted = batch["target_weight"].astype(logits.dtype)
    total = jnp.sum(_nats(logits, targets) * predicted)
    count = jnp.sum(predicted)
    right = jnp.sum((jnp.argmax(logits, axis=-1) == targets) * predicted)
    metrics = {"loss": (total, count), "accuracy": (right, count)}
    for unit in ("character", "byte"):
      if f"{unit}s" in batch:
        metrics[f"bits_per_{unit}"] = total / math.log(2), jnp.sum(batch[f"{unit}s"])
    if self.padded:
      positions = jnp.asarray(inputs.size, count.dtype)
      metrics["padding"] = positions - jnp.sum(batch["length"]), positions
    return LossOutput(loss=total / jnp.maximum(denominators["tokens"], 1), metrics=metrics,
                      model_state=rest)

  def predict(
      self, variables: Variables, batch: Batch, rng: Array, context: PyTree = None,
  ) -> PyTree:
    """Continues prompts: `decoding.start` says what the batch has, and `advance` what is returned.

    Each row depends on the prompt, `rng` and id alone. The batches of an evaluation, which have no
    prompt, give the cross-entropy of each token, {"nats": f32[B, L]}, or {} without `spell`.
    """
    if "prompt" not in batch:
      if self.spell is None:
        return {}
      rest = {k: v for k, v in variables.items() if k != CARRY}
      out = self.model.apply(
          rest, batch["tokens"], cache=variables.get(CARRY), train=False,
          **self._extent(batch, False))
      return {"nats": _nats(out["logits"].astype(jnp.float32), batch["targets"])}
    return decoding.generate(self.model, variables, batch, self.sampling, rng)

  @property
  def max_new_tokens(self) -> int:
    """The number of tokens that a generated text has, at most."""
    return self.sampling.max_new_tokens

  def check(self, batch: Batch, names: Sequence[str]) -> None:
    """Checks prompts before anything is compiled for them; see `decoding.check`."""
    decoding.check(batch, names, self.model, self.sampling)

  def start(self, variables: Variables, batch: Batch) -> PyTree:
    """Reads the prompts of `predict`; see `decoding.start`."""
    return decoding.start(self.model, variables, batch, self.sampling)

  def advance(
      self, variables: Variables, text: PyTree, rng: Array, count: int,
  ) -> tuple[Mapping[str, Array], PyTree]:
    """Generates `count` tokens; see `decoding.advance`."""
    return decoding.advance(self.model, variables, self.sampling, text, rng, count)

  @property
  def ends_on_host(self) -> bool:
    """Whether the host may end a text earlier than `predict` does, by `has_ended`."""
    return bool(self.sampling.stop_texts)

  def has_ended(self, predictions: Mapping[str, np.ndarray]) -> bool:
    """Whether no row of a text that is generated in parts needs more tokens, on the host.

    Args:
      predictions: what `predict` would give, as far as it is generated: tokens i32[rows, n].
    """
    return all(self._has_ended(row) for row in predictions["tokens"])

  def _has_ended(self, tokens: np.ndarray) -> bool:
    if len(tokens) >= self.max_new_tokens or tokens[-1] == decoding.NOTHING:
      return True
    if not self.sampling.stop_texts:
      return False
    return self.before_stop(tokens) != self.decode(tokens)

  def before_stop(self, tokens: np.ndarray) -> str:
    """The text that tokens i32[n] stand for, which ends before the first stop text in it."""
    least = self.decode(tokens[:self.sampling.min_new_tokens])
    return self.sampling.before_stop(self.decode(tokens), len(least))

  @property
  def goals(self) -> Mapping[str, str]:
    """See `Task.goals`."""
    names = ("loss", "perplexity", "bits_per_character", "bits_per_byte")
    names += ("padding",) if self.padded else ()
    return dict.fromkeys(names, MIN) | {"accuracy": MAX}

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """The means and the perplexity; NaN where nothing was counted."""
    means = super().summarize(sums)
    with np.errstate(over="ignore"):
      return {**means, "perplexity": float(np.exp(means["loss"]))}

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums,
      assets: Mapping[str, Any],
  ) -> Findings:
    """The figure surprise: the start of the text, with the number of bits of each token."""
    del sums, assets
    if self.spell is None:
      return Findings()
    parts = []
    for predicted, batch in rows:
      places = np.asarray(batch["host/position"])
      if places.ndim == 1:
        places = places[:, None] + np.arange(predicted["nats"].shape[1])
      shown = (places >= 0) & (places < MAX_PICTURED)
      drawn = np.flatnonzero(shown.any(axis=1))
      if len(drawn):
        shown = shown[drawn] & (batch["target_weight"][drawn] > 0)
        parts.append((places[drawn][shown], batch["targets"][drawn][shown],
                      predicted["nats"][drawn][shown]))
    if not parts:
      return Findings()
    # The rows come from several streams or buckets; the figure needs them in reading order.
    places, tokens, nats = map(np.concatenate, zip(*parts))
    order = np.argsort(places)
    figure = functools.partial(
        report.surprise, self.spell(tokens[order]), nats[order] / math.log(2))
    return Findings(figures={"surprise": figure})

  def _extent(self, batch: Batch, train: bool) -> Mapping[str, Array]:
    """What the model is told of where documents begin and end in a batch.

    Where it is told no lengths, it need not check each place for padding. What is behind the end
    of a row changes nothing before it, but it would change a carried state, at the ends of an
    evaluation's streams. The training windows of a carried text have no padding.
    """
    if "segment" in batch:
      return {"segment": batch["segment"], "position": batch["position"]}
    return {"length": batch["length"]} if self.padded or self.stateful and not train else {}


def _nats(logits: Array, targets: Array) -> Array:
  """-log p [...] of the targets i32[...] under the logits [..., V]."""
  own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - own
