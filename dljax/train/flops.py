"""Floating-point operations, counted from the traced program, in total and by layer.

These operations count:
- Products: a multiply-add of a matrix product or a convolution counts two. Every output position
  of a convolution costs its whole window, taps on padding included, as in published counts; taps
  on the zeros that a transposed convolution puts between its inputs are free.
- Elementwise arithmetic on floating-point numbers: each result counts one, be it a sum or a tanh.
- Reductions, windowed ones too: each input number counts one.
Comparison, selection, conversion, data movement, random bits and communication do not count.

A loop counts its body times its length (once for a `while` of unknown length), a Pallas kernel its
body at each place of its grid, a branch its costliest side, and a rematerialised part each time that
it runs. The counts are those of the
global program: the work of all devices together. Papers on convolutional networks give the
multiply-adds of products alone; twice their number equals ours within about 2 %.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.extend import core

from dljax.tasks.base import Task
from dljax.train.state import path_name

_ELEMENTWISE = frozenset(
    "add add_any sub mul div rem pow integer_pow sqrt rsqrt cbrt square exp exp2 expm1 log log1p tanh "
    "logistic sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc erf_inv lgamma digamma "
    "max min clamp neg abs sign floor ceil round".split())
_REDUCTIONS = frozenset(
    "reduce reduce_sum reduce_prod reduce_max reduce_min cumsum cumprod cummax cummin cumlogsumexp".split())
_WINDOWS = frozenset("reduce_window reduce_window_sum reduce_window_max reduce_window_min".split())
_SCATTERS = frozenset("scatter-add scatter_add scatter-mul scatter_mul".split())

# Marks the equations of a layer in the name stack, through jit, remat, scan and grad.
_SCOPE = "dljax_layer_"
OUTSIDE = "(outside the layers)"


@dataclasses.dataclass(frozen=True)
class Layer:
  """One row of the model's table.

  Attributes:
    path: the layer's place in the tree of modules, as in the parameters: "stage1_block0/conv1"; ""
      is the model itself.
    kind: the module's class, e.g. "Conv".
    shape: the shape of its (first) output, or None where there is none.
    parameters: the number of scalars that it holds, without its sub-layers.
    flops: the operations of its forward pass, without its sub-layers.
  """

  path: str
  kind: str
  shape: tuple[int, ...] | None
  parameters: int
  flops: int


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
  """The floating-point operations of `fn(*args)`, as the top of this file defines them.

  Args:
    fn: any traceable function, compiled by jit or pmap or not at all.
    args: arrays or their specifications.
  """
  return sum(_count(jax.make_jaxpr(fn)(*args).jaxpr, "").values())


def layers(fn: Callable[..., Any], params: Any, *args: Any) -> list[Layer]:
  """The layers that `fn(params, *args)` runs, in order of their first call.

  Args:
    fn: applies Flax modules with `params`.
    params: the parameters (or their specifications), a tree whose paths are the modules'.
    args: arrays or their specifications.

  Returns:
    Those layers that hold parameters or cost something. Their `parameters` add up to all of
    `params`, and their `flops`, with the row `OUTSIDE`, to `count_flops(fn, params, *args)`.
  """
  seen: dict[str, int] = {}
  kinds: list[str] = []
  shapes: dict[str, tuple[int, ...] | None] = {}

  def watch(method, method_args, kwargs, context):
    if context.module.scope is None:  # a call outside `apply`, such as for a size, runs no layer
      return method(*method_args, **kwargs)
    path = "/".join(context.module.path)
    if path not in seen:
      seen[path] = len(kinds)
      kinds.append(type(context.module).__name__)
    with jax.named_scope(f"{_SCOPE}{seen[path]}"):
      out = method(*method_args, **kwargs)
    if context.method_name == "__call__":
      shapes[path] = next((x.shape for x in jax.tree.leaves(out) if hasattr(x, "shape")), None)
    return out

  with nn.intercept_methods(watch):
    # The function is a new one, because a cached trace would carry no scopes.
    jaxpr = jax.make_jaxpr(lambda *a: fn(*a))(params, *args).jaxpr
  flops = _count(jaxpr, "")

  parameters = collections.Counter()
  for leaf_path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    owner = path_name(leaf_path)
    while owner and owner not in seen:
      owner = owner.rpartition("/")[0]
    parameters[owner] += math.prod(leaf.shape)
  rows = [Layer(path, kinds[i].removeprefix("Checkpoint"), shapes.get(path), parameters[path],
                flops[i]) for path, i in seen.items()]
  if "" not in seen:
    rows.append(Layer("", "", None, parameters[""], 0))
  rows.append(Layer(OUTSIDE, "", None, 0, flops[None]))
  return [row for row in rows if row.parameters or row.flops]


def task_layers(task: Task, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> list[Layer]:
  """The layers of a task's model in the forward pass of training, on a batch of one example."""
  batch = {k: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype) for k, s in batch_spec.items()
           if not k.startswith("host/")}
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = dict(jax.eval_shape(task.init, key, batch))
  params = variables.pop("params")

  def loss(params, model_state, batch, rng):
    return task.loss(params, model_state, batch, rng, denominators=task.denominators(batch),
                     train=True, player=task.players[-1]).loss

  return layers(loss, params, variables, batch, key)


def totals(rows: Sequence[Layer]) -> tuple[int, int]:
  """(parameters, FLOPs) of all rows."""
  return sum(row.parameters for row in rows), sum(row.flops for row in rows)


def fold(rows: Sequence[Layer], limit: int) -> list[Layer]:
  """The same rows in about `limit` lines: blocks in place of their layers, then runs of equal
  blocks.

  Where there are more rows than `limit`, cuts every path at the greatest depth (at least 1) that
  gives no more, and adds up what falls together; if that is not enough, also neighbours that are
  alike. The totals stay.
  """
  depth = max((row.path.count("/") + 1 for row in rows), default=1)
  while depth > 1 and len(_cut(rows, depth)) > limit:
    depth -= 1
  blocks = _cut(rows, depth)
  if len(blocks) <= limit:
    return blocks
  runs = [list(run) for _, run in itertools.groupby(
      blocks, key=lambda row: (row.kind, row.shape, row.parameters, row.flops))]
  return [dataclasses.replace(run[0], path=run[0].path if len(run) == 1
                              else f"{run[0].path} to {run[-1].path}: {len(run)} alike",
                              parameters=sum(row.parameters for row in run),
                              flops=sum(row.flops for row in run)) for run in runs]


def _cut(rows: Sequence[Layer], depth: int) -> list[Layer]:
  blocks: dict[str, Layer] = {}
  for row in rows:
    path = "/".join(row.path.split("/")[:depth])
    block = blocks.get(path, Layer(path, "", None, 0, 0))
    own = row if path == row.path else block
    blocks[path] = Layer(
        path, own.kind, own.shape, block.parameters + row.parameters, block.flops + row.flops)
  return list(blocks.values())


def _count(jaxpr: core.Jaxpr, stack: str) -> collections.Counter:
  """Operations by the number of their innermost layer, or None for those outside any layer."""
  total = collections.Counter()
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    inner = f"{stack}/{eqn.source_info.name_stack}"
    own = _own_flops(eqn)
    if own is not None:
      scopes = re.findall(rf"{_SCOPE}(\d+)", inner)
      total[int(scopes[-1]) if scopes else None] += own
    elif name == "cond":
      branches = params["branches"]
      # The branches may be forms of one operator by platform; the last one is its definition.
      if params.get("branches_platforms"):
        branches = branches[-1:]
      branches = [_count(_open(branch), inner) for branch in branches]
      total.update(max(branches, key=lambda counts: sum(counts.values())))
    else:
      times = 1
      if name == "scan":
        times = params["length"]
      elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
      elif name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
      for sub in core.jaxprs_in_params(params):
        for layer, flops in _count(_open(sub), inner).items():
          total[layer] += times * flops
  return total


def _open(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
  return getattr(jaxpr, "jaxpr", jaxpr)


def _own_flops(eqn: core.JaxprEqn) -> int | None:
  """The operations of one equation, or None if they are those of the programs inside it."""
  name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
  if name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(out.shape) * math.prod(lhs[d] for d in contracted)
  if name == "conv_general_dilated":
    return 2 * _convolution_macs(eqn)
  if name in _SCATTERS:
    return math.prod(eqn.invars[2].aval.shape)
  if name in _WINDOWS:
    return math.prod(out.shape) * math.prod(eqn.params["window_dimensions"])
  if name == "select_and_scatter_add":
    return math.prod(eqn.invars[0].aval.shape)
  if name in _REDUCTIONS:
    return math.prod(eqn.invars[0].aval.shape) if jax.dtypes.issubdtype(out.dtype,
                                                                        np.inexact) else 0
  if name in _ELEMENTWISE:
    return math.prod(out.shape) if jax.dtypes.issubdtype(out.dtype, np.inexact) else 0
  return None


def _convolution_macs(eqn: core.JaxprEqn) -> int:
  numbers, params = eqn.params["dimension_numbers"], eqn.params
  rhs, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
  macs = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
  for i, (out_dim, rhs_dim) in enumerate(zip(numbers.out_spec[2:], numbers.rhs_spec[2:],
                                             strict=True)):
    position = (np.arange(out[out_dim])[:, None] * params["window_strides"][i]
                + np.arange(rhs[rhs_dim])[None, :] * params["rhs_dilation"][i] - params["padding"][i][0])
    macs *= int(np.sum(position % params["lhs_dilation"][i] == 0))
  return macs

