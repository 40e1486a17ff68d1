"""Parity with plain PyTorch layers."""

import functools

import numpy as np
import pytest

from dljax.models import baselines, lenet, mlp, unet
from dljax.models.layers import BatchNorm
from dljax.tasks.segmentation import Segmentation
from tests.fixtures import formula
from tests.interop.parity import assert_parity, assert_sgd_step

SMALL_UNET = functools.partial(unet.UNet, num_classes=3, width=8, num_pools=2)
UNETS = {"unet_unpadded": SMALL_UNET, "unet_padded": functools.partial(SMALL_UNET, padded=True, norm=BatchNorm)}


def test_mlp_gives_torchs_logits():
  assert_parity(functools.partial(mlp.VARIANTS["mlp"], num_classes=10), "torch", "mlp")


def test_lenet5_gives_torchs_logits():
  assert_parity(functools.partial(lenet.VARIANTS["lenet5"], num_classes=10), "torch", "lenet5")


@pytest.mark.parametrize("name", UNETS)
def test_unet_gives_torchs_logits(name):
  assert_parity(UNETS[name], "torch", name)


@pytest.mark.slow
def test_the_unet_of_2015_gives_torchs_logits():
  assert_parity(functools.partial(unet.VARIANTS["unet_2015"], num_classes=2), "torch", "unet_2015")


def test_dlinear_gives_its_authors_forecasts():
  assert_parity(functools.partial(baselines.VARIANTS["dlinear"], horizon=12), "torch", "dlinear",
                read=lambda out: out["logits"])


def _segment(model, image, fixture):
  """The classes of the pixels that there are logits of; the border has any, which must not matter."""
  batch, height, width, classes = fixture["logits"].shape
  top, left = ((have - want) // 2 for have, want in zip(image.shape[1:3], (height, width)))
  truth = np.zeros(image.shape[:3], np.int32)
  truth[:, top:top + height, left:left + width] = formula.pixel_classes((batch, height, width), classes)
  return Segmentation(model, classes), {"image": image, "segmentation": truth, "mask": np.ones(batch)}


@pytest.mark.parametrize("name", UNETS)
def test_a_step_of_sgd_gives_torchs_parameters(name):
  assert_sgd_step(UNETS[name], "torch", name, _segment)
