"""A series of values at even times, and how it is read from a .csv file.

Dimensions: T rows of the series, C channels.
"""

import array
import csv
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from typing import IO

import numpy as np

from dljax.data.series import times as calendar
from dljax.data.series.times import DAY, Reader, Spelling, Step, when
from dljax.errors import UserError, unknown

SPLIT = "series"  # the split of a TFDS set that holds one series
MOST_MISSING = 0.9  # share of the rows; if more are missing, a mistaken time is more likely
MAX_VALUES = 2**28  # in a file; they take 2 GiB
MAX_COLUMNS = 2**16
MAX_LINE = 2**24  # characters
HOUR = DAY // 24
NO_VALUE = ("", "na", "nan", "null", "none", "-")  # the cells of a file that are missing values
DECIMALS = (".", ",")
File = str | os.PathLike[str]
_TAB = ("tab", r"\t", "\t")
# A number with marks between thousands, such as 1,234,567 or 1.234,5 or 1'234.
_THOUSANDS = re.compile(r"[+-]?\d{1,3}([,.' \u00a0\u202f])\d{3}(\1\d{3})*([.,]\d*)?", re.ASCII)
_INFINITE = re.compile(r"[+-]?(inf|infinity|nan)", re.ASCII | re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Series:
  """Values at times.

  Attributes:
    name: the series' name, for messages.
    channels: the names of the C channels.
    times: i64[T], ascending; see `times.py`.
    values: f64[T, C], not finite where a value is missing.
    spelling: how the times are written.
  """

  name: str
  channels: tuple[str, ...]
  times: np.ndarray
  values: np.ndarray
  spelling: Spelling = Spelling()

  @property
  def step(self) -> Step:
    """What lies between most rows and the next."""
    return calendar.steps(self.times, self.spelling.calendar)[0]

  def checked(self, missing: str, wanted: Step | None = None) -> "Series":
    """The series at even steps, in which rows that were left out are there, without values.

    Args:
      missing: "refuse" or "mask", what to do about missing values.
      wanted: the step to take if the rows may lie at several, as a few days may be business days.

    Raises:
      UserError: the times do not ascend, or not evenly, or a value is missing and that is refused;
        the message names the row.
    """
    if len(self.times) < 2:
      raise UserError(f"{self.name}: holds {len(self.times)} rows, no series; add more")
    for i in np.flatnonzero(np.diff(self.times) <= 0)[:1]:
      raise UserError(f"{self.name}: row {i + 2} ({self._when(i + 1)}) does not come after "
                      f"row {i + 1} ({self._when(i)}); sort the rows by time, each time once"
                      + self._end_of_summer(i))
    found = calendar.steps(self.times, self.spelling.calendar)
    step = wanted if wanted in found else found[0]
    place = step.places(self.times)
    if place is None:
      off = int(np.flatnonzero((self.times - self.times[0]) % step.count)[0])
      raise UserError(f"{self.name}: row {off + 1} ({self._when(off)}) is not a whole number of "
                      f"steps of {step} after the first; resample the series to even steps"
                      + ", or give times without an offset from UTC, which changes here"
                      * self.spelling.turns)
    count = int(place[-1]) + 1
    if count * (1 - MOST_MISSING) > len(self.times):
      raise UserError(f"{self.name}: from {self._when(0)} to {self._when(-1)} there should be "
                      f"{count:,} rows at steps of {step}, but there are {len(self.times):,}; mend "
                      "the times")
    values = np.full((count, len(self.channels)), np.nan)
    values[place] = np.where(np.isfinite(self.values), self.values, np.nan)
    times = step.at(self.times, np.arange(count))
    if missing == "refuse":
      for i, c in np.argwhere(np.isnan(values))[:1]:
        where = np.flatnonzero(place == i)
        row = f"row {where[0] + 1}" if where.size else "a row that is left out"
        raise UserError(
            f"{self.name}: {row} ({when(times[i], self.spelling.calendar)}) has no value of "
            f"{self.channels[c]}{self._start_of_summer(times, place, i, step)}; mend it, or "
            "--config.data.missing=mask")
    return dataclasses.replace(self, times=times, values=values)

  def ahead(self, step: Step, count: int) -> np.ndarray:
    """i64[count], the times after the last row of a series that `checked` gave."""
    return step.at(self.times, len(self.times) + np.arange(count))

  def _when(self, row: int) -> str:
    return when(self.times[row], self.spelling.calendar)

  def _end_of_summer(self, i: int) -> str:
    """What may have happened if row i + 1 goes back by up to an hour."""
    back, spelling = self.times[i] - self.times[i + 1], self.spelling
    local = spelling.form == "date" and spelling.offset is None and "hour" in spelling.parts
    return ("; if the clocks went back there, as at the end of summer time, give the times in UTC "
            "or with their offset from it" if local and back < HOUR else "")

  def _start_of_summer(self, times: np.ndarray, place: np.ndarray, i: int, step: Step) -> str:
    """What may have happened if the rows of one hour in a Sunday's night are left out from i on."""
    rows = HOUR // step.count if step.unit == "microsecond" and HOUR % step.count == 0 else 0
    gone = rows and not np.isin(np.arange(i, i + rows), place).any() and (i + rows) in place
    sunday, hour = (times[i] + calendar.MONDAY) // DAY % 7 == 6, times[i] % DAY // HOUR
    return (", perhaps because the clocks went forward, as at the start of summer time"
            if gone and sunday and hour <= 3 and self.spelling.offset is None else "")


@dataclasses.dataclass(frozen=True)
class Dialect:
  """How a .csv file writes its cells.

  Attributes:
    delimiter: the character between cells, or "tab".
    decimal: the mark before a number's decimals, one of `DECIMALS`.
    time_format: the form of the times; see `times.Reader`.
  """

  delimiter: str = ","
  decimal: str = "."
  time_format: str = ""

  def check(self) -> None:
    """Raises `UserError` for a value out of range."""
    flag = "--config.data."
    if self.delimiter not in _TAB and (
        len(self.delimiter) != 1 or self.delimiter.isalnum() or self.delimiter in '"\r\n.-+#'):
      raise UserError(f"{flag}delimiter={self.delimiter!r}: give one character such as , or ;, or "
                      "tab")
    if self.decimal not in DECIMALS:
      raise UserError(f"{flag}decimal={self.decimal!r}: give . or ,")
    if not calendar.is_form(self.time_format):
      raise UserError(f"{flag}time_format={self.time_format!r}: give one of "
                      f"{', '.join(calendar.NUMBERS)}, or a pattern such as %d/%m/%Y")

  @property
  def mark(self) -> str:
    """The character between cells."""
    return "\t" if self.delimiter in _TAB else self.delimiter


class _Lines:
  """The lines of a file for `csv.reader`, without comments.

  A comment is a line that begins with # where a row may begin, so not within a quoted cell.
  """

  def __init__(self, file: IO[str]):
    self._file, self.starts = file, True

  def __iter__(self) -> Iterator[str]:
    return self

  def __next__(self) -> str:
    line = self._read()
    while self.starts and line.startswith("#"):
      line = self._read()
    self.starts = False
    return line

  def _read(self) -> str:
    line = self._file.readline(MAX_LINE + 1)
    if not line:
      raise StopIteration
    if len(line) > MAX_LINE:
      raise csv.Error(f"a line has more than {MAX_LINE:,} characters")
    return line


def _rows(path: File, dialect: Dialect) -> Iterator[list[str]]:
  """The rows of a file that hold any cell, its names first; errors name the file."""
  # A device may never end; a folder is refused below.
  if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
    raise UserError(f"{path}: cannot be read (no regular file); name a .csv file")
  try:
    with open(path, newline="", encoding="utf-8-sig") as file:
      lines = _Lines(file)
      empty = []
      for row in csv.reader(lines, delimiter=dialect.mark):
        lines.starts = True
        if any(cell.strip() for cell in row):
          yield from empty  # rows of empty cells at the end of the file are none
          empty = []
          yield row
        elif row:
          empty = [*empty, row][:1]  # the first shows where the rows go wrong
  except OSError as e:
    raise UserError(f"{path}: cannot be read ({e.strerror}); name a .csv file") from e
  except UnicodeDecodeError as e:
    raise UserError(f"{path}: is no text of values separated by commas in UTF-8; name a .csv file, "
                    "or convert it, e.g. by iconv -t utf-8") from e
  except csv.Error as e:
    raise UserError(f"{path}: is no text of values separated by {dialect.delimiter!r} ({e}); name "
                    "a .csv file") from e


class _Cells:
  """Reads the cells of a column of values."""

  def __init__(self, dialect: Dialect):
    mark = re.escape(dialect.decimal)
    # Python's `float` also reads "1_0" as 10, and digits of other scripts.
    self._number = re.compile(
        rf"[+-]?(\d+{mark}?\d*|{mark}\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
    self._decimal = dialect.decimal

  def __call__(self, cell: str) -> float:
    """The number in a cell, or NaN for a missing value.

    Raises:
      ValueError: it holds anything else; the text says what to do.
    """
    cell = cell.strip()
    if cell.lower() in NO_VALUE or _INFINITE.fullmatch(cell):
      return math.nan
    if self._number.fullmatch(cell):
      value = float(cell.replace(self._decimal, "."))
      if math.isfinite(value):  # not such as 1e999
        return value
    other = DECIMALS[self._decimal == "."]
    if _THOUSANDS.fullmatch(cell):
      raise ValueError(f"is no number: take out the marks between thousands, or say by "
                       f"--config.data.decimal='{other}' that they come before decimals")
    if re.fullmatch(rf"[+-]?\d+\{other}\d+", cell, re.ASCII):
      raise ValueError(f"is no number: --config.data.decimal='{other}' reads it")
    raise ValueError("is no number; mend it")


def read_csv(
    path: File, time: str, channels: Sequence[str], dialect: Dialect = Dialect(),
) -> Series:
  """Reads a .csv file, with the columns' names in the first line.

  Lines that are empty or begin with # are left out.

  Args:
    path: the file's path.
    time: the name of the column of times; see `times.Reader`.
    channels: the names of the columns to read; a cell that is one of `NO_VALUE` is a missing
      value.
    dialect: how the cells are written.

  Raises:
    UserError: the file cannot be read, or holds something else, such as two columns of one name;
      the message names the file, the row (counted from 1 after the names) and the column.
  """
  rows = _rows(path, dialect)
  names = _names(path, next(rows, []), dialect)
  _check_time(path, time, names)
  for channel in channels:
    if channel not in names:
      raise unknown(f"{path}", channel, names)
  for name in (time, *channels):
    if (count := names.count(name)) > 1:
      raise UserError(f"{path}: {count} columns are called {name!r}; give each a name of its own")
  columns, at = [names.index(channel) for channel in channels], names.index(time)
  read_time, read_value = Reader(dialect.time_format), _Cells(dialect)
  times, values = array.array("q"), array.array("d")
  for i, row in enumerate(rows):
    _check_row(path, i, row, names, values)
    times.append(_time(path, i, row[at], read_time))
    for column in columns:
      try:
        values.append(read_value(row[column]))
      except ValueError as e:
        raise UserError(f"{path}: row {i + 1}: {row[column].strip()!r} in the column "
                        f"{names[column]} {e}") from None
  if not times:
    raise UserError(f"{path}: holds no rows of values; name another file")
  return Series(str(path), tuple(channels), np.array(times, np.int64),
                np.array(values).reshape(len(times), len(channels)), read_time.spelling())


def _names(path: File, row: Sequence[str], dialect: Dialect) -> list[str]:
  """The columns' names; refuses a line that cannot hold them."""
  names = [name.strip() for name in row]
  if not names:
    raise UserError(f"{path}: holds no rows of values; name another file")
  if len(names) > MAX_COLUMNS:
    raise UserError(f"{path}: has {len(names):,} columns; give at most {MAX_COLUMNS:,}")
  if len(names) == 1:
    marks = {"tab" if mark == "\t" else mark: names[0].count(mark) for mark in ";\t,|"
             if mark != dialect.mark and mark in row[0]}
    if marks:
      raise UserError(f"{path}: has one column, {names[0][:60]!r}, if the values are separated by "
                      f"{dialect.delimiter!r}; --config.data.delimiter="
                      f"'{max(marks, key=marks.get)}' may be the right mark")
  return names


def _check_time(path: File, time: str, names: Sequence[str]) -> None:
  if time not in names:
    raise UserError(f"{path}: has no column {time!r} of times, but {', '.join(names)}; name it by "
                    "--config.data.time")


def _check_row(
    path: File, i: int, row: Sequence[str], names: Sequence[str], values: Collection[float],
) -> None:
  if len(row) != len(names):
    raise UserError(f"{path}: row {i + 1} has {len(row)} values, but there are {len(names)} "
                    "columns; mend it")
  if len(values) > MAX_VALUES:
    raise UserError(f"{path}: holds more than {MAX_VALUES:,} values; name fewer channels by "
                    "--config.data.channels, or cut it")


def _time(path: File, i: int, cell: str, read: Reader) -> int:
  try:
    return read(cell)
  except ValueError as e:
    raise UserError(f"{path}: row {i + 1}: {cell.strip()!r} {e}; mend it, or name the form of the "
                    "times by --config.data.time_format") from None


def find_columns(
    path: File, dialect: Dialect, time: str = "", usual: str = "", channels: bool = True,
) -> tuple[str, tuple[str, ...], dict[str, str]]:
  """Which column of a .csv file holds the times, and which hold numbers.

  Args:
    path: the file's path.
    dialect: how the cells are written.
    time: the name of the column of times, if it is known.
    usual: its name if there is a column of that name, and it is not known otherwise; else it is
      the only column that begins with a date.
    channels: whether to look for columns of numbers, too.

  Returns:
    The name of the column of times; the names of all others that hold numbers; and for each
    column that holds none its name and what stands in it.

  Raises:
    UserError: see `read_csv`; no column holds times or numbers; or a column holds numbers in most
      rows, but not in all.
  """
  rows = _rows(path, dialect)
  names = _names(path, next(rows, []), dialect)
  first = next(rows, None)
  if first is None:
    raise UserError(f"{path}: holds no rows of values; name another file")
  _check_row(path, 0, first, names, ())
  if not time:
    dates = [name for name, cell in zip(names, first)
             if calendar.looks_like_date(cell, dialect.time_format)]
    if usual not in names and len(set(dates)) != 1:
      which = f"{len(dates)} columns hold dates" if dates else "no column holds dates"
      raise UserError(f"{path}: {which} among {', '.join(names)}; name the column of times by "
                      "--config.data.time")
    time = usual if usual in names else dates[0]
    if calendar.looks_like_date(time):
      raise UserError(f"{path}: the first line holds {', '.join(names)[:60]!r}, no names; put the "
                      "names of the columns there")
  _check_time(path, time, names)
  if not channels:
    return time, (), {}
  read = _Cells(dialect)
  numbers, wrong, examples = [0] * len(names), [0] * len(names), {}
  for i, row in enumerate(itertools.chain([first], rows)):
    _check_row(path, i, row, names, ())
    for c, cell in enumerate(row):
      try:
        numbers[c] += not math.isnan(read(cell))
      except ValueError as e:
        wrong[c] += 1
        examples.setdefault(c, f"row {i + 1}: {cell.strip()[:40]!r} in the column {names[c]} {e}")
  found, others = [], {}
  for c, name in enumerate(names):
    if name == time:
      continue
    if wrong[c] and numbers[c] > wrong[c]:
      raise UserError(f"{path}: {examples[c]}, or name the columns to read by "
                      "--config.data.channels")
    if not numbers[c] or wrong[c]:
      others[name or f"column {c + 1}"] = "no numbers"
    elif not name:
      others[f"column {c + 1}"] = "no name"
    else:
      found.append(name)
  if not found:
    # A cell shows why: a decimal comma, a unit, a mark between thousands.
    shown = next((f": {text}" for c, text in sorted(examples.items()) if names[c] != time), "")
    raise UserError(f"{path}: no column besides {time} holds numbers"
                    f"{shown or '; name another file'}")
  return time, tuple(found), others

