"""What an experiment compiles to: the same program for training, evaluation and the dry run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from dljax import optim
from dljax.errors import RunError, UserError
from dljax.tasks.base import CARRY, Task
from dljax.train import flops, parallel, step
from dljax.train.experiment import Experiment
from dljax.train.metrics import say
from dljax.train.state import TrainState, create_state, player_params


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """How to run, as opposed to what (the config).

  Attributes:
    parallelism: "jit" or "pmap".
    mesh: mesh axis -> its size; {} puts all devices on `data`.
    resume: "auto" continues the run in the workdir, "never" refuses a workdir that holds a run,
      and "must" refuses one that holds no checkpoint.
    wandb: the Weights & Biases project to log to, or "".
    progress: whether to show a progress bar.
  """

  parallelism: parallel.Mode = "jit"
  mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
  resume: str = "auto"
  wandb: str = ""
  progress: bool = True


_LARGEST_STATE = 2**48  # bytes
_IDLE = {  # what the devices of an axis do if it splits no parameter
    "fsdp": "only share the batch, as those of data do; lower --config.shard_above to split "
            "smaller arrays",
    "tensor": "all do the same work, as its model has no rule for it; give them to data or fsdp"}


class Program:
  """What an experiment compiles to on a mesh; shared by training, evaluation and the dry run.

  Attributes:
    mesh: the devices.
    train_step: (state, batch, lr_scale) -> (state, metrics); the state is donated.
    abstract_state: the shapes, dtypes and shardings of the state.
  """

  def __init__(
      self, experiment: Experiment, options: RunOptions, devices: Sequence[Any] | None = None,
  ):
    config = experiment.config
    mode = self._mode = options.parallelism
    self._experiment = experiment
    self._batch_spec = experiment.data.batch_spec
    task = experiment.task
    _check_rows(task, config)
    self._total_steps = config.total_steps
    self.mesh = parallel.make_mesh(options.mesh, mode, devices)
    parallel.check_batch_size(
        "--config.batch_size", config.batch_size, self.mesh, config.accumulation, task.own_rows)
    parallel.check_batch_size("--config.eval_batch_size", config.eval_batch_size, self.mesh)
    optimizers = optim.player_configs(config, task.players)
    several = len(optimizers) > 1
    made = {
        player: optim.make_optimizer(
            own, config.total_steps * task.players.count(player), player if several else "",
            task.input_dimensions, task.no_decay)
        for player, own in optimizers.items()}
    self._optimizers, self._turns = optimizers, {
        player: task.players.count(player) for player in optimizers}
    tx, schedules = ({player: pair[i] for player, pair in made.items()} for i in range(2))
    self._create = lambda: create_state(
        task, tx, experiment.data.batch_spec, config.seed, ema=config.ema_decay > 0)
    self._sharding = parallel.Sharding(task.sharding, config.shard_above)
    try:
      self.abstract_state = parallel.abstract_state(self._create, self.mesh, self._sharding)
    except (MemoryError, OverflowError):
      raise UserError("the sizes in --config.model, --config.data and --config.batch_size give arrays "
                      "that no memory holds; lower them") from None
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(self.abstract_state))
    if size > _LARGEST_STATE:
      raise UserError(f"the training state has {size / 2**40:,.0f} TiB, which no machine holds; lower "
                      "the sizes in --config.model")
    for axis in parallel.idle_axes(self.abstract_state, self.mesh):
      say(f"warning: --mesh={axis}:{self.mesh.shape[axis]} splits no parameter of {config.family}: "
          f"its devices {_IDLE[axis]}")
    for player, own in optimizers.items():
      optim.check_patterns(
          own, player_params(self.abstract_state.params, player), player if several else "")
    if task.own_rows > 1 and CARRY in self.abstract_state.model_state:
      raise ValueError("a task with a recurrent carry reads the whole batch in every turn: own_rows must be 1")
    train_step = step.make_train_step(
        task, tx, schedules, accumulation=config.accumulation, ema_decay=config.ema_decay)
    self.train_step = parallel.compile_step(
        train_step, mode, self.mesh, inputs=("state", "batch", "shared"),
        outputs=("state", "shared"), donate=(0,), sharding=self._sharding)

  def warn_of_schedule(self, total_steps: Any, step: int) -> None:
    """Says by how much the learning rate jumps at `step`, if the run had another length until now.

    Args:
      total_steps: the length that config.json states; nothing is said if it is no whole number.
      step: the number of completed steps.
    """
    if not isinstance(total_steps, int) or total_steps < 1 or step >= self._total_steps:
      return
    for player, own in self._optimizers.items():
      turns = self._turns[player]
      old, new = (float(optim.make_schedule(own, total * turns)(min(step, total) * turns))
                  for total in (total_steps, self._total_steps))
      if not math.isclose(old, new, rel_tol=0.01):
        of = f" of {player}" if len(self._optimizers) > 1 else ""
        say(f"warning: with total_steps={self._total_steps} instead of {total_steps} the schedule "
            f"moves the learning rate{of} at step {step} from {old:.3g} to {new:.3g}")

  def start_weights(self) -> Any:
    """The `pretrained.Weights` of `config.init.source`."""
    from dljax.train import pretrained  # most runs start from scratch and need none of its imports

    return pretrained.load(self._experiment, self.abstract_state)

  def init_state(self) -> TrainState:
    """An initial state on the mesh; `RunError` if it does not fit into memory."""
    try:
      return parallel.init_state(self._create, self.mesh, self._sharding)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        raise RunError("the training state does not fit into the devices' memory; lower the sizes in "
                       "--config.model, or take more devices with --mesh=fsdp:N") from error
      raise

  def lower_train_step(self) -> jax.stages.Lowered:
    """The train step, lowered for the mesh from shapes alone; call `.compile()` on it."""
    return self.train_step.lower(self.abstract_state, self._abstract_batch(),
                                 self._abstract_scale())

  def train_step_flops(self) -> int:
    """FLOPs of one train step over all devices, counted from the traced program."""
    return flops.count_flops(self.train_step, self.abstract_state, self._abstract_batch(),
                             self._abstract_scale())

  def _abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    return parallel.abstract_batch(self._batch_spec, self._mode, self.mesh)

  def _abstract_scale(self) -> jax.ShapeDtypeStruct:
    return parallel.abstract_shared(np.float32(1), self.mesh)


def _check_rows(task: Task, config: ml_collections.ConfigDict) -> None:
  """Refuses settings that do not suit a task whose rows see each other or are shared out."""
  if task.couples_rows and config.accumulation > 1:
    raise UserError(f"--config.accumulation={config.accumulation}: the rows of a batch see each other here, and "
                    "micro-batches would part them; set it to 1")
  most = max(map(task.players.count, task.players))
  if 1 < task.own_rows < most:
    raise ValueError(f"own_rows is {task.own_rows}, too few parts for a player with {most} turns")
