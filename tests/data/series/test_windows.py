"""Time series: which rows make up which window, what is fitted to which rows, calendars, and files with faults."""

import csv
import datetime
import hashlib
import zoneinfo
from types import SimpleNamespace

import numpy as np
import pytest

from dljax.data import prepare, sources
from dljax.data.series import table, times, windows
from dljax.data.series.times import Step
from dljax.errors import UserError
from tests.data.hosts import share

SECOND = times.SECOND
HOUR = 3600 * SECOND
START = datetime.datetime(2019, 12, 30)  # a Monday
VALUES = np.random.default_rng(0).normal(5, 3, (200, 2)).round(3)


def write(path, values=VALUES, *, step=HOUR, names=("date", "a", "b"), start=START, drop=(), form="%Y-%m-%d %H:%M:%S"):
  with open(path, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(names)
    for i, row in enumerate(values):
      if i not in drop:
        writer.writerow([(start + datetime.timedelta(microseconds=i * step)).strftime(form),
                         *("" if np.isnan(v) else v for v in row)])
  return path


def config(path, **fields):
  made = windows.default_config()
  fields = {"train": 100, "validation": 40, "test": 60, **fields}
  made.update({"name": str(path), "channels": ("a", "b"), "window": 12, "horizon": 4,
               "covariates": ("hour_of_day", "day_of_week"), **fields,
               **{split: str(fields[split]) for split in windows.SPLITS}})
  return made


def opened(made, batch_size=8, eval_batch_size=7, seed=0):
  data = windows.SeriesSet(made).pipelines(batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed)
  for pipeline in (data.train, *data.evals.values()):
    pipeline.open()
  return data


def whole_pass(pipeline):
  batches = [pipeline.batch(i) for i in range(pipeline.num_batches)]
  joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
  real = joined["mask"] > 0
  return {key: array[real] for key, array in joined.items()}


def normalised(values=VALUES, train=100):
  return (values - values[:train].mean(axis=0)) / values[:train].std(axis=0)


# --- Windows ----------------------------------------------------------------------------------------------


def test_every_training_window_once_an_epoch_and_none_beyond_the_training_rows(tmp_path):
  data = opened(config(write(tmp_path / "x.csv")))
  windows = 100 - 12 - 4 + 1
  assert data.train.num_examples == windows
  want = {normalised()[i:i + 16].astype(np.float32).tobytes() for i in range(windows)}
  stream = [data.train.batch(step) for step in range(windows)]  # 8 epochs of batches of 8
  joined = {key: np.concatenate([batch[key] for batch in stream]) for key in ("window", "horizon")}
  for epoch in range(8):
    rows = slice(epoch * windows, (epoch + 1) * windows)
    found = np.concatenate([joined["window"][rows], joined["horizon"][rows]], axis=1)
    assert {row.tobytes() for row in found} == want
  again = opened(config(tmp_path / "x.csv"))
  np.testing.assert_array_equal(again.train.batch(5)["window"], stream[5]["window"])
  other = opened(config(tmp_path / "x.csv"), seed=1)
  assert not np.array_equal(other.train.batch(5)["window"], stream[5]["window"])


def test_evaluation_sees_every_window_whose_horizon_lies_in_the_split_once_in_order(tmp_path):
  data = opened(config(write(tmp_path / "x.csv")))
  for split, begin, end in ("validation", 100, 140), ("test", 140, 200):
    rows = whole_pass(data.evals[split])
    first = np.arange(begin, end - 4 + 1)  # of the horizon
    assert data.evals[split].num_examples == len(first)
    np.testing.assert_array_equal(rows["id"], np.arange(len(first)))
    np.testing.assert_allclose(rows["window"], np.stack([normalised()[i - 12:i] for i in first]), atol=1e-6)
    np.testing.assert_allclose(rows["horizon"], np.stack([normalised()[i:i + 4] for i in first]), atol=1e-6)
    begun = SECOND * int(START.replace(tzinfo=datetime.timezone.utc).timestamp())
    np.testing.assert_array_equal(rows["host/time"], begun + HOUR * first)


def test_batches_have_the_fields_and_shapes_that_the_spec_says(tmp_path):
  made = config(write(tmp_path / "x.csv"))
  for covariates in (("hour_of_day", "day_of_week"), ()):
    made.covariates = covariates
    data = opened(made)
    batch = data.train.batch(0)
    assert set(data.batch_spec) == {key for key in batch if not key.startswith("host/")}
    for key, spec in data.batch_spec.items():
      assert (batch[key].shape, batch[key].dtype) == (spec.shape, spec.dtype)
    last = data.evals["test"].batch(data.evals["test"].num_batches - 1)
    assert last["mask"].tolist() == [1] + [0] * 6 and last["id"].tolist() == [56] + [0] * 6


def test_hosts_share_out_the_global_batch(tmp_path):
  made = config(write(tmp_path / "x.csv"))
  whole, part = (windows.SeriesSet(made).pipelines(batch_size=8, eval_batch_size=8, seed=0).train
                 for _ in range(2))
  whole.open()
  for rows in share(0, 2), share(1, 2):
    part.open(rows)
    np.testing.assert_array_equal(part.batch(3)["window"], whole.batch(3)["window"][rows(8)])
    part.close()


def test_the_literatures_windows_of_etth1(tmp_path):
  made = windows.default_config()
  made.update({"name": str(write(tmp_path / "x.csv", np.random.default_rng(0).normal(size=(14_500, 1)),
                                 names=("date", "OT"))), "channels": ("OT",), "train": "8640",
               "validation": "2880", "test": "2880", "window": 336, "horizon": 96})
  data = opened(made)
  # border1s and border2s of the authors' data loader (Zhou et al. 2021), len - window - horizon + 1.
  assert data.train.num_examples == 8640 - 336 - 96 + 1
  assert data.evals["validation"].num_examples == data.evals["test"].num_examples == 2880 - 96 + 1


# --- No look-ahead ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["refuse", "mask"])
def test_another_future_changes_nothing_before_it(tmp_path, missing):
  now = 150  # in the test rows
  past = VALUES.copy()
  if missing == "mask":
    past[[7, 30, 31, 110, 149]] = np.nan
  other = past.copy()
  other[now:] = 1e4 * np.random.default_rng(1).normal(size=other[now:].shape)
  if missing == "mask":
    other[now + 3] = np.nan
  one, two = (opened(config(write(tmp_path / f"{i}.csv", values), missing=missing))
              for i, values in enumerate((past, other)))
  assert one.assets() == two.assets()
  for step in range(12):
    for key, array in one.train.batch(step).items():
      np.testing.assert_array_equal(array, two.train.batch(step)[key])
  for split in ("validation", "test"):
    a, b = whole_pass(one.evals[split]), whole_pass(two.evals[split])
    first = np.arange(len(a["window"])) + (100 if split == "validation" else 140)
    same = first <= now
    np.testing.assert_array_equal(a["window"][same], b["window"][same])
    np.testing.assert_array_equal(a["covariates"], b["covariates"])  # the calendar is known in advance
    np.testing.assert_array_equal(a["horizon"][first + 4 <= now], b["horizon"][first + 4 <= now])
    if split == "test":
      assert not np.array_equal(a["window"][~same], b["window"][~same])


def test_the_normaliser_is_that_of_the_training_rows_without_the_missing_ones(tmp_path):
  values = VALUES.copy()
  values[3:9, 0] = np.nan
  series = windows.SeriesSet(config(write(tmp_path / "x.csv", values), missing="mask"))
  normaliser = series.normaliser()
  for c in range(2):
    there = values[:100, c][~np.isnan(values[:100, c])]
    np.testing.assert_allclose([normaliser.mean[c], normaliser.std[c]], [there.mean(), there.std()])
  again = windows.Normaliser.from_assets({windows.ASSET: normaliser.asset()})
  np.testing.assert_array_equal(again(values), normaliser(values))
  assert again.asset() == normaliser.asset() and normaliser.step == again.step == Step(HOUR)


def test_a_channel_that_never_changes_is_not_divided_by_zero(tmp_path):
  values = VALUES.copy()
  values[:100, 1] = 4.0
  data = opened(config(write(tmp_path / "x.csv", values)))
  assert data.assets()[windows.ASSET]["std"][1] == 1
  assert not data.train.batch(0)["window"][..., 1].any()


@pytest.mark.parametrize("value", [0.1, 0.3, 14.62, 273.15, -1e-300, 1e308, 0.0])
def test_a_channel_of_one_value_becomes_zero_whatever_the_value(value):
  series = lambda values: table.Series("x", ("a",), np.arange(len(values)) * HOUR, np.array(values)[:, None])
  fitted = windows.Normaliser.fit(series([value] * 1000 + [np.nan]))
  assert fitted.std[0] == 1 and fitted.mean[0] == value and fitted(np.array([[value]])) == 0
  rounded = windows.Normaliser.fit(series([value, np.nextafter(value, 2 * value)] * 500))
  assert rounded.std[0] >= 1 and abs(rounded(np.array([[value]]))) < 0.1


def test_small_and_huge_changes_are_kept():
  for level, change in (273.15, 1e-6), (1.6e9, 1.0), (1e200, 1e200), (0.0, 1e-30):
    values = level + change * VALUES[:, :1]
    fitted = windows.Normaliser.fit(table.Series("x", ("a",), np.arange(200) * HOUR, values))
    np.testing.assert_allclose(fitted(values)[:, 0], normalised(train=200)[:, 0], atol=1e-5)


def test_a_saved_normaliser_takes_the_place_of_the_fitted_one(tmp_path):
  saved = windows.Normaliser(("a", "b"), np.array([1.0, 2.0]), np.array([10.0, 20.0]), Step(HOUR))
  made = config(write(tmp_path / "x.csv"))
  data = windows.SeriesSet(made).pipelines(batch_size=8, eval_batch_size=7, seed=0)
  data.restore({windows.ASSET: saved.asset()})
  data.evals["test"].open()
  np.testing.assert_allclose(data.evals["test"].batch(0)["window"][0], (VALUES[128:140] - [1, 2]) / [10, 20], atol=1e-6)
  data = windows.SeriesSet(made).pipelines(batch_size=8, eval_batch_size=7, seed=0)
  data.restore({windows.ASSET: {**saved.asset(), "channels": ["a", "c"]}})
  with pytest.raises(UserError, match="has the channels a, b, but the model was trained on a, c; name these by"):
    data.train.open()


# --- Missing values ---------------------------------------------------------------------------------------


def test_missing_values_are_masked_by_choice(tmp_path):
  values = VALUES.copy()
  values[[50, 51], 0] = np.nan
  values[145, 1] = np.inf
  path = write(tmp_path / "x.csv", values, drop=(60,))
  with pytest.raises(UserError, match=r"x.csv: row 51 \(2020-01-01 02:00:00\) has no value of a; .*missing=mask"):
    opened(config(path))
  data = opened(config(path, missing="mask"))
  test = whole_pass(data.evals["test"])
  np.testing.assert_array_equal(np.isnan(test["horizon"][:, :, 1]), (np.arange(57)[:, None] + np.arange(4)) == 5)
  assert not np.isnan(test["window"]).any() and not np.isnan(test["horizon"][:, :, 0]).any()
  six = test["window"][6]  # rows 134 to 145: the value before stands in
  assert six[11, 1] == six[10, 1] == test["window"][5, 11, 1]
  train = np.concatenate([data.train.batch(step)["horizon"] for step in range(85)])
  assert np.isnan(train[..., 1]).sum() == 8 * 4 and np.isnan(train[..., 0]).sum() == 3 * 8 * 4  # of 8 epochs


def test_filling_takes_the_last_value_before_and_the_mean_at_the_start():
  nan = np.nan
  filled = windows.fill_forward(np.array([[nan, 1], [2, nan], [nan, nan], [3, 4]], np.float32))
  np.testing.assert_array_equal(filled, [[0, 1], [2, 1], [2, 1], [3, 4]])
  assert filled.dtype == np.float32


def test_a_row_that_is_left_out_is_a_missing_value(tmp_path):
  read = table.read_csv(write(tmp_path / "x.csv", drop=(60,)), "date", ("b",))
  with pytest.raises(UserError, match=r"a row that is left out \(2020-01-01 12:00:00\) has no value of b"):
    read.checked("refuse")
  checked = read.checked("mask")
  assert len(checked.times) == 200 and np.flatnonzero(np.isnan(checked.values[:, 0])).tolist() == [60]


# --- Calendar ---------------------------------------------------------------------------------------------


def test_covariates_are_the_sines_and_cosines_of_the_calendar():
  times = lambda *texts: np.array(texts, "datetime64[us]").astype(np.int64)
  wave = lambda *phases: np.array([[np.sin(2 * np.pi * p), np.cos(2 * np.pi * p)] for p in phases])
  days = times("2024-02-26T06:00", "2024-02-29T18:00", "1960-01-01T00:00")  # a Monday, a Thursday, a Friday
  near = lambda found, want: np.testing.assert_allclose(found, want, atol=1e-6)
  near(windows.covariates(days, ["hour_of_day"]), wave(0.25, 0.75, 0))
  near(windows.covariates(days, ["day_of_week"]), wave(0.25 / 7, 3.75 / 7, 4 / 7))
  near(windows.covariates(days, ["day_of_year"]), wave(56.25 / 366, 59.75 / 366, 0))
  both = windows.covariates(days, ["day_of_week", "hour_of_day"])
  near(both, np.concatenate([wave(0.25 / 7, 3.75 / 7, 4 / 7), wave(0.25, 0.75, 0)], axis=1))


def test_covariates_go_with_their_rows(tmp_path):
  data = opened(config(write(tmp_path / "x.csv")))
  rows = whole_pass(data.evals["validation"])
  of_rows = rows["host/time"][:, None] + HOUR * np.arange(-12, 4)
  want = windows.covariates(of_rows.ravel(), ("hour_of_day", "day_of_week")).reshape(-1, 16, 4)
  np.testing.assert_array_equal(rows["covariates"], want)


# --- Files ------------------------------------------------------------------------------------------------


def test_forms_of_files_that_are_read(tmp_path):
  plain = table.read_csv(write(tmp_path / "x.csv"), "date", ("b", "a"))
  np.testing.assert_array_equal(plain.values, VALUES[:, ::-1])
  slashed = table.read_csv(write(tmp_path / "y.csv", form="%Y/%m/%d %H:%M"), "date", ("b", "a"))
  np.testing.assert_array_equal(slashed.times, plain.times)
  zoned = table.read_csv(write(tmp_path / "z.csv", form="%Y-%m-%dT%H:%M:%S+02:00"), "date", ("b", "a"))
  np.testing.assert_array_equal(zoned.times, plain.times - 2 * HOUR)
  (tmp_path / "w.csv").write_text("\ufeffdate, a\n1950-01-01, 1.5\n1950-01-02,NA\n\n1950-01-03,2\n", encoding="utf-8")
  old = table.read_csv(tmp_path / "w.csv", "date", ("a",))
  assert old.step == Step(times.DAY) and times.when(old.times[0]) == "1950-01-01 00:00:00"
  np.testing.assert_array_equal(old.values[:, 0], [1.5, np.nan, 2])
  (tmp_path / "v.csv").write_text("date,a,x,x\n1969-12-31 23:59:58.500,+1.,x,x\n1969-12-31 23:59:59.5,-.5E1,x,x\n")
  same = table.read_csv(tmp_path / "v.csv", "date", ("a",))  # with twins that are not read
  assert same.times.tolist() == [-1_500_000, -500_000] and same.values[:, 0].tolist() == [1, -5]


@pytest.mark.parametrize("text, message", [
    ("", "holds no rows of values"),
    ("date,a,b\n", "holds no rows of values"),
    ("time,a,b\n2020-01-01,1,2\n", "has no column 'date' of times, but time, a, b; name it by --config.data.time"),
    ("date,a,c\n2020-01-01,1,2\n", "there is no 'b'"),
    ("date,a,b\n2020-01-01,1\n", "row 1 has 2 values, but there are 3 columns"),
    ("date,a,b\n2020-01-01,1,2\nsoon,1,2\n", "row 2: 'soon' is no time such as 2016-07-01 13:00"),
    ("date,a,b\n2020-01-01,1,2\n2020-01-02,1,x\n", "row 2: 'x' in the column b is no number"),
    ("date,a,b,a\n2020-01-01,1,2,3\n", "2 columns are called 'a'; give each a name of its own"),
    ("date,a,b, date\n2020-01-01,1,2,3\n", "2 columns are called 'date'"),
    ("date,a,b\n2020-01-01,1_0,2\n", "row 1: '1_0' in the column a is no number"),
    ("date,a,b\n2020-01-01,\u0663,2\n", "in the column a is no number"),
    ("date,a,b\n2020-01-01,1e999,2\n", "row 1: '1e999' in the column a is no number"),
    ("date,a,b\n2020-01-01 00:00:00.0000001,1,2\n2020-01-01 00:00:01.0000002,1,2\n",
     "row 1: '2020-01-01 00:00:00.0000001' is finer than a microsecond"),
    ("date,a,b\n2020-01-01 00:00,1,2\n2020-01-01 01:00+00:00,1,2\n", "row 2: .* another kind of offset from UTC than"),
    ("date,a,b\n15771201123,1,2\n", "row 1: '15771201123' is no time, and no number of seconds since 1970"),
    ("date,a,b\n01/02/2020,1,2\n", "row 1: '01/02/2020' may have the day or the month first: .*=%d/%m/%Y"),
    ("date,a,b\n2020-02-30,1,2\n", "row 1: '2020-02-30' is no time such as 2016-07-01 13:00"),
    ("date,a,b\n1,1,2\n2,1,2\n2020-01-01,1,2\n", "row 3: '2020-01-01' is no whole number as the first time"),
    ("date,a,b\n2020-01-01,1,2\n", "holds 1 rows, no series"),
    ("date,a,b\n2020-01-01,1,2\n2020-01-03,1,2\n2020-01-02,1,2\n",
     r"row 3 \(2020-01-02 00:00:00\) does not come after row 2 \(2020-01-03 00:00:00\); sort the rows"),
    ("date,a,b\n2020-01-01,1,2\n2020-01-02,1,2\n2020-01-02,1,2\n", "row 3 .* does not come after row 2"),
    ("date,a,b\n2020-01-01,1,2\n2020-01-02,1,2\n2020-01-03,1,2\n2020-01-03 07:00,1,2\n",
     "row 4 .* is not a whole number of steps of 1 day after the first; resample"),
    ("date,a,b\n2020-01-01,1,2\n2020-01-02,1,2\n2020-01-03,1,2\n2120-01-03,1,2\n",
     "there should be 36,527 rows at steps of 1 day, but there are 4; mend the times"),
    ("date,a,b\n2020-01-01,1,nan\n2020-01-02,1,2\n", r"row 1 \(2020-01-01 00:00:00\) has no value of b"),
])
def test_files_with_faults_are_refused_by_their_row(tmp_path, text, message):
  path = tmp_path / "x.csv"
  path.write_text(text)
  with pytest.raises(UserError, match=message) as caught:
    opened(config(path))
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
  with pytest.raises(UserError, match="no.csv: cannot be read .No such file"):
    table.read_csv(tmp_path / "no.csv", "date", ("a",))
  with pytest.raises(UserError, match="cannot be read .Is a directory"):
    table.read_csv(tmp_path, "date", ("a",))
  (tmp_path / "x.csv").write_bytes(bytes(range(256)))
  with pytest.raises(UserError, match="x.csv: is no text of values"):
    table.read_csv(tmp_path / "x.csv", "date", ("a",))


@pytest.mark.parametrize("fields, message", [
    ({"window": 97}, "data.window=97: with the horizon of 4 it is longer than the 100 rows of --config.data.train"),
    ({"window": 0}, "data.window=0: give a positive number"),
    ({"horizon": 50}, "data.validation='40': give 50 rows or more"),
    ({"test": 3}, "data.test='3': give 4 rows or more"),
    ({"test": 61}, "data.test='61': with those before it, these are 201 rows, but .* has 200; take fewer"),
    ({"channels": ()}, "data.channels=: name one channel or more"),
    ({"channels": ("a", "a")}, "data.channels=a,a: name one channel or more, each once"),
    ({"covariates": ("hour",)}, "data.covariates: there is no 'hour'; did you mean hour_of_day"),
    ({"missing": "drop"}, "data.missing='drop': choose one of refuse, mask"),
])
def test_configs_that_do_not_fit_are_refused(tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    opened(config(write(tmp_path / "x.csv"), **fields))


def test_a_channel_without_training_values_is_refused(tmp_path):
  values = VALUES.copy()
  values[:100, 1] = np.nan
  with pytest.raises(UserError, match="b has no value in the 100 training rows; drop it from --config.data.channels"):
    opened(config(write(tmp_path / "x.csv", values), missing="mask"))


@pytest.mark.parametrize("text, dialect", [
    ("# a comment, with \"quotes\ndate,a,b\n2020-01-01,1.5,x\n# another\n\n2020-01-02,-2,y\n,,\n,,\n", {}),
    ("date,a,b\r\n2020-01-01,1.5,x\r\n2020-01-02,-2,y\r\n\r\n", {}),
    ('\ufeff"date","a","b"\n"2020-01-01","1.5","two\n# lines, and ""quotes"""\n"2020-01-02","-2",""\n', {}),
    ("date;a;b\n2020-01-01;1,5;x\n2020-01-02;-2;\n", {"delimiter": ";", "decimal": ","}),
    ("date\ta\tb\n2020-01-01\t1.5\tx\n2020-01-02\t-2\t\n", {"delimiter": "tab"}),
    ('date,a,b\n2020-01-01,"1,5",x\n2020-01-02,-2,\n', {"decimal": ","}),
    ("date|a|b\n01/01/2020|1.5|x\n02/01/2020|-2|\n", {"delimiter": "|", "time_format": "%d/%m/%Y"}),
])
def test_dialects_of_files(tmp_path, text, dialect):
  path = tmp_path / "x.csv"
  path.write_text(text, encoding="utf-8")
  dialect = table.Dialect(**dialect)
  dialect.check()
  found = table.read_csv(path, "date", ("a",), dialect)
  assert found.values[:, 0].tolist() == [1.5, -2] and found.step == Step(times.DAY)
  assert times.when(found.times[0]) == "2020-01-01 00:00:00"
  assert table.find_columns(path, dialect) == ("date", ("a",), {"b": "no numbers"})


@pytest.mark.parametrize("text, dialect, message", [
    ('date,a\n2020-01-01,"1,234"\n', {}, "'1,234' in the column a is no number: take out the marks between thousands, or"),
    ("date;a\n2020-01-01;1.234,5\n", {"delimiter": ";", "decimal": ","}, "take out the marks between thousands"),
    ("date,a\n2020-01-01,1 234 567\n", {}, "take out the marks between thousands"),
    ('date,a\n2020-01-01,"1,5"\n', {}, "is no number: --config.data.decimal=',' reads it"),
    ("date;a\n2020-01-01;1,5\n", {}, "has one column, 'date;a', if .* by ','; --config.data.delimiter=';' may be"),
    ("date\ta\n2020-01-01\t1,5\n", {"delimiter": ";"}, "--config.data.delimiter='tab' may be the right mark"),
    ("date,a\n2020-01-01,1\n,,\n2020-01-02,1\n", {}, "row 2 has 3 values, but there are 2 columns"),
    ("date,a\n2020-01-01,1\n,\n2020-01-02,1\n", {}, "row 2: '' is no time"),
])
def test_another_dialect_than_the_files_is_refused(tmp_path, text, dialect, message):
  path = tmp_path / "x.csv"
  path.write_text(text)
  with pytest.raises(UserError, match=message):
    table.read_csv(path, "date", ("a",), table.Dialect(**dialect))


@pytest.mark.parametrize("field, value", [
    ("delimiter", ""), ("delimiter", ", "), ("delimiter", "x"), ("delimiter", "."), ("decimal", "x"),
    ("time_format", "fortnights"),
])
def test_dialects_that_no_file_has_are_refused(tmp_path, field, value):
  with pytest.raises(UserError, match=f"--config.data.{field}='{value}': give"):
    opened(config(write(tmp_path / "x.csv"), **{field: value}))


@pytest.mark.parametrize("text, time, message", [
    ("when,a,then\n2020-01-01,1,2020-01-02\n", "", "2 columns hold dates among when, a, then; name the column of times"),
    ("a,b\n1,2\n", "", "no column holds dates among a, b; name the column of times by --config.data.time"),
    ("2020-01-01,5\n2020-01-02,6\n", "", "the first line holds '2020-01-01, 5', no names; put the names of the columns there"),
    ("date,a\n2020-01-01,1\n2020-01-02,1\n2020-01-03,x\n", "",
     "row 3: 'x' in the column a is no number; mend it, or name the columns to read by --config.data.channels"),
    ("date,note\n2020-01-01,x\n", "", "no column besides date holds numbers"),
    ("date,a\n", "", "holds no rows of values"), ("", "", "holds no rows of values"),
    ("date,a\n2020-01-01,1\n", "day", "has no column 'day' of times, but date, a"),
])
def test_columns_that_cannot_be_found(tmp_path, text, time, message):
  path = tmp_path / "x.csv"
  path.write_text(text)
  with pytest.raises(UserError, match=message):
    table.find_columns(path, table.Dialect(), time, "date")


def test_columns_without_a_name_or_without_numbers_are_left_out(tmp_path):
  path = tmp_path / "x.csv"
  path.write_text(",day,a,code,empty,b\n0,2020-01-01,1,7,,\n1,2020-01-02,2,x,,3\n")
  found = table.find_columns(path, table.Dialect(), "", "date")
  assert found == ("day", ("a", "b"), {"column 1": "no name", "code": "no numbers", "empty": "no numbers"})


def test_columns_that_are_not_read_may_hold_anything(tmp_path):
  path = tmp_path / "x.csv"
  path.write_text("day,a,typo\n" + "".join(f"{i},{i},{'x' if i == 150 else i}\n" for i in range(200)))
  made = config(path, channels=("a",), covariates=(), time="day")
  found, _ = windows.find(made, {"time", "channels", "covariates", "train", "validation", "test"})
  assert found == {"missing": "refuse"}
  path.write_text("day,a,typo\n" + "".join(f"20{i:02}-01-01,{i},{'x' if i == 9 else i}\n" for i in range(20)))
  assert table.find_columns(path, table.Dialect(), "", "date", False) == ("day", (), {})
  with pytest.raises(UserError, match="row 10: 'x' in the column typo is no number"):
    table.find_columns(path, table.Dialect(), "", "date")


def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(table, "MAX_LINE", 100)
  (tmp_path / "x.csv").write_text("date,a\n" + "1" * 101)
  with pytest.raises(UserError, match="x.csv: is no text of values .*a line has more than 100 characters"):
    table.read_csv(tmp_path / "x.csv", "date", ("a",))


def test_a_device_is_no_file():
  with pytest.raises(UserError, match="/dev/zero: cannot be read .no regular file.; name a .csv file"):
    table.read_csv("/dev/zero", "date", ("a",))


def local(hours, first, utc):
  """The lines of a file of local times in Berlin, where summer time begins or ends."""
  zone = zoneinfo.ZoneInfo("Europe/Berlin")
  moments = (first.replace(tzinfo=datetime.timezone.utc) + datetime.timedelta(hours=i) for i in range(hours))
  return [(t.astimezone(zone).isoformat() if utc else f"{t.astimezone(zone):%Y-%m-%d %H:%M}") for t in moments]


def test_summer_time_is_named_where_its_hours_are_missing_or_there_twice(tmp_path):
  path = tmp_path / "x.csv"
  save = lambda cells: path.write_text("date,a\n" + "".join(f"{cell},1\n" for cell in cells))
  for first, message in (
      (datetime.datetime(2024, 3, 30), r"left out \(2024-03-31 02:00:00\) has no value of a, perhaps because the clocks went"),
      (datetime.datetime(2024, 10, 26), "row 26 .* does not come after row 25 .* if the clocks went back there, .* in UTC")):
    save(local(40, first, False))
    with pytest.raises(UserError, match=message):
      table.read_csv(path, "date", ("a",)).checked("refuse")
    save(local(40, first, True))
    found = table.read_csv(path, "date", ("a",)).checked("refuse")
    assert len(found.times) == 40 and found.step == Step(HOUR)
  save(f"2024-{3 + (day > 31):02}-{(day - 1) % 31 + 1:02}T00:00+0{1 + (day > 31)}:00" for day in range(29, 36))
  with pytest.raises(UserError, match="row 4 .* of steps of 1 day after the first; .* an offset from UTC, which changes"):
    table.read_csv(path, "date", ("a",)).checked("refuse")


# --- Splits -----------------------------------------------------------------------------------------------


def of_extents(path, **fields):
  made = config(path, **fields)
  series = table.read_csv(path, "date", ("a",)).checked("refuse")
  return list(windows.extents(made, series).values())


@pytest.mark.parametrize("train, validation, test, want", [
    ("100", "40", "60", [(0, 100), (100, 140), (140, 200)]),
    ("0.5", "0.2", "0.3", [(0, 100), (100, 140), (140, 200)]),
    ("70%", "15%", "15%", [(0, 140), (140, 170), (170, 200)]),
    ("33.3%", "33.3%", "33.4%", [(0, 66), (66, 133), (133, 200)]),  # all rows, though no share is whole
    ("0.5", "40", "10%", [(0, 100), (100, 140), (140, 160)]),
    ("0.5", "", "50%", [(0, 100), (0, 0), (100, 200)]),
    ("2019-12-30", "2020-01-03 04:00", "2020-01-04 20:00", [(0, 100), (100, 140), (140, 200)]),
    ("2019-12-31", "2020-01-03 04:30", "", [(24, 101), (101, 200), (0, 0)]),
    ("", "", "100%", [(0, 0), (0, 0), (0, 200)]),
])
def test_splits_by_rows_shares_and_times(tmp_path, train, validation, test, want):
  assert of_extents(write(tmp_path / "x.csv"), train=train, validation=validation, test=test) == want


@pytest.mark.parametrize("fields, message", [
    ({"train": "0.7"}, "test='60': with those before it, these are 240 rows, but .* has 200; take fewer"),
    ({"train": "800.5"}, "train='800.5': give a number of rows, a share such as 0.7 or 70%, or the time of the first"),
    ({"train": "soon"}, "train='soon': give a number of rows"), ({"train": "-5"}, "train='-5': give a number"),
    ({"test": "1%"}, "test='1%': these are 2 of the rows of .*; give 4 rows or more"),
    ({"train": "5%"}, "window=12: with the horizon of 4 it is longer than the 10 rows"),
    ({"validation": "2020-01-01"}, "train='100': give the times of the first rows of all splits, .* or of none"),
    ({"train": "2019-12-30", "validation": "2020-01-04", "test": "2020-01-03"},
     "validation='2020-01-04': there is no row between it and the split that follows"),
    ({"train": "2019-12-30", "validation": "2020-01-04", "test": "2030-01-01"},
     "test='2030-01-01': lies after the last row of .*, 2020-01-07 07:00:00; give an earlier time"),
    ({"train": "2019-12-30 00:00Z", "validation": "2020-01-04", "test": ""}, "train='2019-12-30 00:00Z': has an offset from UTC, and the times of .* have none; drop it"),
])
def test_splits_that_do_not_fit_are_refused(tmp_path, fields, message):
  with pytest.raises(UserError, match="--config.data." + message):
    opened(config(write(tmp_path / "x.csv"), **fields))


def test_a_date_is_by_the_clock_of_the_file(tmp_path):
  path = write(tmp_path / "x.csv", form="%Y-%m-%dT%H:%M:%S+02:00")
  assert of_extents(path, train="2019-12-30", validation="2020-01-03 04:00", test="") == [(0, 100), (100, 200), (0, 0)]
  assert of_extents(path, train="2019-12-30", validation="2020-01-03T02:00:00Z", test="")[0] == (0, 100)


def test_plain_numbers_have_no_dates_and_no_calendar(tmp_path):
  path = tmp_path / "x.csv"
  path.write_text("date,a\n" + "".join(f"{i},{i % 7}\n" for i in range(200)))
  with pytest.raises(UserError, match="train='2020-01-01': .* has plain numbers for times; give a number of rows or"):
    of_extents(path, train="2020-01-01", validation="", test="")
  with pytest.raises(UserError, match="covariates=hour_of_day,day_of_week: .* plain numbers for times, which no calendar"):
    opened(config(path, channels=("a",)))
  data = windows.SeriesSet(config(path, channels=("a",), covariates=()))
  batch, _, _ = windows.encode([str(path)], data.config, data.normaliser())
  assert batch["host/time"].tolist() == [["200", "201", "202", "203"]]


def test_what_is_given_is_not_looked_for(tmp_path):
  made = config(write(tmp_path / "x.csv"))
  every = {"time", "channels", "missing", "covariates", "train", "validation", "test"}
  found, lines = windows.find(made, every)
  assert not found and len(lines) == 1
  assert lines[0].endswith("at steps of 1 hour; train 100 from 2019-12-30 00:00:00, validation 40 from "
                           "2020-01-03 04:00:00, test 60 from 2020-01-04 20:00:00")
  found, _ = windows.find(made, every - {"validation", "test"})
  assert found == {"validation": "50", "test": "50"}
  made.name = "temperatures"
  assert windows.find(made, set()) == ({}, [])


# --- The user's own ---------------------------------------------------------------------------------------

NORMALISER = windows.Normaliser(("a", "b"), np.array([5.0, 4.0]), np.array([3.0, 2.0]), Step(HOUR))


def test_the_users_series_are_forecast_from_their_end(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  made = config("other.csv")
  write(folder / "long.csv")
  write(folder / "short.csv", VALUES[:11])
  write(folder / "daily.csv", step=times.DAY)
  write(folder / "holes.csv", np.where(np.arange(200)[:, None] == 199, np.nan, VALUES))
  (folder / "notes.txt").write_text("no series")
  batch, names, skipped = windows.encode([str(folder)], made, NORMALISER)
  assert names == [str(folder / "long.csv")]
  assert [line.partition(": ")[2].partition(",")[0].partition(" (")[0] for line in skipped] == [
      "has steps of 1 day", "row 200", "has 11 rows"]
  np.testing.assert_allclose(batch["window"][0], (VALUES[-12:] - [5, 4]) / [3, 2], atol=1e-6)
  end = SECOND * int(START.replace(tzinfo=datetime.timezone.utc).timestamp()) + 199 * HOUR
  assert batch["host/time"][0].tolist() == [times.when(end + HOUR * i) for i in range(1, 5)]
  np.testing.assert_array_equal(
      batch["covariates"][0], windows.covariates(end + HOUR * np.arange(-11, 5), made.covariates))
  made.missing = "mask"
  batch, names, _ = windows.encode([str(folder / "holes.csv")], made, NORMALISER)
  np.testing.assert_array_equal(batch["window"][0, -1], batch["window"][0, -2])


def test_no_usable_series_gives_no_rows(tmp_path):
  path = write(tmp_path / "short.csv", VALUES[:11])
  _, names, skipped = windows.encode([str(path)], config("x.csv"), NORMALISER)
  assert not names and skipped == [f"{path}: has 11 rows, but the model needs a window of 12; give a longer series"]
  with pytest.raises(UserError, match="--input: there is no .*gone.csv"):
    windows.encode([str(tmp_path / "gone.csv")], config("x.csv"), NORMALISER)


def test_an_array_stands_in_place_of_a_file():
  made = config("x.csv")
  made.covariates = ()
  batch, names, skipped = windows.encode([VALUES, np.stack([VALUES, VALUES[5:]][:1])], made, NORMALISER)
  assert names == ["array 0", "array 1[0]"] and not skipped
  for window in batch["window"]:
    np.testing.assert_allclose(window, (VALUES[-12:] - [5, 4]) / [3, 2], atol=1e-6)
  assert batch["host/time"][0].tolist() == [f"1970-01-01 0{hour}:00:00" for hour in range(1, 5)]
  holes = VALUES.copy()
  holes[-1, 0] = np.nan
  _, names, skipped = windows.encode([VALUES[:11], VALUES[:, :1], holes], made, NORMALISER)
  assert not names
  assert [line.partition(", but")[0] for line in skipped] == [
      "array 0: has 11 rows", "array 1: float64 of shape (200, 1) is no series; give numbers [T, 2] or [n, T, 2], the "
      "channels being a, b", skipped[2]] and skipped[2].startswith("array 2: row 200")
  made.covariates = ("hour_of_day",)
  _, _, skipped = windows.encode([VALUES], made, NORMALISER)
  assert skipped == ["array 0: the model also reads the calendar (hour_of_day), which an array does not have; give a "
                     ".csv file"]


# --- Sets -------------------------------------------------------------------------------------------------


def test_the_embedded_temperatures(tmp_path, monkeypatch):
  from dljax.data.datasets.series import _temperatures_folder

  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  made = windows.default_config()
  with pytest.raises(UserError, match=r"a row that is left out \(2010-03-14 03:00:00\) has no value of seattle"):
    opened(made)
  made.missing = "mask"
  data = opened(made)
  assert data.train.num_examples == 5880 - 168 - 24 + 1 and data.evals["test"].num_examples == 1440 - 24 + 1
  test = whole_pass(data.evals["test"])
  assert times.when(test["host/time"][0]) == "2010-11-02 00:00:00"
  assert not np.isnan(test["horizon"]).any()
  normaliser = windows.Normaliser.from_assets(data.assets())
  last = test["horizon"][-1] * normaliser.std + normaliser.mean
  for c, file in enumerate(("seattle-temps.csv", "sf-temps.csv")):
    with open(_temperatures_folder() / file, newline="") as lines:
      rows = [float(row["temp"]) for row in csv.DictReader(lines)]
    np.testing.assert_allclose(last[:, c], rows[-24:], atol=1e-4)
  made.channels = ("seattle", "portland")
  with pytest.raises(UserError, match="data.channels: there is no 'portland'"):
    opened(made)


def test_a_set_that_is_no_series_is_refused(monkeypatch):
  digits = SimpleNamespace(features={"id": None, "image": None, "label": None})
  monkeypatch.setattr(sources, "open_dataset", lambda name: digits)
  with pytest.raises(UserError, match="data.name: digits is no time series, but has id, image, label; choose another"):
    opened(config("digits"))


@pytest.mark.parametrize("record, message", [
    ({"channels": [b"a", b"b", b"a"], "time": [0, 1], "values": [1.0] * 6}, "channels: set has 2 channels called 'a'"),
    ({"channels": [b"a", b"b"], "time": [0, 1], "values": [1.0] * 5}, "set has 5 values of 2 channels at 2 times"),
])
def test_a_set_whose_record_does_not_fit_is_refused(monkeypatch, record, message):
  made = SimpleNamespace(features=dict.fromkeys(record), records=lambda split: np.array([record]))
  monkeypatch.setattr(sources, "open_dataset", lambda name: made)
  with pytest.raises(UserError, match=message):
    opened(config("set"))


@pytest.fixture
def etth1(monkeypatch):
  """A small file in place of the real one."""
  from dljax.data.datasets.series import ETTH1_CHANNELS, ETTH1_URL, Etth1

  def make(folder):
    folder.mkdir()
    path = write(folder / "ETTh1.csv", np.arange(700).reshape(100, 7) / 8, names=("date", *ETTH1_CHANNELS))
    real = Etth1.url_infos[ETTH1_URL]
    monkeypatch.setattr(real, "checksum", hashlib.sha256(path.read_bytes()).hexdigest())
    return path

  return make


def test_etth1_from_a_file_at_hand(tmp_path, etth1, monkeypatch):
  etth1(tmp_path / "manual")
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  made = config("etth1", channels=("OT", "HUFL"), train=40, validation=20, test=40)
  with pytest.raises(UserError, match="etth1 is not prepared in .*; run `python -m dljax.data.prepare etth1 "):
    opened(made)
  prepare.prepare("etth1", tmp_path / "tfds", tmp_path / "manual")
  data = opened(made)
  rows = whole_pass(data.evals["test"])
  values = np.arange(700).reshape(100, 7)[:, [6, 0]] / 8
  normaliser = windows.Normaliser.from_assets(data.assets())
  np.testing.assert_allclose(rows["horizon"][-1] * normaliser.std + normaliser.mean, values[-4:], rtol=1e-5)


def test_another_file_than_etth1s_is_refused(tmp_path, etth1):
  path = etth1(tmp_path / "manual")
  path.write_text(path.read_text() + "\n")
  with pytest.raises(UserError, match="ETTh1.csv does not have TFDS's checksum; get it again from https://raw.github"):
    prepare.prepare("etth1", tmp_path / "tfds", tmp_path / "manual")
  assert sources.find("etth1", tmp_path / "tfds") is None
