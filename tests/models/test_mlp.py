"""The multilayer perceptron and Rosenblatt's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.models import mlp
from dljax.train.state import parameter_count
from tests.models.programs import assert_remat_only_recomputes
from tests.models.variables import random_variables


@pytest.mark.parametrize("name, kwargs, count", [
    ("mlp", {}, 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10),
    ("mlp", {"widths": (300,)}, 784 * 300 + 300 + 300 * 10 + 10),
    ("perceptron", {}, 784 * 10 + 10),
])
def test_parameter_counts(name, kwargs, count):
  model = mlp.VARIANTS[name](num_classes=10, **kwargs)
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
  assert parameter_count(variables["params"]) == count


def test_the_perceptron_rule_is_the_gradient_of_the_perceptron_criterion():
  x = np.random.RandomState(0).normal(size=(1, 6)).astype(np.float32)
  model = mlp.VARIANTS["perceptron"](num_classes=3)
  params = random_variables(model, x)["params"]
  guess = int(np.argmax(model.apply({"params": params}, x)))
  for truth in range(3):

    def criterion(params):
      z = model.apply({"params": params}, x)[0]
      return jnp.max(z) - z[truth]

    change = -jax.grad(criterion)(params)["head"]["kernel"].T  # [class, input]
    want = np.zeros((3, 6), np.float32)
    want[truth] += x[0]
    want[guess] -= x[0]
    np.testing.assert_allclose(change, want, atol=1e-6)


def test_remat_only_recomputes():
  assert_remat_only_recomputes(
      functools.partial(mlp.MLP, num_classes=3, widths=(8, 6), dropout=0.5), np.ones((4, 7, 7, 1), np.float32))


def test_remat_changes_no_gradient():
  x = np.random.RandomState(0).normal(size=(4, 7, 7, 1)).astype(np.float32)
  grads = []
  for remat in (False, True):
    model = mlp.MLP(num_classes=3, widths=(8, 8), dropout=0.5, remat=remat)
    params = random_variables(model, x)["params"]
    rngs = {"dropout": jax.random.key(1)}
    loss = lambda p: jnp.sum(model.apply({"params": p}, x, train=True, rngs=rngs)**2)
    assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(params))) == remat
    grads.append(jax.jit(jax.grad(loss))(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *grads)


def test_dropout_acts_in_training_only():
  x = np.ones((2, 5), np.float32)
  model = mlp.MLP(num_classes=3, widths=(64,), dropout=0.5)
  variables = random_variables(model, x)
  run = lambda seed, train: model.apply(variables, x, train=train, rngs={"dropout": jax.random.key(seed)})
  np.testing.assert_array_equal(run(0, False), run(1, False))
  assert not np.array_equal(run(0, True), run(1, True))
  assert not np.array_equal(run(0, True)[0], run(0, True)[1])  # equal rows, different masks


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_dtype_with_float32_parameters(dtype):
  model = mlp.VARIANTS["mlp"](num_classes=3, widths=(4,), dtype=dtype)
  logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, 5)))
  assert logits.dtype == dtype
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
