"""The row "models" compares what it says it compares; fake sides answer for the real ones, which take minutes."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from dljax.errors import RunError, UserError
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import jax_worker, models, peers, serve, tables, torch_worker
from experiments.benchmark.cases import CASES
from experiments.benchmark.measurement import Settings
from tests.families import ROOT, WITH_PEER

# A side that computes nothing. It logs its process and each request, and takes its answers from what FAKE says.
FAKE = """
import json, os, sys, time
job, plan = json.loads(sys.argv[-1]), json.loads(os.environ["FAKE"])
plan = {**plan["all"], **plan.get(job["side"], {})}

def log(what):
  with open(os.environ["FAKE_LOG"], "a") as file:
    file.write(json.dumps([job["side"], what, os.getpid()]) + "\\n")

def go_wrong(what):
  if plan.get("hang") == what:
    time.sleep(600)
  if plan.get("die") == what:
    sys.exit(f"Traceback: ...\\n  a line\\n\\nMemoryError: no room for {what}")

log("build")
go_wrong("build")
facts = {"device": "abacus", "platform": "cpu", "first_step_seconds": 1.5, "parameters": 7, "train_flops": 10**9,
         "batch": {"image": [2, 3, 3, 1], "label": [2]}, "classes": 10, "job": job, **plan.get("facts", {})}
print(json.dumps(facts), flush=True)
turns = {}
for line in sys.stdin:
  quantity = json.loads(line)
  log(quantity)
  go_wrong(quantity)
  turn = turns[quantity] = turns.get(quantity, -1) + 1
  answer = {"seconds": plan[quantity][turn], "steps": 4, "peak_bytes": 1000 * (turn + 1)}
  print(json.dumps(answer), flush=True)
"""
TURNS = {"train": [2.0, 4.0, 9.0], "inference": [1.0, 1.0, 1.0], "product": [1.0, 2.0, 4.0]}


class Fake:
  """Fake sides: `plan` says what they do, `log` what they were asked, in order."""

  def __init__(self, path, monkeypatch):
    script = path / "fake.py"
    script.write_text(FAKE)
    self._log, self.plan = path / "log", {"all": TURNS}
    self.peers = models.Peers(sys.executable, {"torch": "1.0", "torchvision": "0.1"}, {})
    monkeypatch.setattr(models, "OUR_WORKER", (sys.executable, "-S", str(script)))
    monkeypatch.setattr(models, "PEER_WORKER", str(script))
    monkeypatch.setattr(models, "PAUSE", 0)
    monkeypatch.setenv("FAKE_LOG", str(self._log))
    self._setenv = monkeypatch.setenv

  def measure(self, *cases, repeats=3):
    self._setenv("FAKE", json.dumps(self.plan))
    return models.measure_models(Settings(repeats=repeats), cases, self.peers)

  @property
  def log(self):
    return [json.loads(line)[:2] for line in self._log.read_text().splitlines()]

  def assert_all_ended(self):
    pids = {json.loads(line)[2] for line in self._log.read_text().splitlines()}
    assert pids
    for pid in pids:
      with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.fixture
def fake(tmp_path, monkeypatch):
  return Fake(tmp_path, monkeypatch)


SIDES = ["dljax", "flax", "torch contiguous", "torch channels_last"]


def test_the_sides_take_turns_one_at_a_time(fake):
  fake.measure("lenet", repeats=2)
  turn = [[side, quantity] for quantity in ("train", "inference") for side in SIDES]
  turn += [["dljax", "product"], ["torch contiguous", "product"]]
  assert fake.log == [[side, "build"] for side in SIDES] + 2 * turn
  fake.assert_all_ended()


def test_all_turns_are_kept_and_all_sides_told_the_same(fake):
  _, found = fake.measure("lenet")
  case = found["cases"]["lenet"]
  assert list(case["sides"]) == SIDES
  for name, side in case["sides"].items():
    assert {k: side["seconds"][k] for k in ("train", "inference")} == {k: TURNS[k] for k in ("train", "inference")}
    assert side["steps"]["train"] == 4
    assert side["peak_bytes"] == 1000, "the matrices of the product would count"
    assert side["job"]["case"] == "lenet" and side["job"]["turn_seconds"] == 1.0
    if name.startswith("torch"):
      assert side["job"]["batch"] == {"image": [2, 3, 3, 1], "label": [2]} and side["job"]["classes"] == 10
      assert side["job"]["layout"] == name.split()[1] and side["job"]["family"] == "lenet"
      assert side["job"]["threads"] == found["threads"]
      assert not side["job"]["accelerator"]
  assert case["peak_flops_per_second"] == 2 * 2048**3 / 2.0
  json.dumps(found)


def test_of_the_layouts_the_faster_counts_for_each_quantity_apart(fake):
  fake.plan |= {
      "dljax": {"inference": [3.0, 3.0, 3.0]},
      "flax": {"train": [40.0, 40.0, 40.0]},
      "torch contiguous": {"train": [1.0, 8.0, 8.0], "inference": [5.0, 6.0, 7.0]},
      "torch channels_last": {"train": [2.0, 5.0, 90.0], "inference": [9.0, 9.0, 1.0]}}
  found, _ = fake.measure("efficientnet_b0")
  assert [(m.what, m.bound) for m in found] == [
      ("train step: dljax / torch channels_last", 1.0), ("inference: dljax / torch contiguous", 1.0),
      ("train step: dljax / flax", None), ("inference: dljax / flax", None)]
  assert {m.name for m in found} == {"efficientnet_b0, 2x3x3x1"}
  train, inference, flax, _ = found
  assert (train.value, train.low, train.high) == (4 / 5, 9 / 90, 1.0)
  assert train.details == {"dljax_seconds": 4.0, "torch_channels_last_seconds": 5.0}
  assert (inference.value, inference.low, inference.high) == (3 / 6, 3 / 7, 3 / 5)
  assert flax.value == 4 / 40 and flax.holds is None


def test_a_case_whose_peer_is_missing_is_measured_without_it(fake):
  fake.peers = models.Peers(sys.executable, {"torch": "1.0"}, {"torchvision": "No module named 'torchvision'"})
  found, details = fake.measure("mlp", "resnet18", repeats=1)
  assert list(details["cases"]["mlp"]["sides"]) == ["dljax", "flax", "torch contiguous"]
  assert list(details["cases"]["resnet18"]["sides"]) == ["dljax", "flax"]
  assert [m.what for m in found if m.name.startswith("resnet18")] == [
      "train step: dljax / flax", "inference: dljax / flax"]


def test_on_a_tpu_no_second_process_of_ours_is_started(fake):
  fake.plan["dljax"] = {"facts": {"platform": "tpu"}}
  _, found = fake.measure("mlp", repeats=1)
  assert list(found["cases"]["mlp"]["sides"]) == ["dljax", "torch contiguous"]
  assert found["cases"]["mlp"]["sides"]["torch contiguous"]["job"]["accelerator"]


def test_networks_of_different_sizes_are_not_compared(fake):
  fake.plan["torch contiguous"] = {"facts": {"parameters": 1234}}
  with pytest.raises(RunError) as error:
    fake.measure("lenet")
  assert str(error.value) == ("models: lenet: dljax has 7 parameters and torch contiguous 1,234: they are not the same "
                              "network, and not compared")
  assert {what for _, what in fake.log} == {"build"}
  fake.assert_all_ended()


@pytest.mark.parametrize("when", ["build", "train", "inference"])
def test_a_side_that_dies_is_told_in_a_line_and_ends_the_others(fake, when):
  fake.plan["flax"] = {"die": when}
  with pytest.raises(RunError) as error:
    fake.measure("lenet")
  assert str(error.value) == (
      f"models: lenet, flax: its process ended with status 1; its last words: Traceback: ... / a line / MemoryError: "
      f"no room for {when}")
  fake.assert_all_ended()


def test_a_side_that_hangs_is_ended(fake, monkeypatch):
  fake.plan["flax"] = {"hang": "train"}
  monkeypatch.setattr(models, "LONGEST_WAIT", 2.0)
  with pytest.raises(RunError, match="^models: mlp, flax: no answer within 2 s, so it was ended; its last words: none"):
    fake.measure("mlp")
  fake.assert_all_ended()


@pytest.mark.parametrize("method", ["run", "_answer"])
def test_ctrl_c_leaves_no_process(fake, monkeypatch, method):
  original = getattr(models.Worker, method)

  def interrupted(self, *args):
    original(self, *args)
    raise KeyboardInterrupt

  monkeypatch.setattr(models.Worker, method, interrupted)
  with pytest.raises(KeyboardInterrupt):
    fake.measure("mlp")
  fake.assert_all_ended()


def test_a_worker_ends_when_nobody_is_left_to_ask(fake, monkeypatch):
  """So that none survives a parent that was killed."""
  monkeypatch.setenv("FAKE", json.dumps(fake.plan))
  worker = models.Worker("x", models.OUR_WORKER, {"side": "dljax"}, os.environ)
  worker._process.stdin.close()
  assert worker._process.wait(timeout=60) == 0
  worker.__exit__()


def test_the_command_shows_two_tables_and_writes_json_and_a_picture(fake, tmp_path, capsys):
  plan = {**fake.plan, "torch channels_last": {"train": [3.0, 3.2, 9.5]}}
  output = tmp_path / "speed.json"
  for name in benchmark._FLAGS:
    benchmark._FLAGS[name].unparse()
  argv = ["benchmark", "--rows=models", "--models=mlp,efficientnet_b0", "--repeats=3", f"--output={output}"]
  with mock.patch.dict(os.environ, FAKE=json.dumps(plan)), mock.patch.object(sys, "argv", argv), \
       mock.patch.object(benchmark, "find_peers", lambda flag: fake.peers):
    with pytest.raises(SystemExit) as end:
      benchmark.main()
  assert end.value.code == 0
  out, err = capsys.readouterr()
  assert "peer torchvision 0.1" in err
  assert max(map(len, out.splitlines())) <= 140
  for text in ("abacus", "torch 1.0, torchvision 0.1", "efficientnet_b0, 2x3x3x1", "4000 (2000..9000)", "1.250",
               "0.667..1.25", "holds", "peak MB", "of peak"):
    assert text in out
  report = json.loads(output.read_text())
  assert set(report) == {"machine", "settings", "rows", "models"}
  assert report["machine"]["device"] == "abacus"
  assert {row["row"] for row in report["rows"]} == {"models"} and len(report["rows"]) == 8
  assert report["models"]["cases"]["mlp"]["sides"]["torch contiguous"]["seconds"]["train"] == TURNS["train"]
  with Image.open(tmp_path / "speed.png") as picture:
    assert min(picture.size) > 300


def test_the_picture_shows_medians_and_turns_as_multiples_of_the_peer():
  side = lambda *seconds: {"seconds": {"train": seconds, "inference": seconds}}
  figure = tables.draw({"cases": {
      "a": {"sides": {"dljax": side(1, 2, 3), "flax": side(8, 8, 8), "torch contiguous": side(4, 4, 4),
                      "torch channels_last": side(5, 5, 5)}},
      "b": {"sides": {"dljax": side(2, 2, 2), "flax": side(3, 3, 3)}}}})
  axes = figure.axes[0]
  assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
  assert [text.get_text() for text in axes.texts] == ["0.50", "2.00", "1.00", "1.25", "1.00", "1.50"]
  whisker = next(line for line in axes.lines if line.get_color() == "#333333")
  np.testing.assert_allclose(whisker.get_xdata(), [0.25, 0.75])


# Finding peers.


def probe(tmp_path, monkeypatch, answer):
  script = tmp_path / "probe.py"
  script.write_text(f"print('chatter'); print({json.dumps(answer)!r})")
  monkeypatch.setattr(models, "PEER_WORKER", str(script))


def test_what_was_found_and_how_to_get_the_rest_is_said(tmp_path, monkeypatch):
  missing = {"torchvision": "No module named 'torchvision'"}
  probe(tmp_path, monkeypatch, {"found": {"torch": "2.0"}, "missing": missing})
  told = models.find_peers("").describe()
  assert f"peer torch 2.0, of {sys.executable}" in told
  assert "peer torchvision: not found (No module named 'torchvision')" in told
  assert "python3 -m venv peers && peers/bin/pip install torch torchvision" in told
  assert "--peer_python=peers/bin/python" in told
  probe(tmp_path, monkeypatch, {"found": {"torch": "2.0", "torchvision": "0.1"}, "missing": {}})
  assert "get" not in models.find_peers("").describe()


def test_an_interpreter_that_was_named_must_have_torch(tmp_path, monkeypatch):
  probe(tmp_path, monkeypatch, {"found": {}, "missing": {"torch": "No module named 'torch'"}})
  assert not models.find_peers("").found  # nobody asked for it
  with pytest.raises(UserError, match=f"{re.escape(sys.executable)} has no torch .* -m pip install torch"):
    models.find_peers(sys.executable)


def test_the_peers_script_needs_nothing_of_ours(tmp_path):
  """Not even the packages of this interpreter."""
  done = subprocess.run([sys.executable, "-S", "-E", torch_worker.__file__], cwd=tmp_path, capture_output=True,
                        text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  answer = json.loads(done.stdout)
  assert answer["missing"] == {name: f"No module named '{name}'" for name in ("torch", "torchvision", "timm", "transformers")}


def test_operators_that_torchvision_does_not_find_are_named_for_it(tmp_path):
  (tmp_path / "torch").mkdir()
  (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.0'\nfrom torch import library")
  (tmp_path / "torch" / "library.py").write_text(
      "defined = []\nclass Library:\n  def __init__(self, *names): defined.append(names)\n"
      "  def define(self, signature): defined.append(signature.split('(')[0])\n")
  (tmp_path / "torchvision").mkdir()
  (tmp_path / "torchvision" / "__init__.py").write_text(
      "import torchvision.part\nfrom torch.library import defined\n"
      "if 'nms' not in defined: raise RuntimeError('operator torchvision::nms does not exist')\n"
      "__version__ = '-'.join(defined[1:])\n")
  (tmp_path / "torchvision" / "part.py").write_text("")
  done = subprocess.run([sys.executable, torch_worker.__file__], env={**os.environ, "PYTHONPATH": str(tmp_path)},
                        capture_output=True, text=True, timeout=60)
  assert json.loads(done.stdout)["found"] == {"torch": "2.0", "torchvision": "nms-qnms"}


# Cases.


def test_every_family_with_a_peer_has_a_case_and_every_case_a_network_of_the_peer():
  assert {case.family for case in CASES.values()} == set(WITH_PEER)
  assert {(case.family, name) for name, case in CASES.items()} == set(_networks())
  assert {case.peer for case in CASES.values()} <= set(peers.PACKAGES)


def _networks():
  """(family, case) of each entry of a NETWORKS of the peer, read without torch."""
  for path in Path(peers.__file__).parent.glob("[!_]*.py"):
    table, = (node.value for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)
              and node.targets[0].id == "NETWORKS")
    yield from ((path.stem, key.value) for key in table.keys)


# What torch is to a peer's file that only builds a network and reads no number of it.
TORCH = """
class Module:
  def __init__(self, *args, **kwargs): pass
  def __getattr__(self, name): return Module
def __getattr__(name): return Module
"""


def test_a_worker_imports_the_file_of_its_family_alone(tmp_path):
  """Under another interpreter's packages, of which a class that takes anything stands for all of torch.nn."""
  (tmp_path / "torch").mkdir()
  (tmp_path / "torch" / "__init__.py").write_text("from torch import nn")
  (tmp_path / "torch" / "nn.py").write_text(TORCH)
  code = ("import sys; from experiments.benchmark.peers import rnn; model = rnn.NETWORKS['lstm'](9); "
          "print(type(model).__name__, *sorted(vars(model)), *(m for m in sys.modules if '.peers.' in m))")
  done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT,
                        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, check=True)
  assert done.stdout.split() == [
      "LanguageModel", "carry", "decoder", "embedding", "rnn", "experiments.benchmark.peers.rnn"]


BATCHES = {"mlp": (128, 28, 28, 1), "lenet": (128, 28, 28, 1), "lenet_max": (128, 28, 28, 1),
           "unet": (16, 96, 96, 1), "alexnet": (64, 32, 32, 3), "vgg11": (64, 32, 32, 3), "resnet18": (64, 32, 32, 3),
           "resnet50": (32, 64, 64, 3), "retinanet": (16, 96, 96, 1), "efficientnet_b0": (16, 128, 128, 3),
           "vit_ti16": (16, 224, 224, 3), "lstm": (32, 64), "gru": (32, 64), "deepspeech": (16, 880, 16),
           "gpt": (16, 128), "bert_small": (16, 128)}
PARAMETERS = {"mlp": 669_706, "lenet": 61_706, "lenet_max": 61_706, "unet": 482_619, "alexnet": 5_871_434,
              "vgg11": 9_750_922, "resnet18": 11_173_962, "resnet50": 23_528_522, "retinanet": 1_562_116,
              "efficientnet_b0": 4_020_358, "vit_ti16": 5_526_346, "lstm": 1_565_672, "gru": 1_302_504,
              "deepspeech": 469_750, "gpt": 10_722_048, "bert_small": 14_163_408}  # of the peers


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_the_peers_network_trained_by_plain_momentum(name):
  experiment = jax_worker.build_experiment(CASES[name])
  assert experiment.data.batch_spec[serve.input_field(experiment.data.batch_spec)].shape == BATCHES[name]
  optimizer = experiment.config.optimizer
  assert (optimizer.name, optimizer.momentum, optimizer.weight_decay, optimizer.l2) == ("momentum", 0.9, 0, 0)
  assert (optimizer.schedule, optimizer.warmup_fraction) == ("constant", 0)
  batch = jax_worker.random_batch(experiment)
  assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
      k: (s.shape, s.dtype) for k, s in experiment.data.batch_spec.items()}
  assert batch["mask"].min() == 1
  assert batch.pop("id").tolist() == list(range(experiment.config.batch_size))
  text = [batch.pop("targets")] if "targets" in batch else []
  for field, inputs in (("length", "tokens" if text else "features"), ("token_length", "tokens")):
    if field in batch:
      assert (batch.pop(field) == batch[inputs].shape[1]).all()
  if "places" in batch:
    assert 0 <= (places := batch.pop("places")).min() < places.max() < batch["tokens"].shape[1]
  labels, = (x for x in batch.values() if np.issubdtype(x.dtype, np.integer))
  assert 0 <= labels.min() < labels.max() < jax_worker.num_classes(experiment)
  assert not batch.get("reset", np.zeros(1)).any(), "the state goes on"
  if "boxes" in batch:
    low, high = batch["boxes"][..., :2], batch["boxes"][..., 2:]
    assert low.min() >= 0 and (high - low).min() > 9 and high.max() <= 96 and batch["box_mask"].min() == 1
  variables = jax.eval_shape(experiment.task.init, jax.random.key(0), experiment.data.batch_spec)
  assert sum(x.size for x in jax.tree.leaves(variables["params"])) == PARAMETERS[name]


LOWER = """
from experiments.benchmark import jax_worker
from experiments.benchmark.bare_step import ONE_DEVICE
from experiments.benchmark.cases import CASES
from dljax.train.program import Program
if {flax}:
  jax_worker.use_native_operators()
text = Program(jax_worker.build_experiment(CASES["lenet_max"]), ONE_DEVICE).lower_train_step().as_text()
print(text.count("stablehlo.convolution"), text.count("stablehlo.select_and_scatter"))
"""


@pytest.mark.parametrize("flax", [False, True])
def test_plain_flax_has_native_operators_and_ours_has_our_own(flax):
  done = subprocess.run([sys.executable, "-c", LOWER.format(flax=flax)], cwd=ROOT, capture_output=True, text=True,
                        timeout=300, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
  convolutions, pools = map(int, done.stdout.split())
  # Two layers: forward, gradient of the kernel, and of the second layer's input; two pools. Ours takes the native form
  # for the gradient of the second layer's kernel alone.
  assert (convolutions, pools) == ((5, 2) if flax else (1, 0))


def test_every_operator_is_switched_off():
  """A new file in `dljax/ops` belongs into `use_native_operators` too; a crop and a rotation have but one form, and
  kernels are those of attention."""
  assert {path.stem for path in (ROOT / "dljax" / "ops").glob("*.py")} == {
      "__init__", "attention", "barrier", "collectives", "conv", "crop", "ctc", "dense", "gelu", "kernels", "norm",
      "pool", "recurrence", "rotary"}


NATIVE = """
import jax, numpy as np
from experiments.benchmark import jax_worker
from experiments.benchmark.cases import CASES
if {flax}:
  jax_worker.use_native_operators()
losses = []
for name in "lstm", "gru", "deepspeech", "vit_ti16":
  experiment = jax_worker.build_experiment(CASES[name])
  task, batch = experiment.task, jax.tree.map(lambda x: x[:2], jax_worker.random_batch(experiment))
  variables = task.init(jax.random.key(0), batch)
  state = {{k: v for k, v in variables.items() if k != "params"}}
  def loss(params):
    return task.loss(params, state, batch, jax.random.key(1), denominators=task.denominators(batch), train=True).loss
  value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
  losses += [value, *(np.linalg.norm(x) for x in jax.tree.leaves(grads))]
print(*map(float, losses))
"""


@pytest.mark.slow
def test_what_replaces_our_operators_for_sequences_computes_the_same():
  sides = [subprocess.run([sys.executable, "-c", NATIVE.format(flax=flax)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True).stdout.split()
           for flax in (False, True)]
  ours, native = np.array(sides, float)
  np.testing.assert_allclose(ours, native, rtol=1e-3, atol=1e-6)
  assert (ours != native).any(), "neither was replaced"


@pytest.mark.slow
def test_a_model_that_carries_a_state_is_measured_in_both_modes():
  _, runs = jax_worker._build({"case": "lstm", "side": "dljax", "turn_seconds": 0.1})
  assert all(runs[quantity](1) > 0 for quantity in ("train", "inference"))


def test_no_model_is_imported_before_operators_are_switched_off():
  code = "import sys, experiments.benchmark.jax_worker; print(*[m for m in sys.modules if 'dljax.models' in m])"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
  assert done.stdout.split() == []


# Workers.


def test_a_turn_has_as_many_steps_as_fill_it_and_one_at_least():
  assert serve.steps_of_a_turn(lambda steps: 10.0, 1.0) == 1
  assert serve.steps_of_a_turn(lambda steps: 0.001, 1.0) == 1000


def test_two_real_sides_of_a_small_case():
  settings = Settings(repeats=1, turn_seconds=0.05)
  found, details = models.measure_models(settings, ["mlp"], models.Peers("", {}, {}))
  sides = details["cases"]["mlp"]["sides"]
  assert list(sides) == ["dljax", "flax"]
  for side in sides.values():
    assert side["parameters"] == 669_706
    assert 0 < side["compile_seconds"] < side["first_step_seconds"]
    assert all(len(turns) == 1 and turns[0] > 0 for turns in side["seconds"].values())
    if sys.platform == "linux":
      assert side["peak_bytes"] > 3 * 4 * 669_706  # parameters, momentum, gradients
  assert details["cases"]["mlp"]["batch"] == {"image": [128, 28, 28, 1], "label": [128]}
  # Two products for each of the three functions of a layer, without the first input's gradient.
  products = 2 * 128 * (3 * (512 * 512 + 512 * 10) + 2 * 784 * 512)
  assert products < details["cases"]["mlp"]["train_flops"] < 1.1 * products
  assert [m.what for m in found] == ["train step: dljax / flax", "inference: dljax / flax"]
