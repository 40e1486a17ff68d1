"""What an experiment is: all that the engine sees of a family."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from dljax.data.pipeline import Pipeline
from dljax.tasks.base import Task


def _no_assets() -> Mapping[str, Any]:
  return {}


def _nothing_to_restore(assets: Mapping[str, Any]) -> None:
  del assets


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What `experiments/x.py` builds from a config. Building one opens no data.

  Attributes:
    task: the loss and the metrics; holds the model.
    train: training batches, by step.
    evals: split name ("validation", "test") -> one pass over that split.
    batch_spec: field -> shape and dtype of one global training batch, known without data.
    config: the config it was built from.
    monitor: the metric that early stopping, plateau and "best" watch, as "split/metric"
      ("validation/accuracy"), or None.
    encode: (paths given by the user, assets) -> (one Batch for prediction with leading axis rows,
      names of the rows, one line for each input that was skipped).
    decode: (predictions, assets) -> one flat, JSON-able dict per row, to print and to write.
    pictures: (batch of `encode`, predictions, assets) -> one picture (PIL) per row, to write into a folder; None
      where predictions are none.
    assets: called once after the data was opened: what was fitted to it (class names, a
      tokenizer), JSON-able, by file stem; saved in `workdir/data/`.
    restore: takes what a run has saved so, before the data is opened to go on with that run.
    prompt: (texts, names for messages) -> a Batch whose predictions continue them, by a task with `start` and
      `advance`; None where predictions are no such texts.
    corruptions: what `config.eval.corruptions` asks for: name -> strength, from 1 -> one pass over the split
      "test", so disturbed. A final evaluation measures each and gives the table and figure "corruptions".
  """

  task: Task
  train: Pipeline
  evals: Mapping[str, Pipeline]
  batch_spec: Mapping[str, jax.ShapeDtypeStruct]
  config: ml_collections.ConfigDict
  monitor: str | None
  encode: Callable[[Sequence[str], Mapping[str, Any]], tuple[Mapping[str, Any], list[str], list[str]]]
  decode: Callable[[Any, Mapping[str, Any]], Iterable[Mapping[str, Any]]]
  pictures: Callable[[Mapping[str, Any], Any, Mapping[str, Any]], Iterable[Any]] | None = None
  assets: Callable[[], Mapping[str, Any]] = _no_assets
  restore: Callable[[Mapping[str, Any]], None] = _nothing_to_restore
  prompt: Callable[[Sequence[str], Sequence[str]], Mapping[str, Any]] | None = None
  corruptions: Mapping[str, Mapping[int, Pipeline]] = dataclasses.field(default_factory=dict)
