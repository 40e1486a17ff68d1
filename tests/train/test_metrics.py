"""What a run writes down: each point once, readable by others."""

import gc
import json
import os
import resource
import shutil
import struct
import sys
import threading

import pytest

from dljax import report
from dljax.errors import RunError, UserError
from dljax.train import metrics
from dljax.train.metrics import MetricWriter


def _write(folder, start, steps, scale=1.0):
  with MetricWriter(folder, start, "", {}) as writer:
    for step in steps:
      writer.write(step, "train", {"loss": scale / step})
      writer.write(step, "validation", {"loss": scale * 2 / step})


def _events(folder):
  """(step, tag, value) that TensorBoard shows: a run that starts at a step takes back what was from there on.

  An event file is made of records: length, its checksum, data, its checksum.
  """
  from tensorboardX.proto.event_pb2 import Event, SessionLog
  from tensorboardX.record_writer import masked_crc32c

  found = []
  for path in sorted(folder.glob("events.out.tfevents.*")):
    data = path.read_bytes()
    while data:
      length, = struct.unpack("<Q", data[:8])
      event = Event.FromString(data[12:12 + length])
      assert (masked_crc32c(data[:8]), masked_crc32c(data[12:12 + length])) == (
          *struct.unpack("<I", data[8:12]), *struct.unpack("<I", data[12 + length:16 + length]))
      if event.session_log.status == SessionLog.START:
        found = [point for point in found if point[0] < event.step]
      found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
      data = data[16 + length:]
  return found


def test_rows_are_written_at_once_and_for_tensorboard(tmp_path):
  with MetricWriter(tmp_path, 0, "", {}) as writer:
    writer.write(5, "train", {"loss": 0.5, "accuracy": 0.25})
    expected = {"step": 5, "split": "train", "loss": 0.5, "accuracy": 0.25}
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [expected]
  assert _events(tmp_path) == [(5, "train/loss", 0.5), (5, "train/accuracy", 0.25)]


def test_a_resumed_run_drops_what_was_logged_beyond_its_step(tmp_path):
  _write(tmp_path, 0, [1, 2, 3, 4])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "spl')  # cut off while it was written
  _write(tmp_path, 2, [3, 4, 5])
  rows = report.read_metrics(tmp_path / "metrics.jsonl")
  expected = [(step, split) for step in range(1, 6) for split in ("train", "validation")]
  assert [(row["step"], row["split"]) for row in rows] == expected
  assert not (tmp_path / "metrics.tmp").exists()
  assert [event[:2] for event in _events(tmp_path)] == [(step, f"{split}/loss") for step, split in expected]


def test_a_resumed_run_is_cut_at_the_mark_of_its_checkpoint(tmp_path, monkeypatch):
  path = tmp_path / "metrics.jsonl"
  with MetricWriter(tmp_path, 0, "", {}) as writer:
    writer.write(1, "train", {"loss": 1.0})
    mark = writer.mark()
    writer.write(2, "train", {"loss": 2.0})
  kept = path.read_bytes()[:mark["size"]]
  monkeypatch.setattr(report, "read_metrics", None)  # it is not parsed
  with MetricWriter(tmp_path, 1, "", {}, mark) as writer:
    assert path.read_bytes() == kept and writer.mark() == mark
    writer.write(2, "train", {"loss": 3.0})
    after = writer.mark()
  with MetricWriter(tmp_path, 2, "", {}, after):
    assert path.read_bytes() == kept + b'{"step": 2, "split": "train", "loss": 3.0}\n'


def test_a_change_above_the_mark_is_told_before_anything_is_written(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricWriter(tmp_path, 0, "", {}) as writer:
    writer.write(1, "train", {"loss": 1.0})
    mark = writer.mark()
  data = path.read_bytes()
  for bad in (data[:-1], data.replace(b"1.0", b"1.1"), b""):
    path.write_bytes(bad)
    with pytest.raises(UserError, match="metrics.jsonl was damaged or edited.*or delete it"):
      MetricWriter(tmp_path, 1, "", {}, mark)
    assert path.read_bytes() == bad
  path.unlink()
  with MetricWriter(tmp_path, 1, "", {}, mark):
    assert path.read_bytes() == b""


def test_the_rows_are_durable_before_the_mark_is_given(tmp_path, monkeypatch):
  synced, real = [], os.fsync

  def fsync(descriptor):
    synced.append(os.fstat(descriptor))
    real(descriptor)

  monkeypatch.setattr(os, "fsync", fsync)
  path = tmp_path / "metrics.jsonl"
  with MetricWriter(tmp_path, 0, "", {}) as writer:
    assert [stat.st_ino for stat in synced] == [path.stat().st_ino, tmp_path.stat().st_ino]
    writer.write(1, "train", {"loss": 1.0})
    size = writer.mark()["size"]
    assert (synced[-1].st_ino, synced[-1].st_size) == (path.stat().st_ino, size)


def test_tensorboard_reads_a_resumed_run_last_even_if_the_clock_was_set_back(tmp_path, monkeypatch):
  times = iter([5e9, 5e9, 4e9, 5e9 + 1] + [1e9] * 20)
  monkeypatch.setattr(metrics.time, "time", lambda: next(times))
  for start in (0, 5, 6):
    with MetricWriter(tmp_path, start, "", {}) as writer:
      writer.write(start + 1, "train", {"loss": start})
  files = sorted(tmp_path.glob("events.*"))
  assert [int(path.name.split(".")[3]) for path in files] == [5_000_000_000, 5_000_000_001, 5_000_000_002]
  assert _events(tmp_path) == [(1, "train/loss", 0), (6, "train/loss", 5), (7, "train/loss", 6)]
  # The bytes of a record: its length, a checksum, the tag of the first field, and the time as f64.
  walls, data = [], files[0].read_bytes()
  while data:
    length, = struct.unpack("<Q", data[:8])
    walls += struct.unpack("<d", data[13:21])
    data = data[16 + length:]
  assert walls == [5e9, 5e9, 5e9 + 1]


def test_a_new_run_does_not_keep_an_old_ones_rows(tmp_path):
  _write(tmp_path, 0, [1, 2])
  _write(tmp_path, 0, [1], scale=3.0)
  assert [row["loss"] for row in report.read_metrics(tmp_path / "metrics.jsonl")] == [3.0, 6.0]
  assert _events(tmp_path) == [(1, "train/loss", 3.0), (1, "validation/loss", 6.0)]


@pytest.mark.parametrize("line", ["nonsense", "[]", '"step"', "3", "{}", '{"step": "one"}'])
def test_a_damaged_line_is_told_before_anything_is_written(tmp_path, line):
  _write(tmp_path, 0, [1, 2])
  path = tmp_path / "metrics.jsonl"
  path.write_text(f"{line}\n{path.read_text()}")
  before = {p: p.read_bytes() for p in tmp_path.iterdir()}
  with pytest.raises(UserError, match="metrics.jsonl has a line that is no row of metrics; delete that line") as error:
    MetricWriter(tmp_path, 2, "", {})
  assert "\n" not in str(error.value)
  assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_full_disk_is_one_error_and_nothing_else(tmp_path, capfd):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  threads = threading.active_count()
  try:
    with pytest.raises(RunError, match="metrics.jsonl was not written: File too large") as error:
      with MetricWriter(tmp_path, 0, "", {}) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        for step in range(1, 1000):
          writer.write(step, "train", {"loss": 0.5})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  del error, writer
  gc.collect()
  assert capfd.readouterr().err == ""
  assert threading.active_count() <= threads
  assert report.read_metrics(tmp_path / "metrics.jsonl")


def test_weights_and_biases_that_is_not_installed_is_refused(monkeypatch):
  metrics.check_wandb("")
  monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
  metrics.check_wandb("")
  with pytest.raises(UserError, match="--wandb.*pip install wandb"):
    metrics.check_wandb("project")


class _Wandb:
  """What is used of the module and of a run, noting the ids."""

  def __init__(self):
    self.ids, self.names, self.logged = [], [], []

  def init(self, *, id, name, **_):
    self.ids.append(id)
    self.names.append(name)
    return self

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    pass


def test_weights_and_biases_continues_the_run_of_a_workdir_and_of_no_other(tmp_path, monkeypatch):
  wandb = _Wandb()
  monkeypatch.setitem(sys.modules, "wandb", wandb)

  def log(folder, step):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"family": "rnn", "preset": "pydoc", "data": {"file": "texts/book.txt", "name": "pydoc"}}
    with MetricWriter(folder, step - 1, "project", config) as writer:
      writer.write(step, "train", {"loss": 0.5})

  one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
  log(one, 1)
  log(one, 2)
  log(other, 1)
  shutil.rmtree(one)
  log(one, 1)
  first, again, of_other, afresh = wandb.ids
  assert set(wandb.names) == {"rnn book.txt run"}  # the data, not the preset
  assert first == again and len({first, of_other, afresh}) == 3
  assert wandb.logged[:2] == [(1, {"train/loss": 0.5}), (2, {"train/loss": 0.5})]
