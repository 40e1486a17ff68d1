"""BatchNorm against the formula written out in NumPy, over devices, masks and dtypes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dljax.models.layers import BatchNorm
from dljax.ops import collectives

SHAPE = (8, 3, 2, 5)  # B, H, W, C
MASKS = {
    "none": None,
    "whole": np.ones(8),
    "uneven": np.array([1, 1, 1, 0, 1, 1, 1, 0.0]),  # over four devices: 2, 1, 2 and 1 rows
    "empty shards": np.array([1, 1, 1, 0, 0, 0, 0, 0.0]),  # two devices see padding only
    "steps": np.arange(3) < np.array([3, 1, 0, 2, 3, 3, 1, 2])[:, None],  # of the second axis
}


def _inputs(dtype=np.float32):
  rng = np.random.RandomState(0)
  x = (3 + 2 * rng.normal(size=SHAPE)).astype(dtype)
  cotangent = rng.normal(size=SHAPE).astype(dtype)
  variables = {
      "params": {"scale": rng.uniform(0.5, 2, 5).astype(dtype), "bias": rng.normal(size=5).astype(dtype)},
      "batch_stats": {"mean": rng.normal(size=5).astype(dtype), "var": rng.uniform(0.5, 2, 5).astype(dtype)},
  }
  return x, cotangent, variables


def _by_hand(x, mask, cotangent, variables):
  """Outputs, running statistics and the gradients of sum(y * cotangent), in float64 NumPy.

  The gradient with regard to x is equation block (3.1) of the paper, for the rows that count.
  """
  x, cotangent = x.astype(np.float64), cotangent.astype(np.float64)
  scale, bias = variables["params"]["scale"], variables["params"]["bias"]
  mask = np.ones(len(x)) if mask is None else mask
  rows = x[mask > 0].reshape(-1, x.shape[-1])
  n = len(rows)
  mean, var = rows.mean(0), rows.var(0)
  inv = 1 / np.sqrt(var + 1e-5)
  x_hat = (x - mean) * inv
  g = cotangent * scale  # d sum / d x_hat, of every row: padding rows too are normalised
  counts = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
  dvar = -0.5 * inv**2 * np.sum(g * x_hat, (0, 1, 2)) / n
  dmean = -inv * np.sum(g, (0, 1, 2)) / n
  dx = g * inv + counts * (2 * dvar * (x - mean) + dmean)
  old = variables["batch_stats"]
  stats = {
      "mean": 0.9 * old["mean"] + 0.1 * mean,
      "var": 0.9 * old["var"] + 0.1 * rows.var(0, ddof=1),
  }
  grads = {"scale": np.sum(cotangent * x_hat, (0, 1, 2)), "bias": np.sum(cotangent, (0, 1, 2))}
  return scale * x_hat + bias, stats, dx, grads


def _step(params, batch_stats, x, mask, cotangent, dtype):
  """What a train step does with one shard: y, new statistics, gradients of this shard's share of the loss."""

  def loss(params, x):
    y, state = BatchNorm(dtype=dtype).apply(
        {"params": params, "batch_stats": batch_stats}, x, mask, train=True, mutable=["batch_stats"])
    return jnp.sum(y * cotangent), (y, state["batch_stats"])

  (grads, dx), (y, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
  return y, stats, dx, collectives.psum(grads)


@functools.cache
def _compiled(mode, dtype, masked):
  """`_step` for one device or any sharding, or for each of four devices."""
  step = functools.partial(_step, dtype=dtype)
  if mode != "pmap":
    return jax.jit(step)

  def shard(*shard_args):
    with collectives.axis_context("devices"):
      return step(*shard_args)

  in_axes = (None, None, 0, 0 if masked else None, 0)
  return jax.pmap(shard, "devices", in_axes=in_axes, devices=jax.devices()[:4])


def _run(mode, x, mask, cotangent, variables):
  step = _compiled("pmap" if mode == "pmap" else "jit", x.dtype, mask is not None)
  args = (variables["params"], variables["batch_stats"])
  if mode == "one device":
    return step(*args, x, mask, cotangent)
  devices = jax.devices()[:4]
  if mode == "jit":
    sharding = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
    put = lambda a: None if a is None else jax.device_put(a, sharding)
    y, *rest = step(*args, put(x), put(mask), put(cotangent))
    assert len(y.sharding.device_set) == 4
    return (y, *rest)
  split = lambda a: None if a is None else a.reshape(4, 2, *a.shape[1:])
  y, stats, dx, grads = step(*args, split(x), split(mask), split(cotangent))
  for leaf in jax.tree.leaves((stats, grads)):  # every device holds the same
    np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
  join = lambda a: a.reshape(-1, *a.shape[2:])
  return join(y), jax.tree.map(lambda a: a[0], stats), join(dx), jax.tree.map(lambda a: a[0], grads)


def _assert_close(got, want, rtol):
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=rtol * np.abs(w).max()), got, want)


@pytest.mark.parametrize("mode", ["one device", "jit", "pmap"])
@pytest.mark.parametrize("mask", MASKS)
def test_equals_the_hand_computation_over_the_global_batch(mode, mask):
  x, cotangent, variables = _inputs()
  want = _by_hand(x, MASKS[mask], cotangent, variables)
  got = _run(mode, x, MASKS[mask], cotangent, variables)
  _assert_close(got, want, 2e-6)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(got))

  with jax.enable_x64(True):
    x, cotangent, variables = _inputs(np.float64)
    got = _run(mode, x, MASKS[mask], cotangent, variables)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(got))
    _assert_close(got, _by_hand(x, MASKS[mask], cotangent, variables), 1e-12)


@pytest.mark.parametrize("mode", ["one device", "jit", "pmap"])
def test_padding_rows_change_nothing_whatever_they_hold(mode):
  x, cotangent, variables = _inputs()
  mask = MASKS["empty shards"]
  cotangent[mask == 0] = 0  # as a masked loss has it
  y, stats, dx, grads = _run(mode, x, mask, cotangent, variables)
  other = x.copy()
  other[mask == 0] = np.random.RandomState(1).uniform(-1e4, 1e4, other[mask == 0].shape)
  y2, stats2, dx2, grads2 = _run(mode, other, mask, cotangent, variables)
  for a, b in ((y[:3], y2[:3]), (stats, stats2), (dx, dx2), (grads, grads2)):
    jax.tree.map(np.testing.assert_array_equal, a, b)
  np.testing.assert_array_equal(dx[3:], 0)


@pytest.mark.parametrize("mode", ["one device", "pmap"])
def test_a_batch_of_padding_leaves_the_statistics_and_gives_no_nan(mode):
  x, cotangent, variables = _inputs()
  got = _run(mode, x, np.zeros(8), cotangent, variables)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
  jax.tree.map(np.testing.assert_array_equal, got[1], variables["batch_stats"])


def test_evaluation_uses_the_running_statistics_alone():
  x, _, variables = _inputs()
  y = BatchNorm().apply(variables, x, np.zeros(8), train=False)
  stats, params = variables["batch_stats"], variables["params"]
  want = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_equals_flax_but_for_the_unbiased_running_variance():
  x, _, variables = _inputs()
  y, state = BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
  flax_norm = nn.BatchNorm(use_running_average=False, momentum=0.9, use_fast_variance=False)
  flax_y, flax_state = flax_norm.apply(variables, x, mutable=["batch_stats"])
  np.testing.assert_allclose(y, flax_y, rtol=1e-5, atol=1e-5)
  ours, theirs, old = state["batch_stats"], flax_state["batch_stats"], variables["batch_stats"]
  np.testing.assert_allclose(ours["mean"], theirs["mean"], rtol=1e-5)
  n = x[..., 0].size
  np.testing.assert_allclose(
      ours["var"] - 0.9 * old["var"], (theirs["var"] - 0.9 * old["var"]) * n / (n - 1), rtol=1e-4)


def test_variance_survives_a_mean_far_from_zero():
  noise = np.random.RandomState(0).normal(size=(64, 4, 4, 2))
  x = np.float32(1e4 + noise)  # E[x^2] - E[x]^2 has no correct digit here: 1e8 * 6e-8 is 6 times the variance
  variables = BatchNorm().init(jax.random.key(0), x, train=True)
  y, _ = BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
  x = x.astype(np.float64)
  np.testing.assert_allclose(y, (x - x.mean((0, 1, 2))) / x.std((0, 1, 2)), atol=5e-3)


def test_bfloat16_keeps_statistics_in_float32():
  x, _, variables = _inputs()
  x = jnp.asarray(x, jnp.bfloat16)
  y, state = BatchNorm(dtype=jnp.bfloat16).apply(variables, x, train=True, mutable=["batch_stats"])
  assert y.dtype == jnp.bfloat16
  assert state["batch_stats"]["mean"].dtype == jnp.float32
  want, stats, _, _ = _by_hand(np.asarray(x, np.float64), None, np.ones(SHAPE), variables)
  _assert_close(state["batch_stats"], stats, 1e-6)
  np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8)  # half a unit in the last place


def test_init_does_not_move_the_statistics_and_a_frozen_collection_is_left_alone():
  x, _, variables = _inputs()
  fresh = BatchNorm(scale_init=nn.initializers.zeros).init(jax.random.key(0), x, train=True)
  np.testing.assert_array_equal(fresh["batch_stats"]["mean"], 0)
  np.testing.assert_array_equal(fresh["batch_stats"]["var"], 1)
  np.testing.assert_array_equal(fresh["params"]["scale"], 0)
  assert BatchNorm().apply(variables, x, train=True).shape == SHAPE
