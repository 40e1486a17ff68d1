"""Checkpoints that are intact or do not exist. The only file that imports Orbax.

Orbax writes the arrays asynchronously. This file closes five gaps that it leaves open:

* Orbax writes no checksum of the payload. Once Orbax has committed a step, this file writes
  `<step>/manifest.json`, durably and last. It holds the size and SHA-256 of every file, the dtype
  and shape of every array, and a hash of the manifest itself. A step without a valid manifest does
  not exist, so a save in flight, a failed save and an empty directory are never taken for the
  latest step. What an interrupted save left is removed at the next start.
* Orbax restores whatever it finds. Here every file is verified first. A step that fails is moved
  to `corrupt-<step>`, with a warning that says why, and the next older step is used. What earlier
  starts moved there is then removed.
* Orbax may refuse a save by returning False, and it forgets an error of its background thread if
  nobody asks. Both raise a `CheckpointError` here, at the next `save` or at `close`; the property
  `failed` shows it earlier.
* Orbax reads its directory as a pattern: in "runs[1]" it finds nothing that it wrote. And it makes
  every folder that is missing, so that a run whose folder was moved would go on in the old place.
  It is given a path by way of an open descriptor, which follows the folder wherever it is moved,
  and which has the same number on all processes.
* Orbax casts arrays to the dtypes that the caller asks for. Here an array with another name, dtype
  or shape is refused by name.

Old steps are deleted only after the manifest of the new step is on disk. So at any moment, even
after kill -9, either the previous step or a newer one is intact.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import json
import logging as python_logging
import os
import re
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from dljax.errors import RunError, UserError, writing
from dljax.train import durable, hosts, parallel
from dljax.train.state import FORMAT, check_format, path_name
from dljax.train.workdir import differences

MANIFEST = "manifest.json"
_DESCRIPTORS = Path("/proc/self/fd")  # where Linux shows the open files of a process
# The least number of the descriptor, above those of open files, and how many numbers are tried: the
# number has to be free on every process.
_LEAST_NUMBER, _TRIES = 512, 8
_MOST_ERRORS = 8  # that Orbax raises while it closes
# What TensorStore appends to an error: its number, and what was to be written.
_PAYLOAD = re.compile(r" \[[a-z_]+='.*", re.DOTALL)
_NONE, _FAILED = -1, -2  # what process 0 sends to the others in place of a step


class CheckpointError(RunError):
  """A checkpoint was not saved: one line that names step, directory and reason."""


class Restored(NamedTuple):
  """What `Checkpointer.restore` gives.

  Attributes:
    step: the step that was restored.
    state: arrays in the structure, and with the shardings, of the abstract state.
    host: the mapping that was given to `save`, as JSON has it (tuples are lists).
  """

  step: int
  state: Any
  host: dict[str, Any]


class Checkpointer:
  """Saves and restores a state under `directory`; a context manager that every process makes."""

  def __init__(
      self, directory: str | os.PathLike[str], *, keep: int = 2,
      assets: str | os.PathLike[str] | None = None, run: str = "",
      config: Mapping[str, Any] | None = None, read_only: bool = False,
  ):
    """Touches nothing on disk.

    Args:
      directory: the directory that holds one directory per step, named by its decimal number; the
        first `save` makes it.
      keep: the number of newest steps to keep, besides the best one.
      assets: a directory of files without which the state is worthless (a tokenizer); `save`
        records their hashes, and `restore` verifies them.
      run: the id of the run; `save` records it, and `restore` refuses a step of another run, or of
        none. "" does neither.
      config: the fields that decide the training (`workdir.decisive`); `save` records them, and
        `restore` refuses a step that was trained with others, or that does not say with which. A
        reader only warns of others, because whoever edits the config of a finished run on purpose
        may use it. None does neither.
      read_only: whether to restore only, and to move and delete nothing, as for an evaluation
        during a run.

    Raises:
      UserError: several processes cannot save under such a path.
    """
    self.directory = Path(directory).absolute()
    if jax.process_count() > 1 and re.search(r"[*?[]", str(self.directory)):
      raise UserError(f"{self.directory}: several processes cannot save below a folder with *, "
                      "? or [ in its name; name another --workdir")
    self._keep = keep
    self._assets = None if assets is None else Path(assets)
    self._run, self._config = run, config
    self._read_only = read_only
    self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    self._undo = contextlib.ExitStack()  # gives back what `_place` took
    self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
    self._saving = 0  # the step that was handed to Orbax last

  def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
    """Starts a save, and returns as soon as the arrays may be donated.

    It waits for an earlier save first.

    Args:
      step: a number above every step that exists.
      state: a pytree of arrays, on any devices, with any shardings.
      host: what the host has decided, JSON-able. The step `host["best_step"]`, if there is one, is
        kept whatever its age.

    Raises:
      CheckpointError: this save was refused, or the previous one failed.
    """
    host = json.loads(json.dumps(host))
    flat, _ = _flatten(state)
    leaves = {name: {"dtype": leaf.dtype.name, "shape": list(leaf.shape)}
              for name, leaf in flat.items()}
    self.wait(functools.partial(self._make_room, step))
    try:
      self._saving = step
      self._manager.reload()
      accepted = self._manager.save(step, args=_orbax().args.Composite(state=_orbax().args.PyTreeSave(flat)))
    except Exception as error:
      self._give_up(step, error)
      self._forget()
      raise self._error(step, error) from error
    if not accepted:
      raise self._error(step, f"steps must increase, and {self.steps()} exist")
    self._pending = step, self._worker.submit(self._commit, step, leaves, host)

  def wait(self, then: Callable[[], None] = lambda: None) -> None:
    """Waits until the last save is on disk with its manifest; every process calls it.

    Args:
      then: what the first process does before the others go on.

    Raises:
      CheckpointError: it failed, on this process or on another.
    """
    failure = None
    try:
      self._wait()
      if jax.process_index() == 0:
        then()
    except CheckpointError as error:
      failure = error
    if parallel.any_host(failure is not None):  # the question also makes all wait for process 0
      raise failure or CheckpointError(
          f"a checkpoint in {self.directory} was not saved; another process says why")

  def amend(self, step: int, host: Mapping[str, Any]) -> None:
    """Replaces what the host had decided at `step`, the newest; the arrays stay.

    Raises:
      CheckpointError: it was not written; the old manifest is in place.
    """
    try:
      self._wait()
      if jax.process_index() == 0:
        manifest = {**self._manifest(step), "host": json.loads(json.dumps(host))}
        durable.write(self._path(step) / MANIFEST, _sealed(manifest))
    except OSError as error:
      raise self._error(step, error) from error

  @property
  def failed(self) -> bool:
    """Whether this process knows that the last save failed.

    The next `save` raises the error on all processes.
    """
    return self._pending is not None and self._pending[1].done() and self._pending[1].exception() is not None

  def steps(self) -> list[int]:
    """The steps with a valid manifest, ascending; their other files are not verified."""
    return [step for step in self._numbered() if self._manifest(step) is not None]

  def host(self, step: int | None = None) -> dict[str, Any] | None:
    """The `host` that was saved with `step`, by default the newest; None if there is no such step.
    """
    step = max(self.steps(), default=None) if step is None else step
    manifest = None if step is None else self._manifest(step)
    return manifest and manifest["host"]

  def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
    """Restores a step after verifying it.

    Args:
      abstract_state: the state's structure, with shape, dtype and sharding in each leaf (arrays or
        `jax.ShapeDtypeStruct`). A sharding may differ from the one at the save; an array without a
        sharding goes to the first device.
      step: the step to restore; by default the newest intact one.

    Returns:
      The restored step, or None if `step` is None and no step is intact.

    Raises:
      UserError: `step` does not exist, is not intact, or belongs to another run or config or to
        none; an array differs in name, dtype or shape; an asset is missing or differs.
    """
    self._wait()
    step = _agree(lambda: self._choose(step))
    if step == _NONE:
      return None
    manifest = self._manifest(step)
    wanted, treedef = _flatten(abstract_state)
    self._check_leaves(step, manifest["leaves"], wanted)
    for name, entry in manifest["assets"].items() if self._assets else ():
      if fault := _file_fault(self._assets / name, entry):
        raise UserError(f"{self._assets / name}: {fault}, so checkpoint {step} cannot be used; put it back")
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    args = _orbax().args.PyTreeRestore(
        item=wanted,
        restore_args={
            name: _orbax().ArrayRestoreArgs(
                dtype=leaf.dtype, global_shape=leaf.shape, sharding=getattr(leaf, "sharding", None) or first)
            for name, leaf in wanted.items()
        })
    self._manager.reload()
    flat = self._manager.restore(step, args=_orbax().args.Composite(state=args))["state"]
    return Restored(step, jax.tree.unflatten(treedef, [flat[name] for name in wanted]),
                    manifest["host"])

  def restore_arrays(
      self, choose: Callable[[Iterable[str]], Iterable[str]], step: int | None = None,
  ) -> Restored | None:
    """Restores some arrays of a step, after verifying it; the saved state need not be known.

    Args:
      choose: the names of all arrays ("params/conv1/kernel") -> the names of the wanted ones.
      step: see `restore`.

    Returns:
      The result of `restore`, whose state is a mapping from names to NumPy arrays.

    Raises:
      UserError: `step` does not exist, is not intact, or belongs to another run.
    """
    self._wait()
    step = _agree(lambda: self._choose(step))
    if step == _NONE:
      return None
    manifest = self._manifest(step)
    leaves = {name: manifest["leaves"][name] for name in choose(manifest["leaves"])}
    args = _orbax().args.PyTreeRestore(
        item={name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for name, leaf in leaves.items()},
        restore_args={name: _orbax().RestoreArgs(restore_type=np.ndarray) for name in leaves}, partial_restore=True)
    self._manager.reload()
    return Restored(step,
                    self._manager.restore(step, args=_orbax().args.Composite(state=args))["state"],
                    manifest["host"])

  def close(self) -> None:
    """Waits until the last save is on disk with its manifest.

    Raises:
      CheckpointError: it failed.
    """
    try:
      self._wait()
      if error := self._close_manager():
        raise self._error(max(self._numbered(), default=0), error) from error
    finally:
      self._close_manager()
      self._worker.shutdown()
      self._undo.close()
      self.__dict__.pop("_place", None)

  def __enter__(self) -> "Checkpointer":
    if not self._read_only:
      # This precedes the import, which takes seconds in which the folder may be moved.
      if jax.process_count() > 1:
        self._share_place()
      elif self.directory.parent.is_dir():
        self._place
      _orbax()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
               trace: Any) -> None:
    try:
      self.close()
    except CheckpointError:
      if not isinstance(error, (RunError, UserError)):  # otherwise the first error says more
        raise

  @functools.cached_property
  def _manager(self) -> Any:
    ocp = _orbax()
    write = not self._read_only
    if write and jax.process_index() == 0:
      with writing(self.directory):
        durable.make_folder(self._place)
      for rest in self._place.glob("deleting-*"):
        shutil.rmtree(rest, ignore_errors=True)
    return ocp.CheckpointManager(
        self._place,
        # Weights hardly compress, and the attempt would slow the training down.
        item_handlers={"state": ocp.PyTreeCheckpointHandler(use_compression=False)},
        options=ocp.CheckpointManagerOptions(
            create=write, cleanup_tmp_directories=write, lightweight_initialize=True,
            # Otherwise threads wait for ten minutes for a folder that could not be made.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False,
                barrier_sync_fn=self._barrier if jax.process_count() > 1 else None)))

  @functools.cached_property
  def _place(self) -> Path:
    """The directory by a plain path, which stays right when the folder above it is moved."""
    if jax.process_count() > 1:
      return self.directory  # `_share_place` has found no better one
    if not self._read_only:
      with writing(self.directory):
        durable.make_folder(self.directory.parent)
    if _DESCRIPTORS.is_dir():
      descriptor = os.open(self.directory.parent, os.O_RDONLY)
      self._undo.callback(os.close, descriptor)
      return _DESCRIPTORS / str(descriptor) / self.directory.name
    link = Path(tempfile.mkdtemp(prefix="dljax-")) / "run"
    self._undo.callback(shutil.rmtree, link.parent, ignore_errors=True)  # and not what it leads to
    link.symlink_to(self.directory.parent)
    return link / self.directory.name

  def _share_place(self) -> None:
    """Gives the descriptors of all processes one number, as Orbax wants the same path everywhere.

    All keep the directory's own path if one of them does not see the folder, or has no /proc.
    """
    number, most = _LEAST_NUMBER, os.sysconf("SC_OPEN_MAX")
    for _ in range(_TRIES):
      descriptor = _NONE
      if self.directory.parent.is_dir() and _DESCRIPTORS.is_dir() and number < most:
        own = os.open(self.directory.parent, os.O_RDONLY)
        descriptor = fcntl.fcntl(own, fcntl.F_DUPFD_CLOEXEC, number)  # the lowest free number
        os.close(own)
        self._undo.callback(os.close, descriptor)
      found = parallel.of_hosts(descriptor)
      if min(found) == max(found) != _NONE:
        self._place = _DESCRIPTORS / str(descriptor) / self.directory.name
        return
      if min(found) == _NONE:
        return
      number = max(found)

  def _close_manager(self) -> Exception | None:
    """Closes Orbax's manager, if there is one; returns its first error.

    After a failed save it raises an error for each of its threads, one at a call.
    """
    first, manager = None, self.__dict__.pop("_manager", None)
    for _ in range(_MOST_ERRORS if manager else 0):
      try:
        manager.close()
        break
      except Exception as error:  # pylint: disable=broad-exception-caught
        first = first or error
    return first

  def _forget(self) -> None:
    """Lets Orbax forget a save that failed, whose error it would raise again at the next call."""
    if jax.process_count() == 1:
      self._close_manager()  # and removes the rest of the save when it is opened again
    else:  # all processes would have to open it together
      with contextlib.suppress(Exception):
        self._manager.wait_until_finished()

  def _wait(self) -> None:
    """Waits for the save in flight, and raises its error."""
    if self._pending is None:
      return
    step, future = self._pending
    concurrent.futures.wait([future])
    self._pending = None
    if error := future.exception():
      self._forget()
      raise self._error(step, error) from error

  def _commit(self, step: int, leaves: Mapping[str, Any], host: Mapping[str, Any]) -> None:
    """Waits for Orbax, writes the manifest, and then deletes old steps; runs in the background."""
    self._manager.wait_until_finished()
    try:
      if jax.process_index() == 0:
        self._finalize(step, leaves, host)
    finally:
      # A step appears on every process at once. In a thread, only this kind of barrier is safe.
      _orbax().multihost.get_barrier_sync_fn()(key=f"manifest:{step}", timeout_ms=600_000)

  def _give_up(self, step: int, error: Exception) -> None:
    """Ends this process after a failure inside of Orbax, if there are several.

    The others may have no such failure, and would wait for this one in Orbax for ten minutes.
    """
    if hosts.watch():
      hosts.give_up(str(self._error(step, error)))

  def _barrier(self, *, key: str, timeout_ms: int) -> None:
    """What Orbax calls in its threads to wait for the other processes.

    A thread whose part of a save has failed calls it too, before it raises its error.
    """
    error = sys.exc_info()[1]
    if isinstance(error, Exception) and threading.current_thread() is not threading.main_thread():
      self._give_up(self._saving, error)
    _orbax().multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

  def _finalize(self, step: int, leaves: Mapping[str, Any], host: Mapping[str, Any]) -> None:
    directory = self._path(step)
    manifest = {
        "format": FORMAT,
        "step": step,
        "run": self._run,
        "config": self._config,
        "host": host,
        "leaves": leaves,
        "files": _describe(directory),
        "assets": _describe(self._assets) if self._assets else {},
    }
    durable.write(directory / MANIFEST, _sealed(manifest))
    durable.sync(directory.parent)  # where Orbax made the step's name
    steps = self.steps()
    for old in {*steps[:-self._keep]} - {host.get("best_step")}:
      self._delete(old)

  def _delete(self, step: int) -> None:
    """Deletes a step, which is renamed first: a half-deleted one would look like a corrupt one."""
    doomed = self._path(step).rename(self._path(step).with_name(f"deleting-{step}"))
    shutil.rmtree(doomed, ignore_errors=True)

  def _make_room(self, step: int) -> None:
    """Moves or deletes what stands in the place of a step that is to be saved."""
    try:
      if self._path(step).exists() and self._manifest(step) is None:
        self._set_aside(step, self._fault(step))
    except OSError as error:
      raise self._error(step, error) from error

  def _choose(self, step: int | None) -> int:
    """The verified step to restore, or `_NONE`; moves corrupt steps aside if `step` is None."""
    if step is not None:
      if fault := self._fault(step):
        rest = [other for other in self.steps() if other != step]
        raise UserError(
            f"checkpoint {step} in {self.directory}: {fault}; other steps there: {rest or 'none'}")
      self._check_run(step)
      return step
    earlier = [] if self._read_only else sorted(self._directory.glob("corrupt-*"))
    for candidate in reversed(self._numbered()):
      fault = self._fault(candidate)
      if fault is None:
        self._check_run(candidate)
        return candidate
      with writing(self.directory):
        moved = self._set_aside(candidate, fault)
      while moved and earlier:
        logging.warning("%s, moved there at an earlier start, is removed", earlier[-1].name)
        shutil.rmtree(earlier.pop(), ignore_errors=True)
    return _NONE

  def _check_run(self, step: int) -> None:
    """Refuses a step that was copied from another run, whose config and seed may differ."""
    found, trained = (self._manifest(step).get(name) for name in ("run", "config"))
    if self._run and not found or self._config is not None and trained is None:
      raise UserError(
          f"checkpoint {step} in {self.directory} does not say to which run "
          "and config it belongs; an older version of dljax has saved it: train again in another "
          "--workdir")
    if self._run and found != self._run:
      raise UserError(
          f"checkpoint {step} in {self.directory} belongs to another run ({found[:8]}, and config.json "
          f"here is of run {self._run[:8]}); move it back, or start from its weights in another "
          "--workdir with --config.init.source")
    differ = "" if self._config is None else differences(trained, self._config)
    what = f"checkpoint {step} in {self.directory} was trained with another config: {differ}"
    if differ and not self._read_only:
      raise UserError(f"{what}; undo the edit of config.json, or start from its weights in another "
                      "--workdir with --config.init.source")
    if differ:
      logging.warning("%s; the edited config.json is used", what)

  def _fault(self, step: int) -> str | None:
    """What is wrong with a step, or None if it is intact."""
    directory = self._path(step)
    if not directory.is_dir():
      return "there is no such step"
    if not any(directory.iterdir()):
      return "the directory is empty"
    if not (directory / MANIFEST).exists():
      return f"{MANIFEST} is missing, as after a save that was interrupted"
    manifest = self._manifest(step)
    if manifest is None:
      return f"{MANIFEST} is damaged"
    for name, entry in manifest["files"].items():
      if fault := _file_fault(directory / name, entry):
        return f"{name} {fault}"
    return None

  def _set_aside(self, step: int, fault: str) -> bool:
    """Moves a corrupt step out of the way, and says so; returns whether it did.

    A step without a manifest never was a checkpoint: it is what an interrupted save left, and is
    deleted.
    """
    place = self.directory / str(step)
    if self._read_only:
      logging.warning("checkpoint %s: %s; looking for an older one", place, fault)
      return False
    if not (self._path(step) / MANIFEST).exists():
      self._delete(step)
      logging.warning("checkpoint %s: %s; removed", place, fault)
      return False
    target, count = self._path(step).with_name(f"corrupt-{step}"), 1
    while target.exists():
      count += 1
      target = target.with_name(f"corrupt-{step}-{count}")
    self._path(step).rename(target)
    logging.warning("checkpoint %s: %s; moved to %s", place, fault, target.name)
    return True

  def _check_leaves(self, step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses a state whose arrays differ in name, dtype or shape from the saved ones."""
    for name in sorted({*saved, *wanted}):
      old = f"{saved[name]['dtype']}{saved[name]['shape']}" if name in saved else "absent"
      new = f"{wanted[name].dtype.name}{list(wanted[name].shape)}" if name in wanted else "absent"
      if old != new:
        raise UserError(
            f"checkpoint {step} in {self.directory} does not fit this config: {name} is {old} there and "
            f"{new} here; use the config that it was saved with")

  def _manifest(self, step: int) -> dict[str, Any] | None:
    """The manifest of a step, or None if it is missing, damaged or for another step.

    Raises:
      UserError: the run has another format.
    """
    manifest = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      data = (self._path(step) / MANIFEST).read_bytes()
      read = json.loads(data)
      del read["sha256"]
      # The comparison is by bytes, so that no flipped bit passes.
      if _sealed(read) == data and read["step"] == step:
        manifest = read
    if manifest is not None:
      check_format(manifest, self._path(step) / MANIFEST)
    return manifest

  def _numbered(self) -> list[int]:
    """The decimal directories, whatever is in them, ascending."""
    if not self._directory.is_dir():
      return []
    names = [path.name for path in self._directory.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

  @property
  def _directory(self) -> Path:
    """The directory; once it is open, wherever it was moved since."""
    return self.__dict__.get("_place", self.directory)

  def _path(self, step: int) -> Path:
    return self._directory / str(step)

  def _error(self, step: int, reason: object) -> CheckpointError:
    line = getattr(reason, "strerror", None) or str(reason)
    # TensorStore says what happened at the end, but for its payload.
    line = _PAYLOAD.sub("", line).partition("\n")[0] or type(reason).__name__
    line = line if len(line) <= 200 else f"... {line[-200:]}"
    return CheckpointError(f"checkpoint {step} in {self.directory} was not saved: {line}")


@functools.cache
def _orbax() -> Any:
  """Orbax, imported late because the import is slow, and without its log messages.

  This file raises an error for everything that matters.
  """
  import orbax.checkpoint as ocp

  inside = f"{os.sep}orbax{os.sep}"
  python_logging.getLogger("absl").addFilter(lambda record: inside not in record.pathname)
  # Of several writes that fail, all but one have nobody to tell.
  python_logging.getLogger("asyncio").addFilter(
      lambda record: "exception was never retrieved" not in record.getMessage())
  warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
  sys.unraisablehook = functools.partial(_show_unraisable, sys.unraisablehook)
  return ocp


def _show_unraisable(show: Callable[[Any], None], unraisable: Any) -> None:
  """Calls `show` for an exception that Python could raise nowhere, but for one kind.

  When a save has failed, TensorStore still reports its other writes, from threads of its own, to
  an event loop that is closed.
  """
  error = unraisable.exc_value
  if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
    show(unraisable)


def _agree(choose: Callable[[], int]) -> int:
  """What process 0 chooses, on every process."""
  if jax.process_count() == 1:
    return choose()
  from jax.experimental import multihost_utils

  choice, error = _FAILED, None
  if jax.process_index() == 0:
    try:
      choice = choose()
    except (UserError, RunError) as e:
      error = e
  choice = int(multihost_utils.broadcast_one_to_all(np.int32(choice)))
  if choice == _FAILED:
    raise error or UserError("no checkpoint was restored; process 0 says why")
  return choice


def _flatten(state: Any) -> tuple[dict[str, Any], Any]:
  """`{"params/conv1/kernel": leaf}` in the order of the leaves, and the tree's structure."""
  paths, treedef = jax.tree_util.tree_flatten_with_path(state)
  return {path_name(path): leaf for path, leaf in paths}, treedef


def _describe(directory: Path) -> dict[str, Any]:
  """`{"relative/path": {"size": bytes, "sha256": hex}}` of the files below `directory`, made
  durable.
  """
  entries = {}
  for path in sorted(directory.rglob("*")):
    if path.is_file():
      with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[path.relative_to(directory).as_posix()] = {"size": file.tell(), "sha256": digest}
    else:
      durable.sync(path)
  return entries


def _file_fault(path: Path, entry: Mapping[str, Any]) -> str | None:
  """How a file differs from its entry in a manifest, or None if it does not."""
  try:
    size = path.stat().st_size
    if size != entry["size"]:
      return f"has {size} bytes instead of {entry['size']}"
    with path.open("rb") as file:
      same = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
    return None if same else "differs from its SHA-256 in the manifest"
  except FileNotFoundError:
    return "is missing"
  except OSError as error:
    return f"cannot be read ({error.strerror})"


def _sealed(manifest: Mapping[str, Any]) -> bytes:
  """The manifest's only form as bytes, with the hash of all its other fields."""
  return durable.sealed(manifest, sort_keys=True, indent=1)
