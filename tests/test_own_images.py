"""The user's own images from the command line: training, continuing, evaluation, prediction."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import dljax
from dljax.data.image import folder as folders
from experiments import mlp
from tests import command, smallest
from tests.data.image import own_images
from tests.families import EXPERIMENTS, ROOT

ONE = "--mesh=data:1"
SHORT = ("--config.model.widths=8", "--config.batch_size=8", "--config.total_steps=2", "--config.eval_every=2",
         "--config.checkpoint_every=2", "--config.log_every=1")


def _train(run, place, *arguments):
  """Trains and gives the stored config; the folder is not looked at after that."""
  with command.plain_pictures():
    outcome = command.run(mlp, f"--workdir={run}", f"--config.data.folder={place}", *SHORT, *arguments)
  assert outcome.status == 0, outcome
  return json.loads((run / "config.json").read_text())["config"], outcome


def test_a_run_on_a_folder_continues_and_is_evaluated_and_predicts_without_looking_again(tmp_path, monkeypatch):
  place = own_images.folders(tmp_path / "photos", {"cat": 10, "$dog_": 10})
  config, outcome = _train(tmp_path / "run", place, "--config.data.sampler=balanced",
                           "--config.data.class_weights=balanced")
  assert config["data"]["classes"] == ["$dog_", "cat"] and config["data"]["num_train_examples"] == 16
  assert "found data.classes=$dog_,cat\nfound data.num_classes=2\n" in outcome.out
  assert {"data.mean", "data.classes", "data.fitted_to"} <= set(config["found"])

  monkeypatch.setattr(folders, "look_up", None)
  _train(tmp_path / "run", place, "--config.data.sampler=balanced", "--config.data.class_weights=balanced",
         "--config.total_steps=3")
  other = own_images.folders(tmp_path / "other", {"cat": 3}, first=50)
  evaluate = ("--mode=eval", f"--workdir={tmp_path / 'run'}", f"--config.data.folder={other}")
  with command.plain_pictures():
    assert command.run(mlp, *evaluate).status == 0
  found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]
  assert found.keys() == {"test"}
  (other / "cat").rename(other / "emu")
  assert "emu/0.png: 'emu' is none of the 2 classes ($dog_, cat)" in command.refuse(mlp, *evaluate)
  own_images.image(0, 99).save(place / "cat" / "new.png")
  assert "has changed since the run began (added: cat/new.png)" in command.refuse(
      mlp, f"--workdir={tmp_path / 'run'}", f"--config.data.folder={place}", *SHORT, "--config.data.sampler=balanced",
      "--config.data.class_weights=balanced", "--config.total_steps=4")

  image = place / "cat" / "0.png"
  shutil.copy(image, tmp_path / "one.png")
  shutil.rmtree(place)
  outcome = command.run(mlp, "--mode=predict", f"--workdir={tmp_path / 'run'}", f"--input={tmp_path / 'one.png'}")
  assert outcome.status == 0 and re.search(r"one.png  (cat|\$dog_)  0\.\d+", outcome.out)
  row, = dljax.load(tmp_path / "run", build=mlp.build).predict(tmp_path / "one.png")
  assert set(row["probabilities"]) == {"cat", "$dog_"}


@pytest.mark.parametrize("rows, metrics, printed", [
    (["red;green", "green", ""], {"loss", "accuracy", "mean_average_precision", "macro_f1"},
     r"0.png  (red|green|red;green|green;red|)\n"),
    (["1.5", "-20", "7.25"], {"loss", "mse", "mae", "r2"}, r"0.png  -?\d+\.\d{4}\n")],
    ids=["several labels", "numbers"])
def test_a_run_on_a_table_predicts_what_the_table_holds(tmp_path, rows, metrics, printed):
  place = own_images.table(tmp_path / "photos", "file,label", rows)
  _train(tmp_path / "run", place)
  result = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
  assert {split: set(found) for split, found in result.items()} == {"validation": metrics, "test": metrics}
  outcome = command.run(mlp, "--mode=predict", f"--workdir={tmp_path / 'run'}", f"--input={place / '0.png'}")
  assert outcome.status == 0 and re.search(printed, outcome.out), outcome


def test_a_dry_run_without_the_data_asks_for_what_it_needs(tmp_path):
  dry = ("--dry_run", f"--config.data.folder={tmp_path / 'none'}")
  assert "give --config.data.num_classes and --config.data.image_shape" in command.refuse(mlp, *dry)
  outcome = command.run(mlp, *dry, "--config.data.num_classes=7", "--config.data.image_shape=4,4,3",
                        "--config.model.widths=8")
  assert outcome.status == 0 and "1 x 7" in outcome.out
  assert "there is no such folder" in command.refuse(
      mlp, f"--workdir={tmp_path / 'run'}", *dry[1:], "--config.data.num_classes=7", "--config.data.image_shape=4,4,3")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_documented_commands_run(tmp_path, monkeypatch):
  """In a folder that holds what they name; one in a process of its own, as a user starts it."""
  own_images.folders(tmp_path / "photos", {"cat": 20, "dog": 15, "emu": 10})
  own_images.folders(tmp_path / "other", {"cat": 2, "emu": 2}, first=50)
  own_images.table(tmp_path / "movies", "file,label", ["drama;crime", "crime", "", "comedy"], 60)
  own_images.table(tmp_path / "ages", "file,label", ["20.5", "30", "41"])
  own_images.table(tmp_path / "parts", "image,length,width,part", ["1.5,2,train", "2.5,7,train", "1,3,val", "3,1,test"],
                   60, "table.csv")
  monkeypatch.chdir(tmp_path)
  resnets = smallest.arguments("resnet", monkeypatch)
  modes, of_photos = [], ""
  damaged = tmp_path / "photos" / "cat" / "20.png"
  for number, (family, arguments) in enumerate(command.documented("Your own images")):
    mode = next((a.removeprefix("--mode=") for a in arguments if a.startswith("--mode=")), "train")
    modes.append(mode)
    skips = any("skip_corrupt" in argument for argument in arguments)
    if skips:
      damaged.write_bytes(b"damaged")
    if mode == "train":
      run = tmp_path / f"run {number}"
      of_photos = run if any("balanced" in argument for argument in arguments) else of_photos
      arguments = [*arguments, f"--workdir={run}", "--config.total_steps=2", "--config.eval_every=2",
                   "--config.log_every=1", *(resnets if family == "resnet" else ())]
    arguments = [ONE, *(argument.replace("=RUN", f"={of_photos}") for argument in arguments)]
    if skips:
      done = subprocess.run([sys.executable, "-m", f"experiments.{family}", *arguments], capture_output=True, text=True,
                            timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
      status, out, err = done.returncode, done.stdout, done.stderr
    else:
      with smallest.native_convolutions(), command.plain_pictures():
        done = command.run(EXPERIMENTS[family], *arguments)
      status, out, err = done.status, done.out, done.err
    assert status == 0 and "Traceback" not in err, (arguments, err)
    if mode == "train":
      assert "found data.num_train_examples=" in out
      assert (run / "result.json").exists() and list((run / "figures").glob("*.png"))
    if skips:
      assert "skipped 1 of 36 examples of train" in err and "cat/20.png" in (run / "data" / "skipped.json").read_text()
      damaged.unlink()
  assert modes == ["train"] * 8 + ["eval", "predict"]
  assert json.loads((of_photos / "evaluation.json").read_text())["metrics"].keys() == {"test"}
  assert len((tmp_path / "guesses.csv").read_text().splitlines()) == 46
