"""What an experiment is: all that the engine sees of a family."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from dljax.data.splits import Data
from dljax.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What `experiments/x.py` builds from a config. Building one opens no data.

  Attributes:
    task: the loss and the metrics; holds the model.
    data: the pipelines, and what was fitted to the data.
    config: the config it was built from.
    monitor: the metric that early stopping, plateau and "best" watch, as "split/metric"
      ("validation/accuracy"), or None.
    encode: (paths given by the user, assets) -> (one Batch for prediction with leading axis rows,
      names of the rows, one line for each input that was skipped).
    decode: (predictions, assets) -> one flat, JSON-able dict per row, to print and to write.
    pictures: (batch of `encode`, predictions, assets) -> one picture (PIL) per row, to write into a folder; None
      where predictions are none.
    prompt: (texts, names for messages) -> a Batch whose predictions continue them, by a task with `start` and
      `advance`; None where predictions are no such texts.
  """

  task: Task
  data: Data
  config: ml_collections.ConfigDict
  monitor: str | None
  encode: Callable[[Sequence[str], Mapping[str, Any]], tuple[Mapping[str, Any], list[str], list[str]]]
  decode: Callable[[Any, Mapping[str, Any]], Iterable[Mapping[str, Any]]]
  pictures: Callable[[Mapping[str, Any], Any, Mapping[str, Any]], Iterable[Any]] | None = None
  prompt: Callable[[Sequence[str], Sequence[str]], Mapping[str, Any]] | None = None
