"""The folder of a run: whose it is, and whether a run may go on in it."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dljax import optim, report
from dljax.config import base_config
from dljax.errors import RunError, UserError
from dljax.tasks.base import Findings
from dljax.train import workdir
from dljax.train.workdir import Workdir, read_json, read_sealed, write_json, write_sealed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("text, words", [
    ("{", ["not JSON"]), ("9" * 5000, ["not JSON"]), ("[" * 100_000, ["not JSON"]),
    ('{"format": 2, "config": {"lear.ing_rate": 1}, "sha256": ""}', ["lear.ing_rate"]),
    ('{"format": 2, "config": []}', ["'config' is missing or wrong"]),
    ('{"format": true, "config": {}}', ["format"]),
])
def test_a_config_that_cannot_be_read_is_named(tmp_path, text, words):
  folder = Workdir(tmp_path)
  folder.config_file.write_text(text)
  with pytest.raises(UserError) as error:
    folder.read_config()
  assert all(word in str(error.value) for word in [str(folder.config_file), *words])
  assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["config_file", "result_file"])
def test_a_flipped_bit_anywhere_is_found(tmp_path, name):
  folder = Workdir(tmp_path)
  path = getattr(folder, name)
  write_sealed(path, {"run": "ab", "config": {"mean": [0.5, float("nan")], "name": "é"}})
  data = path.read_bytes()
  assert read_sealed(path, config=dict)["config"]["name"] == "é"
  for bit in range(8 * len(data)):
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    with pytest.raises(UserError, match=path.name):
      read_sealed(path, config=dict)


def test_an_edit_that_was_meant_is_accepted(tmp_path):
  path = tmp_path / "config.json"
  write_sealed(path, {"run": "ab", "config": {"steps": 1}})
  text = path.read_text().replace('"steps": 1', '"steps": 2')
  path.write_text(text)
  with pytest.raises(UserError, match='write "sha256": "" in its last line'):
    read_sealed(path)
  value = json.loads(text)
  for gone in ("sha256",), ("sha256", "run"):  # nor is a file without any hash
    path.write_text(json.dumps({k: v for k, v in value.items() if k not in gone}, indent=2))
    with pytest.raises(UserError, match="was damaged or edited"):
      read_sealed(path)
  digest = value["sha256"]
  path.write_text(text.replace(digest, ""))
  assert read_sealed(path)["config"] == {"steps": 2}


def test_checkpoints_without_their_config_are_refused(tmp_path):
  folder = Workdir(tmp_path)
  (folder.checkpoints / "corrupt-3").mkdir(parents=True)
  folder.check(_config(), "auto")
  (folder.checkpoints / "3").mkdir()
  with pytest.raises(UserError, match="holds checkpoints but no config.json"):
    folder.check(_config(), "auto")


def test_a_run_keeps_its_id(tmp_path):
  folder = Workdir(tmp_path)
  folder.start(_config(), {}, "x")
  assert Workdir(tmp_path).run == folder.run != Workdir(tmp_path / "other").run
  again = Workdir(tmp_path)
  again.start(_config(total_steps=7), {}, "x")
  assert json.loads(folder.config_file.read_text())["run"] == folder.run


def _config(**fields):
  return base_config("toy", "small", optimizer=optim.default_config("adamw"), **fields)


@pytest.fixture
def begun(tmp_path):
  """A folder in which a run of `_config()` began."""
  folder = Workdir(tmp_path / "run")
  folder.acquire()
  folder.start(_config(), {"classes": ["a", "b"]}, "10 bytes")
  folder.release()
  return folder


def test_the_config_and_the_assets_come_back(begun):
  assert begun.read_config().to_dict() == _config().to_dict()
  assert isinstance(begun.read_config().optimizer.decay_boundaries, tuple)
  assert begun.read_assets() == {"classes": ["a", "b"]}


def test_config_json_says_what_ran(begun):
  noted = read_json(begun.config_file)
  assert noted["command"] == sys.argv
  assert noted["versions"]["jax"] and noted["versions"]["python"]
  assert "git_commit" in noted


def test_the_same_config_goes_on_and_so_does_one_with_other_intervals(begun):
  begun.check(_config(), "auto")
  begun.check(_config(total_steps=5, log_every=7, eval_every=8, checkpoint_every=9), "auto")
  begun.check(_config(), "must")


@pytest.mark.parametrize("value", [None, float("nan"), 10**400, ["b", "a"], [[["a"]]], {"a": 1}, True])
def test_assets_that_were_edited_are_named(begun, value):
  path = begun.data / "classes.json"
  path.write_text(json.dumps(value))
  with pytest.raises(UserError, match=f"^{path} was damaged or edited since it was written; restore it"):
    begun.read_assets()
  path.unlink()
  assert begun.read_assets() == {}  # a run that was killed in its start has none


@pytest.mark.parametrize("metrics, right", [
    ({"test": {"loss": float("nan"), "count": 3}}, True), ({}, True), ({"test": None}, False),
    ({"test": {"loss": True}}, False), ({"test": {"loss": {}}}, False), ({"test": {"loss": 10**400}}, False),
    ({"test": {"loss": "0.5"}}, False), ({"test": [[]]}, False),
])
def test_a_result_whose_metrics_are_no_numbers_is_named(begun, metrics, right):
  begun.write_result({"family": "toy", "preset": "small", "steps": 1, "total_steps": 1, "metrics": metrics,
                      "checkpoint": 1, "params": 1, "seconds": 0.5, "devices": "1 x cpu"})
  if right:
    assert set(begun.result()["metrics"]) == set(metrics)
    return
  with pytest.raises(UserError, match=f"^{begun.result_file} is not what dljax writes there"):
    begun.result()


def test_a_folder_that_cannot_be_locked_is_not_said_to_be_in_use(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(workdir.fcntl, "flock", refuse)
  with pytest.raises(UserError, match=r"run cannot be locked \(No locks available\); name a folder on another"):
    Workdir(tmp_path / "run").acquire()


def test_differences_are_named_field_by_field(begun):
  other = _config(batch_size=64, total_steps=5)
  other.optimizer.learning_rate = 0.5
  with pytest.raises(UserError) as error:
    begun.check(other, "auto")
  message = str(error.value)
  assert "batch_size is 128 there and 64 here" in message
  assert "optimizer.learning_rate is 0.001 there and 0.5 here" in message
  assert "total_steps" not in message
  assert str(begun.path) in message and "start again" in message and "\n" not in message


def test_a_field_that_one_of_the_two_lacks_is_a_difference(begun):
  with pytest.raises(UserError, match="extra is 'not set' there and 3 here"):
    begun.check(_config(extra=3), "auto")


def test_other_data_are_refused_by_name_and_both_fingerprints(begun, tmp_path):
  begun.check_data("play.txt", "10 bytes")
  Workdir(tmp_path / "fresh").check_data("play.txt", "11 bytes")
  with pytest.raises(UserError) as error:
    begun.check_data("play.txt", "11 bytes")
  message = str(error.value)
  assert "fingerprint of play.txt is '10 bytes' there and '11 bytes' here; restore the old data" in message
  assert f"--workdir={begun.path}" in message and "\n" not in message


def test_json_is_on_the_disk_before_it_takes_the_place_of_the_old(tmp_path, monkeypatch):
  order, replace = [], os.replace
  monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(os.fstat(descriptor).st_ino))
  monkeypatch.setattr(os, "replace", lambda old, new: (order.append("replaced"), replace(old, new)))
  write_json(tmp_path / "a.json", {"x": 1})
  # The name is durable once the folder is.
  assert order == [(tmp_path / "a.json").stat().st_ino, "replaced", tmp_path.stat().st_ino]
  assert read_json(tmp_path / "a.json") == {"x": 1}


def test_figures_and_tables_are_written_beside_each_other(begun):
  begun.write_findings(Findings(tables={"classes": [{"class": "a, b", "f1": 0.5}, {"class": "c", "f1": 1.0}], "none": []},
                                figures={"grid": lambda: report.image_grid([np.eye(2)])}))
  assert (begun.tables / "classes.csv").read_text().splitlines() == ["class,f1", '"a, b",0.5', "c,1.0"]
  assert (begun.tables / "none.csv").exists() and (begun.figures / "grid.png").stat().st_size > 100
  (begun.tables / "classes.csv").unlink()
  (begun.tables / "classes.csv").mkdir()
  with pytest.raises(RunError, match="tables was not written"):
    begun.write_findings(Findings(tables={"classes": [{"class": "a"}]}))


def test_never_and_must(begun, tmp_path):
  with pytest.raises(UserError, match="--resume=never.*holds a run"):
    begun.check(_config(), "never")
  fresh = Workdir(tmp_path / "fresh")
  fresh.check(_config(), "never")
  with pytest.raises(UserError, match="--resume=must.*holds no run"):
    fresh.check(_config(), "must")
  with pytest.raises(UserError, match="holds no run"):
    fresh.read_config()
  assert not fresh.path.exists()


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / "file").write_text("mine")
  for path in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(UserError, match=f"--workdir={path}.*folder"):
      Workdir(path).check(_config(), "auto")
  assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused():
  with pytest.raises(UserError, match="--workdir=/proc/run is not writable"):  # not even by root
    Workdir("/proc/run").check(_config(), "auto")
    Workdir("/proc/run").acquire()


def test_a_config_that_is_damaged_is_named(begun):
  begun.config_file.write_text('{"config": ')
  with pytest.raises(UserError, match="config.json is not JSON"):
    begun.check(_config(), "auto")


@pytest.mark.parametrize("text", ["{}", "[]", "null", "3", '{"config": 3}', '{"config": null}', '["config"]'])
def test_json_that_is_something_else_is_named(begun, text):
  begun.config_file.write_text(text)
  begun.result_file.write_text(text)
  for use, file in ((lambda: begun.check(_config(), "auto"), "config.json"), (begun.read_config, "config.json"),
                    (lambda: begun.is_finished(1000), "result.json")):
    with pytest.raises(UserError, match=f"{file} is not what dljax writes there .*; restore it") as error:
      use()
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_written_is_named(begun):
  begun.result_file.with_name("result.json.tmp").mkdir()
  with pytest.raises(RunError, match="result.json was not written: Is a directory"):
    write_json(begun.result_file, {})


_HOLD = """
import sys, time
from dljax.train.workdir import Workdir
folder = Workdir(sys.argv[1])
folder.acquire()
print("locked", flush=True)
time.sleep(600)
"""


def test_a_living_process_is_named_and_a_killed_one_forgotten(tmp_path):
  process = subprocess.Popen(
      [sys.executable, "-c", _HOLD, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout.readline() == "locked\n"
    folder = Workdir(tmp_path / "run")
    with pytest.raises(UserError, match=f"in use by process {process.pid};"):
      folder.acquire()
    os.kill(process.pid, signal.SIGKILL)
  finally:
    process.kill()
    process.communicate()
  folder.acquire()
  with pytest.raises(UserError, match=f"in use by process {os.getpid()};"):
    Workdir(tmp_path / "run").acquire()
  folder.release()
  Workdir(tmp_path / "run").acquire()
