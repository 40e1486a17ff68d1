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
from dljax.train.state import NOT_FAILED, TrainState, player_params, replace_player_params

Metrics = Mapping[str, Any]
TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[Mapping[str, Any], jax.Array, Batch], tuple[Sums, Any]]


def make_train_step(
    task: Task, tx: Mapping[str, optax.GradientTransformation], schedule: optax.Schedule, *,
    accumulation: int = 1, ema_decay: float = 0.0,
) -> TrainStep:
  """Builds the pure function (state, batch, lr_scale) -> (state, metrics).

  A step whose loss or gradient norm is not finite keeps the old state, by selection inside the
  program, and sets the sticky `failed_step`, after which every step does nothing.

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
    weights = collectives.psum(task.weights(batch))
    params, model_state, opt_state = state.params, state.model_state, dict(state.opt_state)
    squared_norm, sums = 0.0, {}
    for turn, player in enumerate(task.players):
      key = jax.random.fold_in(step_key, turn)
      grads, out = _gradient(task, params, model_state, batch, key, weights, player, accumulation)
      model_state = out.model_state
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
        step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state, ema=ema)
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
    weights: Mapping[str, jax.Array], player: str, accumulation: int,
) -> tuple[Any, LossOutput]:
  """The gradient for `player` and the loss, summed over micro-batches and devices."""

  def loss_fn(own, model_state, batch, key):
    key = jax.random.fold_in(key, collectives.axis_index())
    out = task.loss(
        replace_player_params(params, player, own), model_state, batch, key,
        weights=weights, train=True, player=player)
    return out.loss, out

  grad_fn = jax.grad(loss_fn, has_aux=True)
  own = player_params(params, player)
  if accumulation == 1:
    grads, out = grad_fn(own, model_state, batch, key)
    return collectives.psum(grads), _sum_over_devices(out)

  def micro_step(total, xs):
    grads, loss, metrics, model_state = total
    index, micro_batch = xs
    new_grads, out = grad_fn(own, model_state, micro_batch, jax.random.fold_in(key, index))
    sums = jax.tree.map(jnp.add, (grads, loss, metrics), (new_grads, out.loss, out.metrics))
    return (*sums, out.model_state), None

  micro_batches = jax.tree.map(lambda x: split_micro(x, accumulation), dict(batch))
  grads, out = jax.eval_shape(
      lambda batches: grad_fn(own, model_state, jax.tree.map(lambda x: x[0], batches), key), micro_batches)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, out.loss, out.metrics))
  (grads, loss, metrics, model_state), _ = jax.lax.scan(
      micro_step, (*zeros, model_state), (jnp.arange(accumulation), micro_batches))
  out = LossOutput(loss=loss, metrics=metrics, model_state=model_state)
  return collectives.psum(grads), _sum_over_devices(out)


def _sum_over_devices(out: LossOutput) -> LossOutput:
  return out.replace(loss=collectives.psum(out.loss), metrics=collectives.psum(out.metrics))


def split_micro(x: jax.Array, k: int) -> jax.Array:
  """[B, ...] -> [k, B / k, ...]; row i goes to micro-batch i mod k.

  This way every device keeps the rows it has. `x.reshape(k, B // k, ...)` would move them.
  """
  return x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1)


def make_eval_step(task: Task, *, predictions: bool) -> EvalStep:
  """Builds the pure function (variables, rng, batch) -> (sums, predictions); rng is u32[2] key data.

  Args:
    task: gives the loss and the predictions.
    predictions: whether to predict; without, the second output is {}.
  """

  def eval_step(variables, rng, batch):
    params = variables["params"]
    model_state = {k: v for k, v in variables.items() if k != "params"}
    key = jax.random.wrap_key_data(rng)
    weights = collectives.psum(task.weights(batch))
    sums = {}
    for player in dict.fromkeys(task.players):
      out = task.loss(params, model_state, batch, key, weights=weights, train=False, player=player)
      sums |= out.metrics
    return collectives.psum(sums), task.predict(variables, batch, key) if predictions else {}

  return eval_step


def make_predict_step(task: Task) -> Callable[[Mapping[str, Any], jax.Array, Batch], tuple[Any]]:
  """Builds the pure function (variables, rng, batch) -> (predictions,); the batch needs no labels."""
  return lambda variables, rng, batch: (task.predict(variables, batch, jax.random.wrap_key_data(rng)),)
