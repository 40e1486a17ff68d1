"""A disk that is full, over its quota, damaged or read-only ends a run in one line, and the next start goes on."""

import errno
import itertools
import os
import subprocess

import numpy as np
import pytest

from dljax import optim, report
from dljax.config import base_config
from dljax.errors import RunError, UserError
from dljax.launch import output
from dljax.tasks.base import Findings
from dljax.train import loop, metrics
from dljax.train.checkpoint import Checkpointer
from dljax.train.metrics import MetricWriter
from dljax.train.program import RunOptions
from dljax.train.workdir import Workdir, decisive
from tests.train import toys

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def _run(path) -> int:
  """What a run writes, without any training; returns the step from which it went on."""
  folder, config = Workdir(path), base_config("toy", "toy", optimizer=optim.default_config("sgd"))
  folder.check(config, "auto")
  checkpointer = Checkpointer(folder.checkpoints, keep=1, assets=folder.data, run=folder.run, config=decisive(config))
  folder.acquire()
  try:
    with checkpointer:
      restored = checkpointer.restore({"w": np.zeros(3)})
      start, mark = (0, None) if restored is None else (restored.step, restored.host["metrics"])
      writer = MetricWriter(path, start, "", {}, mark)
      folder.start(config, {"classes": ["a"]}, "10 bytes", {"model": "toy", "settings": {}})
      with writer:
        for step in range(start + 1, 3):
          writer.write(step, "train", {"loss": 1 / step})
          checkpointer.save(step, {"w": np.arange(3.0)}, {"metrics": writer.mark()})
      folder.write_findings(Findings(tables={"t": [{"a": 1}]}, figures={"f": lambda: None}))
      checkpointer.wait()
      checkpointer.close()
      folder.write_result({"steps": 2})
  finally:
    folder.release()
  return start


@pytest.fixture(autouse=True)
def _pictures(monkeypatch):
  monkeypatch.setattr(report, "save", lambda figure, path, title="": path.write_bytes(b"PNG"))


def _left(path) -> set[str]:
  return {entry.name for entry in path.rglob("*") if entry.name.startswith(("corrupt-", "deleting-"))
          or entry.name.endswith((".tmp", "-tmp"))}


def test_a_disk_that_fails_at_any_moment_ends_the_run_in_one_line(tmp_path, monkeypatch, capfd):
  real = os.fsync
  for number in itertools.count():
    countdown, code = itertools.count(number, -1), ERRORS[number % len(ERRORS)]

    def fail(descriptor):
      if next(countdown) <= 0:  # and from then on
        raise OSError(code, os.strerror(code))
      real(descriptor)

    path = tmp_path / str(number) / "run"
    with monkeypatch.context() as patch:
      patch.setattr(os, "fsync", fail)
      try:
        _run(path)
        break
      except RunError as error:
        assert os.strerror(code) in str(error) and "\n" not in str(error)
      except UserError as error:  # a folder in which nobody may write
        assert code == errno.EROFS and number < 2 and "is not writable" in str(error)
    if number % 7 == 0:
      assert _run(path) in (0, 1, 2)
      names = {entry.name for entry in (path / "checkpoints").iterdir()}
      assert not _left(path) and {"2"} <= names <= {"1", "2"}  # the older one where only its deletion failed
  assert number > 30
  # A start says which step it has cleaned up, if an earlier test has made the log's handler.
  assert [line for line in capfd.readouterr().err.splitlines() if not line.endswith("; removed")] == []


@pytest.mark.parametrize("code", ERRORS)
def test_tensorboard_and_predictions_fail_in_one_line(tmp_path, monkeypatch, code):
  def full(*_, **__):
    raise OSError(code, os.strerror(code))

  with pytest.raises(RunError, match=os.strerror(code)):
    with MetricWriter(tmp_path, 0, "", {}) as writer, monkeypatch.context() as patch:
      patch.setattr(metrics._EventFile, "_record", full)
      writer.write(1, "train", {"loss": 0.5})
  for name in ("p.jsonl", "p.json", "p.csv", "pictures"):
    with pytest.raises(RunError, match=f"{name} was not written: {os.strerror(code)}"), monkeypatch.context() as patch:
      patch.setattr(os, "fsync", full)
      output.write(tmp_path / name, [{"input": "a", "label": "b"}], lambda: [None])
  assert not [path for path in tmp_path.rglob("*") if "p." in path.name or path.name.endswith(".tmp")]


def _batch(step=0):
  return {"x": np.full(toys.BATCH_SIZE, 1.5, np.float32), "mask": np.ones(toys.BATCH_SIZE, np.float32)}


@pytest.mark.slow
def test_runs_on_small_disks_end_in_one_line_and_go_on_with_more_room(tmp_path, capfd, monkeypatch):
  """28 sizes of a tmpfs."""
  monkeypatch.undo()  # with real pictures
  disk, ended = tmp_path / "disk", 0
  disk.mkdir()
  task = toys.Formula(params={"w": 0.0}, rows=lambda params, batch, train, player: (params["w"] - batch["x"])**2)
  experiment = toys.formula_experiment(
      task, toys.Scripted(_batch), {"test": toys.Scripted(_batch)}, total_steps=12, log_every=1, checkpoint_every=3,
      eval_every=100, optimizer={"learning_rate": 0.1})
  for size in range(8, 8 + 28 * 12, 12):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], capture_output=True).returncode:
      pytest.skip("only root can mount a small disk")
    try:
      capfd.readouterr()
      try:
        loop.fit(experiment, disk / "run", RunOptions(mesh=toys.MESHES["data:1"], progress=False))
        assert (disk / "run" / "result.json").exists()
      except RunError as error:
        ended += 1
        assert "No space left" in str(error) and "\n" not in str(error), error
        assert not (disk / "run" / "result.json").exists()
      assert capfd.readouterr().err == ""
      subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
      loop.fit(experiment, disk / "run", RunOptions(mesh=toys.MESHES["data:1"], progress=False))
      assert (disk / "run" / "result.json").exists() and not _left(disk)
    finally:
      subprocess.run(["umount", "-l", disk], check=True)
  assert 5 < ended < 28
