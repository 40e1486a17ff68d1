"""TrainState: everything that training changes, and nothing else."""

import hashlib
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dljax.errors import UserError
from dljax.tasks.base import ALL, CARRY, Batch, Task

FORMAT = 2  # the number of the run format that config.json and checkpoint manifests state
NOT_FAILED = -1
BATCH_STATS = "batch_stats"  # the collection of BatchNorm's running statistics
# Folded into the run's key, these give the keys of initial parameters and of evaluation. The steps
# fold in 0 to 2^31 - 1.
INIT, EVALUATION = 2**31, 2**31 + 1


@flax.struct.dataclass
class TrainState:
  """The training state. No array of it has a device axis.

  Attributes:
    step: i32[], the number of completed steps.
    params: the parameters, float32 whatever the compute dtype.
    model_state: the model's other collections, e.g. {"batch_stats": ...}; "carry" is the state
      that a recurrent model keeps from batch to batch, one row for each row of the batch.
    opt_state: player -> optimizer state.
    rng: u32[2], the key data of the run's seed; constant. Every draw folds in the step and a name.
    ema: exponential moving averages by collection, {"params": ..., "batch_stats": ...}, or {} if
      they are off.
    failed_step: i32[], the first step whose loss or gradient was not finite, else `NOT_FAILED`.
  """

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  rng: jax.Array
  ema: Any
  failed_step: jax.Array

  @property
  def variables(self) -> dict[str, Any]:
    """The variables that evaluation and prediction use: the averages wherever EMA is on.

    A carry among them shows only that the model has one.
    """
    return {"params": self.params, **self.model_state, **self.ema}


def player_params(params: Any, player: str) -> Any:
  """The part of `params` that `player` updates."""
  return params if player == ALL else params[player]


def replace_player_params(params: Any, player: str, new: Any) -> Any:
  """`params` with the part of `player` replaced."""
  return new if player == ALL else {**params, player: new}


def averaged(params: Any, model_state: Any) -> dict[str, Any]:
  """The collections that EMA averages: the parameters and the batch statistics.

  The model's other state (a carry, the vectors of power iterations, counters) has no meaningful
  average, so evaluation uses its newest value.
  """
  return {"params": params, **{k: v for k, v in model_state.items() if k == BATCH_STATS}}


def average(old: Any, new: Any, decay: jax.Array) -> Any:
  """decay * old + (1 - decay) * new; an array that is not floating-point takes the new value."""
  def mix(e: jax.Array, x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    return e + (1 - decay).astype(x.dtype) * (x - e)

  return jax.tree.map(mix, old, new)


def split_carry(tree: Any) -> tuple[Any, dict[str, Any]]:
  """A state, or variables by collection, as (the rest, {"carry": ...}); {} if there is no carry.
  """
  if isinstance(tree, TrainState):
    model_state, carry = split_carry(tree.model_state)
    return tree.replace(model_state=model_state), carry
  return {k: v for k, v in tree.items() if k != CARRY}, {k: v for k, v in tree.items()
                                                         if k == CARRY}


def join_carry(tree: Any, carry: Mapping[str, Any]) -> Any:
  """The reverse of `split_carry`."""
  if isinstance(tree, TrainState):
    return tree.replace(model_state={**tree.model_state, **carry})
  return {**tree, **carry}


def create_state(
    task: Task, tx: Mapping[str, optax.GradientTransformation], batch: Batch,
    seed: jax.Array | int, *, ema: bool = False,
) -> TrainState:
  """An initial state; a pure function, to be traced by `jax.eval_shape` or jit.

  Args:
    task: the task that gives the variables.
    tx: player -> optimizer.
    batch: a batch or its specification, of which only the shapes are read.
    seed: the run's seed.
    ema: whether to keep averages of the parameters.
  """
  key = jax.random.key(seed)
  params_key = jax.random.fold_in(key, INIT)
  batch = {k: jnp.zeros(v.shape, v.dtype) for k, v in batch.items()}
  variables = dict(task.init(params_key, batch))
  params = variables.pop("params")
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, model_state=variables,
                    opt_state={player: tx[player].init(player_params(params, player))
                               for player in dict.fromkeys(task.players)},
                    rng=jax.random.key_data(key),
                    ema=jax.tree.map(jnp.copy, averaged(params, variables)) if ema else {},
                    failed_step=jnp.full((), NOT_FAILED, jnp.int32),)


def check_format(stored: Mapping[str, Any], path: Path) -> None:
  """Raises a `UserError` unless the run of the file `path` has this version's format.

  Args:
    stored: the content of the file.
    path: the file, for the message.
  """
  found = stored.get("format", 1)
  if found != FORMAT:
    raise UserError(f"{path}: this run has format {found}, and this version of dljax reads format {FORMAT}; use the "
                    "version that wrote it, or train again in another --workdir")


def path_name(path: tuple[Any, ...]) -> str:
  """A pytree path as "params/conv1/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def state_sha256(
    state: Any, fetch: Callable[[Any], np.ndarray | None] = np.asarray,
) -> str | None:
  """SHA-256 over the sorted path, dtype, shape and bytes of every (unsharded) array of `state`.

  Args:
    state: the arrays.
    fetch: gives an array as NumPy's; it is called for one after the other. Where it gives None, as
      on all hosts but the first, there is no digest, and None is returned.
  """
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  digest, wanted = hashlib.sha256(), True
  for name, leaf in sorted(((path_name(path), leaf) for path, leaf in leaves),
                           key=operator.itemgetter(0)):
    wanted = _add(digest, name, fetch(leaf)) and wanted
  return digest.hexdigest() if wanted else None


def _add(digest: Any, name: str, array: np.ndarray | None) -> bool:
  """Adds an array to a digest; returns whether there was one."""
  if array is None:
    return False
  digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
  digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return True


def parameter_count(params: Any) -> int:
  """The number of scalars in `params` (arrays or their specifications)."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
