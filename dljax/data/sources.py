"""Finds a prepared TFDS set on disk and reads its records, without TensorFlow or a network."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np

from dljax.data.datasets import EMBEDDED
from dljax.errors import MALFORMED, Preempted, RunError, UserError, one_line, unknown


_MOST_CLASSES = 10**6  # as many names are made where a set has none
_OPENING = threading.Lock()  # while parts of TFDS are replaced
_CONFIG = r"(?!\.+(?:[:/]|$))[\w.+-]+"  # a config's name, which is also a folder's, but not ".."


def data_dir() -> Path:
  """The folder of prepared sets: the variable TFDS_DATA_DIR, or ~/tensorflow_datasets."""
  return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def cache_dir() -> Path:
  """The folder of embedded sets if `data_dir()` is not writable."""
  return Path(os.environ.get("XDG_CACHE_HOME")
              or "~/.cache").expanduser() / "dljax" / "tensorflow_datasets"


def parse_name(name: str) -> tuple[str, str, str]:
  """The name, config and version in a TFDS name.

  It is ("mnist", "", "3.0.1") for "mnist:3.0.1", and ("digits", "by_writer", "") for
  "digits/by_writer".

  Raises:
    UserError: `name` is no TFDS name.
  """
  match = re.fullmatch(rf"(\w+)(?:/({_CONFIG}))?(?::(\d+\.\d+\.\d+))?", name, re.ASCII)
  if not match:
    raise UserError(
        f"--config.data.name: {name!r} is not a TFDS name such as mnist, digits/by_writer or "
        "mnist:3.0.1")
  return match[1], match[2] or "", match[3] or ""


def find(name: str, root: Path) -> Path | None:
  """The directory of the newest prepared version of a set under `root`; None if there is none.

  Raises:
    UserError: the set has several configs and `name` does not choose one.
  """
  name, config, version = parse_name(name)
  folder = root / name
  if not config and not _versions(folder, version) and folder.is_dir():
    default = folder / ".config" / "metadata.json"
    configs = sorted(path.name for path in folder.iterdir() if path.is_dir()
                     and _versions(path, version))
    if default.is_file():
      config = _default_config(default)
    elif configs:
      choices = " or ".join(f"{name}/{config}" for config in configs)
      raise UserError(f"--config.data.name: {name} has configs; choose {choices}")
  versions = _versions(folder / config, version)
  return folder / config / versions[-1] if versions else None


def _default_config(file: Path) -> str:
  """The name of the default config that TFDS noted in `file`."""
  try:
    config = json.loads(file.read_bytes())["default_config_name"]
    if not re.fullmatch(_CONFIG, config):
      raise ValueError(f"{config!r:.80} is no config's name")
    return config
  except (OSError, *MALFORMED) as e:
    raise UserError(f"{file} names no config ({one_line(e)}); remove it, or name the config in "
                    "--config.data.name") from e


def _versions(folder: Path, version: str) -> list[str]:
  found = [path.parent.name for path in folder.glob("*.*.*/features.json")]
  found = [v for v in found if re.fullmatch(r"\d+\.\d+\.\d+", v) and version in ("", v)]
  return sorted(found, key=lambda v: tuple(map(int, v.split("."))))


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared set.

  Attributes:
    name: the set's name as the user wrote it.
    builder: TFDS's builder, made from the files in the directory alone.
  """

  name: str
  builder: Any

  @property
  def features(self) -> Mapping[str, Any]:
    """Feature name -> TFDS's feature."""
    return dict(self.builder.info.features.items())

  @property
  def fingerprint(self) -> str:
    """The set's name, config and version, and the number of examples in each of its splits."""
    info = self.builder.info
    sizes = ", ".join(f"{name} {split.num_examples}"
                      for name, split in sorted(info.splits.items()))
    return f"{info.full_name}: {sizes}"

  def ranges(self, split: str, field: str) -> list[tuple[str, int, int]]:
    """The records that a split expression names, as (file, first record, end).

    Args:
      split: the expression, e.g. "train[:90%]".
      field: the config field that holds it, for the message.

    Raises:
      UserError: there is no such split, or no example in it.
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

  def example(self, split: str, number: int) -> str:
    """The name of an example, for messages."""
    del split
    return f"example {number} of {self.name}"

  def records(self, split: str) -> "Records":
    """Random access to the undecoded examples of a split.

    Raises:
      UserError: a file is missing, damaged, or in a format that only TensorFlow reads.
    """
    import tensorflow_datasets as tfds

    folder, method = self.builder.data_dir, tfds.core.decode.DeserializeMethod.RAW_BYTES
    try:
      source = self.builder.as_data_source(split, deserialize_method=method)
      files = self.builder.info.splits[split].file_instructions
      with concurrent.futures.ThreadPoolExecutor(min(len(files), 16)) as pool:
        list(pool.map(_check_file, files))
    except NotImplementedError as e:
      raise UserError(f"{folder} is in a format that only TensorFlow reads; prepare it elsewhere "
                      f"with `python -m dljax.data.prepare {self.name} --data_dir=...`") from e
    except Exception as e:  # TFDS, ArrayRecord and the file system each raise their own kinds
      raise _unreadable(folder, self.name, one_line(e)) from e
    return Records(source, lambda reason: _unreadable(folder, self.name, f"{split}: {reason}"))


def _check_file(file: Any) -> None:
  """Raises `ValueError` if a file does not hold as many records as dataset_info.json says."""
  from array_record.python import array_record_module

  path = Path(file.filename)
  if not path.is_file():
    raise ValueError(f"there is no {path.name}")
  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    count = reader.num_records()
  finally:
    reader.close()
  if count != file.examples_in_shard:
    raise ValueError(f"{path.name} holds {count} records, and dataset_info.json counts "
                     f"{file.examples_in_shard}")


def _unreadable(folder: str | os.PathLike[str], name: str, reason: str) -> UserError:
  return UserError(f"{os.fspath(folder)}: not a readable TFDS directory ({reason}); remove it and "
                   f"run `{_command(name)}`")


class Records:
  """The examples of a split as `tf.train.Example` fields: encoded images stay encoded.

  Args:
    source: TFDS's data source, which gives bytes.
    unreadable: makes the `UserError` for a reason.
  """

  def __init__(self, source: Any, unreadable: Callable[[str], UserError]):
    self._source, self._unreadable = source, unreadable

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
    """Field name -> list of values, for each of the examples `indices`.

    Raises:
      UserError: an example is damaged; the message says which.
    """
    indices = [int(i) for i in indices]
    try:
      records = self._source.__getitems__(indices)
    except Exception:  # one of many kinds; the first bad example is looked for below
      records = [self._read(i) for i in indices]
    return [self._parse(record, i) for record, i in zip(records, indices)]

  def _read(self, index: int) -> bytes:
    try:
      return self._source.__getitems__([index])[0]
    except Exception as e:
      raise self._unreadable(f"example {index} is damaged: {one_line(e)}") from e

  def _parse(self, record: bytes, index: int) -> Mapping[str, Any]:
    from google.protobuf import message
    from tensorflow_datasets.proto import tf_example_pb2

    def lacks(field: str) -> NoReturn:
      raise self._unreadable(f"example {index} has no field {field!r}")

    try:
      feature = tf_example_pb2.Example.FromString(record).features.feature
    except message.DecodeError as e:
      raise self._unreadable(f"example {index} is damaged: {one_line(e)}") from e
    return _Record(lacks, {key: getattr(value, value.WhichOneof("kind") or "bytes_list").value
                           for key, value in feature.items()})


class _Record(dict):
  """The fields of an example; one that it lacks is reported by `lacks`."""

  def __init__(self, lacks: Callable[[str], NoReturn], fields: Mapping[str, Any]):
    super().__init__(fields)
    self._lacks = lacks

  def __missing__(self, field: str) -> NoReturn:
    self._lacks(field)


class Subset:
  """Some of the examples of `Records`, with the same interface.

  Args:
    records: all of the examples.
    indices: i64[n], the positions of those to keep.
  """

  def __init__(self, records: Records, indices: np.ndarray):
    self._records, self._indices = records, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
    return self._records[self._indices[np.asarray(indices)]]


def open_dataset(name: str) -> Dataset:
  """Opens a prepared set. An embedded set is prepared first, which takes seconds; nothing is
  downloaded.

  Args:
    name: a TFDS name, possibly with config and version ("digits/by_writer", "mnist:3.0.1").

  Raises:
    UserError: the set is not prepared; the message says what to run.
  """
  root, base = data_dir(), parse_name(name)[0]
  embedded = base in EMBEDDED
  for place in (root, cache_dir()) if embedded else (root,):
    if path := find(name, place):
      break
  else:
    if not embedded:
      raise UserError(f"--config.data.name: {name} is not prepared in {root}; run "
                      f"`{_command(name)}`, or name the directory that holds it by --data_dir")
    path = prepare_embedded(name, root)
  import tensorflow_datasets as tfds

  try:
    with _OPENING, _audio_undecoded(), _features_of_tfds_alone():
      dataset = Dataset(name, tfds.builder_from_directory(path))
    _check(dataset, path)
    return dataset
  except Exception as e:  # protobuf, JSON, TFDS and the file system each raise their own kinds
    raise _unreadable(path, name, one_line(e)) from e


def _check(dataset: Dataset, folder: Path) -> None:
  """Raises `ValueError` if the metadata lead out of the folder, or would fill the memory."""
  for split in dataset.builder.info.splits.values():
    if min(split.shard_lengths, default=1) < 1:
      raise ValueError(f"dataset_info.json counts no records in a file of {split.name}")
    for file in split.file_instructions:
      if not Path(os.path.normpath(file.filename)).is_relative_to(os.path.normpath(folder)):
        raise ValueError(f"dataset_info.json names a file elsewhere: {file.filename!r:.80}")
  if (classes := max(map(_classes, dataset.features.values()), default=0)) > _MOST_CLASSES:
    raise ValueError(f"features.json has a feature with {classes:,} classes")


def _classes(feature: Any) -> int:
  """The largest number of classes in a feature, which may be a sequence or a dictionary."""
  feature = getattr(feature, "feature", feature)
  if hasattr(feature, "items"):
    return max((_classes(part) for _, part in feature.items()), default=0)
  return getattr(feature, "num_classes", None) or 0


@contextlib.contextmanager
def _features_of_tfds_alone() -> Iterator[None]:
  """Lets features.json name TFDS's own feature classes alone.

  TFDS imports the module of any class that the file names, and so runs what whoever wrote the
  file has written.
  """
  from tensorflow_datasets.core import features
  from tensorflow_datasets.core.features import feature

  own = f"{features.__name__}."
  known = {name: kind for name, kind in feature.FeatureConnector._registered_features.items()
           if name.startswith(own) and kind.__module__.startswith(own)}

  def look_up(name: Any) -> Any:
    if not isinstance(name, str) or name not in known:
      raise ValueError(f"features.json names what is no feature of TFDS: {name!r:.80}")
    return known[name]

  with mock.patch.object(feature.FeatureConnector, "cls_from_name", look_up):
    yield


@contextlib.contextmanager
def _audio_undecoded() -> Iterator[None]:
  """Lets TFDS open sets that hold sound, without TensorFlow.

  TFDS needs TensorFlow only to decode the sound, and records are not decoded here.
  """
  from tensorflow_datasets.core.features import audio_feature

  with mock.patch.object(audio_feature._AudioDecoder, "__init__", lambda self, **_: None):
    yield


def _command(name: str) -> str:
  return f"python -m dljax.data.prepare {name} --data_dir={data_dir()}"


def prepare_embedded(name: str, root: Path) -> Path:
  """Prepares a set that needs no download under `root`, or in the cache if `root` is not writable.

  Args:
    name: a name in `EMBEDDED`, possibly with config and version, e.g. "digits/by_writer".
    root: the data directory.

  Returns:
    The set's directory.

  Raises:
    UserError: there is no such config or version, or no folder that can be written.
  """
  base, config, _ = parse_name(name)
  builder = EMBEDDED[base]()
  configs = list(builder.builder_configs)
  if config and config not in configs:
    raise unknown("--config.data.name", name, [f"{base}/{c}" for c in configs] or [base])
  place = next(filter(writable, (root, cache_dir())), None)
  if place is None:
    raise UserError(f"--data_dir: {name} has to be written once before it is read, and neither "
                    f"{root} nor {cache_dir()} can be written; name a folder that can be, by "
                    "--data_dir or the variable TFDS_DATA_DIR")
  # TFDS prints progress bars.
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    build(functools.partial(builder, config=config or configs[0]) if configs else builder, place)
  path = find(name, place)
  if path is None:
    raise UserError(f"--config.data.name: there is no {name}; the version is {builder.VERSION}")
  return path


def build(builder: Callable[..., Any], place: Path) -> None:
  """Prepares a set in the format ArrayRecord.

  TFDS renames the finished directory, so several processes may prepare the same set at the same
  time: the first one wins, and the others wait for it where the file system has locks.

  Args:
    builder: makes the builder; called with `data_dir`.
    place: the data directory.

  Raises:
    RunError: the disk is full, or the like.
  """
  builder = builder(data_dir=str(place))
  path = Path(builder.data_path)
  try:
    with _alone_in(path.parent):
      builder.download_and_prepare(file_format="array_record")
  except (RunError, Preempted):
    raise
  except (OSError, RuntimeError) as error:  # ArrayRecord raises the latter
    if not (path / "features.json").exists():  # otherwise another process was faster
      reason = getattr(error, "strerror", None) or one_line(error)
      raise RunError(f"{path} was not written: {reason}") from error


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
  """Waits until no other process prepares a set in a folder, and removes what such ones left."""
  folder.mkdir(parents=True, exist_ok=True)
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # there are file systems without locks
      fcntl.flock(descriptor, fcntl.LOCK_EX)
      for rest in folder.glob("incomplete.*"):
        shutil.rmtree(rest, ignore_errors=True)
    yield
  finally:
    os.close(descriptor)


def writable(folder: Path) -> bool:
  """Whether files can be made in `folder` or, if it does not exist, in the nearest folder above
  it.

  It tries to make a file, and removes it.
  """
  while not os.path.lexists(folder):
    folder = folder.parent
  try:
    probe = folder / f".writable-{os.getpid()}"
    probe.touch()
    probe.unlink()
    return True
  except OSError:
    return False
