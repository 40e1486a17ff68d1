"""The baselines of forecasting: closed forms, and that they are as simple as they claim to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dljax.errors import UserError
from dljax.models import baselines
from dljax.train.state import parameter_count
from tests.models.variables import random_variables

WINDOW = np.random.RandomState(0).normal(size=(2, 40, 3)).astype(np.float32)


@pytest.mark.parametrize("kwargs, count", [({}, 64_704), ({"num_quantiles": 3}, 3 * 64_704)])
def test_dlinears_parameters(kwargs, count):
  model = baselines.VARIANTS["dlinear"](horizon=96, **kwargs)
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 336, 7)))
  assert parameter_count(variables["params"]) == count


def test_seasonal_naive_repeats_the_last_season_without_parameters():
  model = baselines.VARIANTS["seasonal_naive"](horizon=11, season=4)
  forecast, variables = model.init_with_output(jax.random.key(0), WINDOW)
  assert not jax.tree.leaves(variables)
  np.testing.assert_array_equal(forecast["logits"], np.tile(WINDOW[:, -4:], (1, 3, 1))[:, :11])
  quantiles = model.clone(num_quantiles=2).apply({}, WINDOW)["logits"]
  np.testing.assert_array_equal(quantiles, np.repeat(forecast["logits"][..., None], 2, axis=-1))


@pytest.mark.parametrize("season", [0, 41])
def test_a_season_that_is_not_in_the_window_is_refused(season):
  with pytest.raises(UserError, match=f"model.season={season}: must be from 1 to the window's 40 rows"):
    baselines.SeasonalNaive(horizon=3, season=season).apply({}, WINDOW)


def test_dlinear_maps_the_moving_average_and_the_rest():
  model = baselines.DLinear(horizon=5, kernel_size=7)
  variables = random_variables(model, WINDOW)
  p = variables["params"]
  padded = np.concatenate([np.repeat(WINDOW[:, :1], 3, 1), WINDOW, np.repeat(WINDOW[:, -1:], 3, 1)], axis=1)
  trend = np.stack([padded[:, i:i + 7].mean(axis=1) for i in range(40)], axis=1)
  want = sum(np.einsum("bwc,wh->bhc", x, p[name]["kernel"]) + p[name]["bias"][:, None]
             for x, name in ((WINDOW - trend, "seasonal"), (trend, "trend")))
  np.testing.assert_allclose(model.apply(variables, WINDOW)["logits"], want, atol=1e-5)


def test_dlinear_begins_as_the_mean_of_the_window():
  forecast, _ = baselines.DLinear(horizon=5).init_with_output(jax.random.key(0), WINDOW)
  np.testing.assert_allclose(
      forecast["logits"], np.repeat(WINDOW.mean(axis=1, keepdims=True), 5, axis=1), atol=1e-6)


def test_channels_share_dlinears_maps_and_do_not_see_each_other():
  model = baselines.DLinear(horizon=5)
  variables = random_variables(model, WINDOW)
  whole = model.apply(variables, WINDOW)["logits"]
  for c in range(3):
    np.testing.assert_allclose(model.apply(variables, WINDOW[..., c:c + 1])["logits"][..., 0], whole[..., c], atol=1e-5)


def test_each_quantile_has_maps_of_its_own():
  model = baselines.DLinear(horizon=5, num_quantiles=2)
  variables = random_variables(model, WINDOW)
  out = model.apply(variables, WINDOW)["logits"]
  assert out.shape == (2, 5, 3, 2)
  for q in range(2):
    own = {"params": jax.tree.map(lambda x: x[..., q::2], variables["params"])}
    np.testing.assert_allclose(baselines.DLinear(horizon=5).apply(own, WINDOW)["logits"], out[..., q], atol=1e-5)


def test_an_even_kernel_is_refused():
  with pytest.raises(UserError, match="model.kernel_size=24: must be odd"):
    baselines.DLinear(horizon=5, kernel_size=24).init(jax.random.key(0), WINDOW)


@pytest.mark.parametrize("name", baselines.VARIANTS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_dtype_with_float32_parameters(name, dtype):
  model = baselines.VARIANTS[name](horizon=5, dtype=dtype)
  out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), WINDOW)
  assert out["logits"].dtype == dtype and out["logits"].shape == (2, 5, 3)
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
