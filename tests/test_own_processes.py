"""One's own data over two processes, which look at it each for itself: what one process with two devices gives."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dljax import report
from tests import command
from tests.data.image import own_images
from tests.families import EXPERIMENTS, ROOT

SHORT = ("--config.batch_size=4", "--config.eval_batch_size=8", "--config.total_steps=3", "--config.eval_every=3",
         "--config.checkpoint_every=3", "--config.log_every=1", "--mesh=data:2")


def _photos(root: Path) -> tuple[str, ...]:
  own_images.folders(root / "photos", {"cat": 14, "dog": 6})
  (root / "photos" / "cat" / "broken.png").write_bytes(b"no image")
  return ("mlp", f"--config.data.folder={root / 'photos'}", "--config.data.sampler=balanced",
          "--config.data.class_weights=balanced", "--config.data.skip_corrupt=1", "--config.model.widths=4")


def _series(root: Path) -> tuple[str, ...]:
  with (root / "sales.csv").open("w", newline="") as file:
    days = np.arange("2024-01-01", "2024-07-01", dtype="datetime64[D]")
    csv.writer(file).writerows([("date", "sold"), *((day, i % 7 + i % 11 / 10) for i, day in enumerate(days))])
  return ("rnn", "--preset=temperatures", f"--config.data.name={root / 'sales.csv'}", "--config.model.variant=dlinear",
          "--config.data.window=14", "--config.data.horizon=7")


def _rows(run: Path) -> list[dict[str, float]]:
  return [{k: v for k, v in row.items() if "second" not in k} for row in report.read_metrics(run / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("make", [_photos, _series])
def test_two_processes_give_what_two_devices_of_one_give(tmp_path, make):
  family, *arguments = make(tmp_path)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": command.xla_flags(1),
                 "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
  both = [subprocess.Popen(
      [sys.executable, "-m", f"experiments.{family}", *arguments, *SHORT, f"--workdir={tmp_path / 'two'}"],
      env={**environment, "JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for i in range(2)]
  try:
    said = [process.communicate(timeout=300) for process in both]
  finally:
    for process in both:
      process.kill()
  assert [process.returncode for process in both] == [0, 0], said
  with command.plain_pictures():
    done = command.run(EXPERIMENTS[family], *arguments, *SHORT, f"--workdir={tmp_path / 'one'}")
  assert done.status == 0, done
  assert ["skipped 1 of" in err for _, err in said] == [make is _photos, False]
  one, two = _rows(tmp_path / "one"), _rows(tmp_path / "two")
  assert len(one) == len(two) >= 4
  for a, b in zip(one, two):
    assert (a.pop("step"), a.pop("split")) == (b.pop("step"), b.pop("split"))
    assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
  results = [json.loads((tmp_path / name / "result.json").read_text())["metrics"] for name in ("one", "two")]
  for split, metrics in results[0].items():
    assert results[1][split] == pytest.approx(metrics, rel=1e-4)
  for name in (path.name for path in (tmp_path / "one" / "data").iterdir()):
    assert (tmp_path / "one" / "data" / name).read_bytes() == (tmp_path / "two" / "data" / name).read_bytes()
