"""The times of a series: how they are written, and what lies between a row and the next.

A time is a whole number: microseconds since 1970, or, in a file that numbers its rows, that number.
Times without an offset from UTC are counted by their own clock, so a day has 24 hours in them even
where summer time begins or ends. Those with an offset are converted to UTC.

A step is a number of microseconds, of months, of business days (Monday to Friday) or of whole
numbers. Months and business days differ in length, but are equal steps of the calendar.

Dimensions: T rows of the series, n times.
"""

import collections
import contextlib
import dataclasses
import datetime
import re

import numpy as np

SECOND = 10**6  # microseconds
DAY = 86400 * SECOND
MONDAY = 3 * DAY  # from a Monday to the start of 1970, which was a Thursday
# Units of fixed length, in microseconds, from the longest.
_UNITS = {"day": DAY, "hour": 3600 * SECOND, "minute": 60 * SECOND, "second": SECOND,
          "millisecond": 1000, "microsecond": 1}
_STEP = re.compile(r"(\d{1,18})(?: (\w+(?: day)?))?", re.ASCII)
# The names that --config.data.time_format takes for whole numbers -> microseconds in each; a plain
# integer is no time of the calendar, and a nanosecond is less than one.
NUMBERS = {"integer": 0, "nanoseconds": -1000, "microseconds": 1, "milliseconds": 1000,
            "seconds": SECOND}
# The number of digits of such a time between the years 1973 and 2286.
_DIGITS = {9: "seconds", 10: "seconds", 12: "milliseconds", 13: "milliseconds",
           15: "microseconds", 16: "microseconds", 18: "nanoseconds", 19: "nanoseconds"}
MOST_BUSINESS_DAYS = 0.8  # share of the business days that have rows; the others are holidays
_MOST_DIGITS = 8  # of a plain integer whose form is not given
_LARGEST = 2**62  # so that the difference of two times is a 64-bit integer
_CLOCK = (r"(?:(?P<join>T| +)(?P<hour>\d\d?):?(?P<minute>\d\d)(?::?(?P<second>\d\d)"
          r"(?:[.,](?P<fraction>\d+))?)? ?(?P<zone>Z|UTC|[+-]\d\d(?::?\d\d)?)?)?")
_DATES = [re.compile(date + _CLOCK, re.ASCII) for date in (
    r"(?P<year>\d{4})(?P<mark>[-/])(?P<month>\d\d?)(?:(?P=mark)(?P<day>\d\d?))?",
    r"(?P<year>\d{4})(?P<mark>\.)(?P<month>\d\d?)\.(?P<day>\d\d?)",
    r"(?P<day>\d\d?)(?P<mark>\.)(?P<month>\d\d?)\.(?P<year>\d{4})",
    r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)",
    r"(?P<year>\d{4})(?P<mark>[- ]?)Q(?P<quarter>[1-4])")]
_SLASHED = re.compile(r"\d\d?/\d\d?/\d{2,4}.*", re.ASCII)
_BEGIN = datetime.datetime(1970, 1, 1)
_NO_TIME = "is no time such as 2016-07-01 13:00"


@dataclasses.dataclass(frozen=True)
class Step:
  """What lies between a row's time and the next.

  Attributes:
    count: the number of units, at least 1.
    unit: "microsecond", "month", "business day", or "" for whole numbers.
  """

  count: int
  unit: str = "microsecond"

  def __str__(self) -> str:
    """A text such as "15 minutes", "3 months", "1 business day" or, of whole numbers, "2"."""
    count, unit = self.count, self.unit
    if unit == "microsecond":
      unit = next(name for name, size in _UNITS.items() if count % size == 0)
      count //= _UNITS[unit]
    return f"{count} {unit}{'s' * (count > 1)}" if unit else str(count)

  @classmethod
  def parse(cls, text: str) -> "Step":
    """The inverse of `str`; raises `ValueError` for another text."""
    match = _STEP.fullmatch(text)
    count = int(match[1]) if match else 0
    unit = (match[2] or "").removesuffix("s") if match else ""
    if count < 1 or unit not in (*_UNITS, "month", "business day", ""):
      raise ValueError(f"{text!r} is no step")
    return cls(count * _UNITS[unit]) if unit in _UNITS else cls(count, unit)

  def places(self, times: np.ndarray) -> np.ndarray | None:
    """The number of steps from the first time to each, i64[T]; None if they do not lie so.

    Args:
      times: i64[T], ascending.
    """
    if self.unit == "month":
      months, days, clock, lengths = _split(times)
      steps = months - months[0]
      if (days != np.minimum(_day(days, lengths), lengths)).any() or np.ptp(clock):
        return None
    elif self.unit == "business day":
      days, clock = _dates(times), times % DAY
      if not np.is_busday(days).all() or np.ptp(clock):
        return None
      steps = np.busday_count(days[0], days)
    else:
      steps = times - times[0]
    places, off = np.divmod(steps, self.count)
    return None if off.any() else places.astype(np.int64)

  def at(self, times: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The times i64[n] that lie `places` steps after the first; the inverse of `places`.

    Args:
      times: i64[T], the known times, at such steps.
      places: i64[n].
    """
    steps = self.count * np.asarray(places, np.int64)
    if self.unit == "month":
      months, days, clock, lengths = _split(times)
      start, length = _month(months[0] + steps)
      return start + DAY * (np.minimum(_day(days, lengths), length) - 1) + clock[0]
    if self.unit == "business day":
      dates = np.busday_offset(_dates(times[:1]), steps, roll="forward")
      return DAY * dates.astype(np.int64) + times[0] % DAY
    return times[0] + steps


def _split(times: np.ndarray) -> tuple[np.ndarray, ...]:
  """Each time's month since 1970, day (from 1), microsecond of the day, and the month's length."""
  months = times.astype("datetime64[us]").astype("datetime64[M]").astype(np.int64)
  start, length = _month(months)
  days, clock = np.divmod(times - start, DAY)
  return months, days + 1, clock, length


def _month(months: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The start of each month since 1970, in microseconds, and its number of days."""
  start, end = (m.astype("datetime64[M]").astype("datetime64[us]").astype(np.int64)
                for m in (months, months + 1))
  return start, (end - start) // DAY


def _day(days: np.ndarray, lengths: np.ndarray) -> int:
  """The day on which the rows lie in a month that is long enough for it."""
  return 31 if (days == lengths).all() else int(days.max())


def _dates(times: np.ndarray) -> np.ndarray:
  return (times // DAY).astype("datetime64[D]")


def steps(times: np.ndarray, calendar: bool) -> list[Step]:
  """The steps at which ascending times may lie, the most likely first.

  The last is the most frequent difference; perhaps not all times lie at it.

  Args:
    times: i64[T], ascending, two or more.
    calendar: whether they are times of the calendar, not plain integers.
  """
  gaps = np.diff(times)
  even = Step(_most(gaps), "microsecond" if calendar else "")
  if not calendar:
    return [even]
  months = Step(max(_most(np.diff(_split(times)[0])), 1), "month")
  if gaps.min() >= 28 * DAY and months.places(times) is not None:
    return [months, even]
  days = Step(1, "business day")
  places = days.places(times) if even.count == DAY else None
  if places is None or len(times) < MOST_BUSINESS_DAYS * (places[-1] + 1):
    return [even]
  # Within one week they cannot be told from days.
  return [even, days] if gaps.max() == DAY else [days, even]


def _most(values: np.ndarray) -> int:
  found, count = np.unique(values, return_counts=True)
  return int(found[count.argmax()])


def when(time: int, calendar: bool = True) -> str:
  """A time as a text like "2016-07-01 13:00:00", with a fraction where it has one."""
  if not calendar:
    return str(int(time))
  text = str(np.datetime64(int(time), "us")).replace("T", " ")
  return text.rstrip("0").rstrip(".") if time % SECOND else text.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Spelling:
  """How the times of a file are written, so that those of a forecast are written alike.

  Attributes:
    form: "date", a name in `NUMBERS`, or a pattern of `strptime`.
    fields: of a date, the groups of `_DATES` that its last time has, with their text.
    widths: of a date, the least width that month, day and hour have in any row: 1 or 2.
    parts: of a date, the groups that any row has.
    digits: of a date, the most digits of a fraction; of seconds since 1970, the same.
    whole: whether some row has no fraction.
    offset: the offset from UTC in microseconds of the last row; None if times have none.
    turns: whether the offset differs between rows.
  """

  form: str = "date"
  fields: dict[str, str] = dataclasses.field(
      default_factory=lambda: {"year": "", "mark": "-", "join": " "})
  widths: dict[str, int] = dataclasses.field(default_factory=dict)
  parts: frozenset[str] = frozenset({"month", "day", "hour", "minute", "second"})
  digits: int = 0
  whole: bool = True
  offset: int | None = None
  turns: bool = False

  @property
  def calendar(self) -> bool:
    """Whether the times are times of the calendar, not plain integers."""
    return self.form != "integer"

  def __call__(self, time: int) -> str:
    """A time as the file would write it."""
    time = int(time)
    if self.form in NUMBERS:
      return self._number(time)
    moment = _BEGIN + datetime.timedelta(microseconds=time + (self.offset or 0))
    if self.form != "date":
      if self.offset is not None:
        moment = moment.replace(
            tzinfo=datetime.timezone(datetime.timedelta(microseconds=self.offset)))
      return moment.strftime(self.form)
    return self._date(moment) + self._clock(moment)

  def _number(self, time: int) -> str:
    size = NUMBERS[self.form]
    if size <= 0:
      return str(time * (-size or 1))
    whole, rest = divmod(abs(time), size)
    fraction = f"{rest:06}"[:self.digits] if self.form == "seconds" else ""
    return "-" * (time < 0) + str(whole) + f".{fraction}" * bool(fraction)

  def _date(self, moment: datetime.datetime) -> str:
    fields, mark = self.fields, self.fields.get("mark", "")
    if "quarter" in fields:
      return f"{moment.year:04}{mark}Q{(moment.month + 2) // 3}"
    parts = [f"{moment.year:04}", f"{moment.month:0{self.widths.get('month', 2)}}"]
    if "day" in self.parts:
      parts.append(f"{moment.day:0{self.widths.get('day', 2)}}")
    return mark.join(parts[::-1] if next(iter(fields)) == "day" else parts)

  def _clock(self, moment: datetime.datetime) -> str:
    if "hour" not in self.parts:
      return ""
    text = f"{self.fields.get('join', ' ')}{moment.hour:0{self.widths.get('hour', 2)}}"
    text += f":{moment.minute:02}" + f":{moment.second:02}" * ("second" in self.parts)
    if self.digits and not (self.whole and moment.microsecond == 0):
      text += "." + f"{moment.microsecond:06}".ljust(self.digits, "0")[:self.digits]
    zone = self.fields.get("zone")
    return text + zone if zone else text


class Reader:
  """Reads the cells of a column of times, all of one form.

  Args:
    form: a name in `NUMBERS`, a pattern of `strptime`, or "" to go by the first cell.
  """

  def __init__(self, form: str = ""):
    self._form, self._pattern = form, _DATES[0]
    self._widths: dict[str, int] = collections.defaultdict(lambda: 2)
    self._parts, self._digits, self._whole = set(), 0, False
    self._fields, self._offset, self._offsets = {}, None, set()

  def __call__(self, cell: str) -> int:
    """The time in a cell.

    Raises:
      ValueError: it is none, or of another form than the first; the text says which.
    """
    cell = cell.strip()
    form = self._form or _guess(cell)
    if form in NUMBERS:
      time = self._number(cell, form)
    elif form == "date":
      time = self._date(cell)
    else:
      try:
        time = self._moment(datetime.datetime.strptime(cell, form))
      except ValueError:
        raise ValueError(f"is no time of the form {form}") from None
    self._form = form
    return time

  def spelling(self) -> Spelling:
    """How the cells that were read are written."""
    return Spelling(
        form=self._form or "date", fields=dict(self._fields) or Spelling().fields,
        widths=dict(self._widths), parts=frozenset(self._parts) or Spelling().parts,
        digits=self._digits, whole=self._whole, offset=self._offset, turns=len(self._offsets) > 1)

  def _number(self, cell: str, form: str) -> int:
    number = re.fullmatch(r"([+-]?\d{1,19})(?:\.(\d+))?", cell, re.ASCII)
    digits = (number[2] or "").rstrip("0") if number else ""
    if not number or number[2] and form != "seconds":
      raise ValueError("is no whole number as the first time" if self._form
                       else "is no whole number")
    size, count = NUMBERS[form], int(number[1])
    if len(digits) > 6 or size < 0 and count % -size:
      raise ValueError("is finer than a microsecond")
    self._digits = max(self._digits, len(digits))
    time = count // -size if size < 0 else count * (size or 1)
    if digits:
      rest = int(digits.ljust(6, "0"))
      time += -rest if number[1].startswith("-") else rest
    if abs(time) > _LARGEST:
      raise ValueError("is beyond all times")
    return time

  def _date(self, cell: str) -> int:
    patterns = (self._pattern, *(p for p in _DATES if p is not self._pattern))
    match = next(filter(None, (pattern.fullmatch(cell) for pattern in patterns)), None)
    if match is None:
      return self._other(cell)
    self._pattern = match.re
    fields = {name: text for name, text in match.groupdict().items() if text is not None}
    fraction = fields.get("fraction", "")
    if fraction[6:].strip("0"):
      raise ValueError("is finer than a microsecond")
    month = int(fields.get("month", 0)) or 3 * int(fields.get("quarter", 1)) - 2
    hour, minute, second = (int(fields.get(name, 0)) for name in ("hour", "minute", "second"))
    midnight = hour == 24 and not minute + second + int(fraction or 0)
    try:
      moment = datetime.datetime(
          int(fields["year"]), month, int(fields.get("day", 1)), 0 if midnight else hour, minute,
          second, int(fraction[:6].ljust(6, "0") or 0))
      if zone := fields.get("zone"):
        moment = moment.replace(tzinfo=_zone(zone))
    except ValueError:  # such as the 30th of February
      raise ValueError(_NO_TIME) from None
    time = self._moment(moment) + DAY * midnight
    if self._parts and ("quarter" in fields) != ("quarter" in self._fields):
      raise ValueError("is of another form than the first time")
    self._parts |= fields.keys()
    self._digits = max(self._digits, len(fraction[:6]))
    self._whole |= not fraction
    for name in ("month", "day", "hour"):
      self._widths[name] = min(self._widths[name], len(fields.get(name, "00")))
    self._fields = {"mark": "", **fields} if next(iter(fields)) != "day" else fields
    return time

  def _other(self, cell: str) -> int:
    """A time that ISO 8601 allows and `_DATES` do not know, such as 2024-W05-1."""
    if _SLASHED.fullmatch(cell):
      raise ValueError("may have the day or the month first: say which, as by "
                       "--config.data.time_format=%d/%m/%Y")
    if cell.isdigit() or re.search(r"[.,]\d{7}", cell):
      raise ValueError(_NO_TIME)
    try:
      moment = datetime.datetime.fromisoformat(cell.replace("/", "-"))
    except ValueError:
      raise ValueError(_NO_TIME) from None
    self._parts |= Spelling().parts
    self._whole = True
    self._digits = max(self._digits, 6 if moment.microsecond else 0)
    self._fields = Spelling().fields
    return self._moment(moment)

  def _moment(self, moment: datetime.datetime) -> int:
    """Microseconds since 1970, by the time's own clock or, if it has an offset, in UTC."""
    offset = moment.utcoffset()
    offset = None if offset is None else offset // datetime.timedelta(microseconds=1)
    if self._offsets and (offset is None) != (self._offset is None):
      raise ValueError("has another kind of offset from UTC than the first time")
    self._offset = offset
    self._offsets.add(offset)
    time = (moment.replace(tzinfo=None) - _BEGIN) // datetime.timedelta(microseconds=1)
    return time - (offset or 0)


def _zone(text: str) -> datetime.timezone:
  if text in ("Z", "UTC"):
    return datetime.timezone.utc
  hours, minutes = int(text[1:3]), int(text[3:].strip(":") or 0)
  offset = datetime.timedelta(hours=hours, minutes=minutes)
  return datetime.timezone(-offset if text[0] == "-" else offset)


def _guess(cell: str) -> str:
  """The form of the first cell of a column: "date" or a name in `NUMBERS`."""
  number = re.fullmatch(r"[+-]?(\d+)(\.\d+)?", cell, re.ASCII)
  if not number:
    return "date"
  digits = len(number[1])
  if number[2]:
    return "seconds" if digits in (9, 10) else "date"
  if digits == 8 and cell.isdigit():
    with contextlib.suppress(ValueError):  # as "20241399" is no date
      datetime.datetime.strptime(cell, "%Y%m%d")
      return "date"
  if digits <= _MOST_DIGITS:
    return "integer"
  if digits not in _DIGITS:
    raise ValueError("is no time, and no number of seconds since 1970")
  return _DIGITS[digits]


def is_form(form: str) -> bool:
  """Whether a text can stand in --config.data.time_format."""
  return form in ("", *NUMBERS) or "%" in form


def looks_like_date(cell: str, form: str = "") -> bool:
  """Whether a cell holds a time of the calendar, of the given form or more than a number."""
  try:
    Reader(form)(cell)
    return bool(form) or _guess(cell.strip()) == "date"
  except ValueError:
    return False
