"""From a config to a forecaster's experiment: training, evaluation and the user's own series, by the command line."""

import csv
import datetime
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from dljax.recipes import common, forecasting
from dljax.data import sources
from dljax.errors import UserError
from dljax.models import baselines
from dljax.train.experiment import Request
from dljax.train.state import parameter_count
from dljax.train.workdir import Workdir
from tests.command import refuse, run

SHORT = ["--config.total_steps=60", "--config.log_every=10", "--config.eval_every=30", "--config.batch_size=32",
         "--config.data.window=48", "--config.data.horizon=12", "--mesh=data:1"]


def get_config(preset):
  config = forecasting.config("forecaster", preset, data=preset, variant="dlinear", optimizer="adam")
  config.optimizer.learning_rate = 1e-2
  return config


def build(config):
  return forecasting.build(config, forecasting.baseline(config, common.dtype(config)))


EXPERIMENT = SimpleNamespace(get_config=get_config, build=build, resolve=forecasting.resolve, __file__=__file__,
                             PRESETS={preset: f"{preset}." for preset in forecasting.DATA})


@pytest.fixture(scope="module", autouse=True)
def data_dir(prepared):
  root = prepared("temperatures")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(root))
    yield root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The folder of a run with quantiles."""
  workdir = tmp_path_factory.mktemp("forecaster") / "run"
  outcome = run(EXPERIMENT, f"--workdir={workdir}", *SHORT, "--config.model.loss=pinball")
  assert outcome.status == 0, outcome
  return workdir


def read(workdir, name="result.json"):
  return json.loads((workdir / name).read_text())


@pytest.mark.parametrize("preset, count, windows", [("temperatures", 2 * 169 * 24, (168, 24)),
                                                    ("etth1", 64_704, (336, 96))])
def test_presets_build_without_data(preset, count, windows, monkeypatch):
  monkeypatch.setattr(sources, "open_dataset", lambda name: pytest.fail(f"opened {name}"))
  config = get_config(preset)
  experiment = build(config)
  shapes = {key: spec.shape[1:] for key, spec in experiment.data.batch_spec.items()}
  channels = len(config.data.channels)
  assert shapes == {"window": (windows[0], channels), "horizon": (windows[1], channels), "mask": (), "id": (),
                    "covariates": (sum(windows), 4)}
  state = jax.eval_shape(experiment.task.init, jax.random.key(0), experiment.data.batch_spec)
  assert parameter_count(state["params"]) == count


def test_the_config_reaches_the_model_and_the_task():
  config = get_config("temperatures")
  config.model.update({
      "kernel_size": 7, "dtype": "bfloat16", "remat": True, "loss": "pinball", "quantiles": (0.25, 0.5)})
  task = build(config).task
  assert task.quantiles == (0.25, 0.5)
  assert task.model == baselines.DLinear(
      horizon=24, kernel_size=7, num_quantiles=2, dtype=jax.numpy.bfloat16, remat=True)
  config.model.update({"variant": "seasonal_naive", "season": 12, "loss": "mse"})
  task = build(config).task
  assert task.quantiles == ()
  assert task.model == baselines.SeasonalNaive(horizon=24, season=12, dtype=jax.numpy.bfloat16, remat=True)


def test_a_run_learns_and_tells_of_its_errors(trained):
  rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
  losses = [row["loss"] for row in rows if row["split"] == "train"]
  assert losses[-1] < 0.5 * losses[0]
  test = read(trained)["metrics"]["test"]
  assert set(test) == {"loss", "mse", "mae", "coverage", "mse_in_units", "mae_in_units"}
  assert 0.1 < test["coverage"] < 1
  assert {path.name for path in (trained / "figures").iterdir()} == {"learning_curves.png", "forecasts.png"}
  with open(trained / "tables" / "channels.csv", newline="") as file:
    assert [row["channel"] for row in csv.DictReader(file)] == ["seattle", "san_francisco"]
  with open(trained / "tables" / "steps.csv", newline="") as file:
    assert len(list(csv.DictReader(file))) == 12
  normaliser = read(trained, "data/normaliser.json")
  assert normaliser["channels"] == ["seattle", "san_francisco"] and normaliser["step"] == "1 hour"


def test_goals_are_those_of_every_metric_of_an_evaluation(trained):
  task = build(Workdir(trained).read_config()).task
  assert set(read(trained)["metrics"]["validation"]) == set(task.goals)


def test_evaluation_gives_the_same_and_takes_the_saved_normaliser(trained):
  evaluate = ["--mode=eval", f"--workdir={trained}", "--mesh=data:1"]
  assert run(EXPERIMENT, *evaluate).status == 0
  same = read(trained, "evaluation.json")["metrics"]
  assert same == read(trained)["metrics"]
  # Other training rows have another mean and would be normalised by that.
  outcome = run(EXPERIMENT, *evaluate, "--config.data.train=4000", "--config.data.validation=3320")
  assert outcome.status == 0, outcome
  assert read(trained, "evaluation.json")["metrics"]["test"] == same["test"]


def write(path, hours, start=datetime.datetime(2010, 6, 1)):
  with open(path, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["date", "san_francisco", "seattle"])
    for hour in range(hours):
      wave = np.sin(2 * np.pi * hour / 24)
      writer.writerow([start + datetime.timedelta(hours=hour), 57 + 5 * wave, 60 + 8 * wave])
  return path


def test_the_users_series_are_forecast_in_their_units_at_their_times(trained, tmp_path):
  write(tmp_path / "long.csv", 480)
  write(tmp_path / "short.csv", 20)
  (tmp_path / "broken.csv").write_text("date;seattle\n")
  output = tmp_path / "out.jsonl"
  outcome = run(EXPERIMENT, "--mode=predict", f"--workdir={trained}", f"--input={tmp_path}", f"--output={output}")
  assert outcome.status == 1, outcome  # some were skipped
  assert "short.csv: has 20 rows, but the model needs a window of 48" in outcome.err
  assert "broken.csv: has one column, 'date;seattle', if the values are separated by ','; --config" in outcome.err
  row, = map(json.loads, output.read_text().splitlines())
  assert (row["first"], row["last"]) == ("2010-06-21 00:00:00", "2010-06-21 11:00:00")
  assert list(row["forecast"]) == ["seattle", "san_francisco"]
  found = np.array([list(row[name]["seattle"].values()) for name in ("low", "forecast", "high")])
  assert (np.abs(found[1] - (60 + 8 * np.sin(2 * np.pi * np.arange(12) / 24))) < 6).all()
  assert (found[0] < found[2]).mean() > 0.9
  folder = tmp_path / "pictures"
  outcome = run(EXPERIMENT, "--mode=predict", f"--workdir={trained}", f"--input={tmp_path / 'long.csv'}",
                f"--output={folder}")
  assert outcome.status == 0, outcome
  with Image.open(folder / "long.png") as picture:
    assert min(picture.size) > 200


def test_no_usable_series_is_bad_input(trained, tmp_path):
  path = write(tmp_path / "short.csv", 20)
  predict = lambda path: refuse(EXPERIMENT, "--mode=predict", f"--workdir={trained}", f"--input={path}")
  assert predict(path) == f"--input: {path}: has 20 rows, but the model needs a window of 48; give a longer series"
  assert predict(tmp_path / "gone.csv").startswith(f"--input: there is no {tmp_path / 'gone.csv'}")


def test_training_on_the_users_own_series(tmp_path):
  path = write(tmp_path / "mine.csv", 480)
  mine = [f"--config.data.name={path}", "--config.data.channels=seattle", "--config.data.train=300",
          "--config.data.validation=80", "--config.data.test=100", f"--workdir={tmp_path / 'run'}", *SHORT,
          "--config.data.missing=refuse"]
  outcome = run(EXPERIMENT, *mine, "--config.model.variant=seasonal_naive", "--config.total_steps=1")
  assert outcome.status == 0, outcome
  result = read(tmp_path / "run")
  assert result["params"] == 0 and result["metrics"]["test"]["mae"] < 1e-5  # a wave that repeats itself
  longer = refuse(EXPERIMENT, *mine[:-1], "--config.data.window=290")
  assert longer.startswith("--config.data.window=290: with the horizon of 12 it is longer than the 300 rows")


def test_a_file_alone_is_enough_to_train_evaluate_and_forecast(tmp_path):
  """A German table of months: what it decides is found once, and is not looked for again."""
  path, output = tmp_path / "absatz.csv", tmp_path / "out.jsonl"
  months = [f"01.{month:02}.{year}" for year in range(2000, 2010) for month in range(1, 13)]
  path.write_text("Monat;Nord;Region;Süd\n" + "".join(
      f"{month};{i % 12},5;N;{(i + 3) % 12}\n" for i, month in enumerate(months)), encoding="utf-8-sig")
  workdir = tmp_path / "run"
  mine = [f"--config.data.name={path}", "--config.data.delimiter=;", "--config.data.decimal=,",
          "--config.data.window=12", "--config.data.horizon=6", "--config.model.variant=seasonal_naive",
          "--config.model.season=12", "--config.total_steps=1", "--config.batch_size=16", f"--workdir={workdir}",
          "--mesh=data:1", "--config.data.validation=2007-01-01", "--config.data.test=2008-07-01"]
  outcome = run(EXPERIMENT, *mine)
  assert outcome.status == 0, outcome
  assert outcome.out.startswith(
      f"left out Region (no numbers)\n{path}: 120 rows from 01.01.2000 to 01.12.2009, at steps of 1 month; "
      "train 84 from 01.01.2000, validation 18 from 01.01.2007, test 18 from 01.07.2008\n"
      "found data.time=Monat\nfound data.channels=Nord,Süd\nfound data.missing=refuse\n"
      "found data.covariates=day_of_year\nfound data.train=2000-01-01 00:00:00\n"), outcome.out
  assert read(workdir)["metrics"]["test"]["mae"] < 1e-5 and read(workdir)["data"] == str(path)
  other = tmp_path / "other.csv"
  other.write_text(path.read_text().replace("\n", "\r\n") + "\n\n")  # the same rows
  assert run(EXPERIMENT, "--mode=eval", f"--workdir={workdir}", "--mesh=data:1", f"--config.data.name={other}",
             "--config.data.train=", "--config.data.validation=", "--config.data.test=100%").status == 0
  metrics = read(workdir, "evaluation.json")["metrics"]
  assert list(metrics) == ["test"] and metrics["test"]["mae"] < 1e-5
  path.unlink()
  outcome = run(EXPERIMENT, "--mode=predict", f"--workdir={workdir}", f"--input={other}", f"--output={output}")
  assert outcome.status == 0, outcome
  row, = map(json.loads, output.read_text().splitlines())
  assert list(row["forecast"]["Nord"]) == [f"01.{month:02}.2010" for month in range(1, 7)]
  np.testing.assert_allclose(list(row["forecast"]["Nord"].values()), np.arange(6) + 0.5, atol=1e-5)
  assert refuse(EXPERIMENT, *mine, "--config.total_steps=2").startswith(f"{path}: cannot be read")
  assert "--config.data.channels" in refuse(EXPERIMENT, *mine, "--dry_run", f"--workdir={tmp_path / 'no'}")
  dry = run(EXPERIMENT, *mine, "--dry_run", f"--workdir={tmp_path / 'no'}", "--config.data.channels=Nord,Süd")
  assert dry.status == 0 and not (tmp_path / "no").exists(), dry


@pytest.mark.parametrize("arguments, message", [
    (["--config.model.variant=lstm"], "--config.model.variant: there is no 'lstm'"),
    (["--config.model.loss=huber"], "--config.model.loss: there is no 'huber'"),
    (["--config.model.loss=pinball", "--config.model.quantiles=0.2,0.8"],
     "--config.model.quantiles=0.2,0.8: the median"),
    (["--config.model.loss=pinball", "--config.model.quantiles="], "--config.model.quantiles: name those"),
    (["--config.model.variant=seasonal_naive", "--config.model.season=500"], "--config.model.season=500: must be"),
    (["--config.data.name=no.csv"], "--config.data.name=no.csv: there is no such file; name a .csv file, or"),
    (["--preset=etth1"], "--config.data.name: etth1 is not prepared"),
])
def test_bad_input_ends_in_one_line(arguments, message, tmp_path):
  assert refuse(EXPERIMENT, f"--workdir={tmp_path / 'run'}", "--mesh=data:1", *arguments).startswith(message)


def test_a_run_without_its_normaliser_is_refused(trained, tmp_path):
  experiment = build(get_config("temperatures"))
  with pytest.raises(UserError, match="data/normaliser.json is missing there; restore it"):
    experiment.read(Request(paths=[str(write(tmp_path / "long.csv", 480))]), {})


def test_etth1_has_the_literatures_months():
  """12, 4 and 4 months of 30 days, hour by hour (Zhou et al. 2021)."""
  data = get_config("etth1").data
  assert (data.train, data.validation, data.test) == ("8640", "2880", "2880")
