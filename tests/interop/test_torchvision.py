"""Parity with torchvision."""

import functools

import jax
import numpy as np
import pytest

from dljax import interop
from dljax.models import resnet
from tests.fixtures import formula
from tests.interop.parity import assert_equals_peer, assert_parity

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
