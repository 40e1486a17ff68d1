"""Parity with timm."""

import functools

import jax
import numpy as np
import pytest

from dljax import interop
from dljax.errors import UserError
from dljax.models import vit
from tests.fixtures import formula
from tests.interop.parity import assert_parity, assert_same_layers, assert_sgd_step

TINY = "vit_tiny_patch16_224"


def test_vit_gives_timms_logits():
  assert_parity(functools.partial(vit.VARIANTS["vit_ti16"], num_classes=1000), "timm", TINY)


@pytest.mark.slow
def test_a_wider_vit_gives_timms_logits():
  assert_parity(functools.partial(vit.VARIANTS["vit_s16"], num_classes=1000), "timm", "vit_small_patch16_224",
                blocks=(vit.Block,), light=True)


@pytest.mark.slow
def test_vit_b16_has_timms_layers():
  build, other = (functools.partial(vit.VARIANTS[name], num_classes=1000) for name in ("vit_b16", "vit_ti16"))
  assert_same_layers(build, "timm", "vit_base_patch16_224", [other])


@pytest.mark.slow
def test_a_step_of_sgd_gives_timms_parameters():
  assert_sgd_step(functools.partial(vit.VARIANTS["vit_ti16"], num_classes=1000), "timm", TINY)


@pytest.mark.parametrize("grid", [(7, 9), (20, 17)])
def test_positions_for_another_resolution_are_timms(grid):
  """Fewer patches than before, where antialiasing shows, and more."""
  fixture = formula.load(TINY)
  table = formula.fill("pos_embed", fixture["shapes"])
  ours = jax.jit(lambda x: vit.interpolate_positions(x, (14, 14), grid))(table)
  theirs = fixture["positions_{}x{}".format(*grid)]
  assert ours.shape == (1, 1 + grid[0] * grid[1], 192)
  np.testing.assert_allclose(ours[..., ::24], theirs, atol=1e-5 * np.abs(table).max())


@pytest.mark.parametrize("form", [{"pool": "mean"}, {"positions": "sincos"}])
def test_other_forms_are_refused(form):
  with pytest.raises(UserError, match="pool='token', positions='learned'"):
    interop.load(vit.VARIANTS["vit_ti16"](num_classes=1000, **form), {}, "timm")
