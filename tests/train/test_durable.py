"""A power failure at any moment of a run loses nothing that a manifest names.

A disk promises little: a file's bytes are there after a failure if the file was synchronised since, and its name if
its folder was. `Disk` notes what was synchronised, so that each state that a failure could leave can be put together.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from dljax import report
from dljax.train import checkpoint, loop
from dljax.train.checkpoint import Checkpointer
from dljax.train.metrics import MetricWriter
from dljax.train.program import Program, RunOptions
from dljax.train.workdir import Workdir, decisive
from tests.train import toys

OPTIONS = RunOptions(mesh=toys.MESHES["data:1"], progress=False)
Files = Mapping[str, bytes | None]  # path below the root -> content, None of a folder


class Disk:
  """Notes what a failure would leave of the files below `root`, at every moment that changes it.

  Attributes:
    promised: the newest step that the run was told to be saved, and whether it was told to be finished.
    states: (what is left, what was promised then). Of each moment there are two: names that were not synchronised are
      all lost, or none is. Bytes that were not synchronised are always lost.
  """

  def __init__(self, root: Path):
    self._root, self._lock = root, threading.RLock()
    self._bytes: dict[int, bytes] = {}  # inode -> what is safe of a file
    self._names: dict[int, dict[str, tuple[int, bool]]] = {}  # inode -> what is safe of a folder
    self._held: list[int] = []  # open descriptors: the inode of a deleted file would be used again
    self.promised, self.states = (0, False), {}

  def fsync(self, descriptor: int) -> None:
    """Takes the place of `os.fsync`."""
    with self._lock:
      stat = os.fstat(descriptor)
      self._held.append(os.dup(descriptor))
      if os.path.isdir(f"/proc/self/fd/{descriptor}"):
        with os.scandir(descriptor) as entries:
          self._names[stat.st_ino] = {e.name: (e.inode(), e.is_dir()) for e in entries}
      else:
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:
          self._bytes[stat.st_ino] = file.read()
      self.look()

  def look(self) -> None:
    """Notes the two states that a failure would leave now."""
    with self._lock:
      for state in dict(self._safe(self._root.stat().st_ino, "")), dict(self._named(self._root, "")):
        self.states.setdefault(frozenset(state.items()), (state, self.promised))
        if self.promised > self.states[frozenset(state.items())][1]:
          self.states[frozenset(state.items())] = state, self.promised

  def _safe(self, folder: int, above: str) -> Iterator[tuple[str, bytes | None]]:
    for name, (inode, is_folder) in self._names.get(folder, {}).items():
      yield above + name, None if is_folder else self._bytes.get(inode, b"")
      if is_folder:
        yield from self._safe(inode, f"{above}{name}/")

  def _named(self, folder: Path, above: str) -> Iterator[tuple[str, bytes | None]]:
    with contextlib.suppress(FileNotFoundError):  # another thread deletes it
      for entry in os.scandir(folder):
        yield above + entry.name, None if entry.is_dir() else self._bytes.get(entry.inode(), b"")
        if entry.is_dir():
          yield from self._named(Path(entry), f"{above}{entry.name}/")

  def close(self) -> None:
    for descriptor in self._held:
      os.close(descriptor)


@pytest.fixture
def disk(tmp_path, monkeypatch):
  disk = Disk(tmp_path / "disk")
  (tmp_path / "disk").mkdir()
  monkeypatch.setattr(os, "fsync", disk.fsync)
  for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
    def noted(*arguments, _change=getattr(os, name), **options):
      _change(*arguments, **options)
      disk.look()

    monkeypatch.setattr(os, name, noted)
  real = Checkpointer.wait

  def wait(self, *arguments):
    real(self, *arguments)
    disk.promised = max(self.steps(), default=0), False

  monkeypatch.setattr(Checkpointer, "wait", wait)
  yield disk
  disk.close()


def _batch(step: int = 0) -> dict[str, np.ndarray]:
  return {"x": np.full(toys.BATCH_SIZE, 1 + step / 8, np.float32), "mask": np.ones(toys.BATCH_SIZE, np.float32)}


def _experiment(total_steps: int):
  task = toys.Formula(params={"w": 0.0}, rows=lambda params, batch, train, player: (params["w"] - batch["x"])**2)
  return toys.formula_experiment(
      task, toys.Scripted(_batch), {"test": toys.Scripted(_batch)}, total_steps=total_steps, log_every=1,
      checkpoint_every=2, eval_every=100, keep_checkpoints=1, optimizer={"learning_rate": 0.1})


def _fit(folder: Path, total_steps: int) -> None:
  experiment = _experiment(total_steps)
  data = {"assets": lambda: {"classes": ["a", "b"]}, "restore": lambda assets: None}
  loop.fit(toys.with_data(experiment, **data), folder, OPTIONS)


def _steps(data: bytes) -> list[int]:
  return [json.loads(line)["step"] for line in data.splitlines()]


def _write(state: Files, folder: Path) -> Path:
  """The state as files in `folder`, deleted again by nobody: they are small."""
  for path, content in sorted(state.items()):
    (folder / path).mkdir(parents=True) if content is None else (folder / path).write_bytes(content)
  return folder / "runs" / "run"


class _NoArrays:
  """In place of Orbax's manager: what is restored was verified before."""

  def reload(self):
    pass

  def restore(self, step, args):
    del step
    return {"state": {name: np.zeros(leaf.shape) for name, leaf in args.items()}}


def _check(run: Path, promised: tuple[int, bool], abstract: object) -> int:
  """The step from which the run continues; fails if anything is lost."""
  step, finished = promised
  folder, experiment = Workdir(run), _experiment(6)
  folder.check(experiment.config, "auto")
  folder.check_data("toy", "toy")
  checkpointer = Checkpointer(folder.checkpoints, assets=folder.data, run=folder.run,
                              config=decisive(experiment.config))
  checkpointer._manager = _NoArrays()
  restored = checkpointer.restore(abstract)
  found = 0 if restored is None else restored.step
  assert found >= step, f"step {step} was saved, and the run continues from {found}"
  if restored is not None:
    mark = restored.host["metrics"]
    MetricWriter(run, found, "", {}, mark)
    assert _steps((run / "metrics.jsonl").read_bytes()[:mark["size"]]) == list(range(1, found + 1))
    assert folder.read_assets() == {"classes": ["a", "b"]} and folder.read_model() is None
  result = folder.result()
  assert not finished or result["steps"] == step
  if result is not None:
    assert result["checkpoint"] in checkpointer.steps()
    assert (folder.figures / "learning_curves.png").read_bytes() == b"PNG" and (folder.tables / "t.csv").read_bytes()
  return found


@pytest.fixture(autouse=True)
def _pictures(monkeypatch):
  monkeypatch.setattr(report, "save", lambda figure, path, title="": path.write_bytes(b"PNG"))
  findings = loop.evaluate
  def evaluate(*arguments):
    found, rest = findings(*arguments)
    return found, type(rest)(rest.metrics, tables={"t": [{"a": 1}]}, figures=rest.figures)
  monkeypatch.setattr(loop, "evaluate", evaluate)


def test_a_power_failure_at_any_moment_loses_nothing(disk, tmp_path, monkeypatch):
  run = tmp_path / "disk" / "runs" / "run"
  for total_steps in (4, 6):  # trained to its end, and continued
    disk.promised = disk.promised[0], False  # the result of the shorter run goes
    _fit(run, total_steps)
    disk.promised = total_steps, True
    disk.look()
  whole = run.joinpath("metrics.jsonl").read_bytes()
  monkeypatch.undo()
  abstract = Program(_experiment(6), OPTIONS).abstract_state
  monkeypatch.setattr(checkpoint, "_orbax", lambda: _Args)
  found, promised = set(), set()
  for number, (state, told) in enumerate(disk.states.values()):
    place = tmp_path / "after" / str(number)
    place.mkdir(parents=True)
    found.add(_check(_write(state, place), told, abstract))
    promised.add(told)
  assert len(disk.states) > 100 and found == {0, 2, 4, 6}
  assert {(0, False), (2, False), (4, True), (6, True)} <= promised
  # And the run goes on from what is left in the middle of a save.
  monkeypatch.undo()
  state = next(state for state, _ in disk.states.values()
               if state.get("runs/run/checkpoints/6") is None and "runs/run/checkpoints/6" in state
               and "runs/run/checkpoints/6/manifest.json" not in state)
  (tmp_path / "left").mkdir()
  left = _write(state, tmp_path / "left")
  _fit(left, 6)
  assert _steps((left / "metrics.jsonl").read_bytes()) == _steps(whole) == [1, 2, 3, 4, 5, 6]
  assert sorted(path.name for path in (left / "checkpoints").iterdir()) == ["6"]
  results = [json.loads((folder / "result.json").read_bytes()) for folder in (left, run)]
  assert results[0]["state_sha256"] == results[1]["state_sha256"]


class _Args:
  """The names of Orbax's arguments that `restore` uses; Orbax itself restores nothing here."""

  class args:
    PyTreeRestore = staticmethod(lambda item, restore_args: item)
    Composite = staticmethod(lambda state: state)

  ArrayRestoreArgs = staticmethod(lambda **_: None)
