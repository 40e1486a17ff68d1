"""Parity with torchvision."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax import interop
from dljax.errors import UserError
from dljax.models import alexnet, efficientnet, resnet, retinanet, vgg, vit
from dljax.tasks import boxes, detection
from tests.fixtures import formula
from tests.interop.parity import assert_equals_peer, assert_parity, assert_same_layers, assert_sgd_step
from tests.smallest import native_convolutions


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_resnet_gives_torchvisions_logits(name):
  assert_parity(functools.partial(resnet.VARIANTS[name], num_classes=1000), "torchvision", name)


@pytest.mark.slow
def test_the_deepest_resnet_gives_torchvisions_logits():
  build = functools.partial(resnet.VARIANTS["resnet152"], num_classes=1000)
  assert_parity(build, "torchvision", "resnet152", 3e-4, blocks=(resnet.Bottleneck,), light=True)


@pytest.mark.slow
@pytest.mark.parametrize("name, like", [("resnet34", "resnet18"), ("resnet101", "resnet50")])
def test_the_resnets_in_between_have_torchvisions_layers(name, like):
  build, other = (functools.partial(resnet.VARIANTS[n], num_classes=1000) for n in (name, like))
  assert_same_layers(build, "torchvision", name, [other])


def test_resnet18_in_training_mode_gives_torchvisions_logits_and_running_statistics():
  fixture = formula.load("resnet18")
  image = formula.image(tuple(fixture["image_shape"])).astype(np.float64)
  with jax.enable_x64(True):
    model = resnet.VARIANTS["resnet18"](num_classes=1000, dtype=np.float64)
    variables = jax.tree.map(np.float64, interop.load(model, formula.tensors(fixture), "torchvision"))
    step = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    logits, state = step(variables, image)
  assert_equals_peer(logits, fixture["train_logits"], 1e-9)

  old = interop.dump(model, variables, "torchvision")
  new = interop.dump(model, {**variables, **state}, "torchvision")
  names = [name for name in fixture["shapes"] if formula.is_statistic(name)]
  statistics = np.concatenate([new[name][::8] for name in names])
  np.testing.assert_allclose(statistics, fixture["train_statistics"], rtol=1e-9, atol=1e-12)
  assert not any(np.array_equal(old[name], new[name]) for name in names)


def test_alexnet_gives_torchvisions_logits():
  assert_parity(functools.partial(alexnet.VARIANTS["alexnet"], num_classes=1000), "torchvision", "alexnet")


def test_torchvision_has_no_alexnet_of_2012():
  with pytest.raises(UserError, match="neither groups nor response normalisation"):
    interop.load(alexnet.VARIANTS["alexnet_2012"](num_classes=1000), {}, "torchvision")


LARGE_VGGS = ("vgg11", "vgg19_bn")  # with the classifier of 4096 hidden units
VGGS = {name: functools.partial(variant, num_classes=1000, **({} if name in LARGE_VGGS else {"hidden_width": 64}))
        for name, variant in vgg.VARIANTS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(VGGS.keys() - {"vgg19_bn"}))
def test_vgg_gives_torchvisions_logits(name):
  """In float64 a step of SGD is compared."""
  assert_parity(VGGS[name], "torchvision", name, light=True)


@pytest.mark.slow
def test_the_largest_vgg_has_torchvisions_layers():
  assert_same_layers(VGGS["vgg19_bn"], "torchvision", "vgg19_bn", [VGGS["vgg16_bn"]])


@pytest.mark.parametrize("name, build", [
    ("resnet18", resnet.VARIANTS["resnet18"]),
    pytest.param("alexnet", alexnet.VARIANTS["alexnet"], marks=pytest.mark.slow),
    pytest.param("vgg11_bn", functools.partial(vgg.VARIANTS["vgg11_bn"], hidden_width=64), marks=pytest.mark.slow),
    # B0's first and third stages, which have all kinds of its blocks.
    pytest.param("efficientnet_short", functools.partial(efficientnet.EfficientNet, stages=efficientnet.B0[:3:2]),
                 marks=pytest.mark.slow),
])
def test_a_step_of_sgd_gives_torchvisions_parameters(name, build):
  off = {field: 0.0 for field in ("dropout", "stochastic_depth") if hasattr(build(num_classes=1), field)}
  assert_sgd_step(functools.partial(build, num_classes=1000, **off), "torchvision", name)


# retinanet_resnet50_fpn with one block in each stage of its backbone: gradients and frozen norms are those of a block.
RETINANET_SHORT = {"block": resnet.Bottleneck, "stage_sizes": (1, 1, 1, 1)}
RETINANET_BLOCKS = (resnet.Bottleneck, retinanet.FeaturePyramid, retinanet.Head)


def _raw_outputs(outputs):
  outputs = jnp.concatenate([outputs["logits"], outputs["boxes"]], axis=-1)
  return outputs[:, formula.some_anchors(outputs.shape[1])]


@pytest.mark.slow
def test_retinanet_gives_torchvisions_raw_outputs():
  """The second form has the layers of the first, and normalised heads; the short one is compared in float32."""
  build = functools.partial(retinanet.VARIANTS["retinanet_resnet50_fpn_v2"], num_classes=91)
  assert_parity(
      build, "torchvision", "retinanet_resnet50_fpn_v2", read=_raw_outputs, blocks=RETINANET_BLOCKS, exact=True)


@pytest.mark.slow
def test_the_first_retinanet_has_torchvisions_layers():
  """The short one is like it, whose step is compared in float64."""
  build = functools.partial(retinanet.VARIANTS["retinanet_resnet50_fpn"], num_classes=91)
  short = functools.partial(retinanet.RetinaNet, num_classes=91, **RETINANET_SHORT)
  assert_same_layers(build, "torchvision", "retinanet_resnet50_fpn", [short], _raw_outputs)


@pytest.mark.slow
def test_a_frozen_norm_gives_torchvisions_raw_outputs():
  """torchvision itself freezes the norms where the backbone was trained before."""
  build = functools.partial(retinanet.RetinaNet, num_classes=91, frozen_norm=True, **RETINANET_SHORT)
  assert_parity(build, "torchvision", "retinanet_short", read=_raw_outputs, light=True)


@pytest.mark.slow
def test_a_step_of_sgd_by_torchvisions_own_loss_gives_its_retinanets_parameters():
  """The whole of it: anchors, matching, focal loss, box loss. For one image, as they divide by each image's objects."""
  def detect(model, image, fixture):
    anchors = boxes.Anchors.octaves([4 * stride for stride in model.strides])
    return detection.Detection(model, model.num_classes, anchors), {
        "image": image[:1], "mask": np.ones(1), "boxes": np.array([formula.BOXES]),
        "box_label": np.array([formula.LABELS], np.int32), "box_mask": np.ones((1, len(formula.BOXES)))}

  build = functools.partial(retinanet.RetinaNet, num_classes=91, **RETINANET_SHORT)
  with native_convolutions():
    assert_sgd_step(build, "torchvision", "retinanet_short", detect)


def test_retinanets_older_names_are_understood():
  """Those of torchvision's version 1 of the heads and the pyramid."""
  model = retinanet.VARIANTS["retinanet_small"](num_classes=3, width=8, backbone_width=4, frozen_norm=True)
  variables = jax.tree.map(
      lambda s: np.random.default_rng(0).normal(size=s.shape).astype(s.dtype),
      jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64, 64, 1), np.float32)))
  tensors = interop.dump(model, variables, "torchvision")
  assert "backbone.body.layer1.0.bn1.running_var" in tensors and "head.regression_head.conv.1.0.bias" in tensors
  older = {}
  for name, tensor in tensors.items():
    name = re.sub(r"(_blocks\.\d)\.0\.", r"\1.", name)
    older[re.sub(r"conv\.(\d)\.0\.", lambda match: f"conv.{2 * int(match[1])}.", name)] = tensor
  assert {"backbone.fpn.inner_blocks.2.weight", "head.classification_head.conv.2.bias"} <= set(older)
  back = interop.load(model, older, "torchvision")
  jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize("build, size", [
    (functools.partial(alexnet.VARIANTS["alexnet"], width_factor=0.25, pooled_size=3, hidden_width=24, stem=(5, 1, 2)),
     28),
    (functools.partial(vgg.VARIANTS["vgg13_bn"], width_factor=0.125, pooled_size=2, hidden_width=24, num_pools=3), 28),
])
def test_small_forms_have_torchvisions_names_and_come_back(build, size):
  """The layout of the first linear layer, too, follows the sizes: H, W, C with us, C, H, W there."""
  model = build(num_classes=10)
  image = np.zeros((1, size, size, 1), np.float32)
  draw = np.random.default_rng(0)
  variables = jax.tree.map(
      lambda s: draw.normal(size=s.shape).astype(s.dtype), jax.eval_shape(model.init, jax.random.key(0), image))
  tensors = interop.dump(model, variables, "torchvision")
  jax.tree.map(np.testing.assert_array_equal, interop.load(model, tensors, "torchvision"), variables)
  first = "fc6" if "fc6" in variables["params"] else "fc1"
  kernel = variables["params"][first]["kernel"]
  name = next(name for name in tensors if name.startswith("classifier.") and tensors[name].shape == kernel.shape[::-1])
  side, channels = model.pooled_size, len(kernel) // model.pooled_size**2
  for c, i, j in ((0, 0, 0), (3, 0, 1), (channels - 1, 1, 0)):
    np.testing.assert_array_equal(tensors[name][:, (c * side + i) * side + j], kernel[(i * side + j) * channels + c])


# The smallest, and the smallest of those with another normalisation. All sizes have the blocks of B0.
EFFICIENTNETS = {name: functools.partial(efficientnet.VARIANTS[name], num_classes=1000)
                 for name in ("efficientnet_b0", "efficientnet_b5")}


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFICIENTNETS)
def test_efficientnet_gives_torchvisions_logits(name):
  smallest = name == "efficientnet_b0"
  assert_parity(EFFICIENTNETS[name], "torchvision", name, light=not smallest, exact=smallest)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(efficientnet.SCALING.keys() - EFFICIENTNETS.keys()))
def test_the_other_efficientnets_have_torchvisions_layers(name):
  build = functools.partial(efficientnet.VARIANTS[name], num_classes=1000)
  assert_same_layers(build, "torchvision", name, EFFICIENTNETS.values())


def test_the_efficientnets_that_torchvision_normalises_otherwise():
  """By fields of its `BatchNorm2d`, of which the first has a part in the logits."""
  own = {name for name in efficientnet.SCALING
         if (efficientnet.VARIANTS[name](num_classes=1).norm().epsilon,
             efficientnet.VARIANTS[name](num_classes=1).norm().momentum) == (1e-3, 0.01)}
  assert own == {"efficientnet_b5", "efficientnet_b6", "efficientnet_b7"}


VITS = {name: functools.partial(vit.VARIANTS[name], num_classes=1000) for name in ("vit_b16", "vit_b32", "vit_l16")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b16", "vit_b32"])
def test_vit_gives_torchvisions_logits(name):
  stem, light = f"{name[:-2]}_{name[-2:]}", name != "vit_b32"
  assert_parity(VITS[name], "torchvision", stem, blocks=(vit.Block,), light=light)


@pytest.mark.slow
def test_the_largest_vit_has_torchvisions_layers():
  assert_same_layers(VITS["vit_l16"], "torchvision", "vit_l_16", [VITS["vit_b16"]])


@pytest.mark.parametrize("kwargs", [{"pool": "mean"}, {"positions": "sincos"}])
def test_torchvisions_vit_has_a_class_token_and_learned_positions(kwargs):
  with pytest.raises(UserError, match="class token and learned positions"):
    interop.load(vit.VARIANTS["vit_nano"](num_classes=10, **kwargs), {}, "torchvision")
