"""The command line: what each mode does to a workdir, and how bad input ends."""

import csv
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dljax import config as config_lib
from dljax import errors
from dljax.launch import configs, evaluate
from dljax.tasks.base import Findings
from dljax.train.state import FORMAT
from dljax.train.workdir import Workdir
from experiments import lenet, mlp
from tests.command import Outcome, plain_pictures, refuse, run

ROOT = Path(__file__).parents[1]
# The monitored metric soon reaches 1, so that the best checkpoint is not the last.
SMALL = ("--config.model.widths=32", "--config.log_every=4", "--config.eval_every=8",
         "--config.checkpoint_every=8", "--config.optimizer.learning_rate=0.03",
         "--config.monitor=validation/top_5_accuracy")
STEPS = 24
pytestmark = pytest.mark.usefixtures("_digits")


@pytest.fixture(scope="module", autouse=True)
def _plain_pictures():
  with plain_pictures():
    yield


@pytest.fixture(scope="module")
def data_dir(prepared) -> Path:
  """A TFDS directory that holds the digits."""
  return prepared("digits")


@pytest.fixture
def _digits(data_dir, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))


@pytest.fixture(scope="module")
def _trained(data_dir, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("trained") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(data_dir))
    outcome = _train(workdir)
  assert outcome.status == 0, outcome
  assert (workdir / "result.json").exists()
  return workdir


@pytest.fixture
def trained(_trained, tmp_path) -> Path:
  """A finished run of our own: 24 steps, with checkpoints 16, 24 and the best."""
  return Path(shutil.copytree(_trained, tmp_path / "run"))


def _train(workdir: Path, *arguments: str, steps: int = STEPS) -> Outcome:
  # On one device, which compiles fastest; what comes after uses all four.
  total = f"--config.total_steps={steps}"
  return run(mlp, f"--workdir={workdir}", total, "--mesh=data:1", *SMALL, *arguments)


def _json(path: Path):
  return json.loads(path.read_text())


def _snapshot(folder: Path) -> dict[str, tuple[int, str]]:
  """What there is below a folder, when it was written, and what is in it."""
  digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
  return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, digest(p)) for p in folder.rglob("*")}


@functools.cache
def _pictures() -> tuple[np.ndarray, np.ndarray]:
  """uint8[n, 8, 8] and labels of some digits."""
  from sklearn.datasets import load_digits

  digits = load_digits()
  return np.round(digits.images[:5] * 255 / 16).astype(np.uint8), digits.target[:5]


@pytest.fixture
def pictures(tmp_path) -> Path:
  """A folder of PNG files, one of them further down."""
  folder = tmp_path / "pictures"
  (folder / "more").mkdir(parents=True)
  for i, image in enumerate(_pictures()[0]):
    Image.fromarray(image).save(folder / ("more" if i == 4 else "") / f"{i}.png")
  return folder


# --- Help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", [lenet, mlp], ids=lambda e: e.__name__)
def test_help_names_every_flag_preset_and_config_field(experiment):
  outcome = run(experiment, "--help")
  assert (outcome.status, outcome.err) == (0, "")
  for flag in ("preset", "workdir", "mode", "step", "input", "prompt", "output", "parallelism", "mesh", "resume",
               "seed", "epochs", "data_dir", "wandb", "dry_run", "topology", "list_presets", "help"):
    assert f"\n  --{flag}" in outcome.out
  for name, text in experiment.PRESETS.items():
    assert name in outcome.out and text in outcome.out
  default = experiment.get_config(next(iter(experiment.PRESETS)))
  settable = set(config_lib.flatten(default)) - {"family", "preset", "task", "seed", "found"}
  lines = outcome.out.splitlines()
  printed = {line.strip().partition("=")[0] for line in lines if line.startswith("  --config.")}
  assert printed == {f"--config.{name}" for name in settable}
  assert "--help=True" not in outcome.out, "values typed now are not defaults"
  assert max(len(line) for line in lines if line.startswith(6 * " ")) <= 100, "lines fit a usual terminal"


def test_help_shows_the_config_of_the_preset():
  assert "--config.data.name=mnist" in run(lenet, "--preset=mnist", "--help").out


def test_list_presets():
  outcome = run(mlp, "--list_presets")
  assert (outcome.status, outcome.err) == (0, "")
  assert [line.split()[0] for line in outcome.out.splitlines()] == list(mlp.PRESETS)


@pytest.mark.parametrize("arguments, status", [(["--help"], 0), (["--presett=mnist"], 2)])
def test_exit_status_of_the_process(tmp_path, arguments, status):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-m", "experiments.lenet", *arguments], cwd=tmp_path,
                        env=environment, capture_output=True, text=True, timeout=120)
  assert done.returncode == status, done.stderr
  assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
  if status:
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--preset " in done.stderr


_STOPPED = """
import os, signal, time
from dljax import launch
from experiments import mlp

def stopped(*_):
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(30)

{place} = stopped
launch.main(mlp.get_config, mlp.build, mlp.PRESETS)
"""


@pytest.mark.parametrize("place, distributed", [("mlp.build", False), ("launch.train.train", True)])
def test_sigterm_outside_of_the_loop_exits_with_75_too(tmp_path, place, distributed):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  if distributed:  # which has a handler of its own
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
  done = subprocess.run([sys.executable, "-c", _STOPPED.format(place=place)], cwd=tmp_path, env=environment,
                        capture_output=True, text=True, timeout=120)
  assert done.returncode == errors.PREEMPTED and "Traceback" not in done.stderr, done
  assert "stopped" in done.stderr and not list(tmp_path.iterdir())


# --- Dry run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallelism", ["jit", "pmap"])
def test_a_dry_run_needs_no_data_and_writes_nothing(tmp_path, monkeypatch, parallelism):
  (tmp_path / "empty").mkdir()
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
  monkeypatch.chdir(tmp_path)
  outcome = run(lenet, "--preset=mnist", "--dry_run", f"--parallelism={parallelism}")
  assert outcome.status == 0, outcome
  for words in ("c1", "c3", "c5", "f6", "head", "61,706", "memory of one device", "128 x 28 x 28 x 1",
                "FLOP"):
    assert words in outcome.out, words
  assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


# --- Training ---------------------------------------------------------------------------------------------


def test_a_finished_run_is_printed_again_and_left_alone(trained):
  before = _snapshot(trained)
  outcome = _train(trained)
  assert outcome.status == 0
  accuracy = _json(trained / "result.json")["metrics"]["test"]["accuracy"]
  assert "finished" in outcome.out and f"{accuracy:.4f}" in outcome.out
  assert _train(trained, "--resume=must").status == 0
  assert "--wandb=lab: nothing is sent" in _train(trained, "--wandb=lab").out
  assert _snapshot(trained) == before


def test_a_finished_run_goes_on_to_more_steps(trained):
  rows = (trained / "metrics.jsonl").read_text()
  outcome = _train(trained, "--config.log_every=2", steps=STEPS + 8)
  assert outcome.status == 0, outcome
  assert f"continuing from step {STEPS}" in outcome.err
  result, after = _json(trained / "result.json"), (trained / "metrics.jsonl").read_text()
  assert result["steps"] == result["total_steps"] == STEPS + 8
  assert after.startswith(rows)
  steps = [row["step"] for row in map(json.loads, after.splitlines()) if row["split"] == "train"]
  assert steps == [*range(4, STEPS + 1, 4), *range(STEPS + 2, STEPS + 9, 2)]
  assert _json(trained / "config.json")["config"]["total_steps"] == STEPS + 8


def test_a_run_does_not_go_back(trained):
  before = _snapshot(trained)
  line = refuse(mlp, f"--workdir={trained}", "--config.total_steps=8", *SMALL)
  assert "--config.total_steps=8" in line and f"{STEPS} steps" in line
  after = _snapshot(trained)
  assert {**after, ".lock": 0} == {**before, ".lock": 0}


def test_a_run_that_diverges_ends_with_1_and_one_line(tmp_path):
  outcome = _train(tmp_path / "run", "--config.optimizer.learning_rate=1e38")
  assert outcome.status == 1
  assert "not finite" in outcome.err and "--config.optimizer.learning_rate" in outcome.err
  assert "Traceback" not in outcome.err and not (tmp_path / "run" / "result.json").exists()


def test_the_default_workdir_tells_configs_apart(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)

  def tiny_config(preset):
    config = mlp.get_config(preset)
    config.update({"total_steps": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 2})
    config.model.widths = (8,)
    return config

  tiny = types.SimpleNamespace(
      __file__=mlp.__file__, get_config=tiny_config, build=mlp.build, PRESETS=mlp.PRESETS)
  folders = lambda: sorted((tmp_path / "runs").iterdir())
  assert run(tiny, "--mesh=data:1").status == 0
  assert [folder.name for folder in folders()] == ["mlp-digits"]
  assert run(tiny, "--mesh=data:1", "--seed=1").status == 0
  plain, other = folders()
  assert plain.name == "mlp-digits" and other.name == "mlp-digits-seed=1"

  # The seed decides the run.
  assert _json(other / "config.json")["config"]["seed"] == 1
  assert _json(plain / "result.json")["state_sha256"] != _json(other / "result.json")["state_sha256"]

  # The same flags find the same run again, in the other modes too, and never another one.
  assert "finished" in run(tiny, "--seed=1").out
  assert run(tiny, "--seed=1", "--mode=eval").status == 0
  assert folders() == [plain, other]
  assert (other / "evaluation.json").exists() and not (plain / "evaluation.json").exists()
  assert "holds no run" in refuse(tiny, "--seed=2", "--mode=eval")


@pytest.mark.parametrize("flag, words", [
    ("--epochs=0", "must be a number above 0"), ("--epochs=nan", "must be a number above 0"),
    ("--epochs=inf", "must be a number above 0"), ("--epochs=1e30", "ask for fewer")])
def test_epochs_out_of_range_are_refused(tmp_path, flag, words):
  said = refuse(mlp, f"--workdir={tmp_path / 'run'}", flag)
  assert "--epochs=" in said and words in said and not (tmp_path / "run").exists()


def test_epochs_and_steps_exclude_each_other():
  assert "--config.total_steps do not go together" in refuse(
      mlp, "--epochs=1", "--config.total_steps=5")


def test_epochs_become_steps_by_the_number_of_examples(tmp_path):
  train = functools.partial(run, mlp, f"--workdir={tmp_path}", "--mesh=data:1", *SMALL)
  steps = lambda: _json(tmp_path / "config.json")["config"]["total_steps"]
  # There are 1293 examples in batches of 128.
  assert train("--epochs=0.5").status == 0 and steps() == 6
  outcome = train("--epochs=0.7")
  assert outcome.status == 0 and "continuing from step 6" in outcome.err
  # A log file has the lines that a terminal has.
  assert re.search(r"^compiled the train step in \d+\.\d s$", outcome.err, re.M)
  assert re.search(r"^step 8: validation top_5_accuracy [\d.]+, .*loss [\d.]+.*$", outcome.err, re.M)
  assert steps() == _json(tmp_path / "result.json")["steps"] == 8
  assert "finished" in train("--epochs=0.7").out


def test_a_dry_run_in_epochs_says_what_it_needs(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  said = refuse(mlp, "--preset=mnist", "--dry_run", "--epochs=2")
  assert "number of training examples" in said and "--config.total_steps=N" in said



# --- Evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallelism", ["jit", "pmap"])
def test_evaluation_agrees_with_the_result(trained, parallelism):
  before = _snapshot(trained)
  outcome = run(mlp, f"--workdir={trained}", "--mode=eval", f"--parallelism={parallelism}")
  assert outcome.status == 0, outcome
  result, evaluation = _json(trained / "result.json"), _json(trained / "evaluation.json")
  assert evaluation["checkpoint"] == result["checkpoint"] < STEPS
  for split in ("validation", "test"):
    assert evaluation["metrics"][split] == pytest.approx(result["metrics"][split], rel=1e-6)
    assert evaluation["metrics"][split]["accuracy"] == result["metrics"][split]["accuracy"]
    assert f"{result['metrics'][split]['accuracy']:.4f}" in outcome.out
  told = lambda files: {name: file for name, file in files.items() if not name.startswith(("figures", "tables", "eval"))}
  assert told(_snapshot(trained)) == told(before)  # the rest is as it was


@pytest.mark.parametrize("step, checkpoint", [("latest", STEPS), ("16", 16), (str(STEPS), STEPS)])
def test_evaluation_of_a_chosen_checkpoint(trained, step, checkpoint):
  assert run(mlp, f"--workdir={trained}", "--mode=eval", f"--step={step}").status == 0
  evaluation = _json(trained / "evaluation.json")
  assert evaluation["checkpoint"] == checkpoint
  rows = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
  logged = next(row for row in rows if (row["step"], row["split"]) == (checkpoint, "validation"))
  assert evaluation["metrics"]["validation"]["loss"] == pytest.approx(logged["loss"], rel=1e-5)


def test_a_best_checkpoint_that_is_gone_is_told(trained, caplog):
  best = _json(trained / "result.json")["checkpoint"]
  shutil.rmtree(trained / "checkpoints" / str(best))
  for step in ([], ["--step=best"], ["--step=latest"]):
    caplog.clear()
    assert run(mlp, f"--workdir={trained}", "--mode=eval", *step).status == 0
    assert _json(trained / "evaluation.json")["checkpoint"] == STEPS
    told = [f"checkpoint {best}, the best, is gone; the latest, {STEPS}, takes its place"]
    assert caplog.messages == (told if step != ["--step=latest"] else [])


def test_evaluation_takes_overrides(trained):
  assert run(mlp, f"--workdir={trained}", "--mode=eval", "--config.data.test=test[:50%]").status == 0
  half, whole = _json(trained / "evaluation.json"), _json(trained / "result.json")
  assert half["metrics"]["test"]["loss"] != whole["metrics"]["test"]["loss"]
  assert _json(trained / "config.json")["config"]["data"]["test"] == "test"


def test_evaluation_under_corruptions(trained):
  outcome = run(mlp, f"--workdir={trained}", "--mode=eval", "--config.eval.corruptions=noise,rotation")
  assert outcome.status == 0, outcome
  with (trained / "tables" / "corruptions.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [(row["corruption"], row["strength"]) for row in rows] == [
      (name, str(strength)) for name in ("noise", "rotation") for strength in range(1, 6)]
  told, clean = _json(trained / "evaluation.json"), _json(trained / "result.json")["metrics"]["test"]
  assert [{k: str(v) for k, v in row.items()} for row in told["corruptions"]] == rows
  accuracies = [row["accuracy"] for row in told["corruptions"]]
  assert accuracies[4] < clean["accuracy"] - 0.1 and accuracies[9] < clean["accuracy"] - 0.1
  assert f"{accuracies[4]:.4f}" in outcome.out and "rotation" in outcome.out
  assert (trained / "figures" / "corruptions.png").exists()
  assert _json(trained / "config.json")["config"]["eval"]["corruptions"] == ""
  assert "finished" in _train(trained, "--config.eval.corruptions=blur").out  # it trains alike: the same run
  assert "did you mean noise" in refuse(mlp, f"--workdir={trained}", "--mode=eval", "--config.eval.corruptions=niose")
  assert "nothing to disturb" in refuse(mlp, "--preset=xor", "--dry_run", "--config.eval.corruptions=all")


def test_groups_are_told_apart_by_an_evaluation_that_asks_for_them(trained):
  outcome = run(mlp, f"--workdir={trained}", "--mode=eval", "--config.data.groups=label")
  metrics = _json(trained / "evaluation.json")["metrics"]["test"]
  with (trained / "tables" / "classes.csv").open() as file:
    assert outcome.status == 0 and metrics["worst_label_accuracy"] == min(
        float(row["recall"]) for row in csv.DictReader(file))


def test_a_run_that_may_only_be_read_is_evaluated(trained, caplog):
  (trained / "evaluation.json.tmp").mkdir()  # even root cannot write there now
  outcome = run(mlp, f"--workdir={trained}", "--mode=eval")
  assert outcome.status == 0 and "test" in outcome.out and "written to" not in outcome.out
  assert caplog.messages == [f"{trained / 'evaluation.json'} was not written: Is a directory"]


def test_an_evaluation_is_written_before_it_is_shown_and_without_its_pictures(tmp_path, monkeypatch, caplog):
  (tmp_path / "figures").touch()  # no folder, so that no picture can be written
  written = []
  monkeypatch.setattr(evaluate, "Evaluator", lambda *_: None)
  monkeypatch.setattr(evaluate, "evaluate_splits", lambda *_: ({"test": {"loss": 0.5}}, Findings()))
  monkeypatch.setattr(evaluate.tables, "show", lambda table: written.append(
      json.loads((tmp_path / "evaluation.json").read_text())))
  experiment = types.SimpleNamespace(task=None, data=types.SimpleNamespace(context=0, corruptions=()))
  state = types.SimpleNamespace(variables={}, rng=None)
  outcome = evaluate.evaluate(types.SimpleNamespace(
      experiment=experiment, folder=Workdir(tmp_path), assets={}, config=mlp.get_config("xor"),
      restore=lambda: (types.SimpleNamespace(mesh=None), 7, state)), "jit")
  assert (outcome, written) == (0, [{"checkpoint": 7, "metrics": {"test": {"loss": 0.5}}}])
  assert caplog.messages == [f"{tmp_path / 'figures'} was not written: File exists"]


@pytest.mark.parametrize("arguments, words", [
    (["--step=soon"], ["--step=soon", "best, latest or a number", f"16, {STEPS}"]),
    (["--step=999"], ["checkpoint 999", "no such step", f"16, {STEPS}"]),
    (["--config.model.widths=16"], ["does not fit", "float32[32, 10] there", "float32[16, 10] here"]),
    (["--config.data.name=mnist"], ["mnist is not prepared", "python -m dljax.data.prepare mnist"]),
    (["--config.eval_batch_size=30"], ["--config.eval_batch_size=30", "multiple of 4"]),
])
def test_evaluation_refuses(trained, arguments, words):
  before = _snapshot(trained)
  line = refuse(mlp, f"--workdir={trained}", "--mode=eval", *arguments)
  assert all(word in line for word in words), line
  assert _snapshot(trained) == before


@pytest.mark.parametrize("mode", ["eval", "predict"])
@pytest.mark.parametrize("flag", ["--resume=auto", "--resume=never", "--wandb=project", "--preset=digits", "--seed=0"])
def test_what_only_training_heeds_is_refused(tmp_path, mode, flag):
  line = refuse(mlp, f"--workdir={tmp_path}", f"--mode={mode}", flag)
  name = flag.partition("=")[0]
  assert line == f"{name} goes with --mode=train; add it, or drop {name}"


@pytest.mark.parametrize("mode", ["eval", "predict"])
def test_without_a_run_or_a_checkpoint_there_is_nothing_to_use(trained, pictures, tmp_path, mode):
  arguments = [f"--mode={mode}", *([f"--input={pictures}"] if mode == "predict" else [])]
  line = refuse(mlp, f"--workdir={tmp_path / 'nowhere'}", *arguments)
  assert "nowhere" in line and "holds no run" in line and not (tmp_path / "nowhere").exists()
  shutil.rmtree(trained / "checkpoints")
  line = refuse(mlp, f"--workdir={trained}", *arguments)
  assert str(trained) in line and "no checkpoint" in line and "train first" in line
  assert not (trained / "checkpoints").exists()


def test_a_run_of_another_family_is_named(trained):
  line = refuse(lenet, f"--workdir={trained}", "--mode=eval")
  assert "holds a run of mlp" in line and "python -m experiments.mlp" in line


# --- Prediction -------------------------------------------------------------------------------------------


def _predict(workdir: Path | str, inputs: str, output: Path | str | None = None, *arguments: str) -> Outcome:
  more = [f"--output={output}"] if output else []
  return run(mlp, f"--workdir={workdir}", "--mode=predict", f"--input={inputs}", *more, *arguments)


def _read(path: Path) -> list[dict]:
  if path.suffix == ".jsonl":
    return [json.loads(line) for line in path.read_text().splitlines()]
  if path.suffix == ".json":
    return _json(path)
  with path.open(newline="") as file:
    parse = {"probability": float, "probabilities": json.loads}
    return [{**row, **{key: parse[key](row[key]) for key in parse}} for row in csv.DictReader(file)]


def test_every_form_of_input_and_output_says_the_same(trained, pictures, tmp_path):
  images = _pictures()[0]
  np.save(tmp_path / "uint8.npy", images)
  np.save(tmp_path / "float.npy", images[..., None] / 255)
  before = _snapshot(trained)
  found = {}
  files = ",".join(str(path) for path in sorted(pictures.rglob("*.png")))
  for inputs, suffix in ((pictures, ".jsonl"), (files, ".json"), (tmp_path / "uint8.npy", ".csv"),
                         (tmp_path / "float.npy", ".jsonl")):
    output = tmp_path / f"predictions{suffix}"
    outcome = _predict(trained, str(inputs), output)
    assert outcome.status == 0, outcome
    assert f"5 predictions written to {output}" in outcome.out
    found[str(inputs)] = _read(output)
  assert _snapshot(trained) == before

  rows = found[str(pictures)]
  assert [Path(row["input"]).name for row in rows] == [f"{i}.png" for i in range(5)]
  assert [row["input"] for row in found[str(tmp_path / "uint8.npy")]][0] == f"{tmp_path / 'uint8.npy'}[0]"
  for others in found.values():
    assert [(row["label"], row["probabilities"]) for row in others] == [
        (row["label"], row["probabilities"]) for row in rows]
  for row in rows:
    assert set(row) == {"input", "label", "probability", "probabilities"}
    p = list(row["probabilities"].values())
    assert p == sorted(p, reverse=True) and row["probability"] == p[0]
    assert row["label"] == next(iter(row["probabilities"])) in map(str, range(10))
    assert 0.5 < sum(p) <= 1 + 1e-5


def test_a_tilde_is_the_home_folder(trained, pictures, data_dir, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(trained)
  (tmp_path / "data").symlink_to(data_dir)
  outcome = _predict("~/run", "~/pictures/0.png,~/pictures/1.png", "~/out.csv", "--data_dir=~/data")
  assert outcome.status == 0, outcome
  assert [row["input"] for row in _read(tmp_path / "out.csv")] == [str(pictures / f"{i}.png") for i in range(2)]
  assert not (trained / "~").exists()


def test_predictions_are_shown_without_an_output(trained, pictures):
  outcome = _predict(trained, f"{pictures}/0.png")
  assert outcome.status == 0 and outcome.out.startswith(f"{pictures}/0.png  ")


def test_probabilities_of_all_classes_sum_to_1(tmp_path):
  workdir = tmp_path / "xor"
  few = ("--config.total_steps=2", "--config.eval_every=2", "--mesh=data:1")
  assert run(mlp, "--preset=xor", f"--workdir={workdir}", *few).status == 0
  np.save(tmp_path / "points.npy", np.array([[1, 1], [1, -1]]))
  output = tmp_path / "out.jsonl"
  outcome = _predict(workdir, str(tmp_path / "points.npy"), output, "--parallelism=pmap")
  assert outcome.status == 0, outcome
  rows = _read(output)
  assert all(set(row["probabilities"]) == {"same", "different"} for row in rows)
  assert [sum(row["probabilities"].values()) for row in rows] == pytest.approx([1, 1], abs=1e-6)

  (tmp_path / "empty.npy").touch()
  np.save(tmp_path / "wrong.npy", np.zeros((3, 3)))
  line = refuse(mlp, f"--workdir={workdir}", "--mode=predict", f"--input={tmp_path}/empty.npy,{tmp_path}/wrong.npy")
  assert [part.split(":")[0] for part in line.removeprefix("--input: ").split("; ")] == [
      f"{tmp_path}/empty.npy", f"{tmp_path}/wrong.npy"]


def test_an_input_that_is_no_image_is_skipped_and_told(trained, pictures, tmp_path):
  data = (pictures / "1.png").read_bytes()
  (pictures / "1.png").write_bytes(data[:len(data) // 2])
  output = tmp_path / "out.jsonl"
  outcome = _predict(trained, str(pictures), output)
  assert outcome.status == 1
  skipped, last = outcome.err.splitlines()
  assert skipped.startswith(f"skipped {pictures / '1.png'}: ")
  assert last == "1 input was skipped, as said above; the exit status is 1 because of that"
  assert [Path(row["input"]).name for row in _read(output)] == ["0.png", "2.png", "3.png", "4.png"]


def test_ink_on_white_paper_is_warned_of_shown_and_mended(trained, pictures, tmp_path):
  images, _ = _pictures()
  white = tmp_path / "white"
  white.mkdir()
  for i in range(2):
    Image.fromarray(255 - images[i]).save(white / f"{i}.png")
  folder = tmp_path / "seen"
  outcome = _predict(trained, white, folder)
  assert outcome.status == 0 and "warning: 2 of 2 images" in outcome.err
  assert "--config.data.invert=true" in outcome.err
  rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
  assert [row["seen"] for row in rows] == ["0-seen.png", "1-seen.png"]
  assert all((folder / row["seen"]).read_bytes().startswith(b"\x89PNG") for row in rows)
  mended = _predict(trained, white, None, "--config.data.invert=true")
  assert "warning" not in mended.err
  usual = _predict(trained, pictures)
  assert "warning" not in usual.err
  assert [line.split()[1:] for line in mended.out.splitlines()] == [
      line.split()[1:] for line in usual.out.splitlines()][:2]


@pytest.mark.parametrize("count, said", [
    (0, "{folder} holds no file"),
    (1, "{folder}/0.png: is no image that Pillow can read"),
    (5, "{folder}/0.png: is no image that Pillow can read; {folder}/1.png: is no image that Pillow can read; "
        "{folder}/2.png: is no image that Pillow can read; and 2 more"),
])
def test_where_no_input_is_usable_one_line_says_why(trained, tmp_path, count, said):
  folder = tmp_path / "inputs"
  folder.mkdir()
  for i in range(count):
    (folder / f"{i}.png").write_text("no image")
  before = _snapshot(tmp_path)
  line = refuse(mlp, f"--workdir={trained}", "--mode=predict", f"--input={folder}", f"--output={tmp_path}/out.csv")
  assert line == f"--input: {said.format(folder=folder)}"
  assert _snapshot(tmp_path) == before


@pytest.mark.parametrize("arguments, words", [
    ([], ["--mode=predict needs --input"]),
    (["--input=/no/such.png"], ["--input", "/no/such.png"]),
    (["--prompt=Once"], ["--prompt: mlp generates no text; use --input=FILE_OR_FOLDER"]),
    (["--input={pictures}", "--output={tmp}/out.txt"], ["--output={tmp}/out.txt", ".jsonl, .json, .csv"]),
    (["--input={pictures}", "--output={tmp}/no/out.csv"],
     ["--output={tmp}/no/out.csv", "no folder", "{tmp}/no"]),
    (["--input={pictures}", "--output={tmp}/folder.csv"], ["--output={tmp}/folder.csv", "Is a directory"]),
    (["--input={pictures}", "--output=/proc/out.csv"], ["--output=/proc/out.csv"]),  # not even root
])
def test_prediction_refuses(trained, pictures, tmp_path, arguments, words):
  fill = lambda texts: [text.format(pictures=pictures, tmp=tmp_path) for text in texts]
  (tmp_path / "folder.csv").mkdir()
  before = _snapshot(tmp_path)
  line = refuse(mlp, f"--workdir={trained}", "--mode=predict", *fill(arguments))
  assert all(word in line for word in fill(words)), line
  assert _snapshot(tmp_path) == before


# --- Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    # Names.
    (["--presett=mnist"], ["'--presett'", "did you mean --preset"]),
    (["--no_such_flag"], ["'--no_such_flag'"]),
    (["--undefok=bogus", "--bogus"], ["'--undefok'"]),
    (["--undefok", "bogus", "--bogus=1"], ["'--undefok'"]),
    (["-undefok=bogus", "--bogus"], ["'--undefok'"]),
    (["--config=x"], ["--config.FIELD"]),
    (["--preset=mnst"], ["--preset", "'mnst'", "did you mean mnist?"]),
    (["--preset=zzz"], ["--preset", "choose one of: digits, fashion_mnist, mnist, xor"]),
    (["--config.optimizer.learning_rat=1"], ["learning_rat'", "did you mean optimizer.learning_rate"]),
    (["--config.lerning_rate=1"], ["did you mean optimizer.learning_rate"]),
    (["--config.optimizer=adam"], ["--config.optimizer is a group", "--config.optimizer.name"]),
    (["--config.optimizer.name=adamm"], ["--config.optimizer.name", "did you mean adam "]),
    (["--config.optimizer.schedule=cos"], ["--config.optimizer.schedule", "cosine"]),
    (["--config.model.variant=perceptorn"], ["--config.model.variant", "did you mean perceptron"]),
    (["--config.model.activation=rellu"], ["--config.model.activation", "did you mean relu"]),
    (["--config.model.criterion=softmx"], ["--config.model.criterion", "did you mean softmax"]),
    (["--mode=fly"], ["--mode=fly", "train|eval|predict"]),
    (["--resume=maybe"], ["--resume=maybe", "auto|never|must"]),
    (["--parallelism=magic"], ["--parallelism=magic", "jit|pmap"]),
    (["stray"], ["'stray' is not a flag", "--FLAG=VALUE"]),
    (["--config.total_steps", "5"], ["'5' is not a flag"]),
    (["--config.total_steps"], ["--config.total_steps needs a value"]),
    # Types and ranges.
    (["--config.batch_size=-8"], ["--config.batch_size=-8", "at least 1"]),
    (["--config.batch_size=12.5"], ["--config.batch_size=12.5", "whole number"]),
    (["--config.optimizer.learning_rate=fast"], ["--config.optimizer.learning_rate=fast", "a number"]),
    (["--config.optimizer.learning_rate=-0.1"], ["--config.optimizer.learning_rate=-0.1", "above 0"]),
    (["--config.optimizer.learning_rate=nan"], ["--config.optimizer.learning_rate=nan", "above 0"]),
    (["--config.optimizer.warmup_fraction=2"], ["--config.optimizer.warmup_fraction=2.0", "below 1"]),
    (["--config.total_steps=0"], ["--config.total_steps=0", "at least 1"]),
    (["--config.ema_decay=1"], ["--config.ema_decay=1.0", "below 1"]),
    (["--config.early_stopping_patience=3", "--config.monitor="],
     ["--config.early_stopping_patience", "--config.monitor"]),
    (["--config.data.flip=perhaps"], ["--config.data.flip=perhaps", "true or false"]),
    (["--config.model.widths=x"], ["--config.model.widths=x", "whole number"]),
    (["--config.model.widths=16,0"], ["--config.model.widths=(16, 0)", "at least 1"]),
    (["--config.model.dropout=1"], ["--config.model.dropout=1.0", "below 1"]),
    (["--config.model.label_smoothing=2"], ["--config.model.label_smoothing", "2.0", "[0, 1)"]),
    (["--config.model.dtype=half"], ["--config.model.dtype=half", "bfloat16"]),
    (["--config.model.dtype=float64"], ["--config.model.dtype=float64", "JAX_ENABLE_X64=1"]),
    (["--seed=-1"], ["--seed=-1", "0, 4294967295"]),
    (["--seed=99999999999999999999"], ["--seed=99999999999999999999", "0, 4294967295"]),
    (["--seed=one"], ["--seed=one"]),
    (["--config.seed=1"], ["--config.seed", "--seed"]),
    # Devices: there are four.
    (["--config.batch_size=30"], ["--config.batch_size=30", "4 devices", "multiple of 4"]),
    (["--config.eval_batch_size=30"], ["--config.eval_batch_size=30", "4 devices", "multiple of 4"]),
    (["--config.accumulation=3"], ["--config.batch_size=128", "3 micro-batches", "multiple of 12"]),
    (["--mesh=data:8"], ["--mesh=data:8", "needs 8 devices and there are 4"]),
    (["--mesh=data:3"], ["--config.batch_size=128", "3 devices"]),
    (["--mesh=rows:2"], ["--mesh", "'rows:2'", "data, fsdp, tensor"]),
    (["--mesh=data:0"], ["--mesh", "'data:0'"]),
    (["--mesh=data"], ["--mesh", "'data'"]),
    (["--mesh=data:2,fsdp:2", "--parallelism=pmap"], ["--parallelism=pmap", "--parallelism=jit"]),
    # Flags that need others.
    (["--resume=must"], ["--resume=must", "holds no run", "drop the flag"]),
    (["--topology=v5e:2x2"], ["--topology goes with --dry_run"]),
    (["--dry_run", "--topology=v6:1"], ["--topology", "'v6:1'", "v5e:2x2"]),
    (["--dry_run", "--mode=eval"], ["--dry_run goes with --mode=train"]),
    (["--step=latest"], ["--step goes with --mode=eval or --mode=predict"]),
    (["--input=x.png"], ["--input goes with --mode=predict"]),
    (["--output=x.csv"], ["--output goes with --mode=predict"]),
    (["--prompt=Once"], ["--prompt goes with --mode=predict"]),
    (["--count=2"], ["--count goes with --mode=predict"]),
    (["--label=3"], ["--label goes with --mode=predict"]),
    # What is known only with the model, or the data.
    (["--config.monitor=validation/acuracy"], ["--config.monitor", "did you mean validation/accuracy"]),
    (["--config.monitor=accuracy"], ["--config.monitor", "validation/accuracy"]),
    (["--config.monitor=test/accuracy"], ["--config.monitor", "validation/accuracy"]),
    (["--config.data.validation="], ["--config.monitor=validation/accuracy", "write --config.monitor="]),
    (["--config.optimizer.freeze=nothing/*"],
     ["--config.optimizer.freeze", "'nothing/*' matches no parameter"]),
    (["--config.optimizer.freeze=*"], ["--config.optimizer.freeze", "nothing to train"]),
    (["--config.optimizer.learning_rates=hidden9/*=0.1"],
     ["--config.optimizer.learning_rates", "'hidden9/*' matches no parameter", "hidden"]),
    (["--config.optimizer.learning_rates=head/*=fast"],
     ["--config.optimizer.learning_rates", "pattern=factor"]),
    (["--config.batch_size=2000"], ["--config.batch_size=2000", "1293 training examples"]),
    (["--config.data.validation=train[:5%]"], ["--config.data.validation", "overlaps"]),
    # Places that are not on this machine.
    (["--workdir=gs://bucket/run"], ["--workdir=gs://bucket/run", "local"]),
    (["--data_dir=gs://bucket/tfds"], ["--data_dir=gs://bucket/tfds", "local"]),
    (["--mode=predict", "--input=a.npy,s3://bucket/x"], ["--input=s3://bucket/x", "local"]),
    (["--mode=predict", "--input=a.npy", "--output=s3://bucket/x.csv"], ["--output=s3", "local"]),
    (["--data_dir=/no/such/folder"], ["--data_dir=/no/such/folder", "not a folder"]),
])
def test_bad_input_is_one_line_and_touches_nothing(tmp_path, monkeypatch, arguments, words):
  monkeypatch.chdir(tmp_path)
  line = refuse(mlp, "--workdir=run", "--config.total_steps=2", *arguments)
  assert all(word in line for word in words), line
  assert not list(tmp_path.iterdir())


def test_weights_and_biases_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  line = refuse(mlp, f"--workdir={tmp_path / 'run'}", "--wandb=project")
  assert "--wandb" in line and "pip install wandb" in line and not list(tmp_path.iterdir())


def test_missing_data_is_told_at_once_and_without_a_network(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("reached for a network"))
  start = time.monotonic()
  line = refuse(lenet, "--preset=mnist", f"--workdir={tmp_path / 'run'}")
  assert time.monotonic() - start < 15  # TFDS would try for minutes
  assert f"mnist is not prepared in {tmp_path}" in line
  assert f"python -m dljax.data.prepare mnist --data_dir={tmp_path}" in line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place, word", [
    ("file", "is a file"), ("file/run", "not writable"), ("/proc/run", "not writable"),
])
def test_a_workdir_that_cannot_be(tmp_path, place, word):
  if place.startswith("/proc") and not Path("/proc").is_dir():
    pytest.skip("no /proc, in which not even root can make a folder")
  (tmp_path / "file").write_text("precious")
  line = refuse(mlp, f"--workdir={tmp_path / place}", "--config.total_steps=2")
  assert place in line and word in line and "name a" in line
  assert (tmp_path / "file").read_text() == "precious"


def test_a_workdir_in_which_one_may_not_write(tmp_path):
  (tmp_path / "run").mkdir(mode=0o500)
  if os.access(tmp_path / "run", os.W_OK):
    pytest.skip("this user may write anywhere")
  assert "not writable" in refuse(mlp, f"--workdir={tmp_path / 'run'}", "--config.total_steps=2")


def test_a_workdir_of_another_config_names_what_differs(trained):
  before = _snapshot(trained)
  line = refuse(mlp, f"--workdir={trained}", f"--config.total_steps={STEPS}", *SMALL,
                "--config.optimizer.b1=0.8", "--config.model.widths=16,8", "--seed=3")
  for words in ("different config", "model.widths is [32] there and [16, 8] here",
                "optimizer.b1 is 0.9 there and 0.8 here", "seed is 0 there and 3 here", "another --workdir",
                "delete it"):
    assert words in line, line
  assert "total_steps" not in line and "_every" not in line
  assert _snapshot(trained) == before


def test_what_may_change_may_change(trained):
  changed = ["--config.log_every=3", "--config.eval_every=5", "--config.checkpoint_every=7", "--mesh=data:2",
             "--parallelism=pmap"]
  assert run(mlp, f"--workdir={trained}", f"--config.total_steps={STEPS}", *SMALL, *changed).status == 0


def test_a_workdir_that_holds_a_run_is_not_begun_again(trained):
  before = _snapshot(trained)
  line = refuse(mlp, f"--workdir={trained}", f"--config.total_steps={STEPS}", *SMALL, "--resume=never")
  assert "--resume=never" in line and "holds a run" in line and "another --workdir" in line
  assert _snapshot(trained) == before


def test_a_run_that_must_be_continued_needs_a_checkpoint(trained):
  shutil.rmtree(trained / "checkpoints")
  (trained / "result.json").unlink()
  line = refuse(mlp, f"--workdir={trained}", f"--config.total_steps={STEPS}", *SMALL, "--resume=must")
  assert "--resume=must" in line and "checkpoint" in line and "drop the flag" in line
  assert not (trained / "checkpoints").exists()


def test_a_workdir_in_use_names_the_process(tmp_path):
  folder = Workdir(tmp_path / "run")
  folder.acquire()
  try:
    before = _snapshot(tmp_path)
    line = refuse(mlp, f"--workdir={tmp_path / 'run'}", "--config.total_steps=2")
    assert f"in use by process {os.getpid()}" in line and "another --workdir" in line
    assert _snapshot(tmp_path) == before
  finally:
    folder.release()
  folder.acquire()  # whoever is refused leaves no lock behind
  folder.release()


def test_a_damaged_config_is_named(trained):
  (trained / "config.json").write_text("{")
  for mode in ("train", "eval"):
    line = refuse(mlp, f"--workdir={trained}", f"--mode={mode}")
    assert str(trained / "config.json") in line and "not JSON" in line


@pytest.mark.parametrize("config, word", [
    (3, "'config' is missing or wrong"), ({}, "lacks accumulation, batch_size"), ({"family": None}, "a run of None"),
    ({"family": "mlp", "preset": "new"}, "lacks accumulation"),
])
def test_a_config_of_something_else_is_named(trained, config, word):
  (trained / "config.json").write_text(json.dumps({"format": FORMAT, "config": config, "sha256": ""}))
  line = refuse(mlp, f"--workdir={trained}", "--mode=eval")
  assert str(trained) in line and word in line


def test_a_result_of_something_else_is_named(trained):
  (trained / "result.json").write_text("{}")
  line = refuse(mlp, f"--workdir={trained}", f"--config.total_steps={STEPS}", *SMALL)
  assert str(trained / "result.json") in line and "restore it" in line


def test_a_full_disk_ends_with_1_and_one_line(tmp_path):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
  try:
    outcome = _train(tmp_path / "run", "--config.log_every=1", "--config.checkpoint_every=1000000", "--config.monitor=",
                     steps=1000)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert outcome.status == 1
  assert outcome.err.splitlines()[-1] == (
      f"error: {tmp_path / 'run' / 'metrics.jsonl'} was not written: File too large")
  assert "Traceback" not in outcome.err and "Exception" not in outcome.err


def test_exit_statuses_are_what_is_documented():
  assert (errors.DONE, errors.FAILED, errors.BAD_INPUT, errors.PREEMPTED) == (0, 1, 2, 75)


def _look_up(folder: Workdir, found: dict, *overrides: str, resume: str = "auto"):
  """A config after `configs.look_up`, and how often the data were looked at."""
  config, looks = mlp.get_config("digits"), []

  def resolve(config, given):
    del config
    looks.append(given)
    return {name: value for name, value in found.items() if name not in given}

  config_lib.apply_overrides(config, overrides)
  configs.look_up(resolve, config, overrides, folder, resume)
  return config, len(looks)


def test_a_run_keeps_what_was_looked_up_at_its_start(tmp_path, capsys):
  folder = Workdir(tmp_path)
  first, looks = _look_up(folder, {"data.num_classes": 3, "data.mean": (0.25,)})
  assert (first.data.num_classes, first.data.mean, looks) == (3, (0.25,), 1)
  assert first.found == ("data.mean", "data.num_classes")
  assert "found data.num_classes=3\nfound data.mean=0.25\n" == capsys.readouterr().out
  folder.start(first, {}, "")
  again, looks = _look_up(folder, {"data.num_classes": 4, "data.mean": (0.5,)})
  assert (again.data.num_classes, again.data.mean, looks) == (3, (0.25,), 0)
  folder.check(again, "auto")
  assert folder.read_config().data.num_classes == 3


@pytest.mark.parametrize("found", [float("nan"), None, "data.mean", [["a", {}]], [1]])
def test_names_of_fields_that_are_none_are_refused(tmp_path, found):
  folder = Workdir(tmp_path)
  folder.start(_look_up(folder, {})[0], {}, "")
  stored = json.loads(folder.config_file.read_text())
  stored["config"]["found"], stored["sha256"] = found, ""
  folder.config_file.write_text(json.dumps(stored))
  with pytest.raises(errors.UserError, match=r"config.json: found=.* is no list of names; restore"):
    _look_up(folder, {})


def test_what_was_found_is_shown_on_a_short_line(tmp_path, capsys):
  _look_up(Workdir(tmp_path), {"data.class_counts": tuple(range(1000)), "data.fitted_to": "a\udcffb"})
  counts, folder = capsys.readouterr().out.splitlines()
  assert counts == f"found data.class_counts={','.join(map(str, range(20)))},... (1,000 in all)"
  assert folder == "found data.fitted_to=a\\udcffb"


def test_a_field_that_the_user_gives_is_not_looked_up(tmp_path):
  folder = Workdir(tmp_path)
  found = {"data.num_classes": 3, "data.mean": (0.25,)}
  config, _ = _look_up(folder, found, "--config.data.num_classes=5")
  assert (config.data.num_classes, config.found) == (5, ("data.mean",))
  folder.start(_look_up(folder, found)[0], {}, "")
  config, _ = _look_up(folder, found, "--config.data.num_classes=5")
  with pytest.raises(errors.UserError, match="data.num_classes is 3 there and 5 here"):
    folder.check(config, "auto")
  with pytest.raises(errors.UserError, match="--resume=never: .* holds a run"):
    _look_up(folder, found, resume="never")


def test_a_value_that_was_looked_up_is_held_against_the_bounds(tmp_path):
  with pytest.raises(errors.UserError, match="--config.data.num_classes=100000: must be at most"):
    _look_up(Workdir(tmp_path), {"data.num_classes": 100_000})
