"""What a task draws by row is the same under every mode, mesh, accumulation and evaluation batch size."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dljax.tasks.base import LossOutput, TaskBase, dropout_key, named_key, row_keys
from dljax.train import step
from dljax.train.state import EVALUATION, INIT, NOT_FAILED, TrainState
from tests.command import xla_flags
from tests.train import rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone():
  """Training in float64 and evaluation on one device, in one piece."""
  with jax.enable_x64(True):
    state, outs = rows.trained("jit", "data:1")
  return state, outs, rows.evaluated("jit", "data:1", 8)


def _losses(outs):
  return np.array([[float(out["critic_loss"]), float(out["generator_loss"])] for out in outs])


@pytest.mark.parametrize("mode, mesh, accumulation", [
    ("jit", "data:4", 1), ("pmap", "data:4", 1), ("jit", "data:2,fsdp:2", 1), ("jit", "data:1", 4),
    ("jit", "data:4", 2), ("pmap", "data:4", 2), ("jit", "data:2,fsdp:2", 2)])
def test_a_step_draws_by_row(alone, mode, mesh, accumulation):
  state, outs, _ = alone
  with jax.enable_x64(True):
    other, other_outs = rows.trained(mode, mesh, accumulation)
  np.testing.assert_allclose(_losses(other_outs), _losses(outs), rtol=1e-12)
  gap = rows.toys.difference(
      (state.params, state.opt_state, state.ema), (other.params, other.opt_state, other.ema))
  assert gap < 1e-12


@pytest.mark.parametrize("mode, mesh, batch_size", [
    ("jit", "data:4", 32), ("jit", "data:2,fsdp:2", 8), ("jit", "data:1", 50), ("pmap", "data:4", 8),
    ("jit", "data:2,fsdp:2", 32)])
def test_an_evaluation_draws_by_row(alone, mode, mesh, batch_size):
  _, _, (metrics, predictions) = alone
  other, other_predictions = rows.evaluated(mode, mesh, batch_size)
  assert other == pytest.approx(metrics, rel=1e-6)
  np.testing.assert_allclose(other_predictions, predictions, rtol=1e-6, atol=1e-6)


def test_draws_differ_by_row_step_turn_player_and_purpose(alone):
  _, outs, (metrics, predictions) = alone
  assert len(np.unique(predictions.round(6), axis=0)) == rows.EXAMPLES
  assert len(np.unique(_losses(outs).round(9))) == 4
  key, batch = jax.random.key(0), {"id": np.arange(5, dtype=np.int32)}
  keys = [*row_keys(key, batch), named_key(key, "a"), named_key(key, "b"), dropout_key(key, batch)]
  keys += [jax.random.fold_in(key, number) for number in (INIT, EVALUATION)]
  second = {"id": np.arange(1, 5, dtype=np.int32)}
  keys.append(dropout_key(key, second))
  assert len({tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}) == len(keys)
  assert all(number not in range(2**31) for number in (INIT, EVALUATION))  # a step's number is


@pytest.fixture(scope="module")
def two_processes():
  """What each of two processes printed."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  env = {**os.environ, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
         "XLA_FLAGS": xla_flags(2)}
  both = [subprocess.Popen(
      [sys.executable, "-m", "tests.train.rows"], cwd=ROOT, env={**env, "JAX_PROCESS_ID": str(index)},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for index in range(2)]
  try:
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said[0][1] + said[1][1]
  finally:
    for process in both:
      process.kill()
  # The other lines are Gloo's.
  return [json.loads(next(line for line in out.splitlines() if line.startswith("{"))) for out, _ in said]


def test_two_processes_draw_what_one_draws(alone, two_processes):
  state, outs, (metrics, predictions) = alone
  found = two_processes[0]
  assert found["metrics"] == pytest.approx(metrics, rel=1e-6)
  np.testing.assert_allclose(found["predictions"], predictions, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(found["losses"], _losses(outs), rtol=1e-12)
  for one, other in zip(jax.tree.leaves(state.params), found["parameters"], strict=True):
    np.testing.assert_allclose(other, one.ravel(), rtol=1e-12)


def test_rows_and_their_texts_are_gathered_over_two_processes(two_processes):
  for found in two_processes:
    assert found["gathered"] == {"x": [2**40 + i for i in range(4)], "host/group/place": ["a", "Łódź", "", "a longer one"]}


def test_rows_of_a_result_are_drawn_from_two_processes(two_processes):
  for found in two_processes:
    assert found["drawn"] == [12, 2, 6]


class _Keys(TaskBase):
  """Reports the key that each call gets, as [2] numbers."""

  players = ("critic", "generator")

  def denominators(self, batch):
    return {}

  def loss(self, params, model_state, batch, rng, *, denominators, train, player):
    key = jax.random.key_data(rng)
    return LossOutput(
        loss=params[player]["w"], metrics={player: (key, jnp.ones_like(key))}, model_state=model_state)

  def predict(self, variables, batch, rng, context):
    return {"key": jax.random.key_data(rng)}


def test_every_step_and_turn_has_a_key_and_evaluation_and_prediction_share_another():
  """Without the fold of the step, of the turn or of evaluation's constant, two of these would be equal."""
  params = {player: {"w": np.zeros((), np.float32)} for player in _Keys.players}
  tx = {player: optax.sgd(0.1) for player in _Keys.players}
  state = TrainState(
      step=np.int32(0), params=params, model_state={}, rng=jax.random.key_data(jax.random.key(5)), ema={},
      opt_state={player: tx[player].init(params[player]) for player in tx}, failed_step=np.int32(NOT_FAILED))
  train = jax.jit(step.make_train_step(_Keys(), tx, dict.fromkeys(tx, lambda turn: turn)))
  evaluate = jax.jit(step.make_eval_step(_Keys(), predictions=True))
  predict = jax.jit(step.make_predict_step(_Keys()))
  batch = {"id": np.arange(2, dtype=np.int32), "mask": np.ones(2, np.float32)}
  keys = [state.rng, jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(state.rng), INIT))]
  for _ in range(2):
    state, out = train(state, batch, np.float32(1))
    keys += [out["sums"][player][0] for player in _Keys.players]
  sums, predicted, _ = evaluate(state.variables, state.rng, batch, {})
  again, = predict(state.variables, state.rng, batch, {})
  keys.append(predicted["key"])
  assert len({tuple(np.asarray(key).tolist()) for key in keys}) == 2 + 2 * 2 + 1
  for key in (sums["critic"][0], sums["generator"][0], again["key"]):
    np.testing.assert_array_equal(key, predicted["key"])
