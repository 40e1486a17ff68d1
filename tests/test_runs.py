"""A run as an object: two lines load it and predict, without its data."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import dljax
from dljax import runs
from dljax.data import sources
from dljax.errors import UserError
from dljax.train.workdir import Workdir
from experiments import mlp, rnn
from tests.command import run

ROOT = Path(__file__).parents[1]
PLAY = ("Speak the speech, I pray you, as I pronounced it to you, trippingly on the tongue: but if "
        "you mouth it, as many of your players do, I had as lief the town-crier spoke my lines.\n") * 20
STEPS = 24


def _train(experiment, workdir: Path, *arguments: str) -> Path:
  outcome = run(experiment, f"--workdir={workdir}", f"--config.total_steps={STEPS}", "--mesh=data:1",
                "--config.log_every=8", "--config.eval_every=8", "--config.checkpoint_every=8", *arguments)
  assert outcome.status == 0, outcome
  return workdir


@pytest.fixture(scope="module")
def digits(prepared, tmp_path_factory) -> Path:
  """A run whose best checkpoint is not its last."""
  folder = tmp_path_factory.mktemp("digits")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(prepared("digits")))
    return _train(mlp, folder / "run", "--config.model.widths=32", "--config.ema_decay=0.5",
                  "--config.optimizer.learning_rate=0.02", "--config.monitor=validation/top_5_accuracy")


@pytest.fixture(scope="module")
def play(tmp_path_factory) -> Path:
  """A run of a language model, whose text is gone."""
  folder = tmp_path_factory.mktemp("play")
  (folder / "play.txt").write_text(PLAY)
  workdir = _train(
      rnn, folder / "run", f"--config.data.file={folder / 'play.txt'}",
      "--config.data.tokenizer=character", "--config.data.vocab_size=60", "--config.data.length=8",
      "--config.model.hidden_size=16", "--config.model.num_layers=1", "--config.model.embed_dim=8",
      "--config.batch_size=8", "--config.eval_batch_size=2", "--config.sampling.max_new_tokens=20",
      "--config.optimizer.learning_rate=0.02")
  (folder / "play.txt").unlink()
  return workdir


@pytest.fixture(autouse=True)
def _no_data(tmp_path, monkeypatch):
  """Wherever a data set could lie there is none, and the network cannot be reached."""
  (tmp_path / "nothing").mkdir()
  for name in ("TFDS_DATA_DIR", "XDG_CACHE_HOME", "HOME"):
    monkeypatch.setenv(name, str(tmp_path / "nothing"))
  monkeypatch.setattr(sources, "open_dataset", lambda *_, **__: pytest.fail("opened a data set"))


@pytest.fixture
def images(tmp_path) -> Path:
  """A folder of five digits."""
  from sklearn.datasets import load_digits

  folder = tmp_path / "images"
  folder.mkdir()
  for i, image in enumerate(load_digits().images[:5]):
    Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(folder / f"{i}.png")
  return folder


def _printed(experiment, workdir: Path, output: Path, *arguments: str) -> list[dict]:
  """The rows of --mode=predict."""
  outcome = run(experiment, f"--workdir={workdir}", "--mode=predict", "--mesh=data:1", f"--output={output}",
                *arguments)
  assert outcome.status == 0, outcome
  return [json.loads(line) for line in output.read_text().splitlines()]


def _nameless(rows):
  return [{name: value for name, value in row.items() if name != "input"} for row in rows]


# --- Predictions ------------------------------------------------------------------------------------------


def test_paths_give_the_rows_of_the_command_line(digits, images, tmp_path):
  printed = _printed(mlp, digits, tmp_path / "out.jsonl", f"--input={images}")
  loaded = dljax.load(digits)
  assert loaded.predict(images) == loaded.predict(str(images)) == printed
  assert loaded.predict(sorted(images.iterdir())[1:3]) == printed[1:3]
  assert not list((tmp_path / "nothing").iterdir())


def test_arrays_give_the_rows_of_their_files(digits, images):
  loaded = dljax.load(str(digits))
  stack = np.stack([np.asarray(Image.open(path)) for path in sorted(images.iterdir())])
  expected = _nameless(loaded.predict(images))
  for given in (stack, stack[..., None] / 255, list(stack), jax.numpy.asarray(stack)):
    assert _nameless(loaded.predict(given)) == expected
  assert [row["input"] for row in loaded.predict([stack[:2], stack[2]])] == [
      "array 0[0]", "array 0[1]", "array 1"]


def test_texts_and_files_are_continued_as_on_the_command_line(play, tmp_path):
  printed = _printed(rnn, play, tmp_path / "out.jsonl", "--prompt=Speak the")
  loaded = dljax.load(play)
  assert loaded.predict("Speak the") == printed and len(printed[0]["text"]) == 20
  assert [row["input"] for row in loaded.predict(["Speak", "I"])] == ["Speak", "I"]
  (tmp_path / "in.txt").write_text("Speak the")
  assert loaded.predict(tmp_path / "in.txt") == [{**printed[0], "input": str(tmp_path / "in.txt")}]


def test_a_prompt_and_its_continuation_stand_together(play, monkeypatch):
  """What is said of compilations, when the first part is made, comes before and not between them."""
  def generate(self, inputs):
    print("compiling the generation ...")
    yield {"tokens": np.full((len(inputs.names), 3), 5, np.int32)}

  monkeypatch.setattr(dljax.runs.Run, "generate", generate)
  outcome = run(rnn, f"--workdir={play}", "--mode=predict", "--prompt=Speak", "--mesh=data:1")
  said, text = outcome.out.splitlines()[:2]
  assert said == "compiling the generation ..." and len(text) > len("Speak") and text.startswith("Speak")


def test_inputs_that_cannot_be_used_are_left_out_or_refused(digits, images, caplog):
  (images / "1.png").write_text("no image")
  loaded = dljax.load(digits)
  assert [Path(row["input"]).stem for row in loaded.predict(images)] == ["0", "2", "3", "4"]
  assert caplog.messages == [f"skipped {images / '1.png'}: is no image that Pillow can read"]
  with pytest.raises(UserError, match=r"^--input: array 0: values outside \[0, 1\]"):
    loaded.predict(np.full((8, 8), 2.0))
  with pytest.raises(UserError, match="nothing to predict for"):
    loaded.predict([])
  with pytest.raises(UserError, match="there is no .*gone"):
    loaded.predict("gone")


def test_a_model_of_texts_refuses_arrays_and_mixtures(play, tmp_path):
  loaded = dljax.load(play)
  with pytest.raises(UserError, match="rnn reads text, not arrays"):
    loaded.predict(np.zeros(3))
  with pytest.raises(UserError, match="texts and files do not go together"):
    loaded.predict(["Speak", tmp_path])


# --- What a run holds -------------------------------------------------------------------------------------


def test_the_weights_and_metrics_are_those_of_the_step(digits, images):
  result = Workdir(digits).result()
  best, latest = dljax.load(digits), dljax.load(digits, step="latest")
  assert best.step == result["checkpoint"] < STEPS == latest.step == dljax.load(digits, step=STEPS).step
  assert best.config.to_dict() == Workdir(digits).read_config().to_dict()
  assert best.metrics == result["metrics"]
  rows = map(json.loads, (digits / "metrics.jsonl").read_text().splitlines())
  logged = next(row for row in rows if (row["step"], row["split"]) == (STEPS, "validation"))
  assert latest.metrics["validation"]["loss"] == logged["loss"] != best.metrics["validation"]["loss"]
  assert repr(best) == f"<mlp digits of {digits}, step {best.step}>"

  # The averaged weights predict, and they are what `variables` holds.
  path = sorted(images.iterdir())[0]
  batch = best.read(runs.Request(paths=[str(path)])).batch
  logits = best.model.apply(best.variables, batch["image"], train=False)
  row, = best.predict(path)
  np.testing.assert_allclose(jax.nn.softmax(logits).max(), row["probability"], rtol=1e-5)
  raw = best.raw(best.read(runs.Request(paths=[str(path)])))
  assert all(len(leaf) == 1 for leaf in jax.tree.leaves(raw))


def test_a_best_checkpoint_that_is_gone_gives_way_to_the_latest(digits, tmp_path, caplog):
  copy = Path(shutil.copytree(digits, tmp_path / "run"))
  best = Workdir(digits).result()["checkpoint"]
  shutil.rmtree(copy / "checkpoints" / str(best))
  assert dljax.load(copy).step == STEPS
  assert caplog.messages == [f"checkpoint {best}, the best, is gone; the latest, {STEPS}, takes its place"]


def test_metrics_that_were_changed_are_refused(digits, tmp_path):
  copy = Path(shutil.copytree(digits, tmp_path / "run"))
  expected = dljax.load(copy, step="latest").metrics
  assert set(expected) == {"validation"} and expected["validation"]["loss"] > 0
  path = copy / "metrics.jsonl"
  data = path.read_bytes()
  path.write_bytes(data.replace(b'"loss": ', b'"loss": 1', 1))
  with pytest.raises(UserError, match="metrics.jsonl was damaged or edited since the checkpoint"):
    dljax.load(copy, step="latest").metrics
  path.write_bytes(data + b"{}")  # what came after the checkpoint does not matter to it
  assert dljax.load(copy, step="latest").metrics == expected
  path.unlink()
  assert dljax.load(copy, step="latest").metrics == {}
  result = json.loads((copy / "result.json").read_text())
  (copy / "result.json").write_text(json.dumps({**result, "run": "another", "sha256": ""}))
  with pytest.raises(UserError, match="result.json belongs to another run than config.json"):
    dljax.load(copy).metrics


def test_an_edit_of_what_decided_the_training_is_said_and_another_runs_config_refused(
    digits, tmp_path, images, caplog):
  copy = Path(shutil.copytree(digits, tmp_path / "run"))
  noted = json.loads((copy / "config.json").read_text())
  noted["config"]["optimizer"]["learning_rate"] = 0.5
  (copy / "config.json").write_text(json.dumps(noted))
  with pytest.raises(UserError, match='config.json was damaged or edited .* write "sha256": ""'):
    dljax.load(copy)
  (copy / "config.json").write_text(json.dumps({**noted, "sha256": ""}))
  assert dljax.load(copy).predict(images) == dljax.load(digits).predict(images)
  line, = caplog.messages
  assert line.endswith("was trained with another config: optimizer.learning_rate is 0.02 there and 0.5 here; the "
                       "edited config.json is used")
  (copy / "config.json").write_text(json.dumps({**noted, "run": "another", "sha256": ""}))
  with pytest.raises(UserError, match="checkpoint .* belongs to another run"):
    dljax.load(copy)


def test_a_build_function_of_ones_own_needs_no_experiment(digits, tmp_path, images):
  copy = Path(shutil.copytree(digits, tmp_path / "run"))
  noted = json.loads((copy / "config.json").read_text())
  noted["config"]["family"], noted["sha256"] = "mine", ""
  (copy / "config.json").write_text(json.dumps(noted))
  with pytest.raises(UserError, match="there is no 'mine'"):
    dljax.load(copy)
  assert dljax.load(copy, build=mlp.build).predict(images) == dljax.load(digits).predict(images)


# --- Bad input --------------------------------------------------------------------------------------------


def test_what_is_no_run_or_no_step_is_refused(digits, tmp_path):
  with pytest.raises(UserError, match=f"{tmp_path} holds no run"):
    dljax.load(tmp_path)
  with pytest.raises(UserError, match="checkpoint 999.*no such step"):
    dljax.load(digits, step=999)
  with pytest.raises(UserError, match="step=soon: must be best, latest or a number"):
    dljax.load(digits, step="soon")
  copy = Path(shutil.copytree(digits, tmp_path / "run"))
  shutil.rmtree(copy / "checkpoints")
  with pytest.raises(UserError, match="holds no checkpoint"):
    dljax.load(copy)


@pytest.mark.parametrize("family", ["os.path", "../evil", "benchmark.x", "__init__", 3, None])
def test_a_family_is_a_name_among_ours(digits, tmp_path, family):
  copy = Path(shutil.copytree(digits, tmp_path / "run"))
  noted = json.loads((copy / "config.json").read_text())
  noted["config"]["family"], noted["sha256"] = family, ""
  (copy / "config.json").write_text(json.dumps(noted))
  with pytest.raises(UserError, match=f"^the family in {copy / 'config.json'}: there is no {str(family)!r}"):
    dljax.load(copy)


@pytest.mark.parametrize("shadow", ["experiments", "experiments.py", "experiments/__init__.py"])
def test_an_experiments_of_ones_own_that_hides_ours_is_named(digits, tmp_path, shadow):
  """A folder without an __init__.py hides ours only from a finder that comes after the path's."""
  here = tmp_path / "work"
  place = here / shadow
  place.parent.mkdir(parents=True)
  if place.suffix:
    place.write_text("raise SystemExit('was executed')")
  else:
    place.mkdir()
  code = f"""
import sys
sys.path[:] = [{str(here)!r}, *(p for p in sys.path if p not in ("", {str(ROOT)!r}))]
import importlib.util
spec = importlib.util.spec_from_file_location("dljax", {str(ROOT / 'dljax' / '__init__.py')!r},
                                              submodule_search_locations=[{str(ROOT / 'dljax')!r}])
sys.modules["dljax"] = dljax = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dljax)
try:
  dljax.load({str(digits)!r})
except ValueError as error:
  print(error)
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=120,
                        env={**os.environ, "PYTHONPATH": ""})
  hiding = place.parent if place.name == "__init__.py" else place
  assert done.returncode == 0, done.stderr
  assert done.stdout == (
      f"{hiding} hides dljax's own experiments, {ROOT / 'experiments'}; rename it, or give the function that "
      "builds the experiment, dljax.load(workdir, build=build)\n")


def test_importing_dljax_imports_nothing_and_has_nothing_else():
  code = ("import sys; before = set(sys.modules); import dljax; print(*sorted(set(sys.modules) - before)); "
          "assert callable(dljax.load) and not hasattr(dljax, 'lood')")
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.stdout.split() == ["dljax"], done
