"""Time series: which rows make up which window, what is fitted to which rows, calendars, and files with faults."""

import csv
import datetime
import hashlib
from types import SimpleNamespace

import numpy as np
import pytest

from dljax.data import prepare, sources
from dljax.data.series import table, windows
from dljax.errors import UserError
from tests.data.hosts import share

HOUR = 3600
START = datetime.datetime(2019, 12, 30)  # a Monday
VALUES = np.random.default_rng(0).normal(5, 3, (200, 2)).round(3)


def write(path, values=VALUES, *, step=HOUR, names=("date", "a", "b"), start=START, drop=(), form="%Y-%m-%d %H:%M:%S"):
  with open(path, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(names)
    for i, row in enumerate(values):
      if i not in drop:
        writer.writerow([(start + datetime.timedelta(seconds=i * step)).strftime(form),
                         *("" if np.isnan(v) else v for v in row)])
  return path


def config(path, **fields):
  made = windows.default_config()
  made.update({"name": str(path), "channels": ("a", "b"), "train": 100, "validation": 40, "test": 60, "window": 12,
               "horizon": 4, "covariates": ("hour_of_day", "day_of_week"), **fields})
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
    begun = START.replace(tzinfo=datetime.timezone.utc).timestamp()
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
                                 names=("date", "OT"))), "channels": ("OT",), "train": 12 * 30 * 24,
               "validation": 4 * 30 * 24, "test": 4 * 30 * 24, "window": 336, "horizon": 96})
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
  assert again.asset() == normaliser.asset() and normaliser.step == HOUR


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
  saved = windows.Normaliser(("a", "b"), np.array([1.0, 2.0]), np.array([10.0, 20.0]), HOUR)
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
  times = lambda *texts: np.array(texts, "datetime64[s]").astype(np.int64)
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
  times = rows["host/time"][:, None] + HOUR * np.arange(-12, 4)
  want = windows.covariates(times.ravel(), ("hour_of_day", "day_of_week")).reshape(-1, 16, 4)
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
  assert old.step == windows.DAY and table.when(old.times[0]) == "1950-01-01 00:00:00"
  np.testing.assert_array_equal(old.values[:, 0], [1.5, np.nan, 2])
  (tmp_path / "v.csv").write_text("date,a,x,x\n1969-12-31 23:59:58.500,+1.,x,x\n1969-12-31 23:59:59.5,-.5E1,x,x\n")
  same = table.read_csv(tmp_path / "v.csv", "date", ("a",))  # one fraction for all, and twins that are not read
  assert same.times.tolist() == [-2, -1] and same.values[:, 0].tolist() == [1, -5]


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
    ("date,a,b\n2020-01-01 00:00:00,1,2\n2020-01-01 00:00:00.5,1,2\n",
     "row 2: '2020-01-01 00:00:00.5' has another fraction of a second than row 1, '2020-01-01 00:00:00'; .*whole seconds"),
    ("date,a,b\n2020-01-01 00:00:00.0000001,1,2\n2020-01-01 00:00:01.0000002,1,2\n", "another fraction of a second"),
    ("date,a,b\n2020-01-01 00:00,1,2\n2020-01-01 01:00+00:00,1,2\n", "row 2: .* another kind of offset from UTC than"),
    ("date,a,b\n1577120112345,1,2\n", "row 1: '1577120112345' is no time"),
    ("date,a,b\n2020-01-01,1,2\n", "holds 1 rows, no series"),
    ("date,a,b\n2020-01-01,1,2\n2020-01-03,1,2\n2020-01-02,1,2\n",
     r"row 3 \(2020-01-02 00:00:00\) does not come after row 2 \(2020-01-03 00:00:00\); sort the rows"),
    ("date,a,b\n2020-01-01,1,2\n2020-01-02,1,2\n2020-01-02,1,2\n", "row 3 .* does not come after row 2"),
    ("date,a,b\n2020-01-01,1,2\n2020-01-02,1,2\n2020-01-03,1,2\n2020-01-03 07:00,1,2\n",
     "row 4 .* is not a whole number of steps of 1 day, 0:00:00 after the first; resample"),
    ("date,a,b\n2020-01-01,1,2\n2020-01-02,1,2\n2020-01-03,1,2\n2120-01-03,1,2\n",
     "there should be 36,527 rows, but there are 4; mend the times"),
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
    ({"horizon": 50}, "data.validation=40: give 50 rows or more"),
    ({"test": 3}, "data.test=3: give 4 rows or more"),
    ({"test": 61}, "data.test=61: with train and validation these are 201 rows, but .* has 200; take fewer"),
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


# --- The user's own ---------------------------------------------------------------------------------------

NORMALISER = windows.Normaliser(("a", "b"), np.array([5.0, 4.0]), np.array([3.0, 2.0]), HOUR)


def test_the_users_series_are_forecast_from_their_end(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  made = config("other.csv")
  write(folder / "long.csv")
  write(folder / "short.csv", VALUES[:11])
  write(folder / "daily.csv", step=windows.DAY)
  write(folder / "holes.csv", np.where(np.arange(200)[:, None] == 199, np.nan, VALUES))
  (folder / "notes.txt").write_text("no series")
  batch, names, skipped = windows.encode([str(folder)], made, NORMALISER)
  assert names == [str(folder / "long.csv")]
  assert [line.partition(": ")[2].partition(",")[0].partition(" (")[0] for line in skipped] == [
      "has steps of 1 day", "row 200", "has 11 rows"]
  np.testing.assert_allclose(batch["window"][0], (VALUES[-12:] - [5, 4]) / [3, 2], atol=1e-6)
  end = int(START.replace(tzinfo=datetime.timezone.utc).timestamp()) + 199 * HOUR
  np.testing.assert_array_equal(batch["time"][0] @ [windows.DAY, 1], end + HOUR * np.arange(1, 5))
  times = end + HOUR * np.arange(-11, 5)
  np.testing.assert_array_equal(batch["covariates"][0], windows.covariates(times, made.covariates))
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
  np.testing.assert_array_equal(batch["time"][0] @ [windows.DAY, 1], HOUR * np.arange(1, 5))
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
  assert table.when(test["host/time"][0]) == "2010-11-02 00:00:00"
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
