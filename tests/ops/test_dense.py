"""The dense product is the native one, its kernel's gradient found without turning it round."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from dljax.ops.dense import dense, dot_general
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
