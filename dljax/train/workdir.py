"""The folder of a run: who may write in it, what ran there, and where each thing lies."""

import csv
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from dljax import report
from dljax.config import decides_training, flatten
from dljax.errors import RunError, UserError, check_local, writing
from dljax.tasks.base import Findings
from dljax.train import durable, redact
from dljax.train.state import FORMAT, check_format

# The fields that decide the training and that may yet differ when a run continues.
_MAY_CHANGE = ("total_steps", "log_every", "eval_every", "checkpoint_every", "full_eval_every",
               "shard_above")
# A disk that fails, as opposed to a folder in which nobody may write.
_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_PACKAGES = ("dljax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy",
             "tensorflow-datasets")


def write_json(path: Path, value: Any) -> None:
  """Writes JSON so that a crash leaves the old file or the new one; `RunError` if it fails."""
  with writing(path):
    durable.write(path, _json(value))


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2) + "\n").encode()


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
  """Writes a JSON object as `write_json` does, with a hash that `read_sealed` verifies."""
  with writing(path):
    durable.write(path, durable.sealed(value, indent=2))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows that have the same keys; the first line holds the keys.

  Dicts and lists become JSON.

  A crash leaves the old file or the new one; raises `OSError` if it cannot be written.
  """
  text = io.StringIO(newline="")
  writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [])
  writer.writeheader()
  writer.writerows({k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()}
                   for row in rows)
  durable.write(path, text.getvalue().encode(errors="backslashreplace"))


def decisive(config: Mapping[str, Any] | ml_collections.ConfigDict) -> dict[str, Any]:
  """The fields in which two configs of one run have to agree, as JSON has them.

  They decide the training. A run may continue with another length, other intervals and another
  limit for splitting arrays; mesh, parallelism and data directory are no fields at all.
  """
  fields = {name: value for name, value in flatten(config).items()
            if decides_training(name) and name not in _MAY_CHANGE}
  return json.loads(json.dumps(fields))  # where a tuple is a list


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
  """Names the fields in which two results of `decisive` differ; "" if they agree."""
  return "; ".join(f"{name} is {old.get(name, 'not set')!r} there and "
                   f"{new.get(name, 'not set')!r} here" for name in sorted(old.keys() | new.keys())
                   if name not in old or name not in new or old[name] != new[name])


def read_json(path: Path, **fields: type) -> Any:
  """Reads JSON: an object with `fields` of these types, or any value if no fields are given.

  Raises:
    UserError: the file holds something else.
  """
  mend = "restore it from a copy, or start again in another --workdir"
  try:
    value = json.loads(path.read_text("utf-8"))
  except (ValueError, RecursionError):  # also of a number with thousands of digits
    raise UserError(f"{path} is not JSON; {mend}") from None
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}); {mend}") from None
  for name, kind in fields.items():
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):  # True is an int in Python
      raise UserError(f"{path} is not what dljax writes there ({name!r} is missing or wrong); {mend}")
  return value


def read_sealed(path: Path, **fields: type) -> dict[str, Any]:
  """Reads what `write_sealed` wrote; see `read_json` for `fields`.

  Raises:
    UserError: the file holds something else, or was changed since. Whoever changed it on purpose
      sets its "sha256" to "".
  """
  value = read_json(path, **fields)
  if value.get("sha256") != "":
    if path.read_bytes() != durable.sealed(value, indent=2):
      raise UserError(f"{path} was damaged or edited since it was written; restore it from a copy, or, "
                      'if you edited it, write "sha256": "" in its last line')
  return value


class Workdir:
  """A run's folder.

  Attributes:
    path: the folder.
    checkpoints, data, figures, tables: the folders in it.
    config_file, model_file, metrics_file, result_file: the files in it.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Touches nothing on disk; raises a `UserError` if the path is an address (gs://...)."""
    check_local("--workdir", path)
    self.path = Path(path)
    self.checkpoints = self.path / "checkpoints"
    self.data = self.path / "data"
    self.figures = self.path / "figures"
    self.tables = self.path / "tables"
    self.config_file = self.path / "config.json"
    self.model_file = self.path / "model.json"
    self.metrics_file = self.path / "metrics.jsonl"
    self.result_file = self.path / "result.json"
    self._lock = None

  @functools.cached_property
  def run(self) -> str:
    """The id of the run here, which its checkpoints carry; a new one if config.json has none."""
    stored = read_sealed(self.config_file, config=dict) if self.config_file.exists() else {}
    return stored.get("run") or uuid.uuid4().hex

  @property
  def moved(self) -> bool:
    """Whether the locked folder is no longer what the path leads to."""
    if self._lock is None:
      return False
    try:
      there, locked = (self.path / ".lock").stat(), os.fstat(self._lock.fileno())
    except OSError:
      return True
    return (there.st_dev, there.st_ino) != (locked.st_dev, locked.st_ino)

  def check_place(self, any_host: Callable[[bool], bool]) -> None:
    """Ends the run on all hosts if its folder is no longer in its place.

    Args:
      any_host: whether something is true on any host.

    Raises:
      RunError: the folder was moved, deleted or replaced.
    """
    if any_host(self.moved):
      raise RunError(f"--workdir={self.path} was moved, deleted or replaced while the run trained; "
                     "the command with its new place as --workdir continues from its last "
                     "checkpoint")

  def check(self, config: ml_collections.ConfigDict, resume: str) -> None:
    """Raises a UserError unless a run of `config` may start or continue here. Writes nothing."""
    where = f"--workdir={self.path}"
    if self.path.exists() and not self.path.is_dir():
      raise UserError(f"{where} is a file; name a folder")
    parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
      raise UserError(f"{where} is not writable; name a folder that you may write to")
    for name, value in flatten(config).items():
      if redact.holds_secret(str(value)):
        raise UserError(f"--config.{name}={redact.hide(str(value))} holds a password or a token, which "
                        f"{self.config_file.name} would keep; download what it names, and give its path")
    if not self.config_file.exists():
      if self._has_checkpoints():
        raise UserError(f"{where} holds checkpoints but no {self.config_file.name}, which says what "
                        "they are of; restore it from a copy, or name another --workdir")
      if resume == "must":
        raise UserError(f"--resume=must: {where} holds no run; drop the flag to start one")
      return
    if resume == "never":
      raise UserError(f"--resume=never: {where} holds a run; name another --workdir, or delete it to start again")
    self._check_same(self._read_config(), config)

  def _has_checkpoints(self) -> bool:
    folders = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
    return any(path.name.isdecimal() for path in folders)

  def _check_same(self, old: Mapping[str, Any], config: ml_collections.ConfigDict) -> None:
    differ = differences(decisive(old), decisive(config))
    if differ:
      raise UserError(f"--workdir={self.path} holds a run with a different config: {differ}; name "
                      "another --workdir, or delete it to start again")

  def check_data(self, name: str, fingerprint: str) -> None:
    """Raises a UserError if the run here was started on other data. Writes nothing.

    Args:
      name: the name of the data, for the message.
      fingerprint: the `Data.fingerprint` of the opened data.
    """
    if not self.config_file.exists():
      return
    old = read_sealed(self.config_file, fingerprint=str)["fingerprint"]
    if old != fingerprint:
      raise UserError(
          f"--workdir={self.path} holds a run on other data: the fingerprint of {name} is {old!r} "
          f"there and {fingerprint!r} here; restore the old data, or name another --workdir")

  def acquire(self, check: Callable[[], None] = lambda: None) -> None:
    """Makes the folder and locks it until this process ends, however it ends.

    Args:
      check: called under the lock: while this process came to it, another may have begun a run
        here, or finished one. If it raises an error, the lock is released.

    Raises:
      UserError: the folder is in use, or cannot be written or locked.
      RunError: the disk failed.
    """
    try:
      durable.make_folder(self.path)
      self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
      if error.errno in _FAILURES:
        raise RunError(f"{self.path} was not written: {error.strerror}") from error
      raise UserError(f"--workdir={self.path} is not writable ({error.strerror}); name a folder that you may "
                      "write to") from None
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._lock.seek(0)
      pid = self._lock.read().strip() or "unknown"
      self._lock.close()
      raise UserError(f"--workdir={self.path} is in use by process {pid}; wait for it, stop it, or name another "
                      "--workdir") from None
    except OSError as error:  # as of a network drive without locks
      self._lock.close()
      raise UserError(f"--workdir={self.path} cannot be locked ({error.strerror}); name a folder on "
                      "another disk") from None
    with writing(self.path / ".lock"):
      self._lock.truncate(0)
      self._lock.write(str(os.getpid()))
      self._lock.flush()
    try:
      check()
    except UserError:
      self.release()
      raise

  def release(self) -> None:
    """Releases the lock."""
    if self._lock:
      self._lock.close()
      self._lock = None

  def start(
      self, config: ml_collections.ConfigDict, assets: Mapping[str, Any], fingerprint: str,
      model: Mapping[str, Any] | None = None,
  ) -> None:
    """Records the start of a run: config.json, model.json, and what was fitted to the data.

    Args:
      config: the run's config.
      assets: what was fitted to the data, by file stem.
      fingerprint: the `Data.fingerprint` of that data.
      model: the description of the run's model by `interop.variants.describe`, or None.
    """
    run, contents = self.run, {stem: _json(value) for stem, value in assets.items()}
    with writing(self.result_file):
      self.result_file.unlink(missing_ok=True)
    write_sealed(self.config_file, {
        "format": FORMAT,
        "run": run,
        "fingerprint": fingerprint,
        "config": config.to_dict(),
        "command": redact.hide_in_command(sys.argv),
        "git_commit": _git_commit(),
        "model_sha256": None if model is None else _sha256(_json(model)),
        "assets_sha256": {stem: _sha256(content) for stem, content in contents.items()},
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
    })
    if model is not None:
      write_json(self.model_file, model)
    with writing(self.data):
      durable.make_folder(self.data)
    for stem, content in contents.items():
      with writing(self.data / f"{stem}.json"):
        durable.write(self.data / f"{stem}.json", content)

  def read_config(self) -> ml_collections.ConfigDict:
    """The config that ran here.

    Raises:
      UserError: the folder holds no run.
    """
    if not self.config_file.exists():
      raise UserError(f"--workdir={self.path} holds no run; name the folder of one, or train first")
    try:
      return ml_collections.ConfigDict(_with_tuples(self._read_config()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a name that none can have
      if isinstance(error, UserError):
        raise
      raise UserError(f"{self.config_file} has a field that no config has ({error}); restore it "
                      "from a copy, or train again in another --workdir") from None

  def total_steps(self) -> Any:
    """The number of steps in config.json, or None."""
    return self._read_config().get("total_steps") if self.config_file.exists() else None

  def _read_config(self) -> dict[str, Any]:
    """The config in config.json, as JSON has it; `UserError` if the run has another format."""
    check_format(read_json(self.config_file, config=dict), self.config_file)
    return read_sealed(self.config_file)["config"]

  def read_model(self) -> dict[str, Any] | None:
    """The description of the run's model in model.json, or None; see `start`.

    Raises:
      UserError: the file was damaged or edited, or belongs to another run.
    """
    if not self.model_file.exists():
      return None
    model = read_json(self.model_file, model=str, settings=dict)
    wanted = read_sealed(self.config_file).get("model_sha256")
    if wanted and _sha256(self.model_file.read_bytes()) != wanted:
      raise UserError(f"{self.model_file} was damaged or edited since it was written; restore it from "
                      "a copy, or name the model by --model and --set, and remove it")
    return model

  def write_findings(self, findings: Findings, title: str = "") -> None:
    """Writes figures/*.png, under a title, and tables/*.csv durably; `RunError` where that fails."""
    with writing(self.figures):
      self.figures.mkdir(exist_ok=True)  # in a workdir that was moved, this fails
      for stem, draw in findings.figures.items():
        report.save(draw(), self.figures / f"{stem}.png", title)
        durable.sync(self.figures / f"{stem}.png")
      durable.sync(self.figures)
    with writing(self.tables):
      self.tables.mkdir(exist_ok=True)
      for stem, rows in findings.tables.items():
        write_csv(self.tables / f"{stem}.csv", rows)

  def read_assets(self) -> dict[str, Any]:
    """What was fitted to the data, by file stem.

    Raises:
      UserError: a file was damaged or edited since.
    """
    stored = read_sealed(self.config_file) if self.config_file.exists() else {}
    wanted, assets = stored.get("assets_sha256"), {}
    for path in sorted(self.data.glob("*.json")):
      assets[path.stem] = read_json(path)
      digest = wanted.get(path.stem) if isinstance(wanted, dict) else None
      if digest and _sha256(path.read_bytes()) != digest:
        raise UserError(f"{path} was damaged or edited since it was written; restore it from a copy, or "
                        "train again in another --workdir")
    return assets

  def result(self) -> dict[str, Any] | None:
    """The result of a finished run, or None.

    Raises:
      UserError: result.json was damaged or edited, or belongs to another run.
    """
    if not self.result_file.exists():
      return None
    result = read_sealed(self.result_file, family=str, preset=str, steps=int, total_steps=int,
                         metrics=dict, checkpoint=int, params=int, seconds=float, devices=str)
    if not all(isinstance(values, dict) and all(map(_is_number, values.values()))
               for values in result["metrics"].values()):
      raise UserError(f"{self.result_file} is not what dljax writes there (the metrics of a split are no "
                      "numbers); restore it from a copy, or remove it")
    if result.get("run", self.run) != self.run:
      raise UserError(f"{self.result_file} belongs to another run than {self.config_file.name} beside "
                      "it; restore it from a copy, or remove it")
    return result

  def is_finished(self, total_steps: int) -> bool:
    """Whether a run of `total_steps` ended here, perhaps by early stopping."""
    result = self.result()
    return result is not None and result["total_steps"] == total_steps

  def write_result(self, result: Mapping[str, Any]) -> None:
    """Writes result.json, which makes the run a finished one."""
    write_sealed(self.result_file, {"run": self.run, **result})


def _is_number(value: Any) -> bool:
  """Whether a value of JSON is a number that Python can show as a float."""
  try:
    float(value if isinstance(value, (int, float)) and not isinstance(value, bool) else "")
  except (OverflowError, ValueError):  # an integer of 309 digits or more; no number
    return False
  return True


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def _with_tuples(value: Any) -> Any:
  """Lists as the tuples that they were before JSON."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(_with_tuples(v) for v in value) if isinstance(value, list) else value


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _git_commit() -> str | None:
  """The commit of the checkout that dljax runs from, with "+" where files were changed."""
  folder = Path(__file__).parent

  def git(*arguments):
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, encoding="utf-8",
                          check=True, timeout=10).stdout.strip()

  try:
    git("ls-files", "--error-unmatch", __file__)  # fails in another repository around this file
    return git("rev-parse",
               "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
  except (OSError, subprocess.SubprocessError):
    return None
