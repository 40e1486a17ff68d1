"""The vision transformer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from dljax import optim
from dljax.errors import UserError
from dljax.models import vit
from dljax.models.layers import StochasticDepth
from dljax.train.state import parameter_count
from tests.models.programs import assert_remat_only_recomputes
from tests.models.variables import random_variables

COUNTS = {
    "vit_ti16": 5_717_416, "vit_s16": 22_050_664, "vit_b16": 86_567_656, "vit_b32": 88_224_232,
    "vit_l16": 304_326_632, "vit_nano": 779_272,
}


def _images(height, width=None, batch=2, dtype=np.float32):
  return np.random.RandomState(0).normal(size=(batch, height, width or height, 3)).astype(dtype)


def _tiny(**kwargs):
  sizes = {"patch_size": 4, "embed_dim": 16, "num_layers": 2, "num_heads": 2}
  return vit.ViT(num_classes=5, **{**sizes, **kwargs})


@pytest.mark.parametrize("name", vit.VARIANTS)
def test_parameter_counts_at_1000_classes(name):
  side = 32 if name == "vit_nano" else 224
  model = vit.VARIANTS[name](num_classes=1000)
  params = jax.eval_shape(model.init, jax.random.key(0), _images(side, batch=1))["params"]
  assert parameter_count(params) == COUNTS[name]


@pytest.mark.parametrize("pool", vit.POOLS)
def test_attention_is_an_intermediate_whose_rows_sum_to_one(pool):
  x, model = _images(8, 12), _tiny(pool=pool)
  variables = random_variables(model, x)
  _, state = jax.jit(lambda v: model.apply(v, x, mutable=["intermediates"]))(variables)
  tokens = 6 + (pool == "token")
  for i in range(2):
    weights = state["intermediates"][f"block{i}"]["attention"][0]
    assert weights.shape == (2, 2, tokens, tokens)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert weights.std() > 1e-3


@pytest.mark.parametrize("positions", vit.POSITIONS)
def test_only_positions_tell_the_order_of_patches(positions):
  """Swapping two patches changes the logits, but not without positions."""
  x = _images(8)
  swapped = x.copy()
  swapped[:, :4, :4], swapped[:, 4:, 4:] = x[:, 4:, 4:], x[:, :4, :4]
  model = _tiny(pool="mean", positions=positions)
  variables = random_variables(model, x)
  run = jax.jit(model.apply)
  assert np.abs(run(variables, x) - run(variables, swapped)).max() > 1e-3
  if positions == "learned":
    variables["params"]["positions"] = np.zeros_like(variables["params"]["positions"])
    np.testing.assert_allclose(run(variables, x), run(variables, swapped), rtol=1e-4, atol=1e-5)


def test_sincos_positions_differ_by_place_and_depend_on_distance_only():
  table = vit.sincos_positions((5, 7), 16)
  assert table.shape == (1, 35, 16)
  products = (table[0] @ table[0].T).reshape(5, 7, 5, 7)
  np.testing.assert_allclose(products[0, 0, 1, 2], products[2, 3, 3, 5], rtol=1e-5)
  assert abs(products[0, 0, 1, 2] - products[0, 0, 2, 1]) < 1e-5 * 16  # rows and columns have one scale
  np.testing.assert_allclose(np.diagonal(table[0] @ table[0].T), 8, rtol=1e-5)


def test_positions_and_the_class_token_do_not_decay():
  """What timm's `no_weight_decay` names, and its rule that vectors do not decay."""
  variables = jax.eval_shape(_tiny().init, jax.random.key(0), _images(8))
  mask = traverse_util.flatten_dict(optim.decay_mask(variables["params"], vit.NO_DECAY), sep="/")
  assert sorted(path for path, decays in mask.items() if decays) == sorted(
      path for path in mask if path.endswith("kernel"))
  assert not mask["positions"] and not mask["class_token"]


def test_interpolated_positions_make_weights_fit_another_size():
  small, large = _images(8), _images(16, 12)
  variables = random_variables(_tiny(), small)
  with pytest.raises(UserError, match="learned for 4 patches, but these images have 4x3.*interpolate"):
    jax.eval_shape(_tiny().apply, variables, large)
  table = variables["params"]["positions"]
  variables["params"]["positions"] = vit.interpolate_positions(table, (2, 2), (4, 3))
  assert jax.jit(_tiny().apply)(variables, large).shape == (2, 5)
  np.testing.assert_array_equal(variables["params"]["positions"][:, 0], table[:, 0])  # the class token's
  np.testing.assert_allclose(vit.interpolate_positions(table, (2, 2), (2, 2)), table, rtol=1e-5)
  with pytest.raises(UserError, match="5 positions is not for 3x3 patches"):
    vit.interpolate_positions(table, (3, 3), (4, 4))


@pytest.mark.parametrize("size, message", [
    ((9, 12), "9x12 pixels.*resize them to 8x12"), ((3, 3), "resize them to 4x4")])
def test_images_that_patches_do_not_tile_are_refused(size, message):
  with pytest.raises(UserError, match=message):
    jax.eval_shape(_tiny().init, jax.random.key(0), _images(*size))


@pytest.mark.parametrize("field", ["pool", "positions"])
def test_unknown_forms_are_refused(field):
  with pytest.raises(UserError, match=field):
    jax.eval_shape(_tiny(**{field: "none"}).init, jax.random.key(0), _images(8))


def test_scores_are_divided_by_the_root_of_the_head_size():
  """With all weights w of query and key equal, q and k are w times the sums s of the normalised tokens."""
  x, w = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32), 0.3
  block = vit.Block(num_heads=2, mlp_dim=8, dropout=0.0, drop_rate=0.0, dtype=jnp.float32)
  variables = jax.tree.map(np.asarray, block.init(jax.random.key(0), x, False))
  params = variables["params"]
  params["norm1"] = {"scale": np.linspace(-1, 2, 8), "bias": np.full(8, 0.1)}
  params["qkv"] = {name: np.full_like(value, w * (name == "kernel")) for name, value in params["qkv"].items()}
  _, state = block.apply(variables, x, False, mutable=["intermediates"])
  s = nn.LayerNorm(epsilon=1e-6).apply({"params": params["norm1"]}, x).sum(axis=-1)[0]
  expected = jax.nn.softmax(w**2 * np.sqrt(8 / 2) * s[:, None] * s)
  for attention in state["intermediates"]["attention"][0][0]:
    np.testing.assert_allclose(attention, expected, rtol=1e-4)


@pytest.mark.parametrize("kwargs", [{"dropout": 0.5}, {"stochastic_depth": 0.5}])
def test_units_and_blocks_are_dropped_in_training_only(kwargs):
  x, model = _images(8), _tiny(**kwargs)
  variables = random_variables(model, x)
  run = jax.jit(lambda key: (model.apply(variables, x, train=True, rngs={"dropout": key}), model.apply(variables, x),
                             _tiny().apply(variables, x, train=True)))
  dropped, evaluated, off = zip(*(map(np.asarray, run(jax.random.key(i))) for i in range(8)))
  assert len({y.tobytes() for y in dropped}) > 1
  np.testing.assert_allclose(evaluated, off, rtol=1e-5)


def test_remat_only_recomputes():
  assert_remat_only_recomputes(functools.partial(_tiny, dropout=0.2, stochastic_depth=0.1), _images(8))


def test_remat_changes_no_gradient():
  with jax.enable_x64(True):
    x, results = _images(8, dtype=np.float64), []
    for remat in (False, True):
      model = _tiny(remat=remat, dtype=jnp.float64, dropout=0.2)
      variables = random_variables(model, x, dtype=np.float64)
      grad = jax.jit(jax.grad(lambda params, model=model: jnp.sum(model.apply(
          {"params": params}, x, train=True, rngs={"dropout": jax.random.key(1)})**2)))
      assert ("remat" in str(jax.make_jaxpr(grad)(variables["params"]))) == remat
      results.append(grad(variables["params"]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *results)


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

  model = _tiny(num_layers=4, stochastic_depth=0.3)
  with nn.intercept_methods(note):
    jax.eval_shape(model.init, jax.random.key(0), _images(8))
  np.testing.assert_allclose(rates, np.repeat([0, 0.1, 0.2, 0.3], 2))  # attention and perceptron of each block
