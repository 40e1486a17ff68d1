"""The names of the forecasting baselines.

torch: DLinear has those of its authors' code, `Linear_Seasonal` and `Linear_Trend`, whose third,
`Linear_Decoder`, is not used there.
"""

from collections.abc import Mapping

import jax
import numpy as np

from dljax.interop.table import LINEAR, Table, columns, layer
from dljax.models import baselines


def _window(tensors: Mapping[str, np.ndarray]) -> tuple[jax.ShapeDtypeStruct, ...]:
  """DLinear's input [1, W, 1], with W read off a map; any number of channels is as good."""
  return (jax.ShapeDtypeStruct((1, columns(tensors, "Linear_Seasonal.weight"), 1), np.float32),)


DLINEAR = Table(
    rules=layer("seasonal", "Linear_Seasonal", LINEAR) + layer("trend", "Linear_Trend", LINEAR),
    inputs=_window,
    no_weight=r"Linear_Decoder\..*",
)

TABLES = {"torch": {baselines.DLinear: DLINEAR}}
