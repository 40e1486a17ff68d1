"""The pure train and eval steps, shared by every family.

Nothing here knows about devices: `parallel.compile_step` compiles the same functions for jit on any
mesh and for pmap. Losses are shares that add up (see `tasks.base.LossOutput`), so the sum over
micro-batches (a scan, here) and over devices (`collectives.psum`) gives the one global loss.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dljax.ops import collectives
from dljax.tasks.base import Batch, LossOutput, Sums, Task
from dljax.train.state import (
    NOT_FAILED, TrainState, join_carry, player_params, replace_player_params, split_carry)

Metrics = Mapping[str, Any]
TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[Mapping[str, Any], jax.Array, Batch], tuple[Sums, Any, Mapping[str, Any]]]


def make_train_step(
    task: Task, tx: Mapping[str, optax.GradientTransformation], schedule: optax.Schedule, *,
    accumulation: int = 1, ema_decay: float = 0.0,
) -> TrainStep:
  """Builds the pure function (state, batch, lr_scale) -> (state, metrics).

  A step whose loss or gradient norm is not finite keeps the old state, by selection inside the
  program, and sets the sticky `failed_step`, after which every step does nothing.

  A recurrent carry (`model_state["carry"]`) is set to zero in the rows where `batch["reset"]` says so, before the
  batch is read. Every player's turn reads the batch from the same carry; what the last leaves is the next batch's.

  Args:
    task: gives the loss.
    tx: player -> optimizer, whose learning rate is a last factor, so that `lr_scale` scales it.
    schedule: step -> learning rate, for the log only.
    accumulation: micro-batches per step; the gradient is that of the whole batch.
    ema_decay: decay of the average of the parameters that evaluation uses, where the state has one.

  Returns:
    The step. `batch` has leading axis batch; `lr_scale` is f32[]. The metrics are scalars loss,
    learning_rate, gradient_norm, parameter_norm, failed_step, and "sums": the task's (sum, count). The
    loss is that of the last player; of metrics that several turns give, the last counts.
  """

  def train_step(state: TrainState, batch: Batch, lr_scale: jax.Array):
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    denominators = collectives.psum(task.denominators(batch))
    params, opt_state = state.params, dict(state.opt_state)
    model_state, carry = split_carry(reset_carry(state.model_state, batch))
    squared_norm, sums = 0.0, {}
    for turn, player in enumerate(task.players):
      key = jax.random.fold_in(step_key, turn)
      grads, out = _gradient(
          task, params, join_carry(model_state, carry), batch, key, denominators, player, accumulation)
      model_state, new_carry = split_carry(out.model_state)
      sums |= out.metrics
      own = player_params(params, player)
      updates, opt_state[player] = tx[player].update(grads, opt_state[player], own)
      updates = jax.tree.map(lambda u: u * lr_scale.astype(u.dtype), updates)
      params = replace_player_params(params, player, optax.apply_updates(own, updates))
      squared_norm += optax.tree.norm(grads, squared=True)
      finite = jnp.isfinite(out.loss) if turn == 0 else finite & jnp.isfinite(out.loss)
    gradient_norm = jnp.sqrt(squared_norm)
    # Averages over what there is: without the ramp, the average of a short run is its initial weights.
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay).astype(p.dtype) * (p - e), state.ema, params) if state.ema else {}

    good = finite & jnp.isfinite(gradient_norm) & (state.failed_step == NOT_FAILED)
    new = state.replace(
        step=state.step + 1, params=params, model_state=join_carry(model_state, new_carry), opt_state=opt_state,
        ema=ema)
    new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, state)
    failed_now = (state.failed_step == NOT_FAILED) & ~good
    new = new.replace(failed_step=jnp.where(failed_now, state.step + 1, state.failed_step))
    return new, {
        "loss": out.loss,
        "learning_rate": schedule(state.step) * lr_scale,
        "gradient_norm": gradient_norm,
        "parameter_norm": optax.tree.norm(new.params),
        "failed_step": new.failed_step,
        "sums": sums,
    }

  return train_step


def _gradient(
    task: Task, params: Any, model_state: Any, batch: Batch, key: jax.Array,
    denominators: Mapping[str, jax.Array], player: str, accumulation: int,
) -> tuple[Any, LossOutput]:
  """The gradient for `player` and the loss, summed over micro-batches and devices."""

  def loss_fn(own, model_state, batch, key):
    key = jax.random.fold_in(key, collectives.axis_index())
    out = task.loss(
        replace_player_params(params, player, own), model_state, batch, key,
        denominators=denominators, train=True, player=player)
    return out.loss, out

  grad_fn = jax.grad(loss_fn, has_aux=True)
  own = player_params(params, player)
  if accumulation == 1:
    grads, out = grad_fn(own, model_state, batch, key)
    return collectives.psum(grads), _sum_over_devices(out)

  def micro_step(total, xs):
    grads, loss, metrics, model_state = total
    index, micro_batch, carry = xs
    new_grads, out = grad_fn(own, join_carry(model_state, carry), micro_batch, jax.random.fold_in(key, index))
    sums = jax.tree.map(jnp.add, (grads, loss, metrics), (new_grads, out.loss, out.metrics))
    model_state, carry = split_carry(out.model_state)
    return (*sums, model_state), carry

  model_state, carry = split_carry(model_state)
  micro_batches, carries = jax.tree.map(lambda x: split_micro(x, accumulation), (dict(batch), carry))
  first = lambda tree: jax.tree.map(lambda x: x[0], tree)
  grads, out = jax.eval_shape(
      lambda batches, carries: grad_fn(own, join_carry(model_state, first(carries)), first(batches), key),
      micro_batches, carries)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, out.loss, out.metrics))
  (grads, loss, metrics, model_state), carries = jax.lax.scan(
      micro_step, (*zeros, model_state), (jnp.arange(accumulation), micro_batches, carries))
  carry = jax.tree.map(join_micro, carries)
  out = LossOutput(loss=loss, metrics=metrics, model_state=join_carry(model_state, carry))
  return collectives.psum(grads), _sum_over_devices(out)


def _sum_over_devices(out: LossOutput) -> LossOutput:
  return out.replace(loss=collectives.psum(out.loss), metrics=collectives.psum(out.metrics))


def split_micro(x: jax.Array, k: int) -> jax.Array:
  """[B, ...] -> [k, B / k, ...]; row i goes to micro-batch i mod k.

  This way every device keeps the rows it has. `x.reshape(k, B // k, ...)` would move them.
  """
  return x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1)


def join_micro(x: jax.Array) -> jax.Array:
  """[k, B / k, ...] -> [B, ...], the reverse of `split_micro`."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def reset_carry(variables: Mapping[str, Any], batch: Batch) -> Mapping[str, Any]:
  """`variables` (or a model state) with zeros in those rows of its carry where `batch["reset"]` is 1."""
  rest, carry = split_carry(variables)
  keep = lambda x: jnp.reshape(batch["reset"] == 0, (-1,) + (1,) * (x.ndim - 1))
  return join_carry(rest, jax.tree.map(lambda x: jnp.where(keep(x), x, 0), carry))


def make_eval_step(task: Task, *, predictions: bool) -> EvalStep:
  """Builds the pure function (variables, rng, batch) -> (sums, predictions, carry); rng is u32[2] key data.

  The carry is {"carry": ...}, to be put among the variables for the next batch, or {} where there is none.

  Args:
    task: gives the loss and the predictions.
    predictions: whether to predict; without, the second output is {}.
  """

  def eval_step(variables, rng, batch):
    variables = reset_carry(variables, batch)
    params = variables["params"]
    model_state = {k: v for k, v in variables.items() if k != "params"}
    key = jax.random.wrap_key_data(rng)
    denominators = collectives.psum(task.denominators(batch))
    sums = {}
    for player in dict.fromkeys(task.players):
      out = task.loss(params, model_state, batch, key, denominators=denominators, train=False, player=player)
      sums |= out.metrics
    predicted = task.predict(variables, batch, key) if predictions else {}
    return collectives.psum(sums), predicted, split_carry(out.model_state)[1]

  return eval_step


def make_continue_steps(task: Any, count: int) -> tuple[Callable[..., tuple[Any]], Callable[..., tuple[Any, Any]]]:
  """Builds what writes a text on, `count` tokens at a time.

  Args:
    task: with `start` and `advance`, as `tasks.language_modeling`.
    count: tokens.

  Returns:
    The pure functions (variables, batch) -> (text,) and (variables, rng, text) -> (tokens [B, count], text).
  """
  return (lambda variables, batch: (task.start(variables, batch),),
          lambda variables, rng, text: task.advance(variables, text, jax.random.wrap_key_data(rng), count))


def make_predict_step(task: Task) -> Callable[[Mapping[str, Any], jax.Array, Batch], tuple[Any]]:
  """Builds the pure function (variables, rng, batch) -> (predictions,); the batch needs no labels."""
  return lambda variables, rng, batch: (task.predict(variables, batch, jax.random.wrap_key_data(rng)),)
