"""Finding a prepared TFDS set on disk and reading its records, without TensorFlow and without a network."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dljax.data.datasets import EMBEDDED
from dljax.errors import UserError, unknown


def data_dir() -> Path:
  """Where prepared sets live: the environment's TFDS_DATA_DIR, or ~/tensorflow_datasets."""
  return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def cache_dir() -> Path:
  """Where embedded sets live if `data_dir()` is not writable."""
  return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dljax" / "tensorflow_datasets"


def parse_name(name: str) -> tuple[str, str, str]:
  """("mnist", "", "3.0.1") for "mnist:3.0.1", ("digits", "by_writer", "") for "digits/by_writer"."""
  match = re.fullmatch(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?", name)
  if not match:
    raise UserError(
        f"--config.data.name: {name!r} is not a TFDS name such as mnist, digits/by_writer or mnist:3.0.1")
  return match[1], match[2] or "", match[3] or ""


def find(name: str, root: Path) -> Path | None:
  """The directory under `root` that holds the newest prepared version of a set, if there is one.

  Raises:
    UserError: the set has several configs and `name` chooses none.
  """
  name, config, version = parse_name(name)
  folder = root / name
  prepared = lambda path: _versions(path, version)
  if not config and not prepared(folder) and folder.is_dir():
    default = folder / ".config" / "metadata.json"
    configs = sorted(path.name for path in folder.iterdir() if path.is_dir() and prepared(path))
    if default.is_file():
      config = json.loads(default.read_text())["default_config_name"]
    elif configs:
      choices = " or ".join(f"{name}/{config}" for config in configs)
      raise UserError(f"--config.data.name: {name} has configs; choose {choices}")
  versions = prepared(folder / config)
  return folder / config / versions[-1] if versions else None


def _versions(folder: Path, version: str) -> list[str]:
  found = [path.parent.name for path in folder.glob("*.*.*/features.json")]
  found = [v for v in found if re.fullmatch(r"\d+\.\d+\.\d+", v) and version in ("", v)]
  return sorted(found, key=lambda v: tuple(map(int, v.split("."))))


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared set.

  Attributes:
    name: as the user wrote it.
    builder: TFDS's builder, read from the directory alone.
  """

  name: str
  builder: Any

  @property
  def features(self) -> Mapping[str, Any]:
    """Feature name -> TFDS feature."""
    return dict(self.builder.info.features.items())

  @property
  def fingerprint(self) -> str:
    """The set's name, config and version, and how many examples each of its splits has."""
    info = self.builder.info
    sizes = ", ".join(f"{name} {split.num_examples}" for name, split in sorted(info.splits.items()))
    return f"{info.full_name}: {sizes}"

  def ranges(self, split: str, field: str) -> list[tuple[str, int, int]]:
    """What a split expression names: (file, first record, end).

    Args:
      split: e.g. "train[:90%]".
      field: the config field it came from, for the message.

    Raises:
      UserError: no such split, or no example in it.
    """
    known = list(self.builder.info.splits)
    for part in split.split("+"):
      if (part_name := part.strip().partition("[")[0]) not in known:
        raise unknown(f"--config.data.{field}", part_name, known)
    try:
      files = self.builder.info.splits[split].file_instructions
    except (ValueError, AssertionError) as e:
      raise UserError(f"--config.data.{field}: {split!r} is not a TFDS split expression; "
                      "write e.g. train[:90%]") from e
    if not sum(f.take for f in files):
      raise UserError(f"--config.data.{field}: {split!r} of {self.name} holds no example; "
                      "choose a wider range")
    return [(f.filename, f.skip, f.skip + f.take) for f in files]

  def records(self, split: str) -> "Records":
    """Random access to the undecoded examples of a split."""
    import tensorflow_datasets as tfds

    try:
      source = self.builder.as_data_source(
          split, deserialize_method=tfds.core.decode.DeserializeMethod.RAW_BYTES)
    except NotImplementedError as e:
      raise UserError(f"{self.builder.data_dir}: prepared in a format that only TensorFlow reads; prepare it "
                      f"elsewhere with `python -m dljax.data.prepare {self.name} --data_dir=...`") from e
    return Records(source)


class Records:
  """The examples of a split as `tf.train.Example` fields: encoded images stay encoded."""

  def __init__(self, source: Any):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
    """Field name -> value list, for each of `indices`."""
    return [_parse(record) for record in self._source.__getitems__([int(i) for i in indices])]


class Subset:
  """Some of the examples of `Records`, and like them.

  Args:
    records: the whole.
    indices: i64[n], their positions in it.
  """

  def __init__(self, records: Records, indices: np.ndarray):
    self._records, self._indices = records, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
    return self._records[self._indices[np.asarray(indices)]]


def _parse(record: bytes) -> Mapping[str, Any]:
  from tensorflow_datasets.proto import tf_example_pb2

  feature = tf_example_pb2.Example.FromString(record).features.feature
  kind = lambda value: value.WhichOneof("kind") or "bytes_list"
  return {key: getattr(value, kind(value)).value for key, value in feature.items()}


def open_dataset(name: str) -> Dataset:
  """Opens a prepared set; prepares an embedded one first, which takes seconds.

  Args:
    name: a TFDS name, possibly with config and version ("digits/by_writer", "mnist:3.0.1").

  Raises:
    UserError: the set is not prepared; the line says what to run. Never reaches for a network.
  """
  root, base = data_dir(), parse_name(name)[0]
  embedded = base in EMBEDDED
  for place in (root, cache_dir()) if embedded else (root,):
    if path := find(name, place):
      break
  else:
    if not embedded:
      raise UserError(f"--config.data.name: {name} is not prepared in {root}; run `{_command(name)}`, or "
                      "name the directory that holds it by --data_dir")
    path = prepare_embedded(name, root)
  import tensorflow_datasets as tfds

  try:
    with _audio_undecoded():
      return Dataset(name, tfds.builder_from_directory(path))
  except Exception as e:  # protobuf, JSON, TFDS and the file system each raise their own
    reason = " ".join(str(e).split())[:100]
    raise UserError(f"{path}: not a readable TFDS directory ({reason}); remove it and run "
                    f"`{_command(name)}`") from e


@contextlib.contextmanager
def _audio_undecoded() -> Iterator[None]:
  """Lets TFDS open sets with sound: only what decodes it needs TensorFlow, and records are not decoded here."""
  from tensorflow_datasets.core.features import audio_feature

  with mock.patch.object(audio_feature._AudioDecoder, "__init__", lambda self, **_: None):
    yield


def _command(name: str) -> str:
  return f"python -m dljax.data.prepare {name} --data_dir={data_dir()}"


def prepare_embedded(name: str, root: Path) -> Path:
  """Prepares a set that needs no download under `root`, or in the cache if `root` is not writable.

  Args:
    name: of `EMBEDDED`, possibly with config and version, e.g. "digits/by_writer".
    root: the data directory.

  Returns:
    The set's directory.

  Raises:
    UserError: there is no such config or version, or nowhere to write.
  """
  base, config, _ = parse_name(name)
  builder = EMBEDDED[base]()
  configs = list(builder.builder_configs)
  if config and config not in configs:
    raise unknown("--config.data.name", name, [f"{base}/{c}" for c in configs] or [base])
  place = next(filter(writable, (root, cache_dir())), None)
  if place is None:
    raise UserError(f"--data_dir: {name} is written once before it is read, and neither {root} nor {cache_dir()} can "
                    "be written; name a folder that can, by --data_dir or the variable TFDS_DATA_DIR")
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # TFDS's bars
    build(functools.partial(builder, config=config or configs[0]) if configs else builder, place)
  path = find(name, place)
  if path is None:
    raise UserError(f"--config.data.name: there is no {name}; the version is {builder.VERSION}")
  return path


def build(builder: Callable[..., Any], place: Path) -> None:
  """Runs `download_and_prepare` as ArrayRecord.

  The directory appears at once, by a rename, so that several processes may do this at the same time: the
  first wins.

  Args:
    builder: called with `data_dir`.
    place: the data directory.
  """
  builder = builder(data_dir=str(place))
  try:
    builder.download_and_prepare(file_format="array_record")
  except OSError:
    if not (builder.data_path / "features.json").exists():  # otherwise another process was faster
      raise


def writable(folder: Path) -> bool:
  """Whether files can be made in `folder`, or in the nearest folder above it that exists; leaves nothing there."""
  while not os.path.lexists(folder):
    folder = folder.parent
  try:
    probe = folder / f".writable-{os.getpid()}"
    probe.touch()
    probe.unlink()
    return True
  except OSError:
    return False
