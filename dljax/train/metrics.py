"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import hashlib
import io
import json
import os
import re
import socket
import statistics
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dljax import report
from dljax.config import title
from dljax.errors import RunError, UserError, writing
from dljax.train import durable
from dljax.train.experiment import Experiment
from dljax.train.progress import Compilations, Progress, bar_stream
from dljax.train.state import NOT_FAILED
from dljax.train.workdir import read_json, write_json


def median_rate(rows: Sequence[Mapping[str, Any]]) -> float | None:
  """The median of the examples per second in the rows of metrics.jsonl, or None if none has one."""
  rates = [row["examples_per_second"] for row in rows if "examples_per_second" in row]
  return statistics.median(rates) if rates else None


class MetricWriter:
  """Writes each logged point to metrics.jsonl, to TensorBoard and, if asked, to Weights & Biases.

  Opened at a resumed step, it drops what a run that was cut off logged beyond it, so that each step
  stands in metrics.jsonl once. The first host writes; on the others it does nothing.

  A checkpoint keeps the file's `mark`: the file is cut there when the run continues, after its hash
  is verified, and need not be parsed.
  """

  def __init__(
      self, workdir: Path, step: int, wandb_project: str, config: Mapping[str, Any],
      mark: Mapping[str, Any] | None = None,
  ):
    """Reads what is there; what it writes, it writes once it is entered.

    Args:
      workdir: where metrics.jsonl and the TensorBoard event files lie.
      step: the last completed step; rows after it are dropped.
      wandb_project: the Weights & Biases project, or "" for none.
      config: sent to Weights & Biases.
      mark: the `mark` of the checkpoint of this step; without it the rows are looked through.

    Raises:
      UserError: metrics.jsonl holds something else, or was changed since the checkpoint.
    """
    self._workdir, self._path, self._step = workdir, workdir / "metrics.jsonl", step
    self._project, self._config = wandb_project, config
    self._files, self._wandb = (), None
    self._size, self._hash, self._kept = 0, hashlib.sha256(), b""
    if mark and self._path.exists():
      self._kept = None  # the file stays, up to the mark
      self._size, self._hash = mark["size"], _verified(self._path, mark)
      return
    try:
      rows = report.read_metrics(self._path) if self._path.exists() else []
      self._kept = "".join(
          json.dumps(row) + "\n" for row in rows if row["step"] <= step).encode()
    except (ValueError, KeyError, TypeError):
      raise UserError(f"{self._path} has a line that is no row of metrics; delete that line, or start "
                      "again in another --workdir") from None

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Writes one row: the step, the split ("train", "validation", ...) and plain numbers.

    Raises:
      RunError: the row cannot be written.
    """
    if not self._files:
      return
    _, events = self._files
    with writing(self._path):
      self._append(json.dumps({"step": step, "split": split, **values}) + "\n")
      events.write(step, {f"{split}/{name}": value for name, value in values.items()})
    if self._wandb:
      self._wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

  def mark(self) -> dict[str, Any] | None:
    """Makes all rows durable; returns the size and the SHA-256 of metrics.jsonl, on the first host.

    Raises:
      RunError: the rows cannot be written.
    """
    if not self._files:
      return None
    with writing(self._path):
      os.fsync(self._files[0].fileno())
    return {"size": self._size, "sha256": self._hash.hexdigest()}

  def _append(self, text: str) -> None:
    data = text.encode()
    self._files[0].write(data)
    self._files[0].flush()
    self._size += len(data)
    self._hash.update(data)

  def picture(self, step: int, name: str, png: bytes) -> None:
    """Shows a PNG under its name in TensorBoard and Weights & Biases; any thread may call it."""
    if not self._files:
      return
    with writing(self._path):
      self._files[1].picture(step, name, png)
    if self._wandb:
      from PIL import Image  # pylint: disable=g-import-not-at-top

      self._wandb.log({name: _wandb_module().Image(Image.open(io.BytesIO(png)))}, step=step)

  def __enter__(self) -> "MetricWriter":
    if jax.process_index() != 0:
      return self
    with writing(self._path):
      if self._kept is None:
        os.truncate(self._path, self._size)
        rows = self._path.open("ab")
      else:
        temporary = self._path.with_suffix(".tmp")
        rows = temporary.open("wb")
      self._files = rows, _EventFile(self._workdir, self._step)
      if self._kept is not None:
        self._append(self._kept.decode())
      os.fsync(rows.fileno())
      if self._kept is not None:
        os.replace(temporary, self._path)
      durable.sync(self._workdir)
    if self._project:
      self._wandb = _wandb_module().init(
          project=self._project, dir=str(self._workdir), id=self._wandb_id(), resume="allow",
          name=f"{title(self._config)} {self._workdir.name}", config=dict(self._config))
    return self

  def __exit__(self, *_: object) -> None:
    for file in self._files:
      # Each write was flushed, so that one failed, and has said so.
      with contextlib.suppress(OSError):
        file.close()
    if self._wandb:
      self._wandb.finish()

  def _wandb_id(self) -> str:
    """Returns the run's id, which lies in the workdir: a folder's name may be used again."""
    path = self._workdir / "wandb.json"
    if not path.exists():
      write_json(path, {"id": uuid.uuid4().hex})
    return read_json(path, id=str)["id"]


def read_rows(path: Path, mark: Mapping[str, Any] | None) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl that were written before a checkpoint; [] if there is no file.

  Args:
    path: the file.
    mark: the checkpoint's `MetricWriter.mark`; without it all rows are read, and not verified.

  Raises:
    UserError: the file was damaged or edited since.
  """
  if not path.exists():
    return []
  if mark is None:
    return report.read_metrics(path)
  _verified(path, mark)
  with path.open("rb") as file:
    return [json.loads(line) for line in file.read(mark["size"]).splitlines()]


def _verified(path: Path, mark: Mapping[str, Any]) -> Any:
  """The hash of the file up to a `MetricWriter.mark`; `UserError` unless the mark has it too."""
  digest, left = hashlib.sha256(), mark["size"]
  with path.open("rb") as file:
    while left and (data := file.read(min(left, 2**20))):
      digest.update(data)
      left -= len(data)
  if left or digest.hexdigest() != mark["sha256"]:
    raise UserError(f"{path} was damaged or edited since the checkpoint was saved; restore it from "
                    "a copy, or delete it to continue without its rows")
  return digest


_EVENTS = re.compile(r"events\.out\.tfevents\.(\d{1,12})\.")


class _EventFile:
  """A TensorBoard event file, on disk after each write.

  tensorboardX has a writer that works in a thread, whose errors reach nobody: on a full disk it
  would end with a traceback, and then the run would wait for it for ever.
  """

  def __init__(self, workdir: Path, step: int):
    from tensorboardX import record_writer  # pylint: disable=g-import-not-at-top
    from tensorboardX.proto import event_pb2, summary_pb2  # pylint: disable=g-import-not-at-top

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    self._checksum = record_writer.masked_crc32c
    self._lock = threading.Lock()  # pictures come from another thread
    self._time = time.time()
    # TensorBoard reads the files in the order of their names, even if the clock was set back.
    earlier = [int(match[1]) for path in workdir.iterdir() if (match := _EVENTS.match(path.name))]
    number = max([int(self._time), *(second + 1 for second in earlier)])
    self._file = (workdir / f"events.out.tfevents.{number}.{socket.gethostname()}").open("ab")
    self._record(file_version="brain.Event:2")
    # TensorBoard drops what earlier files hold from this step on.
    self._record(step=step + 1,
                 session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._record(step=step, summary=self._summary(value=[
        self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]))

  def picture(self, step: int, name: str, png: bytes) -> None:
    width, height = struct.unpack(">II", png[16:24])  # where PNG has them
    image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    self._record(step=step,
                 summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

  def _record(self, **fields: Any) -> None:
    self._time = max(self._time, time.time())
    data = self._event(wall_time=self._time, **fields).SerializeToString()
    size = struct.pack("<Q", len(data))
    parts = b"".join(part + struct.pack("<I", self._checksum(part)) for part in (size, data))
    with self._lock:
      self._file.write(parts)
      self._file.flush()

  def close(self) -> None:
    self._file.close()


def check_wandb(project: str) -> None:
  """Raises a UserError if Weights & Biases is asked for and not installed."""
  if project:
    _wandb_module()


def _wandb_module():
  try:
    import wandb  # pylint: disable=g-import-not-at-top
  except ImportError:
    raise UserError("--wandb: Weights & Biases is not installed; run `pip install wandb` or drop the "
                    "flag") from None
  return wandb


def say(text: str) -> None:
  """Prints a line on the first host, above a progress bar if there is one."""
  from tqdm import tqdm  # pylint: disable=g-import-not-at-top

  if jax.process_index() != 0:
    return
  if sys.stderr.isatty():
    tqdm.write(text, file=sys.stderr)
  else:
    print(text, file=sys.stderr, flush=True)


def progress(
    items: Iterable[Any], name: str, total: int | None = None, show: bool = True,
) -> Iterator[Any]:
  """Iterates with a progress bar that goes away when it is done, if `show`."""
  from tqdm import tqdm  # pylint: disable=g-import-not-at-top

  yield from tqdm(items, desc=name, total=total, unit="batch", leave=False, disable=not show,
                  mininterval=0.2 if sys.stderr.isatty() else 30.0, delay=1.0, dynamic_ncols=True,
                  file=bar_stream())


class Diverged(RunError):
  """The loss or the gradient was not finite; the checkpoints are from before."""


class TrainLog:
  """Shows and writes the numbers of the train steps, one log late, so that dispatch never waits."""

  def __init__(
      self, experiment: Experiment, start: int, writer: MetricWriter, show: bool,
      compilations: Compilations,
  ):
    """
    Args:
      experiment: the experiment that is trained.
      start: the number of steps that are done.
      writer: takes the rows.
      show: whether to show a progress bar.
      compilations: says how long was compiled, which counts as no training.
    """
    config = experiment.config
    self._summarize, self._batch_size = experiment.task.summarize, config.batch_size
    self._writer, self._compilations = writer, compilations
    self._bar = Progress(title(config), start, config.total_steps, config.eval_every, show)
    self._compiled = compilations.seconds
    self._pending: tuple[int, Any, float] | None = None
    self._clock: tuple[int, float] | None = None  # a step and when it was dispatched

  def step(self, step: int, out: Any | None) -> None:
    """Counts a step that was dispatched; `out` is what it returned, if it is to be logged."""
    self._pause(self._newly_compiled())
    self._bar.advance()
    now = time.monotonic()
    if self._clock is None:
      self._clock = step, now  # the first step compiled: it says nothing about the rate
    if out is not None:
      self._flush()
      since, started = self._clock
      rate = (step - since) * self._batch_size / (now - started) if step > since else None
      self._pending, self._clock = (step, out, rate), (step, now)

  @contextlib.contextmanager
  def paused(self, out: Any, evaluating: bool) -> Iterator[None]:
    """Waits for the step that returned `out`; what happens inside is not counted as training time.

    Args:
      out: what the newest step returned.
      evaluating: whether an evaluation happens inside.
    """
    jax.block_until_ready(out)
    start = time.monotonic()
    self._flush()
    _check_finite(out)
    yield
    seconds = time.monotonic() - start
    compiled = self._newly_compiled()
    self._pause(seconds, seconds - compiled if evaluating else None)

  def _newly_compiled(self) -> float:
    """The seconds of compilation since the last call."""
    before, self._compiled = self._compiled, self._compilations.seconds
    return self._compiled - before

  def _pause(self, seconds: float, evaluation: float | None = None) -> None:
    if self._clock is not None:
      self._clock = self._clock[0], self._clock[1] + seconds
    self._bar.pause(seconds, evaluation)

  def _flush(self) -> None:
    if self._pending is None:
      return
    (step, out, rate), self._pending = self._pending, None
    _check_finite(out)
    values = _scalars(out, self._summarize)
    if rate is not None:
      values["examples_per_second"] = rate
    self._writer.write(step, "train", values)
    self._bar.show({name: values[name] for name in ("loss", "learning_rate", "examples_per_second")
                    if name in values})

  def close(self) -> None:
    self._bar.close()


def _check_finite(out: Any) -> None:
  failed = int(out["failed_step"])
  if failed != NOT_FAILED:
    raise Diverged(f"the loss or the gradient of step {failed} is not finite; the checkpoints are from "
                   "before it. Try a smaller --config.optimizer.learning_rate or "
                   "--config.optimizer.clip_norm=1")


def _scalars(
    metrics: Mapping[str, Any], summarize: Callable[..., Mapping[str, float]],
) -> dict[str, float]:
  """Returns the numbers of one train step, on the host: the task's and the engine's."""
  own = {k: float(v) for k, v in metrics.items() if k not in ("sums", "failed_step")}
  return {**summarize(metrics["sums"]), **own}
