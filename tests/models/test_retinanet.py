"""RetinaNet: parameter counts, the pyramid and the order of its outputs, frozen norms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.models import resnet, retinanet
from dljax.tasks import boxes
from dljax.train.state import parameter_count
from tests.models.programs import assert_remat_only_recomputes
from tests.models.variables import random_variables

# At 91 classes; torchvision's own numbers of parameters are the first two.
COUNTS = {"retinanet_resnet50_fpn": 34_068_119, "retinanet_resnet50_fpn_v2": 38_198_935,
          "retinanet_resnet101_fpn": 53_060_247}


def _tiny(**kwargs):
  sizes = {"stage_sizes": (1, 1, 1), "backbone_width": 4, "first_stage": 2, "extra_levels": 1, "width": 4,
           "head_depth": 1, "num_anchors": 2}
  return retinanet.RetinaNet(num_classes=3, block=resnet.BasicBlock, small_stem=True, **{**sizes, **kwargs})


def _images(height, width, batch=2, channels=3, dtype=np.float32):
  return np.random.RandomState(0).normal(size=(batch, height, width, channels)).astype(dtype)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_at_91_classes(name):
  count = lambda **kwargs: parameter_count(jax.eval_shape(
      retinanet.VARIANTS[name](num_classes=91, **kwargs).init, jax.random.key(0), _images(64, 64))["params"])
  assert count() == COUNTS[name]
  if name == "retinanet_resnet50_fpn":
    assert count(frozen_norm=True) == 34_014_999


def test_every_variant_is_counted():
  assert retinanet.VARIANTS.keys() == {*COUNTS, "retinanet_small"}
  model = retinanet.VARIANTS["retinanet_small"](num_classes=10)
  params = jax.eval_shape(model.init, jax.random.key(0), _images(96, 96, channels=1))["params"]
  assert parameter_count(params) == SMALL


SMALL = 1_586_350


@pytest.mark.parametrize("name, size, strides", [
    ("retinanet_resnet50_fpn", (96, 128), (8, 16, 32, 64, 128)),
    ("retinanet_resnet50_fpn", (75, 50), (8, 16, 32, 64, 128)),
    ("retinanet_small", (96, 96), (4, 8, 16)),
])
def test_grids_and_strides_are_those_of_the_network(name, size, strides):
  model = retinanet.VARIANTS[name](num_classes=5)
  assert model.strides == strides
  outputs, state = jax.eval_shape(
      lambda x: model.init_with_output(
          jax.random.key(0), x, capture_intermediates=lambda m, _: m.name == "fpn",
          mutable=["params", "batch_stats", "intermediates"]), _images(*size))
  levels = state["intermediates"]["fpn"]["__call__"][0]
  assert [level.shape[1:3] for level in levels] == model.grids(*size)
  assert {level.shape[-1] for level in levels} == {model.width}
  count = len(boxes.Anchors.octaves([4 * s for s in strides]).boxes(model.grids(*size), *size))
  assert outputs["logits"].shape == (2, count, 5) and outputs["boxes"].shape == (2, count, 4)


def test_outputs_are_in_the_order_level_row_column_anchor():
  """A change of the image moves the outputs of the cells over it, most where it is."""
  model = _tiny(first_stage=1, extra_levels=0, num_anchors=3)
  x = _images(16, 16, batch=1)
  variables = random_variables(model, x)
  # The heads' outputs tell the anchors apart by their bias alone.
  kernel = variables["params"]["class_head"]["output"]["kernel"]
  kernel[:] = kernel[..., :1]
  variables["params"]["class_head"]["output"]["bias"][:] = np.repeat([0.0, 100.0, 200.0], 3) + np.tile([0, 10, 20], 3)
  run = jax.jit(lambda x: model.apply(variables, x)["logits"])
  before = run(x)
  changed = x.copy()
  changed[0, 12, 2] += 3
  fine = lambda y: np.asarray(y)[0, :16 * 16 * 3].reshape(16, 16, 3, 3)
  difference = np.abs(fine(run(changed)) - fine(before)).sum(axis=(2, 3))
  assert np.hypot(*np.subtract(np.unravel_index(difference.argmax(), (16, 16)), (12, 2))) <= 3
  np.testing.assert_allclose(fine(before)[:, :, 2, 1] - fine(before)[:, :, 0, 0], 210, rtol=1e-4)


def test_each_level_knows_what_the_coarser_ones_see():
  """Zeros in a lateral connection leave of a level what comes from above: constant over 2x2 cells."""
  pyramid = retinanet.FeaturePyramid(width=2, extra_levels=0, extra_of_stage=False, conv=retinanet.Conv)
  stages = [_images(8, 6, channels=3), _images(4, 3, channels=5)]
  variables = random_variables(pyramid, stages)
  params = variables["params"]
  params["lateral0"] = jax.tree.map(np.zeros_like, params["lateral0"])
  for name in ("output0", "output1"):  # hand on what they are given
    params[name] = {"kernel": np.zeros((3, 3, 2, 2), np.float32), "bias": np.zeros(2, np.float32)}
    params[name]["kernel"][1, 1] = np.eye(2)
  fine, coarse = jax.jit(pyramid.apply)(variables, stages)
  np.testing.assert_allclose(fine, np.repeat(np.repeat(coarse, 2, axis=1), 2, axis=2), rtol=1e-5)
  assert np.std(coarse) > 0.1


@pytest.mark.parametrize("of_stage", [False, True])
def test_the_first_extra_level_is_made_of_the_stage_or_of_its_level(of_stage):
  pyramid = retinanet.FeaturePyramid(width=2, extra_levels=2, extra_of_stage=of_stage, conv=retinanet.Conv)
  stages = [_images(8, 6, channels=3), _images(4, 3, channels=5)]
  variables = random_variables(pyramid, stages)
  run = jax.jit(pyramid.apply)
  before = run(variables, stages)
  variables["params"]["output1"] = jax.tree.map(np.zeros_like, variables["params"]["output1"])
  after = run(variables, stages)
  assert [x.shape[1:3] for x in after] == [(8, 6), (4, 3), (2, 2), (1, 1)]
  assert [np.array_equal(*pair) for pair in zip(before, after)] == [True, False, of_stage, of_stage]


def test_the_second_extra_level_sees_what_the_first_has_above_zero():
  pyramid = retinanet.FeaturePyramid(width=2, extra_levels=2, extra_of_stage=True, conv=retinanet.Conv)
  variables = random_variables(pyramid, [_images(4, 4, channels=3)])
  variables["params"]["extra0"]["bias"] -= 100
  *_, last = jax.jit(pyramid.apply)(variables, [_images(4, 4, channels=3)])
  np.testing.assert_array_equal(last[0, 0, 0], variables["params"]["extra1"]["bias"])


def test_normalised_heads_do_not_depend_on_the_scale_of_their_kernels():
  head = retinanet.Head(depth=2, outputs=3, num_anchors=2, bias=0.0, norm_groups=2, conv=retinanet.Conv)
  levels = [_images(4, 4, channels=4), _images(2, 2, channels=4)]
  variables = random_variables(head, levels)
  run = jax.jit(head.apply)
  before = run(variables, levels)
  variables["params"]["conv1"]["kernel"] *= 3
  np.testing.assert_allclose(run(variables, levels), before, rtol=1e-3, atol=1e-4)
  assert "bias" not in variables["params"]["conv0"]


def test_odd_sizes_take_the_cell_that_they_lie_in():
  x = np.arange(6.0).reshape(1, 2, 3, 1)
  expected = x[:, [0, 0, 1]][:, :, [0, 0, 1, 1, 2]]  # rows 0, 2/3, 4/3 and columns 0, 3/5, ... of the coarse grid
  np.testing.assert_array_equal(jax.jit(retinanet._upsample, static_argnums=1)(x, (1, 3, 5, 1)), expected)


def test_all_begins_as_background():
  model = _tiny(stage_sizes=(1, 1))
  logits = jax.jit(lambda key: model.init_with_output(key, _images(16, 16))[0]["logits"])(jax.random.key(0))
  probability = jax.jit(jax.nn.sigmoid)(logits)
  np.testing.assert_allclose(probability, retinanet.PRIOR, rtol=0.1)


def test_frozen_norms_never_change_and_normalise_alike_in_training():
  x = _images(16, 16)
  model, plain = _tiny(frozen_norm=True), _tiny()
  frozen, usual = random_variables(model, x), random_variables(plain, x)
  out, state = jax.jit(lambda v: model.apply(v, x, train=True, mutable=["batch_stats"]))(frozen)
  jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], frozen["batch_stats"])
  # The same numbers as constants and as parameters.
  norms = {**usual["params"]["backbone"]}
  for name, block in frozen["batch_stats"]["backbone"].items():
    if "scale" in block:
      norms[name] = {k: block[k] for k in ("scale", "bias")}
    else:
      norms[name] = {**norms[name], **{n: {k: s[k] for k in ("scale", "bias")} for n, s in block.items()}}
  for name, layer in frozen["params"]["backbone"].items():
    norms[name] = {**norms.get(name, {}), **layer}
  stats = jax.tree.map(lambda x: x, frozen["batch_stats"])
  pick = lambda tree: {k: v for k, v in tree.items() if k in ("mean", "var")} if "mean" in tree else {
      k: pick(v) for k, v in tree.items()}
  same = {"params": {**frozen["params"], "backbone": norms}, "batch_stats": pick(stats)}
  evaluated = jax.jit(plain.apply)(same, x)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), out, evaluated)


def test_padding_rows_do_not_reach_the_others():
  x, model = _images(8, 8, batch=4), _tiny()
  variables = random_variables(model, x)
  run = jax.jit(lambda x, mask: model.apply(variables, x, mask, train=True, mutable=["batch_stats"])[0]["logits"])
  mask = np.array([1, 0, 1, 0], np.float32)
  padded = run(x, mask)[mask > 0]
  np.testing.assert_allclose(padded, run(x[[0, 2, 0, 2]], np.ones(4, np.float32))[:2], rtol=1e-3, atol=1e-4)
  assert np.abs(padded - run(x, np.ones(4, np.float32))[mask > 0]).max() > 1e-2


def test_remat_only_recomputes():
  assert_remat_only_recomputes(_tiny, _images(8, 8))


def test_remat_changes_no_gradient():
  with jax.enable_x64(True):
    x, results = _images(8, 8, dtype=np.float64), []
    for remat in (False, True):
      model = _tiny(remat=remat, dtype=jnp.float64)
      variables = random_variables(model, x, dtype=np.float64)
      loss = lambda params: sum(
          jnp.sum(y**2) for y in model.apply({**variables, "params": params}, x, train=True,
                                             mutable=["batch_stats"])[0].values())
      grad = jax.jit(jax.grad(loss))
      assert ("remat" in str(jax.make_jaxpr(grad)(variables["params"]))) == remat
      results.append(grad(variables["params"]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *results)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_dtype_with_float32_parameters_and_statistics(dtype, frozen):
  model, x = _tiny(dtype=dtype, frozen_norm=frozen), _images(8, 8)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  outputs, state = jax.eval_shape(lambda v: model.apply(v, x, train=True, mutable=["batch_stats"]), variables)
  assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((variables, state)))
