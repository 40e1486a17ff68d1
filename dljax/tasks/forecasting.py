"""Forecasting: the values of a time series that come next.

The loss is the mean squared error, or for quantiles the pinball loss (Koenker and Bassett 1978, "Regression
Quantiles"), of normalised values; that is how the literature states its errors too (Zhou et al. 2021,
arXiv:2012.07436).

Dimensions: B batch, W window, H horizon, C channels, K covariates, Q quantiles.
"""

import dataclasses
import functools
import datetime
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
MAX_KEPT = 512  # windows among which the one of median error is looked for
MAX_PICTURED_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Forecasting(TaskBase):
  """Forecasts the H rows after a window.

  Batches have window [B, W, C], horizon [B, H, C] with NaN where a value is missing, mask f32[B], and where there are
  covariates these [B, W + H, K]. In prediction they may have time i32[B, H, 2], which is handed on.

  Attributes:
    model: called as `model(window, covariates, train=...)`, gives {"logits": [B, H, C], or with quantiles
      [B, H, C, Q]}.
    quantiles: which to forecast, rising, the median among them; () forecasts the mean, by the squared error.

  Raises:
    UserError: quantiles out of order or range, or without the median.
  """

  model: nn.Module
  quantiles: tuple[float, ...] = ()

  evaluate_reads = ("window", "horizon")

  def __post_init__(self):
    q, flag = self.quantiles, f"--config.model.quantiles={','.join(map(str, self.quantiles))}"
    if not all(0 < value < 1 for value in q) or any(a >= b for a, b in zip(q, q[1:])):
      raise UserError(f"{flag}: give rising numbers between 0 and 1")
    if q and MEDIAN not in q:
      raise UserError(f"{flag}: the median, {MEDIAN}, is missing; it is the forecast whose errors are counted")

  def init(self, rng: Array, batch: Batch) -> Variables:
    """See `Task.init`."""
    variables = self.model.init({"params": rng}, batch["window"], batch.get("covariates"), train=False)
    return {"params": {}, **variables}  # a baseline has no parameters

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The number of values that there are to forecast."""
    return {"values": jnp.sum(_known(batch), dtype=jnp.float32)}

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str = ALL,
  ) -> LossOutput:
    """See `Task.loss`. Metrics: loss; of each channel [C] mse, mae and, with two quantiles or more, coverage.

    coverage counts the values from the lowest quantile to the highest.
    """
    del player  # one player: all parameters
    out, model_state = self.apply(
        params, model_state, batch, rng, train, batch["window"], batch.get("covariates"))
    logits = at_least_float32(out["logits"])
    known = _known(batch)
    truth = jnp.where(known, batch["horizon"], 0)  # a NaN would reach the gradient, whatever it is multiplied by
    error = jnp.where(known, truth - self._point(logits), 0)  # [B, H, C]
    if self.quantiles:
      q = jnp.asarray(self.quantiles, logits.dtype)
      short = truth[..., None] - logits
      losses = jnp.where(known, jnp.mean(jnp.maximum(q * short, (q - 1) * short), axis=-1), 0)
    else:
      losses = jnp.square(error)
    total = jnp.sum(losses)
    by_channel = lambda x: jnp.sum(x, (0, 1), dtype=logits.dtype)
    count = by_channel(known)
    metrics = {"loss": (total, jnp.sum(count)), "mse": (by_channel(jnp.square(error)), count),
               "mae": (by_channel(jnp.abs(error)), count)}
    if len(self.quantiles) > 1:
      inside = (logits[..., 0] <= truth) & (truth <= logits[..., -1])
      metrics["coverage"] = by_channel(inside & known), count
    return LossOutput(loss=total / jnp.maximum(denominators["values"], 1), metrics=metrics, model_state=model_state)

  def predict(
      self, variables: Variables, batch: Batch, rng: Array, context: PyTree = None,
  ) -> PyTree:
    """{"forecast": f32[B, H, C], "quantiles": f32[B, H, C, Q] if any} of normalised values, and the batch's time."""
    del rng, context  # nothing is drawn
    logits = self.model.apply(variables, batch["window"], batch.get("covariates"), train=False)["logits"]
    logits = logits.astype(jnp.float32)
    predictions = {"forecast": self._point(logits)} | ({"quantiles": logits} if self.quantiles else {})
    return predictions | ({"time": batch["time"]} if "time" in batch else {})

  @property
  def goals(self) -> Mapping[str, str]:
    """See `Task.goals`."""
    goals = dict.fromkeys(("loss", "mse", "mae", "mse_in_units", "mae_in_units"), MIN)
    return goals | ({"coverage": MAX} if len(self.quantiles) > 1 else {})

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """The means loss, mse, mae and coverage over all values of all channels; NaN where nothing was counted."""
    return {name: ratio(np.sum(total), np.sum(count)) for name, (total, count) in sums.items()}

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums, assets: Mapping[str, Any],
  ) -> Findings:
    """Errors in the data's units, by channel and by the step ahead; pictures of forecasts.

    Metrics: mse_in_units, mae_in_units, over all values of all channels, whose units may differ.
    Tables: channels (mse, mae, both in units, coverage); steps (mse and mae of normalised values by the step ahead).
    Figure: forecasts, those of the least, of about the median, and of the largest squared error of a window.
    """
    tally = _Tally(bool(self.quantiles))
    for predictions, batch in rows:  # first: `sums` is filled by the passing of the rows
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
      scale = lambda x: x[:, shown] * std[shown] + mean[shown]
      panels = {title: {name: scale(x) for name, x in fields.items()} for title, fields in picked.items()}
      figures["forecasts"] = functools.partial(
          report.forecasts, panels, channels[shown], band=self.band)
    return Findings(metrics, figures, {"channels": table, "steps": steps})

  def _point(self, logits: Array) -> Array:
    """The forecast [B, H, C] whose errors are counted: the median of the quantiles."""
    return logits[..., self.quantiles.index(MEDIAN)] if self.quantiles else logits

  @property
  def band(self) -> str:
    """What lies between the lowest and the highest quantile, in words; "" where there are not two."""
    return f"{self.quantiles[0]:g} to {self.quantiles[-1]:g} quantile" if len(self.quantiles) > 1 else ""


def _known(batch: Batch) -> Array:
  """bool[B, H, C]: which values there are to forecast."""
  return ~jnp.isnan(batch["horizon"]) & (batch["mask"] > 0)[:, None, None]


def _units(assets: Mapping[str, Any], count: int) -> tuple[list[str], np.ndarray, np.ndarray]:
  """Names, mean [C] and standard deviation [C] of the channels, as they were saved with the run."""
  saved = assets.get("normaliser", {"channels": range(count), "mean": [0.0] * count, "std": [1.0] * count})
  return list(map(str, saved["channels"])), np.array(saved["mean"], np.float64), np.array(saved["std"], np.float64)


class _Tally:
  """Counts while rows pass, and keeps some of them.

  Args:
    bands: whether predictions have quantiles.

  Attributes:
    steps: f64[3, H], squared and absolute errors and the number of values at each step ahead.
  """

  def __init__(self, bands: bool):
    self._bands = bands
    self.steps: np.ndarray | float = 0.0
    self._errors: list[float] = []
    self._kept: dict[int, Mapping[str, np.ndarray]] = {}  # every so manieth
    self._stride = 1
    self._least: tuple[float, Any] = (math.inf, None)  # (error, fields)
    self._largest: tuple[float, Any] = (-math.inf, None)

  def add(self, predictions: PyTree, batch: Mapping[str, Any]) -> None:
    """Counts the rows of a batch."""
    truth, forecast = (np.asarray(x, np.float64) for x in (batch["horizon"], predictions["forecast"]))
    known = ~np.isnan(truth)
    error = np.where(known, truth - forecast, 0)
    self.steps = self.steps + np.stack([x.sum((0, 2)) for x in (error**2, np.abs(error), known.astype(np.float64))])
    errors = (error**2).sum((1, 2)) / np.maximum(known.sum((1, 2)), 1)

    def fields(i: int) -> dict[str, np.ndarray]:
      found = {"window": batch["window"][i], "truth": truth[i], "forecast": forecast[i]}
      if self._bands:
        found |= {"low": predictions["quantiles"][i, ..., 0], "high": predictions["quantiles"][i, ..., -1]}
      return {name: np.array(x, np.float64) for name, x in found.items()}  # a view would keep the batch

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

  def pick(self) -> dict[str, Mapping[str, np.ndarray]]:
    """Title -> fields of the windows of least, about median, and largest error; none where nothing was counted."""
    if self._least[1] is None:  # nothing was counted, or the forecasts are no numbers
      return {}
    median = np.median(self._errors)
    middle = min(self._kept, key=lambda i: abs(self._errors[i] - median))
    picked = {"least error": self._least, "median error": (self._errors[middle], self._kept[middle]),
              "largest error": self._largest}
    return {f"{title}: mse {error:.3g}": fields for title, (error, fields) in picked.items()}


def decode(predictions: PyTree, assets: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
  """One row for each series, to print and to write, in the data's units.

  Args:
    predictions: what `Forecasting.predict` gave, with time.
    assets: the run's assets; "normaliser" has the units.

  Yields:
    {"first": "2011-01-01 00:00:00", "last": ..., "forecast": {"temp": {"2011-01-01 00:00:00": 39.6, ...}}}, and with
    quantiles their "low" and "high", the lowest and the highest, likewise.
  """
  channels, mean, std = _units(assets, np.shape(predictions["forecast"])[-1])
  parts = {"forecast": predictions["forecast"]}
  if np.shape(predictions.get("quantiles"))[3:] > (1,):
    parts |= {"low": predictions["quantiles"][..., 0], "high": predictions["quantiles"][..., -1]}
  parts = {name: np.asarray(x, np.float64) * std + mean for name, x in parts.items()}
  for i, time in enumerate(predictions["time"]):
    times = [_when(*row) for row in time]
    table = lambda values: {name: dict(zip(times, map(float, values[:, c]))) for c, name in enumerate(channels)}
    yield {"first": times[0], "last": times[-1], **{name: table(x[i]) for name, x in parts.items()}}


def _when(days: int, seconds: int) -> str:
  """A time from its day since the start of 1970 and the seconds of the day."""
  return str(datetime.datetime(1970, 1, 1) + datetime.timedelta(days=int(days), seconds=int(seconds)))


def pictures(
    batch: Mapping[str, np.ndarray], predictions: PyTree, assets: Mapping[str, Any], band: str,
) -> Iterator[Any]:
  """For each series the window and its forecast, as a `PIL.Image.Image`.

  Args:
    batch: of `series.encode`.
    predictions: for it.
    assets: the run's assets.
    band: what lies between lowest and highest quantile; see `Forecasting.band`.
  """
  channels, mean, std = _units(assets, np.shape(predictions["forecast"])[-1])
  for i, time in enumerate(predictions["time"]):
    fields = {"window": batch["window"][i], "forecast": predictions["forecast"][i]}
    if band:
      fields |= {"low": predictions["quantiles"][i, ..., 0], "high": predictions["quantiles"][i, ..., -1]}
    fields = {name: np.asarray(x, np.float64) * std + mean for name, x in fields.items()}
    yield report.picture(report.forecasts({f"from {_when(*time[0])}": fields}, channels, band=band))
