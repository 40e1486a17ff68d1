"""Times of series: every spelling is read and written back, steps are those of the calendar, by closed forms."""

import calendar
import datetime

import numpy as np
import pytest

from dljax.data.series import times
from dljax.data.series.times import DAY, SECOND, Reader, Step

JAN = datetime.datetime(2024, 1, 1)
MICROSECOND = datetime.timedelta(microseconds=1)


def read(cells, form=""):
  """The times of cells, and how they are written."""
  reader = Reader(form)
  return np.array([reader(str(cell)) for cell in cells]), reader.spelling()


def months(count, day, first=2023):
  for i in range(count):
    year, month = first + i // 12, i % 12 + 1
    yield datetime.date(year, month, min(day, calendar.monthrange(year, month)[1]))


@pytest.mark.parametrize("cells, want, form", [
    (["2016-07-01 13:00", "2016-07-01 14:00"], [1467378000, 1467381600], ""),
    (["2016/7/1 9:05", "2016/7/1 10:05"], [1467363900, 1467367500], ""),
    (["20160701", "20160702"], [1467331200, 1467417600], ""),
    (["2016.07.01", "2016.07.02"], [1467331200, 1467417600], ""),
    (["1.7.2016", "2.7.2016"], [1467331200, 1467417600], ""),
    (["01.07.2016T13:00:00", "01.07.2016T14:00:00"], [1467378000, 1467381600], ""),
    (["2016-07", "2016-08"], [1467331200, 1470009600], ""),
    (["2016-Q3", "2016-Q4"], [1467331200, 1475280000], ""),
    (["2016-07-01T13:00:00Z", "2016-07-01T14:00:00Z"], [1467378000, 1467381600], ""),
    (["2016-07-01 13:00+0530", "2016-07-01 14:00+0530"], [1467358200, 1467361800], ""),
    (["2016-07-01T00:00:00", "2016-07-01T00:00:00.500000"], [1467331200, 1467331200.5], ""),
    (["2016-07-01 00:00:00.000", "2016-07-01 00:00:00.250"], [1467331200, 1467331200.25], ""),
    (["07/01/2016 01:30 PM", "07/01/2016 02:30 PM"], [1467379800, 1467383400], "%m/%d/%Y %I:%M %p"),
    (["1467331200", "1467331260"], [1467331200, 1467331260], ""),
    (["1467331200.5", "1467331201.0"], [1467331200.5, 1467331201], ""),
    (["1467331200500", "1467331201000"], [1467331200.5, 1467331201], ""),
    (["1467331200000000", "1467331200000001"], [1467331200, 1467331200.000001], ""),
    (["1467331200000000000", "1467331200000001000"], [1467331200, 1467331200.000001], ""),
    (["0", "60"], [0, 60], "seconds"),
    (["-1.5", "-0.5"], [-1.5, -0.5], "seconds"),
    (["1969-12-31 23:59:59.5", "1970-01-01 00:00:00.0"], [-0.5, 0], ""),
])
def test_times_are_read_and_written_back(cells, want, form):
  found, spelling = read(cells, form)
  assert found.tolist() == [round(second * SECOND) for second in want]
  assert [spelling(time) for time in found] == cells and spelling.calendar


def test_plain_numbers_are_no_calendar():
  found, spelling = read(["-1", "0", "1"])
  assert found.tolist() == [-1, 0, 1] and not spelling.calendar and spelling(2) == "2"
  assert read(["19990101", "20000102"], "integer")[0].tolist() == [19990101, 20000102]
  assert not read(["1999", "2000"])[1].calendar  # years, which are equal steps as numbers too


def test_the_hour_24_is_the_next_days_first():
  found, _ = read(["2016-07-01 23:00", "2016-07-01 24:00"])
  assert np.diff(found).tolist() == [3600 * SECOND]


@pytest.mark.parametrize("cells, message", [
    (["24:00"], "is no time such as"), (["2016-13-01"], "is no time such as"), (["2016-07-01 25:00"], "is no time"),
    (["01/02/2016"], "day or the month first"), (["1.5"], "is no time"), (["2016.07"], "is no time"),
    (["12345678901"], "no number of seconds since 1970"), (["1", "2.5"], "no whole number as the first"),
    (["2016-07-01 00:00:00.0000001"], "finer than a microsecond"), (["1467331200000000001"], "finer than a micro"),
    (["2016-07-01 00:00Z", "2016-07-01 01:00"], "another kind of offset"), (["2016-Q1", "2016-04"], "another form"),
    ([""], "is no time"), (["\u0661\u0662"], "is no time"),
])
def test_what_is_no_time_is_refused(cells, message):
  with pytest.raises(ValueError, match=message):
    read(cells)


@pytest.mark.parametrize("step, text", [
    (Step(3600 * SECOND), "1 hour"), (Step(900 * SECOND), "15 minutes"), (Step(7 * DAY), "7 days"),
    (Step(1500_000), "1500 milliseconds"), (Step(1), "1 microsecond"), (Step(3, "month"), "3 months"),
    (Step(1, "business day"), "1 business day"), (Step(2, ""), "2"),
])
def test_steps_are_written_in_words_and_read_again(step, text):
  assert str(step) == text and Step.parse(text) == step


@pytest.mark.parametrize("text", ["", "hour", "0 days", "1 fortnight", "1.5 hours", "-1 days"])
def test_what_is_no_step_is_refused(text):
  with pytest.raises(ValueError, match="is no step"):
    Step.parse(text)


@pytest.mark.parametrize("cells, want, after", [
    (months(14, 1), Step(1, "month"), ["2024-03-01", "2024-04-01"]),
    (months(14, 31), Step(1, "month"), ["2024-03-31", "2024-04-30"]),
    (months(14, 30), Step(1, "month"), ["2024-03-30", "2024-04-30"]),
    (list(months(14, 15))[::3], Step(3, "month"), ["2024-04-15", "2024-07-15"]),
    (list(months(49, 28))[::12], Step(12, "month"), ["2028-01-28", "2029-01-28"]),
    ([JAN.date() + datetime.timedelta(28 * i) for i in range(5)], Step(28 * DAY), ["2024-05-20", "2024-06-17"]),
    ([JAN.date() + datetime.timedelta(7 * i) for i in range(5)], Step(7 * DAY), ["2024-02-05", "2024-02-12"]),
    ([JAN.date() + datetime.timedelta(i) for i in range(4)], Step(DAY), ["2024-01-05", "2024-01-06"]),
    ([day for i in range(19) if (day := JAN.date() + datetime.timedelta(i)).weekday() < 5 and i != 9],
     Step(1, "business day"), ["2024-01-22", "2024-01-23"]),  # with a holiday
    ([JAN.date() + datetime.timedelta(i) for i in range(13)], Step(DAY), ["2024-01-14", "2024-01-15"]),
])
def test_steps_are_found_and_go_on(cells, want, after):
  found, spelling = read(cells)
  step = times.steps(found, True)[0]
  assert step == want
  places = step.places(found)
  assert np.median(np.diff(places)) == 1
  np.testing.assert_array_equal(step.at(found, places), found)
  assert [spelling(time) for time in step.at(found, places[-1] + np.array([1, 2]))] == after


def test_days_within_one_week_may_be_business_days():
  week, _ = read([JAN.date() + datetime.timedelta(i) for i in range(5)])
  assert times.steps(week, True) == [Step(DAY), Step(1, "business day")]
  holes, _ = read([JAN.date() + datetime.timedelta(i) for i in (0, 1, 3, 4, 30, 31, 32)])
  assert times.steps(holes, True) == [Step(DAY)]  # too many business days are left out


def test_times_beyond_a_months_rule_are_no_months():
  cells = [*months(5, 1), datetime.date(2023, 6, 2)]
  assert times.steps(read(cells)[0], True)[0].unit == "microsecond"


def test_a_time_as_text():
  at = lambda *parts: (datetime.datetime(*parts) - datetime.datetime(1970, 1, 1)) // MICROSECOND
  assert times.when(at(2016, 7, 1, 13)) == "2016-07-01 13:00:00"
  assert times.when(at(1950, 1, 1, 0, 0, 0, 250_000)) == "1950-01-01 00:00:00.25"
  assert times.when(7, False) == "7"
