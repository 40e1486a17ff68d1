"""Parity with plain PyTorch layers."""

import functools

from dljax.models import lenet, mlp
from tests.interop.parity import assert_parity


def test_mlp_gives_torchs_logits():
  assert_parity(functools.partial(mlp.VARIANTS["mlp"], num_classes=10), "torch", "mlp")


def test_lenet5_gives_torchs_logits():
  assert_parity(functools.partial(lenet.VARIANTS["lenet5"], num_classes=10), "torch", "lenet5")
