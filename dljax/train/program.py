"""What an experiment compiles to: the same program for training, evaluation and the dry run."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dljax import optim
from dljax.train import flops, parallel, step
from dljax.train.experiment import Experiment
from dljax.train.state import TrainState, create_state, player_params


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """How to run, as opposed to what (the config).

  Attributes:
    parallelism: "jit" or "pmap".
    mesh: axis -> size; {} puts all devices on `data`.
    resume: "auto" continues what is in the workdir, "never" refuses a workdir with a run, "must" one
      without a checkpoint.
    wandb: the Weights & Biases project to log to, or "".
    progress: whether to show a progress bar.
  """

  parallelism: parallel.Mode = "jit"
  mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
  resume: str = "auto"
  wandb: str = ""
  progress: bool = True


class Program:
  """What an experiment compiles to on a mesh; shared by training, evaluation and the dry run.

  Attributes:
    mesh: the devices.
    train_step: (state, batch, lr_scale) -> (state, metrics); the state is donated.
    abstract_state: shapes, dtypes and shardings of the state.
  """

  def __init__(self, experiment: Experiment, options: RunOptions, devices: Sequence[Any] | None = None):
    config = experiment.config
    mode = self._mode = options.parallelism
    self._batch_spec = experiment.data.batch_spec
    self.mesh = parallel.make_mesh(options.mesh, mode, devices)
    parallel.check_batch_size("--config.batch_size", config.batch_size, self.mesh, config.accumulation)
    parallel.check_batch_size("--config.eval_batch_size", config.eval_batch_size, self.mesh)
    players = experiment.task.players
    # A player that moves n times a step walks through its schedule n times as fast.
    tx = {p: optim.make_optimizer(config.optimizer, config.total_steps * players.count(p))[0] for p in set(players)}
    schedule = optim.make_schedule(config.optimizer, config.total_steps)
    self._create = lambda: create_state(
        experiment.task, tx, experiment.data.batch_spec, config.seed, ema=config.ema_decay > 0)
    self.abstract_state = parallel.abstract_state(self._create, self.mesh)
    optim.check_patterns(config.optimizer, *(player_params(self.abstract_state.params, p) for p in tx))
    train_step = step.make_train_step(
        experiment.task, tx, schedule, accumulation=config.accumulation, ema_decay=config.ema_decay)
    self.train_step = parallel.compile_step(
        train_step, mode, self.mesh, inputs=("state", "batch", "shared"), outputs=("state", "shared"), donate=(0,))

  def init_state(self) -> TrainState:
    """A fresh state on the mesh."""
    return parallel.init_state(self._create, self.mesh)

  def lower_train_step(self) -> jax.stages.Lowered:
    """The train step, lowered for the mesh without data or state; `.compile()` does the rest."""
    return self.train_step.lower(self.abstract_state, self._abstract_batch(), self._abstract_scale())

  def train_step_flops(self) -> int:
    """FLOPs of one train step over all devices, counted from the traced program."""
    return flops.count_flops(self.train_step, self.abstract_state, self._abstract_batch(), self._abstract_scale())

  def _abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    return parallel.abstract_batch(self._batch_spec, self._mode, self.mesh)

  def _abstract_scale(self) -> jax.ShapeDtypeStruct:
    return parallel.abstract_shared(np.float32(1), self.mesh)
