"""Baselines of forecasting: the models that a recurrent network has to beat.

They are no family, but stand beside one in its table of results, made for the same task.

The seasonal-naive model repeats the values of one season ago. It has no parameters. Rob Hyndman,
George Athanasopoulos. "Forecasting: Principles and Practice", section 5.2.
https://otexts.com/fpp3/simple-methods.html

DLinear. Ailing Zeng, Muxi Chen, Lei Zhang, Qiang Xu. "Are Transformers Effective for Time Series
Forecasting?", 2023. https://arxiv.org/abs/2205.13504. As in the authors' code, the moving average
repeats the window's first and last value beyond its ends, and the weights start as a mean over the
window. The paper's variant with a map for each channel is not implemented.

Dimensions: `B` batch, `W` window, `H` horizon, `C` channels, `K` covariates, `Q` quantiles.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dljax.errors import UserError


class SeasonalNaive(nn.Module):
  """Repeats the last season of the window.

  Attributes:
    horizon: H.
    season: the length of a season, in rows.
    num_quantiles: Q, all of the same value; 0 for forecasts without that axis.
    dtype: the dtype of the result.
    remat: has no effect.
  """

  horizon: int
  season: int = 24
  num_quantiles: int = 0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
      self, window: jax.Array, covariates: jax.Array | None = None, *, train: bool = False,
  ) -> Mapping[str, jax.Array]:
    """Forecasts the rows after the window.

    Args:
      window: [B, W, C].
      covariates: [B, W + H, K]; have no effect.
      train: has no effect.

    Returns:
      {"logits": [B, H, C] or [B, H, C, Q]}, of `dtype`.

    Raises:
      UserError: the season is longer than the window.
    """
    del covariates, train
    length = window.shape[1]
    if not 1 <= self.season <= length:
      raise UserError(f"--config.model.season={self.season}: must be from 1 to the window's "
                      f"{length} rows")
    places = length - self.season + np.arange(self.horizon) % self.season
    last = window[:, places].astype(self.dtype)
    if self.num_quantiles:
      last = jnp.broadcast_to(last[..., None], (*last.shape, self.num_quantiles))
    return {"logits": last}


class DLinear(nn.Module):
  """A linear map of the window's moving average, and another of the remainder.

  All channels share the maps.

  Attributes:
    horizon: H.
    kernel_size: the length of the moving average, in rows; odd.
    num_quantiles: Q, each with its own maps; 0 for forecasts without that axis.
    dtype: the dtype of the computation and the result; parameters are float32.
    remat: has no effect, as there is next to nothing to recompute.
  """

  horizon: int
  kernel_size: int = 25
  num_quantiles: int = 0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
      self, window: jax.Array, covariates: jax.Array | None = None, *, train: bool = False,
  ) -> Mapping[str, jax.Array]:
    """Forecasts the rows after the window.

    Args:
      window: [B, W, C].
      covariates: [B, W + H, K]; have no effect.
      train: has no effect.

    Returns:
      {"logits": [B, H, C] or [B, H, C, Q]}, of `dtype`.

    Raises:
      UserError: the kernel's size is not odd.
    """
    del covariates, train
    if self.kernel_size < 1 or self.kernel_size % 2 == 0:
      raise UserError(f"--config.model.kernel_size={self.kernel_size}: must be odd and at least 1")
    batch, length, channels = window.shape
    window = window.astype(self.dtype)
    margin = self.kernel_size // 2
    padded = jnp.pad(window, ((0, 0), (margin, margin), (0, 0)), mode="edge")
    trend = nn.avg_pool(padded, (self.kernel_size,), (1,))  # [B, W, C]

    def linear(x: jax.Array, name: str) -> jax.Array:  # [B, W, C] -> [B, C, H Q]
      return nn.Dense(
          self.horizon * max(self.num_quantiles, 1), dtype=self.dtype, name=name,
          kernel_init=nn.initializers.constant(1 / length))(x.swapaxes(1, 2))

    forecast = linear(window - trend, "seasonal") + linear(trend, "trend")
    forecast = forecast.reshape(batch, channels, self.horizon, -1)  # [B, C, H, max(Q, 1)]
    forecast = forecast.swapaxes(1, 2)
    return {"logits": forecast if self.num_quantiles else forecast[..., 0]}


VARIANTS: Mapping[str, Callable[..., nn.Module]] = {
    "seasonal_naive": SeasonalNaive,  # no parameters
    "dlinear": DLinear,  # 2 (W + 1) H parameters: 64,704 with window 336 and horizon 96
}
