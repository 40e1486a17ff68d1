"""Our layer norm is Flax's, in value and gradients, and a CPU computes its result once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dljax.ops.norm import layer_norm

EPSILON = 1e-3


def _inputs(dtype):
  draw = np.random.RandomState(0)
  x = draw.randn(2, 3, 8) * np.array([1, 5, 0.1])[:, None] + draw.randn(2, 3, 1)
  return tuple(jnp.asarray(a, dtype) for a in (x, draw.randn(8), draw.randn(8), draw.randn(2, 3, 8)))


def _native(x, scale, bias):
  layer = nn.LayerNorm(EPSILON, use_bias=bias is not None, use_fast_variance=False, dtype=x.dtype)
  params = {"scale": scale} if bias is None else {"scale": scale, "bias": bias}
  return layer.apply({"params": params}, x)


def _ours(x, scale, bias):
  return layer_norm(x, scale, bias, EPSILON)


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(f, x, scale, bias, dy):
  y, pull = jax.vjp(f, x, scale, bias)
  return y, *pull(dy)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-5), (jnp.bfloat16, 0.05)])
def test_value_and_gradients_are_the_native_ones(dtype, tolerance, use_bias):
  with jax.enable_x64(True):
    x, scale, bias, dy = _inputs(dtype)
    bias = bias if use_bias else None
    found = _with_gradients(_ours, x, scale, bias, dy)
    expected = _with_gradients(_native, *jax.tree.map(lambda a: a.astype(np.float64), (x, scale, bias, dy)))
    for a, b, like in zip(found, expected, (x, x, scale, bias)):
      if b is not None:
        assert a.dtype == like.dtype
        np.testing.assert_allclose(np.float64(a), b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def test_second_derivatives_are_the_native_ones():
  with jax.enable_x64(True):
    x, scale, bias, dy = _inputs(np.float64)

    def penalty(f, *args):
      slopes = jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a)) * dy), (0, 1, 2))(*args)
      return sum(jnp.sum(slope**2) for slope in slopes)

    found, expected = (jax.jit(jax.grad(functools.partial(penalty, f), (0, 1, 2)))(x, scale, bias)
                       for f in (_ours, _native))
    for a, b in zip(found, expected):
      np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_a_mean_far_from_zero_costs_no_digits():
  x = jnp.asarray(np.random.RandomState(0).randn(2, 64), jnp.float32)
  one, zero = jnp.ones(64), jnp.zeros(64)
  # 4096 + x has an error of 2e-4, and E[x^2] - E[x]^2 would have one of order 1.
  np.testing.assert_allclose(layer_norm(x + 4096, one, zero, 0.0), layer_norm(x, one, zero, 0.0), atol=1e-3)


def test_only_a_cpu_gets_the_barrier():
  lowered = jax.jit(jax.grad(lambda *a: jnp.sum(_ours(*a)**2))).trace(*_inputs(np.float32)[:3])
  for platform, count in ("cpu", 1), ("tpu", 0), ("cuda", 0):
    assert lowered.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier") == count
