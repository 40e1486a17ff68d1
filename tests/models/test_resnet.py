"""Residual networks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.models import resnet
from dljax.ops.conv import conv_general_dilated
from dljax.train.state import parameter_count
from tests.models.programs import assert_remat_only_recomputes
from tests.models.variables import random_variables

IMAGENET = {
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
CIFAR = {"resnet20": 269_722, "resnet32": 464_154, "resnet56": 853_018}  # table 6: 0.27, 0.46, 0.85 million


def _images(size, batch=2, dtype=np.float32):
  return np.random.RandomState(0).normal(size=(batch, size, size, 3)).astype(dtype)


def _tiny(**kwargs):
  sizes = {"block": resnet.BasicBlock, "stage_sizes": (1, 1), "width": 4}
  return resnet.ResNet(num_classes=5, small_stem=True, **{**sizes, **kwargs})


@pytest.mark.parametrize("name", IMAGENET)
def test_parameter_counts_at_1000_classes(name):
  model = resnet.VARIANTS[name](num_classes=1000)
  variables = jax.eval_shape(model.init, jax.random.key(0), _images(64))
  assert parameter_count(variables["params"]) == IMAGENET[name]


@pytest.mark.parametrize("name", CIFAR)
def test_parameter_counts_at_10_classes(name):
  model = resnet.VARIANTS[name](num_classes=10)
  params = jax.eval_shape(model.init, jax.random.key(0), _images(32))["params"]
  assert parameter_count(params) == CIFAR[name]
  # The number in the name is that of the layers with weights: all convolutions and the head.
  kernels = [path for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"]
  assert len(kernels) == int(name.removeprefix("resnet"))


def test_every_variant_is_counted():
  assert resnet.VARIANTS.keys() == {*IMAGENET, *CIFAR}


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet50"])
def test_feature_maps_shrink_as_in_table_1(name):
  def sizes(size, **kwargs):
    model = resnet.VARIANTS[name](num_classes=10, **kwargs)
    _, state = jax.eval_shape(
        lambda x: model.init_with_output(
            jax.random.key(0), x, capture_intermediates=lambda m, _: (m.name or "").startswith("stage"),
            mutable=["params", "batch_stats", "intermediates"]), _images(size))
    shapes = {k: v["__call__"][0].shape for k, v in state["intermediates"].items()}
    return [shapes[k][1] for k in sorted(shapes) if k.endswith("block0")]

  if name == "resnet20":
    assert sizes(32) == [32, 16, 8]
  else:
    assert sizes(224) == [56, 28, 14, 7]
    assert sizes(32, small_stem=True) == [32, 16, 8, 4]


def test_the_shortcut_of_option_a_has_no_parameters_and_pads_with_zeros():
  model = resnet.VARIANTS["resnet20"](num_classes=10)
  x = _images(8)
  variables = random_variables(model, x)
  assert not any("shortcut" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables))
  for name, block in variables["params"].items():
    if name.startswith("stage"):
      block["norm2"] = jax.tree.map(np.zeros_like, block["norm2"])
  # With residual branches of zero each block hands its input on: every other pixel, zeros for new channels.
  run = jax.jit(lambda v: model.apply(v, x, capture_intermediates=True, mutable=["intermediates"]))
  _, state = run(variables)
  blocks = {k: v["__call__"][0] for k, v in state["intermediates"].items() if k.startswith("stage")}
  stem = nn.relu(state["intermediates"]["stem_norm"]["__call__"][0])
  np.testing.assert_array_equal(blocks["stage1_block2"], stem)
  np.testing.assert_array_equal(blocks["stage2_block0"][..., :16], stem[:, ::2, ::2])
  np.testing.assert_array_equal(blocks["stage3_block2"][..., :16], stem[:, ::4, ::4])
  np.testing.assert_array_equal(blocks["stage3_block2"][..., 16:], 0)


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_remat_only_recomputes(block):
  assert_remat_only_recomputes(functools.partial(_tiny, block=block), _images(8))


@pytest.mark.slow  # the quick tests have the equality of the programs
@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_remat_changes_no_gradient_and_no_statistic(block):
  with jax.enable_x64(True):
    x, results = _images(8, dtype=np.float64), []
    for remat in (False, True):
      model = _tiny(block=block, remat=remat, dtype=jnp.float64)
      variables = random_variables(model, x, dtype=np.float64)

      def loss(params):
        logits, state = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.sum(logits**2), state

      grad = jax.jit(jax.grad(loss, has_aux=True))
      assert ("remat" in str(jax.make_jaxpr(grad)(variables["params"]))) == remat
      results.append(grad(variables["params"]))
  assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(results))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *results)


def test_padding_rows_do_not_reach_the_others():
  x, model = _images(8, batch=6), _tiny()
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


def test_he_initialisation_and_zero_init_residual():
  model = _tiny(block=resnet.Bottleneck, stage_sizes=(1,), width=64, zero_init_residual=True)
  params = jax.jit(model.init)(jax.random.key(0), _images(4))["params"]
  kernel = params["stage1_block0"]["conv2"]["kernel"]
  np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.02)
  for norm, value in (("norm1", 1), ("norm2", 1), ("norm3", 0), ("shortcut_norm", 1)):
    np.testing.assert_array_equal(params["stage1_block0"][norm]["scale"], value)


def test_another_convolution_can_be_plugged_in():
  calls = []

  class Watched(nn.Conv):

    def __call__(self, x):
      calls.append(self.name)
      return super().__call__(x)

  x, plain = _images(8), _tiny()
  variables = random_variables(plain, x)
  watched = _tiny(conv=functools.partial(Watched, conv_general_dilated=conv_general_dilated))
  np.testing.assert_array_equal(jax.jit(watched.apply)(variables, x), jax.jit(plain.apply)(variables, x))
  assert calls == ["stem_conv", "conv1", "conv2", "conv1", "conv2", "shortcut_conv"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_dtype_with_float32_parameters_and_statistics(dtype):
  model = _tiny(dtype=dtype)
  x = _images(8)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  logits, state = jax.eval_shape(lambda v: model.apply(v, x, train=True, mutable=["batch_stats"]), variables)
  assert logits.dtype == dtype
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((variables, state)))


def test_without_classes_it_is_a_backbone_that_gives_every_stage():
  model, x = _tiny().clone(num_classes=None), _images(8)
  variables = random_variables(model, x)
  assert "head" not in variables["params"]
  first, second = jax.jit(model.apply)(variables, x)
  assert first.shape == (2, 8, 8, 4) and second.shape == (2, 4, 4, 8)
  whole = random_variables(_tiny(), x)
  logits = jax.jit(_tiny().apply)({**whole, **{k: {**whole[k], **v} for k, v in variables.items()}}, x)
  head = whole["params"]["head"]
  np.testing.assert_allclose(second.mean(axis=(1, 2)) @ head["kernel"] + head["bias"], logits, rtol=1e-4, atol=1e-5)
