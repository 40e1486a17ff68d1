"""Our GELU and its approximation are the native ones, in value and every derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.ops.gelu import gelu, gelu_tanh

NATIVE = functools.partial(jax.nn.gelu, approximate=False)
FORMS = {"exact": (gelu, NATIVE), "tanh": (gelu_tanh, functools.partial(jax.nn.gelu, approximate=True))}
POINTS = np.concatenate([np.linspace(-12, 12, 2001), [-1e4, 1e4]])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-14), (np.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_value_and_derivatives_are_the_native_ones(dtype, tolerance, form):
  with jax.enable_x64(True):
    for order in range(3):
      found = []
      for f, kind in zip(FORMS[form], (dtype, np.float64)):
        for _ in range(order):
          f = jax.grad(f)
        y = jax.jit(jax.vmap(f))(jnp.asarray(POINTS, dtype).astype(kind))
        assert y.dtype == kind
        found.append(np.float64(y))
      # A derivative is rounded once for each time that it is derived; the tails are the product of x.
      # 1 - tanh^2 loses digits in the left tail, and the second derivative multiplies it by up to x^5.
      slack = 200 if (form, order) == ("tanh", 2) else 10
      np.testing.assert_allclose(*found, rtol=tolerance * (1 + order), atol=slack * tolerance)


def test_forward_mode_and_numbers_that_are_none():
  value, slope = jax.jvp(gelu, (jnp.float32(0.5),), (jnp.float32(2),))
  np.testing.assert_allclose(slope, 2 * jax.grad(NATIVE)(0.5), rtol=1e-6)
  assert np.isnan(gelu(jnp.float32(np.nan))) and gelu(jnp.float32(np.inf)) == np.inf


@pytest.mark.parametrize("f, costly", [(gelu, "erf"), (gelu_tanh, "tanh")])
def test_the_costly_function_is_computed_once(f, costly):
  text = str(jax.make_jaxpr(jax.grad(lambda x: f(x)))(0.5))
  assert text.count(f"= {costly} ") == 1 and "erfc" not in text


@pytest.mark.parametrize("f", [gelu, gelu_tanh])
def test_only_a_cpu_gets_the_barrier(f):
  traced = jax.jit(jax.grad(lambda x: f(x)**2)).trace(0.5)
  for platform, count in ("cpu", 1), ("tpu", 0), ("cuda", 0):
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier") == count


@pytest.mark.parametrize("f", [gelu, gelu_tanh])
def test_a_gradient_keeps_no_more_than_the_input_dtype(f):
  kept = jax.eval_shape(lambda x: jax.vjp(f, x)[1], jax.ShapeDtypeStruct((8,), jnp.bfloat16))
  assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.bfloat16)}
