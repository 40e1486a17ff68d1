"""Parity with torchvision."""

import functools

import jax
import numpy as np
import pytest

from dljax import interop
from dljax.errors import UserError
from dljax.models import alexnet, efficientnet, resnet, vgg, vit
from tests.fixtures import formula
from tests.interop.parity import assert_equals_peer, assert_parity, assert_sgd_step


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_gives_torchvisions_logits(name):
  assert_parity(functools.partial(resnet.VARIANTS[name], num_classes=1000), "torchvision", name)


@pytest.mark.slow
@pytest.mark.parametrize("name, tolerance", [("resnet34", 1e-4), ("resnet101", 1e-4), ("resnet152", 3e-4)])
def test_the_other_resnets_give_torchvisions_logits(name, tolerance):
  assert_parity(functools.partial(resnet.VARIANTS[name], num_classes=1000), "torchvision", name, tolerance)


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


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "vgg11_bn" else pytest.mark.slow) for name in vgg.VARIANTS])
def test_vgg_gives_torchvisions_logits(name):
  assert_parity(functools.partial(vgg.VARIANTS[name], num_classes=1000), "torchvision", name)


@pytest.mark.parametrize("name, variants", [
    ("resnet18", resnet.VARIANTS),
    *(pytest.param(name, variants, marks=pytest.mark.slow) for name, variants in (
        ("alexnet", alexnet.VARIANTS), ("vgg11_bn", vgg.VARIANTS), ("efficientnet_b0", efficientnet.VARIANTS))),
])
def test_a_step_of_sgd_gives_torchvisions_parameters(name, variants):
  off = {field: 0.0 for field in ("dropout", "stochastic_depth") if hasattr(variants[name](num_classes=1), field)}
  assert_sgd_step(functools.partial(variants[name], num_classes=1000, **off), "torchvision", name)


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


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "efficientnet_b0" else pytest.mark.slow) for name in efficientnet.SCALING])
def test_efficientnet_gives_torchvisions_logits(name):
  assert_parity(functools.partial(efficientnet.VARIANTS[name], num_classes=1000), "torchvision", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b16", "vit_b32", "vit_l16"])
def test_vit_gives_torchvisions_logits(name):
  stem = f"{name[:-2]}_{name[-2:]}"
  assert_parity(functools.partial(vit.VARIANTS[name], num_classes=1000), "torchvision", stem)


@pytest.mark.parametrize("kwargs", [{"pool": "mean"}, {"positions": "sincos"}])
def test_torchvisions_vit_has_a_class_token_and_learned_positions(kwargs):
  with pytest.raises(UserError, match="class token and learned positions"):
    interop.load(vit.VARIANTS["vit_nano"](num_classes=10, **kwargs), {}, "torchvision")
