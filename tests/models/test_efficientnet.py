"""EfficientNet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.errors import UserError
from dljax.models import efficientnet
from dljax.models.layers import StochasticDepth
from dljax.train.state import parameter_count
from tests.models.variables import random_variables

COUNTS = {
    "efficientnet_b0": 5_288_548, "efficientnet_b1": 7_794_184, "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232, "efficientnet_b4": 19_341_616, "efficientnet_b5": 30_389_784,
    "efficientnet_b6": 43_040_704, "efficientnet_b7": 66_347_960, "efficientnet_nano": 560_400,
}
STAGES = (efficientnet.Stage(1, 3, 1, 8, 1), efficientnet.Stage(2, 5, 2, 8, 2))


def _images(size, batch=2, dtype=np.float32):
  return np.random.RandomState(0).normal(size=(batch, size, size, 3)).astype(dtype)


def _tiny(**kwargs):
  return efficientnet.EfficientNet(num_classes=5, **{"stages": STAGES, "stem_width": 8, **kwargs})


@pytest.mark.parametrize("name", efficientnet.VARIANTS)
def test_parameter_counts_at_1000_classes(name):
  model = efficientnet.VARIANTS[name](num_classes=1000)
  params = jax.eval_shape(model.init, jax.random.key(0), _images(32, 1))["params"]
  assert parameter_count(params) == COUNTS[name]


@pytest.mark.parametrize("width, rounded", [(16 * 1.1, 16), (24 * 1.1, 24), (40 * 1.4, 56), (1, 8), (11, 16)])
def test_widths_are_rounded_to_8_but_never_by_more_than_a_tenth_down(width, rounded):
  assert efficientnet.round_width(width) == rounded


def test_strides_make_the_form_for_small_images():
  for kwargs, sides in (({}, (8, 4)), ({"stem_stride": 1}, (16, 8)), ({"stem_stride": 1, "strides": (1, 1)}, (16, 16))):
    _, state = jax.eval_shape(
        lambda x, kwargs=kwargs: _tiny(**kwargs).init_with_output(
            jax.random.key(0), x, capture_intermediates=lambda m, _: (m.name or "").endswith("block0"),
            mutable=["params", "batch_stats", "intermediates"]), _images(16))
    blocks = state["intermediates"]
    assert tuple(blocks[f"stage{i}_block0"]["__call__"][0].shape[1] for i in (1, 2)) == sides
  with pytest.raises(UserError, match=r"2 stages, so strides=\(1,\) has to have 2 numbers"):
    jax.eval_shape(_tiny(strides=(1,)).init, jax.random.key(0), _images(16))


def test_stochastic_depth_keeps_the_mean_and_leaves_out_whole_rows():
  x = np.ones((4000, 3), np.float32)
  run = lambda train: StochasticDepth(0.25).apply({}, x, train, rngs={"dropout": jax.random.key(0)})
  y = np.asarray(run(True))
  assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
  assert (y == y[:, :1]).all()
  np.testing.assert_allclose(y.mean(), 1, atol=0.04)
  np.testing.assert_array_equal(run(False), x)


def test_blocks_and_units_are_dropped_in_training_only():
  x = _images(16)
  variables = random_variables(_tiny(), x)
  for on in ({"dropout": 0.0, "stochastic_depth": 0.9}, {"stochastic_depth": 0.0, "dropout": 0.9}):
    run = jax.jit(lambda key, on=on: _tiny(**on).apply(
        variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0])
    assert len({np.asarray(run(jax.random.key(i))).tobytes() for i in range(8)}) > 1
  still = jax.jit(lambda key: _tiny(dropout=0.0, stochastic_depth=0.0).apply(
      variables, x, train=True, mutable=["batch_stats"])[0])
  np.testing.assert_array_equal(still(jax.random.key(0)), still(jax.random.key(1)))


@pytest.mark.slow
def test_remat_changes_no_gradient():
  with jax.enable_x64(True):
    x, results = _images(8, dtype=np.float64), []
    for remat in (False, True):
      model = _tiny(remat=remat, dtype=jnp.float64, dropout=0.0)
      variables = random_variables(model, x, dtype=np.float64)

      def loss(params, model=model, variables=variables):
        logits, state = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"],
                                    rngs={"dropout": jax.random.key(1)})
        return jnp.sum(logits**2), state

      grad = jax.jit(jax.grad(loss, has_aux=True))
      assert ("remat" in str(jax.make_jaxpr(grad)(variables["params"]))) == remat
      results.append(grad(variables["params"]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *results)


def test_padding_rows_do_not_reach_the_others():
  x, model = _images(8, batch=6), _tiny(dropout=0.0, stochastic_depth=0.0)
  variables = random_variables(model, x)
  run = jax.jit(lambda x, mask: model.apply(variables, x, mask, train=True, mutable=["batch_stats"]))
  mask = np.array([1, 1, 0, 1, 0, 1], np.float32)
  padded, state = run(x, mask)
  alone, alone_state = run(x[mask > 0], np.ones(4, np.float32))
  np.testing.assert_allclose(padded[mask > 0], alone, rtol=1e-4, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, alone_state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_dtype_with_float32_parameters(dtype):
  logits, variables = jax.eval_shape(_tiny(dtype=dtype).init_with_output, jax.random.key(0), _images(8))
  assert logits.dtype == dtype
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
