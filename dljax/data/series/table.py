"""A series of values at even times, and how it is read from a .csv file.

Dimensions: T rows of the series, C channels.
"""

import csv
import dataclasses
import datetime
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dljax.errors import UserError, unknown

SPLIT = "series"  # the split of a TFDS set that holds one series
MOST_MISSING = 0.9  # share of the rows; if more are missing, a mistaken time is more likely
# A decimal number. Python's `float` also reads "1_0" as 10, and digits of other scripts.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_INFINITE = re.compile(r"[+-]?(inf|infinity|nan)", re.ASCII | re.IGNORECASE)
_FRACTION = re.compile(r"[.,](\d*)", re.ASCII)
NO_VALUE = ("", "na", "nan", "null", "none", "-")  # the cells of a file that are missing values


@dataclasses.dataclass(frozen=True)
class Series:
  """Values at times.

  Attributes:
    name: the series' name, for messages.
    channels: the names of the C channels.
    times: i64[T], in seconds since 1970, ascending.
    values: f64[T, C], not finite where a value is missing.
  """

  name: str
  channels: tuple[str, ...]
  times: np.ndarray
  values: np.ndarray

  @property
  def step(self) -> int:
    """The number of seconds from most rows to the next."""
    steps, count = np.unique(np.diff(self.times), return_counts=True)
    return int(steps[count.argmax()])

  def checked(self, missing: str) -> "Series":
    """The series at even steps, in which rows that were left out are there, without values.

    Args:
      missing: "refuse" or "mask", what to do about missing values.

    Raises:
      UserError: the times do not ascend, or not evenly, or a value is missing and that is refused;
        the message names the row.
    """
    if len(self.times) < 2:
      raise UserError(f"{self.name}: holds {len(self.times)} rows, no series; add more")
    for i in np.flatnonzero(np.diff(self.times) <= 0)[:1]:
      raise UserError(f"{self.name}: row {i + 2} ({when(self.times[i + 1])}) does not come after "
                      f"row {i + 1} ({when(self.times[i])}); sort the rows by time, each time "
                      "once")
    place, off = np.divmod(self.times - self.times[0], self.step)
    for i in np.flatnonzero(off)[:1]:
      raise UserError(f"{self.name}: row {i + 1} ({when(self.times[i])}) is not a whole number of "
                      f"steps of {duration(self.step)} after the first; resample the series to "
                      "even steps")
    count = int(place[-1]) + 1
    if count * (1 - MOST_MISSING) > len(self.times):
      raise UserError(f"{self.name}: from {when(self.times[0])} to {when(self.times[-1])} there "
                      f"should be {count:,} rows, but there are {len(self.times):,}; mend the "
                      "times")
    values = np.full((count, len(self.channels)), np.nan)
    values[place] = np.where(np.isfinite(self.values), self.values, np.nan)
    times = self.times[0] + self.step * np.arange(count)
    if missing == "refuse":
      for i, c in np.argwhere(np.isnan(values))[:1]:
        where = np.flatnonzero(place == i)
        row = f"row {where[0] + 1}" if where.size else "a row that is left out"
        raise UserError(f"{self.name}: {row} ({when(times[i])}) has no value of "
                        f"{self.channels[c]}; mend it, or --config.data.missing=mask")
    return dataclasses.replace(self, times=times, values=values)


def when(seconds: int) -> str:
  """A time as a text like "2016-07-01 13:00:00"."""
  return str(np.datetime64(int(seconds), "s")).replace("T", " ")


def duration(seconds: int) -> str:
  """A duration as a text like "1:00:00" or "7 days, 0:00:00"."""
  return str(datetime.timedelta(seconds=int(seconds)))


def read_csv(path: Path, time: str, channels: Sequence[str]) -> Series:
  """Reads a .csv file: values separated by commas, with the columns' names in the first line.

  Args:
    path: the file's path.
    time: the name of the column of times, in ISO 8601 ("2016-07-01 13:00", also with slashes).
    channels: the names of the columns to read; a cell that is one of `NO_VALUE` is a missing
      value.

  Raises:
    UserError: the file cannot be read, or holds something else, such as two columns of one name
      or times with different fractions of a second; the message names the file, the
      row (counted from 1 after the names) and the column.
  """
  try:
    with open(path, newline="", encoding="utf-8-sig") as file:
      names, *rows = [row for row in csv.reader(file) if row] or [[]]
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror}); name a .csv file") from e
  except (UnicodeDecodeError, csv.Error) as e:
    raise UserError(f"{path}: is no text of values separated by commas; name a .csv file") from e
  names = [name.strip() for name in names]
  if not rows:
    raise UserError(f"{path}: holds no rows of values; name another file")
  if time not in names:
    raise UserError(f"{path}: has no column {time!r} of times, but {', '.join(names)}; name it by "
                    "--config.data.time")
  for channel in channels:
    if channel not in names:
      raise unknown(f"{path}", channel, names)
  for name in (time, *channels):
    if (count := names.count(name)) > 1:
      raise UserError(f"{path}: {count} columns are called {name!r}; give each a name of its own")
  columns = [names.index(channel) for channel in channels]
  at = names.index(time)
  times, values = np.zeros(len(rows), np.int64), np.zeros((len(rows), len(channels)))
  first = None
  for i, row in enumerate(rows):
    if len(row) != len(names):
      raise UserError(f"{path}: row {i + 1} has {len(row)} values, but there are {len(names)} "
                      "columns; mend it")
    try:
      times[i], *kind = _seconds(row[at])
    except ValueError:
      raise UserError(f"{path}: row {i + 1}: {row[at]!r} is no time such as 2016-07-01 13:00; "
                      "mend it") from None
    first = first or kind
    kinds = "another fraction of a second than", "another kind of offset from UTC than"
    for mine, other, what in zip(kind, first, kinds):
      if mine != other:
        raise UserError(f"{path}: row {i + 1}: {row[at]!r} has {what} row 1, {rows[0][at]!r}; "
                        "give all times alike, in whole seconds")
    for c, column in enumerate(columns):
      cell = row[column].strip()
      try:
        values[i, c] = _value(cell)
      except ValueError:
        raise UserError(f"{path}: row {i + 1}: {cell!r} in the column {names[column]} is no "
                        "number; mend it") from None
  return Series(str(path), tuple(channels), times, values)


def _value(cell: str) -> float:
  """The number in a cell, or NaN; raises `ValueError` for anything else."""
  if cell.lower() in NO_VALUE or _INFINITE.fullmatch(cell):
    return math.nan
  value = float(cell) if _NUMBER.fullmatch(cell) else math.nan
  if not math.isfinite(value):  # such as 1e999
    raise ValueError(cell)
  return value


def _seconds(text: str) -> tuple[int, str, bool]:
  """A time as seconds since 1970, rounded down; by the text's own clock, or in UTC if it has an
  offset.

  Returns:
    The seconds; the digits of the fraction of a second, without zeros at the end; and whether the
    text has an offset.

  Raises:
    ValueError: it is no time.
  """
  text = text.strip().replace("/", "-")
  if text.isdigit() and len(text) > 8:  # else "1577120112345" would be a time in the year 1577
    raise ValueError(text)
  time, fraction = datetime.datetime.fromisoformat(text), _FRACTION.search(text)
  digits, zoned = fraction[1].rstrip("0") if fraction else "", time.tzinfo is not None
  if not zoned:
    time = time.replace(tzinfo=datetime.timezone.utc)
  begin = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
  return (time - begin) // datetime.timedelta(seconds=1), digits, zoned
