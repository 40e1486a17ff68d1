"""EfficientNet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dljax.errors import UserError
from dljax.models import efficientnet
from dljax.models.layers import StochasticDepth
from dljax.train.state import parameter_count
from tests.models.programs import assert_remat_only_recomputes
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
  forms = ({"dropout": 0.0, "stochastic_depth": 0.9}, {"stochastic_depth": 0.0, "dropout": 0.9},
           {"stochastic_depth": 0.0, "dropout": 0.0})
  run = jax.jit(lambda key: [_tiny(**on).apply(
      variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0] for on in forms])
  blocks, units, neither = zip(*(map(np.asarray, run(jax.random.key(i))) for i in range(8)))
  assert len({y.tobytes() for y in blocks}) > 1 and len({y.tobytes() for y in units}) > 1
  assert len({y.tobytes() for y in neither}) == 1


def test_remat_only_recomputes():
  assert_remat_only_recomputes(_tiny, _images(8))


def test_remat_changes_no_gradient():
  """For all families in the quick tests: it has BatchNorm, dropout and stochastic depth."""
  with jax.enable_x64(True):
    x, results = _images(8, dtype=np.float64), []
    for remat in (False, True):
      model = _tiny(remat=remat, dtype=jnp.float64, dropout=0.2)
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
  mask = np.array([1, 0, 0, 1, 0, 1], np.float32)
  padded, state = run(x, mask)
  # The rows that count, twice, have the moments that they have once, and go through the same program.
  alone, alone_state = run(np.tile(x[mask > 0], (2, 1, 1, 1)), np.ones(6, np.float32))
  np.testing.assert_allclose(padded[mask > 0], alone[:3], rtol=1e-4, atol=1e-5)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(alone_state), strict=True):
    if path[-1].key == "mean":  # running variances are those of samples, which depend on how many there are
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  filled, filled_state = run(np.where(mask[:, None, None, None] > 0, x, np.float32(9)), mask)
  np.testing.assert_allclose(filled[mask > 0], alone[:3], rtol=1e-4, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, filled_state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_dtype_with_float32_parameters(dtype):
  logits, variables = jax.eval_shape(_tiny(dtype=dtype).init_with_output, jax.random.key(0), _images(8))
  assert logits.dtype == dtype
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_stochastic_depth_grows_with_depth():
  rates = []

  def note(call, args, kwargs, context):
    if isinstance(context.module, StochasticDepth) and context.method_name == "__call__":
      rates.append(context.module.rate)
    return call(*args, **kwargs)

  model = efficientnet.VARIANTS["efficientnet_nano"](num_classes=3, stochastic_depth=0.7)
  with nn.intercept_methods(note):
    jax.eval_shape(model.init, jax.random.key(0), _images(16))
  # Blocks 1, 3 and 5 of the six change the width, so that they have no shortcut.
  np.testing.assert_allclose(rates, [0.7 * i / 6 for i in (0, 2, 4)])
