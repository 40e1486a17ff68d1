"""The pure train and eval steps, shared by every family.

Nothing here knows about devices: `parallel.compile_step` compiles the same functions for jit on
any mesh and for pmap. Losses are shares that add up (see `tasks.base.LossOutput`), so their sum over
micro-batches (a scan, here) and over devices (`collectives.psum`) is the global loss. A task's key
is the same on all devices and for all micro-batches; draws that differ by row come from the row's
id (`tasks.base.row_keys`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dljax.ops import collectives
from dljax.tasks.base import Batch, LossOutput, Sums, Task
from dljax.train.state import (
    EVALUATION, NOT_FAILED, TrainState, average, averaged, join_carry, player_params,
    replace_player_params, split_carry)

Metrics = Mapping[str, Any]
TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[Mapping[str, Any], jax.Array, Batch, Any],
                    tuple[Sums, Any, Mapping[str, Any]]]


def make_train_step(
    task: Task, tx: Mapping[str, optax.GradientTransformation],
    schedules: Mapping[str, optax.Schedule], *, accumulation: int = 1, ema_decay: float = 0.0,
) -> TrainStep:
  """Builds the pure function (state, batch, lr_scale) -> (state, metrics).

  If the loss or a gradient norm is not finite, the step keeps the old state, by a selection inside
  the program, and sets the sticky `failed_step`, after which every step does nothing.

  Before the batch is read, a recurrent carry (`model_state["carry"]`) is set to zero in the rows
  whose `batch["reset"]` is 1. Every player's turn starts from the same carry, and the next batch
  starts from the carry that the last turn leaves.

  Args:
    task: the task that gives the loss.
    tx: player -> optimizer, whose learning rate is a last factor, so that `lr_scale` scales it.
    schedules: player -> learning rate by the player's own turn, for the log only.
    accumulation: the number of micro-batches per turn; the gradient is that of all the turn's
      rows.
    ema_decay: the decay of the averages that evaluation uses, if the state has averages.

  Returns:
    The step. `batch` has leading axis batch; `lr_scale` is f32[]. The metrics are the scalars
    loss, gradient_norm, learning_rate, parameter_norm and failed_step, and "sums", the task's
    (sum, count) from the last turn that gives the metric. With several players, the first three
    are given for each player's last turn, as in critic_loss.
  """
  several = len(set(task.players)) > 1

  def train_step(state: TrainState, batch: Batch, lr_scale: jax.Array):
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    parts = own_parts(batch, task.own_rows)
    denominators = [collectives.psum(task.denominators(part)) for part in parts]
    params, opt_state = state.params, dict(state.opt_state)
    model_state, carry = split_carry(reset_carry(state.model_state, batch))
    sums, logged, turns = {}, {}, dict.fromkeys(task.players, 0)
    finite = state.failed_step == NOT_FAILED
    for turn, player in enumerate(task.players):
      key = jax.random.fold_in(step_key, turn)
      part = turns[player] % task.own_rows
      grads, out = _gradient(task, params, join_carry(model_state, carry), parts[part], key,
                             denominators[part], player, accumulation)
      model_state, new_carry = split_carry(out.model_state)
      sums |= out.metrics
      own = player_params(params, player)
      updates, opt_state[player] = tx[player].update(grads, opt_state[player], own)
      updates = jax.tree.map(lambda u: u * lr_scale.astype(u.dtype), updates)
      params = replace_player_params(params, player, optax.apply_updates(own, updates))
      norm = optax.tree.norm(grads)
      finite &= jnp.isfinite(out.loss) & jnp.isfinite(norm)
      rate = schedules[player](state.step * task.players.count(player) + turns[player]) * lr_scale
      turns[player] += 1
      prefix = f"{player}_" if several else ""
      logged |= {f"{prefix}loss": out.loss, f"{prefix}gradient_norm": norm,
                 f"{prefix}learning_rate": rate}
    model_state = join_carry(model_state, new_carry)
    # The decay ramps up. Otherwise the averages of a short run would stay near its initial
    # weights.
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = average(state.ema, averaged(params, model_state), decay) if state.ema else {}

    new = state.replace(
        step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state, ema=ema)
    new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
    failed_now = (state.failed_step == NOT_FAILED) & ~finite
    new = new.replace(failed_step=jnp.where(failed_now, state.step + 1, state.failed_step))
    return new, {**logged, "parameter_norm": optax.tree.norm(new.params),
                 "failed_step": new.failed_step, "sums": sums}

  return train_step


def own_parts(batch: Batch, count: int) -> list[Batch]:
  """The rows of a batch whose id mod `count` is 0, 1, ...; see `Task.own_rows`.

  The ids of a device's rows count up from a multiple of `count`, so every device keeps its rows.
  """
  if count == 1:
    return [batch]
  parts = {name: split_micro(x, count) for name, x in batch.items()}
  return [{name: x[i] for name, x in parts.items()} for i in range(count)]


def _gradient(
    task: Task, params: Any, model_state: Any, batch: Batch, key: jax.Array,
    denominators: Mapping[str, jax.Array], player: str, accumulation: int,
) -> tuple[Any, LossOutput]:
  """The gradient for `player` and the loss, summed over micro-batches and devices."""

  def loss_fn(own, model_state, batch):
    out = task.loss(
        replace_player_params(params, player, own), model_state, batch, key,
        denominators=denominators, train=True, player=player)
    return out.loss, out

  grad_fn = jax.grad(loss_fn, has_aux=True)
  own = player_params(params, player)
  if accumulation == 1:
    grads, out = grad_fn(own, model_state, batch)
    return collectives.psum(grads), _sum_over_devices(out)

  def micro_step(total, xs):
    grads, loss, metrics, model_state = total
    micro_batch, carry = xs
    new_grads, out = grad_fn(own, join_carry(model_state, carry), micro_batch)
    sums = jax.tree.map(jnp.add, (grads, loss, metrics), (new_grads, out.loss, out.metrics))
    model_state, carry = split_carry(out.model_state)
    return (*sums, model_state), carry

  model_state, carry = split_carry(model_state)
  micro_batches, carries = jax.tree.map(lambda x: split_micro(x, accumulation),
                                        (dict(batch), carry))
  micro_batch, micro_carry = jax.tree.map(lambda x: x[0], (micro_batches, carries))
  grads, out = jax.eval_shape(lambda batch, carry: grad_fn(own, join_carry(model_state, carry),
                                                           batch), micro_batch, micro_carry)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, out.loss, out.metrics))
  (grads, loss, metrics, model_state), carries = jax.lax.scan(
      micro_step, (*zeros, model_state), (micro_batches, carries))
  carry = jax.tree.map(join_micro, carries)
  out = LossOutput(loss=loss, metrics=metrics, model_state=join_carry(model_state, carry))
  return collectives.psum(grads), _sum_over_devices(out)


def _sum_over_devices(out: LossOutput) -> LossOutput:
  return out.replace(loss=collectives.psum(out.loss), metrics=collectives.psum(out.metrics))


def split_micro(x: jax.Array, k: int) -> jax.Array:
  """[B, ...] -> [k, B / k, ...]; row i goes to micro-batch i mod k.

  This way every device keeps its rows, whereas `x.reshape(k, B // k, ...)` would move them.
  """
  return x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1)


def join_micro(x: jax.Array) -> jax.Array:
  """[k, B / k, ...] -> [B, ...], the reverse of `split_micro`."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def reset_carry(variables: Mapping[str, Any], batch: Batch) -> Mapping[str, Any]:
  """`variables` (or a model state) with the carry set to zero in the rows whose `reset` is 1."""
  rest, carry = split_carry(variables)
  keep = lambda x: jnp.reshape(batch["reset"] == 0, (-1,) + (1,) * (x.ndim - 1))
  return join_carry(rest, jax.tree.map(lambda x: jnp.where(keep(x), x, 0), carry))


def make_eval_step(task: Task, *, predictions: bool) -> EvalStep:
  """Builds the pure function (variables, rng, batch, context) -> (sums, predictions, carry).

  `rng` is u32[2], the run's key data, and `context` the result of `make_context_step`, or {}. The
  carry is {"carry": ...}, which joins the variables for the next batch, or {} if there is none.

  Args:
    task: the task that gives the loss and the predictions.
    predictions: whether to predict; otherwise the second output is {}.
  """

  def eval_step(variables, rng, batch, context):
    variables = reset_carry(variables, batch)
    params = variables["params"]
    model_state = {k: v for k, v in variables.items() if k != "params"}
    key = evaluation_key(rng)
    denominators = collectives.psum(task.denominators(batch))
    sums = {}
    for player in dict.fromkeys(task.players):
      out = task.loss(params, model_state, batch, key, denominators=denominators, train=False,
                      player=player)
      sums |= out.metrics
    predicted = task.predict(variables, batch, key, context) if predictions else {}
    return collectives.psum(sums), predicted, split_carry(out.model_state)[1]

  return eval_step


def evaluation_key(rng: jax.Array) -> jax.Array:
  """The key of evaluation and prediction, from the run's key data u32[2]; no train step uses it.
  """
  return jax.random.fold_in(jax.random.wrap_key_data(rng), EVALUATION)


def make_context_step(task: Task) -> Callable[..., tuple[Any]]:
  """Builds the pure function (variables, rng, inputs) -> (context,); see `Task.context`."""
  return lambda variables, rng, inputs: (task.context(variables, evaluation_key(rng), inputs),)


def make_generate_steps(
    task: Any, count: int,
) -> tuple[Callable[..., tuple[Any]], Callable[..., tuple[Any, Any]]]:
  """Builds the functions that generate a text, `count` tokens at a time.

  Args:
    task: a task with `start` and `advance`, such as `tasks.language_modeling`.
    count: the number of tokens.

  Returns:
    The pure functions (variables, batch) -> (text,) and
    (variables, rng, text) -> (predictions [B, count], text).
  """
  return (lambda variables, batch: (task.start(variables, batch),),
          lambda variables, rng, text: task.advance(variables, text, evaluation_key(rng), count))


def make_predict_step(task: Task) -> Callable[..., tuple[Any]]:
  """Builds the pure function (variables, rng, batch, context) -> (predictions,).

  The batch needs no labels.
  """
  return lambda variables, rng, batch, context: (
      task.predict(variables, batch, evaluation_key(rng), context),)
