"""Previews: a fixed batch whose predictions are drawn at every evaluation, to be watched while a network learns."""

import concurrent.futures
import os
from pathlib import Path
from typing import Any

import jax

from dljax import report
from dljax.errors import writing
from dljax.train import parallel
from dljax.train.evaluate import Predictor
from dljax.train.experiment import Experiment
from dljax.train.metrics import MetricWriter
from dljax.train.program import Program
from dljax.train.progress import Compilations
from dljax.train.state import TrainState
from dljax.train.workdir import Workdir


class Preview:
  """Draws `Experiment.preview` in a thread of its own; a context manager, which waits for the last picture.

  What it draws never comes back into the training: a run with a preview has the digest and the
  metrics of one without.

  Args:
    experiment: gives the batch and how its predictions are drawn; without either nothing is drawn.
    program: gives the devices.
    mode: "jit" or "pmap".
    folder: the run's folder; pictures go into figures/preview/.
    writer: shows them in TensorBoard, and in Weights & Biases if it is in use.
    compilations: says what is compiled; by default nothing is said.
  """

  def __init__(
      self, experiment: Experiment, program: Program, mode: parallel.Mode, folder: Workdir,
      writer: MetricWriter, compilations: Compilations = Compilations(),
  ):
    self._experiment, self._folder, self._writer = experiment, folder, writer
    self._inputs = experiment.preview() if experiment.preview and experiment.draw else None
    self._predict = Predictor(experiment, program, mode, compilations)
    self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="preview")
    self._pending: concurrent.futures.Future[None] | None = None

  def draw(self, step: int, state: TrainState) -> None:
    """Predicts, and lets the thread draw; waits if it still draws the picture before.

    Raises:
      RunError: the picture before could not be written.
    """
    if self._inputs is None:
      return
    predictions = self._predict(state, self._inputs.batch)
    self._wait()
    if jax.process_index() == 0:
      self._pending = self._worker.submit(self._write, step, predictions)

  def _write(self, step: int, predictions: Any) -> None:
    drawn = self._experiment.draw(self._inputs, predictions, self._folder.read_assets())
    parts = [part for part in drawn if part is not None]
    place = self._folder.figures / "preview"
    with writing(place):
      for folder in self._folder.figures, place:  # and not the workdir, which may have been moved
        folder.mkdir(exist_ok=True)
      if pictures := [data for suffix, data in parts if suffix == ".png"]:
        picture = report.side_by_side(pictures)
        _write_whole(place / f"{step}.png", picture)
        self._writer.picture(step, "preview", picture)
      others = [(suffix, data) for suffix, data in parts if suffix != ".png"]
      for i, (suffix, data) in enumerate(others, 1):
        _write_whole(place / f"{step}-{i}{suffix}", data)

  def _wait(self) -> None:
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def __enter__(self) -> "Preview":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self._worker.shutdown()
    if kind is None:
      self._wait()


def _write_whole(path: Path, data: bytes) -> None:
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_bytes(data)
  os.replace(temporary, path)
