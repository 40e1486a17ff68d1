"""What an experiment is: all that the engine sees of a family."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from dljax.data.splits import Data
from dljax.tasks.base import Task

Assets = Mapping[str, Any]  # what was fitted to the data, by file stem; see `Data.assets`


@dataclasses.dataclass(frozen=True)
class Request:
  """What a user asks predictions for. A part that the experiment has no use for is refused by its
  flag.

  Attributes:
    paths: --input, files and folders.
    texts: --prompt.
    count: --count, how many predictions to draw for each of the inputs; None where nobody said.
    labels: --label, what to draw predictions of.
  """

  paths: Sequence[str] = ()
  texts: Sequence[str] = ()
  count: int | None = None
  labels: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Inputs:
  """A request made into rows.

  Attributes:
    batch: the fields of prediction, leading axis rows; among them id, the row that was asked for,
      and mask, all ones.
    names: each row's name, such as the file that it comes from.
    skipped: one line for each input that cannot be used.
  """

  batch: Mapping[str, np.ndarray]
  names: Sequence[str]
  skipped: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What `experiments/x.py` builds from a config. Building one opens no data.

  Attributes:
    task: the loss and the metrics; holds the model.
    data: the pipelines, and what was fitted to the data.
    config: the config it was built from.
    monitor: the metric that early stopping, plateau and "best" watch, as "split/metric"
      ("validation/accuracy"), or None.
    read: (request, assets) -> its rows, as evaluation would read them. Raises `UserError` for a
      path that does not exist and for a part of the request that has no meaning here.
    show: (inputs, predictions, assets) -> one JSON-able dict per row, to print and to write.
    draw: (inputs, predictions, assets) -> for each row a picture or a sound as a file's suffix
      (".png") and bytes, or None where the row has none; None where predictions cannot be drawn at
      all.
    preview: () -> a fixed batch whose predictions are drawn at every evaluation, or None where the
      data has none; None where nothing is drawn.
  """

  task: Task
  data: Data
  config: ml_collections.ConfigDict
  monitor: str | None
  read: Callable[[Request, Assets], Inputs]
  show: Callable[[Inputs, Any, Assets], Iterable[Mapping[str, Any]]]
  draw: Callable[[Inputs, Any, Assets], Iterable[tuple[str, bytes] | None]] | None = None
  preview: Callable[[], Inputs | None] | None = None
