"""Forecasting: the next values of a time series.

The loss is the mean squared error, or for quantiles the pinball loss (Koenker and Bassett 1978,
"Regression Quantiles"), of normalised values. The literature states its errors in the same way
(Zhou et al. 2021, arXiv:2012.07436).

Dimensions: B batch, W window, H horizon, C channels, K covariates, Q quantiles.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dljax import report
from dljax.errors import UserError
from dljax.tasks.base import (
    ALL, MAX, MIN, Array, Batch, Findings, LossOutput, PyTree, Sums, TaskBase, Variables,
    at_least_float32, ratio)

MEDIAN = 0.5
MAX_KEPT = 512  # the number of windows among which that with the median error is chosen
MAX_PICTURED_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Forecasting(TaskBase):
  """Forecasts the H rows after a window.

  Batches have window [B, W, C], horizon [B, H, C] with NaN where a value is missing, mask f32[B],
  and covariates [B, W + H, K] if the data have any.

  Attributes:
    model: called as `model(window, covariates, train=...)`, gives {"logits": [B, H, C]}, or
      [B, H, C, Q] with quantiles.
    quantiles: the quantiles to forecast, in rising order, with the median among them; () forecasts
      the mean, by the squared error.

  Raises:
    UserError: the quantiles are out of order or range, or lack the median.
  """

  model: nn.Module
  quantiles: tuple[float, ...] = ()

  evaluate_reads = ("horizon",)
  evaluate_draws = ("window",)
  titles = {
      "mse": "normalised mean squared error", "mae": "normalised mean absolute error",
      "mse_in_units": "mean squared error in the data's units",
      "mae_in_units": "mean absolute error in the data's units"}

  def __post_init__(self):
    q, flag = self.quantiles, f"--config.model.quantiles={','.join(map(str, self.quantiles))}"
    if not all(0 < value < 1 for value in q) or any(a >= b for a, b in zip(q, q[1:])):
      raise UserError(f"{flag}: give rising numbers between 0 and 1")
    if q and MEDIAN not in q:
      raise UserError(f"{flag}: the median, {MEDIAN}, is missing; add it, as it is the forecast "
                      "whose errors are counted")

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    variables = self.model.init({"params": rng}, batch["window"], batch.get("covariates"),
                                train=False)
    return {"params": {}, **variables}  # a baseline has no parameters

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The number of values to forecast."""
    return {"values": jnp.sum(_known(batch), dtype=jnp.float32)}

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str = ALL,
  ) -> LossOutput:
    """See `Task.loss`. Metrics: loss; by channel, [C], mse, mae and, with two quantiles, coverage.

    coverage is the share of values that lie between the lowest and the highest quantile.
    """
    del player  # one player: all parameters
    out, model_state = self.apply(
        params, model_state, batch, rng, train, batch["window"], batch.get("covariates"))
    logits = at_least_float32(out["logits"])
    known = _known(batch)
    # A NaN would reach the gradient even if it were multiplied by 0.
    truth = jnp.where(known, batch["horizon"], 0)
    error = jnp.where(known, truth - self._point(logits), 0)  # [B, H, C]
    if self.quantiles:
      q = jnp.asarray(self.quantiles, logits.dtype)
      short = truth[..., None] - logits
      losses = jnp.where(known, jnp.mean(jnp.maximum(q * short, (q - 1) * short), axis=-1), 0)
    else:
      losses = jnp.square(error)
    total = jnp.sum(losses)
    by_channel = functools.partial(jnp.sum, axis=(0, 1), dtype=logits.dtype)
    count = by_channel(known)
    metrics = {"loss": (total, jnp.sum(count)), "mse": (by_channel(jnp.square(error)), count),
               "mae": (by_channel(jnp.abs(error)), count)}
    if len(self.quantiles) > 1:
      inside = (logits[..., 0] <= truth) & (truth <= logits[..., -1])
      metrics["coverage"] = by_channel(inside & known), count
    return LossOutput(loss=total / jnp.maximum(denominators["values"], 1), metrics=metrics,
                      model_state=model_state)

  def predict(
      self, variables: Variables, batch: Batch, rng: Array, context: PyTree = None,
  ) -> PyTree:
    """Forecasts of normalised values.

    Returns:
      forecast f32[B, H, C]; quantiles f32[B, H, C, Q], if the task has any.
    """
    del rng, context  # nothing is drawn
    out = self.model.apply(variables, batch["window"], batch.get("covariates"), train=False)
    logits = out["logits"].astype(jnp.float32)
    predictions = {"forecast": self._point(logits)}
    if self.quantiles:
      predictions["quantiles"] = logits
    return predictions

  @property
  def goals(self) -> Mapping[str, str]:
    """See `Task.goals`."""
    goals = dict.fromkeys(("loss", "mse", "mae", "mse_in_units", "mae_in_units"), MIN)
    return goals | ({"coverage": MAX} if len(self.quantiles) > 1 else {})

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """loss, mse, mae and coverage: means over all values of all channels; NaN without values."""
    return {name: ratio(np.sum(total), np.sum(count)) for name, (total, count) in sums.items()}

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums,
      assets: Mapping[str, Any],
  ) -> Findings:
    """Errors in the data's units, by channel and by the step ahead; pictures of forecasts.

    Metrics: mse_in_units and mae_in_units, over all values of all channels, even if their units
    differ.
    Tables: channels (mse, mae, both also in units, coverage); steps (mse and mae of normalised
    values by the step ahead).
    Figure: forecasts, for the windows with the least, about the median, and the largest error.
    """
    tally = _Tally(bool(self.band))
    for predictions, batch in rows:  # first, as `sums` is filled while the rows pass
      tally.add(predictions, batch)
    channels, mean, std = _units(assets, len(np.atleast_1d(sums["mse"][0])))
    squares, count = (np.asarray(x, np.float64) for x in sums["mse"])
    sizes = np.asarray(sums["mae"][0], np.float64)
    metrics, table = {}, []
    for c, name in enumerate(channels):
      table.append({
          "channel": name, "mse": ratio(squares[c], count[c]), "mae": ratio(sizes[c], count[c]),
          "mse_in_units": ratio(squares[c] * std[c] ** 2, count[c]),
          "mae_in_units": ratio(sizes[c] * std[c], count[c]),
          **({"coverage": ratio(sums["coverage"][0][c], count[c])} if "coverage" in sums else {})})
    metrics["mse_in_units"] = ratio(squares @ std**2, count.sum())
    metrics["mae_in_units"] = ratio(sizes @ std, count.sum())
    steps = [{"step": h + 1, "mse": ratio(square, n), "mae": ratio(size, n)}
             for h, (square, size, n) in enumerate(zip(*tally.steps))]
    figures = {}
    if picked := tally.pick():
      shown = slice(MAX_PICTURED_CHANNELS)
      panels = {title: {name: x[:, shown] * std[shown] + mean[shown] for name, x in fields.items()}
                for title, fields in picked.items()}
      figures["forecasts"] = functools.partial(
          report.forecasts, panels, channels[shown], band=self.band, step=_step(assets))
    return Findings(metrics, figures, {"channels": table, "steps": steps})

  def _point(self, logits: Array) -> Array:
    """The forecast [B, H, C] whose errors are counted: the median of the quantiles."""
    return logits[..., self.quantiles.index(MEDIAN)] if self.quantiles else logits

  @property
  def band(self) -> str:
    """A name for what lies between the lowest and the highest quantile; "" with less than two."""
    if len(self.quantiles) < 2:
      return ""
    return f"{self.quantiles[0]:g} to {self.quantiles[-1]:g} quantile"


def _known(batch: Batch) -> Array:
  """bool[B, H, C], whether a value is known and so to be forecast."""
  return ~jnp.isnan(batch["horizon"]) & (batch["mask"] > 0)[:, None, None]


def _units(assets: Mapping[str, Any], count: int) -> tuple[list[str], np.ndarray, np.ndarray]:
  """The channels' names, mean [C] and standard deviation [C], as they were saved with the run."""
  saved = assets.get("normaliser",
                     {"channels": range(count), "mean": [0.0] * count, "std": [1.0] * count})
  mean, std = (np.array(saved[name], np.float64) for name in ("mean", "std"))
  return list(map(str, saved["channels"])), mean, std


def _step(assets: Mapping[str, Any]) -> str:
  """The time from one row of the series to the next, such as "1 hour"; "" if it is not known."""
  return str(assets.get("normaliser", {}).get("step", ""))


class _Tally:
  """Counts rows as they pass, and keeps some of them.

  Args:
    bands: whether predictions have two quantiles or more.

  Attributes:
    steps: f64[3, H], the sums of squared and of absolute errors, and the number of values, at each
      step ahead.
  """

  def __init__(self, bands: bool):
    self._bands = bands
    self.steps: np.ndarray | float = 0.0
    self._errors: list[float] = []
    self._kept: dict[int, Mapping[str, np.ndarray]] = {}  # every `_stride`-th row
    self._stride = 1
    self._least: tuple[float, Any] = (math.inf, None)  # (error, fields)
    self._largest: tuple[float, Any] = (-math.inf, None)

  def add(self, predictions: PyTree, batch: Mapping[str, Any]) -> None:
    """Counts the rows of a batch."""
    truth, forecast = (np.asarray(x, np.float64)
                       for x in (batch["horizon"], predictions["forecast"]))
    known = ~np.isnan(truth)
    error = np.where(known, truth - forecast, 0)
    values = error**2, np.abs(error), known.astype(np.float64)
    self.steps = self.steps + np.stack([x.sum((0, 2)) for x in values])
    errors = (error**2).sum((1, 2)) / np.maximum(known.sum((1, 2)), 1)

    made = []  # (row, its fields); the windows follow, for the rows that are kept

    def fields(i: int) -> dict[str, np.ndarray]:
      found = {"truth": truth[i], "forecast": forecast[i]}
      if self._bands:
        found |= {"low": predictions["quantiles"][i, ..., 0],
                  "high": predictions["quantiles"][i, ..., -1]}
      # A view would keep the whole batch in memory.
      made.append((i, {name: np.array(x, np.float64) for name, x in found.items()}))
      return made[-1][1]

    for i in np.flatnonzero(known.any((1, 2))):
      if errors[i] < self._least[0]:
        self._least = errors[i], fields(i)
      if errors[i] > self._largest[0]:
        self._largest = errors[i], fields(i)
      if len(self._errors) % self._stride == 0:
        self._kept[len(self._errors)] = fields(i)
        if len(self._kept) > MAX_KEPT:
          self._stride *= 2
          self._kept = {k: row for k, row in self._kept.items() if k % self._stride == 0}
      self._errors.append(errors[i])
    kept = {id(row) for row in (self._least[1], self._largest[1], *self._kept.values())}
    if kept := [(i, row) for i, row in made if id(row) in kept]:
      windows = batch["window"][np.array([i for i, _ in kept])]
      for (_, row), window in zip(kept, windows):
        row["window"] = np.array(window, np.float64)

  def pick(self) -> dict[str, Mapping[str, np.ndarray]]:
    """Title -> fields of the windows with the least, about the median, and the largest error."""
    if self._least[1] is None:  # nothing was counted, or all errors are NaN
      return {}
    median = np.median(self._errors)
    middle = min(self._kept, key=lambda i: abs(self._errors[i] - median))
    picked = {"least error": self._least,
              "median error": (self._errors[middle], self._kept[middle]),
              "largest error": self._largest}
    return {f"{title}: normalised mse {error:.3g}": fields for title, (error, fields) in picked.items()}


def decode(
    batch: Mapping[str, np.ndarray], predictions: PyTree, assets: Mapping[str, Any],
) -> Iterator[Mapping[str, Any]]:
  """One row for each series, to print and to write, in the data's units.

  Args:
    batch: the batch that `windows.encode` made; "host/time" has the times as texts [B, H].
    predictions: the result of `Forecasting.predict` for it.
    assets: the run's assets; "normaliser" has the channels' mean and standard deviation.

  Yields:
    {"first": "2011-01-01 00:00:00", "last": ..., "forecast": {"temp": {"2011-01-01 00:00:00":
    39.6, ...}}}. With two quantiles or more, "low" and "high" have the lowest and the highest in
    the same form as "forecast".
  """
  channels, mean, std = _units(assets, np.shape(predictions["forecast"])[-1])
  parts = {"forecast": predictions["forecast"]}
  if np.shape(predictions.get("quantiles"))[3:] > (1,):
    parts |= {"low": predictions["quantiles"][..., 0], "high": predictions["quantiles"][..., -1]}
  parts = {name: np.asarray(x, np.float64) * std + mean for name, x in parts.items()}
  for i, times in enumerate(batch["host/time"]):
    times = list(map(str, times))
    tables = {part: {name: dict(zip(times, map(float, values[i, :, c])))
                     for c, name in enumerate(channels)} for part, values in parts.items()}
    yield {"first": times[0], "last": times[-1], **tables}


def pictures(
    batch: Mapping[str, np.ndarray], predictions: PyTree, assets: Mapping[str, Any], band: str,
) -> Iterator[Any]:
  """Pictures, as `PIL.Image.Image`, of each series' window and forecast.

  Args:
    batch: the batch that `windows.encode` made.
    predictions: the predictions for it.
    assets: the run's assets.
    band: the name of the band between the lowest and the highest quantile; see `Forecasting.band`.
  """
  channels, mean, std = _units(assets, np.shape(predictions["forecast"])[-1])
  for i, times in enumerate(batch["host/time"]):
    fields = {"window": batch["window"][i], "forecast": predictions["forecast"][i]}
    if band:
      fields |= {"low": predictions["quantiles"][i, ..., 0],
                 "high": predictions["quantiles"][i, ..., -1]}
    fields = {name: np.asarray(x, np.float64) * std + mean for name, x in fields.items()}
    yield report.picture(report.forecasts(
        {"": fields}, channels, band=band, step=_step(assets),
        caption=f"{times[0]} to {times[-1]}"))
