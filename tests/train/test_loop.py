"""fit: what it logs, saves and decides, and that being interrupted changes none of it."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest

from dljax import report
from dljax.data.image import labelled
from dljax.data.pipeline import IndexedPipeline, InMemory
from dljax.data.text import corpus
from dljax.errors import STOPS, Preempted, RunError, UserError
from dljax.train import checkpoint, loop, metrics, monitor
from dljax.train.checkpoint import Checkpointer
from dljax.train.metrics import Diverged
from dljax.train.preview import Preview
from dljax.train.program import Program, RunOptions
from dljax.train.state import state_sha256
from dljax.train.workdir import Workdir
from tests.train import toys

OPTIONS = RunOptions(mesh=toys.MESHES["data:1"], progress=False)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
  monkeypatch.setattr(report, "save", lambda figure, path, title="": path.touch())


def _batch(step: int = 0) -> dict[str, np.ndarray]:
  draw = np.random.default_rng(step)
  return {"x": draw.normal(1, 0.1, toys.BATCH_SIZE).astype(np.float32), "mask": toys.uneven_mask(step)}


def _slope(params, batch, train, player):
  """Training moves w up without end; evaluation wants it near 3."""
  return -params["w"] * batch["x"] if train else (params["w"] - 3)**2 * batch["x"] / batch["x"]


def _experiment(train=_batch, task=toys.Formula(params={"w": 0.0}, rows=_slope), **fields):
  evals = {split: toys.Scripted(_batch) for split in ("validation", "test")}
  fields = {"total_steps": 40, "log_every": 3, "eval_every": 2, "checkpoint_every": 5, "ema_decay": 0.0,
            "monitor": "validation/all_loss", **fields}
  fields["optimizer"] = {"learning_rate": 0.25, **fields.get("optimizer", {})}
  return toys.formula_experiment(task, toys.Scripted(train), evals, **fields)


def _interrupted(experiment, step: int):
  """`experiment`, sent a SIGTERM about when `step` is trained."""
  def batch(wanted):
    if wanted == step:
      os.kill(os.getpid(), signal.SIGTERM)
    return _batch(wanted)

  return toys.with_data(experiment, train=toys.Scripted(batch))


def _rows(folder, split=None):
  """metrics.jsonl without what depends on time."""
  rows = [row for row in report.read_metrics(folder / "metrics.jsonl") if split in (None, row["split"])]
  return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def _result(folder):
  result = json.loads((folder / "result.json").read_text())
  return {k: v for k, v in result.items() if "second" not in k and k not in ("run", "sha256")}


def _host(folder):
  return {k: v for k, v in Checkpointer(folder / "checkpoints").host().items()
          if k not in ("seconds", "metrics")}


def _steps(folder):
  return Checkpointer(folder / "checkpoints").steps()


# What is logged and kept


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory):
  """A run that finds its best at step 12, halves the learning rate at 16 and 20, and then gives up."""
  experiment = _experiment(
      early_stopping_patience=4, optimizer={"plateau_factor": 0.5, "plateau_patience": 2})
  folder = tmp_path_factory.mktemp("early") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, "save", lambda figure, path, title="": path.touch())
    state = loop.fit(experiment, folder, OPTIONS)
  return experiment, folder, state


def test_early_stopping_plateau_and_the_best_checkpoint(stopped_early):
  _, folder, state = stopped_early
  validation = {row["step"]: row["all_loss"] for row in _rows(folder, "validation")}
  assert list(validation) == list(range(2, 21, 2))
  assert min(validation, key=validation.get) == 12
  assert int(state.step) == 20
  rates = {row["step"]: row["learning_rate"] for row in _rows(folder, "train")}
  assert rates == {step: 0.25 if step <= 16 else 0.125 for step in range(3, 20, 3)}
  tracker = _host(folder)["tracker"]
  best = pytest.approx(validation[12])
  assert tracker == {"best_value": best, "best_step": 12, "reference": best, "stale": 4, "plateau_stale": 0,
                     "lr_scale": 0.25}
  assert _steps(folder) == [12, 15, 20]  # the best, and the last two

  result = _result(folder)
  assert (result["steps"], result["checkpoint"]) == (20, 12)
  assert result["metrics"]["validation"]["all_loss"] == pytest.approx(validation[12])
  assert result["metrics"]["test"]["all_loss"] == pytest.approx(validation[12])
  assert result["state_sha256"] == state_sha256(state)


def test_a_finished_run_is_only_restored(stopped_early):
  experiment, folder, state = stopped_early
  times = lambda: {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
  before = times()
  again = loop.fit(experiment, folder, OPTIONS)
  assert state_sha256(again) == state_sha256(state)
  assert times() == before


def test_a_run_that_another_finished_before_the_lock_was_had_is_not_begun_again(stopped_early, tmp_path, monkeypatch):
  experiment, folder, state = stopped_early
  acquire = Workdir.acquire

  def late(self, *arguments):
    shutil.copytree(folder, self.path)
    acquire(self, *arguments)

  monkeypatch.setattr(Workdir, "acquire", late)
  again = loop.fit(experiment, tmp_path / "auto", OPTIONS)
  assert state_sha256(again) == state_sha256(state)
  for name, other, resume, words in (("never", experiment, "never", "--resume=never: .* holds a run"),
                                     ("seed", _experiment(seed=3), "auto", "different config: .*seed is 0 there and 3")):
    with pytest.raises(UserError, match=words):
      loop.fit(other, tmp_path / name, dataclasses.replace(OPTIONS, resume=resume))
    assert _result(tmp_path / name) == _result(folder)
    acquire(Workdir(tmp_path / name))  # the lock was released


def test_each_logged_step_stands_there_once_and_the_last_always(tmp_path):
  experiment = _experiment(total_steps=7, eval_every=4)
  loop.fit(experiment, tmp_path, OPTIONS)
  assert [row["step"] for row in _rows(tmp_path, "train")] == [3, 6, 7]
  assert [row["step"] for row in _rows(tmp_path, "validation")] == [4, 7]
  assert _rows(tmp_path, "test") == []  # that split is for the end
  for row in _rows(tmp_path, "train"):
    assert set(row) == {
        "step", "split", "all_loss", "loss", "learning_rate", "gradient_norm", "parameter_norm"}
  # And a longer run goes on from there.
  longer = _experiment(total_steps=9, eval_every=4)
  assert int(loop.fit(longer, tmp_path, OPTIONS).step) == 9
  assert [row["step"] for row in _rows(tmp_path, "train")] == [3, 6, 7, 9]
  assert [row["step"] for row in _rows(tmp_path, "validation")] == [4, 7, 8, 9]
  with pytest.raises(UserError, match="total_steps=5.*has done 9 steps already"):
    loop.fit(_experiment(total_steps=5), tmp_path, OPTIONS)


def test_data_that_fit_opened_is_closed_and_other_stays_open(tmp_path):
  def pipeline(train):
    finish = lambda examples, plan: {**examples.gather(plan, plan.rows), "mask": toys.uneven_mask(plan.step)}
    return IndexedPipeline(lambda _: InMemory({"x": np.ones(toys.BATCH_SIZE, np.float32)}), finish,
                           batch_size=toys.BATCH_SIZE, train=train)

  experiment = toys.with_data(
      _experiment(total_steps=2), train=pipeline(True), evals={"validation": pipeline(False), "test": pipeline(False)})
  experiment.data.evals["test"].open()
  loop.fit(experiment, tmp_path, OPTIONS)
  experiment.data.evals["test"].batch(0)
  for closed in (experiment.data.train, experiment.data.evals["validation"]):
    with pytest.raises(RuntimeError, match="open"):
      closed.batch(0)


# Being interrupted changes nothing


class _Opened(toys.Scripted):
  """Batches of a script that notes when it is opened."""

  def __init__(self, order):
    super().__init__(_batch)
    self._order = order

  def open(self, rows=None):
    self._order.append("opened")
    return super().open(rows)


def _text(folder):
  config = corpus.default_config()
  config.file = str(folder / "play.txt")
  return corpus.TextSet(config)


def _pictures(folder, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
  config = labelled.default_config()
  config.name = "digits/stratified"
  return labelled.ImageSet(config)


@pytest.mark.parametrize("kind", ["text", "set"])
def test_a_run_is_not_resumed_on_other_data(kind, prepared, tmp_path, monkeypatch):
  here, there = tmp_path / "here", tmp_path / "there"
  if kind == "text":
    here.mkdir()
    (here / "play.txt").write_text("Speak the speech\n")
  else:
    part = "digits/stratified"  # the rest of the folder other workers may be writing
    shutil.copytree(prepared(part) / part, here / part)
    shutil.copytree(here, there)

  def fit(folder):
    order = []
    data = _text(folder) if kind == "text" else _pictures(folder, monkeypatch)
    real = data.pipelines(batch_size=8, eval_batch_size=8, seed=0)

    def fingerprint():
      order.append("asked")
      return real.fingerprint()

    experiment = toys.with_data(
        _experiment(total_steps=2), train=_Opened(order), name=real.name, fingerprint=fingerprint)
    try:
      return loop.fit(experiment, tmp_path / "run", OPTIONS)
    finally:
      assert order[:2] == ["opened", "asked"]

  fit(here)
  config = tmp_path / "run" / "config.json"
  old = json.loads(config.read_text())["fingerprint"]
  if kind == "text":
    with (here / "play.txt").open("a") as play:
      play.write("I pray you\n")
  else:
    fit(there)  # the same set in another --data_dir is the same data
    info, = here.glob("digits/stratified/*/dataset_info.json")
    info.write_text(info.read_text().replace('"1293"', '"1292"'))
  before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
  with pytest.raises(UserError, match="restore the old data, or name another --workdir$") as error:
    fit(here)
  assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
  message = str(error.value)
  assert repr(old) in message and message.count("\n") == 0
  new = {"text": "28 bytes, SHA-256 ", "set": "train 1292"}[kind]
  name = {"text": str(here / "play.txt"), "set": "digits/stratified"}[kind]
  assert new in message and new not in old and f"the fingerprint of {name} is" in message


def test_a_run_that_is_interrupted_often_is_the_same_run(stopped_early, tmp_path):
  experiment, reference, _ = stopped_early
  for step in (3, 13, 17):  # before the best; beside it; between two plateaus
    with pytest.raises(Preempted):
      loop.fit(_interrupted(experiment, step), tmp_path, OPTIONS)
  assert not (tmp_path / "result.json").exists()
  loop.fit(experiment, tmp_path, OPTIONS)
  assert _rows(tmp_path) == _rows(reference)
  assert _result(tmp_path) == _result(reference)
  assert _host(tmp_path) == _host(reference)
  assert {12, 20} <= set(_steps(tmp_path))


def _stop():
  os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_within_an_evaluation_or_the_report_leaves_the_rest_to_the_next_call(
    stopped_early, tmp_path, monkeypatch):
  experiment, reference, _ = stopped_early
  evaluated, find, save = monitor.Monitor.evaluate, loop.evaluate, Checkpointer.save

  def stop_in(where):
    def at(place, call):
      def made(*args):
        if place == where:
          _stop()
        return call(*args)

      return made

    patch.setattr(monitor.Monitor, "evaluate", lambda self, state, step, writer: at(
        f"evaluation {step}", evaluated)(self, state, step, writer))
    patch.setattr(Checkpointer, "save", lambda self, step, *args: at(
        f"save {step}", save)(self, step, *args))
    patch.setattr(loop, "evaluate", at("report", find))
    patch.setattr(report, "save", at("pictures", lambda figure, path, title="": path.touch()))

  # 10: the best so far; 12: the best of all; 20: where training ends.
  for where, line in [("evaluation 10", "after step 10;"), ("evaluation 12", "after step 12;"),
                      ("evaluation 12", "the last checkpoint"), ("save 15", "after step 16;"),
                      ("evaluation 20", "after step 20;"), ("report", "stopped"), ("pictures", "stopped")]:
    with monkeypatch.context() as patch, pytest.raises(Preempted, match=line):
      stop_in(where)
      loop.fit(experiment, tmp_path, OPTIONS)
    assert not (tmp_path / "result.json").exists()
  loop.fit(experiment, tmp_path, OPTIONS)
  assert _rows(tmp_path) == _rows(reference)
  assert _result(tmp_path) == _result(reference)
  assert _host(tmp_path) == _host(reference)  # by which the best checkpoint is found
  assert {12, 20} <= set(_steps(tmp_path))


def test_a_signal_in_the_last_steps_save_is_not_lost(tmp_path, monkeypatch):
  experiment = _experiment(total_steps=5, monitor="", eval_every=0)
  save = Checkpointer.save

  def stopped(self, step, *args):
    save(self, step, *args)
    _stop()

  with monkeypatch.context() as patch, pytest.raises(Preempted, match="after the last step, 5;"):
    patch.setattr(Checkpointer, "save", stopped)
    loop.fit(experiment, tmp_path, OPTIONS)
  assert not (tmp_path / "result.json").exists()
  assert int(loop.fit(experiment, tmp_path, OPTIONS).step) == 5
  assert _result(tmp_path)["steps"] == 5


def test_an_evaluation_ends_at_the_batch_in_which_the_signal_comes(tmp_path):
  asked = []

  def batch(step):
    asked.append(step)
    if step == 3:
      _stop()
    return _batch(step)

  evals = {"validation": toys.Scripted(batch, num_batches=50)}
  experiment = toys.with_data(_experiment(total_steps=4, eval_every=2, monitor=""), evals=evals)
  with pytest.raises(Preempted, match="after step 2;"):
    loop.fit(experiment, tmp_path, OPTIONS)
  assert max(asked) <= 7  # some are read in advance
  assert _steps(tmp_path) == [2] and _host(tmp_path)["left"] == "evaluation"


def test_a_signal_before_the_preview_leaves_the_preview_alone(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(Preview, "draw", lambda self, step, state: drawn.append(step))
  write = metrics.MetricWriter.write
  experiment = _experiment(total_steps=4, monitor="")

  def stopped(self, step, split, values):
    write(self, step, split, values)
    if split == "validation" and step == 2:
      _stop()

  with monkeypatch.context() as patch, pytest.raises(Preempted, match="after step 2;"):
    patch.setattr(metrics.MetricWriter, "write", stopped)
    loop.fit(experiment, tmp_path, OPTIONS)
  assert drawn == []
  loop.fit(experiment, tmp_path, OPTIONS)
  assert drawn == [2, 4]
  assert [row["step"] for row in _rows(tmp_path, "validation")] == [2, 4]


def test_until_the_first_step_is_done_a_signal_ends_the_run_at_once(tmp_path, monkeypatch):
  def compiled(self, *args):
    _stop()
    raise AssertionError("the signal came to nothing")

  monkeypatch.setattr(Program, "init_state", compiled)
  with pytest.raises(Preempted):
    loop.fit(_experiment(total_steps=2), tmp_path, OPTIONS)
  assert _steps(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_are_taken_as_sigterm(tmp_path, number):
  def batch(wanted):
    if wanted == 3:
      os.kill(os.getpid(), number)
    return _batch(wanted)

  with pytest.raises(Preempted, match=r"stopped after step \d;"):
    loop.fit(_experiment(batch, total_steps=12, monitor="", eval_every=0), tmp_path, OPTIONS)


def test_a_run_that_is_cut_off_in_its_report_does_not_train_on(stopped_early, tmp_path):
  experiment, reference, _ = stopped_early

  class CutOff(toys.Formula):
    def evaluate(self, rows, sums, assets):
      raise KeyboardInterrupt

  broken = dataclasses.replace(experiment, task=CutOff(params={"w": 0.0}, rows=_slope))
  with pytest.raises(KeyboardInterrupt):
    loop.fit(broken, tmp_path, OPTIONS)
  loop.fit(experiment, tmp_path, OPTIONS)
  assert _rows(tmp_path) == _rows(reference)
  assert _result(tmp_path) == _result(reference)


def test_handlers_and_the_lock_are_given_back(tmp_path):
  handlers = [signal.getsignal(s) for s in STOPS]
  experiment = _experiment(total_steps=12, monitor="")
  with pytest.raises(Preempted, match="the same command continues"):
    loop.fit(_interrupted(experiment, 5), tmp_path, OPTIONS)
  assert [signal.getsignal(s) for s in STOPS] == handlers
  assert int(loop.fit(experiment, tmp_path, OPTIONS).step) == 12


# A run that fails


def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
  failing = threading.Event()

  write = checkpoint.durable.write

  def full(path, data):
    if path.name != checkpoint.MANIFEST:
      return write(path, data)
    failing.set()
    raise OSError(28, "No space left on device", str(path))

  def batch(step):
    if step == 12:  # by then the save of step 10 has failed
      assert failing.wait(30)
      time.sleep(0.2)
    return _batch(step)

  monkeypatch.setattr(checkpoint.durable, "write", full)
  experiment = _experiment(batch, log_every=1, eval_every=100, checkpoint_every=10, monitor="")
  with pytest.raises(checkpoint.CheckpointError, match="checkpoint 10 in .* was not saved: .*No space left on device"):
    loop.fit(experiment, tmp_path, OPTIONS)
  assert 10 < _rows(tmp_path)[-1]["step"] <= 13


def test_a_result_is_written_only_once_the_last_save_is_on_disk(tmp_path, monkeypatch):
  write = checkpoint.durable.write

  def full(path, data):
    if path.parts[-2:] == ("10", checkpoint.MANIFEST):
      raise OSError(28, "No space left on device", str(path))
    write(path, data)

  experiment = _experiment(total_steps=10, eval_every=100, monitor="")
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.durable, "write", full)
    with pytest.raises(checkpoint.CheckpointError, match="checkpoint 10 in .* was not saved: No space left"):
      loop.fit(experiment, tmp_path, OPTIONS)
  assert not (tmp_path / "result.json").exists() and _steps(tmp_path) == [5]
  loop.fit(experiment, tmp_path, OPTIONS)
  assert _result(tmp_path)["checkpoint"] == 10 and _steps(tmp_path) == [5, 10]


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_diverging_run_says_where_and_leaves_the_good_checkpoint(tmp_path, log_every):
  def poisoned(step):
    batch = _batch(step)
    batch["x"][0] = np.nan if step == 7 else batch["x"][0]
    return {**batch, "mask": np.ones(toys.BATCH_SIZE, np.float32)}

  experiment = _experiment(poisoned, log_every=log_every, eval_every=100)
  with pytest.raises(Diverged, match="step 8 is not finite"):
    loop.fit(experiment, tmp_path, OPTIONS)
  assert _steps(tmp_path) == [5]
  assert all(row["step"] < 8 and np.isfinite(row["loss"]) for row in _rows(tmp_path))
  assert not (tmp_path / "result.json").exists()

  expected = toys.train(experiment, 5, mesh="data:1").state
  with Checkpointer(tmp_path / "checkpoints") as checkpointer:
    restored = checkpointer.restore(Program(experiment, OPTIONS).abstract_state)
  assert state_sha256(restored.state) == state_sha256(expected)
  mended = toys.with_data(experiment, train=toys.Scripted(_batch))
  assert int(loop.fit(mended, tmp_path, OPTIONS).step) == 40


# Bad input, before anything is written


def test_a_monitor_that_nothing_gives_is_refused(tmp_path):
  for monitor in ("validation/accuracy", "valid/all_loss", "all_loss"):
    with pytest.raises(UserError, match="validation/all_loss"):
      loop.fit(_experiment(monitor=monitor), tmp_path / "run", OPTIONS)
  assert not (tmp_path / "run").exists()


def test_damaged_metrics_are_refused_and_the_result_stays(tmp_path):
  loop.fit(_experiment(total_steps=3, monitor=""), tmp_path, OPTIONS)
  path = tmp_path / "metrics.jsonl"
  path.write_text("nonsense\n" + path.read_text())
  with pytest.raises(UserError, match="metrics.jsonl was damaged or edited"):
    loop.fit(_experiment(total_steps=5, monitor=""), tmp_path, OPTIONS)
  assert _result(tmp_path)["steps"] == json.loads((tmp_path / "config.json").read_text())["config"]["total_steps"] == 3


def test_a_run_is_not_continued_with_an_edited_config(tmp_path):
  loop.fit(_experiment(total_steps=3, monitor=""), tmp_path, OPTIONS)
  noted = json.loads((tmp_path / "config.json").read_text())
  noted["config"]["optimizer"]["learning_rate"] = 0.125
  (tmp_path / "config.json").write_text(json.dumps({**noted, "sha256": ""}))
  before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
  edited = _experiment(total_steps=5, monitor="", optimizer={"learning_rate": 0.125})
  with pytest.raises(UserError, match="checkpoint 3 in .* was trained with another config: optimizer.learning_rate is "
                                      "0.25 there and 0.125 here; undo the edit"):
    loop.fit(edited, tmp_path, OPTIONS)
  assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("change", [
    lambda run: run.rename(run.parent / "moved"), shutil.rmtree,
    lambda run: (run.rename(run.parent / "moved"), shutil.copytree(run.parent / "moved", run))])
def test_a_workdir_that_is_moved_ends_the_run_at_the_next_log(tmp_path, change):
  run, read = tmp_path / "run", []

  def batch(step):
    if step == 8:
      change(run)
    read.append(step)
    return _batch(step)

  with pytest.raises(RunError, match="--workdir=.*was moved, deleted or replaced"):
    loop.fit(_experiment(batch, total_steps=1000, log_every=2, checkpoint_every=500, monitor=""), run, OPTIONS)
  assert max(read) < 40 and not (run / "checkpoints").exists()


@pytest.mark.parametrize("schedule, said", [("cosine", True), ("constant", False)])
def test_a_learning_rate_that_jumps_with_the_length_is_told(tmp_path, capsys, schedule, said):
  fields = {"monitor": "", "optimizer": {"schedule": schedule, "learning_rate": 0.1}}
  loop.fit(_experiment(total_steps=4, **fields), tmp_path, OPTIONS)
  loop.fit(_experiment(total_steps=8, **fields), tmp_path, OPTIONS)
  line = ("warning: with total_steps=8 instead of 4 the schedule moves the learning rate at step 4 from 0 to "
          "0.05\n")
  assert (line in capsys.readouterr().err) == said


def test_must_resume_wants_a_checkpoint(tmp_path):
  must = dataclasses.replace(OPTIONS, resume="must")
  with pytest.raises(UserError, match="--resume=must"):
    loop.fit(_experiment(), tmp_path / "run", must)
  assert not (tmp_path / "run").exists()
  experiment = _experiment(total_steps=12, monitor="")
  with pytest.raises(Preempted):
    loop.fit(_interrupted(experiment, 7), tmp_path / "run", OPTIONS)
  assert int(loop.fit(experiment, tmp_path / "run", must).step) == 12
