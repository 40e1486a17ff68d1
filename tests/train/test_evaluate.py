"""One pass over a split: every real row counts once, whatever the devices, and comes back in order."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dljax.tasks.base import Findings
from dljax.train.evaluate import Evaluator, Predictor, prefetch
from dljax.train.program import Program, RunOptions
from dljax.train.progress import Compilations
from tests.train import toys

ROOT = Path(__file__).parents[2]
COUNT = 37  # rows: two batches of 16 and one of 5


class _Collects(toys.Formula):
  """Notes the rows that a whole-set metric would see."""

  seen: list = []
  evaluate_reads = ("x", "host/row/")
  evaluate_draws = ("picture", "map")

  def predict(self, variables, batch, rng, context=None):
    found = super().predict(variables, batch, rng)
    return found | {"map": 2 * batch["picture"]} if "picture" in batch else found

  def evaluate(self, rows, sums, assets):
    rows = list(rows)
    self.seen[:] = rows
    count = float(sum(len(batch["x"]) for _, batch in rows))
    return Findings({"rows": count, **assets}, {"picture": "figure"}, {"table": [{"rows": count}]})


def _x(rows):
  return np.asarray(rows, np.float32) / 10


def _split(step):
  """Batch `step` of the rows 0 to COUNT - 1, padded with rubbish."""
  ids = np.arange(step * toys.BATCH_SIZE, (step + 1) * toys.BATCH_SIZE)
  real = ids < COUNT
  return {"x": np.where(real, _x(ids), 1e6).astype(np.float32), "mask": real.astype(np.float32),
          "picture": np.repeat(np.where(real, ids, -1).astype(np.float32)[:, None], 3, 1), "unread": real,
          "host/row/number": np.where(real, ids, -1), "host/other": real}


SPLIT = toys.Scripted(_split, num_batches=3, num_examples=COUNT)
TASK = _Collects(params={"w": 2.0}, rows=lambda params, batch, train, player: params["w"] * batch["x"]**2)
EXPERIMENT = toys.formula_experiment(TASK, SPLIT, {"test": SPLIT})
EXPECTED = np.mean(2 * _x(range(COUNT)).astype(np.float64)**2)


def _evaluator(mode, mesh, task=TASK):
  program = Program(EXPERIMENT, RunOptions(parallelism=mode, mesh=toys.MESHES[mesh]))
  return Evaluator(task, mode, program.mesh), program, program.init_state()


@pytest.mark.parametrize("say", [None, print])
def test_a_bar_is_shown_where_something_is_said(monkeypatch, say):
  hidden = []
  monkeypatch.setattr("tqdm.tqdm", lambda items, disable, **_: hidden.append(disable) or items)
  program = Program(EXPERIMENT, RunOptions(mesh=toys.MESHES["data:1"]))
  state = program.init_state()
  evaluator = Evaluator(TASK, "jit", program.mesh, compilations=Compilations(say))
  evaluator.sums(state.variables, state.rng, SPLIT, "test")
  assert hidden == [say is None]


MODES = pytest.mark.parametrize(
    "mode, mesh", [("jit", "data:1"), ("jit", "data:4"), ("jit", "data:2,fsdp:2"), ("pmap", "data:4")])


@MODES
def test_each_real_row_counts_once_and_comes_back_in_order(mode, mesh):
  evaluator, _, state = _evaluator(mode, mesh)
  found = evaluator.sums(state.variables, state.rng, SPLIT, "test")
  assert found == {"all_loss": pytest.approx(EXPECTED, rel=1e-6)}

  found = evaluator.full(state.variables, state.rng, SPLIT, "test", {"asset": 1.5})
  assert found.metrics == {"all_loss": pytest.approx(EXPECTED, rel=1e-6), "rows": COUNT, "asset": 1.5}
  assert (found.figures, found.tables) == ({"picture": "figure"}, {"table": [{"rows": COUNT}]})
  predictions, batches = zip(*TASK.seen)
  assert set(batches[0]) == {"mask", "x", "picture", "host/row/number"}  # nothing else crosses hosts
  assert [b["picture"].shape for b in batches] == [(16, 3), (16, 3), (5, 3)]
  np.testing.assert_array_equal(batches[2]["picture"][np.array([4, 0])], [[36] * 3, [32] * 3])
  assert [p["map"].shape for p in predictions] == [(16, 3), (16, 3), (5, 3)]
  assert not any(isinstance(p["map"], np.ndarray) for p in predictions)  # nor do large predictions
  np.testing.assert_array_equal(predictions[2]["map"][np.array([4, 0])], [[72] * 3, [64] * 3])
  np.testing.assert_array_equal(np.concatenate([b["host/row/number"] for b in batches]), np.arange(COUNT))
  losses = np.concatenate([p["loss"] for p in predictions])
  np.testing.assert_allclose(losses, 2 * _x(range(COUNT))**2, rtol=1e-6)


@MODES
@pytest.mark.parametrize("count", [1, 16, 21])
def test_any_number_of_rows_is_predicted(mode, mesh, count):
  _, program, state = _evaluator(mode, mesh)
  batch = {"x": _x(range(count)), "mask": np.ones(count, np.float32), "host/name": np.array(["n"] * count)}
  found = Predictor(EXPERIMENT, program, mode)(state, batch)
  np.testing.assert_allclose(found["loss"], 2 * _x(range(count))**2, rtol=1e-6)


def test_names_of_metrics_are_found_without_running_anything():
  evaluator, program, _ = _evaluator("jit", "data:1")
  abstract = program.abstract_state
  assert evaluator.metric_names(abstract.variables, abstract.rng, SPLIT) == ["all_loss"]


def test_sums_of_many_batches_lose_no_digits():
  """In float32, 1 added to 2^24 is lost."""
  batch = {"x": np.full(toys.BATCH_SIZE, 1000.0, np.float32), "mask": np.ones(toys.BATCH_SIZE, np.float32)}
  small = {**batch, "x": np.full(toys.BATCH_SIZE, 0.1, np.float32)}
  split = toys.Scripted(lambda step: small if step else batch, num_batches=40)
  evaluator, _, state = _evaluator("jit", "data:1")
  found = evaluator.sums(state.variables, state.rng, split, "test")
  assert found["all_loss"] == pytest.approx((2e6 + 39 * 2 * np.float64(np.float32(0.1))**2) / 40, rel=1e-9)


class _Fails(toys.Formula):
  """Whole-set metrics that cannot be computed."""

  def evaluate(self, rows, sums, assets):
    next(rows)
    raise ZeroDivisionError


def fail_in_sums():
  evaluator, _, state = _evaluator("jit", "data:1")
  wrong = {**_split(1), "mask": np.ones(3, np.float32)}  # loads, but does not compute
  split = toys.Scripted(lambda step: wrong if step else _split(0), num_batches=100)
  evaluator.sums(state.variables, state.rng, split, "test")


def fail_in_full():
  evaluator, _, state = _evaluator("jit", "data:1", _Fails(TASK.params, TASK.rows))
  evaluator.full(state.variables, state.rng, toys.Scripted(lambda _: _split(0), num_batches=100), "test", {})


@pytest.mark.parametrize("fail, error", [(fail_in_sums, "TypeError"), (fail_in_full, "ZeroDivisionError")])
def test_an_evaluation_that_fails_ends_the_process(fail, error):
  """It does, although the traceback keeps alive what was reading ahead."""
  program = f"from tests.train import test_evaluate; test_evaluate.{fail.__name__}()"
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
  assert done.returncode == 1 and error in done.stderr, done.stderr


# prefetch


def test_prefetch_keeps_the_order_and_works_ahead():
  loaded = []

  def load(step):
    loaded.append(step)
    return step * step

  steps = prefetch(load, range(7))
  assert next(steps) == 0
  deadline = time.monotonic() + 10
  while len(loaded) < 3 and time.monotonic() < deadline:
    time.sleep(0.01)
  assert loaded == [0, 1, 2]  # two ahead, no more
  assert list(steps) == [step * step for step in range(1, 7)]
  assert loaded == list(range(7))
  assert list(prefetch(load, range(0))) == []


def test_prefetch_hands_an_error_on_at_its_step():
  def load(step):
    if step == 2:
      raise OSError("disk on fire")
    return step

  steps = prefetch(load, range(5))
  assert (next(steps), next(steps)) == (0, 1)
  with pytest.raises(OSError, match="disk on fire"):
    next(steps)
  assert not _threads()


def test_prefetch_stops_its_thread_when_closed():
  steps = prefetch(lambda step: step, range(10**6))
  assert next(steps) == 0
  assert _threads()
  steps.close()
  assert not _threads()


def _threads():
  return [t for t in threading.enumerate() if t.name.startswith("prefetch") and t.is_alive()]
