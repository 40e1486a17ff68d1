"""The benchmark measures what it says, and reports it; how fast this machine is, is not tested."""

import concurrent.futures
import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from dljax.errors import BAD_INPUT, FAILED, PREEMPTED, RunError
from experiments import mlp
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import engine
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
  assert found.details["data_bytes"] == 3 * 4 * (32 * 32 * 3 * 4 + 4 + 4)


def test_the_pipeline_takes_turns_with_the_step():
  found = engine.measure_pipeline(Settings(steps=2, repeats=2))
  assert [m.bound for m in found] == [20, 4] and all(m.at_least for m in found)
  assert len({m.details["step_seconds"] for m in found}) == 1, "both are held against the same turns"


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
  assert there["details"] == {"to_device_per_step": 3, "arrays_of_a_batch": 3}  # image, label, mask
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
