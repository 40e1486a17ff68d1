"""Masked language modelling: the tokens that were hidden in a text (Devlin et al. 2019, section 3.1).

The loss is the cross-entropy of each hidden token given all tokens that are seen, before and after
it, in nats per token, computed in float32. The data choose and hide the tokens, see
`data/text/masked.py`; the denominator is their number. The perplexity is that of the hidden
tokens, so it cannot be compared with that of a model that reads from left to right.

Dimensions: B batch, L tokens, M tokens to be predicted, V vocabulary, K guesses.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dljax.tasks.base import (
    ALL, MAX, MIN, Array, Batch, LossOutput, PyTree, Sums, TaskBase, Variables, at_least_float32)

GUESSES = 5  # tokens that a prediction names for each place


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModeling(TaskBase):
  """Predicts hidden tokens from those around them.

  Batches have
    tokens i32[B, L], in which some are hidden;
    places i32[B, M], where a token is to be predicted; targets i32[B, M], the tokens themselves;
    and target_weight f32[B, M], 0 if none is to be predicted;
    length i32[B], the number of tokens in each row before its padding;
    segment i32[B, L] and position i32[B, L], if several documents share a row.

  Attributes:
    model: called as `model(tokens, length=None, segment=None, position=None, places=None,
      train=...)`, gives {"logits": [B, M, V]}, at the places alone.
  """

  model: nn.Module

  goals = {"loss": MIN, "accuracy": MAX, "perplexity": MIN, "padding": MIN}

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    return dict(self.model.init({"params": rng}, batch["tokens"][:, :1], train=False))

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The number of tokens to be predicted."""
    return {"tokens": jnp.sum(batch["target_weight"])}

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str = ALL,
  ) -> LossOutput:
    """See `Task.loss`. Metrics: loss, accuracy, perplexity, padding."""
    del player  # one player: all parameters
    out, model_state = self.apply(
        params, model_state, batch, rng, train, batch["tokens"], **_given(batch))
    logits, targets = at_least_float32(out["logits"]), batch["targets"]
    weight = batch["target_weight"].astype(logits.dtype)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    total = jnp.sum((jax.nn.logsumexp(logits, axis=-1) - own) * weight)
    count = jnp.sum(weight)
    right = jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weight)
    places = jnp.asarray(batch["tokens"].size, count.dtype)
    metrics = {"loss": (total, count), "accuracy": (right, count),
               "padding": (places - jnp.sum(batch["length"]), places)}
    return LossOutput(loss=total / jnp.maximum(denominators["tokens"], 1), metrics=metrics,
                      model_state=model_state)

  def predict(
      self, variables: Variables, batch: Batch, rng: Array, context: PyTree = None,
  ) -> PyTree:
    """The most probable tokens at each of `places`: {"tokens": i32[B, M, K], "probabilities":
    f32[B, M, K]}, the best first. An evaluation, whose batches have targets, needs none: {}."""
    del rng, context  # nothing is drawn
    if "targets" in batch:
      return {}
    out = self.model.apply(variables, batch["tokens"], train=False, **_given(batch))
    left = jax.nn.softmax(out["logits"].astype(jnp.float32), axis=-1)
    tokens, probabilities = [], []
    # One at a time, as `jax.lax.top_k` would gather the rows of all devices.
    for _ in range(min(GUESSES, left.shape[-1])):
      best = jnp.argmax(left, axis=-1)
      tokens.append(best)
      probabilities.append(jnp.max(left, axis=-1))
      left = jnp.where(jax.nn.one_hot(best, left.shape[-1], dtype=bool), -1.0, left)
    return {"tokens": jnp.stack(tokens, axis=-1), "probabilities": jnp.stack(probabilities, -1)}

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """The means and the perplexity; NaN where nothing was counted."""
    means = super().summarize(sums)
    with np.errstate(over="ignore"):
      return {**means, "perplexity": float(np.exp(means["loss"]))}


def _given(batch: Batch) -> Mapping[str, Array]:
  """What the model is told besides the tokens: where to predict, and where documents end."""
  names = ("segment", "position") if "segment" in batch else ("length",)
  return {name: batch[name] for name in (*names, "places")}
