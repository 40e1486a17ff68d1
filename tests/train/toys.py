"""Small experiments for tests of the engine, and a loop that waits after every step.

Collectives of several steps at once can deadlock on virtual CPU devices, so nothing here dispatches ahead.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dljax import optim
from dljax.recipes import image_classification
from dljax.config import base_config
from dljax.data.splits import Data
from dljax.models.layers import BatchNorm
from dljax.models.mlp import MLP
from dljax.models.resnet import BasicBlock, ResNet
from dljax.models.vit import ViT
from dljax.tasks.base import ALL, MIN, LossOutput, TaskBase
from dljax.train import parallel
from dljax.train.experiment import Experiment
from dljax.train.program import Program, RunOptions

BATCH_SIZE = 16
MESHES = {
    "data:1": {"data": 1, "fsdp": 1, "tensor": 1},
    "data:4": {"data": 4, "fsdp": 1, "tensor": 1},
    "data:2,fsdp:2": {"data": 2, "fsdp": 2, "tensor": 1},
    "data:2,tensor:2": {"data": 2, "fsdp": 1, "tensor": 2},
    "fsdp:4": {"data": 1, "fsdp": 4, "tensor": 1},
    "fsdp:2,tensor:2": {"data": 1, "fsdp": 2, "tensor": 2},
}


@dataclasses.dataclass(frozen=True)
class Formula(TaskBase):
  """A task given by a formula.

  Attributes:
    params: the initial parameters.
    rows: (params, batch, train, player) -> the loss of each row, [B].
    players: see `Task`.
  """

  params: Mapping[str, Any]
  rows: Callable[[Any, Mapping[str, Any], bool, str], jax.Array]
  players: tuple[str, ...] = (ALL,)

  def init(self, rng, batch):
    del rng, batch
    return {"params": jax.tree.map(lambda x: jnp.asarray(x, float), dict(self.params))}

  def denominators(self, batch):
    return {"examples": jnp.sum(batch["mask"])}

  def loss(self, params, model_state, batch, rng, *, denominators, train, player):
    del rng
    losses = self.rows(params, batch, train, player) * batch["mask"]
    sums = jnp.sum(losses), jnp.sum(batch["mask"])
    share = sums[0] / denominators["examples"]
    return LossOutput(loss=share, metrics={f"{player}_loss": sums}, model_state=model_state)

  @property
  def goals(self):
    return {f"{player}_loss": MIN for player in self.players}

  def predict(self, variables, batch, rng, context=None):
    del rng, context
    return {"loss": self.rows(variables["params"], batch, False, self.players[0])}


class ConvNet(nn.Module):
  """Everything at once that an equality over devices can fail on: convolution, BatchNorm and dropout.

  The convolution has no bias: BatchNorm would take it away again, and its gradient would be rounding noise.
  """

  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image, mask=None, *, train=False):
    x = nn.Conv(4, (3, 3), strides=2, use_bias=False, dtype=self.dtype, name="conv")(image)
    x = nn.relu(BatchNorm(dtype=self.dtype, name="norm")(x, mask, train=train))
    x = x.reshape(x.shape[0], -1)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    x = nn.relu(nn.Dense(8, dtype=self.dtype, name="hidden")(x))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(10, dtype=self.dtype, name="head")(x)


def tiny_resnet(**fields: Any) -> nn.Module:
  """Two blocks, one with a projection."""
  fields = {"block": BasicBlock, "stage_sizes": (1, 1), "width": 4, "small_stem": True, **fields}
  return ResNet(num_classes=10, **fields)


def tiny_mlp(**fields: Any) -> nn.Module:
  return MLP(num_classes=10, widths=(16, 16), **fields)


def tiny_vit(**fields: Any) -> nn.Module:
  """One block, which has a sharding rule for every kernel."""
  return ViT(num_classes=10, patch_size=4, embed_dim=8, num_layers=1, num_heads=2, **fields)


@dataclasses.dataclass(frozen=True)
class Scripted:
  """A pipeline of given batches: step -> batch, whose rows are numbered where it does not say how."""

  make: Callable[[int], Mapping[str, np.ndarray]]
  num_batches: int = 1
  num_examples: int = BATCH_SIZE
  num_sample_batches: int = 0

  def sample(self, count, seed):
    pass

  def open(self, rows=None):
    pass

  def close(self):
    pass

  def batch(self, step):
    batch = dict(self.make(step))
    return {"id": np.arange(len(batch["mask"]), dtype=np.int32), **batch}


def uneven_mask(step: int) -> np.ndarray:
  """Of `BATCH_SIZE` rows; four devices have 4, 3, 1 and 0 that count, or the same in another order."""
  counts = np.roll([4, 3, 1, 0], step)
  return (np.arange(4) < counts[:, None]).astype(np.float32).reshape(-1)


def formula_experiment(
    task: Any, train: Scripted, evals: Mapping[str, Scripted] | None = None, **fields: Any,
) -> Experiment:
  """An experiment of a toy task; `fields` are config fields, "optimizer" a mapping of overrides."""
  def optimizer(overrides):
    made = optim.default_config("sgd")
    made.update({"schedule": "constant", "warmup_fraction": 0.0, **overrides})
    return made

  optimizers = {player: optimizer(own) for player, own in fields.pop("optimizers", {}).items()}
  if optimizers:
    fields["optimizers"] = ml_collections.ConfigDict(optimizers)
  else:
    fields["optimizer"] = optimizer(fields.pop("optimizer", {}))
  config = base_config(
      "toy", "toy", batch_size=BATCH_SIZE, eval_batch_size=BATCH_SIZE, model=ml_collections.ConfigDict(),
      data=ml_collections.ConfigDict(), **{"shard_above": 0, **fields})
  spec = {k: jax.ShapeDtypeStruct(np.shape(v), np.asarray(v).dtype) for k, v in train.batch(0).items()
          if not k.startswith(parallel.HOST)}
  data = Data(name="toy", train=train, evals=evals or {}, batch_spec=spec, fingerprint=lambda: "toy")
  return Experiment(
      task=task, data=data, config=config, monitor=config.monitor or None, read=None, show=None)


def with_data(experiment: Experiment, **fields: Any) -> Experiment:
  """The experiment with other `fields` of its data."""
  return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **fields))


def digits_experiment(
    model: nn.Module, *, mask: Callable[[int], np.ndarray] | None = uneven_mask, **fields: Any,
) -> Experiment:
  """`model` on augmented digits, with `mask(step)` over each training batch."""
  config = image_classification.config("toy", "toy", data="digits", variant="", optimizer="momentum")
  optimizer = fields.pop("optimizer", {})
  config.update({"batch_size": BATCH_SIZE, "total_steps": 20, "shard_above": 0, **fields})
  config.optimizer.update({"learning_rate": 0.1, "warmup_fraction": 0.0, **optimizer})
  config.data.update({"pad_crop": 1, "flip": True})
  experiment = image_classification.build(config, model)
  experiment.data.train.open()
  if mask is None:
    return experiment
  masked = lambda step: {**experiment.data.train.batch(step), "mask": mask(step)}
  return with_data(experiment, train=Scripted(masked))


class Outcome(NamedTuple):
  """What `train` gives: the state and the metrics of each step, as NumPy arrays; and the program."""

  state: Any
  outs: list[Any]
  program: Program


@functools.lru_cache(maxsize=32)
def _initial(program: Program) -> Any:
  """The program's initial state as NumPy arrays; computing it costs a compilation each time."""
  return parallel.state_to_host(program.init_state())


def make_program(experiment: Experiment, mode: parallel.Mode = "jit", mesh: str = "data:4") -> Program:
  return Program(experiment, RunOptions(parallelism=mode, mesh=MESHES[mesh]))


def train(
    experiment: Experiment, steps: int, *, dtype: Any = None, parallelism: parallel.Mode = "jit",
    mesh: str = "data:4", lr_scales: Sequence[float] | None = None, program: Program | None = None,
) -> Outcome:
  """Runs the engine's own program; `dtype` is that of the state's floating arrays.

  A `program` may be given that was made of an experiment that differs in its batches alone: it need not be compiled
  again, and starts from the same state.
  """
  if program is None:
    program = make_program(experiment, parallelism, mesh)
    state = program.init_state()
  else:
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
    state = jax.device_put(_initial(program), shardings)
  if dtype:
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state)
    state = jax.jit(lambda s: jax.tree.map(cast, s), out_shardings=shardings)(state)
  state, outs = parallel.step_state(state, parallelism, program.mesh), []
  for step in range(steps):
    batch = parallel.put_batch(experiment.data.train.batch(step), parallelism, program.mesh)
    scale = parallel.put_shared(np.float32(lr_scales[step] if lr_scales else 1), program.mesh)
    state, out = program.train_step(state, batch, scale)
    outs.append(jax.tree.map(np.asarray, jax.block_until_ready(out)))
  state = parallel.global_state(state, parallelism, program.mesh)
  return Outcome(parallel.state_to_host(state), outs, program)


def difference(one: Any, other: Any) -> float:
  """The largest difference of two trees' arrays, each in units of the largest number of the array."""
  worst = 0.0
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    gap = np.max(np.abs(a - b), initial=0.0)
    worst = max(worst, gap and gap / max(np.max(np.abs(a)), np.max(np.abs(b))))  # NaN where either is
    assert np.isfinite(worst)
  return float(worst)
