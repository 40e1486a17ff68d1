"""The pure step, against the same arithmetic done by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.errors import UserError
from dljax.train.evaluate import Evaluator
from dljax.train.state import NOT_FAILED, average, averaged, state_sha256
from tests.train import toys

MODES = ["jit", "pmap"]


def _rows(value: float = 1.0) -> dict[str, np.ndarray]:
  """A batch whose every row has x = value."""
  return {"x": np.full(toys.BATCH_SIZE, value, np.float32), "mask": np.ones(toys.BATCH_SIZE, np.float32)}


def _parabola(target: float = 0.0):
  """Rows of the loss (w - target x)^2 / 2, whose gradient for w is w - target x."""
  return lambda params, batch, train, player: (params["w"] - target * batch["x"])**2 / 2


# Optimizers, schedules and averages


def test_the_average_of_the_parameters_by_hand_and_evaluation_uses_it():
  task = toys.Formula(params={"w": 1.0}, rows=_parabola())
  pipeline = toys.Scripted(lambda step: _rows())
  experiment = toys.formula_experiment(task, pipeline, ema_decay=0.5, optimizer={"learning_rate": 0.1})
  state, _, program = toys.train(experiment, 12)

  w = average = 1.0
  for step in range(12):
    w -= 0.1 * w
    decay = min(0.5, (1 + step) / (10 + step))  # the ramp ends at step 8
    average = decay * average + (1 - decay) * w
  np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
  np.testing.assert_allclose(state.ema["params"]["w"], average, rtol=1e-5)

  evaluator = Evaluator(task, "jit", program.mesh)
  placed = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, program.abstract_state)
  found = evaluator.sums(placed.variables, placed.rng, pipeline, "validation")
  assert found["all_loss"] == pytest.approx(average**2 / 2, rel=1e-5)
  assert abs(average - w) > 0.01


def test_the_learning_rate_scale_scales_the_update_exactly():
  start = np.float32(np.linspace(-1, 3, 8)[:, None] * np.ones(3))

  def final(learning_rate, lr_scales, program=None):
    task = toys.Formula(params={"w": start},
                        rows=lambda params, batch, train, player: jnp.sum(jnp.sin(params["w"])) * batch["x"])
    optimizer = {"name": "adamw", "learning_rate": learning_rate, "weight_decay": 0.1}
    experiment = toys.formula_experiment(task, toys.Scripted(lambda step: _rows()), optimizer=optimizer)
    return toys.train(experiment, 3, lr_scales=lr_scales, program=program)

  scaled, plain = final(0.02, [0.5] * 3), final(0.01, None)  # a power of two: nothing is rounded otherwise
  assert state_sha256(scaled.state) == state_sha256(plain.state)
  assert [out["learning_rate"] for out in scaled.outs] == pytest.approx([0.01] * 3)
  still = final(0.02, [0.0] * 3, scaled.program)
  np.testing.assert_array_equal(still.state.params["w"], start)


@pytest.mark.parametrize("mode", MODES)
def test_players_move_in_turn_against_each_others_newest_parameters(mode):
  def rows(params, batch, train, player):
    critic, generator = params["critic"]["w"], params["generator"]["w"]
    return (critic - 2 * generator)**2 / 2 * batch["x"] if player == "critic" else (generator + critic)**2 / 2

  start = {"critic": 1.0, "generator": -0.5}
  task = toys.Formula(
      params={player: {"w": w} for player, w in start.items()}, rows=rows,
      players=("critic", "critic", "generator"))
  steps, rates = 4, {"critic": 0.1, "generator": 0.05}
  experiment = toys.formula_experiment(
      task, toys.Scripted(lambda step: _rows()), total_steps=steps,
      optimizers={player: {"name": "momentum", "learning_rate": rate, "momentum": 0.5, "schedule": "linear"}
                  for player, rate in rates.items()})
  state, outs, _ = toys.train(experiment, steps, parallelism=mode)

  w, memory, turns = dict(start), dict.fromkeys(start, 0.0), dict.fromkeys(start, 0)
  for step in range(steps):
    losses, norms, shares = {}, {}, {}
    for player in task.players:
      if player == "critic":
        gradient = w["critic"] - 2 * w["generator"]
      else:
        gradient = w["generator"] + w["critic"]
      losses[player], norms[player] = gradient**2 / 2, abs(gradient)
      memory[player] = 0.5 * memory[player] + gradient
      shares[player] = turns[player] / (steps * task.players.count(player))  # each walks once through the schedule
      w[player] -= rates[player] * (1 - shares[player]) * memory[player]
      turns[player] += 1
    for player, rate in rates.items():
      assert outs[step][f"{player}_loss"] == pytest.approx(losses[player], rel=1e-4)
      assert outs[step][f"{player}_gradient_norm"] == pytest.approx(norms[player], rel=1e-4)
      assert outs[step][f"{player}_learning_rate"] == pytest.approx(rate * (1 - shares[player]))
    found = task.summarize(outs[step]["sums"])
    assert found == {f"{player}_loss": pytest.approx(loss, rel=1e-4) for player, loss in losses.items()}
  for player in w:
    np.testing.assert_allclose(state.params[player]["w"], w[player], rtol=1e-4)
    np.testing.assert_allclose(state.opt_state[player][0].trace["w"], memory[player], rtol=1e-4)


# Compute in bfloat16, and again instead of stored


@functools.cache
def _trained_mlp(**fields):
  return toys.train(toys.digits_experiment(toys.tiny_mlp(**fields), optimizer={"name": "adam"}), 3)


def test_bfloat16_computes_about_the_same_with_float32_parameters():
  full, half = _trained_mlp(), _trained_mlp(dtype=jnp.bfloat16)
  for a, b in zip(jax.tree.leaves(full.state), jax.tree.leaves(half.state), strict=True):
    assert a.dtype == b.dtype != jnp.bfloat16
  for a, b in zip(full.outs, half.outs, strict=True):
    assert a["loss"] != b["loss"]
    assert b["loss"] == pytest.approx(a["loss"], rel=0.05)


@pytest.mark.parametrize("model", [toys.tiny_mlp, functools.partial(toys.tiny_resnet, stage_sizes=(1,))])
def test_rematerialisation_changes_nothing(model):
  stored = toys.train(toys.digits_experiment(model()), 1, mesh="data:1")
  again = toys.train(toys.digits_experiment(model(remat=True)), 1, mesh="data:1")
  assert toys.difference(stored.outs, again.outs) < 1e-5
  gradients = [outcome.state.opt_state["all"][0].trace for outcome in (stored, again)]
  scale = max(np.max(np.abs(g)) for g in jax.tree.leaves(gradients))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale), *gradients)
  lowered = again.program.lower_train_step().as_text()
  assert "optimization_barrier" in lowered  # it was not optimised away


# A step that went wrong


def _root(params, batch, train, player):
  """Finite everywhere; the gradient at w = 0 is not."""
  return jnp.sqrt(params["w"]) * batch["x"]


@functools.cache
def _parabola_program(mode):
  return toys.make_program(_parabola_experiment([_rows()]), mode)


def _parabola_experiment(batches):
  task = toys.Formula(params={"w": 1.0}, rows=_parabola(target=0.5))
  return toys.formula_experiment(
      task, toys.Scripted(lambda step: batches[step]), ema_decay=0.5, optimizer={"name": "adam"})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_went_wrong_changes_nothing_and_nor_do_later_ones(mode, bad):
  batches = [_rows(), _rows(), _rows(), _rows(), _rows()]
  batches[2]["x"][3] = bad  # one row on one device
  experiment, program = _parabola_experiment(batches), _parabola_program(mode)
  before = toys.train(experiment, 2, parallelism=mode, program=program).state
  state, outs, _ = toys.train(experiment, 5, parallelism=mode, program=program)
  assert [int(out["failed_step"]) for out in outs] == [NOT_FAILED, NOT_FAILED, 3, 3, 3]
  assert int(state.step) == 2
  assert state_sha256(state.replace(failed_step=before.failed_step)) == state_sha256(before)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_that_is_not_finite_is_as_bad_as_a_loss(accumulation):
  task = toys.Formula(params={"w": 0.0}, rows=_root)
  experiment = toys.formula_experiment(task, toys.Scripted(lambda step: _rows()), accumulation=accumulation)
  state, (out,), _ = toys.train(experiment, 1)
  assert out["loss"] == 0
  assert int(out["failed_step"]) == 1
  assert (int(state.step), float(state.params["w"])) == (0, 0)


def test_a_player_that_went_wrong_takes_back_the_others_turns():
  def rows(params, batch, train, player):
    if player == "critic":
      return (params["critic"]["w"] - 1)**2 * batch["x"]
    return _root(params["generator"], batch, train, player)

  task = toys.Formula(
      params={"critic": {"w": 0.0}, "generator": {"w": 0.0}}, rows=rows, players=("critic", "generator"))
  experiment = toys.formula_experiment(
      task, toys.Scripted(lambda step: _rows()), optimizers=dict.fromkeys(task.players, {}))
  state, (out,), _ = toys.train(experiment, 1)
  assert int(out["failed_step"]) == 1
  assert float(state.params["critic"]["w"]) == 0


def test_every_players_loss_has_to_be_finite():
  """The first player's loss is infinite, with a gradient of 0: neither the norm nor the other's loss says so."""
  def rows(params, batch, train, player):
    loss = jnp.full_like(batch["x"], jnp.inf) if player == "critic" else batch["x"]
    return jax.lax.stop_gradient(loss) + 0 * params[player]["w"]

  task = toys.Formula(
      params={"critic": {"w": 0.0}, "generator": {"w": 0.0}}, rows=rows, players=("critic", "generator"))
  experiment = toys.formula_experiment(
      task, toys.Scripted(lambda step: _rows()), optimizers=dict.fromkeys(task.players, {}))
  _, (out,), _ = toys.train(experiment, 1)
  assert out["critic_gradient_norm"] == out["generator_gradient_norm"] == 0
  assert int(out["failed_step"]) == 1


@functools.cache
def _conv_net_program():
  return toys.make_program(toys.digits_experiment(toys.ConvNet(), ema_decay=0.9))


def _trained_conv_net(steps, **fields):
  experiment = toys.digits_experiment(toys.ConvNet(), ema_decay=0.9, **fields)
  return toys.train(experiment, steps, program=_conv_net_program())


def test_padding_alone_is_no_step_to_learn_from():
  """A batch without a real row has loss 0 and gradient 0, and fails nothing."""
  start = _trained_conv_net(0).state
  state, (out,), _ = _trained_conv_net(1, mask=lambda step: np.zeros(toys.BATCH_SIZE, np.float32))
  assert (float(out["loss"]), float(out["gradient_norm"]), int(out["failed_step"])) == (0, 0, NOT_FAILED)
  assert toys.difference((start.params, start.model_state), (state.params, state.model_state)) == 0


def test_every_number_of_a_step_is_there():
  out = _trained_mlp().outs[0]
  assert set(out) == {"loss", "learning_rate", "gradient_norm", "parameter_norm", "failed_step", "sums"}
  assert all(np.shape(v) == () for k, v in out.items() if k != "sums")
  total, count = out["sums"]["loss"]
  assert count == 8  # uneven_mask's
  assert out["loss"] == pytest.approx(total / count, rel=1e-6)


# Rows of one's own, and rows that see each other


@pytest.mark.parametrize("mode", MODES)
def test_the_turns_of_a_player_read_their_own_rows(mode):
  """Rows of even ids say 1 and those of odd ids 3; the critic moves twice, the generator once."""
  def rows(params, batch, train, player):
    return params[player]["w"] * batch["x"]  # the gradient is the mean of x over the rows that the turn reads

  task = toys.Formula(
      params={"critic": {"w": 0.0}, "generator": {"w": 0.0}}, rows=rows,
      players=("critic", "generator", "critic"))
  batch = {"x": np.where(np.arange(toys.BATCH_SIZE) % 2, 3, 1).astype(np.float32),
           "mask": np.roll(np.ones(toys.BATCH_SIZE, np.float32) * (np.arange(toys.BATCH_SIZE) < 13), 1)}
  optimizers = dict.fromkeys(("critic", "generator"), {"learning_rate": 1.0})
  moved = {}
  for parts in (1, 2):
    part = dataclasses.replace(task)
    object.__setattr__(part, "own_rows", parts)
    experiment = toys.formula_experiment(part, toys.Scripted(lambda step: batch), optimizers=optimizers)
    state, _, _ = toys.train(experiment, 1, parallelism=mode)
    moved[parts] = {player: -float(state.params[player]["w"]) for player in state.params}
  mean = (batch["x"] * batch["mask"]).sum() / batch["mask"].sum()
  assert moved[1] == pytest.approx({"critic": 2 * mean, "generator": mean}, rel=1e-6)
  assert moved[2] == pytest.approx({"critic": 1 + 3, "generator": 1}, rel=1e-6)


def test_parts_and_micro_batches_that_a_task_cannot_have_are_refused():
  task = toys.Formula(
      params={"critic": {"w": 0.0}, "generator": {"w": 0.0}}, rows=None, players=("critic",) * 3 + ("generator",))
  experiment = toys.formula_experiment(
      task, toys.Scripted(lambda step: _rows()), optimizers=dict.fromkeys(task.players, {}), accumulation=4)
  for field, value, error, message in (
      ("own_rows", 2, ValueError, "own_rows is 2, too few parts for a player with 3 turns"),
      ("own_rows", 4, UserError, "--config.batch_size=16 does not divide over 4 devices times 4 micro-batches times 4 "
                                 "parts of a batch; choose a multiple of 64"),
      ("couples_rows", True, UserError, "--config.accumulation=4: the rows of a batch see each other here")):
    part = dataclasses.replace(task)
    object.__setattr__(part, field, value)
    with pytest.raises(error, match=message):
      toys.train(dataclasses.replace(experiment, task=part), 0)


# What is averaged


def test_batch_statistics_are_averaged_and_counters_are_not():
  old = {"params": {"w": jnp.array([1.0])}, "batch_stats": {"mean": jnp.array([2.0]), "count": jnp.array([3])}}
  new = {"params": {"w": jnp.array([3.0])}, "batch_stats": {"mean": jnp.array([6.0]), "count": jnp.array([4])},
         "spectral": {"u": jnp.array([9.0])}}
  state = {k: v for k, v in new.items() if k != "params"}
  found = average(old, averaged(new["params"], state), jnp.float32(0.75))
  assert jax.tree.map(lambda x: x.tolist(), found) == {
      "params": {"w": [1.5]}, "batch_stats": {"mean": [3.0], "count": [4]}}


def test_evaluation_uses_the_averaged_statistics():
  states = [_trained_conv_net(steps).state for steps in range(4)]
  state, expected = states[-1], states[0].model_state["batch_stats"]
  for step in range(1, 4):
    running = states[step].model_state["batch_stats"]
    decay = min(0.9, step / (9 + step))
    expected = jax.tree.map(lambda e, x: decay * e + (1 - decay) * x, expected, running)
  assert toys.difference(state.variables["batch_stats"], expected) < 1e-5
  assert toys.difference(state.variables["batch_stats"], running) > 0.01


def test_a_players_optimizer_freezes_and_scales_by_paths_that_begin_with_the_player():
  def rows(params, batch, train, player):
    return sum(jax.tree.leaves(params[player])) * batch["x"]

  task = toys.Formula(
      params={"critic": {"a": 0.0, "b": 0.0}, "generator": {"a": 0.0, "b": 0.0}}, rows=rows,
      players=("critic", "generator"))
  experiment = toys.formula_experiment(task, toys.Scripted(lambda step: _rows()), optimizers={
      "critic": {"learning_rate": 1.0, "freeze": ("critic/a",)},
      "generator": {"learning_rate": 1.0, "learning_rates": ("generator/b=0.5",)}})
  state, _, _ = toys.train(experiment, 1, mesh="data:1")
  moved = jax.tree.map(lambda x: -float(x), state.params)
  assert moved == {"critic": {"a": 0, "b": 1}, "generator": {"a": 1, "b": 0.5}}
  experiment.config.optimizers.critic.plateau_factor = 0.5
  with pytest.raises(UserError, match="--config.optimizers.generator.plateau_factor=1.0: all players share"):
    toys.train(experiment, 0)
