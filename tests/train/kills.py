"""Kills short runs at random moments by `kill -9`, and compares what they end with to a run that nobody has killed.

  python -m tests.train.kills [--kills=20] [FAMILY ...]

Between them the families have dropout, batch normalisation, augmentation, averages of parameters, accumulation and a
carried state. Nothing is asked for but what a user types: the same command after each kill. pytest kills a smaller
network a few times (test_processes.py).
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dljax import report

ROOT = Path(__file__).parents[2]
STEPS = 120
OFTEN = (f"--config.total_steps={STEPS}", "--config.log_every=1", "--config.eval_every=15", "--config.checkpoint_every=4",
         "--config.ema_decay=0.95", "--mesh=data:1")
CASES = {
    "resnet": ("--config.data.image_shape=8,8,1", "--config.data.pad_crop=1", "--config.batch_size=32",
               "--config.accumulation=2", "--config.eval_batch_size=32", "--config.data.validation=validation[:32]",
               "--config.data.test=test[:32]"),
    "rnn": ("--config.model.hidden_size=32", "--config.model.dropout=0.2", "--config.data.length=16",
            "--config.batch_size=8", "--config.eval_batch_size=8", "--config.data.validation=validation[:1]",
            "--config.data.test=test[:1]"),
    "deepspeech": ("--config.batch_size=4", "--config.eval_batch_size=8", "--config.data.validation=validation[:8]",
                   "--config.data.test=test_10db[:8]", "--config.data.buckets=1"),
}
LONGEST = 600  # seconds that a process may take


def _command(family: str, workdir: Path) -> list[str]:
  return [sys.executable, "-m", f"experiments.{family}", *CASES[family], *OFTEN, f"--workdir={workdir}"]


def _finish(family: str, workdir: Path) -> None:
  done = subprocess.run(_command(family, workdir), cwd=ROOT, capture_output=True, text=True, timeout=LONGEST)
  if done.returncode:
    raise SystemExit(f"{family}: status {done.returncode}\n{done.stderr}")


def _rows(workdir: Path) -> list[dict[str, Any]]:
  """The logged rows, without times; [] before there are any."""
  path = workdir / "metrics.jsonl"
  rows = report.read_metrics(path) if path.exists() else []
  return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def _result(workdir: Path) -> dict[str, Any]:
  """The result with the digest of the whole state, without times and what names the run itself."""
  result = json.loads((workdir / "result.json").read_text("utf-8"))
  return {name: value for name, value in result.items() if "second" not in name and name not in ("run", "sha256")}


def _last_step(workdir: Path) -> int:
  return max((row["step"] for row in _rows(workdir)), default=0)


def _kill(family: str, workdir: Path, moment: int, delay: float) -> int:
  """Starts the run, kills it a moment after it has logged a step, and returns the last step that it has logged."""
  process = subprocess.Popen(
      _command(family, workdir), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  start = time.monotonic()
  while _last_step(workdir) < moment:
    if process.poll() is not None or time.monotonic() - start > LONGEST:
      process.kill()
      raise SystemExit(f"{family}: ended with status {process.wait()} before step {moment}")
    time.sleep(0.01)
  time.sleep(delay)
  process.send_signal(signal.SIGKILL)
  process.wait()
  return _last_step(workdir)


def compare(family: str, kills: int, folder: Path, seed: int = 0) -> list[int]:
  """Returns the steps at which the run was killed.

  Args:
    family: a key of `CASES`.
    kills: how often to kill the run.
    folder: where the two runs' folders are made.
    seed: draws the moments.

  Raises:
    SystemExit: the two runs differ.
  """
  draw = random.Random(seed)
  plain, killed = folder / f"{family}-plain", folder / f"{family}-killed"
  _finish(family, plain)
  moments = sorted(draw.sample(range(2, STEPS - 6), kills))
  steps = [_kill(family, killed, moment, draw.uniform(0, 0.3)) for moment in moments]
  _finish(family, killed)
  for name, one, two in (("the rows", _rows(plain), _rows(killed)), ("the result", _result(plain), _result(killed))):
    if one != two:
      raise SystemExit(f"{family}: {name} differ\n{one}\n{two}")
  return steps


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("families", nargs="*", default=list(CASES))
  arguments = parser.parse_args()
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("MPLBACKEND", "Agg")
  with tempfile.TemporaryDirectory() as folder:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(folder, "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    for family in arguments.families:
      steps = compare(family, arguments.kills, Path(folder))
      digest = _result(Path(folder) / f"{family}-killed")["state_sha256"]
      print(f"{family}: killed after the steps {', '.join(map(str, steps))}; equal, with the state {digest}", flush=True)


if __name__ == "__main__":
  main()
