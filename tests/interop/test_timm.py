"""Parity with timm."""

import functools

import numpy as np
import pytest

from dljax import interop
from dljax.errors import UserError
from dljax.models import vit
from tests.fixtures import formula
from tests.interop.parity import assert_parity, assert_sgd_step

TIMM = {"vit_ti16": "vit_tiny_patch16_224", "vit_s16": "vit_small_patch16_224", "vit_b16": "vit_base_patch16_224"}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "vit_ti16" else pytest.mark.slow) for name in TIMM])
def test_vit_gives_timms_logits(name):
  assert_parity(functools.partial(vit.VARIANTS[name], num_classes=1000), "timm", TIMM[name])


@pytest.mark.slow
def test_a_step_of_sgd_gives_timms_parameters():
  assert_sgd_step(functools.partial(vit.VARIANTS["vit_ti16"], num_classes=1000), "timm", TIMM["vit_ti16"])


@pytest.mark.parametrize("grid", [(7, 9), (20, 17)])
def test_positions_are_interpolated_as_timm_does(grid):
  fixture = formula.load(TIMM["vit_ti16"])
  table = formula.fill("pos_embed", fixture["shapes"])
  ours, theirs = vit.interpolate_positions(table, (14, 14), grid), fixture[f"positions_{grid[0]}x{grid[1]}"]
  np.testing.assert_allclose(ours[..., ::24], theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("kwargs", [{"pool": "mean"}, {"positions": "sincos"}])
def test_the_table_is_for_a_class_token_and_learned_positions(kwargs):
  with pytest.raises(UserError, match="class token and learned positions"):
    interop.load(vit.VARIANTS["vit_nano"](num_classes=10, **kwargs), {}, "timm")
