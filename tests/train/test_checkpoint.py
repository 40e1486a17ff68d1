"""Checkpoints: bit-identical round trips, and every way that one can be damaged."""

import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dljax.errors import UserError
from dljax.train import checkpoint
from dljax.train.checkpoint import Checkpointer, CheckpointError
from dljax.train.state import FORMAT, TrainState, state_sha256
from tests.command import xla_flags

ROOT = Path(__file__).parents[2]
_TX = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.add_decayed_weights(0.1), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
    optax.adam(1e-3, mu_dtype=jnp.bfloat16),
)


def _state(step: int, rows: int = 8) -> TrainState:
  """A small state with everything that is awkward: MaskedNode, EmptyState, {}, bfloat16, NaN and -0."""
  key = jax.random.fold_in(jax.random.key(7), step)
  params = {
      "conv": {"kernel": jax.random.normal(key, (rows, 4)), "bias": jnp.full((4,), -0.0)},
      "head": {"kernel": jax.random.normal(key, (4, 8), jnp.bfloat16), "bias": jnp.zeros(())},
  }
  _, opt_state = _TX.update(jax.tree.map(jnp.ones_like, params), _TX.init(params), params)
  return TrainState(
      step=jnp.int32(step), params=params,
      model_state={"batch_stats": {"mean": jnp.array([jnp.nan, jnp.inf])}, "carry": {}},
      opt_state={"all": opt_state}, rng=jax.random.key_data(key), ema={}, failed_step=jnp.int32(-1))


def _abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


ABSTRACT = _abstract(_state(0))


@pytest.fixture(scope="module")
def _two_steps(tmp_path_factory) -> Path:
  directory = tmp_path_factory.mktemp("run") / "checkpoints"
  with Checkpointer(directory) as checkpointer:
    for step in (4, 8):
      checkpointer.save(step, _state(step), {"best_step": None, "seen": step})
  return directory


@pytest.fixture
def saved(_two_steps, tmp_path) -> Path:
  """A directory of our own with the intact steps 4 and 8."""
  return shutil.copytree(_two_steps, tmp_path / "checkpoints")


def _restores(directory: Path, step: int) -> None:
  """The newest intact step is `step`, bit for bit."""
  with Checkpointer(directory) as checkpointer:
    restored = checkpointer.restore(ABSTRACT)
  assert restored.step == step
  assert restored.host["seen"] == step
  assert jax.tree.structure(restored.state) == jax.tree.structure(ABSTRACT)
  assert state_sha256(restored.state) == state_sha256(_state(step))


def _names(directory: Path) -> set[str]:
  return {path.name for path in directory.iterdir()}


def _messages(caplog) -> list[str]:
  return [record.getMessage() for record in caplog.records if record.name == "absl"]


# What is saved comes back


def test_a_state_comes_back_bit_for_bit(saved, caplog):
  caplog.set_level(logging.DEBUG, "absl")
  _restores(saved, 8)
  assert Checkpointer(saved).steps() == [4, 8]
  assert _messages(caplog) == []


def test_an_older_step_and_what_the_host_had(saved):
  with Checkpointer(saved) as checkpointer:
    assert state_sha256(checkpointer.restore(ABSTRACT, 4).state) == state_sha256(_state(4))
    assert checkpointer.host() == {"best_step": None, "seen": 8}
    assert checkpointer.host(4) == {"best_step": None, "seen": 4}
    assert checkpointer.host(5) is None


@pytest.mark.parametrize("name", ["run[1]", "a*b?", "100% #1 (new)"])
def test_the_path_is_no_pattern(tmp_path, name):
  directory = tmp_path / name / "checkpoints"
  before = set(Path(tempfile.gettempdir()).glob("dljax-*"))
  with Checkpointer(directory) as checkpointer:
    checkpointer.save(1, {"w": np.arange(3.0)}, {})
  assert sorted(path.name for path in directory.iterdir()) == ["1"]
  with Checkpointer(directory, read_only=True) as checkpointer:
    restored = checkpointer.restore({"w": np.zeros(3)})
  np.testing.assert_array_equal(restored.state["w"], np.arange(3.0))
  assert set(Path(tempfile.gettempdir()).glob("dljax-*")) == before, "a link is left"


@pytest.mark.parametrize("descriptors", [checkpoint._DESCRIPTORS, Path("/nowhere")])
def test_a_folder_that_is_moved_takes_its_saves_along(tmp_path, monkeypatch, descriptors):
  monkeypatch.setattr(checkpoint, "_DESCRIPTORS", descriptors)
  run, moved = tmp_path / "run[1]", tmp_path / "moved"
  run.mkdir()
  try:
    with Checkpointer(run / "checkpoints") as checkpointer:
      checkpointer.save(1, {"w": np.arange(3.0)}, {})
      checkpointer.wait()
      run.rename(moved)
      checkpointer.save(2, {"w": np.arange(3.0) + 1}, {})
  except CheckpointError as error:  # without open descriptors there is no way to follow the folder
    assert descriptors != checkpoint._DESCRIPTORS or not descriptors.is_dir(), error
  assert _names(tmp_path) == {"moved"}
  restored = Checkpointer(moved / "checkpoints", read_only=True).restore({"w": np.zeros(3)})
  assert restored.step == (2 if descriptors.is_dir() else 1)
  np.testing.assert_array_equal(restored.state["w"], np.arange(3.0) + restored.step - 1)


@pytest.mark.parametrize("when", ["before the first save", "between saves"])
def test_a_folder_that_is_deleted_is_not_made_again(tmp_path, capfd, when):
  run = tmp_path / "run"
  run.mkdir()
  with pytest.raises(CheckpointError, match=r"run/checkpoints was not saved: .*No such file") as error:
    with Checkpointer(run / "checkpoints") as checkpointer:
      if when == "between saves":
        checkpointer.save(1, {"w": np.arange(3.0)}, {})
        checkpointer.wait()
      shutil.rmtree(run)
      checkpointer.save(2, {"w": np.arange(3.0)}, {})
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""
  for thread in threading.enumerate():  # one that waits for the folder would keep the process from ending
    if type(thread).__module__.startswith("orbax"):
      thread.join(5)
      assert not thread.is_alive()


def test_several_processes_refuse_a_path_that_orbax_takes_for_a_pattern(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match=r"\[ in its name"):
    Checkpointer(tmp_path / "run[1]")


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("missing", ["run", "config"])
def test_a_step_that_does_not_say_of_what_it_is_is_refused_and_stays(tmp_path, missing, read_only):
  """As one that an earlier version has saved, or one that lost a field and got a new hash."""
  own = {"run": "one", "config": {"seed": 1}}
  with Checkpointer(tmp_path, **own) as checkpointer:
    checkpointer.save(1, {"w": np.arange(3.0)}, {})
  path = tmp_path / "1" / "manifest.json"
  manifest = json.loads(path.read_text())
  del manifest[missing]
  path.write_bytes(checkpoint._sealed(manifest))
  with Checkpointer(tmp_path, **own, read_only=read_only) as checkpointer:
    with pytest.raises(UserError, match="checkpoint 1 in .* does not say to which run and config it belongs") as error:
      checkpointer.restore({"w": np.zeros(3)})
    with pytest.raises(UserError, match="does not say"):
      checkpointer.restore_arrays(list, 1)
  assert "\n" not in str(error.value) and _names(tmp_path) == {"1"}


def test_a_step_of_another_run_is_refused_and_stays(tmp_path):
  abstract = {"w": np.zeros(3)}
  with Checkpointer(tmp_path, run="one") as checkpointer:
    checkpointer.save(1, {"w": np.arange(3.0)}, {})
  for step in (None, 1):
    with Checkpointer(tmp_path, run="two") as checkpointer:
      with pytest.raises(UserError, match="checkpoint 1 in .* belongs to another run"):
        checkpointer.restore(abstract, step)
      with pytest.raises(UserError, match="belongs to another run"):
        checkpointer.restore_arrays(list, step)
  for run in ("one", ""):
    with Checkpointer(tmp_path, run=run) as checkpointer:
      assert checkpointer.restore(abstract).step == 1


def test_nothing_there_is_none_and_stays_nothing(tmp_path):
  with Checkpointer(tmp_path / "checkpoints") as checkpointer:
    assert checkpointer.restore(ABSTRACT) is None
    assert checkpointer.steps() == []
    assert checkpointer.host() is None
  assert not (tmp_path / "checkpoints").exists()


def test_arrays_may_be_donated_once_save_returns(tmp_path):
  state = {"x": jnp.arange(4_000_000, dtype=jnp.float32), "y": jnp.ones((1000, 1000))}
  expected = state_sha256(state)
  abstract = _abstract(state)
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state, {})
    for _ in range(5):
      state = overwrite(state)
    assert state_sha256(checkpointer.restore(abstract).state) == expected


def _place(*shape: int, spec: PartitionSpec) -> NamedSharding:
  names = ("fsdp", "tensor")[:len(shape)]
  return NamedSharding(Mesh(np.array(jax.devices()[:np.prod(shape)]).reshape(shape), names), spec)


_PLACES = {
    "one": _place(1, spec=PartitionSpec()),
    "replicated": _place(4, spec=PartitionSpec()),
    "fsdp": _place(4, spec=PartitionSpec("fsdp")),
    "2x2": _place(2, 2, spec=PartitionSpec("fsdp", "tensor")),
}


@pytest.mark.parametrize("source, target", [
    ("one", "fsdp"), ("replicated", "one"), ("fsdp", "2x2"), ("2x2", "replicated"), ("pmap", "fsdp"),
])
def test_restores_on_another_mesh(tmp_path, source, target):
  state = {"kernel": jax.random.normal(jax.random.key(0), (8, 4)), "wide": jnp.arange(64.0).reshape(4, 16)}
  expected = state_sha256(state)
  if source == "pmap":
    state = jax.pmap(lambda s, _: s, in_axes=(None, 0), out_axes=None)(state, jnp.zeros(4))
  else:
    state = jax.device_put(state, _PLACES[source])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_PLACES[target]), state)
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state, {})
    restored = checkpointer.restore(abstract).state
  assert state_sha256(restored) == expected
  for leaf in restored.values():
    assert leaf.sharding == _PLACES[target]


@pytest.mark.parametrize("change, line", [
    (lambda s: s.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), s.params)),
     "params/conv/bias is float32[4] there and bfloat16[4] here"),
    (lambda s: s.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), s.params)),
     "params/head/kernel is bfloat16[4, 8] there and float32[4, 8] here"),
    (lambda s: _state(0, rows=9),
     "opt_state/all/2/0/mu/conv/kernel is bfloat16[8, 4] there and bfloat16[9, 4] here"),
    (lambda s: s.replace(ema={"bias": jnp.zeros(3)}), "ema/bias is absent there and float32[3] here"),
    (lambda s: s.replace(model_state={}), "model_state/batch_stats/mean is float32[2] there and absent here"),
])
def test_another_dtype_shape_or_name_is_refused(saved, change, line):
  with Checkpointer(saved) as checkpointer, pytest.raises(UserError) as error:
    checkpointer.restore(_abstract(change(_state(0))))
  assert line in str(error.value)
  assert _names(saved) == {"4", "8"}  # it is the config that differs: nothing is corrupt


# Damage


def _flip(path: Path, bit: int) -> None:
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


def test_one_flipped_bit_in_any_file_falls_back(saved, caplog):
  files = sorted(path.relative_to(saved / "8") for path in (saved / "8").rglob("*") if path.is_file())
  assert {"manifest.json", "state/_METADATA", "state/manifest.ocdbt"} < {path.as_posix() for path in files}
  draw = random.Random(0)
  for file in files:
    bits = 8 * (saved / "8" / file).stat().st_size
    for bit in (0, bits - 1, draw.randrange(bits)):
      caplog.clear()
      _flip(saved / "8" / file, bit)
      _restores(saved, 4)
      (message,) = _messages(caplog)
      assert file.as_posix() in message and "corrupt-8" in message
      assert _names(saved) == {"4", "corrupt-8"}
      (saved / "corrupt-8").rename(saved / "8")
      _flip(saved / "8" / file, bit)
  _restores(saved, 8)


def _largest(directory: Path) -> Path:
  files = [path for path in (directory / "state").rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def _truncate(step: Path) -> str:
  path = _largest(step)
  size = path.stat().st_size
  os.truncate(path, size - 1)
  return f"{path.relative_to(step).as_posix()} has {size - 1} bytes instead of {size}"


def _delete(step: Path) -> str:
  _largest(step).unlink()
  return "is missing"


def _delete_manifest(step: Path) -> str:
  (step / "manifest.json").unlink()
  return "manifest.json is missing, as after a save that was interrupted"


def _half_a_manifest(step: Path) -> str:
  (step / "manifest.json").rename(step / "manifest.json.tmp")
  return "manifest.json is missing, as after a save that was interrupted"


def _empty(step: Path) -> str:
  shutil.rmtree(step)
  step.mkdir()
  return "the directory is empty"


def _other_manifest(step: Path) -> str:
  shutil.copy(step.parent / "4" / "manifest.json", step / "manifest.json")
  return "manifest.json is damaged"


def _edited_manifest(step: Path) -> str:
  manifest = json.loads((step / "manifest.json").read_text())
  manifest["host"]["seen"] = 9
  (step / "manifest.json").write_text(json.dumps(manifest))
  return "manifest.json is damaged"


@pytest.mark.parametrize("damage", [_truncate, _delete, _other_manifest, _edited_manifest])
def test_damage_falls_back_and_the_step_can_be_saved_again(saved, caplog, damage):
  fault = damage(saved / "8")
  _restores(saved, 4)
  (message,) = _messages(caplog)
  assert fault in message
  assert "moved to corrupt-8" in message
  with Checkpointer(saved) as checkpointer:
    assert checkpointer.restore(ABSTRACT).step == 4
    checkpointer.save(8, _state(8), {"seen": 8})
  assert _names(saved) == {"4", "8", "corrupt-8"}
  caplog.clear()
  damage(saved / "8")
  _restores(saved, 4)
  assert _names(saved) == {"4", "corrupt-8-2"}
  assert [m for m in _messages(caplog) if m == "corrupt-8, moved there at an earlier start, is removed"]


@pytest.mark.parametrize("interrupt", [_delete_manifest, _half_a_manifest, _empty])
def test_what_an_interrupted_save_left_is_removed(saved, caplog, interrupt):
  fault = interrupt(saved / "8")
  with Checkpointer(saved, read_only=True) as checkpointer:
    assert checkpointer.restore(ABSTRACT).step == 4
  assert _names(saved) == {"4", "8"}
  caplog.clear()
  _restores(saved, 4)
  assert _names(saved) == {"4"}
  assert _messages(caplog) == [f"checkpoint {saved / '8'}: {fault}; removed"]


def test_every_step_damaged_is_none(saved):
  for step in (4, 8):
    _truncate(saved / str(step))
  assert Checkpointer(saved).restore(ABSTRACT) is None
  assert _names(saved) == {"corrupt-4", "corrupt-8"}


def test_an_empty_directory_with_a_larger_number_is_no_step(saved):
  (saved / "100").mkdir()
  assert Checkpointer(saved).steps() == [4, 8]
  _restores(saved, 8)
  assert _names(saved) == {"4", "8"}


def test_saving_where_a_crash_left_a_directory(saved):
  (saved / "12").mkdir()
  with Checkpointer(saved) as checkpointer:
    checkpointer.save(12, _state(12), {"seen": 12})
  _restores(saved, 12)
  assert _names(saved) == {"8", "12"}


def test_what_orbax_and_an_interrupted_deletion_leave_is_no_step_and_is_removed(saved):
  shutil.copytree(saved / "8", saved / "12.orbax-checkpoint-tmp")
  shutil.copytree(saved / "8", saved / "deleting-2")
  assert Checkpointer(saved).steps() == [4, 8]
  _restores(saved, 8)
  with Checkpointer(saved) as checkpointer:
    checkpointer.save(12, _state(12), {"seen": 12})
  assert _names(saved) == {"8", "12"}


def test_a_step_asked_for_must_be_there_and_intact(saved):
  (saved / "12").mkdir()
  with Checkpointer(saved) as checkpointer:
    with pytest.raises(UserError, match=r"checkpoint 6 .* no such step; other steps there: \[4, 8\]"):
      checkpointer.restore(ABSTRACT, 6)
    with pytest.raises(UserError, match="the directory is empty"):
      checkpointer.restore(ABSTRACT, 12)
    fault = _truncate(saved / "8")
    with pytest.raises(UserError, match=r"other steps there: \[4\]") as error:
      checkpointer.restore(ABSTRACT, 8)
  assert fault in str(error.value)
  assert _names(saved) == {"4", "8", "12"}


@pytest.mark.parametrize("found", [1, FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused_and_stays(saved, found):
  path = saved / "8" / "manifest.json"
  manifest = json.loads(path.read_text())
  del manifest["sha256"]
  assert manifest.pop("format") == FORMAT
  path.write_bytes(checkpoint._sealed(manifest if found == 1 else {**manifest, "format": found}))
  before = path.read_bytes()
  with Checkpointer(saved) as checkpointer:
    for act in (lambda: checkpointer.restore(ABSTRACT), checkpointer.steps, checkpointer.host):
      with pytest.raises(UserError, match=f"manifest.json: this run has format {found}, and this version of dljax "
                                          f"reads format {FORMAT}; use the version that wrote it"):
        act()
  assert path.read_bytes() == before


def test_read_only_moves_and_deletes_nothing(saved, caplog):
  _truncate(saved / "8")
  shutil.copytree(saved / "4", saved / "12.orbax-checkpoint-tmp")
  before = sorted(saved.rglob("*"))
  with Checkpointer(saved, read_only=True) as checkpointer:
    assert checkpointer.restore(ABSTRACT).step == 4
  assert sorted(saved.rglob("*")) == before
  assert "instead of" in _messages(caplog)[0]


def test_some_arrays_can_be_had_without_knowing_the_state(saved):
  with Checkpointer(saved, read_only=True) as checkpointer:
    restored = checkpointer.restore_arrays(lambda names: [name for name in names if name.startswith("params/")])
    older = checkpointer.restore_arrays(lambda names: ["step"], 4)
  state = _state(8)
  assert restored.step == 8 and restored.host["seen"] == 8
  assert restored.state.keys() == {f"params/{module}/{name}" for module in state.params for name in ("bias", "kernel")}
  for module, arrays in state.params.items():
    for name, array in arrays.items():
      found = restored.state[f"params/{module}/{name}"]
      assert isinstance(found, np.ndarray) and found.dtype == array.dtype
      assert found.tobytes() == np.asarray(array).tobytes()
  assert older.state["step"] == 4
  _flip(_largest(saved / "8"), 5)
  with Checkpointer(saved, read_only=True) as checkpointer:
    assert checkpointer.restore_arrays(lambda names: ["step"]).step == 4
    with pytest.raises(UserError, match="differs from its SHA-256"):
      checkpointer.restore_arrays(lambda names: ["step"], 8)


@pytest.mark.parametrize("damage, fault", [
    (lambda path: path.write_text('["a", "c"]'), "differs from its SHA-256"),
    (lambda path: path.write_text("[]"), "bytes instead of"),
    (lambda path: path.unlink(), "is missing"),
])
def test_assets_are_verified(tmp_path, damage, fault):
  assets = tmp_path / "data" / "sub"
  assets.mkdir(parents=True)
  (assets / "classes.json").write_text('["a", "b"]')
  with Checkpointer(tmp_path / "checkpoints", assets=tmp_path / "data") as checkpointer:
    checkpointer.save(1, _state(1), {})
    assert checkpointer.restore(ABSTRACT).step == 1
    damage(assets / "classes.json")
    with pytest.raises(UserError, match=rf"data/sub/classes\.json: .*{fault}"):
      checkpointer.restore(ABSTRACT)


# Saves that fail


def test_a_refused_save_is_an_error(saved):
  with Checkpointer(saved) as checkpointer:
    for step in (6, 8):
      with pytest.raises(CheckpointError, match=f"checkpoint {step} in .* was not saved: "):
        checkpointer.save(step, _state(step), {"seen": step})
  _restores(saved, 8)
  assert _names(saved) == {"4", "8"}


def test_disk_full_is_raised_at_the_next_save_and_loses_nothing(saved, caplog, capfd):
  large = {"x": np.asarray(jax.random.normal(jax.random.key(0), (200_000,)))}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpointer = Checkpointer(saved)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    checkpointer.save(12, jax.device_put(large), {})
    with pytest.raises(CheckpointError, match=r"checkpoint 12 in .* not saved: .*File too large") as error:
      checkpointer.save(16, _state(16), {"seen": 16})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert "\n" not in str(error.value)
  assert _messages(caplog) == []
  assert capfd.readouterr().err == ""
  assert checkpointer.steps() == [4, 8]
  checkpointer.save(12, _state(12), {"seen": 12})  # with room again, all goes on
  checkpointer.close()
  _restores(saved, 12)
  assert _names(saved) == {"8", "12"}


def test_what_the_host_decided_later_takes_the_place_of_what_it_had(saved, monkeypatch):
  with Checkpointer(saved) as checkpointer:
    checkpointer.amend(8, {"best_step": 4, "seen": 8, "more": (1,)})
    assert checkpointer.host() == {"best_step": 4, "seen": 8, "more": [1]}
    monkeypatch.setattr(checkpoint.durable, "write", _full_disk)
    with pytest.raises(checkpoint.CheckpointError, match="checkpoint 8 in .* was not saved: .*No space left"):
      checkpointer.amend(8, {"best_step": None, "seen": 9})
  _restores(saved, 8)


def _full_disk(path, data):
  raise OSError(28, "No space left on device", str(path))


@pytest.mark.parametrize("leave", ["close", "save"])
def test_a_manifest_that_cannot_be_written_is_an_error(saved, monkeypatch, leave):
  def full(path, data):
    raise OSError(28, "No space left on device", str(path))

  checkpointer = Checkpointer(saved)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.durable, "write", full)
    checkpointer.save(12, _state(12), {"seen": 12})
    deadline = time.monotonic() + 30
    while not checkpointer.failed and time.monotonic() < deadline:
      time.sleep(0.01)
    assert checkpointer.failed  # without having waited or raised
    with pytest.raises(CheckpointError, match="checkpoint 12 in .* was not saved: .*No space left on device"):
      checkpointer.close() if leave == "close" else checkpointer.save(16, _state(16), {})
  assert not checkpointer.failed
  checkpointer.close()  # raised once
  assert checkpointer.steps() == [4, 8]
  _restores(saved, 8)


@pytest.mark.parametrize("payload", [
    " [os_error_code='28']", "",
    " [os_error_code='28' tensorstore_spec='{\\\"context\\\":{\\\"cache_pool\\\":{}}" + 300 * "x" + "}']\nand more"])
def test_an_error_of_tensorstore_ends_with_its_reason(saved, monkeypatch, payload):
  def full(path, data):
    raise ValueError(f'RESOURCE_EXHAUSTED: Error writing "w/0" [sic]: {250 * "x"}: No space left on device{payload}')

  with Checkpointer(saved) as checkpointer, monkeypatch.context() as patch:
    patch.setattr(checkpoint.durable, "write", full)
    checkpointer.save(12, _state(12), {"seen": 12})
    with pytest.raises(CheckpointError, match="checkpoint 12 in .* was not saved: [.]{3} .*x: No space left on device$"):
      checkpointer.wait()


def test_a_step_in_flight_is_not_there_yet(saved, monkeypatch):
  reached, go = threading.Event(), threading.Event()
  write = checkpoint.durable.write

  def slow(path, data):
    reached.set()
    assert go.wait(30)
    write(path, data)

  monkeypatch.setattr(checkpoint.durable, "write", slow)
  with Checkpointer(saved, keep=1) as checkpointer:
    checkpointer.save(12, _state(12), {"seen": 12})
    assert reached.wait(30)
    assert (saved / "12").is_dir()
    assert checkpointer.steps() == [4, 8]  # nor has anything older been deleted for it
    assert Checkpointer(saved, read_only=True).restore(ABSTRACT).step == 8
    go.set()
  assert checkpointer.steps() == [12]
  _restores(saved, 12)


def test_the_best_step_outlives_the_newest(tmp_path):
  with Checkpointer(tmp_path, keep=2) as checkpointer:
    kept = []
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6), (7, 6), (8, 6), (9, 6)):
      checkpointer.save(step, {"x": jnp.full(3, step)}, {"best_step": best})
      checkpointer.restore({"x": jnp.zeros(3, jnp.int32)}, step)  # waits
      kept.append(checkpointer.steps())
  assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8], [6, 8, 9]]
  assert _names(tmp_path) == {"6", "8", "9"}


# Other processes


def _environment() -> dict[str, str]:
  return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


_CHILD = textwrap.dedent("""
    import sys
    from dljax.train.checkpoint import Checkpointer
    assert not [name for name in sys.modules if name.startswith("orbax")]
    import jax.numpy as jnp, numpy as np
    import orbax.checkpoint
    directory, last = sys.argv[1], int(sys.argv[2])
    x = lambda step: np.random.default_rng(step).standard_normal(50_000)
    make = lambda step: {"x": jnp.asarray(x(step), jnp.float32), "step": jnp.int32(step)}
    abstract = make(0)
    print("ready", flush=True)
    sys.stdin.readline()
    with Checkpointer(directory) as checkpointer:
      restored = checkpointer.restore(abstract)
      step = restored.step if restored else 0
      assert restored is None or bool((restored.state["x"] == make(step)["x"]).all())
      while step < last:
        checkpointer.save(step + 1, make(step + 1), {"best_step": None})
        print(step, flush=True)  # the one before is on disk now
        step += 1
""")


def test_kill_9_leaves_an_intact_step_and_a_normal_exit_the_last_one(tmp_path):
  draw = random.Random(1)
  start = lambda last: subprocess.Popen(
      [sys.executable, "-c", _CHILD, str(tmp_path), str(last)], env=_environment(), text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  children = [start(10**6) for _ in range(4)]  # together: most of their time is imports
  newest = 0
  for child in children:
    assert child.stdout.readline() == "ready\n", child.stderr.read()
    child.stdin.write("\n")
    child.stdin.flush()
    child.stdout.readline()
    time.sleep(draw.uniform(0.05, 0.5))
    child.send_signal(signal.SIGKILL)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL  # and not of its own accord, on a wrong restore
    acknowledged = max([newest, *map(int, out.split())])
    probe = Checkpointer(tmp_path, read_only=True)
    newest = max(probe.steps(), default=0)
    assert newest >= acknowledged
    if newest == 0:
      continue
    restored = probe.restore({"x": jnp.zeros(50_000), "step": jnp.int32(0)})
    assert restored.step == newest == restored.state["step"]
    x = np.random.default_rng(newest).standard_normal(50_000)
    np.testing.assert_array_equal(restored.state["x"], x.astype(np.float32))
  assert newest > 0
  child = start(newest + 3)
  _, err = child.communicate("\n", timeout=60)
  assert child.returncode == 0
  assert all(line.endswith("; removed") for line in err.splitlines()), err
  assert max(Checkpointer(tmp_path).steps()) == newest + 3


_PROCESS = textwrap.dedent("""
    import os, sys
    import jax, numpy as np
    directory, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    from jax.experimental.multihost_utils import sync_global_devices
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from dljax.errors import UserError
    from dljax.train import checkpoint
    from dljax.train.checkpoint import Checkpointer, CheckpointError
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def make(step, spec):
      x = np.arange(32, dtype=np.float32).reshape(8, 4) + step
      return {"x": jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])}

    with Checkpointer(directory) as checkpointer:
      for step in (1, 2, 3, 4):
        checkpointer.save(step, make(step, P("data")), {"best_step": 1})
    assert checkpointer.steps() == [1, 3, 4], checkpointer.steps()
    sync_global_devices("both have looked")
    if process == 0:
      os.truncate(f"{directory}/4/state/manifest.ocdbt", 5)
    with Checkpointer(directory) as checkpointer:
      restored = checkpointer.restore(make(0, P()))
      assert restored.step == 3 and restored.host == {"best_step": 1}
      np.testing.assert_array_equal(np.asarray(restored.state["x"]), np.arange(32).reshape(8, 4) + 3)
      checkpointer.save(4, make(4, P()), {"best_step": 1})
      try:
        checkpointer.restore(make(0, P()), 9)
        raise AssertionError("step 9 does not exist")
      except UserError:
        pass
      assert checkpointer.restore(make(0, P("data"))).step == 4

    def full(path, data):
      raise OSError(28, "No space left on device")

    write, checkpoint.durable.write = checkpoint.durable.write, full  # only process 0 calls it
    with Checkpointer(directory) as checkpointer:
      checkpointer.save(5, make(5, P()), {"best_step": 1})
      try:
        checkpointer.save(6, make(6, P()), {"best_step": 1})
        raise AssertionError("step 5 was not saved")
      except CheckpointError as error:
        assert ("No space left" if process == 0 else "another process says why") in str(error), error
      checkpoint.durable.write = write
      checkpointer.save(6, make(6, P()), {"best_step": 1})
""")


def test_two_processes_agree(tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  environment = {**_environment(), "XLA_FLAGS": xla_flags(2)}
  children = [
      subprocess.Popen(
          [sys.executable, "-c", _PROCESS, str(tmp_path / "checkpoints"), str(port), str(process)],
          env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
      for process in range(2)
  ]
  try:
    for child in children:
      _, err = child.communicate(timeout=120)
      assert child.returncode == 0, err
  finally:
    for child in children:
      child.kill()
  assert {"1", "4", "6", "corrupt-4"} <= _names(tmp_path / "checkpoints")
