"""The contract between a task and the engine.

A task turns (model, batch) into a loss and metrics. It is a frozen dataclass that holds a Flax
module and never a loop: the engine (`dljax/train`) calls it from one pure train step.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax

Array = jax.Array
PyTree = Any
Batch = Mapping[str, Array]
Variables = Mapping[str, PyTree]
Sums = Mapping[str, tuple[Array, Array]]

ALL = "all"  # the only player of a task whose parameters are all updated together
CARRY = "carry"  # the collection of a recurrent state: leaves [B, ...], split over the devices as the batch is


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
    figures: file stem -> `matplotlib.figure.Figure`.
    tables: file stem -> rows, each a flat dict of strings and numbers with the same keys.
  """

  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tables: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)


class Task(Protocol):
  """Everything that the engine asks of a task.

  Attributes:
    players: who is updated, in order, within one step. `(ALL,)`: all parameters at once. Otherwise
      top-level keys of the parameters (a GAN: `("critic",) * 5 + ("generator",)`), each with its own
      optimizer state, each updated against the others' newest parameters.
  """

  players: tuple[str, ...]

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
    """This shard's share of the loss, with its metrics and the new model state."""

  def predict(self, variables: Variables, batch: Batch, rng: Array) -> PyTree:
    """Predictions with leading axis batch; jittable, static shapes."""

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
