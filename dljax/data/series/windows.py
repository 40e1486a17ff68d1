"""Time series: a window of the past, the horizon to forecast, and the calendar of both; config and
pipelines.

A batch holds

  window        f32[b, W, C], normalised; a missing value is replaced by the last one before it
  horizon       f32[b, H, C], the rows after the window, normalised; NaN where a value is missing
  covariates    f32[b, W + H, K], the calendar of window and horizon, which is known in advance;
                only if `config.data.covariates` names any
  mask, id      see `data/pipeline.py`
  "host/time"   i64[b], in evaluation: the time of the horizon's first row; see `times.py`

No part of a window depends on later rows, nor does its normalisation: mean and standard deviation
are those of the training rows. In training, window and horizon lie in the training rows. In an
evaluation, the horizon lies in the split's rows, and the window may reach into the rows before.
Every window counts once, in order, as in the literature (Zhou et al. 2021, arXiv:2012.07436; Zeng
et al. 2023, arXiv:2205.13504).

Dimensions: b the host's rows, T rows of the series, W window, H horizon, C channels, K covariates.
"""

import dataclasses
import fractions
import functools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from dljax.config import Field, Group, one_of
from dljax.data import inputs, own, sources, splits
from dljax.data.series import table
from dljax.data.series.times import DAY, MONDAY, SECOND, Reader, Spelling, Step, steps, when
from dljax.data.pipeline import HostBatch, IndexedPipeline, Pipeline, Plan
from dljax.errors import MALFORMED, UserError, one_line, unknown

ASSET = "normaliser"
MISSING = ("refuse", "mask")
ROUNDING = 64 * np.finfo(np.float64).eps  # share of a number that adding many may change
HUGE = 1e150  # the square of a larger number is nearly infinite
SPLITS = ("train", "validation", "test")
SHARES = {"train": 70, "validation": 15, "test": 15}  # per cent of a user's file, unless given
FILES = (".csv", ".tsv", ".txt")  # how the names of files end
_ROWS = re.compile(r"\d{1,18}", re.ASCII)
_SHARE = re.compile(r"(0?\.\d{1,18}|1\.0{1,18}|\d{1,3}(\.\d{1,18})?%)", re.ASCII)


def default_config() -> Group:
  """The fields of `config.data`."""
  return Group({
      "name": Field("temperatures", "The name of a TFDS set, or the path of a .csv file."),
      "delimiter": Field(",", 'What separates the cells of a .csv file; also "tab".'),
      "decimal": Field(".", one_of("The mark before a number's decimals there", table.DECIMALS)),
      "time": Field("date", "The column of a .csv file that holds the time."),
      "time_format": Field("", "The form of the times there: integer, seconds, milliseconds, "
                           "microseconds or nanoseconds since 1970, or a pattern such as "
                           '%d/%m/%Y; "" goes by the first.'),
      "channels": Field(("seattle", "san_francisco"), "The channels to read and to forecast."),
      "train": Field("5880", "The rows to train on: a number of rows, a share of all (0.7 or 70%), "
                     "or the time of the first, from which they go to the next split; rows that "
                     "are missing count."),
      "validation": Field("1440", 'The validation rows, after the training rows; "" is none.'),
      "test": Field("1440", 'The test rows, after those of the validation; "" is none.'),
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
  for split in SPLITS:
    need(split, _kind(config[split]) is not None,
         "give a number of rows, a share such as 0.7 or 70%, or the time of the first row")
  if all(_kind(config[split]) in ("rows", "") for split in SPLITS):  # known without the data
    _check_rows(config, {split: int(config[split] or 0) for split in SPLITS})
  _dialect(config).check()
  if not is_file(config.name):
    sources.parse_name(config.name)


def is_file(name: str) -> bool:
  """Whether `config.data.name` is the path of a file of the user's own, not a TFDS name."""
  return name.lower().endswith(FILES)


def _dialect(config: Any) -> table.Dialect:
  return table.Dialect(config.delimiter, config.decimal, config.time_format)


def _path(config: Any) -> Path:
  return Path(os.path.expanduser(config.name))


def _kind(text: str) -> str | None:
  """What the extent of a split is: "rows", "share", "time", "" for no split; None if neither."""
  if not text.strip():
    return ""
  if _ROWS.fullmatch(text):
    return "rows"
  if _SHARE.fullmatch(text):
    return "share"
  read = Reader()
  try:
    read(text)
  except ValueError:
    return None
  return "time" if read.spelling().calendar else None


def _check_rows(config: Any, rows: Mapping[str, int], name: str = "") -> None:
  """Raises `UserError` if a split is too short for a window and a horizon."""
  need = functools.partial(splits.need, config)
  if _kind(config.train):
    need("window", config.window + config.horizon <= rows["train"],
         f"with the horizon of {config.horizon} it is longer than the {rows['train']:,} rows of "
         "--config.data.train; make it smaller")
  for split in ("validation", "test"):
    of = f"these are {rows[split]:,} of the rows of {name}; " if name else ""
    need(split, not _kind(config[split]) or rows[split] >= config.horizon,
         f"{of}give {config.horizon} rows or more, the length of a horizon")


def extents(config: Any, series: table.Series) -> dict[str, tuple[int, int]]:
  """The first row of each split in `series`, and the row after its last.

  Args:
    config: `config.data`.
    series: a series that `Series.checked` gave, T rows.

  Raises:
    UserError: a split is too short, or reaches beyond the rows; or only some are given by times.
  """
  need = functools.partial(splits.need, config)
  kinds = {split: _kind(config[split]) for split in SPLITS}
  given = [split for split in SPLITS if kinds[split]]
  count, found = len(series.times), dict.fromkeys(SPLITS, (0, 0))
  if any(kinds[split] == "time" for split in given):
    bounds = [_row(config, split, series) for split in given]
    for split, begin, end in zip(given, bounds, [*bounds[1:], count]):
      need(split, begin < end, "there is no row between it and the split that follows")
      found[split] = begin, end
  else:
    sizes = [_size(config[split], count) for split in given]
    ends = [int(sum(sizes[:i + 1])) for i in range(len(given))]
    for split, begin, end in zip(given, [0, *ends], ends):
      before = "with those before it, " if begin else ""
      need(split, end <= count, f"{before}these are {end:,} rows, but {series.name} has {count:,}; "
           "take fewer")
      found[split] = begin, end
  _check_rows(config, {split: end - begin for split, (begin, end) in found.items()}, series.name)
  return found


def _size(text: str, count: int) -> fractions.Fraction:
  """The number of rows in a split that is given by rows or by its share of `count` rows."""
  if _ROWS.fullmatch(text):
    return fractions.Fraction(int(text))
  return fractions.Fraction(text.removesuffix("%")) / (100 if "%" in text else 1) * count


def _row(config: Any, split: str, series: table.Series) -> int:
  """The first row of a split that begins at a time."""
  spelling, read = series.spelling, Reader()
  need = functools.partial(splits.need, config)
  need(split, _kind(config[split]) == "time",
       "give the times of the first rows of all splits, such as 2024-01-01, or of none")
  need(split, spelling.calendar, f"{series.name} has plain numbers for times; give a number of "
       "rows or a share")
  time = read(config[split])
  asked = read.spelling()
  if asked.offset is None and spelling.offset is not None:
    time -= spelling.offset  # by the file's own clock, at its end
  need(split, asked.offset is None or spelling.offset is not None,
       f"has an offset from UTC, and the times of {series.name} have none; drop it")
  row = int(np.searchsorted(series.times, time))
  need(split, row < len(series.times), f"lies after the last row of {series.name}, "
       f"{when(series.times[-1])}; give an earlier time")
  return row


def find(config: Any, given: Collection[str]) -> tuple[dict[str, Any], list[str]]:
  """What a file of the user's own decides; see `configs.Resolve`.

  Args:
    config: `config.data`.
    given: the names of its fields that the user has set.

  Returns:
    Field of `config.data` -> value, for fields that are not given; and lines that say what the
    file holds.

  Raises:
    UserError: the file is missing or cannot be used.
  """
  if not is_file(config.name):
    return {}, []
  path = _path(config)
  if not path.exists():
    if "channels" in given:  # a dry run needs no more
      return {}, []
    raise UserError(f"--config.data.name={config.name}: there is no such file; name a .csv file, "
                    "or, for a dry run without it, give --config.data.channels")
  found, lines = {}, []
  dialect = _dialect(config)
  dialect.check()
  if not {"time", "channels"} <= set(given):
    named = config.time if "time" in given else ""
    time, channels, others = table.find_columns(
        path, dialect, named, config.time, "channels" not in given)
    found = {"time": time, "channels": channels}
    if others and "channels" not in given:
      lines.append("left out " + ", ".join(
          f"{name} ({why})" for name, why in others.items()))
  found = {field: value for field, value in {**found, "missing": MISSING[0]}.items()
           if field not in given}
  config = ml_collections.ConfigDict(config.to_dict())
  config.update(found)
  series = table.read_csv(path, config.time, config.channels, dialect).checked(config.missing)
  _check_calendar(config, series, "covariates" in given)
  step = series.step
  if "covariates" not in given:
    found["covariates"] = tuple(
        name for name in config.covariates if _varies(name, step, series.spelling))
  found |= _missing_splits(config, given, series)
  config.update(found)
  parts = [f"{split} {end - begin:,} from {series.spelling(series.times[begin])}"
           for split, (begin, end) in extents(config, series).items() if end]
  first, last = (series.spelling(series.times[i]) for i in (0, -1))
  lines.append(f"{own.show(config.name)}: {len(series.times):,} rows from {first} to {last}, at steps of "
               f"{step}; {', '.join(parts)}")
  return found, lines


def _check_calendar(config: Any, series: table.Series, given: bool = True) -> None:
  """Raises `UserError` if a series is to have a calendar, but has plain numbers for times."""
  if given and config.covariates and not series.spelling.calendar:
    raise UserError(f"--config.data.covariates={','.join(config.covariates)}: {series.name} has "
                    "plain numbers for times, which no calendar tells; write "
                    "--config.data.covariates=, or name their form by --config.data.time_format")


def _varies(name: str, step: Step, spelling: Spelling) -> bool:
  """Whether a covariate says anything about rows at such a step."""
  if not spelling.calendar:
    return False
  if step.unit == "month":
    return name == "day_of_year" and step.count % 12 > 0
  cycle = {"hour_of_day": DAY, "day_of_week": 7 * DAY}.get(name)
  length = DAY if step.unit == "business day" else step.count
  return cycle is None or length % cycle > 0


def _missing_splits(
    config: Any, given: Collection[str], series: table.Series,
) -> dict[str, str]:
  """The splits that the user has not given, of the rows that the others leave."""
  asked = [split for split in SPLITS if split in given]
  others = [split for split in SPLITS if split not in given]
  if not asked:
    return {split: f"{share}%" for split, share in SHARES.items()}
  if any(_kind(config[split]) == "time" for split in asked):
    if "test" in asked and "validation" in others:
      raise UserError(f"--config.data.test={config.test!r}: give the time at which validation "
                      "begins, too, as --config.data.validation")
    begin = when(series.times[0] + (series.spelling.offset or 0))
    return {split: begin if split == "train" else "" for split in others}
  left = len(series.times) - int(sum(_size(config[split], len(series.times))
                                     for split in asked if config[split].strip()))
  whole = sum(SHARES[split] for split in others)
  return {split: str(max(left, 0) * SHARES[split] // whole) for split in others}


@dataclasses.dataclass(frozen=True)
class Normaliser:
  """What is fitted to the training rows.

  Attributes:
    channels: the names of the C channels.
    mean: f64[C], the mean of each channel.
    std: f64[C], the standard deviation of each channel; 1 for a channel that never changes, and 1
      or more if it changes by no more than the rounding of its numbers.
    step: what lies between a row and the next.
  """

  channels: tuple[str, ...]
  mean: np.ndarray
  std: np.ndarray
  step: Step

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
    if self.step not in steps(series.times, series.spelling.calendar):
      raise UserError(f"{series.name}: has steps of {series.step}, but the model was trained on "
                      f"steps of {self.step}; resample it")

  def asset(self) -> dict[str, Any]:
    """The value that is saved in `workdir/data/`."""
    return {"channels": list(self.channels), "mean": self.mean.tolist(), "std": self.std.tolist(),
            "step": str(self.step)}

  @classmethod
  def from_assets(cls, assets: Mapping[str, Any]) -> "Normaliser":
    """The inverse of `asset`, given all assets of a run; `UserError` if it is not among them."""
    if ASSET not in assets:
      raise UserError(f"--workdir: data/{ASSET}.json is missing there; restore it from a copy, or "
                      "train again")
    try:
      saved = assets[ASSET]
      return cls(tuple(saved["channels"]), np.array(saved["mean"], np.float64),
                 np.array(saved["std"], np.float64), Step.parse(saved["step"]))
    except MALFORMED as e:
      raise UserError(f"--workdir: data/{ASSET}.json is damaged ({one_line(e)}); restore it from a "
                      "copy, or train again") from e


def fill_forward(values: np.ndarray) -> np.ndarray:
  """f[T, C] with each NaN replaced by the last value before it, or else by 0, the mean."""
  rows = np.arange(len(values))[:, None]
  last = np.maximum.accumulate(np.where(np.isnan(values), 0, rows), axis=0)
  filled = np.take_along_axis(values, last, axis=0)
  return np.where(np.isnan(filled), 0, filled).astype(values.dtype)


def _of_year(times: np.ndarray) -> np.ndarray:
  """f64[T]: the share of the year that has passed at each time."""
  year = times.astype("datetime64[us]").astype("datetime64[Y]")
  begin, end = (y.astype("datetime64[us]").astype(np.int64)
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
    self._extents: Mapping[str, tuple[int, int]] = {}

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
    if is_file(name := self.config.name):
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
        if is_file(config.name):
          read = self.read_own(config.name, functools.partial(
              table.read_csv, _path(config), config.time, config.channels, _dialect(config)))
        else:
          read = self._read_set()
        series = read.checked(config.missing, self._saved and self._saved.step)
        _check_calendar(config, series)
        self._extents = extents(config, series)
        begin, end = self._extents["train"]
        normaliser = self._saved or Normaliser.fit(dataclasses.replace(
            series, times=series.times[begin:end], values=series.values[begin:end]))
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
    return table.Series(self.config.name, tuple(self.config.channels), SECOND * times,
                        values.astype(np.float64))

  def windows(self, split: str) -> "_Windows":
    """All windows in a split."""
    config, (_, times, values) = self.config, self.opened
    begin, end = self._extents[split]
    splits.need(config, split, begin < end, "give it some rows")
    if split != "train":
      begin = max(begin - config.window, 0)
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
    A batch of window, covariates, mask, id and "host/time", an array of texts [b, H] with the time
    of each row of the horizon, as the file would write it; the name of each row; and a line for
    each file that could not be used.

  Raises:
    UserError: a path does not exist.
  """
  validate(config)
  windows, calendars, times, names, skipped = [], [], [], [], []
  mend = "a .csv file or a folder of them"
  files = functools.partial(_files, mend=mend)
  for name, source in inputs.each(paths, files):
    try:
      read = _read_series(name, source, config, normaliser)
    except UserError as e:
      skipped.append(str(e))
      continue
    for series in read:
      ahead = series.ahead(normaliser.step, config.horizon)
      windows.append(fill_forward(normaliser(series.values))[-config.window:])
      calendars.append(covariates(
          np.concatenate([series.times[-config.window:], ahead]), config.covariates))
      times.append([series.spelling(time) for time in ahead])
      names.append(series.name)
  # Without rows, nothing is forecast.
  windows, times, calendars = (
      np.stack(arrays) if arrays else np.zeros(0) for arrays in (windows, times, calendars))
  batch = {"window": windows, "host/time": times, "mask": np.ones(len(names), np.float32),
           "id": np.arange(len(names), dtype=np.int32)}
  return {**batch, "covariates": calendars} if config.covariates else batch, names, skipped


def _files(path: Path, mend: str) -> list[Path]:
  """A file, or those in a folder whose names end like a table's."""
  return [file for file in splits.find_files([path], mend)
          if file == path or file.name.lower().endswith(FILES[:2])]


def _read_series(
    name: str, source: Path | np.ndarray, config: Any, normaliser: Normaliser,
) -> list[table.Series]:
  """The series in a file or an array, checked against the model's channels, step and window."""
  if isinstance(source, Path):
    found = [table.read_csv(source, config.time, config.channels, _dialect(config))]
  else:
    found = _as_series(name, source, config, normaliser)
  found = [series.checked(config.missing, normaliser.step) for series in found]
  for series in found:
    normaliser.check(series)
    _check_calendar(config, series)
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
  step = normaliser.step
  times = step.at(np.zeros(1, np.int64), np.arange(1 - array.shape[-2], 1))
  spelling = Spelling() if step.unit else Spelling("integer")
  stack = {name: array} if array.ndim == 2 else {f"{name}[{i}]": x for i, x in enumerate(array)}
  return [table.Series(each, channels, times, values.astype(np.float64), spelling)
          for each, values in stack.items()]
