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
Sharding = Sequence[tuple[str, tuple[str | None, ...]]]  # see `TaskBase.sharding`
InputDimensions = Sequence[tuple[str, int]]  # see `TaskBase.input_dimensions`

ALL = "all"  # the only player of a task whose parameters are all updated together
# The collection of a recurrent state: leaves [B, ...], split over the devices as the batch is.
CARRY = "carry"
MIN, MAX = "min", "max"  # the goals of a metric
_NAMED = 1 << 31  # this bit keeps a name's number apart from every step and every row's id


@flax.struct.dataclass
class LossOutput:
  """The result of a task's loss for one shard of one (micro-)batch.

  Attributes:
    loss: f32[], this shard's share of the final scalar. Shares add up over devices and
      micro-batches, because they were divided by the global `denominators`.
    metrics: name -> (sum, count), two arrays of one shape (of a confusion matrix, say). They add
      up, too.
    model_state: the new model state, e.g. {"batch_stats": ...}, the same on every shard.
  """

  loss: Array
  metrics: Sums
  model_state: PyTree


@dataclasses.dataclass(frozen=True)
class Findings:
  """What an evaluation of a whole set found besides the summed metrics.

  Attributes:
    metrics: name -> value.
    figures: file stem -> a function that draws a `matplotlib.figure.Figure`. It is called only if
      the figure is written.
    tables: file stem -> rows, which are flat dicts of strings and numbers with the same keys.
  """

  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  figures: Mapping[str, Callable[[], Any]] = dataclasses.field(default_factory=dict)
  tables: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)


def row_keys(rng: Array, batch: Batch) -> Array:
  """A key for each row of the batch, [B]; a task makes its draws for a row from that row's key.

  The draws depend on `rng` and the row's "id" alone, so they are the same under jit, pmap and any
  mesh, accumulation or evaluation batch size. A draw that denominators depend on is made by the
  data pipeline instead.

  Args:
    rng: the key that the engine passes to `loss` and `predict`.
    batch: holds id i32[B].
  """
  return jax.vmap(lambda row: jax.random.fold_in(rng, row))(batch["id"])


def named_key(rng: Array, name: str) -> Array:
  """The key of a draw that all rows of the batch share; it differs from every step's and row's."""
  return jax.random.fold_in(rng, zlib.crc32(name.encode()) | _NAMED)


def dropout_key(rng: Array, batch: Batch) -> Array:
  """The key of the stream "dropout", whose masks are drawn for all rows of the array at once.

  It differs between devices under pmap and between micro-batches, through the id of the first row.
  """
  return jax.random.fold_in(named_key(rng, "dropout"), batch["id"][0])


class Task(Protocol):
  """Everything that the engine asks of a task; `TaskBase` has what most tasks share.

  Attributes:
    model: the Flax module.
    players: the turns of one step, in order. `(ALL,)` updates all parameters at once. Otherwise a
      player is a top-level key of the parameters (a GAN has `("critic",) * 5 + ("generator",)`);
      it has its own optimizer and optimizer state, and is updated against the others' newest
      parameters.
    own_rows: 1 if every turn reads the whole batch. Otherwise k: the batch is cut into k parts,
      part i holds the rows whose id mod k is i, and the t-th turn of a player reads part t.
      Denominators and accumulation are then those of the part. A task with a carry has 1.
    couples_rows: whether the loss of a row depends on the other rows (as contrastive losses do).
      Accumulation is then refused, and the evaluation batch size is part of the metric.
    goals: metric -> `MIN` or `MAX`, for every metric of `summarize` and `evaluate`. Each of them
      may be monitored.
    titles: metric -> its title in pictures, where its name does not say what the numbers are.
    evaluate_reads: the batch fields that `evaluate` needs of every row besides the predictions. A
      name that ends with "/" stands for all fields that begin with it.
    evaluate_draws: the batch fields and predictions that `evaluate` needs of a few rows, to draw
      them; see there. A number that `evaluate` needs of every row is a prediction.
    sharding: how parameters lie on a mesh, the model file's SHARDING; see `TaskBase.sharding`.
    input_dimensions: which kernels have several output dimensions, the model file's
      INPUT_DIMENSIONS; see `TaskBase.input_dimensions`.
    no_decay: which arrays have no weight decay, the model file's NO_DECAY; see
      `TaskBase.no_decay`.
  """

  model: Any
  players: tuple[str, ...]
  own_rows: int
  couples_rows: bool
  goals: Mapping[str, str]
  titles: Mapping[str, str]
  evaluate_reads: tuple[str, ...]
  evaluate_draws: tuple[str, ...]
  sharding: Sharding
  input_dimensions: InputDimensions
  no_decay: Sequence[str]

  def init(self, rng: Array, batch: Batch) -> Variables:
    """Initial variables {"params": ..., **model_state}; reads only the shapes of `batch`."""

  def denominators(self, batch: Batch) -> Mapping[str, Array]:
    """The loss's denominators (numbers of examples, tokens, ...), counted from the data alone.

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
        alone), never on the device or the micro-batch. All draws go through `row_keys`,
        `dropout_key` and `named_key`.
      denominators: the sums of `denominators` over the whole batch.
      train: whether this is a train step.
      player: the player whose turn it is.
    """

  def context(self, variables: Variables, rng: Array, inputs: Mapping[str, Array]) -> PyTree:
    """A value that every batch of a pass needs (text embeddings of classes, a judge's statistics).

    It is computed once per pass, is the same on every device, and is handed to `predict`.

    Args:
      variables: the model's variables.
      rng: the same key as that of `predict`.
      inputs: the arrays of `Data.context()`.
    """

  def predict(self, variables: Variables, batch: Batch, rng: Array, context: PyTree) -> PyTree:
    """Predictions with leading axis batch; it can be compiled, and its shapes are static.

    Args:
      variables: the model's variables.
      batch: this shard's rows.
      rng: a key that depends on the run's seed alone; see `row_keys`.
      context: the result of `context`.
    """

  def summarize(self, sums: Sums) -> Mapping[str, float]:
    """Final metrics from the summed (sum, count) pairs, on the host."""

  def evaluate(
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums,
      assets: Mapping[str, Any],
  ) -> Findings:
    """Whole-set metrics, pictures and tables, on the host.

    Args:
      rows: (predictions, host batch) of every batch, padding dropped. The predictions and the
        fields of `evaluate_reads` are gathered over hosts. What `evaluate_draws` names has a shape,
        and is indexed by rows, i64[k], which alone are gathered; so every host has to ask for the
        same rows, and before it takes the next batch.
      sums: the summed metrics of the same pass.
      assets: what was fitted to the data, as saved in `workdir/data/` (e.g. the class names).

    Returns:
      The findings; their metrics do not repeat those of `summarize`.
    """


class TaskBase:
  """The common part of most tasks: one player, means as metrics, no findings on a whole set."""

  model: Any
  players: tuple[str, ...] = (ALL,)
  own_rows: int = 1
  couples_rows: bool = False
  goals: Mapping[str, str] = {"loss": MIN}
  titles: Mapping[str, str] = {}
  evaluate_reads: tuple[str, ...] = ()
  evaluate_draws: tuple[str, ...] = ()

  @property
  def sharding(self) -> Sharding:
    """How parameters lie on a mesh: the constant SHARDING of the model's file, else no rules.

    A rule is (pattern, mesh axis of each dimension). The pattern is a glob over the whole path of
    a parameter, as in `optimizer.freeze`: `*` matches any text, slashes included, so that
    "*/qkv/kernel" holds in every block, and also in a network that has this one as its backbone
    under another name (whose file adds the backbone's rules to its own). The first rule that
    matches counts. An axis is "fsdp", "tensor", or None where no device splits the dimension.
    """
    return tuple(_constant(self, "SHARDING"))

  @property
  def no_decay(self) -> Sequence[str]:
    """Parameters of rank 2 and more without weight decay: NO_DECAY of the model's file, else ().

    Patterns are those of `sharding`. Vectors, biases and norms never decay.
    """
    return tuple(_constant(self, "NO_DECAY"))

  @property
  def input_dimensions(self) -> InputDimensions:
    """Which kernels have several output dimensions: INPUT_DIMENSIONS of the model's file, else ().

    A rule is (pattern, number of leading dimensions that are inputs); patterns are those of
    `sharding`. In other kernels, all dimensions but the last are inputs.
    """
    return tuple(_constant(self, "INPUT_DIMENSIONS"))

  def apply(
      self, params: PyTree, model_state: PyTree, batch: Batch, rng: Array, train: bool,
      *inputs: Any, **kwargs: Any,
  ) -> tuple[Any, PyTree]:
    """The model's output for `inputs`, and the new model state.

    Args:
      params: the parameters.
      model_state: the model's other collections; in training all of them may change.
      batch: the rows, whose ids the dropout key depends on.
      rng: the key that `loss` gets.
      train: whether to drop units and to update batch statistics.
      *inputs: the model's arguments; `train` is added.
      **kwargs: the model's arguments by name.
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
      self, rows: Iterable[tuple[PyTree, Mapping[str, Any]]], sums: Sums,
      assets: Mapping[str, Any],
  ) -> Findings:
    """Nothing beyond the means; see `Task.evaluate`."""
    del rows, sums, assets
    return Findings()


def ratio(total: Any, count: Any) -> float:
  """total / count; NaN where nothing was counted."""
  return float(total) / float(count) if count else math.nan


def at_least_float32(x: Array) -> Array:
  """`x`, in float32 if its own precision is lower: the precision that losses are computed in."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def class_names(assets: Mapping[str, Any], num_classes: int) -> list[str]:
  """The names that were saved with the run as `assets["classes"]`, else "0", "1", ..."""
  return [str(name) for name in assets.get("classes", range(num_classes))]


def _constant(task: Task, name: str) -> Sequence[Any]:
  """A constant of the file that defines the task's model; () without it, or without a model."""
  model = getattr(task, "model", None)
  return getattr(sys.modules.get(type(model).__module__), name, ())


class Worst:
  """Keeps the rows that come first by a key, while the batches of a set pass.

  Several hosts that add the same keys ask for the same rows, as `Task.evaluate_draws` needs it.

  Args:
    count: the number of rows to keep.
  """

  def __init__(self, count: int):
    self._count = count
    self._seen = 0
    self._kept: list[tuple[Any, int, Any]] = []  # (key, number of the row in the set, value)

  def add(
      self, keys: Sequence[Any], look: Callable[[np.ndarray], Sequence[Any]],
  ) -> None:
    """Takes the rows of a batch.

    Args:
      keys: the key of each row; small ones come first, and of equal ones the earlier row.
      look: (the rows of the batch to keep, i64[k]) -> what to keep of each; it is called if there
        are any.
    """
    here = [(key, self._seen + row, row) for row, key in enumerate(keys)]
    first = sorted([(key, number) for key, number, _ in [*self._kept, *here]])[:self._count]
    numbers = {number for _, number in first}
    new = [(key, number, row) for key, number, row in here if number in numbers]
    self._kept = [entry for entry in self._kept if entry[1] in numbers]
    self._seen += len(keys)
    if new:
      values = look(np.array([row for _, _, row in new]))
      self._kept += [(key, number, value) for (key, number, _), value in zip(new, values)]

  @property
  def rows(self) -> list[Any]:
    """What was kept of each row, the first by its key first."""
    return [value for _, _, value in sorted(self._kept, key=lambda entry: entry[:2])]
