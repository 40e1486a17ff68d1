"""LeNet-5."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.errors import UserError
from dljax.models import lenet
from dljax.train.state import parameter_count
from tests.models.programs import assert_remat_only_recomputes
from tests.models.variables import random_variables


def _images(size, batch=2):
  return np.random.RandomState(0).normal(size=(batch, size, size, 1)).astype(np.float32)


def test_parameter_count_of_each_layer():
  model = lenet.VARIANTS["lenet5"](num_classes=10)
  params = jax.eval_shape(model.init, jax.random.key(0), _images(32))["params"]
  counts = {name: parameter_count(layer) for name, layer in params.items()}
  # As in section II.B of the paper, but for C3 (1,516 there) and the output.
  assert counts == {"c1": 156, "c3": 2416, "c5": 48120, "f6": 10164, "head": 850}
  assert sum(counts.values()) == 61706


def test_28_pixels_are_32_with_a_margin_of_zeros():
  model = lenet.VARIANTS["lenet5"](num_classes=10)
  small = _images(28)
  variables = random_variables(model, small)
  large = np.pad(small, ((0, 0), (2, 2), (2, 2), (0, 0)))
  both = jax.jit(lambda v: (model.apply(v, small), model.apply(v, large)))
  np.testing.assert_array_equal(*both(variables))


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_pooling_is_over_2x2_squares(pool):
  class Unpooled(nn.Module):
    """C1 and S2 with Flax's own pooling."""

    @nn.compact
    def __call__(self, x):
      x = jnp.tanh(nn.Conv(6, (5, 5), padding="VALID", name="c1")(x))
      return {"avg": nn.avg_pool, "max": nn.max_pool}[pool](x, (2, 2), strides=(2, 2))

  model = lenet.LeNet5(num_classes=10, pool=pool)
  x = _images(32)
  variables = random_variables(model, x)

  @jax.jit
  def run(variables):
    _, state = model.apply(
        variables, x, capture_intermediates=lambda m, _: m.name == "c3", mutable=["intermediates"])
    s2 = Unpooled().apply({"params": {"c1": variables["params"]["c1"]}}, x)
    return state, nn.Conv(16, (5, 5), padding="VALID").apply({"params": variables["params"]["c3"]}, s2)

  state, c3 = run(variables)
  np.testing.assert_allclose(state["intermediates"]["c3"]["__call__"][0], c3, rtol=1e-4, atol=1e-5)


def test_remat_only_recomputes():
  assert_remat_only_recomputes(functools.partial(lenet.LeNet5, num_classes=10), _images(28))


def test_remat_changes_no_gradient():
  x = _images(28)
  grads = []
  for remat in (False, True):
    model = lenet.LeNet5(num_classes=10, remat=remat)
    params = random_variables(model, x)["params"]
    loss = lambda p: jnp.sum(model.apply({"params": p}, x, train=True)**2)
    assert ("remat" in str(jax.make_jaxpr(jax.grad(loss))(params))) == remat
    grads.append(jax.jit(jax.grad(loss))(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 28, 32, 1), (2, 32, 32)])
def test_other_sizes_are_refused_with_those_that_work(shape):
  with pytest.raises(UserError, match="28x28 or 32x32"):
    lenet.LeNet5(num_classes=10).init(jax.random.key(0), np.zeros(shape))


def test_unknown_pooling_is_refused():
  with pytest.raises(UserError, match="did you mean max"):
    lenet.LeNet5(num_classes=10, pool="maxx").init(jax.random.key(0), _images(28))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_dtype_with_float32_parameters(dtype):
  model = lenet.LeNet5(num_classes=10, dtype=dtype)
  logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), _images(28))
  assert logits.dtype == dtype
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
