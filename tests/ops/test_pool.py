"""Our max-pooling equals Flax's, ties and all, in value and in every derivative; adaptive pooling its definition."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dljax.ops.pool import adaptive_avg_pool, max_pool

WINDOWS = [  # image, window, strides, padding
    ((8, 6), (2, 2), (2, 2), "VALID"),
    ((9, 7), (3, 2), (3, 2), "VALID"),  # a row and a column fill no window
    ((6, 8), (2, 2), (2, 2), "SAME"),
    ((8, 8), (2, 4), (2, 4), ((0, 0), (0, 0))),
    ((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),  # overlap
    ((7, 7), (2, 2), (2, 2), "SAME"),
    ((7, 7), (2, 2), None, "VALID"),
    ((9, 8), (2, 3), (3, 2), ((0, 1), (2, 0))),  # some overlap, some leave a gap
    ((5, 5), (1, 1), (2, 2), "VALID"),
    ((4, 4), (6, 2), (2, 2), "VALID"),  # no window fits
]


def _image(size, dtype=jnp.float32, ties=True):
  draw = np.random.default_rng(0)
  values = draw.integers(0, 4, (3, *size, 5)) if ties else draw.normal(size=(3, *size, 5))
  return jnp.asarray(values, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _value_and_gradient(pool, window, strides, padding, x):
  y, pull = jax.vjp(lambda x: pool(x, window, strides, padding), x)
  return y, *pull(jnp.arange(y.size, dtype=x.dtype).reshape(y.shape) % 32 + 1)  # small integers: exact sums


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size, window, strides, padding", WINDOWS)
@pytest.mark.parametrize("ties", [True, False])
def test_value_and_gradient_are_the_native_ones(ties, dtype, size, window, strides, padding):
  x = _image(size, dtype, ties)
  found = []
  for pool in (max_pool, nn.max_pool):
    found.append(_value_and_gradient(pool, window, strides, padding, x))
  for ours, native in zip(*found):
    assert ours.dtype == native.dtype
    np.testing.assert_array_equal(ours, native)


@pytest.mark.parametrize("size, window, strides, padding", [WINDOWS[0], WINDOWS[1], WINDOWS[4]])
def test_other_derivatives_are_the_native_ones(size, window, strides, padding):
  x = _image(size, ties=False)
  found = []
  for pool in (max_pool, nn.max_pool):

    @jax.jit
    def derivatives(x, pool=pool):
      f = lambda x: jnp.sum(jnp.sin(pool(x, window, strides, padding)))
      penalty = lambda x: jnp.sum(jax.grad(f)(x)**2)
      return (jax.jvp(f, (x,), (x,)), jax.grad(penalty)(x), jax.vmap(jax.grad(f))(jnp.stack([x, -x])),
              jax.grad(jax.checkpoint(f))(x))

    found.append(derivatives(x))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), *found)


@pytest.mark.parametrize("window, strides, padding", [((2, 2), (2, 2), "VALID"), ((3, 3), (2, 2), ((1, 1), (1, 1)))])
def test_a_nan_is_the_maximum_and_takes_the_gradient(window, strides, padding):
  x = _image((4, 4)).at[0, 1, 0, 0].set(jnp.nan)

  @jax.jit
  def run(x):
    y, pull = jax.vjp(lambda x: max_pool(x, window, strides, padding), x)
    return y, nn.max_pool(x, window, strides, padding), *pull(jnp.ones_like(y))

  y, native, grad = map(np.asarray, run(x))
  np.testing.assert_array_equal(np.isnan(y), np.isnan(native))
  assert np.isnan(y[0, 0, 0, 0])
  assert grad[0, 1, 0, 0] == np.isnan(y).sum()


@pytest.mark.parametrize("window, padding", [((2, 2), "VALID"), ((3, 3), "SAME")])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_elsewhere_the_gradient_is_the_native_one(platform, window, padding):
  x = _image((8, 8))
  grad = lambda pool: jax.jit(jax.grad(lambda x: jnp.sum(pool(x, window, (2, 2), padding))))
  lower = lambda pool: grad(pool).trace(x).lower(lowering_platforms=(platform,)).as_text()
  for operation in ("select_and_scatter", "optimization_barrier", "iota", "reduce_window"):
    name = f'"stablehlo.{operation}"' if operation != "iota" else "stablehlo.iota"
    assert lower(max_pool).count(name) == lower(nn.max_pool).count(name)
  assert "select_and_scatter" not in grad(max_pool).lower(x).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size, out", [
    ((8, 6), (4, 3)),  # windows tile the image
    ((13, 10), (6, 7)),  # they overlap
    ((2, 3), (7, 7)),  # they repeat rows
    ((1, 9), (6, 1)),
    ((7, 7), (7, 7)),
])
def test_adaptive_pooling_is_the_mean_of_the_windows_that_torch_has(size, out, dtype):
  x = _image(size, dtype, ties=False)
  window = lambda i, n, m: slice(math.floor(i * n / m), math.ceil((i + 1) * n / m))
  wide = np.asarray(x, np.float64)
  expected = np.array([
      [wide[:, window(i, size[0], out[0]), window(j, size[1], out[1])].mean((1, 2)) for j in range(out[1])]
      for i in range(out[0])]).transpose(2, 0, 1, 3)
  y = jax.jit(adaptive_avg_pool, static_argnums=1)(x, out)
  assert y.dtype == dtype
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0, atol=1e-6 if dtype == jnp.float32 else 0.03)
