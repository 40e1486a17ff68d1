"""The benchmark measures what it says, and reports it; how fast this machine is, is not tested."""

import concurrent.futures
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from dljax.errors import BAD_INPUT, FAILED, PREEMPTED, RunError
from dljax.train import topology
from experiments import mlp
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import engine, sharding
from experiments.benchmark.measurement import Measurement, Settings, ratio

ROOT = Path(__file__).parents[1]


def test_a_ratio_is_that_of_the_medians_and_its_spread_that_of_the_turns():
  found = ratio("x", "y", {"a": [2.0, 4.0, 90.0]}, {"b": [1.0, 4.0, 2.0]}, 2.0)
  assert (found.value, found.low, found.high) == (2.0, 1.0, 45.0)
  assert found.details == {"a": 4.0, "b": 2.0}


@pytest.mark.parametrize("value, at_least, holds", [
    (1.0, False, True), (1.1, False, False), (1.0, True, True), (0.9, True, False)])
def test_a_bound_has_a_side(value, at_least, holds):
  assert Measurement("x", "y", value, 1.0, at_least).holds == holds


def test_without_a_bound_nothing_holds_or_is_missed():
  assert Measurement("x", "y", 1.0, None).holds is None


def test_the_loop_and_the_bare_step_take_turns():
  settings = Settings(steps=3, repeats=2)
  found = engine._loop_overhead(settings, mlp, augment=True, name="mlp digits")
  assert 0 < found.low <= found.high
  assert found.value == pytest.approx(found.details["loop_seconds"] / found.details["bare_seconds"])


def test_a_transfer_of_any_thread_is_seen(capfd):
  add = jax.jit(lambda x, y: x + y)
  ones = np.ones((3, 5), np.float32)
  on_device = jax.device_put(ones)
  jax.block_until_ready(add(on_device, on_device))
  with engine._logged_transfers() as log:
    jax.block_until_ready(add(on_device, on_device))
  assert not log
  with engine._logged_transfers() as log:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      pool.submit(jax.device_put, np.ones(7, np.float16)).result()
    add(on_device, ones)  # implicit
    add(on_device, ones)
  assert ["host-to-device" in line for line in log] == [True] * 3
  print("after", file=sys.stderr)
  assert capfd.readouterr().err == "after\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_was_held_and_freed_counts():
  growth = engine._memory_meter(jax.devices("cpu")[0])
  held = np.ones(2**25, np.uint8)
  del held
  assert 0.9 * 2**25 < growth() < 1.5 * 2**25


def test_an_accelerator_tells_its_memory_itself():
  device = mock.Mock(memory_stats=mock.Mock(side_effect=[
      {"bytes_in_use": 3, "peak_bytes_in_use": 5}, {"bytes_in_use": 3, "peak_bytes_in_use": 5},
      {"bytes_in_use": 4, "peak_bytes_in_use": 9}]))
  assert engine._memory_meter(device)() == 6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_step_is_measured_and_reported():
  found, = engine.measure_memory(Settings(steps=2), variant="resnet18", pixels=32, batch_size=4)
  state = 2 * 4 * 11_689_512  # parameters and momentum
  assert found.details["reported_bytes"] > state
  assert found.details["growth_bytes"] >= found.details["first_step_growth_bytes"] > state
  assert found.details["data_bytes"] == 3 * 4 * (32 * 32 * 3 * 4 + 4 + 4 + 4)


def test_the_pipeline_takes_turns_with_the_step():
  found = engine.measure_pipeline(Settings(steps=2, repeats=2))
  assert [m.bound for m in found] == [20, 4] and all(m.at_least for m in found)
  assert len({m.details["step_seconds"] for m in found}) == 1, "both are held against the same turns"


def test_a_blocks_share_is_that_of_the_blocks_that_one_network_has_more(monkeypatch):
  """Of made-up programs, one for each mesh and number of blocks: a fixed part, and so much for each block."""
  fixed, block = 7 * 2**20, {"fsdp:4,tensor:4": {"all-reduce": 300 * 2**20, "all-gather": 2 * 2**20},
                             "fsdp:16": {"all-gather": 5, "collective-permute": 3, "reduce-scatter": 8}}
  compiled = []

  def program(experiment, options, devices):
    mesh = ",".join(f"{axis}:{size}" for axis, size in options.mesh.items() if size > 1)
    compiled.append((mesh, experiment.task.model.num_layers))
    params = {"kernel": mock.Mock(size=8, sharding=types.SimpleNamespace(spec=("fsdp", None))),
              "bias": mock.Mock(size=4, sharding=types.SimpleNamespace(spec=()))}
    return mock.Mock(lower_train_step=lambda: compiled[-1],
                     abstract_state=mock.Mock(params={"block0": params}))

  def summary(lowered):
    mesh, layers = lowered
    return mock.Mock(collectives=[
        mock.Mock(kind=kind, size=fixed + layers * size) for kind, size in block[mesh].items()])

  monkeypatch.setattr(sharding.topology, "topology_devices", lambda name: [])
  monkeypatch.setattr(sharding, "Program", program)
  monkeypatch.setattr(sharding.topology, "compile_lowered", lambda lowered, name: lowered)
  monkeypatch.setattr(sharding.inspect, "summarize_compiled", summary)
  moved, scattered = sharding.measure_sharding(Settings())
  assert compiled == [(mesh, layers) for mesh in block for layers in (2, 4)]
  assert (moved.value, moved.bound) == (302, 440)
  assert moved.details == {"all-reduce_bytes": 300 * 2**20, "all-gather_bytes": 2 * 2**20}
  # Of a gradient of 8 numbers in bfloat16, 11 bytes are scattered where 15 should be.
  assert scattered.value == pytest.approx(1 - 11 / 15) and scattered.bound == 0.15
  assert scattered.details["gradient_bytes"] == 16


def test_without_a_compiler_for_tpus_the_row_is_refused_or_left_out(monkeypatch):
  monkeypatch.setattr(benchmark.topology, "missing_compiler", lambda name: "it is not installed; run: pip install x")
  assert run("--rows=sharding") == (BAD_INPUT, "error: --rows=sharding: it is not installed; run: pip install x\n")
  asked = mock.Mock(side_effect=KeyboardInterrupt)
  with mock.patch.object(benchmark, "measure", asked), mock.patch.object(benchmark, "find_peers"):
    _, err = run()
  assert asked.call_args.args[0] == [row for row in benchmark.ROWS if row != "sharding"]
  assert "sharding: left out, as it is not installed; run: pip install x" in err


SMALL = """
import json
from dljax.train import topology
devices = topology.topology_devices("v5e:2x2")
from experiments import vit
from experiments.benchmark import sharding
config = vit.get_config("imagenet2012")
config.model.update({"variant": "vit_s16", "dtype": "bfloat16"})
config.data.image_shape, config.batch_size = (128, 128, 3), 64
print(json.dumps(sharding._of_a_block(vit.build(config), "v5e:2x2", devices, "fsdp:2,tensor:2", (1, 2))))
"""


@pytest.mark.slow
def test_devices_that_share_a_block_gather_no_activations():
  """Only sums of activations, one after each of a block's two parts and before it on the way back."""
  if missing := topology.missing_compiler("v5e:2x2"):
    pytest.skip(missing)
  done = subprocess.run([sys.executable, "-c", SMALL], cwd=ROOT, capture_output=True, text=True, timeout=600,
                        env={**os.environ, "JAX_OPTIMIZATION_LEVEL": "O0"}, check=True)
  moved, gradient = json.loads(done.stdout)
  activations = 32 * 64 * 384 * 2  # rows of a device, tokens, width, bfloat16
  kernels = 12 * 384**2 * 2
  assert gradient == kernels
  assert sum(moved.values()) < 4.1 * activations + 2 * kernels, moved
  assert moved.get("all-gather", 0) <= kernels, "half of each, on the way there and back"


def test_the_command_prints_a_table_and_writes_json_and_a_step_moves_its_batch_and_nothing_else(tmp_path):
  output = tmp_path / "benchmark.json"
  done = subprocess.run(
      [sys.executable, "-m", "experiments.benchmark", "--rows=transfers", "--steps=5", "--repeats=2",
       f"--output={output}"], cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  report = json.loads(output.read_text())
  assert set(report["machine"]) == {"device", "cores", "load_before", "load_after", "jax", "python"}
  assert report["settings"] == {"steps": 5, "repeats": 2, "turn_seconds": 1.0}
  assert not (tmp_path / "benchmark.png").exists(), "the picture is of the models"
  there, back = report["rows"]
  for row in (there, back):
    assert row["row"] == "transfers" and row["holds"]
    assert {"name", "what", "value", "bound", "at_least", "low", "high", "details"} < set(row)
    assert row["name"] in done.stdout
  assert there["details"] == {"to_device_per_step": 4, "arrays_of_a_batch": 4}  # image, label, mask, id
  assert there["value"] == 1
  assert back["value"] == 0


@pytest.mark.parametrize("argument, text", [
    ("--rows=lop", "did you mean loop?"),
    ("--steps=0", "--steps=0"),
    ("--stepss=3", "stepss"),
    ("loop", "'loop' is not a flag"),
    ("--output=table.txt", "must end in .json"),
    ("--output=nowhere/table.json", "there is no folder"),
    ("--models=resnet", "did you mean resnet"),
    ("--peer_python=nowhere/python", "--peer_python=nowhere/python does not run (No such file or directory); name"),
    ("--peer_python=/", "--peer_python=/ does not run (Permission denied); name"),
    (f"--peer_python={shutil.which('true')}", "is no working Python"),
    ("--rows=loop --models=mlp", "--models is for the row models, which --rows leaves out"),
    ("--rows=loop --peer_python=python3", "--peer_python is for the row models"),
])
def test_bad_input_is_refused_in_a_line(argument, text):
  with mock.patch.object(benchmark, "measure", side_effect=AssertionError):
    status, err = run(*argument.split())
  assert status == BAD_INPUT
  assert err.startswith("error: ") and err.count("\n") == 1
  assert text in err


@pytest.mark.parametrize("error, status, text", [
    (RunError("models: mlp, flax: its process ended"), FAILED, "error: models: mlp, flax: its process ended\n"),
    (KeyboardInterrupt(), PREEMPTED, "stopped; nothing is written\n"),
])
def test_what_goes_wrong_is_told_in_a_line(error, status, text):
  with mock.patch.object(benchmark, "measure", side_effect=error):
    assert run("--rows=loop") == (status, text)


def run(*arguments):
  """(exit status, what stands on stderr) of the command, without a process of its own."""
  for name in benchmark._FLAGS:  # a new process has the defaults
    benchmark._FLAGS[name].unparse()
  err = io.StringIO()
  with mock.patch.object(sys, "argv", [benchmark.__file__, *arguments]), contextlib.redirect_stderr(err):
    with pytest.raises(SystemExit) as end:
      benchmark.main()
  return end.value.code, err.getvalue()
