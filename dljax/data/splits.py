"""What every modality gives to the engine: the pipelines of a data set's splits, and what was
fitted to them.

The module of a modality has `default_config()`, `validate(config)`, a subclass of `DataSet` that
makes pipelines from a config, and `encode`, which reads the user's own inputs as an evaluation
reads a split. This module holds what the modalities share.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import ml_collections
import numpy as np

from dljax.config import Field
from dljax.data import sources
from dljax.data.pipeline import Pipeline
from dljax.errors import UserError

T = TypeVar("T")
Shapes = Mapping[str, tuple[Sequence[int], Any]]  # field -> shape of one row, dtype


NAME = "The name of a TFDS set, possibly with config and version."


def fields(train: str, validation: str, test: str) -> dict[str, Field]:
  """The fields of `config.data` that name a TFDS set's splits, with these defaults."""
  what = "as an expression of TFDS such as train[:90%]"
  return {
      "train": Field(train, f"The examples to train on, {what}; the splits must not overlap."),
      "validation": Field(validation, f'The examples of the validation, {what}; "" is none.'),
      "test": Field(test, f'The examples of the test, {what}; "" is none.')}


def _nothing() -> Mapping[str, Any]:
  return {}


def _nothing_to_restore(assets: Mapping[str, Any]) -> None:
  del assets


@dataclasses.dataclass(frozen=True)
class Data:
  """A data set of any modality, as the engine sees it. Making one opens no data.

  Attributes:
    name: the set's name, or the path of the user's own data.
    train: the pipeline of training batches: shuffled, augmented, endless.
    evals: split name -> the pipeline of one pass over that split: "validation", then "test", as
      far as the config names them.
    batch_spec: field -> its shape and dtype in a global training batch, known without data. If
      batches have several shapes, it is the largest.
    fingerprint: () -> a text that differs for other data of the same name. It opens the data if
      need be. A run saves it and is not continued on other data.
    assets: () -> what was fitted to the data (class names, a tokenizer) by file stem; each can be
      written as JSON. It is called once the data is open, and saved in `workdir/data/`.
    restore: is called with the assets that a run has saved, before the data is opened to continue
      that run.
    context: () -> host arrays for the task's context (token ids of class prompts, a judge's
      variables).
    corruptions: name -> strength, from 1 -> one pass over the split "test", disturbed in that way;
      what `config.eval.corruptions` asks for. A final evaluation measures each and gives the table
      and the figure "corruptions".
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
  """What the pipelines of one config share: the data set, opened and checked against the config
  once, by any thread.

  A subclass defines `pipeline` and `shapes`. It extends `open` if users can bring their own data
  (see `data/own.py`), `check` if the set must hold more than its splits, and `fields` if its `Data`
  has more than what all sets have.

  Args:
    config: `config.data`; later changes to it have no effect.
  """

  def __init__(self, config: Any):
    self.config = ml_collections.FrozenConfigDict(config)
    self.lock = threading.RLock()
    self._dataset: Any = None
    self._fingerprints: dict[str, str] = {}  # of the user's own files

  @property
  def dataset(self) -> Any:
    """The opened set, as `open` gives it; raises `UserError` if it is missing or does not fit the config."""
    with self.lock:
      if self._dataset is None:
        dataset = self.open()
        self.check(dataset)
        self._dataset = dataset
      return self._dataset

  def open(self) -> Any:
    """Opens the set: a prepared TFDS set, or the user's own data, an `own.Dataset`."""
    return sources.open_dataset(self.config.name)

  def check(self, dataset: Any) -> None:
    """Raises `UserError` if a set does not fit the config."""
    check_splits(dataset, self.config)

  def fingerprint_of(self, path: str) -> str:
    """The `file_fingerprint` of the user's own file, the same at every call.

    Raises:
      UserError: the file has changed since the first call.
    """
    return self.same_fingerprint(path, file_fingerprint(path))

  def same_fingerprint(self, path: str, found: str) -> str:
    """Returns the fingerprint `found` of the user's own data in `path`.

    Raises:
      UserError: another was found before.
    """
    with self.lock:
      if self._fingerprints.setdefault(path, found) != found:
        raise UserError(f"{path} was changed while the run read it; run again once nothing writes to it")
    return found

  def read_own(self, path: str, read: Callable[[], T]) -> T:
    """What `read` gives, which reads the user's own file; raises as `fingerprint_of` does.

    So what is trained on is what the fingerprint says, though a run reads a file several times.
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # `read` says it better
      self.fingerprint_of(path)
    value = read()
    self.fingerprint_of(path)
    return value

  def pipeline(self, split: str, **options: Any) -> Pipeline:
    """The pipeline of a split; opens nothing.

    Args:
      split: "train", "validation" or "test".
      **options: batch_size, seed and train, as `IndexedPipeline` takes them.
    """
    raise NotImplementedError

  def shapes(self) -> Shapes:
    """The fields of a training batch besides mask and id."""
    raise NotImplementedError

  def fields(self) -> Mapping[str, Any]:
    """More fields of `Data`, such as `assets`; they replace what `pipelines` would give."""
    return {}

  def pipelines(
      self, *, batch_size: int, eval_batch_size: int, seed: int) -> Data:
    """The pipelines of all splits; opens nothing. Training is endless, an evaluation is one pass.

    Args:
      batch_size: the number of rows of a global training batch.
      eval_batch_size: the number of rows of a global evaluation batch.
      seed: the run's seed, which decides order and augmentation in training.

    Raises:
      UserError: a value is out of range. Later, when a pipeline is opened: the data is missing or
        does not fit the config.
    """
    for field, size in ("batch_size", batch_size), ("eval_batch_size", eval_batch_size):
      if size < 1:
        raise UserError(f"--config.{field}={size}: give a positive number")

    def make(split: str, size: int) -> Pipeline:
      train = split == "train"
      return self.pipeline(split, batch_size=size, seed=seed if train else 0, train=train)

    fields = {
        "name": self.config.name,
        "train": make("train", batch_size),
        "evals": {split: make(split, eval_batch_size) for split in ("validation", "test")
                  if self.config[split]},
        "batch_spec": batch_spec(batch_size, self.shapes()),
        "fingerprint": lambda: self.dataset.fingerprint,
    }
    return Data(**{**fields, **self.fields()})


def batch_spec(batch_size: int, shapes: Shapes) -> Mapping[str, jax.ShapeDtypeStruct]:
  """`Data.batch_spec` for batches that have the fields in `shapes`, mask and id."""
  shapes = {**shapes, "mask": ((), np.float32), "id": ((), np.int32)}
  return {field: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
          for field, (shape, dtype) in shapes.items()}


def need(config: Any, field: str, ok: bool, mend: str) -> None:
  """Raises `UserError` unless `ok`, with a field of `config.data`, its value and `mend`."""
  if not ok:
    value = config[field]
    written = ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
    raise UserError(f"--config.data.{field}={written}: {mend}")


def check_splits(dataset: Any, config: Any) -> None:
  """Raises `UserError` if a split of `config.data` is missing, is empty or overlaps another."""
  splits = {field: config[field] for field in ("train", "validation", "test") if config[field]}
  ranges = {field: dataset.ranges(split, field) for field, split in splits.items()}
  for one, other in itertools.combinations(splits, 2):
    if any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
           for a in ranges[one] for b in ranges[other]):
      raise UserError(f"--config.data.{other}={splits[other]!r} overlaps "
                      f"--config.data.{one}={splits[one]!r}; choose ranges without a common "
                      "example")


def find_files(paths: Sequence[str], mend: str, suffix: str = "") -> list[Path]:
  """The user's files: those that are named, and those in folders and their subfolders.

  Args:
    paths: the paths of files and folders.
    mend: what the user can name instead of a path that does not exist, for the message.
    suffix: the end of the names, in lower case, of the files to take from a folder; "" takes all.

  Returns:
    The files in the order of the paths. In a folder "2.png" comes before "10.png", and hidden
    files are left out.

  Raises:
    UserError: a path does not exist.
  """
  found = []
  for path in map(Path, paths):
    if not path.exists():
      raise UserError(f"--input: there is no {path}; name {mend}")
    inside = (p for p in walk(path, "--input") if p.name.lower().endswith(suffix))
    found += sorted(inside, key=natural) if path.is_dir() else [path]
  return found


def walk(folder: Path, start: str) -> Iterator[Path]:
  """Yields the files of a folder and its subfolders; it follows links, and leaves hidden ones out.

  A link that leads nowhere counts as a file, so that the function that reads it names it.

  Args:
    folder: the folder.
    start: the flag that named it, and perhaps its value, for the message.

  Raises:
    UserError: a folder cannot be read.
  """
  seen = set()

  def refuse(error: OSError) -> None:
    name = os.fsencode(error.filename).decode(errors="backslashreplace")
    raise UserError(f"{start}: {name} cannot be read ({error.strerror}); mend its permissions")

  for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
    here = os.stat(place)
    if (here.st_dev, here.st_ino) in seen:  # a link to a folder above it would never end
      folders.clear()
      continue
    seen.add((here.st_dev, here.st_ino))
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    for name in names:
      path = Path(place, name)
      if not name.startswith(".") and (path.is_file() or not path.exists()):
        yield path


def natural(path: str | os.PathLike[str]) -> tuple[list[str | int], str]:
  """A key by which the numbers in names sort as numbers, "2.png" before "10.png"."""
  text = str(path)
  parts = [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]
  return parts, text  # of "1" and "01" the parts are equal


def file_fingerprint(path: str | os.PathLike[str]) -> str:
  """The length and the SHA-256 of a file's bytes: the fingerprint of the user's own file."""
  path = Path(path).expanduser()
  if not path.is_file():  # a device may never end
    raise OSError(f"{path} is no file")
  with open(path, "rb") as content:
    digest = hashlib.file_digest(content, "sha256")
    return f"{content.tell()} bytes, SHA-256 {digest.hexdigest()}"
