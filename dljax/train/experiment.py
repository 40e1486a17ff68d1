"""The experiment: everything that the engine sees of a family."""

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
  """The inputs that a user wants predictions for.

  A part that the experiment has no use for is refused by its flag.

  Attributes:
    paths: the files and folders of --input.
    texts: the text of --prompt.
    count: the number of predictions to draw for each input, from --count; None if it is not set.
    labels: the classes to draw predictions of, from --label.
  """

  paths: Sequence[str] = ()
  texts: Sequence[str] = ()
  count: int | None = None
  labels: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The rows that a request asks for.

  Attributes:
    batch: the fields of prediction, with leading axis rows; among them id, the requested row, and
      mask, all ones.
    names: each row's name, such as the file that it comes from.
    skipped: one line for each input that cannot be used.
    warnings: lines on inputs that can be used, but perhaps should not, such as images that are
      unlike those of the training.
  """

  batch: Mapping[str, np.ndarray]
  names: Sequence[str]
  skipped: Sequence[str] = ()
  warnings: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
  """An experiment as `experiments/x.py` builds it from a config. Building it opens no data.

  Attributes:
    task: the loss and the metrics, with the model.
    data: the pipelines, and the assets that were fitted to the data.
    config: the config it was built from.
    monitor: the metric that early stopping, plateau and "best" watch, as "split/metric"
      ("validation/accuracy"), or None.
    read: (request, assets) -> the request's rows, as evaluation would read them. It raises
      `UserError` for a path that does not exist and for a part of the request without a meaning.
    show: (inputs, predictions, assets) -> one JSON-able dict per row, to print and to write.
    draw: (inputs, predictions, assets) -> for each row the suffix (".png") and the bytes of a
      picture or a sound, or None if the row has none. The attribute is None if predictions cannot
      be drawn.
    saw: (inputs, rows of `show` with their names as "input") -> for each row a PNG of what the
      network saw, decoded and resized, beside the prediction; None if there is nothing to see.
    preview: () -> a fixed batch whose predictions are drawn at every evaluation, or None where the
      data has none; None where nothing is drawn.
    texts: whether predictions are for texts, so that a `str` is a text and no path.
  """

  task: Task
  data: Data
  config: ml_collections.ConfigDict
  monitor: str | None
  read: Callable[[Request, Assets], Inputs]
  show: Callable[[Inputs, Any, Assets], Iterable[Mapping[str, Any]]]
  draw: Callable[[Inputs, Any, Assets], Iterable[tuple[str, bytes] | None]] | None = None
  saw: Callable[[Inputs, Sequence[Mapping[str, Any]]], Iterable[bytes]] | None = None
  preview: Callable[[], Inputs | None] | None = None
  texts: bool = False
