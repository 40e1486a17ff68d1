"""Regression: one or several numbers for each image.

The network learns the numbers with mean 0 and standard deviation 1 over the training images, by the
mean of the squared errors. Metrics and predictions are in the units of the table.

Dimensions: B batch, T numbers (targets), N examples.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dljax import report
from dljax.tasks.base import (
    ALL, MAX, MIN, Array, Batch, Findings, LossOutput, PyTree, Sums, TaskBase, Variables,
    at_least_float32, class_names, ratio)

MAX_DRAWN = 2000  # examples in the figure


@dataclasses.dataclass(frozen=True)
class Regression(TaskBase):
  """Gives each image `len(mean)` numbers.

  Batches have image [B, ...], label f32[B, T] (normalised) and mask f32[B].

  Attributes:
    model: called as `model(image, mask, train=...)`, gives [B, T], the numbers as `label` has them.
    mean: the mean of each number over the training images.
    std: its standard deviation, above 0.
  """

  model: nn.Module
  mean: tuple[float, ...]
  std: tuple[float, ...]

  evaluate_reads = ("label",)
  goals = {"loss": MIN, "mse": MIN, "mae": MIN, "r2": MAX}

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    return self.model.init({"params": rng}, batch["image"], train=False)

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The number of examples, not counting padding."""
    return {"examples": jnp.sum(batch["mask"])}

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str = ALL,
  ) -> LossOutput:
    """See `Task.loss`. Metrics: loss, the mean squared error of the normalised numbers; and of
    each number the sums that `summarize` needs."""
    del player  # one player: all parameters
    outputs, model_state = self.apply(
        params, model_state, batch, rng, train, batch["image"], batch["mask"])
    outputs = at_least_float32(outputs)
    label, mask = batch["label"].astype(outputs.dtype), batch["mask"].astype(outputs.dtype)
    error = (outputs - label) * mask[:, None]
    squares = jnp.sum(error**2, axis=0)
    total, count = jnp.mean(squares), jnp.sum(mask)
    counts = jnp.broadcast_to(count, squares.shape)
    shown = label * mask[:, None]
    metrics = {
        "loss": (total, count),
        "squared_error": (squares, counts),
        "absolute_error": (jnp.sum(jnp.abs(error), axis=0), counts),
        "label": (jnp.sum(shown, axis=0), counts),
        "squared_label": (jnp.sum(shown**2, axis=0), counts),
    }
    examples = jnp.maximum(denominators["examples"], 1)  # there may be nothing but padding
    return LossOutput(loss=total / examples, metrics=metrics, model_state=model_state)

  def predict(
      self, variables: Variables, batch: Batch, rng: Array, context: PyTree = None,
  ) -> PyTree:
    """{"numbers": f32[B, T]}, in the units of the table."""
    del rng, context  # nothing is drawn
    outputs = self.model.apply(variables, batch["image"], batch["mask"], train=False)
    return {"numbers": outputs.astype(jnp.float32) * jnp.asarray(self.std, jnp.float32)
                       + jnp.asarray(self.mean, jnp.float32)}

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """loss; and in the units of the table mse, mae and r2 (the share of the variance that is
    explained; NaN where a number does not vary). Of several numbers each is the mean."""
    scores = self._scores(sums)
    return {"loss": ratio(*sums["loss"]),
            **{name: float(np.mean(values)) for name, values in scores.items()}}

  def _scores(self, sums: Sums) -> dict[str, np.ndarray]:
    """Metric -> its value for each number, f64[T]."""
    with np.errstate(divide="ignore", invalid="ignore"):
      squares, absolute, mean, square = (
          np.divide(*(np.asarray(x, np.float64) for x in sums[name])) for name in (
              "squared_error", "absolute_error", "label", "squared_label"))
      variance = square - mean**2
      # What float32 leaves of a constant by rounding is no variance.
      r2 = np.where(variance > 1e-5 * square, 1 - squares / variance, np.nan)
    std = np.asarray(self.std)
    return {"mse": squares * std**2, "mae": absolute * std, "r2": r2}

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums,
      assets: Mapping[str, Any],
  ) -> Findings:
    """Scores of each number, and guesses against the truth.

    Tables: numbers (number, mse, mae, r2). Figures: numbers, up to `MAX_DRAWN` examples.
    """
    names = class_names(assets, len(self.mean))
    truths, guesses = [], []
    for predictions, batch in rows:
      if sum(map(len, truths)) < MAX_DRAWN:
        truths.append(np.asarray(batch["label"], np.float64) * self.std + self.mean)
        guesses.append(np.asarray(predictions["numbers"], np.float64))
    scores = self._scores(sums)
    table = [{"number": name, **{metric: float(values[i]) for metric, values in scores.items()}}
             for i, name in enumerate(names)]
    if not truths:
      return Findings(tables={"numbers": table})
    draw = functools.partial(report.numbers, np.concatenate(truths)[:MAX_DRAWN],
                             np.concatenate(guesses)[:MAX_DRAWN], names)
    return Findings(figures={"numbers": draw}, tables={"numbers": table})


def decode(predictions: PyTree, assets: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
  """One row for each prediction, to print and to write: {name: number}. Rows have their input's
  name as "input", so a number of that name is called "number input".

  Args:
    predictions: the result of `Regression.predict`, {"numbers": [B, T]}.
    assets: the run's assets; "classes" are the names of the numbers.
  """
  numbers = np.asarray(predictions["numbers"])
  names = ["number input" if name == "input" else name
           for name in class_names(assets, numbers.shape[-1])]
  for row in numbers:
    yield {name: float(value) for name, value in zip(names, row)}
