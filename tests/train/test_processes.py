"""Runs that are killed, told to stop, or spread over two processes give what a plain run gives."""

import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dljax import report
from experiments import mlp
from tests.command import plain_pictures, run, xla_flags
from tests.train import processes

ROOT = Path(__file__).parents[2]
STEPS = 160
# Augmented digits, a tiny network, and something to log, to evaluate or to save at nearly every step.
DIGITS = (f"--config.total_steps={STEPS}", "--config.model.widths=16", "--config.model.dropout=0.2",
          "--config.batch_size=32", "--config.data.pad_crop=1", "--config.log_every=1",
          "--config.eval_every=20", "--config.checkpoint_every=8", "--config.ema_decay=0.99")
XOR = ("--preset=xor", "--config.total_steps=60", "--config.log_every=5", "--config.eval_every=30",
       "--config.checkpoint_every=30")


def _start(*arguments, devices=1, **environment):
  """Starts a process with so many of this one's devices, which compiles as this one does."""
  return subprocess.Popen(
      [sys.executable, "-m", "experiments.mlp", *map(str, arguments)], cwd=ROOT,
      env={**os.environ, "XLA_FLAGS": xla_flags(devices), **environment},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _run(*arguments, mesh="data:1"):
  """The same in this process, which takes less time; gives what it wrote."""
  with plain_pictures():
    outcome = run(mlp, *arguments, f"--mesh={mesh}")
  assert outcome.status == 0, outcome
  return outcome.out + outcome.err


def _end(process, status=0):
  out, err = process.communicate(timeout=600)
  assert process.returncode == status, err
  return out + err


def _rows(folder):
  rows = report.read_metrics(folder / "metrics.jsonl")
  return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def _result(folder):
  result = json.loads((folder / "result.json").read_text())
  del result["run"], result["sha256"]  # the run's own id, and the file's hash
  return {k: v for k, v in result.items() if "second" not in k}


def _last_step(folder):
  path = folder / "metrics.jsonl"
  return max((row["step"] for row in report.read_metrics(path)), default=0) if path.exists() else 0


def _wait_for_step(process, folder, step):
  """Waits until the process has logged `step`."""
  _wait_for(lambda: _last_step(folder) >= step, [process])


def _wait_for(condition, processes):
  while not condition():
    for process in processes:
      assert process.poll() is None, process.communicate()
    time.sleep(0.005)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """An uninterrupted run of DIGITS."""
  folder = tmp_path_factory.mktemp("plain") / "run"
  _run(*DIGITS, f"--workdir={folder}")
  return folder


@pytest.mark.slow
def test_kill_9_at_random_moments(plain, tmp_path):
  draw = random.Random(7)
  moments = sorted(draw.sample(range(10, STEPS - 10), 4))
  reached = []
  for moment in moments:
    process = _start(*DIGITS, f"--workdir={tmp_path}")
    _wait_for_step(process, tmp_path, moment)
    time.sleep(draw.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    reached.append(_last_step(tmp_path))
  assert "continuing from step" in _run(*DIGITS, f"--workdir={tmp_path}")
  rows = _rows(tmp_path)
  assert rows == _rows(plain)
  assert len({(row["step"], row["split"]) for row in rows}) == len(rows) == STEPS + STEPS // 20
  assert _result(tmp_path) == _result(plain)  # with the digest of the whole state
  assert len(set(reached)) > 1


def test_sigterm_and_ctrl_c_finish_the_step_save_and_exit_with_75(plain, tmp_path):
  for moment, number in (30, signal.SIGTERM), (70, signal.SIGINT):
    process = _start(*DIGITS, f"--workdir={tmp_path}")
    _wait_for_step(process, tmp_path, moment)
    process.send_signal(number)
    said = _end(process, 75)
    assert "Traceback" not in said
    stopped = int(said.split("stopped after step ")[1].split(";")[0])
    assert stopped >= moment
    assert (tmp_path / "checkpoints" / str(stopped) / "manifest.json").exists()
    assert _last_step(tmp_path) == stopped
  assert f"continuing from step {stopped}" in _run(*DIGITS, f"--workdir={tmp_path}")
  assert _rows(tmp_path) == _rows(plain)
  assert _result(tmp_path) == _result(plain)


def _pair(*arguments):
  """Starts two processes of one run."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [
      _start(*arguments, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=f"{index}")
      for index in range(2)]


def _said(process, status):
  """The lines of a process that ends within 30 s, without those on its progress and what Gloo prints."""
  out, err = process.communicate(timeout=30)
  assert process.returncode == status, err
  lines = (out + err).replace("\r", "\n").splitlines()
  return [line for line in lines if line and "step/s" not in line and "it/s" not in line and "?it/s" not in line
          and not line.startswith(("[Gloo]", "continuing", "compiling", "compiled"))
          and not re.match(r"step \d+: ", line)]


LONG = (*XOR, "--config.total_steps=1000000", "--config.log_every=5", "--config.eval_every=1000000",
        "--config.checkpoint_every=1000000")


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("moment", ["start", "step", "evaluation"])
def test_when_a_process_dies_the_other_says_so_and_ends(tmp_path, dead, moment):
  # An evaluation after each step takes nearly all of the time.
  often = ("--config.eval_every=5", "--config.data.validation=20000", "--config.eval_batch_size=16") if moment == "evaluation" else ()
  both = _pair(*LONG, *often, f"--workdir={tmp_path / 'run'}")
  try:
    if moment == "start":  # as soon as they know each other
      _wait_for(lambda: (tmp_path / "run" / ".lock").exists(), both)
    else:
      _wait_for(lambda: _last_step(tmp_path / "run") >= 5, both)
    both[dead].kill()
    line, = _said(both[1 - dead], 1)
    assert line.startswith(f"error: process {dead} of 2 has died or cannot be reached any more; ")
  finally:
    for process in both:
      process.kill()
      process.communicate()


@pytest.mark.slow
def test_a_process_that_is_stopped_for_a_while_ends_nobody(tmp_path):
  both = _pair(*LONG, f"--workdir={tmp_path}")
  try:
    _wait_for(lambda: _last_step(tmp_path) >= 5, both)
    for process in both:
      process.send_signal(signal.SIGSTOP)
      time.sleep(25)  # longer than a dead machine is waited for
      process.send_signal(signal.SIGCONT)
    step = _last_step(tmp_path)
    _wait_for(lambda: _last_step(tmp_path) >= step + 10, both)
  finally:
    for process in both:
      process.kill()
      process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("asked, number", [(0, signal.SIGTERM), (1, signal.SIGINT), (1, signal.SIGHUP)])
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path, asked, number):
  rarely = ("--config.log_every=1000000",)  # they do not wait for a step that is logged
  both = _pair(*LONG, *rarely, "--config.eval_every=20", f"--workdir={tmp_path}")
  try:
    _wait_for(lambda: _last_step(tmp_path) >= 20, both)
    both[asked].send_signal(number)
    lines = [_said(process, 75) for process in both]
  finally:
    for process in both:
      process.kill()
  assert lines[0] == lines[1] and len(lines[0]) == 1 and "Traceback" not in lines[0][0]
  stopped = int(lines[0][0].split("stopped after step ")[1].split(";")[0])
  assert (tmp_path / "checkpoints" / str(stopped) / "manifest.json").exists()
  assert f"continuing from step {stopped}" in _run(
      *XOR, f"--config.total_steps={stopped + 1}", *rarely, "--config.eval_every=20", f"--workdir={tmp_path}")


@pytest.mark.slow
def test_a_folder_that_is_moved_takes_the_saves_of_both_processes_along(tmp_path):
  """They save after every step, so that a save is in flight."""
  often, run, moved = ("--config.checkpoint_every=1", "--config.log_every=20"), tmp_path / "run", tmp_path / "moved"
  both = _pair(*LONG, *often, "--config.shard_above=0", "--mesh=fsdp:2", f"--workdir={run}")
  try:
    _wait_for(lambda: _last_step(run) >= 20, both)
    run.rename(moved)
    lines = [_said(process, 1) for process in both]
  finally:
    for process in both:
      process.kill()
      process.communicate()
  assert all("was moved, deleted or replaced" in "".join(said) for said in lines), lines
  assert [path.name for path in tmp_path.iterdir()] == ["moved"]
  steps = [int(path.name) for path in (moved / "checkpoints").iterdir()]  # and nothing unfinished
  assert f"continuing from step {max(steps)}" in _run(
      *XOR, *often, f"--config.total_steps={max(steps) + 1}", "--config.shard_above=0", f"--workdir={moved}")


@pytest.mark.slow
@pytest.mark.parametrize("fails", [0, 1])
def test_a_save_that_fails_on_one_process_ends_both(tmp_path, fails):
  """Only this one may not write large files."""
  both = _pair(*XOR, "--config.model.widths=512,256", "--config.shard_above=0", "--mesh=fsdp:2",
               f"--workdir={tmp_path / 'run'}")
  resource.prlimit(both[fails].pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
  try:
    lines = [_said(process, 1) for process in both]
  finally:
    for process in both:
      process.kill()
      process.communicate()
  own, = lines[fails]
  assert own.startswith("error: checkpoint 30 in ") and "was not saved: " in own and "File too large" in own
  assert lines[1 - fails] == [f"error: process {fails} of 2 has failed, and its own output says why"]


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_other(tmp_path):
  """Only the first process finds that the folder is in use."""
  holder = _start(*LONG, f"--workdir={tmp_path}")
  both = []
  try:
    _wait_for(lambda: _last_step(tmp_path) >= 5, [holder])
    both = _pair(*LONG, f"--workdir={tmp_path}")
    first, second = (_said(process, 2) for process in both)
    assert "in use by process" in first[0] and "the first host says why" in second[0]
  finally:
    for process in (holder, *both):
      process.kill()
      process.communicate()


@pytest.mark.parametrize("parallelism, mesh", [
    ("jit", "tensor:2"),  # both processes hold the same rows
    pytest.param("jit", "fsdp:2", marks=pytest.mark.slow), pytest.param("pmap", "data:2", marks=pytest.mark.slow)])
def test_two_processes_give_what_two_devices_of_one_give(tmp_path, parallelism, mesh):
  xor = (*XOR, f"--parallelism={parallelism}", "--config.shard_above=0")
  both = _pair(*xor, f"--workdir={tmp_path / 'two'}", f"--mesh={mesh}")
  try:
    first, second = (_end(process) for process in both)
  finally:
    for process in both:
      process.kill()
  _run(*xor, f"--workdir={tmp_path / 'one'}", mesh=mesh)
  assert "accuracy" in first and "accuracy" not in second  # the first host tells the result
  one, two = _rows(tmp_path / "one"), _rows(tmp_path / "two")
  assert [set(row) for row in one] == [set(row) for row in two]
  for a, b in zip(one, two, strict=True):
    assert (a.pop("step"), a.pop("split")) == (b.pop("step"), b.pop("split"))
    assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
  results = [_result(tmp_path / name) for name in ("one", "two")]
  for split in ("validation", "test"):
    assert results[1]["metrics"][split] == pytest.approx(results[0]["metrics"][split], rel=1e-4)
  assert {path.name for path in (tmp_path / "two" / "figures").iterdir()} == {
      path.name for path in (tmp_path / "one" / "figures").iterdir()}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
  """The data of the tiny forms."""
  folder = tmp_path_factory.mktemp("families")
  processes.prepare(folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("count, cases", [
    (2, ("lenet data:2", "deepspeech fsdp:2", "retinanet tensor:2")),
    (4, ("rnn data:2,fsdp:2", "vit fsdp:2,tensor:2"))])
def test_processes_give_what_as_many_devices_of_one_give(families, count, cases):
  """Every family on every mesh takes many times as long: `python -m tests.train.processes`."""
  found = processes.compare(count, cases, families)
  assert list(found) == list(cases)
  for case, (gap, where) in found.items():
    assert gap < 1e-12, (case, where)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
  process = _start(*XOR, f"--workdir={tmp_path}", "--config.total_steps=1000000")
  try:
    _wait_for_step(process, tmp_path, 5)
    said = _end(_start(*XOR, f"--workdir={tmp_path}"), 2)
    assert f"in use by process {process.pid};" in said
    assert "Traceback" not in said
  finally:
    process.kill()
    process.communicate()
