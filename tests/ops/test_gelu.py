"""Our GELU is the native exact one, in value and every derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.ops.gelu import gelu

NATIVE = functools.partial(jax.nn.gelu, approximate=False)
POINTS = np.concatenate([np.linspace(-12, 12, 2001), [-1e4, 1e4]])


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-14), (np.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_value_and_derivatives_are_the_native_ones(dtype, tolerance):
  with jax.enable_x64(True):
    for order in range(3):
      found = []
      for f, kind in (gelu, dtype), (NATIVE, np.float64):
        for _ in range(order):
          f = jax.grad(f)
        y = jax.jit(jax.vmap(f))(jnp.asarray(POINTS, dtype).astype(kind))
        assert y.dtype == kind
        found.append(np.float64(y))
      # A derivative is rounded once for each time that it is derived; the tails are the product of x.
      np.testing.assert_allclose(*found, rtol=tolerance * (1 + order), atol=10 * tolerance)


def test_forward_mode_and_numbers_that_are_none():
  value, slope = jax.jvp(gelu, (jnp.float32(0.5),), (jnp.float32(2),))
  np.testing.assert_allclose(slope, 2 * jax.grad(NATIVE)(0.5), rtol=1e-6)
  assert np.isnan(gelu(jnp.float32(np.nan))) and gelu(jnp.float32(np.inf)) == np.inf


def test_the_gradient_computes_the_error_function_once():
  text = str(jax.make_jaxpr(jax.grad(lambda x: gelu(x)))(0.5))
  assert text.count("= erf ") == 1 and "erfc" not in text
