"""Metrics of whole sets decide what is best; a sample is drawn by the seed; previews change nothing."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from dljax.data.pipeline import IndexedPipeline, InMemory
from dljax.errors import UserError
from dljax.tasks.base import MAX, MIN, Findings
from dljax.train.experiment import Inputs
from dljax.train.loop import fit
from dljax.train.program import RunOptions
from tests.train import toys

ONE = RunOptions(mesh=toys.MESHES["data:1"], progress=False)
COUNT, STEPS = 21, 8


@dataclasses.dataclass(frozen=True)
class Spread(toys.Formula):
  """Has a metric of the whole set: how far apart the predictions of the rows lie, and of which rows."""

  evaluate_reads = ("id",)

  @property
  def goals(self):
    return {"all_loss": MIN, "rows": MAX, "closeness": MAX, "fid": MIN}

  def evaluate(self, rows, sums, assets):
    losses, ids = zip(*((predicted["loss"], batch["id"]) for predicted, batch in rows))
    losses, ids = np.concatenate(losses), np.concatenate(ids)
    # The parameter walks from 0 through 2, where the rows' losses lie closest, to 4.
    return Findings({"rows": float(len(ids)), "closeness": -float(np.ptp(losses)), "fid": float(np.ptp(losses))},
                    tables={"ids": [{"id": int(i)} for i in ids]})


def _task():
  return Spread(params={"w": 0.0}, rows=lambda params, batch, train, player: (
      -params["w"] * batch["x"] / batch["x"] if train else (params["w"] - 2)**2 * batch["x"]))


def _experiment(size=toys.BATCH_SIZE, **fields):
  arrays = {"x": np.linspace(1, 2, COUNT, dtype=np.float32)}
  validation = IndexedPipeline(
      lambda _: InMemory(arrays), lambda examples, plan: examples.gather(plan, plan.rows),
      batch_size=size)
  train = toys.Scripted(lambda step: {"x": np.ones(toys.BATCH_SIZE, np.float32),
                                      "mask": np.ones(toys.BATCH_SIZE, np.float32)})
  fields = {"total_steps": STEPS, "log_every": 4, "eval_every": 1, "checkpoint_every": STEPS,
            "optimizer": {"learning_rate": 0.5}, **fields}
  experiment = toys.formula_experiment(_task(), train, {"validation": validation}, **fields)
  experiment.config.eval_batch_size = size
  return experiment


def _rows(workdir):
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {row["step"]: row for row in rows if row["split"] == "validation"}


@pytest.mark.parametrize("metric", ["closeness", "fid"])
def test_the_best_checkpoint_is_that_of_a_whole_sets_metric_by_its_goal(tmp_path, metric):
  fit(_experiment(monitor=f"validation/{metric}"), tmp_path, ONE)
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["checkpoint"] == 4 and result["metrics"]["validation"][metric] == 0
  assert all(metric in row for row in _rows(tmp_path).values())


def test_early_stopping_waits_for_a_whole_sets_metric(tmp_path):
  state = fit(_experiment(monitor="validation/fid", early_stopping_patience=2), tmp_path, ONE)
  assert int(state.step) == 6  # the best is step 4


def test_the_interval_of_full_evaluations_is_the_only_one_that_moves_the_tracker(tmp_path):
  fit(_experiment(monitor="validation/fid", full_eval_every=3), tmp_path, ONE)
  rows = _rows(tmp_path)
  assert [step for step, row in rows.items() if "fid" in row] == [3, 6, 8]  # and at the end
  assert set(rows) == set(range(1, STEPS + 1))
  assert json.loads((tmp_path / "result.json").read_text())["checkpoint"] == 3  # 0.5 from 2, as step 5 is


def test_a_monitor_that_is_no_metric_is_refused_by_the_nearest(tmp_path):
  with pytest.raises(UserError, match="--config.monitor: .* 'validation/closenes'; did you mean validation/close"):
    fit(_experiment(monitor="validation/closenes"), tmp_path / "run", ONE)
  assert not (tmp_path / "run").exists()


def test_a_sample_is_drawn_by_the_seed_and_the_sums_are_of_all(tmp_path):
  def ids(name, **fields):
    experiment = _experiment(**{"total_steps": 1, **fields})
    experiment.config.eval.examples = 5
    fit(experiment, tmp_path / name, ONE)
    found = json.loads((tmp_path / name / "result.json").read_text())["metrics"]["validation"]
    lines = (tmp_path / name / "tables" / "ids.csv").read_text().split()[1:]
    return found, [int(line) for line in lines]

  found, first = ids("a")
  assert found["rows"] == 5 and first == sorted(set(first)) and len(first) == 5
  whole = np.mean((0.5 - 2)**2 * np.linspace(1, 2, COUNT))
  assert found["all_loss"] == pytest.approx(whole, rel=1e-6)  # of all 21 examples
  assert ids("b")[1] == ids("c", size=4)[1] == first
  assert ids("d", seed=1)[1] != first


def _picture(value):
  file = io.BytesIO()
  Image.fromarray(np.full((4, 6), value, np.uint8)).save(file, "png")
  return ".png", file.getvalue()


def test_a_preview_is_drawn_at_every_evaluation_and_changes_nothing(tmp_path):
  batch = {"x": np.array([1, 2], np.float32), "mask": np.ones(2, np.float32), "id": np.arange(2, dtype=np.int32)}
  drawn = []

  def draw(inputs, predictions, assets):
    drawn.append((inputs.names, predictions["loss"].tolist()))
    return [_picture(int(10 * loss)) for loss in predictions["loss"]]

  plain = _experiment(eval_every=4)
  watched = dataclasses.replace(plain, preview=lambda: Inputs(batch, ["a", "b"]), draw=draw)
  for name, experiment in ("plain", plain), ("watched", watched):
    fit(experiment, tmp_path / name, ONE)
  pictures = tmp_path / "watched" / "figures" / "preview"
  assert {path.name for path in pictures.iterdir()} == {"4.png", "8.png"}
  assert drawn == [(["a", "b"], [0.0, 0.0]), (["a", "b"], [4.0, 8.0])]
  with Image.open(pictures / "8.png") as picture:
    assert {40, 80} <= set(np.unique(np.asarray(picture.convert("L"))).tolist())
  events = b"".join(path.read_bytes() for path in (tmp_path / "watched").glob("events*"))
  assert events.count(b"preview") == 2 and events.count(b"\x89PNG") == 2
  one, other = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("plain", "watched"))
  assert one["state_sha256"] == other["state_sha256"] and one["metrics"] == other["metrics"]
  assert not (tmp_path / "plain" / "figures" / "preview").exists()


def test_a_picture_that_cannot_be_drawn_ends_the_run(tmp_path):
  def draw(inputs, predictions, assets):
    raise ZeroDivisionError("in the drawing thread")

  batch = {"x": np.ones(1, np.float32), "mask": np.ones(1, np.float32), "id": np.zeros(1, np.int32)}
  experiment = dataclasses.replace(_experiment(), preview=lambda: Inputs(batch, ["a"]), draw=draw)
  with pytest.raises(ZeroDivisionError, match="drawing thread"):
    fit(experiment, tmp_path, ONE)
