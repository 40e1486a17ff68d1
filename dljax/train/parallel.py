"""Devices: the mesh, the sharding of arrays, and the only use of jit and pmap.

A step is a pure function; `compile_step` compiles it for many devices in one of two ways:

- "jit": arrays are global, sharded by NamedSharding over a mesh with the axes `data`, `fsdp` and
  `tensor`; XLA inserts the collectives.
- "pmap": each device runs the step on its own rows, and `ops.collectives` inserts the collectives.
  It is data parallel only, and kept for code bases that still use pmap.

Under both the state has no device axis, so a checkpoint of one restores under the other.
"""

import dataclasses
import fnmatch
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dljax.errors import RunError, UserError
from dljax.ops import collectives
from dljax.tasks.base import CARRY
from dljax.train import hosts
from dljax.train.state import TrainState, join_carry, path_name, player_params, split_carry

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the axes that split a batch
HOST = "host/"  # fields of a batch that stay on the host
_PMAP_AXIS = "batch"

Mode = Literal["jit", "pmap"]
# The role of a step's argument or result: the TrainState (or a part of it), rows of a batch, or a
# value that is the same everywhere.
Role = Literal["state", "batch", "shared"]


def initialize() -> None:
  """Joins the other processes of this run, if the environment says that there are some.

  A TPU pod, SLURM, Open MPI 4 and a Kubernetes job are recognised, and any MPI where mpi4py is
  installed; anywhere else set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID.

  Raises:
    UserError: the environment says too little, or what it says is impossible.
    RunError: other processes have not connected in time.
  """
  hosts.join()


def parse_mesh(text: str) -> dict[str, int]:
  """"data:4,fsdp:2" -> {"data": 4, "fsdp": 2, "tensor": 1}; "" -> {} (all devices on `data`)."""
  if not text:
    return {}
  sizes = dict.fromkeys(AXES, 1)
  for part in text.split(","):
    name, _, number = part.partition(":")
    try:
      size = int(number)
    except ValueError:
      size = 0
    if name not in AXES or size < 1:
      raise UserError(f"--mesh: {part!r} is not AXIS:SIZE with an axis of {', '.join(AXES)}; write it as "
                      "--mesh=data:4,fsdp:2,tensor:1")
    sizes[name] = size
  return sizes


def make_mesh(
    sizes: Mapping[str, int], mode: Mode = "jit", devices: Sequence[Any] | None = None,
) -> Mesh:
  """The mesh of `sizes` over `devices`: by default all; the first ones if it needs fewer.

  Neighbours on the mesh are neighbours in the machine, as far as its wires allow.

  Raises:
    UserError: the mesh needs more devices than there are, or another number where several hosts
      take part; or pmap is asked to shard parameters.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict(sizes) or {"data": len(devices), "fsdp": 1, "tensor": 1}
  shape = tuple(sizes[axis] for axis in AXES)
  count = math.prod(shape)
  if mode == "pmap" and count != sizes["data"]:
    raise UserError("--parallelism=pmap is data parallel only; use --parallelism=jit with fsdp or tensor axes")
  if count > len(devices) or (jax.process_count() > 1 and count != len(devices)):
    text = ",".join(f"{k}:{v}" for k, v in sizes.items())
    raise UserError(f"--mesh={text} needs {count} devices and there are {len(devices)}; "
                    f"choose sizes whose product is {len(devices)}")
  # pmap takes devices in the order of their processes.
  placed = devices[:count] if mode == "pmap" else _by_wires(shape, devices[:count])
  return Mesh(np.array(placed).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _by_wires(shape: tuple[int, ...], devices: Sequence[Any]) -> Any:
  """The devices in the order of a mesh of `shape` whose neighbours are close to each other.

  The order of `jax.devices()` is that of the processes. On 16 x 16 chips of a TPU v5e the
  neighbours on an axis of 16 would be 9 wires apart instead of one.
  """
  # An axis of the machine is split among axes of the mesh only where need be: it makes rings longer.
  for split in False, True:
    try:
      return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
    except (AssertionError, NotImplementedError, ValueError):
      continue  # not for this mesh, or a part of a machine or several machines
  return devices


def _platform(mesh: Mesh) -> str:
  """The platform of a mesh's devices, which need not be this machine's."""
  return mesh.devices.flat[0].platform


def count_shards(mesh: Mesh) -> int:
  """The number of parts that the mesh cuts a batch into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
  """The rows of a global batch that the devices of one process hold, i64[b], ascending.

  They need not follow each other. Processes whose devices differ only in their place on `tensor`
  hold the same rows.

  Args:
    mesh: the devices.
    batch_size: B, the number of rows over all devices, which the mesh divides.
    process: the process; by default this one.
  """
  blocks = np.arange(batch_size).reshape(count_shards(mesh), -1)
  return blocks[_blocks(mesh, process)].reshape(-1)


def _blocks(mesh: Mesh, process: int | None = None) -> list[int]:
  """The parts of a batch, out of `count_shards`, that a process's devices hold, ascending."""
  process = jax.process_index() if process is None else process
  places = mesh.devices.reshape(count_shards(mesh), -1)  # AXES begins with BATCH_AXES
  return [block for block, devices in enumerate(places)
          if any(device.process_index == process for device in devices)]


def global_rows(mesh: Mesh, rows: int) -> int:
  """The number of rows of a global batch of which this process holds `rows`."""
  return rows * count_shards(mesh) // len(_blocks(mesh))


def check_batch_size(
    flag: str, batch_size: int, mesh: Mesh, accumulation: int = 1, parts: int = 1,
) -> None:
  """Raises a UserError unless every device gets the same number of rows of every micro-batch and
  part.

  Args:
    flag: the flag of the batch size, for the message.
    batch_size: the number of rows over all devices.
    mesh: the devices.
    accumulation: the number of micro-batches.
    parts: the number of parts that the players' turns read, `Task.own_rows`.
  """
  shards = count_shards(mesh)
  if batch_size % (shards * accumulation * parts):
    cuts = [f"{shards} devices"]
    cuts += [f"{accumulation} micro-batches"] * (accumulation > 1) + [f"{parts} parts of a batch"] * (parts > 1)
    raise UserError(f"{flag}={batch_size} does not divide over {' times '.join(cuts)}; "
                    f"choose a multiple of {shards * accumulation * parts}")


@dataclasses.dataclass(frozen=True)
class Sharding:
  """How parameters lie on a mesh.

  Attributes:
    rules: (pattern of a parameter's path, mesh axis of each dimension); the first match counts.
      See `tasks.base.TaskBase.sharding`.
    above: the size in bytes from which `fsdp` splits an array that has no rule.
  """

  rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
  above: int = 0

  def spec(self, path: str, x: Any, mesh: Mesh) -> P:
    """The mesh axes of each dimension of the parameter `x` (with a shape and dtype) at `path`.

    A rule applies whatever the array's size. Without a rule, `fsdp` splits the largest dimension
    that it divides, or in a convolution's kernel (rank 4) the last, its output channels. Axes of
    one device are left out.

    Raises:
      UserError: a rule is for another rank, or an axis does not divide the dimension that its rule
        gives it.
    """
    for pattern, axes in self.rules:
      if fnmatch.fnmatchcase(path, pattern):
        self._check(pattern, axes, path, x.shape, mesh)
        return P(*(axis if axis and mesh.shape[axis] > 1 else None for axis in axes))
    size = mesh.shape["fsdp"]
    if size == 1 or math.prod(x.shape) * x.dtype.itemsize < self.above:
      return P()
    dimensions = range(len(x.shape))[-1:] if len(x.shape) == 4 else range(len(x.shape))
    divisible = [d for d in dimensions if x.shape[d] and x.shape[d] % size == 0]
    if not divisible:
      return P()
    largest = max(divisible, key=lambda d: x.shape[d])
    return P(*("fsdp" if d == largest else None for d in range(len(x.shape))))

  def _check(
      self, pattern: str, axes: Sequence[str | None], path: str, shape: tuple[int, ...],
      mesh: Mesh,
  ) -> None:
    if len(axes) != len(shape):
      raise UserError(f"the sharding rule {pattern!r} has {len(axes)} dimensions and {path} has "
                      f"{len(shape)}: give the rule one axis, or None, for each")
    for dimension, axis in enumerate(axes):
      if axis and shape[dimension] % mesh.shape[axis]:
        size = mesh.shape[axis]
        fitting = [n for n in range(1, size) if shape[dimension] % n == 0][-1]
        raise UserError(f"--mesh={axis}:{size} does not divide dimension {dimension} of {path}, "
                        f"which has {shape[dimension]} entries; choose {axis}:{fitting}, or "
                        "another divisor of them")


def state_shardings(state: Any, mesh: Mesh, sharding: Sharding) -> Any:
  """The sharding of each array of a TrainState, or of variables by collection.

  Parameters lie as `sharding` says, and so do the arrays that the optimizer and the EMA keep for
  each parameter: those whose path ends with the parameter's and whose shape is the same. A
  recurrent carry is split as the batch is. All else (other model state, counters, keys, an
  optimizer's factored moments) is the same on every device.

  Raises:
    UserError: see `Sharding.spec`.
  """
  replicated = NamedSharding(mesh, P())
  if isinstance(state, TrainState):

    def like(tree: Any, params: Any) -> Any:
      return _like_params(tree, params, mesh, sharding)

    return state.replace(
        step=replicated, rng=replicated, failed_step=replicated,
        model_state=state_shardings(state.model_state, mesh, sharding),
        params=like(state.params, state.params),
        opt_state={player: like(part, player_params(state.params, player))
                   for player, part in state.opt_state.items()},
        ema=like(state.ema, state.params))
  rows = batch_sharding(mesh)
  return {name: jax.tree.map(lambda _: rows if name == CARRY else replicated, part)
          for name, part in state.items()}


def _like_params(tree: Any, params: Any, mesh: Mesh, sharding: Sharding) -> Any:
  """The sharding of each array of `tree`: that of the parameter it belongs to, or whole."""
  specs = {}
  for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
    specs[path_name(path)] = x.shape, NamedSharding(mesh, sharding.spec(path_name(path), x, mesh))
  whole = NamedSharding(mesh, P())

  def find(path, x):
    for start in range(len(path)):  # the longest end first
      shape, found = specs.get(path_name(path[start:]), (None, whole))
      if shape == x.shape:
        return found
    return whole

  return jax.tree_util.tree_map_with_path(find, tree)


def idle_axes(state: TrainState, mesh: Mesh) -> list[str]:
  """The axes `fsdp` and `tensor`, where they have several devices and split no parameter.

  Args:
    state: the state with a sharding in each array, as `abstract_state` gives it.
    mesh: the devices.
  """
  placed = {axis for x in jax.tree.leaves(state.params) for axis in x.sharding.spec}
  return [axis for axis in AXES if axis != "data" and mesh.shape[axis] > 1 and axis not in placed]


def abstract(tree: Any, shardings: Any) -> Any:
  """The shapes, dtypes and shardings of `tree`, as a restore or a compilation needs them."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                      shardings)


def init_state(create: Callable[[], TrainState], mesh: Mesh, sharding: Sharding) -> TrainState:
  """Runs the pure function `create` on the mesh; every device makes only what it holds."""
  # The program runs only once. On a CPU the random numbers of a resnet20 take 20 s to compile with
  # all optimisations, and 3 s like this. A level that the environment asks for is left alone.
  level = "xla_backend_optimization_level"
  on_cpu = _platform(mesh) == "cpu"
  options = {level: 1} if on_cpu and level not in os.environ.get("XLA_FLAGS", "") else None
  shardings = state_shardings(jax.eval_shape(create), mesh, sharding)
  return jax.jit(create, out_shardings=shardings, compiler_options=options)()


def abstract_state(create: Callable[[], TrainState], mesh: Mesh, sharding: Sharding) -> TrainState:
  """The shapes, dtypes and shardings of the state that `init_state` would make."""
  shapes = jax.eval_shape(create)
  return abstract(shapes, state_shardings(shapes, mesh, sharding))


def compile_step(
    step: Callable[..., Any], mode: Mode, mesh: Mesh, *, inputs: Sequence[Role],
    outputs: Sequence[Role], donate: Sequence[int] = (), sharding: Sharding = Sharding(),
) -> Callable[..., Any]:
  """Compiles a pure step for the devices of `mesh`, as "jit" or as "pmap".

  Args:
    step: a function of arrays that returns a tuple, one entry per role of `outputs`.
    mode: "jit" or "pmap".
    mesh: the devices.
    inputs: the role of each argument. Batches come from `put_batch`.
    outputs: the role of each result.
    donate: the arguments whose buffers the results take over.
    sharding: how the parameters lie in a TrainState among the results.

  Returns:
    The compiled function. It has `.lower(*arguments)` too, for abstract arguments.
  """
  if mode == "pmap" and "batch" not in inputs:
    return jax.jit(step)  # every device holds all arguments, so there is nothing to map over
  if mode == "pmap":
    return _Mapped(step, mesh, inputs, outputs, donate)

  shardings = {"batch": batch_sharding(mesh), "shared": NamedSharding(mesh, P()), "state": None}
  target = collectives.Target(_platform(mesh), mesh, (("batch", BATCH_AXES), ("heads", ("tensor",))))

  @functools.wraps(step)
  def constrained(*args):
    with collectives.target_context(target):
      results = step(*args)
    return tuple(jax.lax.with_sharding_constraint(x, state_shardings(x, mesh, sharding))
                 if r == "state" else x for x, r in zip(results, outputs, strict=True))

  return jax.jit(
      constrained, in_shardings=tuple(shardings[r] for r in inputs),
      out_shardings=tuple(shardings[r] for r in outputs), donate_argnums=tuple(donate))


class _Mapped:
  """A step compiled by pmap.

  Outside of it a carry has no axis of devices, like the rest of a state.
  """

  def __init__(
      self, step, mesh: Mesh, inputs: Sequence[Role], outputs: Sequence[Role],
      donate: Sequence[int],
  ):
    def mapped(states, shared, batches, carries):
      values = {"state": iter(states), "shared": iter(shared), "batch": iter(batches)}
      args = [next(values[role]) for role in inputs]
      target = collectives.Target(_platform(mesh))
      with collectives.axis_context(_PMAP_AXIS), collectives.target_context(target):
        carries, results = _split_carries(step(*_join_carries(args, carries)), outputs)
      return *results, carries

    axes = {"batch": 0, "state": None, "shared": None}
    self._mesh, self._inputs = mesh, inputs
    # pmap takes one argument for each role, because an argument without an array, such as an empty
    # context, would shift its axes.
    self._step = jax.pmap(
        mapped, axis_name=_PMAP_AXIS, in_axes=(None, None, 0, 0),
        out_axes=(*(axes[r] for r in outputs), 0), devices=list(mesh.devices.flat),
        donate_argnums=tuple({("state", "shared", "batch").index(inputs[i]) for i in donate}))

  def __call__(self, *args):
    *results, carries = self._step(*self._arguments(args))
    return _join_carries(results, jax.tree.map(lambda x: _join_devices(x, self._mesh), carries))

  def lower(self, *args) -> jax.stages.Lowered:
    return self._step.lower(*self._arguments(args))

  def _arguments(self, args):
    carries, args = _split_carries(args, self._inputs)
    carries = jax.tree.map(lambda x: _split_devices(x, self._mesh), carries)
    states, shared, batches = (
        [x for x, own in zip(args, self._inputs, strict=True) if own == role]
        for role in ("state", "shared", "batch"))
    return states, shared, batches, carries


def _split_carries(args: Sequence[Any], roles: Sequence[Role]) -> tuple[list[Any], list[Any]]:
  """(each argument's carry, or {} if it has none; the rest of each argument)."""
  parts = [split_carry(x) if role == "state" else (x, {})
           for x, role in zip(args, roles, strict=True)]
  return [carry for _, carry in parts], [rest for rest, _ in parts]


def _join_carries(args: Sequence[Any], carries: Sequence[Any]) -> tuple[Any, ...]:
  return tuple(join_carry(x, carry) if carry else x
               for x, carry in zip(args, carries, strict=True))


def _split_devices(x: Any, mesh: Mesh) -> Any:
  """Rows [B, ...] -> [devices, B / devices, ...], as pmap takes them.

  Args:
    x: an array, its specification, or a tracer.
    mesh: the devices.
  """
  count = mesh.devices.size
  shape = (count, x.shape[0] // count, *x.shape[1:])
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=batch_sharding(mesh))
  if isinstance(x, jax.core.Tracer):
    return x.reshape(shape)
  return jax.make_array_from_single_device_arrays(
      shape, batch_sharding(mesh), [shard.data[None] for shard in x.addressable_shards])


def _join_devices(x: Any, mesh: Mesh) -> Any:
  """Rows as pmap returns them, [devices, B / devices, ...] -> [B, ...]."""
  shape = (mesh.devices.size * x.shape[1], *x.shape[2:])
  if isinstance(x, jax.core.Tracer):
    return x.reshape(shape)
  return jax.make_array_from_single_device_arrays(
      shape, batch_sharding(mesh), [shard.data[0] for shard in x.addressable_shards])


def zero_rows(tree: Any, mesh: Mesh) -> Any:
  """Zeros of the shapes and dtypes in `tree`, [B, ...], split as a batch is."""
  if not tree:
    return tree

  def zeros() -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

  return jax.jit(zeros, out_shardings=batch_sharding(mesh))()


def step_state(state: TrainState, mode: Mode, mesh: Mesh) -> TrainState:
  """A state of `mesh` as the steps return it, so that they compile once; copies nothing.

  The results of pmap are arrays of its own mesh, which has this host's devices.
  """
  return _on_every_device(state, Mesh(np.array(mesh.local_devices),
                                      (_PMAP_AXIS,))) if mode == "pmap" else state


def global_state(state: TrainState, mode: Mode, mesh: Mesh) -> TrainState:
  """The reverse of `step_state`: arrays of `mesh`, over all hosts, as a checkpoint needs them."""
  return _on_every_device(state, mesh) if mode == "pmap" else state


def _on_every_device(state: TrainState, mesh: Mesh) -> TrainState:
  """The state with all arrays but the carry, which are the same everywhere, on another mesh."""
  rest, carry = split_carry(state)
  return join_carry(jax.tree.map(lambda x: jax.make_array_from_single_device_arrays(
      x.shape, NamedSharding(mesh, P()), [shard.data for shard in x.addressable_shards]), rest), carry)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch or a carry, which splits its leading axis.

  It leaves out axes of one device, as a compiled step does for its results.
  """
  axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
  return NamedSharding(mesh, P(axes if len(axes) > 1 else axes[0]) if axes else P())


def abstract_batch(
    spec: Mapping[str, jax.ShapeDtypeStruct], mode: Mode, mesh: Mesh,
) -> dict[str, Any]:
  """The global batch of `spec` as `compile_step(...).lower` takes it."""
  count = mesh.devices.size
  shape = lambda s: (count, s.shape[0] // count, *s.shape[1:]) if mode == "pmap" else s.shape
  return {k: jax.ShapeDtypeStruct(shape(s), s.dtype, sharding=batch_sharding(mesh))
          for k, s in spec.items() if not k.startswith(HOST)}


def abstract_shared(value: np.generic, mesh: Mesh) -> jax.ShapeDtypeStruct:
  """A host scalar as `compile_step(...).lower` takes it."""
  return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, P()))


def put_batch(batch: Mapping[str, np.ndarray], mode: Mode, mesh: Mesh) -> dict[str, jax.Array]:
  """Puts this host's rows on its devices, without the fields for the host; does not wait.

  Args:
    batch: the rows of `batch_rows`, in that order.
    mode: "jit" or "pmap".
    mesh: the devices.

  Returns:
    Global arrays [B, ...], or [devices, B / devices, ...] for pmap.
  """
  rows = {k: np.asarray(v) for k, v in batch.items() if not k.startswith(HOST)}
  if jax.process_count() > 1:
    return {k: _put_rows(v, mode, mesh) for k, v in rows.items()}
  count = mesh.devices.size
  if mode == "pmap":
    rows = {k: v.reshape(count, len(v) // count, *v.shape[1:]) for k, v in rows.items()}
  return _putter(mesh)(rows)


def _put_rows(own: np.ndarray, mode: Mode, mesh: Mesh) -> jax.Array:
  """`put_batch` of one field, where several processes take part."""
  size = global_rows(mesh, len(own))
  rows = batch_rows(mesh, size)
  count = mesh.devices.size

  def piece(index: tuple[slice, ...]) -> np.ndarray:
    """The rows of one device, which this process holds all of."""
    first, last, _ = index[0].indices(count if mode == "pmap" else size)
    if mode == "pmap":  # the index is the device's number
      first, last = first * size // count, last * size // count
    start = int(np.searchsorted(rows, first))
    part = own[start:start + last - first]
    return part[None] if mode == "pmap" else part

  shape = (count, size // count) if mode == "pmap" else (size,)
  return jax.make_array_from_callback((*shape, *own.shape[1:]), batch_sharding(mesh), piece)


@functools.cache
def _putter(mesh: Mesh) -> Callable[[Any], Any]:
  """A compiled program that puts host arrays on the mesh, in a fifth of `jax.device_put`'s time.
  """
  sharding = batch_sharding(mesh)
  return jax.jit(lambda rows: rows, in_shardings=sharding, out_shardings=sharding,
                 donate_argnums=0)


def put_array(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """Puts a host array, which every process has, on the devices; each gets its part and no more.

  `jax.device_put` would gather the arrays of all processes on every device, to compare them.
  """
  return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def put_shared(value: Any, mesh: Mesh) -> Any:
  """Puts the same host value on every device."""
  return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), value)


def rows_to_host(tree: Any, mode: Mode) -> Any:
  """Results with role "batch" as NumPy arrays [B, ...], from all hosts."""
  if jax.process_count() > 1:
    tree = _multihost().process_allgather(tree, tiled=True)
  merge = lambda x: x.reshape(-1, *x.shape[2:]) if mode == "pmap" else x
  return jax.tree.map(lambda x: merge(np.asarray(x)), tree)


def some_rows_to_host(x: jax.Array, rows: np.ndarray, mode: Mode, mesh: Mesh) -> np.ndarray:
  """Some rows of one array of a global batch, on every host; the others stay where they are.

  Args:
    x: an array that `put_batch` gives, or a result with the role "batch".
    rows: the rows, i64[k], the same on every host.
    mode: "jit" or "pmap".
    mesh: the devices.
  """
  if x.sharding.mesh != mesh:  # the results of pmap are arrays of this host's devices
    x = jax.make_array_from_single_device_arrays(
        (mesh.devices.size, *x.shape[1:]), batch_sharding(mesh),
        [shard.data for shard in x.addressable_shards])
  # Few numbers of rows, as a program is compiled for each.
  padded = np.zeros(1 << max(len(rows) - 1, 0).bit_length(), np.int32)
  padded[:len(rows)] = rows
  return np.asarray(take_rows(mesh, mode)(x, padded))[:len(rows)]


@functools.cache
def take_rows(mesh: Mesh, mode: Mode) -> Callable[[jax.Array, np.ndarray], jax.Array]:
  """The compiled program (array of a global batch, rows) -> the rows, on every device of `mesh`."""

  def take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return (x.reshape(-1, *x.shape[2:]) if mode == "pmap" else x)[rows]

  return jax.jit(take, out_shardings=NamedSharding(mesh, P()))


def gather_hosts(
    batch: Mapping[str, np.ndarray], mode: Mode, mesh: Mesh,
) -> dict[str, np.ndarray]:
  """The global batch on every host, in the order of its rows.

  Fields of objects and bytes are left out.

  Args:
    batch: the rows of `batch_rows`, in that order.
    mode: "jit" or "pmap".
    mesh: the devices.
  """
  if jax.process_count() == 1:
    return dict(batch)
  found = {}
  for key, own in sorted(batch.items()):
    if own.dtype.kind in "OS":
      continue
    if own.dtype.kind == "U":  # the longest text of all hosts decides the width
      width = int(np.max(_multihost().process_allgather(np.array(own.dtype.itemsize))))
      own = own.astype(f"U{width // 4}")
    # All types travel as bytes, because arrays on devices may know neither texts nor 64 bits.
    data = np.ascontiguousarray(own).view(np.uint8).reshape(len(own), -1)
    rows = rows_to_host(_put_rows(data, mode, mesh), mode)
    found[key] = np.ascontiguousarray(rows).view(own.dtype).reshape(-1, *own.shape[1:])
  return found


def state_to_host(state: TrainState) -> Any:
  """A global state as unsharded NumPy arrays, on every host."""
  return jax.tree.map(array_to_host, state)


def array_to_host(x: jax.Array) -> np.ndarray:
  """One array of a global state, unsharded, on every host; see `array_to_first_host`."""
  return _read(x, here=True)


def array_to_first_host(x: jax.Array) -> np.ndarray | None:
  """One array of a global state, unsharded, on the first host; None on the others.

  All hosts take part. While it is called, a device holds at most `PIECE` bytes besides its part of
  the array, and then nothing more than before; `x` keeps no copy.
  """
  return _read(x, here=jax.process_index() == 0)


def _read(x: jax.Array, here: bool) -> np.ndarray | None:
  if jax.process_count() > 1 and not x.is_fully_replicated:
    return read_pieces(x, here)
  # An array remembers what NumPy has read; this one is forgotten.
  return np.asarray(jax.make_array_from_single_device_arrays(
      x.shape, x.sharding, [shard.data for shard in x.addressable_shards])) if here else None


PIECE = 2**26  # bytes of an array that a device holds at once, while the array goes to a host


def read_pieces(x: jax.Array, here: bool, most: int = PIECE) -> np.ndarray | None:
  """An array that several devices share, piece by piece.

  Every device sends a slice of its own part at a time, and receives those of the others.

  Args:
    x: the array, with a NamedSharding.
    here: whether this host wants it; None is returned otherwise.
    most: the size of a piece in bytes.
  """
  part = x.sharding.shard_shape(x.shape)
  axis, size = piece_of(x, most)
  shards = x.shape[axis] // part[axis]
  before, after = x.shape[:axis], x.shape[axis + 1:]
  whole = np.empty(x.shape, x.dtype) if here else None
  for start in range(0, part[axis], size):
    start = min(start, part[axis] - size)
    # One piece at a time is on its way, so that no device holds two.
    piece = jax.block_until_ready(cut_piece(x.sharding, axis, size)(x, np.int32(start)))
    if here:
      slices = np.asarray(piece.addressable_data(0)).reshape(*before, shards, size, *after)
      place = whole.reshape(*before, shards, part[axis], *after)
      place[(slice(None),) * (axis + 1) + (slice(start, start + size),)] = slices
  return whole


def piece_of(x: Any, most: int) -> tuple[int, int]:
  """How an array is cut: the dimension, and the rows that each device sends of its part at once.

  Args:
    x: the array or its specification, with a sharding.
    most: the size of a piece in bytes, if one row of each part is not more.
  """
  part = x.sharding.shard_shape(x.shape)
  axis = int(np.argmax(part))
  row = math.prod(x.shape) * x.dtype.itemsize // part[axis]
  return axis, min(max(most // row, 1), part[axis])


@functools.cache
def cut_piece(
    sharding: NamedSharding, axis: int, size: int,
) -> Callable[[jax.Array, np.int32], jax.Array]:
  """The compiled program (array, first row) -> `size` rows of each device's part, on every device.

  Args:
    sharding: how the array lies.
    axis: the dimension of the rows.
    size: the number of rows.
  """

  def cut(part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(part, start, size, axis)

  cut = jax.shard_map(cut, mesh=sharding.mesh, in_specs=(sharding.spec, P()),
                      out_specs=sharding.spec)
  return jax.jit(cut, out_shardings=NamedSharding(sharding.mesh, P()))


def of_first_host(value: float) -> float:
  """The first host's number on every host, so that all hosts decide alike by it."""
  if jax.process_count() == 1:
    return value
  # Arrays on devices may know no float64.
  words = np.frombuffer(np.float64(value).tobytes(), np.uint32)
  return float(np.frombuffer(np.asarray(_multihost().broadcast_one_to_all(words)).tobytes(),
                             np.float64)[0])


def any_host(flag: bool) -> bool:
  """Whether `flag` is true on any host; every host must call it at the same step."""
  return any(of_hosts(flag))


def of_hosts(value: int) -> list[int]:
  """The `value` of each host, an i32, on every host; every host must call it at the same step."""
  if jax.process_count() == 1:
    return [value]
  return _multihost().process_allgather(np.array(value, np.int32)).tolist()


def on_first_host(call: Callable[[], None], fault: str) -> None:
  """Makes a call on the first host; if it fails there, all hosts fail.

  Args:
    call: a function that may raise a `UserError` or a `RunError`.
    fault: what the other hosts say then.
  """
  error = None
  if jax.process_index() == 0:
    try:
      call()
    except (UserError, RunError) as e:
      error = e
  if any_host(error is not None):
    raise error or UserError(f"{fault}; the first host says why")


def _multihost():
  from jax.experimental import multihost_utils  # pylint: disable=g-import-not-at-top
  return multihost_utils


def steps_in_flight(mesh: Mesh) -> int:
  """The number of steps that may be dispatched before the first is done.

  Two keep a device busy. Virtual CPU devices allow one, because they share one thread pool, in
  which the collectives of two steps can wait for each other for ever.
  """
  virtual = _platform(mesh) == "cpu" and len(mesh.local_devices) > 1
  return 1 if virtual else 2
