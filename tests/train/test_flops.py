"""FLOPs against hand counts, published counts and each other; layers add up to the whole."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dljax.models import lenet, resnet
from dljax.tasks.classification import Classification
from dljax.train import flops
from dljax.train.flops import count_flops


def _f32(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _conv(x, kernel, strides=(1, 1), padding="SAME", **kwargs):
  return lax.conv_general_dilated(
      x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs)


def test_matrix_products_cost_two_per_multiply_add():
  assert count_flops(jnp.dot, _f32(3, 5), _f32(5, 7)) == 2 * 3 * 5 * 7
  scores = lambda q, k: jnp.einsum("bhqd,bhkd->bhqk", q, k)
  assert count_flops(scores, _f32(2, 3, 5, 7), _f32(2, 3, 11, 7)) == 2 * 2 * 3 * 5 * 11 * 7


@pytest.mark.parametrize("options, x, kernel, expected", [
    ({}, (2, 8, 8, 3), (3, 3, 3, 16), 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)),
    ({"strides": (2, 2)}, (2, 8, 8, 3), (3, 3, 3, 16), 2 * (2 * 4 * 4 * 16) * (3 * 3 * 3)),
    ({"padding": "VALID"}, (2, 8, 8, 3), (3, 3, 3, 16), 2 * (2 * 6 * 6 * 16) * (3 * 3 * 3)),
    ({"rhs_dilation": (2, 2), "padding": "VALID"}, (2, 8, 8, 3), (3, 3, 3, 16),
     2 * (2 * 4 * 4 * 16) * (3 * 3 * 3)),
    ({"feature_group_count": 4}, (2, 8, 8, 4), (3, 3, 1, 16), 2 * (2 * 8 * 8 * 16) * (3 * 3)),
    # Transposed, from 8 x 8 to 16 x 16: each input meets each tap of a 2 x 2 window once.
    ({"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}, (2, 8, 8, 3), (2, 2, 3, 16),
     2 * (2 * 64 * 16) * (4 * 3)),
])
def test_convolutions_by_hand(options, x, kernel, expected):
  assert count_flops(lambda a, k: _conv(a, k, **options), _f32(*x), _f32(*kernel)) == expected


@pytest.mark.parametrize("strides, groups", [((1, 1), 1), ((2, 2), 1), ((1, 1), 4), ((2, 2), 4)])
def test_both_gradients_of_a_convolution_cost_the_forward_pass_each(strides, groups):
  x, kernel = _f32(2, 32, 32, 8), _f32(3, 3, 8 // groups, 16)
  conv = lambda a, k: _conv(a, k, strides, feature_group_count=groups)
  forward = count_flops(conv, x, kernel)
  out = jax.eval_shape(conv, x, kernel)
  all_three = count_flops(lambda a, k, g: jax.vjp(conv, a, k)[1](g), x, kernel, out)
  assert all_three == pytest.approx(3 * forward, rel=0.1)


def test_elementwise_and_reductions_count_floats_once():
  x = _f32(4, 6)
  assert count_flops(lambda x: jnp.tanh(x) + x, x) == 48
  assert count_flops(jnp.sum, x) == 24
  assert count_flops(lambda x: x.T.reshape(-1)[::2], x) == 0
  assert count_flops(lambda i: i * 2 + 1, jax.ShapeDtypeStruct((4, 6), jnp.int32)) == 0
  assert count_flops(lambda x: x * x, jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)) == 24
  pooled = lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2), (2, 2), "VALID")
  assert count_flops(pooled, x) == 24


def test_control_flow():
  x = _f32(8, 8)
  product = 2 * 8**3
  step = lambda c, _: (c @ c, None)
  assert count_flops(lambda x: lax.scan(step, x, None, length=7)[0], x) == 7 * product
  assert count_flops(lambda x: lax.cond(True, lambda: x @ x @ x, lambda: x @ x), x) == 2 * product
  assert count_flops(jax.jit(lambda x: jax.jit(jnp.dot)(x, x)), x) == product
  turn = lambda c: (c[0] + 1, c[1] @ c[1])
  assert count_flops(lambda x: lax.while_loop(lambda c: c[0] < 9, turn, (0, x))[1], x) == product
  assert count_flops(lambda x: jax.nn.relu(x) @ x, x) == product + 64  # a custom derivative around a jit


def test_rematerialisation_is_paid_for():
  x = _f32(8, 8)
  chain = lambda x: jnp.sin(x @ x) @ x
  plain = count_flops(jax.grad(lambda x: chain(x).sum()), x)
  again = count_flops(jax.grad(lambda x: jax.checkpoint(chain)(x).sum()), x)
  assert again >= plain + 2 * 8**3


def test_mapped_programs_count_every_device():
  x = _f32(8, 6)
  mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
  whole = count_flops(lambda x: x @ x.T[:, :2], x)
  assert whole == 2 * 8 * 6 * 2
  sharded = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
  assert count_flops(sharded, x) == whole
  assert count_flops(jax.pmap(lambda x: x @ x.T), _f32(4, 2, 6)) == whole


def _rows(model, *inputs, train=False):
  variables = dict(jax.eval_shape(lambda key: model.init(key, *inputs, train=train), jax.random.key(0)))
  params = variables.pop("params")
  apply = lambda p, state, *args: model.apply({"params": p, **state}, *args, train=train)
  return flops.layers(apply, params, variables, *(jax.ShapeDtypeStruct(i.shape, i.dtype) for i in inputs))


def test_lenet_by_hand():
  """LeCun et al. 1998, figure 2: products, biases, then what the network does between its layers."""
  rows = {row.path: row for row in _rows(lenet.VARIANTS["lenet5"](num_classes=10), jnp.zeros((1, 28, 28, 1)))}
  by_layer = {name: (row.kind, row.shape, row.parameters, row.flops) for name, row in rows.items() if name}
  conv = lambda side, inputs, outputs: (2 * 25 * inputs + 1) * outputs * side * side
  dense = lambda inputs, outputs: (2 * inputs + 1) * outputs
  assert by_layer == {
      "c1": ("Conv", (1, 28, 28, 6), 156, conv(28, 1, 6)),
      "c3": ("Conv", (1, 10, 10, 16), 2416, conv(10, 6, 16)),
      "c5": ("Dense", (1, 120), 48120, dense(400, 120)),
      "f6": ("Dense", (1, 84), 10164, dense(120, 84)),
      "head": ("Dense", (1, 10), 850, dense(84, 10)),
  }
  assert sum(row.parameters for row in rows.values()) == 61706


@pytest.mark.parametrize("variant, expected, multiply_adds", [
    ("resnet18", 11689512, 1.814e9), ("resnet50", 25557032, 4.089e9),
    pytest.param("resnet152", 60192808, 11.514e9, marks=pytest.mark.slow)])
def test_resnet_matches_published_counts(variant, expected, multiply_adds):
  """torchvision's table of weights gives 1.81, 4.09 and 11.51 billion multiply-adds of products alone."""
  model = resnet.VARIANTS[variant](num_classes=1000)
  parameters, total = flops.totals(_rows(model, jnp.zeros((1, 224, 224, 3))))
  assert parameters == expected
  assert 2 * multiply_adds < total < 2.02 * multiply_adds


class _Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.relu(nn.Dense(8, name="dense")(x)) + x


class _Net(nn.Module):
  """The same block plain, rematerialised, scanned three times, and twice with shared parameters."""

  @nn.compact
  def __call__(self, x, train):
    x = _Block(name="plain")(x)
    x = nn.remat(_Block)(name="remat")(x)
    body = lambda block, carry, _: (block(carry), None)
    scanned = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    x, _ = scanned(_Block(name="scanned"), x, None)
    shared = _Block(name="shared")
    return jnp.tanh(shared(shared(x)))


def test_layers_survive_remat_scan_and_sharing():
  rows = {row.path: row for row in _rows(_Net(), jnp.zeros((2, 8)), train=True)}
  dense, block = 2 * 2 * 8 * 8 + 16, 32
  for name, times in (("plain", 1), ("remat", 1), ("scanned", 3), ("shared", 2)):
    assert rows[f"{name}/dense"].flops == times * dense, name
    assert rows[name].flops == times * block, name
    assert rows[f"{name}/dense"].parameters == (3 if name == "scanned" else 1) * 72, name
    assert (rows[name].kind, rows[f"{name}/dense"].kind) == ("_Block", "Dense")
  assert rows[""].flops == 16


def test_layers_of_a_gradient_too():
  model = _Net()
  params = jax.eval_shape(lambda key: model.init(key, jnp.zeros((2, 8)), True), jax.random.key(0))["params"]
  loss = lambda p, x: model.apply({"params": p}, x, True).sum()
  rows = {row.path: row for row in flops.layers(jax.grad(loss), params, _f32(2, 8))}
  products = 2 * 2 * 8 * 8
  around = lambda count: pytest.approx(count * products, rel=0.15)  # biases
  assert rows["plain/dense"].flops == around(2)  # forward and kernel; nobody asks for the input's gradient
  assert rows["remat/dense"].flops == around(4)  # forward twice, kernel, input
  assert rows["scanned/dense"].flops == around(3 * 3)
  assert rows["shared/dense"].flops == around(2 * 3)


class _Sized(nn.Module):
  width: int

  def doubled(self):
    return 2 * self.width

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.width, name="dense")(x)


def test_a_module_may_be_asked_for_a_size_outside_of_apply():
  model = _Sized(4)
  params = jax.eval_shape(lambda key: model.init(key, jnp.zeros((2, 8))), jax.random.key(0))["params"]
  rows = flops.layers(lambda p, x: model.apply({"params": p}, x).sum() / model.doubled(), params, _f32(2, 8))
  dense, = (row for row in rows if row.parameters)
  assert (dense.path, dense.parameters, dense.flops) == ("dense", 36, 2 * 2 * 8 * 4 + 8)


def _task_and_spec(variant="resnet20", rows=32):
  task = Classification(resnet.VARIANTS[variant](num_classes=10), 10)
  ints = jax.ShapeDtypeStruct((rows,), jnp.int32)
  spec = {"image": _f32(rows, 32, 32, 3), "label": ints, "mask": _f32(rows), "id": ints, "host/name": ints}
  return task, spec


def test_rows_of_a_task_add_up():
  task, spec = _task_and_spec()
  rows = flops.task_layers(task, spec)
  one = {k: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype) for k, s in spec.items() if k != "host/name"}
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = dict(jax.eval_shape(task.init, key, one))
  params = variables.pop("params")
  loss = lambda p, s, b, k: task.loss(p, s, b, k, denominators=task.denominators(b), train=True, player="all").loss
  assert flops.totals(rows) == (269722, count_flops(loss, params, variables, one, key))
  assert rows == flops.task_layers(*_task_and_spec(rows=64))  # of one example, whatever the batch


@pytest.mark.parametrize("limit", [1, 5, 12, 40, 1000])
def test_folding_keeps_totals_and_stays_short(limit):
  rows = flops.task_layers(*_task_and_spec("resnet56"))
  folded = flops.fold(rows, limit)
  assert flops.totals(folded) == flops.totals(rows)
  assert (folded == rows) == (limit >= len(rows))
  assert len(folded) <= max(limit, 15)
  if limit == 12:
    assert any(row.path == "stage1_block0 to stage1_block8: 9 alike" for row in folded), folded


def test_unused_parameters_are_counted():
  rows = flops.layers(lambda p, x: x * 2, {"spare": {"kernel": _f32(3, 4)}}, _f32(5))
  assert [(row.path, row.parameters, row.flops) for row in rows] == [("", 12, 0), (flops.OUTSIDE, 0, 5)]
