"""The contract between a task and the engine.

A task turns (model, batch) into a loss and metrics. It is a frozen dataclass that holds a Flax
module and never a loop: the engine (`dljax/train`) calls it from one pure train step.
"""

import dataclasses
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PyTree = Any
Batch = Mapping[str, Array]
Variables = Mapping[str, PyTree]
Sums = Mapping[str, tuple[Array, Array]]

ALL = "all"  # the only player of a task whose parameters are all updated together
CARRY = "carry"  # the collection of a recurrent state: leaves [B, ...], split over the devices as the batch is
MIN, MAX = "min", "max"  # the goals of a metric
_NAMED = 1 << 31  # the bit by which a name's number differs from every step and every row's id


@flax.struct.dataclass
class LossOutput:
  """What a task's loss gives for one shard of one (micro-)batch.

  Attributes:
    loss: f32[], this shard's share of the final scalar. Shares add up over devices and
      micro-batches, because they were divided by the global `denominators`.
    metrics: name -> (sum, count), arrays of any one shape (a confusion matrix is one). They too add.
    model_state: the new model state, e.g. {"batch_stats": ...}, the same on every shard.
  """

  loss: Array
  metrics: Sums
  model_state: PyTree


@dataclasses.dataclass(frozen=True)
class Findings:
  """What an evaluation of a whole set found beside the summed metrics.

  Attributes:
    metrics: name -> value.
    figures: file stem -> the function that draws it, a `matplotlib.figure.Figure`; only what is written is drawn.
    tables: file stem -> rows, each a flat dict of strings and numbers with the same keys.
  """

  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  figures: Mapping[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)
  tables: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)


def row_keys(rng: Array, batch: Batch) -> Array:
  """A key for each row of the batch, [B]: what a task draws by row, it draws from these.

  The draws of a row depend on `rng` and the row's "id" alone, so they are the same under jit, pmap
  and any mesh, accumulation or evaluation batch size. What denominators depend on is drawn by the
  data instead.

  Args:
    rng: the key that the engine passes to `loss` and `predict`.
    batch: holds id i32[B].
  """
  return jax.vmap(lambda row: jax.random.fold_in(rng, row))(batch["id"])


def named_key(rng: Array, name: str) -> Array:
  """The key of a draw that all rows of the batch share; no step's and no row's key is the same."""
  return jax.random.fold_in(rng, zlib.crc32(name.encode()) | _NAMED)


def dropout_key(rng: Array, batch: Batch) -> Array:
  """The key of the stream "dropout", whose masks are drawn for all rows of the array at once.

  It differs by device under pmap and by micro-batch, through the id of the first row.
  """
  return jax.random.fold_in(named_key(rng, "dropout"), batch["id"][0])


class Task(Protocol):
  """Everything that the engine asks of a task; `TaskBase` has what most tasks share.

  Attributes:
    model: the Flax module.
    players: who is updated, in order, within one step. `(ALL,)`: all parameters at once. Otherwise
      top-level keys of the parameters (a GAN: `("critic",) * 5 + ("generator",)`), each with its own
      optimizer and optimizer state, each updated against the others' newest parameters.
    own_rows: 1, where every turn reads the whole batch. Otherwise k: the batch is cut into k parts,
      part i holds the rows whose id mod k is i, and the t-th turn of a player reads part t.
      Denominators and accumulation are then those of the part. Not together with a carry.
    couples_rows: whether the loss of a row depends on the other rows (contrastive losses): then
      accumulation is refused, and the evaluation batch size is part of the metric.
    goals: metric -> `MIN` or `MAX`, for all metrics of `summarize` and `evaluate`: any of them may
      be monitored.
    evaluate_reads: the batch fields that `evaluate` needs besides the predictions.
    sharding: the model file's SHARDING.
  """

  model: Any
  players: tuple[str, ...]
  own_rows: int
  couples_rows: bool
  goals: Mapping[str, str]
  evaluate_reads: tuple[str, ...]

  def init(self, rng: Array, batch: Batch) -> Variables:
    """Fresh variables {"params": ..., **model_state}; reads only the shapes of `batch`."""

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The loss's denominators (examples, tokens, ...), counted from the data alone.

    The engine sums them over devices and micro-batches and hands the totals to `loss`.
    """

  def loss(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, *,
      denominators: Mapping[str, Array], train: bool, player: str,
  ) -> LossOutput:
    """This shard's share of the loss, with its metrics and the new model state.

    Args:
      params: all players' parameters.
      model_state: the model's other collections.
      batch: this shard's rows.
      rng: a key that depends on the run's seed, the step and the turn (in evaluation on the seed
        alone), never on the device or the micro-batch. Draw through `row_keys`, `dropout_key` and
        `named_key`.
      denominators: the sums of `denominators` over the whole batch.
      train: whether this is a train step.
      player: whose loss to give.
    """

  def context(self, variables: Variables, rng: Array, inputs: Mapping[str, Array]) -> PyTree:
    """What every batch of a pass needs (the classes' text embeddings, a judge's statistics).

    It is computed once per pass, is the same on every device, and is handed to `predict`.

    Args:
      variables: the model's variables.
      rng: as for `predict`.
      inputs: the arrays of `Data.context()`.
    """

  def predict(self, variables: Variables, batch: Batch, rng: Array, context: PyTree) -> PyTree:
    """Predictions with leading axis batch; jittable, static shapes.

    Args:
      variables: the model's variables.
      batch: this shard's rows.
      rng: a key that depends on the run's seed alone; see `row_keys`.
      context: what `context` gave.
    """

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """Final metrics from the summed (sum, count) pairs, on the host."""

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums, assets: Mapping[str, Any],
  ) -> Findings:
    """Whole-set metrics, pictures and tables, on the host, after a final evaluation.

    Args:
      rows: (predictions, host batch) of every batch, padding dropped, gathered over hosts.
      sums: the summed metrics of the same pass.
      assets: what was fitted to the data, as saved in `workdir/data/` (e.g. the class names).

    Returns:
      What was found; its metrics beyond those of `summarize`.
    """


class TaskBase:
  """What most tasks share: one player, means as metrics, nothing to say of a whole set."""

  model: Any
  players: tuple[str, ...] = (ALL,)
  own_rows: int = 1
  couples_rows: bool = False
  goals: Mapping[str, str] = {"loss": MIN}
  evaluate_reads: tuple[str, ...] = ()

  def apply(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, train: bool, *inputs: Any,
      **kwargs: Any,
  ) -> tuple[Any, PyTree]:
    """The model's output for `inputs`, and the new model state.

    Args:
      params: the parameters.
      model_state: the model's other collections; in training all of them may change.
      batch: holds the ids that the dropout key depends on.
      rng: as `loss` gets it.
      train: whether to drop units and to update batch statistics.
      *inputs: what the model is called with; `train` is added.
      **kwargs: its arguments by name.
    """
    variables = {"params": params, **model_state}
    if not train:
      return self.model.apply(variables, *inputs, **kwargs, train=False), model_state
    return self.model.apply(
        variables, *inputs, **kwargs, train=True, rngs={"dropout": dropout_key(rng, batch)},
        mutable=list(model_state))

  def context(self, variables: Variables, rng: Array, inputs: Mapping[str, Array]) -> PyTree:
    """Nothing; see `Task.context`."""
    del variables, rng, inputs
    return {}

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """The mean of each scalar metric; NaN where nothing was counted."""
    return {name: ratio(*pair) for name, pair in sums.items() if np.ndim(pair[0]) == 0}

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums, assets: Mapping[str, Any],
  ) -> Findings:
    """Nothing beyond the means; see `Task.evaluate`."""
    del rows, sums, assets
    return Findings()


def ratio(total: Any, count: Any) -> float:
  """total / count; NaN where nothing was counted."""
  return float(total) / float(count) if count else math.nan


def at_least_float32(x: Array) -> Array:
  """`x` in its own precision, but in float32 where that is lower: losses are computed so."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def sharding_rules(task: Task) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
  """How parameters lie on a mesh: a task's `sharding`, or its model's SHARDING.

  A model file may have a constant SHARDING, rules of (pattern, mesh axis of each dimension). The
  pattern is a glob over the whole path of a parameter, as in `optimizer.freeze`: `*` matches any
  text, slashes included, so that "*/qkv/kernel" holds in every block, and in a network that has
  this one as its backbone under another name (whose file adds the backbone's rules to its own).
  The first rule that matches counts. An axis is "fsdp", "tensor", or None where no device splits
  the dimension.

  Returns:
    The rules; none for a task that has neither.
  """
  return _declared(task, "sharding", "SHARDING")


def input_dimensions(task: Task) -> tuple[tuple[str, int], ...]:
  """Which kernels have several output dimensions: as `sharding_rules`, from INPUT_DIMENSIONS.

  A model file may have a constant INPUT_DIMENSIONS, rules of (pattern, number of leading
  dimensions that are inputs); patterns are those of `sharding_rules`. Of other kernels all
  dimensions but the last are inputs.

  Returns:
    The rules; none for a task that has neither.
  """
  return _declared(task, "input_dimensions", "INPUT_DIMENSIONS")


def _declared(task: Task, attribute: str, constant: str) -> tuple[Any, ...]:
  """What a task says itself, else what the file of its model's class says, else ()."""
  if hasattr(task, attribute):
    return tuple(getattr(task, attribute))
  model = getattr(task, "model", None)
  return tuple(getattr(sys.modules.get(type(model).__module__), constant, ()))
