"""`python -m dljax.interop`: weights in and out, and how bad input ends."""

import functools
import hashlib
import http.server
import json
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dljax import config as config_lib
from dljax import interop
from dljax.interop import hub, variants
from dljax.interop.weights import all_families
from dljax.launch import convert as command
from dljax.models import lenet, resnet, vit
from dljax.tasks.base import CARRY
from dljax.train.checkpoint import Checkpointer
from dljax.train.workdir import Workdir, decisive
from tests.families import EXPERIMENTS
from tests.models.variables import random_variables

RESNET = resnet.VARIANTS["resnet18"](num_classes=7, width=4)
LENET = lenet.VARIANTS["lenet5"](num_classes=10)


@functools.cache
def _tensors(model=RESNET, source="torchvision", shape=(1, 32, 32, 3)):
  return interop.dump(model, random_variables(model, np.zeros(shape)), source)


@pytest.fixture
def weights(tmp_path):
  """A file of a narrow resnet18 of seven classes, as torchvision would write it."""
  path = tmp_path / "in.safetensors"
  safetensors.numpy.save_file(_tensors() | {"bn1.num_batches_tracked": np.zeros((), np.int64)}, path)
  return path


def _refuse(capsys, *arguments):
  assert command.main([str(a) for a in arguments]) == 2
  out, err = capsys.readouterr()
  assert err.startswith("error: ") and err.count("\n") == 1 and "written" not in out
  return err


def test_there_and_back_bit_for_bit(tmp_path, weights):
  flags = ["--source=torchvision", "--model=resnet18", "--set=width=4"]
  assert command.main([*flags, str(weights), str(tmp_path / "ours")]) == 0
  assert json.loads((tmp_path / "ours" / "model.json").read_text())["settings"] == {"num_classes": 7, "width": 4}
  ours = safetensors.numpy.load_file(tmp_path / "ours" / "weights.safetensors")
  np.testing.assert_array_equal(ours["params/head/kernel"], _tensors()["fc.weight"].T)
  assert command.main(["--to=torchvision", str(tmp_path / "ours"), str(tmp_path / "out.safetensors")]) == 0
  back = safetensors.numpy.load_file(tmp_path / "out.safetensors")
  assert back.keys() == _tensors().keys()
  jax.tree.map(np.testing.assert_array_equal, back, _tensors())
  with safetensors.safe_open(tmp_path / "out.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}  # transformers and timm refuse a file without
  assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors", "ours", "out.safetensors"}


def test_as_a_command(tmp_path):
  safetensors.numpy.save_file(_tensors(LENET, "torch", (1, 28, 28, 1)), tmp_path / "in.safetensors")
  done = subprocess.run(
      [sys.executable, "-m", "dljax.interop", "--source=torch", "--model=lenet5", tmp_path / "in.safetensors",
       tmp_path / "out"], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == f"10 tensors of lenet5 written to {tmp_path / 'out'}"


@pytest.mark.parametrize("flags, message", [
    ([], "torch, torchvision"),
    (["--source=torchvison"], "did you mean torchvision"),
    (["--source=torchvision"], "--model=NAME is missing"),
    (["--source=torchvision", "--model=resnet81"], "there is no 'resnet81'; did you mean resnet18"),
    (["--source=torchvision", "--model=resnet18", "--set=widht=4"], "there is no 'widht'; did you mean width"),
    (["--source=torchvision", "--model=resnet18", "--set=width"], "--set=FIELD=VALUE"),
    (["--source=torchvision", "--model=resnet18"], "has shape (4,), but torchvision ResNet of these sizes has (64,)"),
    (["--source=torchvision", "--model=resnet34", "--set=width=4"], "and 77 more are missing"),
    (["--source=torch", "--model=lenet5"], "are missing"),
    (["--source=torchvision", "--model=resnet18", "--to=torchvision"], "must end in .safetensors"),
    (["--source=torchvision", "--modle=resnet18"], "did you mean --model"),
    (["--source=torchvision", "--model=resnet18", "more"], "'more' is one name too many"),
])
def test_bad_flags_end_in_one_line_and_write_nothing(tmp_path, weights, capsys, flags, message):
  assert message in _refuse(capsys, weights, tmp_path / "out", *flags)
  assert list(tmp_path.iterdir()) == [weights]


def test_bad_files_are_named(tmp_path, weights, capsys):
  flags = ["--source=torchvision", "--model=resnet18", "--set=width=4"]
  out = tmp_path / "out"
  assert "absent.safetensors: there is no such file" in _refuse(capsys, *flags, tmp_path / "absent.safetensors", out)
  (tmp_path / "disguised.safetensors").write_bytes(b"PK\3\4 and so on")
  assert "is a pickle" in _refuse(capsys, *flags, tmp_path / "disguised.safetensors", out)
  assert "exists" in _refuse(capsys, *flags, weights, tmp_path)
  assert "there is no folder" in _refuse(capsys, *flags, weights, tmp_path / "no" / "out")
  (tmp_path / "empty").mkdir()
  assert "model.json is missing" in _refuse(capsys, "--to=torchvision", tmp_path / "empty", tmp_path / "o.safetensors")
  tensors = safetensors.numpy.load_file(weights)
  safetensors.numpy.save_file({**tensors, "layer9.weight": np.zeros(1, np.float32)}, weights)
  assert "layer9.weight is left over" in _refuse(capsys, *flags, weights, out)
  assert not out.exists()


def test_an_output_that_cannot_be_written_is_a_failure(tmp_path, weights, monkeypatch, capsys):
  def fail(tensors, path, **_):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", fail)
  flags = ["--source=torchvision", "--model=resnet18", "--set=width=4"]
  assert command.main([*flags, str(weights), str(tmp_path / "out")]) == 1
  assert "No space left on device" in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == [weights]


# --- Runs -------------------------------------------------------------------------------------------------

RUNS = {  # family, preset, source, and what makes the model small, or one that the source has
    "mlp": ("mlp", "digits", "torch", ["widths=7,5", "activation=tanh"]),
    "lenet": ("lenet", "digits", "torch", []),
    "alexnet": ("alexnet", "digits", "torchvision", ["width_factor=0.125", "hidden_width=8"]),
    "vgg": ("vgg", "digits", "torchvision", ["variant=vgg11_bn", "width_factor=0.125", "hidden_width=8"]),
    "resnet": ("resnet", "digits", "torchvision", []),
    "efficientnet": ("efficientnet", "digits", "torchvision", []),
    "vit": ("vit", "digits", "torchvision", ["pool=token", "positions=learned"]),
    "vit-timm": ("vit", "digits", "timm", ["pool=token", "positions=learned"]),
    "retinanet": ("retinanet", "digit_scenes", "torchvision", ["frozen_norm=true"]),
    "unet": ("unet", "digit_scenes", "torch", ["width=3", "num_pools=2"]),
    "language model": ("rnn", "pydoc", "torch", ["cell=gru", "hidden_size=6", "embed_dim=5", "num_layers=3"]),
    "tied": ("rnn", "pydoc", "torch", ["hidden_size=6", "embed_dim=5", "tied=true"]),
    "forecaster": ("rnn", "temperatures", "torch", ["hidden_size=6", "loss=pinball"]),
    "dlinear": ("rnn", "temperatures", "torch", ["variant=dlinear", "kernel_size=5"]),
    "deepspeech": ("deepspeech", "morse", "torch", []),
    "decoder": ("gpt", "pydoc", "transformers", [
        "embed_dim=16", "num_layers=2", "num_heads=4", "num_kv_heads=2", "mlp_dim=7"]),
    "gpt2": ("gpt", "pydoc", "transformers", [
        "variant=gpt_nano", "qk_norm=false", "use_bias=true", "embed_dim=12", "num_layers=2", "num_heads=2", "mlp_dim=7"]),
    "bert": ("bert", "pydoc", "transformers", []),
    "masked words": ("bert", "pydoc_mlm", "transformers", []),
}


def _write_run(path, family, preset, overrides):
  """A run's folder as training leaves it, with random weights; gives the model and its variables."""
  config = EXPERIMENTS[family].get_config(preset)
  config_lib.apply_overrides(config, [f"--config.model.{override}" for override in overrides])
  experiment = EXPERIMENTS[family].build(config)
  zeros = {key: np.zeros(spec.shape, spec.dtype) for key, spec in experiment.data.batch_spec.items()}
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
      lambda spec: rng.normal(size=spec.shape).astype(spec.dtype),
      jax.eval_shape(lambda: experiment.task.init(jax.random.key(0), zeros)))
  params = variables.pop("params")
  run = Workdir(path)
  path.mkdir()
  run.start(config, {}, "", variants.describe(experiment.task.model))
  with Checkpointer(run.checkpoints, run=run.run, config=decisive(config)) as checkpointer:
    checkpointer.save(1, {"params": params, "model_state": variables}, {"best_step": 1})
  variables.pop(CARRY, None)
  return experiment.task.model, {"params": params, **variables}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_of_every_family_goes_to_its_source_and_back_bit_for_bit(tmp_path, case):
  family, preset, source, overrides = RUNS[case]
  model, variables = _write_run(tmp_path / "run", family, preset, overrides)
  assert variants.build(**json.loads((tmp_path / "run" / "model.json").read_text())) == model
  assert command.main([f"--to={source}", str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 0
  tensors = interop.read(tmp_path / "out.safetensors")
  back = interop.load(model, tensors, source)
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(back)):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
  if case == "tied":
    np.testing.assert_array_equal(tensors["decoder.weight"], tensors["embedding.weight"])


def test_every_family_with_a_source_has_a_run_above():
  covered = {(EXPERIMENTS[family].__name__.rpartition(".")[2], source) for family, _, source, _ in RUNS.values()}
  assert covered >= {(module.__name__.rpartition(".")[2], source) for module in all_families()
                     for source in module.TABLES} - {("baselines", "torch")}  # which is the run of DLinear


def test_a_run_that_does_not_say_its_model_needs_it_named(tmp_path, capsys):
  _write_run(tmp_path / "run", "mlp", "digits", ["widths=7"])
  (tmp_path / "run" / "model.json").unlink()
  out = tmp_path / "out.safetensors"
  assert "--model=NAME is missing" in _refuse(capsys, "--to=torch", tmp_path / "run", out)
  named = ["--model=mlp", "--set=widths=[7]", "--set=num_classes=10"]
  assert command.main(["--to=torch", *named, str(tmp_path / "run"), str(out)]) == 0
  assert interop.read(out)["hidden1.weight"].shape[0] == 7


def test_another_model_than_the_runs_is_refused(tmp_path, capsys):
  _write_run(tmp_path / "run", "mlp", "digits", ["widths=7"])
  line = _refuse(capsys, "--to=torch", "--model=lenet5", tmp_path / "run", tmp_path / "out.safetensors")
  assert "--model=lenet5" in line and "holds a mlp; drop the flag" in line
  (tmp_path / "run" / "model.json").write_text("{}")
  line = _refuse(capsys, "--to=torch", tmp_path / "run", tmp_path / "out.safetensors")
  assert "model.json is not what dljax writes there ('model' is missing or wrong)" in line


def test_a_folder_of_another_library_says_its_model(tmp_path):
  net = vit.ViT(num_classes=3, patch_size=2, embed_dim=6, num_layers=1, num_heads=3)
  theirs, sizes = tmp_path / "theirs", {"patch_size": 2, "embed_dim": 6, "depth": 1, "num_heads": 3}
  theirs.mkdir()
  tensors = _tensors(net, "timm", (1, 8, 8, 3))
  safetensors.numpy.save_file(tensors, theirs / "model.safetensors")
  (theirs / "config.json").write_text(json.dumps(
      {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": sizes}))
  assert command.main(["--source=timm", str(theirs), str(tmp_path / "ours")]) == 0
  model, variables = interop.from_folder(tmp_path / "ours", interop.OURS)
  assert model == net
  jax.tree.map(np.testing.assert_array_equal, interop.dump(model, variables, "timm"), tensors)


# --- The Hugging Face Hub ---------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
  """Serves `files` of the repository someone/net as the Hub does."""

  files, asked = {}, []

  def do_GET(self):
    self.asked.append(self.path)
    if self.path == "/api/models/someone/net?blobs=true":
      siblings = [{"rfilename": name, "size": len(data), "lfs": {"sha256": hashlib.sha256(data).hexdigest()}}
                  for name, data in self.files.items()]
      body = json.dumps({"sha": "c0ffee", "siblings": [*siblings, {"rfilename": "README.md", "size": 3}]}).encode()
    else:
      body = self.files.get(self.path.removeprefix("/someone/net/resolve/c0ffee/"))
    if body is None:
      self.send_error(404)
      return
    self.send_response(200)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *args):
    pass


@pytest.fixture
def server(tmp_path, monkeypatch):
  handler = type("Handler", (Hub,), {"files": {}, "asked": []})
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{httpd.server_address[1]}")
    yield handler
    httpd.shutdown()


def test_weights_come_from_the_hub_once(tmp_path, server, weights, monkeypatch):
  server.files["model.safetensors"] = weights.read_bytes()
  flags = ["--source=torchvision", "--model=resnet18", "--set=width=4", "hub:someone/net"]
  assert command.main([*flags, str(tmp_path / "out")]) == 0
  np.testing.assert_array_equal(
      interop.read(tmp_path / "out" / "weights.safetensors")["params/head/bias"], _tensors()["fc.bias"])
  interop.read("hub:someone/net")
  assert sum("resolve" in path for path in server.asked) == 1
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody there
  assert interop.read("hub:someone/net").keys() == safetensors.numpy.load_file(weights).keys()


def test_split_weights_are_put_together(server, weights):
  tensors = safetensors.numpy.load_file(weights)
  names = sorted(tensors)
  for i, part in enumerate((names[:9], names[9:])):
    data = safetensors.numpy.save({name: tensors[name] for name in part})
    server.files[f"model-0000{i + 1}-of-00002.safetensors"] = data
  assert interop.read("hub:someone/net").keys() == tensors.keys()


def test_what_the_hub_cannot_give_is_told_in_one_line(tmp_path, server, weights, monkeypatch, capsys):
  ask = lambda name: _refuse(capsys, "--source=torchvision", "--model=resnet18", name, tmp_path / "out")
  assert "holds no .safetensors file; choose another" in ask("hub:someone/net")
  server.files["pytorch_model.bin"] = b""
  assert "a pickle, which can run any code" in ask("hub:someone/net")
  server.files |= {"a.safetensors": weights.read_bytes(), "b.safetensors": b"other"}
  assert "choose hub:someone/net/a.safetensors or hub:someone/net/b.safetensors" in ask("hub:someone/net")
  assert interop.read("hub:someone/net/a.safetensors").keys() == safetensors.numpy.load_file(weights).keys()
  assert "did you mean a.safetensors" in ask("hub:someone/net/aa.safetensors")
  assert "404" in ask("hub:someone/else")
  assert "write hub:OWNER/NAME" in ask("hub:net")
  monkeypatch.setattr(hub.downloads, "sha256", lambda path: "other")
  assert "checksum" in ask("hub:someone/net/b.safetensors")
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  assert "no network" in ask("hub:someone/third")
  assert not (tmp_path / "out").exists()
  assert not list((tmp_path / "cache").rglob("b.safetensors*"))
