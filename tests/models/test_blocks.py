"""What families of attention share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.models.blocks import Projection
from dljax.models.layers import RMSNorm
from tests.models.variables import random_variables


@pytest.mark.parametrize("lora_rank", [0, 3])
def test_a_projection_is_a_product_over_the_last_axes(lora_rank):
  x = np.random.RandomState(0).normal(size=(2, 3, 4, 5))
  layer = Projection((6, 2), axes=2, lora_rank=lora_rank, lora_alpha=6.0, dtype=jnp.float64)
  with jax.enable_x64(True):
    variables = random_variables(layer, x, dtype=np.float64)
    params = variables["params"]
    kernel = params["kernel"]
    assert kernel.shape == (4, 5, 6, 2)
    if lora_rank:
      kernel = kernel + 6.0 / 3 * np.einsum("abr,rcd->abcd", params["lora_down"], params["lora_up"])
    wanted = np.einsum("nmab,abcd->nmcd", x, kernel) + params["bias"]
    np.testing.assert_allclose(layer.apply(variables, x), wanted, rtol=1e-12)


def test_a_kernel_starts_as_the_matrix_of_all_its_inputs_and_outputs():
  """The fans are those of [20, 12], so that the variance is 1 / 20."""
  params = Projection((30, 40), axes=2).init(jax.random.key(0), jnp.ones((1, 4, 5)))["params"]
  assert np.std(params["kernel"]) == pytest.approx(20**-0.5, rel=0.05)


def test_rms_norm_rounds_before_it_scales():
  x = jnp.asarray(np.random.RandomState(0).normal(size=(3, 8)) * 50, jnp.bfloat16)
  scale = np.linspace(0.5, 2, 8, dtype=np.float32)
  wide = np.asarray(x, np.float64)
  unit = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
  wanted = jnp.asarray(unit.astype(np.float32), jnp.bfloat16) * jnp.asarray(scale, jnp.bfloat16)
  y = RMSNorm(1e-6, jnp.bfloat16).apply({"params": {"scale": scale}}, x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y.astype(np.float32), wanted.astype(np.float32))
