"""A recurrent carry in the model state: the same rows under every mode, kept, saved, reset and never mixed up."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax import report
from dljax.tasks.base import LossOutput, TaskBase
from dljax.train import flops, inspect, parallel, pretrained
from dljax.train.checkpoint import Checkpointer
from dljax.train.evaluate import Evaluator, Predictor
from dljax.train.loop import fit
from dljax.train.program import Program, RunOptions
from dljax.train.state import state_sha256
from tests.train import toys

MODES = [("jit", "data:1"), ("jit", "data:4"), ("pmap", "data:4"), ("jit", "data:2,fsdp:2")]
LENGTH, WIDTH = 3, 4
STILL = [1e-30] * 6  # scales of the learning rate by which the parameters stay as they are
OPTIONS = RunOptions(mesh=toys.MESHES["data:1"], progress=False)


class Recurrent(nn.Module):
  """An Elman network that guesses the next number."""

  @nn.compact
  def __call__(self, x, carry, train=False):
    inner, outer = nn.Dense(WIDTH, name="inner"), nn.Dense(1, name="outer")
    h, outputs = carry["h"], []
    for step in range(x.shape[1] - 1):
      h = jnp.tanh(inner(jnp.concatenate([x[:, step, None], h], axis=1)))
      outputs.append(outer(h)[:, 0])
    return jnp.stack(outputs, axis=1), {"h": h, "seen": carry["seen"] + x.shape[1] - 1}


def _zeros(rows):
  return {"h": jnp.zeros((rows, WIDTH)), "seen": jnp.zeros(rows, jnp.int32)}


@dataclasses.dataclass(frozen=True)
class NextNumber(TaskBase):
  """Batches have x [B, LENGTH + 1], reset and mask [B]."""

  model: nn.Module = Recurrent()

  def init(self, rng, batch):
    carry = _zeros(len(batch["x"]))
    return {**self.model.init(rng, batch["x"], carry), "carry": carry}

  def denominators(self, batch):
    return {"rows": jnp.sum(batch["mask"])}

  def loss(self, params, model_state, batch, rng, *, denominators, train, player):
    guess, carry = self.model.apply({"params": params}, batch["x"], model_state["carry"], train=train)
    losses = jnp.mean((guess - batch["x"][:, 1:])**2, axis=1) * batch["mask"]
    return LossOutput(
        loss=jnp.sum(losses) / denominators["rows"], metrics={"loss": (jnp.sum(losses), jnp.sum(batch["mask"]))},
        model_state={**model_state, "carry": carry})

  def predict(self, variables, batch, rng, context=None):
    carry = variables.get("carry") or _zeros(len(batch["x"]))
    return {"guess": self.model.apply({"params": variables["params"]}, batch["x"], carry)[0]}


def _numbers(rows=toys.BATCH_SIZE, length=200):
  """Row i is a stream of numbers, [rows, length]."""
  return np.random.default_rng(7).normal(size=(rows, length)).astype(np.float32)


def _windows(step, *, rows=toys.BATCH_SIZE, resets=lambda step: step == 0):
  x = _numbers(rows)[:, step * LENGTH:(step + 1) * LENGTH + 1]
  return {"x": x, "mask": toys.uneven_mask(step)[:rows] if rows == toys.BATCH_SIZE else np.ones(rows, np.float32),
          "reset": np.broadcast_to(np.asarray(resets(step), np.float32), rows).copy()}


def _experiment(train=_windows, evals=None, **fields):
  fields = {"total_steps": 6, "log_every": 2, "eval_every": 6, "checkpoint_every": 3,
            "optimizer": {"learning_rate": 0.1}, **fields}
  return toys.formula_experiment(NextNumber(), toys.Scripted(train), evals, **fields)


@functools.cache
def _program(mode, mesh, accumulation=1):
  return toys.make_program(_experiment(accumulation=accumulation), mode, mesh)


def _train(steps, mode="jit", mesh="data:4", accumulation=1, train=_windows, lr_scales=None):
  """`toys.train`, by programs that the tests share."""
  return toys.train(
      _experiment(train), steps, parallelism=mode, mesh=mesh, lr_scales=lr_scales,
      program=_program(mode, mesh, accumulation))


def _carry(state):
  return jax.tree.map(np.asarray, state.model_state["carry"])


def _expected(params, steps, resets=lambda step: step == 0):
  """h after `steps` windows with constant parameters."""
  kernel, bias = (np.asarray(params["inner"][name]) for name in ("kernel", "bias"))
  h = np.zeros((toys.BATCH_SIZE, WIDTH))
  for batch in (_windows(step, resets=resets) for step in range(steps)):
    h = h * (batch["reset"][:, None] == 0)
    for step in range(LENGTH):
      h = np.tanh(np.concatenate([batch["x"][:, step, None], h], axis=1) @ kernel + bias)
  return h


@pytest.mark.parametrize("mode, mesh, accumulation", [*((*mode, 1) for mode in MODES), (*MODES[1], 2)])
def test_each_row_has_its_own_carry_from_batch_to_batch(mode, mesh, accumulation):
  state, outs, _ = _train(4, mode, mesh, accumulation, lr_scales=STILL)
  np.testing.assert_allclose(_carry(state)["h"], _expected(state.params, 4), atol=1e-6)
  np.testing.assert_array_equal(_carry(state)["seen"], 4 * LENGTH)
  assert outs[-1]["failed_step"] == -1


def test_rows_that_are_reset_begin_anew():
  resets = lambda step: np.arange(toys.BATCH_SIZE) % 3 == step % 3
  train = lambda step: _windows(step, resets=resets)
  state, _, _ = _train(5, train=train, lr_scales=STILL)
  np.testing.assert_allclose(_carry(state)["h"], _expected(state.params, 5, resets), atol=1e-6)
  seen = [LENGTH * (1 + (4 - row) % 3) for row in range(toys.BATCH_SIZE)]
  np.testing.assert_array_equal(_carry(state)["seen"], seen)


@pytest.mark.parametrize("mode, mesh, accumulation", [(*MODES[0], 4), (*MODES[1], 1), (*MODES[2], 1), (*MODES[2], 2),
                                                      (*MODES[3], 1)])
def test_training_is_the_same_however_the_rows_are_spread(mode, mesh, accumulation):
  one, other = _train(5, mesh="data:1"), _train(5, mode, mesh, accumulation)
  assert toys.difference(one.state.params, other.state.params) < 1e-5
  assert toys.difference(_carry(one.state), _carry(other.state)) < 1e-5
  assert toys.difference([o["loss"] for o in one.outs], [o["loss"] for o in other.outs]) < 1e-5


@pytest.mark.parametrize("mode, mesh", MODES[1:])
def test_the_carry_is_split_as_the_batch_is_and_the_step_compiled_once(mode, mesh, caplog):
  program = Program(_experiment(), RunOptions(parallelism=mode, mesh=toys.MESHES[mesh]))
  assert program.abstract_state.model_state["carry"]["h"].shape == (toys.BATCH_SIZE, WIDTH)
  state = parallel.step_state(program.init_state(), mode, program.mesh)
  for step in range(3):
    batch = parallel.put_batch(_windows(step), mode, program.mesh)
    scale = parallel.put_shared(np.float32(1), program.mesh)
    with jax.transfer_guard("disallow"), jax.log_compiles():
      state, _ = jax.block_until_ready(program.train_step(state, batch, scale))
    assert step == 0 or "Compiling" not in caplog.text
    caplog.clear()
  h = parallel.global_state(state, mode, program.mesh).model_state["carry"]["h"]
  assert h.shape == (toys.BATCH_SIZE, WIDTH) and h.sharding == parallel.batch_sharding(program.mesh)
  assert {shard.data.shape for shard in h.addressable_shards} == {(toys.BATCH_SIZE // 4, WIDTH)}


def test_accumulation_and_the_carry_move_no_rows_between_devices():
  def summary(accumulation):
    return inspect.summarize_compiled(_program("jit", "data:4", accumulation).lower_train_step().compile())

  assert {c.kind for k in (1, 2) for c in summary(k).collectives} == {"all-reduce"}


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_a_dry_run_sees_the_carry(mode):
  experiment = _experiment()
  program = _program(mode, "data:4")
  program.lower_train_step().compile()
  assert program.train_step_flops() > 0
  assert sum(row.parameters for row in flops.task_layers(experiment.task, experiment.data.batch_spec)) == 6 * WIDTH + 5


def test_a_step_that_went_wrong_leaves_the_carry():
  def train(step):
    batch = _windows(step)
    if step == 2:
      batch["x"][0, 0] = np.nan
    return batch

  before, after = (_train(steps, train=train).state for steps in (2, 4))
  assert after.failed_step == 3 and after.step == 2
  assert toys.difference(_carry(before), _carry(after)) == 0


# Evaluation


def _split(rows, batches):
  return toys.Scripted(lambda step: _windows(step, rows=rows), num_batches=batches)


@jax.jit
def _guess(params, x):
  return Recurrent().apply({"params": params}, x, _zeros(len(x)))[0]


@pytest.mark.parametrize("mode, mesh", MODES)
def test_evaluation_starts_from_zeros_and_carries_over_its_batches(mode, mesh):
  """Twice the rows of training, and the carry of training must not matter."""
  experiment = _experiment()
  program = _program(mode, mesh)
  evaluator = Evaluator(experiment.task, mode, program.mesh)
  state = program.init_state()
  carry = jax.tree.map(
      lambda x: jax.device_put(np.asarray(x) + x.dtype.type(100), x.sharding), state.model_state["carry"])
  state = state.replace(model_state={**state.model_state, "carry": carry})
  rows, steps = 2 * toys.BATCH_SIZE, 4
  found = [evaluator.sums(state.variables, state.rng, _split(rows, steps), "test")["loss"] for _ in range(2)]
  assert found[0] == found[1]
  x = _numbers(rows)[:, :steps * LENGTH + 1]
  params = jax.tree.map(np.asarray, state.params)
  guess = _guess(params, x)
  assert found[0] == pytest.approx(float(np.mean((guess - x[:, 1:])**2)), rel=1e-5)
  assert evaluator.metric_names(program.abstract_state.variables, program.abstract_state.rng, _split(rows, 1)) == [
      "loss"]
  evaluator.full(state.variables, state.rng, _split(rows, steps), "test", {})

  one = {k: v[:5] for k, v in _windows(0).items()}
  predicted = Predictor(experiment, program, mode)(state, one)
  np.testing.assert_allclose(predicted["guess"], _guess(params, one["x"]), atol=1e-5)


# Checkpoints


@pytest.mark.parametrize("mode, mesh", MODES[:3])
def test_a_run_that_is_resumed_ends_in_the_same_bits(mode, mesh, tmp_path, monkeypatch):
  monkeypatch.setattr(report, "save", lambda figure, path, title="": path.touch())
  options = dataclasses.replace(OPTIONS, parallelism=mode, mesh=toys.MESHES[mesh])
  evals = {"validation": _split(toys.BATCH_SIZE, 2)}
  whole = fit(_experiment(evals=evals), tmp_path / "whole", options)
  fit(_experiment(evals=evals, total_steps=3), tmp_path / "parts", options)
  resumed = fit(_experiment(evals=evals), tmp_path / "parts", options)
  assert np.all(_carry(whole)["seen"] == 6 * LENGTH)
  assert state_sha256(whole) == state_sha256(resumed)
  assert json.loads((tmp_path / "whole/result.json").read_text())["state_sha256"] == state_sha256(whole)


def test_a_carry_saved_by_one_mode_is_read_by_another(tmp_path):
  saved, _, program = _train(3, "pmap")
  state = jax.device_put(saved, parallel.state_shardings(saved, program.mesh, parallel.Sharding((), 0)))
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(3, state, {})
  other = _program("jit", "data:2,fsdp:2")
  with Checkpointer(tmp_path) as checkpointer:
    restored = checkpointer.restore(other.abstract_state).state
  assert state_sha256(parallel.state_to_host(restored)) == state_sha256(saved)
  assert restored.model_state["carry"]["h"].sharding == parallel.batch_sharding(other.mesh)


def test_starting_from_a_run_takes_no_carry_along(tmp_path, monkeypatch):
  monkeypatch.setattr(report, "save", lambda figure, path, title="": path.touch())
  state = fit(_experiment(), tmp_path / "old", OPTIONS)
  experiment = _experiment(init={"source": str(tmp_path / "old"), "format": "", "new_head": False})
  program = Program(experiment, OPTIONS)
  weights = pretrained.load(experiment, program.abstract_state)
  started = weights.put(program.init_state())
  assert "4 of 4 arrays" in weights.summary
  assert toys.difference(started.params, state.params) == 0
  assert not np.any(_carry(started)["h"])
