"""The dense product is the native one, its kernel's gradient found without turning it round."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from dljax.ops.dense import dense, dense_transposed, dot_general
from tests.models.variables import random_variables


def _inputs(dtype=np.float32):
  draw = np.random.default_rng(0)
  return draw.normal(size=(3, 4, 5)).astype(dtype), draw.normal(size=(5, 6)).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(f, x, w):
  y, pull = jax.vjp(f, x, w)
  return y, *pull(y)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradients_are_the_native_ones(dtype):
  found = []
  for f in (dense, jnp.matmul):
    found.append(_with_gradients(f, *_inputs(dtype)))
    assert {a.dtype for a in found[-1]} == {jnp.dtype(dtype)}
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  for ours, native in zip(*found):
    np.testing.assert_allclose(*(np.float32(a) for a in (ours, native)), rtol=tolerance, atol=tolerance)


def test_second_derivatives_and_vmap():
  found = []
  for f in (dense, jnp.matmul):
    loss = lambda x, w, f=f: jnp.sum(jnp.sin(jax.vmap(f, (0, None))(x, w)))
    penalty = lambda *a, loss=loss: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(*a))
    found.append(jax.jit(jax.grad(penalty, (0, 1)))(*_inputs()))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *found)


def test_the_gradient_is_one_product_and_no_transposition():
  gradient = lambda f: str(jax.make_jaxpr(jax.grad(lambda w, x: jnp.sum(f(x, w)**2)))(*_inputs()[::-1]))
  assert "transpose[" in gradient(jnp.matmul) and "transpose[" not in gradient(dense)


def test_a_flax_layer_takes_it():
  x = _inputs()[0]
  layer, native = nn.Dense(6, dot_general=dot_general), nn.Dense(6)
  params = random_variables(native, x)
  ours, expected = (jax.jit(module.apply)(params, x) for module in (layer, native))
  np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
  assert "custom_vjp" in str(jax.make_jaxpr(layer.apply)(params, x))


def test_other_products_are_native_to_the_letter():
  x, w = _inputs()
  for args, options in [
      ((x, w, (((2,), (0,)), ((), ()))), {"precision": lax.Precision.HIGHEST}),
      ((x, w.T, (((2,), (1,)), ((), ()))), {}),
      ((x, x, (((2,), (2,)), ((0,), (0,)))), {"precision": None}),
  ]:
    program = lambda f: str(jax.make_jaxpr(lambda a, b: f(a, b, args[2], **options))(*args[:2]))
    assert program(dot_general) == program(lax.dot_general)


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 1), (2, 4)])
def test_few_rows_and_a_kernel_the_other_way_round_are_the_native_product(rows, dtype, tolerance):
  with jax.enable_x64(True):
    draw = np.random.default_rng(1)
    x, w = (jnp.asarray(draw.normal(size=shape), dtype) for shape in ((*rows, 5), (5, 6)))
    expected = _with_gradients(jnp.matmul, *(np.float64(a) for a in (x, w)))
    straight = _with_gradients(dense, x, w)
    y, dx, dw = _with_gradients(dense_transposed, x, w.T)
    for found in straight, (y, dx, dw.T):
      for ours, native in zip(found, expected):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.float64(ours), native, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("rows, dtype, form", [
    (1, np.float32, "reduce"), (1, jnp.bfloat16, "reduce"), (3, jnp.bfloat16, "pad"), (3, np.float32, None),
    (8, jnp.bfloat16, None)])
@pytest.mark.parametrize("f", [dense, dense_transposed])
def test_only_a_cpu_gets_the_forms_of_few_rows(f, rows, dtype, form):
  w = jax.ShapeDtypeStruct((5, 6) if f is dense else (6, 5), dtype)
  traced = jax.jit(f).trace(jax.ShapeDtypeStruct((rows, 5), dtype), w)
  for platform in "cpu", "tpu", "cuda":
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    for name in "reduce", "pad":
      assert (f"stablehlo.{name}" in text) == (platform == "cpu" and name == form)
    assert ("dot_general" in text) == (platform != "cpu" or form != "reduce")
