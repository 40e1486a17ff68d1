"""Time series: a window of the past, the horizon to forecast, and the calendar of both; config and
pipelines.

A batch holds

  window        f32[b, W, C], normalised; a missing value is replaced by the last one before it
  horizon       f32[b, H, C], the rows after the window, normalised; NaN where a value is missing
  covariates    f32[b, W + H, K], the calendar of window and horizon, which is known in advance;
                only if `config.data.covariates` names any
  mask, id      see `data/pipeline.py`
  "host/time"   i64[b], in evaluation: the time of the horizon's first row, in seconds since 1970

No part of a window depends on later rows, nor does its normalisation: mean and standard deviation
are those of the training rows. In training, window and horizon lie in the training rows. In an
evaluation, the horizon lies in the split's rows, and the window may reach into the rows before.
Every window counts once, in order, as in the literature (Zhou et al. 2021, arXiv:2012.07436; Zeng
et al. 2023, arXiv:2205.13504).

Dimensions: b the host's rows, T rows of the series, W window, H horizon, C channels, K covariates.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dljax.config import Field, Group, one_of
from dljax.data import inputs, sources, splits
from dljax.data.series import table
from dljax.data.pipeline import HostBatch, IndexedPipeline, Pipeline, Plan
from dljax.errors import UserError, unknown

ASSET = "normaliser"
MISSING = ("refuse", "mask")
ROUNDING = 64 * np.finfo(np.float64).eps  # share of a number that adding many may change
HUGE = 1e150  # the square of a larger number is nearly infinite
DAY = 86400  # seconds
MONDAY = 3 * DAY  # seconds from a Monday to the start of 1970, which was a Thursday


def default_config() -> Group:
  """The fields of `config.data`."""
  return Group({
      "name": Field("temperatures", "The name of a TFDS set, or the path of a .csv file."),
      "time": Field("date", "The column of a .csv file that holds the time."),
      "channels": Field(("seattle", "san_francisco"), "The channels to read and to forecast."),
      "train": Field(5880, "The number of rows to train on, from the first; rows that are missing "
                     "count."),
      "validation": Field(1440, "The number of validation rows, after the training rows."),
      "test": Field(1440, "The number of test rows, after those of the validation."),
      "window": Field(168, "The number of rows that a forecast is made from."),
      "horizon": Field(24, "The number of rows that are forecast."),
      "covariates": Field(("hour_of_day", "day_of_year"), one_of(
          "What the model reads of the time; none, one or more", COVARIATES)),
      "missing": Field("refuse", one_of('What is done about missing values; with "mask" a window '
                                        "repeats the last value before, and the loss leaves them "
                                        "out", MISSING)),
  })


def validate(config: Any) -> None:
  """Checks the fields of `config.data` against their ranges and each other; raises `UserError`."""
  need = functools.partial(splits.need, config)
  need("channels", 0 < len(config.channels) == len(set(config.channels)),
       "name one channel or more, each once")
  need("covariates", len(config.covariates) == len(set(config.covariates)), "name each once")
  for name in config.covariates:
    if name not in COVARIATES:
      raise unknown("--config.data.covariates", name, COVARIATES)
  need("missing", config.missing in MISSING, f"choose one of {', '.join(MISSING)}")
  for field in ("window", "horizon"):
    need(field, config[field] > 0, "give a positive number of rows")
  need("window", config.window + config.horizon <= config.train,
       f"with the horizon of {config.horizon} it is longer than the {config.train} rows of "
       "--config.data.train; make it smaller")
  for field in ("validation", "test"):
    need(field, config[field] >= config.horizon,
         f"give {config.horizon} rows or more, the length of a horizon")
  if not _is_csv(config.name):
    sources.parse_name(config.name)


def _is_csv(name: str) -> bool:
  return name.lower().endswith(".csv")


@dataclasses.dataclass(frozen=True)
class Normaliser:
  """What is fitted to the training rows.

  Attributes:
    channels: the names of the C channels.
    mean: f64[C], the mean of each channel.
    std: f64[C], the standard deviation of each channel; 1 for a channel that never changes, and 1
      or more if it changes by no more than the rounding of its numbers.
    step: the number of seconds from a row to the next.
  """

  channels: tuple[str, ...]
  mean: np.ndarray
  std: np.ndarray
  step: int

  @classmethod
  def fit(cls, series: table.Series) -> "Normaliser":
    """Fits to all values that are not missing; raises `UserError` for a channel that has none."""
    for c in np.flatnonzero(np.isnan(series.values).all(axis=0))[:1]:
      raise UserError(f"{series.name}: {series.channels[c]} has no value in the "
                      f"{len(series.times)} training rows; drop it from --config.data.channels")
    values = np.where(np.isfinite(series.values), series.values, np.nan)
    size = np.nanmax(np.abs(values), axis=0)
    # The squares of very large numbers are infinite, and the sum of equal ones is rounded.
    unit = np.where(size > HUGE, size, 1.0)
    mean, std = unit * np.nanmean(values / unit, axis=0), unit * np.nanstd(values / unit, axis=0)
    std = np.where(std <= ROUNDING * size, np.maximum(1.0, ROUNDING * size), std)
    least, most = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    return cls(series.channels, np.where(least == most, most, mean),
               np.where(least == most, 1.0, std), series.step)

  def __call__(self, values: np.ndarray) -> np.ndarray:
    """f[..., C] in the data's units -> f32[..., C] with mean 0 and standard deviation 1."""
    return ((values - self.mean) / self.std).astype(np.float32)

  def check(self, series: table.Series) -> None:
    """Raises `UserError` if a series has other channels or another step."""
    if self.channels != series.channels:
      raise UserError(f"{series.name}: has the channels {', '.join(series.channels)}, but the "
                      f"model was trained on {', '.join(self.channels)}; name these by "
                      "--config.data.channels")
    if self.step != series.step:
      raise UserError(f"{series.name}: has steps of {table.duration(series.step)}, but the model "
                      f"was trained on steps of {table.duration(self.step)}; resample it")

  def asset(self) -> dict[str, Any]:
    """The value that is saved in `workdir/data/`."""
    return {"channels": list(self.channels), "mean": self.mean.tolist(), "std": self.std.tolist(),
            "step": self.step}

  @classmethod
  def from_assets(cls, assets: Mapping[str, Any]) -> "Normaliser":
    """The inverse of `asset`, given all assets of a run; `UserError` if it is not among them."""
    if ASSET not in assets:
      raise UserError(f"--workdir: data/{ASSET}.json is missing there; restore it from a copy, or "
                      "train again")
    saved = assets[ASSET]
    return cls(tuple(saved["channels"]), np.array(saved["mean"]), np.array(saved["std"]),
               int(saved["step"]))


def fill_forward(values: np.ndarray) -> np.ndarray:
  """f[T, C] with each NaN replaced by the last value before it, or else by 0, the mean."""
  rows = np.arange(len(values))[:, None]
  last = np.maximum.accumulate(np.where(np.isnan(values), 0, rows), axis=0)
  filled = np.take_along_axis(values, last, axis=0)
  return np.where(np.isnan(filled), 0, filled).astype(values.dtype)


def _of_year(times: np.ndarray) -> np.ndarray:
  """f64[T]: the share of the year that has passed at each time."""
  year = times.astype("datetime64[s]").astype("datetime64[Y]")
  begin, end = (y.astype("datetime64[s]").astype(np.int64)
                for y in (year, year + np.timedelta64(1, "Y")))
  return (times - begin) / (end - begin)


# Name -> (times i64[T]) -> the share of the cycle that has passed at each, [T] in [0, 1). A week
# starts on Monday.
COVARIATES = {
    "hour_of_day": lambda times: times % DAY / DAY,
    "day_of_week": lambda times: (times + MONDAY) % (7 * DAY) / (7 * DAY),
    "day_of_year": _of_year,
}


def covariates(times: np.ndarray, names: Sequence[str]) -> np.ndarray:
  """f32[T, 2 len(names)]: sine and cosine, which do not jump, of the named `COVARIATES`."""
  phases = [2 * np.pi * COVARIATES[name](times) for name in names]
  waves = [wave(phase) for phase in phases for wave in (np.sin, np.cos)]
  if not waves:
    return np.zeros((len(times), 0), np.float32)
  return np.stack(waves, axis=-1).astype(np.float32)


class SeriesSet(splits.DataSet):
  """What the pipelines of one config share: the series, read once.

  Args:
    config: see `default_config`.

  Raises:
    UserError: a value out of range.
  """

  def __init__(self, config: Any):
    validate(config)
    super().__init__(config)
    self._saved: Normaliser | None = None  # replaces one fitted here
    self._opened: tuple[Normaliser, np.ndarray, np.ndarray] | None = None

  def pipeline(self, split: str, **options: Any) -> Pipeline:
    """See `DataSet.pipeline`."""
    finish = _finish_train if options["train"] else _finish
    return IndexedPipeline(lambda _: self.windows(split), finish, **options)

  def shapes(self) -> splits.Shapes:
    """See `DataSet.shapes`."""
    config = self.config
    channels, length = len(config.channels), config.window + config.horizon
    shapes = {"window": ((config.window, channels), np.float32),
              "horizon": ((config.horizon, channels), np.float32)}
    if config.covariates:
      shapes["covariates"] = (length, 2 * len(config.covariates)), np.float32
    return shapes

  def fields(self) -> Mapping[str, Any]:
    """See `DataSet.fields`."""
    fields = {"restore": self.restore, "assets": lambda: {ASSET: self.normaliser().asset()}}
    if _is_csv(name := self.config.name):
      fields["fingerprint"] = lambda: self.fingerprint_of(name)
    return fields

  def restore(self, assets: Mapping[str, Any]) -> None:
    """Takes the normaliser that a run has saved; call it before the series is opened."""
    self._saved = Normaliser.from_assets(assets)

  def normaliser(self) -> Normaliser:
    """The normaliser of the batches; opens the series if need be."""
    return self.opened[0]

  @property
  def opened(self) -> tuple[Normaliser, np.ndarray, np.ndarray]:
    """The normaliser, the times i64[T], and the normalised values f32[T, C], NaN if missing."""
    with self.lock:
      if self._opened is None:
        config = self.config
        if _is_csv(config.name):
          read = self.read_own(config.name, functools.partial(
              table.read_csv, Path(config.name).expanduser(), config.time, config.channels))
        else:
          read = self._read_set()
        series = read.checked(config.missing)
        rows = config.train + config.validation + config.test
        if rows > len(series.times):
          raise UserError(f"--config.data.test={config.test}: with train and validation these are "
                          f"{rows:,} rows, but {config.name} has {len(series.times):,}; take "
                          "fewer")
        normaliser = self._saved or Normaliser.fit(dataclasses.replace(
            series, times=series.times[:config.train], values=series.values[:config.train]))
        normaliser.check(series)
        self._opened = normaliser, series.times, normaliser(series.values)
      return self._opened

  def check(self, dataset: sources.Dataset) -> None:
    """See `DataSet.check`; the splits are rows of one record, and `opened` checks them."""
    if {"time", "values", "channels"} - set(dataset.features):
      raise UserError(f"--config.data.name: {self.config.name} is no time series, but has "
                      f"{', '.join(dataset.features)}; choose another set, or name a .csv file")

  def _read_set(self) -> table.Series:
    """The series in a TFDS set such as those in `dljax.data.datasets.series`."""
    record, = self.dataset.records(table.SPLIT)[[0]]
    there = [channel.decode() for channel in record["channels"]]
    for channel in self.config.channels:
      if channel not in there:
        raise unknown("--config.data.channels", channel, there)
      if (count := there.count(channel)) > 1:
        raise UserError(f"--config.data.channels: {self.config.name} has {count} channels called "
                        f"{channel!r}; mend the set, or choose others")
    values = np.asarray(record["values"], np.float32)
    times = np.asarray(record["time"], np.int64)
    if values.size != len(times) * len(there):
      raise UserError(f"--config.data.name: {self.config.name} has {values.size:,} values of "
                      f"{len(there)} channels at {len(times):,} times; prepare it again")
    values = values.reshape(-1, len(there))
    values = values[:, [there.index(channel) for channel in self.config.channels]]
    return table.Series(
        self.config.name, tuple(self.config.channels), times, values.astype(np.float64))

  def windows(self, split: str) -> "_Windows":
    """All windows in a split."""
    config, (_, times, values) = self.config, self.opened
    if split == "train":
      begin, end = 0, config.train
    else:
      begin = config.train + (config.validation if split == "test" else 0) - config.window
      end = begin + config.window + config[split]
    return _Windows(times[begin:end], values[begin:end], fill_forward(values[:end])[begin:],
                    config)


class _Windows:
  """All windows in some rows, in order; see `pipeline.Examples`."""

  def __init__(self, times: np.ndarray, values: np.ndarray, filled: np.ndarray, config: Any):
    self._times, self._values, self._filled = times, values, filled
    self._covariates = covariates(times, config.covariates) if config.covariates else None
    self._window, self._horizon = config.window, config.horizon

  def __len__(self) -> int:
    return len(self._times) - self._window - self._horizon + 1

  def gather(self, plan: Plan, rows: np.ndarray) -> HostBatch:
    first = np.maximum(plan.indices[rows], 0)
    at = first[:, None] + np.arange(self._window + self._horizon)
    batch = {"window": self._filled[at[:, :self._window]],
             "horizon": self._values[at[:, self._window:]],
             "host/time": self._times[first + self._window]}
    return batch if self._covariates is None else {**batch, "covariates": self._covariates[at]}

  def close(self) -> None:
    pass


def _finish(examples: _Windows, plan: Plan) -> HostBatch:
  return examples.gather(plan, plan.rows)


def _finish_train(examples: _Windows, plan: Plan) -> HostBatch:
  batch = _finish(examples, plan)
  del batch["host/time"]
  return batch


def encode(
    paths: Sequence[str | np.ndarray], config: Any, normaliser: Normaliser,
) -> tuple[HostBatch, list[str], list[str]]:
  """Reads the last window of each of the user's series, to forecast what comes after its end.

  Args:
    paths: the paths of .csv files or of folders that hold them; or, for a model that reads no
      calendar, arrays [T, C] or [n, T, C] in the data's units, one row a step. An array has no
      times: its last row counts as the start of 1970.
    config: `config.data`.
    normaliser: the normaliser that was fitted in training.

  Returns:
    A batch of window, covariates, mask, id and time i32[b, H, 2], which holds for each row of the
    horizon the day since 1970 and the second of the day; the name of each row; and a line for each
    file that could not be used.

  Raises:
    UserError: a path does not exist.
  """
  validate(config)
  windows, calendars, times, names, skipped = [], [], [], [], []
  mend = "a .csv file or a folder of them"
  for name, source in inputs.each(paths, lambda path: splits.find_files([path], mend, ".csv")):
    try:
      read = _read_series(name, source, config, normaliser)
    except UserError as e:
      skipped.append(str(e))
      continue
    for series in read:
      ahead = series.times[-1] + series.step * np.arange(1, config.horizon + 1)
      windows.append(fill_forward(normaliser(series.values))[-config.window:])
      calendars.append(covariates(
          np.concatenate([series.times[-config.window:], ahead]), config.covariates))
      times.append(np.stack(np.divmod(ahead, DAY), axis=-1).astype(np.int32))
      names.append(series.name)
  # Without rows, nothing is forecast.
  windows, times, calendars = (
      np.stack(arrays) if arrays else np.zeros(0) for arrays in (windows, times, calendars))
  batch = {"window": windows, "time": times, "mask": np.ones(len(names), np.float32),
           "id": np.arange(len(names), dtype=np.int32)}
  return {**batch, "covariates": calendars} if config.covariates else batch, names, skipped


def _read_series(
    name: str, source: Path | np.ndarray, config: Any, normaliser: Normaliser,
) -> list[table.Series]:
  """The series in a file or an array, checked against the model's channels, step and window."""
  if isinstance(source, Path):
    found = [table.read_csv(source, config.time, config.channels)]
  else:
    found = _as_series(name, source, config, normaliser)
  found = [series.checked(config.missing) for series in found]
  for series in found:
    normaliser.check(series)
    if len(series.times) < config.window:
      raise UserError(f"{series.name}: has {len(series.times)} rows, but the model needs a window "
                      f"of {config.window}; give a longer series")
  return found


def _as_series(
    name: str, array: np.ndarray, config: Any, normaliser: Normaliser,
) -> list[table.Series]:
  if config.covariates:
    raise UserError(f"{name}: the model also reads the calendar ({', '.join(config.covariates)}), "
                    "which an array does not have; give a .csv file")
  channels = normaliser.channels
  if array.ndim not in (2, 3) or array.shape[-1] != len(channels) or array.dtype.kind not in "iuf":
    raise UserError(f"{name}: {array.dtype} of shape {array.shape} is no series; give numbers "
                    f"[T, {len(channels)}] or [n, T, {len(channels)}], the channels being "
                    f"{', '.join(channels)}")
  times = normaliser.step * np.arange(1 - array.shape[-2], 1)
  stack = {name: array} if array.ndim == 2 else {f"{name}[{i}]": x for i, x in enumerate(array)}
  return [table.Series(each, channels, times, values.astype(np.float64))
          for each, values in stack.items()]
