"""What every modality hands over: the splits of a data set as pipelines, and what was fitted to them."""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dljax.data import sources
from dljax.data.pipeline import Pipeline
from dljax.errors import UserError


def _nothing() -> Mapping[str, Any]:
  return {}


def _nothing_to_restore(assets: Mapping[str, Any]) -> None:
  del assets


@dataclasses.dataclass(frozen=True)
class Data:
  """A data set as the engine sees it, of whatever modality. Making one opens no data.

  Attributes:
    name: the set's name, or the path of the user's own data.
    train: training batches, by step: shuffled, augmented, endless.
    evals: split name ("validation", "test") -> one pass over that split, in this order, as far as the config names them.
    batch_spec: field -> shape and dtype of one global training batch, known without data; the largest batch where
      there are several shapes.
    fingerprint: () -> what tells this data from other data of the same name; opens it if need be.
    assets: () -> what was fitted to the data (class names, a tokenizer), JSON-able, by file stem; called once after
      the data was opened, and saved in `workdir/data/`.
    restore: takes the assets that a run has saved, before the data is opened to continue that run.
    context: () -> host arrays for the task's context (token ids of class prompts, a judge's variables).
    corruptions: what `config.eval.corruptions` asks for: name -> strength, from 1 -> one pass over the split "test",
      disturbed accordingly. A final evaluation measures each and gives the table and figure "corruptions".
  """

  name: str
  train: Pipeline
  evals: Mapping[str, Pipeline]
  batch_spec: Mapping[str, jax.ShapeDtypeStruct]
  fingerprint: Callable[[], str]
  assets: Callable[[], Mapping[str, Any]] = _nothing
  restore: Callable[[Mapping[str, Any]], None] = _nothing_to_restore
  context: Callable[[], Mapping[str, np.ndarray]] = _nothing
  corruptions: Mapping[str, Mapping[int, Pipeline]] = dataclasses.field(default_factory=dict)


def check_splits(dataset: sources.Dataset, config: Any) -> None:
  """Raises `UserError` where a split of `config.data` does not exist, is empty or overlaps another."""
  splits = {field: config[field] for field in ("train", "validation", "test") if config[field]}
  ranges = {field: dataset.ranges(split, field) for field, split in splits.items()}
  for one, other in itertools.combinations(splits, 2):
    if any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
           for a in ranges[one] for b in ranges[other]):
      raise UserError(f"--config.data.{other}={splits[other]!r} overlaps "
                      f"--config.data.{one}={splits[one]!r}; choose ranges without a common example")


def file_fingerprint(path: str | os.PathLike[str]) -> str:
  """The length and the SHA-256 of a file's bytes; `Data.fingerprint` of the user's own file."""
  content = Path(path).expanduser().read_bytes()
  return f"{len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}"
