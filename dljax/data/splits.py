"""What every modality hands over: the splits of a data set as pipelines, and what was fitted to
them.

A modality has a module with `default_config()`, `validate(config)`, a set that makes pipelines
from a config, and `encode`, which reads what the user brings as evaluation would. What these share
stands here.
"""

import dataclasses
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from dljax.data import sources
from dljax.data.pipeline import Pipeline
from dljax.errors import UserError

Shapes = Mapping[str, tuple[Sequence[int], Any]]  # field -> shape of one row, dtype


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
    evals: split name ("validation", "test") -> one pass over that split, in this order, as far as
      the config names them.
    batch_spec: field -> shape and dtype of one global training batch, known without data; the
      largest batch where there are several shapes.
    fingerprint: () -> what tells this data from other data of the same name; opens it if need be.
    assets: () -> what was fitted to the data (class names, a tokenizer), JSON-able, by file stem;
      called once after the data was opened, and saved in `workdir/data/`.
    restore: takes the assets that a run has saved, before the data is opened to continue that run.
    context: () -> host arrays for the task's context (token ids of class prompts, a judge's
      variables).
    corruptions: what `config.eval.corruptions` asks for: name -> strength, from 1 -> one pass over
      the split "test", disturbed accordingly. A final evaluation measures each and gives the table
      and figure "corruptions".
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


class DataSet:
  """What the pipelines of one config share: the set, opened and held against the config once, by
  any thread.

  Subclasses add what else the set has to hold, and how its examples become batches.

  Args:
    config: `config.data`; later changes of it have no effect.
  """

  def __init__(self, config: Any):
    self.config = ml_collections.FrozenConfigDict(config)
    self.lock = threading.RLock()
    self._dataset: sources.Dataset | None = None

  @property
  def dataset(self) -> sources.Dataset:
    """The set, opened; raises `UserError` where it is missing or does not fit the config."""
    with self.lock:
      if self._dataset is None:
        dataset = sources.open_dataset(self.config.name)
        self.check(dataset)
        self._dataset = dataset
      return self._dataset

  def check(self, dataset: sources.Dataset) -> None:
    """Raises `UserError` where a set does not fit the config."""
    check_splits(dataset, self.config)

  def data(
      self, make: Callable[[str, int], Pipeline], shapes: Shapes, batch_size: int,
      eval_batch_size: int, **fields: Any,
  ) -> Data:
    """The set's `Data`; opens nothing.

    Args:
      make: (split, rows of a global batch) -> its pipeline; that of "train" is endless.
      shapes: the fields of a training batch besides mask and id.
      batch_size: rows of a global training batch.
      eval_batch_size: rows of a global evaluation batch.
      **fields: further fields of `Data`.

    Raises:
      UserError: a batch size is not positive.
    """
    for field, size in ("batch_size", batch_size), ("eval_batch_size", eval_batch_size):
      if size < 1:
        raise UserError(f"--config.{field}={size}: give a positive number")
    own = {
        "name": self.config.name,
        "train": make("train", batch_size),
        "evals": {split: make(split, eval_batch_size) for split in ("validation", "test")
                  if self.config[split]},
        "batch_spec": batch_spec(batch_size, shapes),
        "fingerprint": lambda: self.dataset.fingerprint,
    }
    return Data(**{**own, **fields})


def batch_spec(batch_size: int, shapes: Shapes) -> Mapping[str, jax.ShapeDtypeStruct]:
  """`Data.batch_spec` of a batch that has `shapes`, mask and id."""
  shapes = {**shapes, "mask": ((), np.float32), "id": ((), np.int32)}
  return {field: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
          for field, (shape, dtype) in shapes.items()}


def need(config: Any, field: str, ok: bool, mend: str) -> None:
  """Raises `UserError` with a field of `config.data`, its value and `mend` unless it is `ok`."""
  if not ok:
    value = config[field]
    written = ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
    raise UserError(f"--config.data.{field}={written}: {mend}")


def check_splits(dataset: sources.Dataset, config: Any) -> None:
  """Raises `UserError` where a split of `config.data` is missing, empty or overlaps another."""
  splits = {field: config[field] for field in ("train", "validation", "test") if config[field]}
  ranges = {field: dataset.ranges(split, field) for field, split in splits.items()}
  for one, other in itertools.combinations(splits, 2):
    if any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
           for a in ranges[one] for b in ranges[other]):
      raise UserError(f"--config.data.{other}={splits[other]!r} overlaps "
                      f"--config.data.{one}={splits[one]!r}; choose ranges without a common "
                      "example")


def find_files(paths: Sequence[str], mend: str, suffix: str = "") -> list[Path]:
  """The user's files: those that are named, and those in folders, which are searched to the
  bottom.

  Args:
    paths: files and folders.
    mend: what to name instead of a path that does not exist.
    suffix: the end of the files to take from a folder, in lower case; "" takes all.

  Returns:
    The files in the order of the paths, in a folder "2.png" before "10.png"; hidden ones are left
    out.

  Raises:
    UserError: a path does not exist.
  """
  found = []
  for path in map(Path, paths):
    if not path.exists():
      raise UserError(f"--input: there is no {path}; name {mend}")
    inside = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")
              and p.name.lower().endswith(suffix))
    found += sorted(inside, key=_natural) if path.is_dir() else [path]
  return found


def _natural(path: Path) -> list[str | int]:
  """What sorts the numbers in names as numbers."""
  return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def file_fingerprint(path: str | os.PathLike[str]) -> str:
  """The length and the SHA-256 of a file's bytes; `Data.fingerprint` of the user's own file."""
  content = Path(path).expanduser().read_bytes()
  return f"{len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}"
