"""VGG, with and without batch normalisation."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.errors import UserError
from dljax.models import vgg
from dljax.models.layers import BatchNorm
from dljax.train.state import parameter_count
from tests.models.programs import assert_remat_only_recomputes
from tests.models.variables import random_variables

COUNTS = {
    "vgg11": 132_863_336, "vgg13": 133_047_848, "vgg16": 138_357_544, "vgg19": 143_667_240,
    "vgg11_bn": 132_868_840, "vgg13_bn": 133_053_736, "vgg16_bn": 138_365_992, "vgg19_bn": 143_678_248,
}


def _images(size, batch=2, channels=3, dtype=np.float32):
  return np.random.RandomState(0).normal(size=(batch, size, size, channels)).astype(dtype)


def _tiny(**kwargs):
  sizes = {"stage_sizes": (1, 1, 2), "width_factor": 0.06, "hidden_width": 12, "num_pools": 2, "pooled_size": 2}
  return vgg.VGG(num_classes=5, **{"norm": BatchNorm, **sizes, **kwargs})


@pytest.mark.parametrize("name", vgg.VARIANTS)
def test_parameter_counts_at_1000_classes(name):
  model = vgg.VARIANTS[name](num_classes=1000)
  params = jax.eval_shape(model.init, jax.random.key(0), _images(224, 1))["params"]
  assert parameter_count(params) == COUNTS[name]
  # The number in the name is that of the layers with weights.
  kernels = [path for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"]
  assert len(kernels) == int(re.search(r"\d+", name)[0])


@pytest.mark.parametrize("size, num_pools, sizes", [
    (224, 5, [224, 112, 56, 28, 14]), (32, 5, [32, 16, 8, 4, 2]), (28, 3, [28, 14, 7, 3, 3]),
])
def test_feature_maps_halve_with_each_pooling(size, num_pools, sizes):
  model = vgg.VARIANTS["vgg11"](num_classes=10, num_pools=num_pools, pooled_size=1)
  _, state = jax.eval_shape(
      lambda x: model.init_with_output(
          jax.random.key(0), x, capture_intermediates=lambda m, _: (m.name or "").endswith("_conv1"),
          mutable=["params", "intermediates"]), _images(size, 1))
  shapes = [v["__call__"][0].shape for _, v in sorted(state["intermediates"].items())]
  assert [shape[1:] for shape in shapes] == [(n, n, c) for n, c in zip(sizes, (64, 128, 256, 512, 512))]


def test_is_the_same_as_plain_layers_in_a_row():
  class Plain(nn.Module):
    """Written out, by Flax's own layers."""

    @nn.compact
    def __call__(self, x):
      for name, width in (("stage1_conv1", 8), ("pool", 0), ("stage2_conv1", 8), ("pool", 0), ("stage3_conv1", 16),
                          ("stage3_conv2", 16)):
        x = nn.relu(nn.Conv(width, (3, 3), padding=1, name=name)(x)) if width else nn.max_pool(x, (2, 2), (2, 2))
      x = x.reshape(len(x), -1)  # 2x2 already
      for name in ("fc1", "fc2"):
        x = nn.relu(nn.Dense(12, name=name)(x))
      return nn.Dense(5, name="head")(x)

  model, x = _tiny(norm=None), _images(8)
  variables = random_variables(model, x)
  np.testing.assert_allclose(
      jax.jit(model.apply)(variables, x), jax.jit(Plain().apply)(variables, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_pools", [1, 3])
def test_images_that_are_too_small_are_refused_with_the_smallest_size(num_pools):
  model, smallest = _tiny(num_pools=num_pools), 2**num_pools
  run = lambda *size: jax.eval_shape(model.init_with_output, jax.random.key(0), np.zeros((1, *size, 3)))[0]
  assert run(smallest, smallest + 9).shape == (1, 5)
  for size in ((smallest - 1, 9), (9, smallest - 1)):
    with pytest.raises(UserError, match=f"at least {smallest}x{smallest} pixels"):
      run(*size)


def test_remat_only_recomputes():
  assert_remat_only_recomputes(_tiny, _images(8))


def test_remat_changes_no_gradient_and_no_statistic():
  with jax.enable_x64(True):
    x, results = _images(8, dtype=np.float64), []
    for remat in (False, True):
      model = _tiny(remat=remat, dtype=jnp.float64)
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
  x, model = _images(8, batch=6), _tiny(dropout=0.0)
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
  unmasked, _ = run(x, np.ones(6, np.float32))
  assert np.abs(unmasked[mask > 0] - alone[:3]).max() > 1e-2


@pytest.mark.parametrize("hidden_width, deviation", [(4096, 0.01), (64, 0.08)])
def test_initialisation_is_torchvisions(hidden_width, deviation):
  model = _tiny(stage_sizes=(1, 1, 1), width_factor=0.5, hidden_width=hidden_width, pooled_size=1)

  @jax.jit
  def init(key):
    params = model.init(key, _images(8))["params"]
    if hidden_width == 4096:
      del params["fc2"]["kernel"]  # the largest by far; at the other width it is there
    return params

  params = init(jax.random.key(0))
  for name, layer in params.items():
    np.testing.assert_array_equal(layer["bias"], 0)
    if "norm" in name:
      np.testing.assert_array_equal(layer["scale"], 1)
  np.testing.assert_allclose(np.std(params["stage3_conv1"]["kernel"]), np.sqrt(2 / (9 * 128)), rtol=0.02)
  np.testing.assert_allclose(np.std(params["fc1"]["kernel"]), deviation, rtol=0.02)
  if hidden_width != 4096:  # 4,096 draws, whose deviation is known to a hundredth
    np.testing.assert_allclose(np.std(params["fc2"]["kernel"]), deviation, rtol=0.04)


def test_units_are_dropped_in_training_only():
  model, x = _tiny(norm=None), _images(8)
  variables = random_variables(model, x)
  off = _tiny(norm=None, dropout=0.0)
  run = jax.jit(lambda key: (model.apply(variables, x, train=True, rngs={"dropout": key}), model.apply(variables, x),
                             off.apply(variables, x, train=True)))
  (one, evaluated, off), (other, _, _) = run(jax.random.key(0)), run(jax.random.key(1))
  assert np.abs(one - other).max() > 0
  np.testing.assert_allclose(evaluated, off, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_dtype_with_float32_parameters_and_statistics(dtype):
  model, x = _tiny(dtype=dtype), _images(8)
  logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert logits.dtype == dtype
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
